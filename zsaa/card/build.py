"""`zsaa.card`: all that a model takes, at each alpha, in each phase."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Iterable
from dataclasses import asdict
from numbers import Real
from typing import Any

import torch
from torch import nn

from zsaa.card.measure import Phases, joules, peak_bytes
from zsaa.card.prices import PRICES, Prices
from zsaa.card.show import Card
from zsaa.card.work import ID, Shape
from zsaa.dial import rule as rule_of
from zsaa.dial import settings
from zsaa.families import find_decoder
from zsaa.measure import alternate, provenance
from zsaa.measure.checks import check_number, check_whole
from zsaa.measure.origin import hardware
from zsaa.rule import ASKED, Rule, check_alpha

COMPUTED = "computed"
NOT = "not measured"
NAMES = {"prefill": "prefill", "decoding": "decoding, per token", "training": "fine-tuning step"}


def card(
    model: nn.Module,
    n: int,
    alphas: Real | Iterable[float] = (1.0, 0.9, 0.7, 0.5),
    *,
    batch: int = 1,
    new: int = 32,
    train: bool = True,
    measure: bool = True,
    repeats: int = 5,
    seconds: float = 2.0,
    prices: Prices = PRICES,
    parts: int = 2,
) -> Card:
    """What `batch` texts of `n` tokens take of each resource, at each alpha: a prefill, each of `new` tokens decoded
    after it, and a fine-tuning step. Put the dial on first (`zsaa.enable`); its score, tau and schedule are the card's.

    train: is there to be a fine-tuning step (forward and backward)? measure: times, memory and joules, by running it
    (random token ids: time depends on shapes, not on values), `repeats` rounds in turn and `seconds` of each phase for
    its joules; False computes what follows from the configuration. prices: USD per hour and kilowatt-hour (`from
    zsaa.card import Prices`). parts: devices of a pipeline, and copies of the model in data parallel, whose traffic is
    computed.

    Each number says how it came about: "measured", "computed", "estimated", or "not measured" and why. Returns a
    `Card`: it prints as a table, `.figure()` draws it, `.save(path)` writes it as JSON, `.table` is a pandas DataFrame.
    Raises RuntimeError if the dial is off, ValueError for settings out of range, and for a depth below all layers.
    """
    decoder, _ = find_decoder(model)
    rule, depth, layers = Rule(**rule_of(model)), settings(model)["depth"], decoder.config.num_hidden_layers
    if depth is not None and depth < layers:
        raise ValueError(
            f"depth is {depth}, and a card counts all {layers} layers. Make it inside zsaa.at(model, depth={layers}); "
            "zsaa.report counts the layers that run."
        )
    alphas = [check_alpha(a) for a in ([alphas] if isinstance(alphas, Real) else alphas)]
    n, batch, new = check_whole("n", n), check_whole("batch", batch), check_whole("new", new)
    check_whole("parts", parts, least=2), check_number("seconds", seconds, "(0, 600]")
    if rule.score == ASKED and measure:
        raise ValueError('score="asked" needs a question with every call: give measure=False, or another score.')
    shape = _shape(model, decoder.config, n, batch, new, rule, parts)
    _check_positions(shape)
    alphas = [1.0, *(a for a in dict.fromkeys(alphas) if a != 1)]
    kinds = [kind for kind in NAMES if kind != "decoding" or shape.language]
    kinds = [kind for kind in kinds if kind != "training" or (train and shape.trained)]
    found = _measured(model, shape, alphas, kinds, repeats, seconds) if measure else {}
    rows = []
    for alpha in alphas:
        for kind in kinds:
            mine = found.get((kind, alpha), {})
            made = _rows(shape, kind, alpha, mine, prices, decoder.device)
            rows += [{"alpha": alpha, "phase": NAMES[kind], **row} for row in made]
    for row in rows:
        row["against stock"] = _ratio(row, rows)
    device = decoder.device
    about = {
        "model": getattr(model.config, "_name_or_path", "") or type(model).__name__,
        "n": n,
        "batch": batch,
        "new": new,
        **asdict(rule),
        "dtype": str(decoder.dtype).removeprefix("torch."),
        "device": _device_name(device),
        "prices": asdict(prices),
        "parts": parts,
        "provenance": provenance(device, seed=0, repeats=repeats if measure else None),
    }
    return Card(rows, about)


def _check_positions(shape: Shape) -> None:
    """Rotary positions go on for ever; learned ones end."""
    asked, most = shape.n + shape.language * shape.new, shape.config.max_position_embeddings
    if shape.config.model_type == "gpt2" and asked > most:
        raise ValueError(
            f"n + new must be in [1, {most}], the positions that this model has learned, got {asked}. Ask for less."
        )


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def _shape(model: nn.Module, config: Any, n: int, batch: int, new: int, rule: Rule, parts: int) -> Shape:
    language = hasattr(model, "lm_head")
    outputs = config.vocab_size if language else getattr(config, "num_labels", 0) if hasattr(model, "score") else 0
    weights = list(model.parameters())
    itemsize = find_decoder(model)[0].dtype.itemsize
    counts = sum(p.numel() for p in weights), sum(p.numel() for p in weights if p.requires_grad)
    return Shape(config, n, batch, new, rule, outputs, language, itemsize, *counts, parts)


def _measured(model: nn.Module, shape: Shape, alphas: list[float], kinds: list[str], repeats, seconds) -> dict:
    """(phase, alpha) -> {"ms", "peak", "joules", "energy_how"}."""
    device, found = find_decoder(model)[0].device, {}
    ids = torch.randint(1, shape.config.vocab_size, (shape.batch, shape.n), device=device)
    phases = Phases(model, ids, shape.new)
    runs = {"prefill": phases.prefill, "decoding": phases.answer, "training": phases.step}
    for kind in kinds:
        with phases.training() if kind == "training" else torch.no_grad():
            named = {str(alpha): functools.partial(runs[kind], alpha) for alpha in alphas}
            # graphs of decoding steps are recorded after a few of them
            times = alternate(named, repeats=repeats, warmup=3 if device.type == "cuda" else 1)
            for alpha in alphas:
                ms, run = times[str(alpha)]["latency_ms"], named[str(alpha)]
                spent, how = joules(run, ms, seconds, device)
                found[kind, alpha] = {"ms": ms, "peak": peak_bytes(run, device), "joules": spent, "energy_how": how}
    for alpha in alphas if "decoding" in kinds else ():  # of one token, without the prompt's prefill
        whole, before = found["decoding", alpha], found["prefill", alpha]
        whole["ms"] = statistics.median(phases.decoding_ms[alpha][-repeats:]) / shape.new
        if whole["joules"] is not None:
            more = whole["joules"] - before["joules"]
            whole["joules"] = more / shape.new if more > 0 else None
            whole["energy_how"] = whole["energy_how"] if more > 0 else f"{NOT}: lost in the noise of the prefill"
    return found


def _rows(shape: Shape, kind: str, alpha: float, mine: dict, prices: Prices, device: torch.device) -> list[dict]:
    work = {"prefill": shape.prefill_macs, "decoding": shape.token_macs, "training": shape.training_macs}[kind](alpha)
    tokens = shape.batch * (1 if kind == "decoding" else shape.n)
    ms, peak, spent = mine.get("ms"), mine.get("peak"), mine.get("joules")
    clock = "measured" if ms else NOT
    rows = [
        _row("computation", "MACs", work, "MAC", COMPUTED),
        _row("computation", "FLOPs", 2 * work, "FLOP", COMPUTED),
        _row("computation", "time", ms, "ms", clock),
        _row("computation", "throughput", 1000 * tokens / ms if ms else None, "tokens/s", clock),
        *_memory(shape, kind, alpha, peak),
        _row("energy", "energy", spent, "J", mine.get("energy_how", NOT)),
        _row("energy", "energy per token", None if spent is None else spent / tokens, "J", mine.get("energy_how", NOT)),
        *_money(ms, spent, tokens, mine.get("energy_how", NOT), prices, device),
        *_traffic(shape, kind, alpha),
    ]
    return rows


def _row(resource: str, metric: str, value, unit: str, how: str) -> dict:
    return {"resource": resource, "metric": metric, "value": value, "unit": unit, "how": how}


def _memory(shape: Shape, kind: str, alpha: float, peak: int | None) -> list[dict]:
    held = shape.training_bytes() if kind == "training" else shape.itemsize * shape.parameters
    name = "weights, gradients and AdamW" if kind == "training" else "weights"
    rows = [_row("memory", name, held, "byte", COMPUTED)]
    if kind != "training" and shape.language:
        rows.append(_row("memory", "KV cache", shape.kv_bytes(alpha), "byte", COMPUTED))
    how = "measured (PyTorch's allocator)" if peak else f"{NOT}: a CPU keeps no count"
    return [*rows, _row("memory", "peak memory", peak, "byte", how)]


def _money(
    ms: float | None, spent: float | None, tokens: int, how: str, prices: Prices, device: torch.device
) -> list[dict]:
    facts = _hardware(device)
    priced = prices.of(facts["device"], facts["cores"] or 1)
    rent = None if not ms or priced is None else 1e6 * priced[1] * ms / 3.6e6 / tokens
    why = f"{NOT}: no price for {facts['device']}" if priced is None else NOT
    power = None if spent is None else 1e6 * prices.kwh * spent / 3.6e6 / tokens
    source = "computed from measured time" if rent is not None else why
    joule = how.partition(" ")[0]
    electric = NOT if power is None else f"{'estimated' if joule == 'estimated' else COMPUTED} from joules {joule}"
    return [
        _row("money", "rent of the device, per million tokens", rent, "USD", source),
        _row("money", "electricity, per million tokens", power, "USD", electric),
    ]


@functools.cache
def _hardware(device: torch.device) -> dict:
    return hardware(device)


def _traffic(shape: Shape, kind: str, alpha: float) -> list[dict]:
    if kind == "training":
        return [_row("communication", "between copies, data parallel", shape.exchanged(), "byte", COMPUTED)]
    prefill = kind == "prefill"
    moved = shape.prefill_moved(alpha) if prefill else shape.token_moved(alpha)
    piped = shape.handed_on(alpha) if prefill else shape.token_handed_on()
    return [
        _row("communication", "from and to memory, at least", moved, "byte", COMPUTED),
        _row("communication", "between devices, pipeline", piped, "byte", COMPUTED),
        _row("communication", "between copies, data parallel", 0, "byte", COMPUTED),
        _row("communication", "with the client", ID * shape.batch * (shape.n if prefill else 1), "byte", COMPUTED),
    ]


def _ratio(row: dict, rows: list[dict]) -> float | None:
    """A number over that of the stock model."""
    key = ("phase", "resource", "metric")
    stock = next(r for r in rows if r["alpha"] == 1 and all(r[k] == row[k] for k in key))["value"]
    return None if not stock or row["value"] is None else row["value"] / stock
