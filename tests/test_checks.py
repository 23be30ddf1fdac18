"""Checks of arguments: what fits, what does not, and what the error says."""

import math

import numpy as np
import pytest

from zsaa.measure.checks import check_flag, check_number, check_whole


@pytest.mark.parametrize(
    ("interval", "inside", "outside"),
    [
        ("[0, 1)", (0, 0.5, np.float32(0.25)), (-1e-9, 1, 1.0, math.inf, math.nan)),
        ("(0, inf)", (1e-300, 5, np.int64(3)), (0, 0.0, -1, math.inf, math.nan)),
        ("[1, inf)", (1, 1.0), (0.999, math.inf)),
        ("[0, 1]", (0, 1), (1.001, -0.001)),
    ],
)
def test_intervals(interval, inside, outside):
    for value in inside:
        found = check_number("rate", value, interval)
        assert found == value and type(found) in (int, float)
    for value in (*outside, "0.5", None, True, [0.5], 0.5j):
        with pytest.raises(ValueError) as caught:
            check_number("rate", value, interval)
        text = (
            "" if value != "0.5" else ", which is text: give a number (YAML reads 2e-5 as text, and 2.0e-5 as a number)"
        )
        assert str(caught.value) == f"rate must be in {interval}, got {value!r}{text}."


def test_whole_numbers():
    assert [check_whole("n", v) for v in (1, np.int32(7), 2**40)] == [1, 7, 2**40]
    assert type(check_whole("n", np.int32(7))) is int
    assert check_whole("n", None, also={None: "all"}) is None and check_whole("n", -1, also={-1: "no limit"}) == -1
    assert check_whole("n", 0, least=0, most=3) == 0 and check_whole("n", 3, most=3) == 3
    cases = [((0,), {}, "1 or more, got 0"), ((1.0,), {}, "1 or more, got 1.0"), ((True,), {}, "got True"),
             ((4,), {"most": 3}, "from 1 to 3, got 4"), (("2",), {}, "got '2', which is text"),
             ((1,), {"least": 0, "most": 0}, "from 0 to 0, got 1"),
             ((-1,), {"also": {None: "all"}}, r"1 or more, or None \(all\), got -1"),
             ((-1.0,), {"also": {-1: "none"}}, "got -1.0"), ((False,), {"also": {0: "none"}}, "got False")]  # fmt: skip
    for given, options, message in cases:
        with pytest.raises(ValueError, match=f"^n must be a whole number.*{message}"):
            check_whole("n", *given, **options)


def test_flags():
    assert check_flag("on", np.bool_(True)) is True and check_flag("on", False) is False
    for value in ("false", 0, 1, None):
        with pytest.raises(ValueError, match="on must be True or False, got"):
            check_flag("on", value)
