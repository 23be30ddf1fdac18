"""When requests arrive, and what became of them: the same for the simulator and for a real server."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from zsaa.serve.controller import percentile


@dataclass(frozen=True)
class Outcome:
    """What became of one request. at_s: when it arrived, in seconds of the run. latency_ms: until the last byte, None
    if it was refused or lost. alpha: what it got. refused: was it turned away (429)? right: was the answer right, if
    graded?"""

    at_s: float
    latency_ms: float | None
    alpha: float | None = None
    refused: bool = False
    right: bool | None = None


@dataclass(frozen=True)
class Profile:
    """How the rate changes. times: what the base rate is multiplied by at second t of the run. bursts: (begin, end) of
    each spell above the base rate, seconds."""

    name: str
    seconds: float
    times: Callable[[float], float]
    most: float  # the largest of these
    bursts: tuple[tuple[float, float], ...] = ()


def steady(seconds: float) -> Profile:
    return Profile("steady", seconds, lambda t: 1.0, 1.0)


def bursts(times: float, seconds: float) -> Profile:
    """A quarter of the time as usual, a third of it a rush of so many times the rate, then as usual."""
    begin, end = seconds / 4, seconds * 7 / 12
    return Profile(
        f"burst {times:g}x", seconds, lambda t: times if begin <= t < end else 1.0, max(1.0, times), ((begin, end),)
    )


def day(seconds: float) -> Profile:
    """A day in so many seconds: half of the rate at night, one and a half times at noon, a wave between."""
    return Profile("day", seconds, lambda t: 1 - 0.5 * math.cos(2 * math.pi * t / seconds), 1.5)


def poisson(profile: Profile, rate: float, seed: int = 0) -> list[float]:
    """Arrivals of a Poisson process, in seconds, whose rate at t is `rate` a second times the profile's (by
    thinning)."""
    if not 0 < rate < math.inf:
        raise ValueError(f"rate must be requests a second in (0, inf), got {rate}.")
    draw, now, arrivals = random.Random(seed), 0.0, []
    while True:
        now += draw.expovariate(rate * profile.most)
        if now >= profile.seconds:
            return arrivals
        if draw.random() * profile.most < profile.times(now):
            arrivals.append(now)


def summary(outcomes: Sequence[Outcome], p95_ms: float, seconds: float) -> dict:
    """Counts and shares of one run. violations: the share of the requests let in that took longer than promised, or
    were lost. goodput: answers in time, a second. Latencies in milliseconds, None where nothing was answered."""
    let_in = [outcome for outcome in outcomes if not outcome.refused]
    answered = [outcome for outcome in let_in if outcome.latency_ms is not None]
    times, graded = [o.latency_ms for o in answered], [o.right for o in answered if o.right is not None]
    in_time = sum(ms <= p95_ms for ms in times)
    alphas = [o.alpha for o in answered if o.alpha is not None]
    return {
        "requests": len(outcomes),
        "answered": len(answered),
        "refused": len(outcomes) - len(let_in),
        "lost": len(let_in) - len(answered),
        "late": len(answered) - in_time,
        "violations": _rounded((len(let_in) - in_time) / len(let_in) if let_in else None),
        "goodput": _rounded(in_time / seconds),
        **{f"p{round(100 * share)}_ms": _rounded(percentile(times, share), 1) for share in (0.5, 0.95, 0.99)},
        "mean_alpha": _rounded(sum(alphas) / len(alphas) if alphas else None),
        "below_one": _rounded(sum(alpha < 1 for alpha in alphas) / len(alphas) if alphas else None),
        "graded": len(graded),
        "correct": sum(graded),
    }


def _rounded(value: float | None, digits: int = 4) -> float | None:
    return None if value is None else round(value, digits)


def turns(alphas: Sequence[float]) -> int:
    """How often a sequence of alphas changes its direction: a controller that swings has many."""
    moves = [b > a for a, b in itertools.pairwise(alphas) if a != b]
    return sum(a != b for a, b in itertools.pairwise(moves))


def recovery_s(seen: Sequence[tuple[float, float]], end_s: float) -> float | None:
    """Seconds after `end_s` until alpha, seen as (second, alpha), is back at 1; None if it was not seen there again."""
    return next((max(0.0, at - end_s) for at, alpha in seen if at >= end_s and alpha == 1), None)
