"""Controls at the dial's MACs: what two settings beside them give together."""

import numpy as np
import pytest

from zsaa.kit.equal import ahead, at_equal_macs, control_rows, right
from zsaa.measure.stats import to_bits

N = 400


def row(reduction, accuracy, control="last", **more):
    """The first accuracy percent of the samples are right."""
    bits = to_bits([int(i < N * accuracy / 100) for i in range(N)])
    return {"control": control, "target": round(reduction), "mac_reduction": reduction, "n": N, "accuracy": accuracy,
            "right": bits, **more}  # fmt: skip


def test_two_cuts_mixed_cost_what_the_dial_does():
    """MACs of 1/4 of stock are half way between 1/3 and 1/6, whatever reductions lie between."""
    cell = at_equal_macs([row(6, 60), row(3, 80), row(12, 0)], 4)
    assert cell["accuracy"] == 70 and cell["mixed"] == (3, 6) and cell["mac_reduction"] == 4
    shares = right(cell)
    assert shares.mean() == pytest.approx(0.7) and set(np.unique(shares).round(9)) == {0, 0.5, 1}
    assert at_equal_macs([row(6, 60), row(3, 80), row(12, 0)], 9)["accuracy"] == pytest.approx(20, abs=0.01)


def test_no_cut_stands_for_one_with_fewer_macs():
    rows = [row(2, 90), row(5, 80)]
    assert at_equal_macs(rows, 5.04) is rows[1] and at_equal_macs(rows, 4.96) is rows[1], "within one percent"
    assert at_equal_macs(rows, 5.4) is rows[1], "a tenth more MACs, in the rival's favour"
    assert at_equal_macs(rows, 7) is None and at_equal_macs(rows, 1.5) is None and at_equal_macs([], 2) is None
    counted = [{**r, "f1": 50.0} for r in rows]
    assert at_equal_macs(counted, 4) is counted[0], "F1 is no mean over samples"


def test_whole_texts_are_where_every_cut_begins():
    result = {"rows": [row(2, 90), row(1, 96, "alpha"), row(2, 94, "alpha")]}
    assert [r["accuracy"] for r in control_rows(result, "last")] == [96, 90]
    assert [r["accuracy"] for r in control_rows(result, "alpha")] == [96, 94]
    whole = {"rows": [row(1, 95), *result["rows"]]}
    assert [r["accuracy"] for r in control_rows(whole, "last")] == [95, 90]


def test_leads_over_a_mixture_are_paired():
    gain, (low, high) = ahead(row(4, 75, "alpha"), at_equal_macs([row(3, 80), row(6, 60)], 4))
    assert gain == pytest.approx(5) and low < 5 < high and high - low < 5, (
        "the same samples: unpaired it would be 12 wide"
    )
    several = ahead([row(4, 75, "alpha")] * 2, [at_equal_macs([row(3, 80), row(6, 60)], 4)])
    assert several[0] == pytest.approx(gain) and several[1] == pytest.approx((low, high))
