"""Their tables, recomputed; drafting with the own first layers gives the greedy text."""

import pytest

from zsaa.depth import published


def test_what_does_not_add_up():
    wrong = {claim.said: (claim.printed, round(claim.found, 1)) for claim in published.claims() if not claim.agrees}
    assert wrong == {
        "exact match of 32B falls at 20% by": (3.3, 4.3),
        "dynamic caching saves 8B": (13.0, 13.1),
        "Inferentia speeds 8B up": (35.8, 67.7),
        "Inferentia speeds 32B up": (3.6, 4.3),
        "8B+KD at 20% has of 32B's LMentry": (96.4, 90.7),
    }
    assert published.table().count("\n") == 1 + len(wrong)


def test_what_pruning_and_distillation_do_there():
    assert published.recovered("1B", 1) == pytest.approx(60.8, abs=0.05), "of LMentry"
    assert published.recovered("1B", 0) == pytest.approx(53.2, abs=0.05), "of perplexity"
    assert published.recovered("8B", 1) == pytest.approx(93.3, abs=0.05)
    assert published.pruning_alone("1B", 20) == pytest.approx(8.0, abs=0.05), "24.4 are printed, the cache included"
    lost = {m: 1 - published.TABLE_1[m, 20, "Dynamic"][1] / published.TABLE_1[m, 0, "Dynamic"][1]
            for m in ("1B", "8B", "32B")}  # fmt: skip
    assert max(lost, key=lost.get) == "32B", "the text calls larger models more resilient"
