"""From a budget to alpha: in multiply-accumulates, or in milliseconds on this machine; and what each alpha costs.

Milliseconds come from a calibration: one prefill of random tokens (time does not depend on what the text says), timed
at a handful of settings in turn. Between these the time is interpolated over multiply-accumulates, of which it is
nearly a straight line; over alpha, whose effect compounds from layer to layer, it is far from one. A calibration is
saved, and used again only where nothing that bears on the time has changed.
"""

from __future__ import annotations

import functools
import json
import math
import statistics
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from importlib.util import find_spec
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from zsaa.cost import histogram, kv_bytes, mac_reduction, macs, total_macs
from zsaa.dial import current_settings, disable, enable
from zsaa.families import find_decoder, only_last_logits
from zsaa.fast.dispatch import backends, matmul_precision
from zsaa.fast.graphs import Graphs
from zsaa.hook import DEFAULTS
from zsaa.measure import alternate, hardware, hash_of, provenance, write_json
from zsaa.rule import RULE, Rule, check_alpha, kept_counts, powers
from zsaa.scope import opened

FORMAT = 1  # of a saved calibration; raise it when its content or what is timed changes
NEAR = 0.999  # the largest alpha below 1 that is timed: the pruned code path, with hardly anything pruned
LEAST = 1e-5  # the smallest alpha that is tried
POINTS = 8  # pruned settings that are timed
REPEATS = 15  # timed rounds, where there is time for them
NOISY = 0.25  # scatter of the readings above which a calibration warns


def _largest(fits: Callable[[float], bool], low: float, high: float) -> float:
    """The largest alpha in [low, high], to 1e-5, that `fits`; `low` must."""
    while high - low > 1e-5:
        middle = (low + high) / 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def alpha_for(
    model_or_config: Any,
    n: int | Iterable[int],
    mac_reduction: float | None = None,
    tau: int | None = None,
    *,
    latency_ms: float | None = None,
    batch: int = 1,
    score: str | None = None,
    schedule: str | None = None,
) -> float:
    """The largest alpha (to 1e-5) that keeps to one budget, for inputs of `n` tokens.

    model_or_config: a supported model, with the dial on or not, or its config.
    n: one length in tokens, or the length of each sample.
    mac_reduction: times by which the multiply-accumulates, summed over the samples, must fall at least.
    tau, score, schedule: as in `zsaa.enable`; by default those of the model's dial, and the paper's for a config. A
        score matters for its own cost only, and not to latency_ms, which times the model's.
    latency_ms: milliseconds that one prefill of `batch` texts of the longest length may take on this machine, by
        prediction from `calibrate`, which runs first if need be (under a minute for a small model). Needs a model.

    TypeError: not exactly one budget, or a config and latency_ms. ValueError names the reachable range of a budget.
    """
    if (mac_reduction is None) == (latency_ms is None):
        raise TypeError(
            f"give one budget, mac_reduction or latency_ms; got mac_reduction={mac_reduction}, latency_ms={latency_ms}."
        )
    counted = histogram(n)
    _check_budget(*(("latency_ms", latency_ms) if mac_reduction is None else ("mac_reduction", mac_reduction)))
    if latency_ms is not None:
        if not isinstance(model_or_config, nn.Module):
            raise TypeError(
                f"latency_ms needs a model to time, not a {type(model_or_config).__name__}. Pass the model itself, or "
                "give mac_reduction, for which a config will do."
            )
        return calibrate(model_or_config, max(counted), batch, tau=tau, schedule=schedule).alpha_for(latency_ms)
    config, chosen = model_or_config, DEFAULTS
    if isinstance(model_or_config, nn.Module):
        decoder, _ = find_decoder(model_or_config)
        config, chosen = decoder.config, current_settings(decoder)
    return _alpha_for_macs(config, counted, mac_reduction, _rule(chosen, tau=tau, score=score, schedule=schedule))


def _alpha_for_macs(config: Any, counted: Counter, mac_reduction: float, rule: dict) -> float:
    if mac_reduction == 1:
        return 1.0
    stock = total_macs(config, counted, 1.0)
    most = stock / total_macs(config, counted, LEAST, **rule)
    if not 1 <= mac_reduction <= most:
        raise ValueError(
            f"a MAC reduction of {mac_reduction} is out of reach: with these lengths and tau={rule['tau']} it ranges "
            f"from 1 to {most:.2f}. Use longer inputs, a smaller tau or a smaller reduction."
        )
    return _largest(lambda alpha: stock / total_macs(config, counted, alpha, **rule) >= mac_reduction, LEAST, 1.0)


def _check_budget(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number > 0, got {value!r} ({type(value).__name__}).")
    if not value > 0:
        raise ValueError(f"{name} must be > 0, got {value}.")


@dataclass(frozen=True)
class Calibration:
    """How long one prefill takes on one machine at several settings; made by `calibrate`.

    key: what was timed and on what: n, batch, tau, score, schedule, model, device, versions, ...
    rows: per setting {"alpha", "latency_ms": median, "latency_ms_quartiles": [q1, q3], "speedup": over stock}; the
        stock model (alpha = 1) first, then falling alpha.
    provenance: commit, date, versions, hardware of the measurement.
    """

    config: Any = field(repr=False)
    key: dict = field(repr=False)
    rows: list[dict]
    provenance: dict = field(repr=False)

    @property
    def stock_ms(self) -> float:
        """Milliseconds of the stock model, alpha = 1."""
        return self.rows[0]["latency_ms"]

    @property
    def scatter(self) -> float:
        """How far the readings lie apart: the widest interquartile range, as a share of its median."""
        return max(
            (row["latency_ms_quartiles"][1] - row["latency_ms_quartiles"][0]) / row["latency_ms"] for row in self.rows
        )

    def predict(self, alpha: float) -> float:
        """Milliseconds at `alpha`, rising with it below 1. At 1 the stock code runs, which may be faster or slower."""
        if check_alpha(alpha) == 1:
            return self.stock_ms
        n, rule = self.key["n"], {name: self.key[name] for name in RULE}
        rows = self.rows[:0:-1]
        cost = [macs(self.config, n, row["alpha"], **rule) for row in rows]
        # More work cannot truly take less time; where noise says so, the slower reading counts.
        times = np.maximum.accumulate([row["latency_ms"] for row in rows])
        return float(np.interp(macs(self.config, n, alpha, **rule), cost, times))

    def alpha_for(self, latency_ms: float) -> float:
        """The largest alpha, to 1e-5, with a predicted time of at most `latency_ms`; ValueError names what is
        reachable. Half of all runs take longer than predicted: the times are medians."""
        _check_budget("latency_ms", latency_ms)
        if latency_ms >= self.stock_ms:
            return 1.0
        low = self.rows[-1]["alpha"]
        if self.predict(low) > latency_ms:
            least = min(self.stock_ms, self.predict(low))
            raise ValueError(
                f"{latency_ms} ms is out of reach for a prefill of {self.key['batch']} x {self.key['n']} tokens: here "
                f"it takes {self.stock_ms:.4g} ms in the stock model (alpha = 1) and {self.predict(low):.4g} ms at the "
                f"smallest alpha of effect, {low:.4g}. Allow {least:.4g} ms or more, or use fewer tokens."
            )
        if self.predict(NEAR) <= latency_ms:
            return NEAR
        return _largest(lambda alpha: self.predict(alpha) <= latency_ms, low, NEAR)


def calibrate(
    model: nn.Module,
    n: int,
    batch: int = 1,
    *,
    tau: int | None = None,
    schedule: str | None = None,
    seconds: float = 30.0,
    refresh: bool = False,
    progress: bool = True,
) -> Calibration:
    """Time one prefill of `batch` texts of `n` tokens on `model`'s device: stock, and at a handful of alphas in turn.

    A prefill is what `generate` does with a prompt: fill the key/value cache, logits of the last token only; in eval
    mode, without gradients, in the autocast that is on. The model comes out as it went in; if the dial was off, it is
    on for the measurement only. Readings that scatter widely bring a warning.

    tau, schedule: as in `alpha_for`. seconds: the timed rounds (15) are cut to this, but never below 3. The result is
    saved in the cache folder (ZSAA_CACHE, see zsaa/models.py) and read from there next time, unless `refresh`, if
    hardware, threads, versions, zsaa's code, the model's shape, dtype, device and the arguments are the same.

    ValueError: n or batch is no whole number of at least 1, or n is longer than the model's positions.
    """
    decoder, _ = find_decoder(model)
    config, key = decoder.config, _key(model, n, batch, tau=tau, schedule=schedule)
    n, batch = key["n"], key["batch"]
    limit = getattr(config, "max_position_embeddings", None)
    if limit is not None and n > limit:
        raise ValueError(f"n must be at most {limit}, this model's number of positions, got {n}.")
    path = _path(key)
    record = None if refresh else _saved(path, key)
    if record is None:
        rule = {name: key[name] for name in RULE}
        alphas = _alphas(config, n, rule)
        with _measuring(model, rule) as dial:
            prefill = _prefill(model, n, batch)

            def at(alpha: float) -> Callable[[], None]:
                def run() -> None:
                    with opened(dial, alpha=alpha):  # not by `at`, which would warn of untrained alphas
                        prefill()

                return run

            text = f"timing {n} tokens" if progress else None
            timed = alternate({str(a): at(a) for a in alphas}, REPEATS, warmup=2, seconds=seconds, progress=text)
        rows = [{"alpha": alpha, **timed[str(alpha)]} for alpha in alphas]
        facts = provenance(hardware=key["hardware"])
        record = {"key": key, "rows": rows, "provenance": facts}
        try:
            write_json(path, {**record, "sha256": hash_of(record)})
        except OSError as error:
            warnings.warn(f"the calibration could not be saved in {path.parent} ({error}).", stacklevel=2)
        if (scatter := Calibration(config, **record).scatter) > NOISY:
            warnings.warn(
                f"the readings scatter by {scatter:.0%} (interquartile range over median), and predictions may be as "
                "far off: is the machine busy? zsaa.calibrate(..., refresh=True) measures again.",
                stacklevel=2,
            )
    return Calibration(config, **record)


def _alphas(config: Any, n: int, rule: dict) -> list[float]:
    """The settings to time, from 1 downwards: evenly spread over the factors by which MACs can fall, down to one
    at which each layer is left with tau tokens: the largest of two digits, which can be read and typed."""
    first = powers(config.num_hidden_layers, rule["schedule"])[0]  # no layer keeps a larger share
    low = min(max(LEAST, _two_digits((rule["tau"] / n) ** (1 / first))), NEAR)
    targets = np.geomspace(1, max(1, mac_reduction(config, n, low, **rule)), POINTS)[1:-1]
    solved = {round(_alpha_for_macs(config, Counter([n]), target, rule), 3) for target in targets.tolist()}
    return [1.0, *sorted({NEAR, low, *(a for a in solved if low < a < NEAR)}, reverse=True)]


def _two_digits(alpha: float) -> float:
    """Rounded down to two significant digits."""
    decimals = 1 - math.floor(math.log10(alpha))
    return round(math.floor(alpha * 10**decimals) / 10**decimals, decimals)


def _prefill(model: nn.Module, n: int, batch: int) -> Callable[[], None]:
    decoder, _ = find_decoder(model)
    device = next(decoder.parameters()).device
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(decoder.config.vocab_size, (batch, n), generator=generator).to(device)
    last = only_last_logits(model)

    def run() -> None:
        model(input_ids=ids, use_cache=True, **last)
        if device.type != "cpu":
            torch.accelerator.synchronize(device)

    return run


def _rule(chosen: dict, **given) -> dict:
    """The rule (see `zsaa.dial.rule`) in a dial's settings; what is `given`, and not None, overrides."""
    return asdict(Rule(**{name: chosen[name] if given.get(name) is None else given[name] for name in RULE}))


@contextmanager
def _measuring(model: nn.Module, rule: dict) -> Iterator[Any]:
    """The model's dial, on and untraced; eval mode, no gradients. Everything is put back, after exceptions too."""
    decoder, _ = find_decoder(model)
    was_on, saved = getattr(decoder, "_zsaa", None) is not None, getattr(decoder.config, "zsaa", None)
    modes = [(module, module.training) for module in model.modules()]
    if not was_on:
        enable(model, alpha=1.0)
    dial = decoder._zsaa
    before = dial.rule, dial.graphs
    try:
        # Recordings of the measurement's own: they are freed with it, and the model's stay as they are.
        dial.rule = replace(dial.rule, tau=rule["tau"], schedule=rule["schedule"])
        dial.graphs = Graphs(dial.graphs.mode)
        model.eval()
        with (
            opened(dial, trace=None),
            torch.no_grad(),
        ):  # not inference_mode: tensors that a model keeps from it could never be trained with
            yield dial
    finally:
        dial.rule, dial.graphs = before
        for module, training in modes:
            module.training = training
        if not was_on:
            disable(model)
            if saved is not None:
                decoder.config.zsaa = saved


# ------------------------------------------------------------------------------------------ saved calibrations


@functools.cache
def _code() -> str:
    """A digest of zsaa's source: in a checkout, the version does not tell what is timed."""
    kernels = find_spec("zsaa.kernels")  # lies elsewhere in a checkout
    folders = [str(Path(__file__).parent.parent), *(kernels.submodule_search_locations if kernels else ())]
    files = (file for folder in folders for file in sorted(Path(folder).rglob("*.py")))
    return hash_of([file.read_text(encoding="utf-8") for file in files])


def _key(model: nn.Module, n: int, batch: int, **given) -> dict:
    """All that bears on the time of a prefill, as JSON: two calls with the same key take the same time."""
    for name, value in (("n", n), ("batch", batch)):
        if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
            raise ValueError(f"{name} must be a whole number >= 1, got {value!r}.")
    decoder, family = find_decoder(model)
    device = next(decoder.parameters()).device
    config = {k: v for k, v in decoder.config.to_dict().items() if k not in ("_name_or_path", "zsaa")}
    layers = set(getattr(decoder, family.layers))  # their class says whether the dial is on
    modules = Counter(type(module).__name__ for module in model.modules() if module not in layers)
    sizes: Counter = Counter()
    for parameter in model.parameters():
        sizes[str(parameter.dtype)] += parameter.numel()
    autocast = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
    return {
        "format": FORMAT,
        "n": int(n),
        "batch": int(batch),
        **_rule(current_settings(decoder), **given),
        "model": type(model).__name__,
        "config": hash_of([config, decoder.config._attn_implementation]),
        "modules": hash_of(modules),
        "parameters": dict(sizes),
        "dtype": str(decoder.dtype),
        "autocast": str(autocast),
        "matmul": matmul_precision(),
        "backend": backends(device)["used"],
        "graphs": decoder._zsaa.graphs.mode if hasattr(decoder, "_zsaa") else "auto",
        "compiled": any(module._compiled_call_impl is not None for module in model.modules()),
        "device": str(device),
        "hardware": hardware(device),
        "versions": {package: version(package) for package in ("torch", "transformers")} | {"zsaa": _version()},
        "code": _code(),
    }


def _version() -> str:
    from zsaa import __version__

    return __version__


def _path(key: dict) -> Path:
    from zsaa.models import cache_dir

    return cache_dir() / "latency" / f"{hash_of(key)[:32]}.json"


def _saved(path: Path, key: dict) -> dict | None:
    """What is saved at `path`, if it is whole and was measured under this very key."""
    try:
        record = json.loads(path.read_text())
        whole = record.pop("sha256") == hash_of(record)
        return record if whole and record["key"] == key else None
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None


# ------------------------------------------------------------------------------------------------------ report


def report(model: nn.Module, n: int, alphas: float | Iterable[float] | None = None, batch: int = 1):
    """What a prefill of `batch` texts of `n` tokens costs at each alpha, as a pandas DataFrame indexed by alpha,
    which prints whole.

    alphas: one setting or several; None lists those that `calibrate` times.

    Columns: "first layer", "median layer", "last layer" (tokens that such a layer passes on, per text); "kept" (share
    of token-layers); "GMACs" and "MAC reduction" (see `macs`); "KV bytes" (keys and values in the cache, in the model's
    dtype); "predicted ms" and "measured ms" of the prefill; "speed-up" (stock over measured, else over predicted).
    Times come from a saved calibration. Without one, or where an alpha was not timed, they are NaN: nothing is measured
    here, `zsaa.calibrate(model, n, batch)` does. `table.attrs` says what the table is of, and on what machine, when and
    how steadily the times were measured; its "tokens_per_layer" maps alpha to the full lists.
    """
    import pandas as pd

    from zsaa.budget.costs import Costs  # a DataFrame: pandas is not loaded before it is asked for

    decoder, _ = find_decoder(model)
    config, key = decoder.config, _key(model, n, batch)
    n, batch, rule = key["n"], key["batch"], {name: key[name] for name in RULE}
    tau, schedule = rule["tau"], rule["schedule"]
    record = _saved(_path(key), key)
    calibration = record and Calibration(config, **record)
    measured = {row["alpha"]: row["latency_ms"] for row in record["rows"]} if record else {}
    alphas = _alphas(config, n, rule) if alphas is None else [alphas] if isinstance(alphas, Real) else alphas
    layers, alphas = config.num_hidden_layers, map(check_alpha, alphas)
    tokens = {alpha: kept_counts(n, alpha, layers, tau, schedule) for alpha in alphas}
    rows = []
    for alpha, counts in tokens.items():
        predicted = calibration.predict(alpha) if calibration else math.nan
        taken = measured.get(alpha, math.nan)
        clock = predicted if math.isnan(taken) else taken
        rows.append(
            {
                "first layer": counts[0],
                "median layer": statistics.median_low(counts),
                "last layer": counts[-1],
                "kept": round(sum(counts) / (n * len(counts)), 3),
                "GMACs": round(batch * macs(config, n, alpha, **rule) / 1e9, 3),
                "MAC reduction": round(mac_reduction(config, n, alpha, **rule), 2),
                "KV bytes": kv_bytes(config, n, alpha, tau, batch, decoder.dtype.itemsize, schedule),
                "predicted ms": round(predicted, 2),
                "measured ms": round(taken, 2),
                "speed-up": round(calibration.stock_ms / clock, 2) if calibration else math.nan,
            }
        )
    table = Costs(rows, index=pd.Index(tokens, name="alpha"))
    about = ("model", "n", "batch", *RULE, "dtype", "device")
    if calibration:
        timing = f"measured {record['provenance']['date']}, medians, scatter {calibration.scatter:.0%}"
    else:
        timing = f"not measured; zsaa.calibrate(model, {n}, {batch}) measures them"
    table.attrs = {
        **{name: key[name] for name in about},
        "timing": timing,
        "provenance": record and record["provenance"],
        "tokens_per_layer": tokens,
    }
    return table
