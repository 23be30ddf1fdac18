"""The house on Ray Serve, which brings replicas, autoscaling, several nodes and HTTP; and what it is made of.

Each replica is a whole server: its models, its queues, its controllers. Ray's router sends a request to the emptier of
two replicas; /metrics and /live, asked of one, tell of all.
"""

from __future__ import annotations

import asyncio
import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from ray import serve

from zsaa import finetune
from zsaa.kit.store import RESULTS
from zsaa.models import load_model
from zsaa.serve import app as http
from zsaa.serve import costs
from zsaa.serve.controller import Policy, Rung, policy_named
from zsaa.serve.engine import Classifier, Completer, Engine
from zsaa.serve.lane import Lane

ADAPTER = RESULTS / "adapters" / "imdb-lora-salience"
CURVE = RESULTS / "accuracy" / "imdb-lora-salience.json"
LABELS = ("negative", "positive")  # of the shipped adapter
NAME = "zsaa"
NOISY = 0.25  # scatter of times above which only their scale is believed, which batches then correct


@dataclass(frozen=True)
class Settings:
    """What one replica is made of; plain values, since it travels to other nodes.

    model: for completions, a name or a folder; None for none. classifier: an adapter's or a model's folder; None for
    none. p95_ms: the promise. floor: least alpha, None for what `curve` allows for `loss` points (the classifier's
    only: for completions there is no curve, and without a floor nothing is pruned). policy: see controller.POLICIES.
    reference: tokens of a request that costs are counted in. decode_tokens: that a completion is taken to write.
    batch: requests at most. threads: of torch, None for all cores. calibrate_s: seconds that timing may take, 0 to take
    time for proportional to multiply-accumulates, with one prefill timed.
    """

    model: str | None = "smollm2-135m"
    classifier: str | None = str(ADAPTER)
    p95_ms: float = 2000.0
    floor: float | None = None
    loss: float = 1.0
    curve: str = str(CURVE)
    policy: str = "controller"
    reference: int = 256
    decode_tokens: int = 16
    batch: int = 8
    max_tokens: int = 1024
    max_jobs: int = 256
    max_body: int = 1 << 20
    timeout_s: float = 60.0
    threads: int | None = None
    calibrate_s: float = 10.0
    device: str = "cpu"
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
        return costs.floor_of(json.loads(Path(settings.curve).read_text(encoding="utf-8")), settings.loss)
    return 1.0


def ladder(engine: Engine, settings: Settings) -> tuple[Rung, ...]:
    """What requests cost this engine here."""
    n, floor = min(settings.reference, engine.max_tokens), floor_for(engine, settings)
    beside_ms = 0.0
    if isinstance(engine, Completer):
        beside_ms = costs.decode_ms(engine, n, settings.batch) * settings.decode_tokens / settings.batch
    if settings.calibrate_s > 0:
        timed = costs.calibrated(engine.model, n, settings.batch, settings.calibrate_s)
        if timed.scatter <= NOISY:
            return costs.ladder_by_time(timed, floor, beside_ms)
        http.LOG.warning("the times scatter by %.0f%%: time is taken for proportional to MACs", 100 * timed.scatter)
        stock_ms = timed.stock_ms / timed.key["batch"]
    else:
        stock_ms = costs.prefill_ms(engine, n)
    return costs.ladder_by_macs(engine.config, n, stock_ms, floor, beside_ms, **engine.rule)


def furnish(settings: Settings, replica: str = "local") -> http.House:
    """A house with its lanes."""
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    worker = ThreadPoolExecutor(1, thread_name_prefix="model")
    lanes = {}
    for name, engine in engines(settings).items():
        policy = policy_named(settings.policy, Policy(ladder(engine, settings), settings.p95_ms))
        reference = min(settings.reference, engine.max_tokens)
        lanes[name] = Lane(engine, policy, worker, reference, settings.max_jobs, settings.timeout_s, settings.batch)
    return http.House(lanes, replica)


class Replica:
    """One server. Ray makes it, and asks it for its application."""

    def __init__(self, content: dict):
        self.settings = Settings(**{**content, "hosts": tuple(content["hosts"])})
        self.name = serve.get_replica_context().replica_id.unique_id
        self.house = furnish(self.settings, self.name)

    def __serve_build_asgi_app__(self):
        settings = self.settings
        return http.build(self.house, settings.key, settings.hosts, settings.max_body, self.gather)

    def snapshot(self) -> tuple[str, str, dict]:
        return self.house.snapshot()

    async def gather(self) -> list[tuple[str, str, dict]]:
        """The snapshots of all replicas; of this one alone while the others cannot be reached."""
        asked = serve.get_deployment_handle(NAME, NAME).broadcast("snapshot")
        try:
            found = await asyncio.wait_for(asked.results_async(return_exceptions=True), 3)
        except Exception as error:  # a replica that just died must not take the numbers of the others with it
            http.LOG.warning("replica %s tells of itself alone: %s", self.name, type(error).__name__)
            found = []
        return [one for one in found if not isinstance(one, BaseException)] or [self.snapshot()]


def application(settings: Settings, replicas: int = 1, most: int | None = None, cpus: float = 1.0, gpus: float = 0.0):
    """What `serve.run` takes. replicas: that many; with `most`, from that many to `most`, as many as the load needs."""
    room = settings.max_jobs * 2 + 32  # more than a lane lets in, so that it is the lane that refuses
    scale: dict = {"num_replicas": replicas}
    if most is not None:
        scale = {
            "autoscaling_config": {
                "min_replicas": replicas,
                "max_replicas": most,
                "target_ongoing_requests": 2 * settings.batch,
            }
        }
    threads = settings.threads or max(1, (os.cpu_count() or 1) // (most or replicas))
    content = asdict(settings) | {"threads": threads}
    deployment = serve.deployment(
        serve.ingress()(Replica),
        name=NAME,
        max_ongoing_requests=room,
        ray_actor_options={"num_cpus": cpus, "num_gpus": gpus},
        health_check_period_s=5,
        **scale,
    )
    return deployment.bind(content)
