"""What a replica is made of: models, what a request costs each of them, queues. No Ray in here."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from zsaa import finetune
from zsaa.kit.store import RESULTS
from zsaa.models import load_model
from zsaa.serve import app as http
from zsaa.serve import costs
from zsaa.serve.controller import Policy, Rung, policy_named
from zsaa.serve.engine import Classifier, Completer, Engine
from zsaa.serve.lane import WRITES, Lane

ADAPTER = RESULTS / "adapters" / "imdb-lora-salience"
CURVE = RESULTS / "accuracy" / "imdb-lora-salience.json"
LABELS = ("negative", "positive")  # of the shipped adapter
CLERKS = 4  # threads that cut texts into tokens, where the model is in another process
NOISY = 0.25  # scatter of times above which only their scale is believed, which batches then correct


@dataclass(frozen=True)
class Settings:
    """What one replica is made of; plain values, since it travels to other nodes.

    model: for completions, a name or a folder; None for none. classifier: an adapter's or a model's folder; None for
    none. p95_ms: the promise. floor: least alpha, None for what `curve` allows for `loss` points (the classifier's
    only: for completions there is no curve, and without a floor nothing is pruned). policy: see controller.POLICIES.
    reference: tokens of a request that costs are counted in.
    batch: requests at most. threads: of torch, None for all cores. calibrate_s: seconds that timing may take, 0 to take
    time for proportional to multiply-accumulates, with one prefill timed. apart: models in a process of their own
    (apart.py).
    """

    model: str | None = "smollm2-135m"
    classifier: str | None = str(ADAPTER)
    p95_ms: float = 2000.0
    floor: float | None = None
    loss: float = 1.0
    curve: str = str(CURVE)
    policy: str = "controller"
    reference: int = 256
    batch: int = 8
    max_tokens: int = 1024
    max_jobs: int = 256
    max_body: int = 1 << 20
    timeout_s: float = 60.0
    threads: int | None = None
    calibrate_s: float = 10.0
    device: str = "cpu"
    apart: bool = False
    key: str | None = None
    hosts: tuple[str, ...] = ()


def engines(settings: Settings) -> dict[str, Engine]:
    """The models by name, without any code that comes with them: weights are safetensors, or read as weights only."""
    safe = {"device": settings.device, "trust_remote_code": False}
    found: dict[str, Engine] = {}
    if settings.model is not None:
        model, tokenizer = load_model(settings.model, **safe)
        found[Path(settings.model).name] = Completer(model, tokenizer, settings.max_tokens)
    if settings.classifier is not None:
        model, tokenizer = finetune.load(settings.classifier, kind="sequence-classification", **safe)
        merged = model.merge_and_unload() if hasattr(model, "merge_and_unload") else model
        shipped = Path(settings.classifier).resolve() == ADAPTER.resolve()
        longest = min(512, settings.max_tokens)  # what the curve was measured with
        found[Path(settings.classifier).name] = Classifier(merged, tokenizer, longest, LABELS if shipped else ())
    if not found:
        raise ValueError("there is neither a model nor a classifier: name one of them with --model or --classifier.")
    return found


def floor_for(engine: Engine, settings: Settings) -> float:
    if settings.floor is not None:
        return settings.floor
    if isinstance(engine, Classifier):
        return costs.floor_of(_curve(Path(settings.curve)), settings.loss)
    return 1.0


def _curve(path: Path) -> dict:
    if not path.is_file():
        raise FileNotFoundError(
            f"there is no accuracy curve {path}; an installed package does not bring it. Give the least alpha itself "
            "with --floor (1 prunes nothing), or a result file of accuracy by alpha with --curve."
        )
    return json.loads(path.read_text(encoding="utf-8"))


def writing_ms(engine: Engine, settings: Settings) -> float:
    """Of a request of reference length: what it costs to write its WRITES tokens."""
    if not isinstance(engine, Completer):
        return 0.0
    n = min(settings.reference, engine.max_tokens - WRITES)
    return costs.decode_ms(engine, max(1, n), settings.batch) * WRITES / settings.batch


def ladder(engine: Engine, settings: Settings, beside_ms: float = 0.0) -> tuple[Rung, ...]:
    """What requests cost this engine here. beside_ms: of each, whatever its alpha."""
    n, floor = min(settings.reference, engine.max_tokens), floor_for(engine, settings)
    if settings.calibrate_s > 0:
        timed = costs.calibrated(engine.model, n, settings.batch, settings.calibrate_s)
        if timed.scatter <= NOISY:
            return costs.ladder_by_time(timed, floor, beside_ms)
        http.LOG.warning("the times scatter by %.0f%%: time is taken for proportional to MACs", 100 * timed.scatter)
        stock_ms = timed.stock_ms / timed.key["batch"]
    else:
        stock_ms = costs.prefill_ms(engine, n)
    return costs.ladder_by_macs(engine.config, n, stock_ms, floor, beside_ms, **engine.rule)


@dataclass(frozen=True)
class Furnished:
    """One model. rungs: what its requests cost. batch_ms: what a batch costs by itself. reference: tokens of a request
    that counts as one. written: see Lane."""

    engine: Engine
    rungs: tuple[Rung, ...]
    batch_ms: float
    reference: int
    written: float


def made(settings: Settings) -> dict[str, Furnished]:
    """The models by name, loaded and timed in this process."""
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    found = {}
    for name, engine in engines(settings).items():
        reference = min(settings.reference, engine.max_tokens)
        by_itself = costs.batch_ms(engine, reference, settings.batch)
        beside_ms = writing_ms(engine, settings)
        rungs = ladder(engine, settings, beside_ms)
        costs.warm(engine, rungs, settings.batch)
        found[name] = Furnished(engine, rungs, by_itself, reference, beside_ms / rungs[0].ms)
    return found


def furnish(settings: Settings, replica: str = "local") -> http.House:
    """A house with its lanes."""
    if not settings.apart:
        found, alive, clerks = made(settings), lambda: True, 1
    else:
        from zsaa.serve.apart import Apart

        process = Apart(settings)
        found, alive, clerks = process.furnished, lambda: process.alive, CLERKS
    worker, lanes = ThreadPoolExecutor(1, thread_name_prefix="model"), {}
    for name, one in found.items():
        policy = policy_named(settings.policy, Policy(one.rungs, settings.p95_ms, batch_ms=one.batch_ms))
        limits = settings.max_jobs, settings.timeout_s, settings.batch, one.written
        lanes[name] = Lane(one.engine, policy, worker, one.reference, *limits)
    return http.House(lanes, replica, alive, clerks)
