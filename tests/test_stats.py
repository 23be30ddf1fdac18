"""Metrics and intervals, against plain references."""

import random

import numpy as np
import pytest
from scipy.stats import ttest_1samp

from zsaa.measure import stats


def plain_f1(labels, predicted):
    hits = sum(y == p == 1 for y, p in zip(labels, predicted))
    if not hits:
        return 0.0
    precision, recall = hits / sum(predicted), hits / sum(labels)
    return 100 * 2 * precision * recall / (precision + recall)


def made_up(n, right, seed=0, share=0.6):
    rng = random.Random(seed)
    labels = [int(rng.random() < share) for _ in range(n)]
    return labels, [y if rng.random() < right else 1 - y for y in labels]


@pytest.mark.parametrize("right", [0.0, 0.3, 0.8, 1.0])
def test_f1_is_the_harmonic_mean_of_precision_and_recall(right):
    labels, predicted = made_up(200, right)
    assert stats.f1(labels, predicted) == pytest.approx(plain_f1(labels, predicted))
    assert stats._f1(stats._counts(labels, predicted)) == pytest.approx(stats.f1(labels, predicted)), "as resampled"


def test_f1_of_nothing_called_1_is_0_and_other_labels_are_refused():
    assert stats.f1([0, 0], [0, 0]) == stats.f1([1, 0], [0, 0]) == 0
    with pytest.raises(ValueError, match=r"label 1 against label 0.*\[0, 1, 2\]"):
        stats.f1([0, 1, 2], [0, 1, 1])


def resampled(statistic, *columns, draws=2000):
    """The bootstrap as it is told: draw samples with replacement, compute, take percentiles."""
    columns, rng = [np.array(c) for c in columns], np.random.default_rng(5)
    picks = rng.integers(len(columns[0]), size=(draws, len(columns[0])))
    return np.percentile([statistic(*(c[pick].tolist() for c in columns)) for pick in picks], (2.5, 97.5))


def test_f1_interval_is_the_bootstrap_over_samples():
    labels, predicted = made_up(150, 0.8)
    assert stats.f1_interval(labels, predicted) == pytest.approx(resampled(plain_f1, labels, predicted), abs=0.7)
    assert stats.f1_interval(labels, predicted) == stats.f1_interval(labels, predicted), "seeded"
    low, high = stats.f1_interval(labels, predicted)
    assert low < stats.f1(labels, predicted) < high


@pytest.mark.parametrize("metric", ["accuracy", "f1"])
def test_differences_are_paired(metric):
    labels, one = made_up(150, 0.85)
    other = [p if random.Random(i).random() < 0.9 else 1 - p for i, p in enumerate(one)]

    def plain(y, a, b):
        value = plain_f1 if metric == "f1" else lambda y, p: 100 * sum(map(int.__eq__, y, p)) / len(y)
        return value(y, a) - value(y, b)

    points, (low, high) = stats.difference(metric, labels, one, other)
    assert points == pytest.approx(plain(labels, one, other), abs=0.006)
    assert (low, high) == pytest.approx(resampled(plain, labels, one, other), abs=1.0)
    back, (back_low, back_high) = stats.difference(metric, labels, other, one)
    assert back == -points and (back_low, back_high) == pytest.approx((-high, -low), abs=0.3)
    assert stats.difference(metric, labels, one, one) == (0, (0, 0)), "unlike the intervals of two separate runs"


def test_means_of_several_runs_are_compared_sample_by_sample():
    rng = np.random.default_rng(3)
    runs = [rng.integers(0, 2, 300).tolist() for _ in range(5)]
    one, (low, high) = stats.mean_difference(runs[:1], runs[1:2])
    same, (lower, higher) = stats.difference("accuracy", [1] * 300, runs[0], runs[1])
    assert one == same and (low, high) == pytest.approx((lower, higher), abs=1)
    gain, (low, high) = stats.mean_difference(runs[:3], runs[3:])
    each = np.mean(runs[:3], axis=0) - np.mean(runs[3:], axis=0)
    assert gain == pytest.approx(100 * each.mean(), abs=0.006)
    draws = 100 * each[rng.integers(0, 300, (4000, 300))].mean(1)
    assert (low, high) == pytest.approx(tuple(np.percentile(draws, (2.5, 97.5))), abs=0.6)
    assert stats.mean_difference(runs[:2], runs[:2]) == (0.0, (0.0, 0.0))


def test_accuracy_difference_of_three_classes_and_of_right_or_wrong():
    labels, one, other = [0, 1, 2, 2, 1, 0], [0, 1, 2, 2, 1, 1], [2, 1, 1, 2, 0, 1]
    points, bounds = stats.difference("accuracy", labels, one, other)
    right = [[int(p == y) for y, p in zip(labels, column)] for column in (one, other)]
    assert points == 50.0 and stats.difference("accuracy", [1] * 6, *right)[0] == points
    assert bounds[0] < 50 < bounds[1]


def test_interval_over_seeds():
    """Worked out by hand: mean 80, standard deviation 2, t(2) = 4.303, so 4.969 between seeds; 3 and 4 by samples."""
    mean, (low, high), covers = stats.over_seeds([78, 80, 82], [(75, 82), (77, 84), (79, 86)])
    assert mean == 80 and covers == "held-out samples and 3 seeds"
    assert (low, high) == (pytest.approx(80 - (4.969**2 + 9) ** 0.5, abs=0.01), pytest.approx(86.38, abs=0.01))
    assert stats.over_seeds([78.5], [(75, 82)]) == (78.5, (75, 82), "held-out samples; one seed")
    assert stats.over_seeds([99, 99.9], [(98, 100), (98, 100)])[1][1] == 100, "never above 100"


def test_seeds_have_students_t_however_many_there_are():
    """The defect of old: from 11 seeds on, the normal distribution's 1.96 stood in for 2.228."""
    values = [80 + i % 3 for i in range(11)]
    _, (low, high), _ = stats.over_seeds(values, [(v, v) for v in values])  # no chance but that between seeds
    error = np.std(values, ddof=1) / 11**0.5
    assert (high - low) / 2 == pytest.approx(2.228 * error, abs=0.006) != pytest.approx(1.96 * error, abs=0.006)


@pytest.mark.parametrize(("correct", "n"), [(0, 7), (7, 7), (1, 3), (4524, 4900), (50, 100)])
def test_wilsons_interval_by_hand(correct, n):
    z, p = 1.959964, correct / n
    middle, half = p + z * z / (2 * n), z * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    want = [100 * (middle + sign * half) / (1 + z * z / n) for sign in (-1, 1)]
    assert stats.interval(correct, n) == pytest.approx(want, abs=0.006)


def test_trainings_add_their_chance_to_the_samples():
    """Of many made-up experiments the interval holds the truth in 95%; without the trainings' chance, in far fewer."""
    draw, held, narrow = np.random.RandomState(0), 0, 0
    for _ in range(300):
        hard = draw.normal(size=400) * 0.2  # what samples have in common
        ones, others = (
            [0.8 + hard + draw.normal() * 0.02 + draw.normal(size=400) * 0.1 for _ in range(5)] for _ in "ab"
        )
        found = stats.over_runs(ones, others)
        low, high = found.interval
        held += low <= 0 <= high
        low, high = stats.over_runs([np.mean(ones, axis=0)], [np.mean(others, axis=0)]).interval  # as if trained once
        narrow += low <= 0 <= high
    assert held > 0.92 * 300 and narrow < 0.7 * 300


def test_one_run_each_is_the_paired_test():
    draw = np.random.RandomState(1)
    one, other = draw.normal(size=300) + 0.1, draw.normal(size=300)
    found = stats.over_runs([one], [other], np.arange(300) // 3)
    assert found.p == pytest.approx(ttest_1samp((one - other).reshape(-1, 3).mean(axis=1), 0).pvalue)
    assert (found.p < 0.05) == (not found.interval[0] <= 0 <= found.interval[1])
    same = stats.over_runs([one], [one])
    assert (same.mean, same.error, same.interval) == (0, 0, (0, 0)) and same.within(0.5) == 0
    assert same.p == 1 and stats.sure({"the same": same}) == set(), "what never differs is not ahead"
