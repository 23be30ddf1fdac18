"""The settings of a curve: the dial at the MAC reductions asked for, and its controls at equal compute, the stock model
on inputs cut to fewer tokens and the dial keeping tokens at random."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import nn

import zsaa
from zsaa.dial import rule, settings
from zsaa.families import find_decoder
from zsaa.guards import check_all_layers
from zsaa.measure.checks import check_number

TARGETS = (1, 2, 3, 5, 7, 9, 11)  # the speed-ups of the paper's Table 1
# "alpha" is the dial itself; "first", "last" and "ends" (half from each) cut the input; "random" is the dial's schedule
# with the kept tokens drawn by lot.
CONTROLS = ("alpha", "first", "last", "ends", "random")
CUTS = ("first", "last", "ends")


def cut(ids: Sequence[int], k: int | None, side: str, bos: int | None = None) -> list[int]:
    """`k` tokens of `ids` (None: all), the "first", the "last", or half from each of the "ends" (the first half is the
    larger one); a leading `bos` is part of the k and always stays."""
    ids = list(ids)
    if k is None or len(ids) <= k:
        return ids
    head = {"first": k, "last": int(bos is not None and ids[0] == bos and k > 1), "ends": (k + 1) // 2}[side]
    return ids[:head] + ids[len(ids) - (k - head) :]


def plan(model: nn.Module, lengths: Iterable[int], targets=TARGETS, controls=CONTROLS) -> list[dict]:
    """One row per control and target MAC reduction: the alpha or the cut that reaches it on samples of these lengths.
    A target out of reach (tau) is left out; `check_targets` refuses where no row is left. ValueError at a depth below
    all layers."""
    decoder, _ = find_decoder(model)
    config, chosen, lengths, targets = decoder.config, rule(model), list(lengths), list(targets)
    _check_names(targets, controls)
    check_all_layers(decoder, "reductions are counted of")
    rows = []
    for target in targets:
        try:
            alpha = zsaa.alpha_for(config, lengths, target, **chosen)
        except ValueError:
            continue
        k = zsaa.truncation_for(config, lengths, target)
        whole, short = (sum(zsaa.macs(config, n) for n in ns) for ns in (lengths, [min(n, k) for n in lengths]))
        reached = zsaa.mac_reduction(config, lengths, alpha, **chosen)
        dial = {"alpha": alpha, "keep_tokens": None, "mac_reduction": reached}
        cut_off = {"alpha": None, "keep_tokens": k, "mac_reduction": whole / short}
        for control in CONTROLS:
            if control in controls and (target > 1 or control == "alpha"):
                rows.append({"control": control, "target": target, **(cut_off if control in CUTS else dial)})
    return rows


def check_targets(config, lengths: Iterable[int], targets, controls, **rule) -> None:
    """ValueError for a target below 1, an unknown control, and where `plan` has no row at all."""
    targets, controls = list(targets), list(controls)
    _check_names(targets, controls)
    none = f"the targets {targets} and the controls {controls} leave no row"
    wanted = [target for target in targets if target > 1 or "alpha" in controls]
    if not controls or not wanted:
        raise ValueError(f"{none}: give a target above 1 and a control, or the target 1 and the control 'alpha'.")
    try:
        zsaa.alpha_for(config, lengths, min(wanted), **rule)
    except ValueError as error:
        raise ValueError(f"{none}: {error}") from error


def _check_names(targets: Sequence, controls: Sequence) -> None:
    for target in targets:
        check_number("a target, which is a MAC reduction,", target, "[1, inf)")
    if unknown := [control for control in controls if control not in CONTROLS]:
        raise ValueError(f"unknown control {unknown[0]!r}; these are known: {', '.join(CONTROLS)}")


@contextlib.contextmanager
def applied(model: nn.Module, row: dict) -> Iterator[None]:
    """`model` with the dial as a row of `plan` has it, and by the row's "score", if it names one. For "random" without
    CUDA graphs, which would repeat draws."""
    before = {"score": settings(model)["score"], "graphs": zsaa.captured(model)["mode"]}
    drawn = row["control"] == "random"
    score = "random" if drawn else row.get("score")
    if score:
        zsaa.enable(model, score=score, graphs=False if drawn else None)
    try:
        with zsaa.at(model, row["alpha"] or 1.0):
            yield
    finally:
        if score:
            zsaa.enable(model, **before)


def precision_of(model: nn.Module, precision: str):
    """A context in which `model` computes in "fp32", "tf32", "bf16" or "fp16"."""
    if precision in ("fp32", "tf32"):
        return contextlib.nullcontext()
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    return torch.autocast(next(model.parameters()).device.type, dtype=dtype)
