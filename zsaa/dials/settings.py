"""The settings of a dial: the defaults, those that a configuration holds, and whose they are."""

from __future__ import annotations

import warnings
from dataclasses import asdict

from torch import nn

from zsaa.rule import SCHEDULES, Rule, check_alphas

DEFAULTS = {"alpha": 1.0, **asdict(Rule()), "alpha_range": None, "depth": None, "depth_range": None}

Alpha = float | tuple[float, ...]  # a tuple: one per request of the batch
Range = tuple[float, float] | None


class Mark:
    """Says whose settings a configuration holds: of the dial that has the same mark. Copied and pickled along with the
    model, in which both then have the same new one."""


class Saved(dict):
    """Settings in a configuration (`config.zsaa`), written by a living dial and not read from a file."""

    def __init__(self, settings: dict, mark: Mark):
        super().__init__(settings)
        self.mark = mark

    def __reduce__(self):
        return Saved, (dict(self), self.mark)


def least(alpha: Alpha) -> float:
    return min(alpha) if isinstance(alpha, tuple) else alpha


def current_settings(decoder: nn.Module) -> dict:
    """The settings of a decoder's dial; where it is off, those that `enable` would take: saved, else the defaults."""
    dial, held = getattr(decoder, "_zsaa", None), getattr(decoder.config, "zsaa", None)
    if dial is not None:
        return dial.settings()
    # Those of another model, alive, that has the same configuration or one that this was copied from, are not ours.
    return {**DEFAULTS, **with_schedule({} if held is None or isinstance(held, Saved) else held)}


def taken(saved: dict, alpha: Alpha | None, depth: int | None) -> tuple[Alpha, int | None]:
    """What `enable` was given, else what was saved with the model, and is now its own: to be said, if it is not the
    stock model's."""
    found, said = check_alphas(saved["alpha"]), []
    if alpha is None and least(found) < 1:
        said.append((f"alpha = {found}", "zsaa.enable(model, alpha=1) begins with the stock model."))
    if depth is None and saved["depth"] is not None:
        said.append((f"depth = {saved['depth']}", "zsaa.set_depth(model, None) runs all layers."))
    for what, remedy in said:
        warnings.warn(f"{what} was saved with this model, and is taken. {remedy}", stacklevel=3)
    return found if alpha is None else alpha, saved["depth"] if depth is None else depth


def with_schedule(saved: dict) -> dict:
    """Settings from a file, with their schedule: versions that wrote none had Eq. 2 alone. ValueError for one that is
    not there, or no longer: what was trained or measured under it cannot be had again."""
    if not isinstance(saved, dict):
        raise ValueError(
            f"config.zsaa is {saved!r:.60}, and holds a dial's settings by name. Leave it out: zsaa.enable writes it."
        )
    schedule = saved.get("schedule", DEFAULTS["schedule"])
    if schedule not in SCHEDULES:
        raise ValueError(
            f"these settings were saved with schedule {schedule!r}, which is not there: only 'geometric' (Eq. 2 of the "
            "paper), 'rising' and 'entry' are available. Train the model anew, or go back to the version that saved "
            "them."
        )
    return {**saved, "schedule": schedule}
