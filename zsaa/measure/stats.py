"""Metrics of the paper's Table 1 and their 95% intervals: of one measurement, of a difference, and over seeds.

All values are in percent. Bootstraps resample the held-out samples; since a metric depends on how many samples are of
each kind alone, a resample is one draw of those counts from a multinomial distribution.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from scipy import stats as distributions
from sklearn.metrics import f1_score

DRAWS = 10_000
Key = TypeVar("Key", bound=Hashable)


def interval(correct: int, n: int, digits: int | None = 2) -> tuple[float, float]:
    """Wilson's 95% interval of a proportion, in percent; digits: None for all."""
    found = distributions.binomtest(correct, n).proportion_ci(method="wilson")
    ends = float(100 * found.low), float(100 * found.high)
    return ends if digits is None else (round(ends[0], digits), round(ends[1], digits))


def half_width(values: Sequence[float]) -> float:
    """Half of the 95% interval of a mean, by Student's t."""
    k = len(values)
    return float(distributions.t.ppf(0.975, k - 1)) * statistics.stdev(values) / math.sqrt(k)


def f1(labels: Sequence[int], predicted: Sequence[int]) -> float:
    """F1 of label 1, the harmonic mean of precision and recall, in percent; 0 where no sample is rightly called 1."""
    _check(labels, predicted)
    return 100 * float(f1_score(labels, predicted, zero_division=0.0))


def f1_interval(labels: Sequence[int], predicted: Sequence[int], seed: int = 0) -> tuple[float, float]:
    """Percentile bootstrap over samples."""
    low, high = _percentiles(_f1(_resampled(_counts(labels, predicted), seed)))
    return round(low, 2), round(high, 2)


def difference(
    metric: str, labels: Sequence[int], one: Sequence[int], other: Sequence[int], seed: int = 0
) -> tuple[float, tuple[float, float]]:
    """How much better predictions `one` are than the `other` ones, on the same samples: points, and their interval by a
    paired percentile bootstrap. metric: "accuracy" or "f1"; for accuracy, predictions may also say of each sample
    whether it was right (labels all 1)."""
    kinds = [(y, a, b) for y in range(max(labels) + 1) for a in (0, 1) for b in (0, 1)]  # label; right by one, by other
    y, a, b = (np.asarray(values, dtype=int) for values in (labels, one, other))
    table = np.bincount(4 * y + 2 * (a == y) + (b == y), minlength=len(kinds))

    def gain(tables: np.ndarray) -> np.ndarray:
        if metric == "accuracy":
            signs = np.array([a - b for _, a, b in kinds])
            return 100 * (tables * signs).sum(-1) / tables.sum(-1)
        return _score_of(tables, kinds, 1) - _score_of(tables, kinds, 2)

    return float(gain(table)), _percentiles(gain(_resampled(table, seed)))


def mean_difference(
    ones: Sequence[Sequence[float]],
    others: Sequence[Sequence[float]],
    seed: int = 0,
    clusters: Sequence[int] | None = None,
) -> tuple[float, tuple[float, float]]:
    """`difference` in accuracy between the means of several runs each, which say of each sample whether it was right
    (or with which chance). The interval covers the chance in the samples, not in the runs. clusters: per sample the
    number of the group that it came with; then whole groups are drawn, as samples of one are not independent."""
    gains = np.mean(ones, axis=0) - np.mean(others, axis=0)
    if clusters is None:
        values, counts = np.unique(gains, return_counts=True)
        found = _resampled(counts, seed) @ values / counts.sum()
    else:
        sums, sizes = _by_cluster(gains, clusters)
        drawn = _resampled(np.ones(len(sums), dtype=int), seed)
        found = drawn @ sums / (drawn @ sizes)
    return 100 * float(gains.mean()), _percentiles(100 * found)


@dataclass(frozen=True)
class Difference:
    """A mean difference, its standard error and the degrees of freedom of that, in the unit of the samples."""

    mean: float
    error: float
    degrees: float

    @property
    def interval(self) -> tuple[float, float]:
        half = float(distributions.t.ppf(0.975, self.degrees)) * self.error
        return self.mean - half, self.mean + half

    @property
    def p(self) -> float:
        """Two-sided, that it is 0."""
        if not self.error:
            return float(self.mean == 0)
        return float(2 * distributions.t.sf(abs(self.mean) / self.error, self.degrees))

    def within(self, margin: float, expected: float = 0.0) -> float:
        """The p-value of two one-sided tests that it lies within `margin` of `expected` (the null hypothesis: it does
        not). By Student's t, so for many samples, or tens of clusters and more."""
        if margin <= 0:
            raise ValueError(f"margin is {margin}, and must be above 0: how far apart two equivalent values may lie.")
        off = abs(self.mean - expected)
        return float(distributions.t.cdf((off - margin) / self.error, self.degrees) if self.error else off >= margin)


def over_runs(
    ones: Sequence[Sequence[float]], others: Sequence[Sequence[float]], clusters: Sequence[int] | None = None
) -> Difference:
    """Between the means of several trainings each, which say of each sample whether it was right: what a further
    training on further samples may be expected to differ by.

    The chance in the samples (by `clusters`, see `mean_difference`) and that in the trainings of either side, which
    are independent, are added as errors; the degrees of freedom are Satterthwaite's. A side with one run adds none:
    then the answer is about that run."""
    mean, error, degrees = _mean(np.mean(ones, axis=0) - np.mean(others, axis=0), clusters)
    parts = [(error**2, degrees)]
    for side in (ones, others):
        runs = [float(np.mean(run)) for run in side]
        parts += [(statistics.variance(runs) / len(runs), len(runs) - 1)] if len(runs) > 1 else []
    total = sum(part for part, _ in parts)
    spread = sum(part**2 / k for part, k in parts)
    return Difference(mean, math.sqrt(total), total**2 / spread if spread else degrees)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values of several tests, corrected so that the chance of any wrong rejection stays what it says (Holm)."""
    found, least = [0.0] * len(p_values), 0.0
    for before, i in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        least = max(least, min(1.0, (len(p_values) - before) * p_values[i]))
        found[i] = least
    return found


def sure(leads: Mapping[Key, Difference], level: float = 0.05) -> set[Key]:
    """Which of these leads are not 0 by Holm's correction over all of them: what a table gives a star."""
    return {key for key, p in zip(leads, holm([lead.p for lead in leads.values()])) if p < level}


def over_seeds(
    values: Sequence[float], intervals: Sequence[tuple[float, float]]
) -> tuple[float, tuple[float, float], str]:
    """Mean over training seeds, its interval, and what the interval covers.

    Seeds share their held-out samples, so the chance in these does not average out: to each side, the interval of the
    mean over seeds (Student's t) and the mean of the seeds' own half widths are added as independent errors.
    """
    mean = statistics.fmean(values)
    if len(values) == 1:
        return mean, tuple(intervals[0]), "held-out samples; one seed"
    k = len(values)
    between = half_width(values)
    below = statistics.fmean(v - low for v, (low, _) in zip(values, intervals))
    above = statistics.fmean(high - v for v, (_, high) in zip(values, intervals))
    low, high = max(0.0, mean - math.hypot(between, below)), min(100.0, mean + math.hypot(between, above))
    return mean, (round(low, 2), round(high, 2)), f"held-out samples and {k} seeds"


def to_bits(flags: Sequence[int]) -> str:
    """0s and 1s as a hexadecimal number, the first one its highest bit."""
    return f"{int(''.join(map(str, flags)), 2):0{(len(flags) + 3) // 4}x}"


def from_bits(bits: str, n: int) -> list[int]:
    """The `n` flags that `to_bits` packed."""
    return [int(bit) for bit in f"{int(bits, 16):0{n}b}"]


def _check(labels: Sequence[int], predicted: Sequence[int]) -> None:
    """F1 takes the labels 0 and 1 alone; scikit-learn would take any two, or average over more if asked to."""
    if others := (set(labels) | set(predicted)) - {0, 1}:
        known = sorted({*labels, *predicted})
        raise ValueError(
            f"F1 is of label 1 against label 0, got the labels {known}; {sorted(others)} mean nothing here."
        )


def _counts(labels: Sequence[int], predicted: Sequence[int]) -> np.ndarray:
    """[true positives, samples wrongly called 1, samples of label 1 missed, the rest]"""
    _check(labels, predicted)
    pairs = list(zip(labels, predicted, strict=True))
    return np.array([pairs.count(kind) for kind in ((1, 1), (0, 1), (1, 0), (0, 0))])


def _resampled(counts: np.ndarray, seed: int) -> np.ndarray:
    """[DRAWS, kinds]"""
    # RandomState: the one numpy generator whose stream is promised never to change.
    return np.random.RandomState(seed).multinomial(counts.sum(), counts / counts.sum(), size=DRAWS)


def _by_cluster(values: np.ndarray, clusters: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Sum of the values, and their number, in each cluster."""
    _, of = np.unique(clusters, return_inverse=True)
    if len(of) != len(values) or of.max() == 0:
        raise ValueError(
            f"{len(of)} samples in {of.max() + 1} clusters: {len(values)} samples in two or more are needed."
        )
    return np.bincount(of, values), np.bincount(of)


def _mean(values: Sequence[float], clusters: Sequence[int] | None) -> tuple[float, float, int]:
    """The mean, its standard error, and the degrees of freedom."""
    values = np.asarray(values, dtype=float)
    off = values - values.mean()
    sums = off if clusters is None else _by_cluster(off, clusters)[0]
    k = len(sums)
    return float(values.mean()), float(np.sqrt(k / (k - 1) * (sums**2).sum()) / len(values)), k - 1


def _f1(counts: np.ndarray) -> np.ndarray:
    """F1 of counts [..., kinds]: what scikit-learn gives of the samples, for thousands of resamples at once."""
    hits, false, missed = counts[..., 0], counts[..., 1], counts[..., 2]
    return 200 * hits / np.maximum(2 * hits + false + missed, 1)


def _score_of(tables: np.ndarray, kinds: list, which: int) -> np.ndarray:
    """F1 of the first (which = 1) or second predictions, from counts [..., kinds] of (label, right, right)."""
    chosen = [[k[0] == y and k[which] == right for k in kinds] for y, right in ((1, 1), (0, 0), (1, 0), (0, 1))]
    return _f1(np.stack([tables[..., np.array(mask)].sum(-1) for mask in chosen], axis=-1))


def _percentiles(values: np.ndarray) -> tuple[float, float]:
    low, high = np.percentile(values, (2.5, 97.5))
    return float(low), float(high)
