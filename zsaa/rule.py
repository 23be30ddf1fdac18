"""How many tokens each layer keeps: Eq. 2 of the paper, or a schedule beside it. Plain arithmetic, no tensors."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import Any

TAU = 5  # the paper's least number of tokens that a layer keeps
SPREAD = ("geometric", "rising")  # schedules that spread drops over the layers; the first is the paper's, Eq. 2
ENTRY = "entry"  # the one that drops all before the first layer
SCHEDULES = (*SPREAD, ENTRY)
PLAIN = ("column_sum", "column_mean", "random")  # scores made of attention, see zsaa/score.py; the first is the paper's
LEARNED = "salience"  # one that is not, see zsaa/learned/salience.py
ASKED = "asked"  # another, see zsaa/learned/asked.py
ASKERS, SINKS = 32, 4  # by that score the last tokens ask, where no question is given; these and the first never leave
SUMS = PLAIN[:2]  # of the attention that a token receives in a layer
SCORES = (*PLAIN, LEARNED, ASKED)


@dataclass(frozen=True)
class Prices:
    """Multiply-accumulates of one model's parts, by which a rule tells what it costs (see `zsaa.cost.prices`).

    layers: of the model, by which Eq. 2 counts; depth: those that run, the first ones, None for all. entering, kept: of
    a layer, per row that enters it, and per row that it passes on; pair: per pair of rows that enter it; scored: of a
    learned score, per row that enters a layer which drops some; asked: of one that is asked once, for a prompt of
    (body, asking) tokens.
    """

    layers: int
    entering: int
    kept: int
    pair: int
    scored: int = 0
    asked: Callable[[int, int], int] | None = None
    depth: int | None = None


@dataclass(frozen=True)
class Rule:
    """What decides, beside alpha, which tokens go on and how many. The defaults are the paper's.

    tau: least number of tokens that a layer keeps. score: who goes on, one of SCORES. schedule: how drops are spread
    over the layers, one of SCHEDULES. ValueError or TypeError for others, and for a score that is made of attention
    before there is any.
    """

    tau: int = TAU
    score: str = "column_sum"
    schedule: str = "geometric"

    def __post_init__(self):
        object.__setattr__(self, "tau", check_tau(self.tau))
        check_score(self.score), check_schedule(self.schedule)
        if self.schedule == ENTRY and self.score in SUMS:
            raise ValueError(
                f"schedule={ENTRY!r} drops tokens before the first layer, and score={self.score!r} is the attention "
                f"that they receive in a layer. Give another score ({', '.join(s for s in SCORES if s not in SUMS)}) "
                f"or another schedule ({', '.join(SPREAD)})."
            )

    def counts(self, n: int, alpha: float, num_layers: int, exempt: int | None = None) -> list[int]:
        """Tokens kept by each layer, [N_1, ..., N_L], for a sequence of N_0 = `n` tokens, of which `exempt` are never
        dropped: no layer keeps fewer. None: those that the score itself keeps, where the call names none.

        Under "geometric", Eq. 2: N_l = max(floor(alpha N_{l-1}), tau), never more than N_{l-1}. Under "rising", not the
        paper's, layer l keeps alpha^w_l of what enters it (see `powers`): lower layers, where dropping costs most, drop
        less, upper ones more, and the top is left with as much as under Eq. 2. Under "entry", not the paper's either,
        the share alpha of all tokens enters the first layer, and goes through all.

        The 1e-6 keeps products that are whole numbers in exact arithmetic (0.7 x 10) from being floored to one less.
        """
        return self.stages(n, alpha, num_layers, exempt)[1:]

    def stages(self, n: int, alpha: float, num_layers: int, exempt: int | None = None) -> list[int]:
        """What enters the first layer, and what each passes on: the `n` tokens before `counts`; under "entry", which
        drops before the first layer, as many as that passes on."""
        alpha = check_alpha(alpha)
        if isinstance(n, bool) or not isinstance(n, Integral) or n < 1:
            raise ValueError(f"n must be a whole number of tokens >= 1, got {n!r}.")
        stages, least = [n], max(self.tau, self.exempt(n) if exempt is None else exempt)
        for share in self.shares(alpha, num_layers):
            n = min(n, max(math.floor(share * n + 1e-6), least))
            stages.append(n)
        return [n, *stages[1:]] if self.schedule == ENTRY else stages

    def shares(self, alpha: float, num_layers: int) -> tuple[float, ...]:
        """What each layer keeps of what enters it."""
        return _shares(alpha, num_layers, self.schedule)

    def exempt(self, n: int) -> int:
        """How many of `n` tokens never leave by the score itself, where the call names no question and no others: by
        "asked" those that ask, the last ones, and the first."""
        return min(n, ASKERS + SINKS) if self.score == ASKED else 0

    def macs(self, prices: Prices, n: int, alpha: float) -> int:
        """Multiply-accumulates of one prefill of `n` tokens, the choosing included; see `zsaa.macs`."""
        entering, *counts = self.stages(n, alpha, prices.layers)
        total = n * prices.scored if entering < n else 0
        if prices.asked is not None and counts[-1] < n:
            asking = min(n, ASKERS)
            total += prices.asked(n - asking, asking)
        for kept in counts[: prices.depth]:
            total += entering * prices.entering + entering * entering * prices.pair + kept * prices.kept
            total += entering * prices.scored if kept < entering else 0
            entering = kept
        return total


RULE = tuple(field.name for field in fields(Rule))


def kept_counts(
    n: int, alpha: float, num_layers: int, tau: int = TAU, schedule: str = "geometric", score: str | None = None
) -> list[int]:
    """Tokens kept by each layer, [N_1, ..., N_L], for a sequence of N_0 = `n` tokens (paper, Eq. 2); see `Rule.counts`.
    score: needed only for "asked", by which a question never leaves; the others keep equally many. ValueError or
    TypeError for what is out of range."""
    if isinstance(num_layers, bool) or not isinstance(num_layers, Integral) or num_layers < 1:
        raise ValueError(f"num_layers must be a whole number >= 1, got {num_layers!r}: those of the model.")
    return counting(tau, schedule, score).counts(n, alpha, num_layers)


def counting(tau: int, schedule: str, score: str | None = None) -> Rule:
    """A rule that is only to count; without a score, by one that goes with every schedule."""
    return Rule(tau, "random" if score is None else score, schedule)


@functools.cache
def powers(num_layers: int, schedule: str) -> tuple[float, ...]:
    """The w_l of each layer, which keeps the share alpha^w_l of what enters it. They sum to `num_layers`, so that the
    top layer is left with the same share of all tokens however drops are spread. Under "entry" all that goes through
    the layers is the share alpha."""
    if schedule == ENTRY:
        return (1.0, *(0.0,) * (num_layers - 1))
    steep = [math.exp(layer / num_layers) if schedule == "rising" else 1.0 for layer in range(num_layers)]
    total = sum(steep)
    return tuple(w * num_layers / total for w in steep)


@functools.lru_cache(maxsize=128)
def _shares(alpha: float, num_layers: int, schedule: str) -> tuple[float, ...]:
    # Not every C library promises that alpha to the power of 1 is alpha.
    return tuple(alpha if w == 1 else alpha**w for w in powers(num_layers, schedule))


def as_written(number: Any) -> Any:
    """A number of NumPy or PyTorch as the shortest decimal that it stands for: 0.7 in float32 is 0.699999988, too
    little for Eq. 2 to keep 700 of 1,000 tokens. Anything else as it is."""
    if not (hasattr(number, "dtype") and hasattr(number, "item") and getattr(number, "ndim", None) == 0):
        return number
    value = number.item()
    if not isinstance(value, float):
        return value
    candidates = (float(f"{value:.{digits}g}") for digits in range(1, 17))
    return next((x for x in candidates if (0 * number + x).item() == value), value)


def check_alpha(alpha: Any) -> float:
    """`alpha` as a float, if it is a number in (0, 1], of Python, NumPy or PyTorch; else TypeError or ValueError."""
    alpha = as_written(alpha)
    if isinstance(alpha, bool) or not isinstance(alpha, Real):
        raise TypeError(
            f"alpha must be a number in (0, 1], got {alpha!r} ({type(alpha).__name__}). "
            "alpha is the share of tokens that each layer keeps: 1 keeps all."
        )
    if not 0 < float(alpha) <= 1:  # also catches NaN
        raise ValueError(
            f"alpha must be in (0, 1], got {alpha}. alpha is the share of tokens that each layer keeps: 1 keeps all, "
            "0.9 drops a tenth per layer."
        )
    return float(alpha)


def check_alphas(alpha: Any) -> float | tuple[float, ...]:
    """`alpha` as a float; or as a tuple, if it is a list, tuple or one-dimensional array of numbers in (0, 1], one per
    request. Else TypeError or ValueError."""
    if not isinstance(alpha, (list, tuple)) and getattr(alpha, "ndim", 0) == 0:
        return check_alpha(alpha)
    if getattr(alpha, "ndim", 1) != 1:
        raise ValueError(f"alpha has shape {tuple(alpha.shape)}: give one number, or one for each request, [batch].")
    alpha = list(alpha)
    if not alpha:
        raise ValueError("alpha is empty: give one number in (0, 1] for each request, or a single number for all.")
    return tuple(check_alpha(a) for a in alpha)


def check_tau(tau: Any) -> int:
    """`tau` as an int, if it is a whole number of at least 1; else TypeError or ValueError."""
    if isinstance(tau, bool) or not isinstance(tau, Integral):
        raise TypeError(f"tau must be a whole number >= 1, got {tau!r} ({type(tau).__name__}). The default is {TAU}.")
    if tau < 1:
        raise ValueError(
            f"tau must be >= 1, got {tau}: at least one token must survive each layer. The default is {TAU}."
        )
    return int(tau)


def check_schedule(schedule: Any) -> str:
    """`schedule`, if it is a name in SCHEDULES; else ValueError."""
    if schedule not in SCHEDULES:
        raise ValueError(
            f"unknown schedule {schedule!r}. Available: {', '.join(SCHEDULES)}. Leave it out for 'geometric', Eq. 2 of "
            "the paper."
        )
    return schedule


def check_score(score: Any) -> str:
    """`score`, if it is a name in SCORES; else ValueError."""
    if score not in SCORES:
        raise ValueError(f"unknown score {score!r}. Available: {', '.join(SCORES)}.")
    return score
