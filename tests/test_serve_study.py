"""The study of rushes: costs that were put in come out of the fit, and its rows compare what they say."""

import json
from dataclasses import asdict, replace

import pytest

pytest.importorskip("ray.serve", reason="the study asks the server's own classifier: pip install 'zsaa[serve]'")

from zsaa.kit.store import RESULTS
from zsaa.serve import study
from zsaa.serve.controller import POLICIES, Rung
from zsaa.serve.study import Costs, World

RUNGS = tuple(Rung(1 - k / 50, 400 / 1.25**k) for k in range(5))
LENGTHS = tuple(40 + (37 * k) % 120 for k in range(50))
WORLD = World(RUNGS, 2000.0, 1.5, 100, LENGTHS, 1)


def measured(costs, seconds=30.0):
    """As zsaa.serve.load writes it, of a server whose requests cost this."""
    rows = []
    for name in ("stock", "floor", "controller"):
        for number, times in enumerate((2, 5)):
            profile = study.bursts(times, seconds)
            row = WORLD.play(name, profile, costs, number)
            rows.append({"policy": name, "profile": profile.name, "seconds": seconds, **row})
    facts = {"promise_ms": WORLD.p95_ms, "rate": WORLD.rate, "reference_tokens": WORLD.reference}
    return {**facts, "rungs": [asdict(rung) for rung in RUNGS], "rows": rows, "provenance": {"seed": 0}}


@pytest.mark.parametrize("costs", [Costs(0.8, 150.0), pytest.param(Costs(1.4, 0.0), marks=pytest.mark.full)])
def test_the_costs_of_a_run_are_found_and_the_rest_of_it_is_predicted(costs, monkeypatch):
    monkeypatch.setattr(study, "PACES", [0.8, 1.0, 1.4])
    monkeypatch.setattr(study, "BESIDES_MS", [0.0, 150.0, 300.0])
    found = study.study(measured(costs), LENGTHS, 1, range(3), scatter=0.1)
    assert (found["costs"]["pace"], found["costs"]["beside_ms"]) == (costs.pace, costs.beside_ms)
    assert sum(row["fitted"] for row in found["predicted"]) == 2
    for row in found["predicted"]:
        assert row["measured"].items() <= row["simulated"].items()
    assert {(row["profile"], row["policy"]) for row in found["rows"]} == {
        (profile, policy) for profile in ("burst 2x", "burst 5x") for policy in POLICIES
    }
    for row in found["rows"]:
        assert row["answered"] + row["refused"] + row["lost"] == pytest.approx(row["requests"], abs=0.01)
        assert ("gain_ci95" in row) == (row["policy"] != "controller")


def test_scatter_keeps_the_mean_and_the_same_seed_the_same_rush():
    profile = study.bursts(2, 30)
    noisy = Costs(1.0, 50.0, 0.3)
    took = noisy.service(RUNGS, 1)
    times = [took(1.0, [1.0]) for _ in range(4000)]
    assert sum(times) / len(times) == pytest.approx(0.45, rel=0.02) and len(set(times)) > 3000
    assert WORLD.play("controller", profile, noisy, 3, 5, 7) == WORLD.play("controller", profile, noisy, 3, 5, 7)
    assert WORLD.play("controller", profile, noisy, 3, 5, 7) != WORLD.play("controller", profile, noisy, 3, 5, 8)


def test_what_comes_too_late_for_the_load_generator_is_lost():
    slow = replace(WORLD, rate=6.0)
    row = slow.play("stock", study.bursts(5, 20), Costs(2.0, 0.0), 0)
    assert row["lost"] > 0 and row["answered"] + row["lost"] == row["requests"]
    assert row["p95_ms"] < 1000 * (20 + study.DRAIN_S)


@pytest.mark.parametrize("name, day, replicas", [("cpu", {"day"}, 1), ("cpu-two", set(), 2), ("h200-before", set(), 1)])
def test_the_committed_run_is_one_that_the_study_can_read(name, day, replicas):
    result = json.loads((RESULTS / f"serving/serve-{name}.json").read_text())
    assert {study.profile_of(row).name for row in study.rushes(result)} == {"burst 2x", "burst 5x"} | day
    assert study.replicas_of(result) == replicas
    assert {"rungs", "rate", "reference_tokens", "promise_ms"} <= set(result)


def test_many_replicas_share_a_rush_and_each_does_no_worse():
    rows = study.fleet(WORLD, Costs(1.0, 50.0), 20.0, (1, 4))
    assert len(rows) == 2 * 2 * len(POLICIES)
    of = {(row["replicas"], row["profile"], row["policy"]): row for row in rows}
    for (replicas, *_), row in of.items():
        assert row["answered"] + row["refused"] + row["lost"] == row["requests"]
        assert row["goodput_each"] == pytest.approx(row["goodput"] / replicas, abs=1e-4)
    assert of[4, "burst 5x", "controller"]["requests"] > 3 * of[1, "burst 5x", "controller"]["requests"]
    assert of[4, "burst 5x", "controller"]["goodput_each"] > 0.9 * of[1, "burst 5x", "controller"]["goodput_each"]
