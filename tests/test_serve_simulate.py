"""The simulator against what queueing theory says, and the controller in it."""

import itertools
import random
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zsaa.serve import simulate as simulator
from zsaa.serve.controller import POLICIES, Policy, Rung, policy_named
from zsaa.serve.simulate import describe, simulate
from zsaa.serve.traces import Outcome, Profile, bursts, day, poisson, recovery_s, steady, summary, turns

RUNGS = tuple(Rung(1 - k / 100, 400 / 1.32**k) for k in range(6))
POLICY = Policy(RUNGS, p95_ms=2000)
ONE = Policy((Rung(1.0, 1000.0),), p95_ms=1e6, admits=False)


def waits(service, utilization, seed=0, n=20_000, **options):
    """Mean seconds in the house of requests that take a second on average."""
    arrivals = poisson(steady(n / utilization), utilization, seed)
    outcomes = simulate(arrivals, ONE, service, batch=1, tick_s=1e6, **options).outcomes
    return statistics.fmean(outcome.latency_ms for outcome in outcomes) / 1000


@pytest.mark.parametrize("utilization", [0.6, pytest.param(0.3, marks=pytest.mark.full)])
def test_constant_service_times_wait_as_m_d_1_does(utilization):
    expected = 1 + utilization / (2 * (1 - utilization))  # Pollaczek and Khinchine
    assert waits(lambda alpha, works: 1.0, utilization, n=6000) == pytest.approx(expected, rel=0.06)


@pytest.mark.full
@pytest.mark.parametrize("utilization", [0.8])
def test_exponential_service_times_wait_as_m_m_1_does(utilization):
    draw = random.Random(1)
    found = waits(lambda alpha, works: draw.expovariate(1), utilization)
    assert found == pytest.approx(1 / (1 - utilization), rel=0.1)


def test_work_and_batches_take_their_time():
    """Three at once: the first runs alone, the other two together, then one of double work."""
    policy = Policy((Rung(1.0, 100.0),), p95_ms=1e6)
    service = simulator.served_as_calibrated(policy, per_batch_ms=10)
    run = simulate([0, 0, 0, 5], policy, service, works=[1, 1, 1, 2], batch=8)
    assert [round(outcome.latency_ms) for outcome in run.outcomes] == [110, 320, 320, 210]


@given(st.lists(st.floats(0, 20), max_size=60), st.integers(1, 3), st.sampled_from(POLICIES))
def test_every_request_is_answered_or_refused_once(arrivals, replicas, name):
    policy = policy_named(name, POLICY)
    run = simulate(sorted(arrivals), policy, replicas=replicas)
    assert len(run.outcomes) == len(arrivals)
    for outcome in run.outcomes:
        assert outcome.refused == (outcome.latency_ms is None)
        assert outcome.refused or policy.floor <= outcome.alpha <= 1
    assert name in ("controller", "admission") or not any(outcome.refused for outcome in run.outcomes)
    assert run == simulate(sorted(arrivals), policy, replicas=replicas)


def test_evenly_spaced_arrivals_bring_alpha_to_rest():
    """More than alpha = 1 can serve, as regular as a clock: down, and there it stays."""
    for rate in (3.0, 4.0, 6.0):
        arrivals = [k / rate for k in range(int(120 * rate))]
        seen = [alpha for at, alpha, _ in simulate(arrivals, POLICY).seen if 20 < at < 119]
        assert turns(seen) == 0, (rate, seen)
        assert seen[-1] < 1


@pytest.mark.parametrize("times", [2, 5])
def test_a_rush_is_survived_and_forgotten(times):
    """By many a seed: far fewer violations than alpha = 1, nothing pruned 10 seconds after."""
    profile = bursts(times, 120)
    for seed in range(5):
        arrivals = poisson(profile, 0.7 * 2.5, seed)
        found = {
            name: describe(simulate(arrivals, policy, seed=seed), policy, profile)
            for name in POLICIES
            for policy in [policy_named(name, POLICY)]
        }
        assert found["stock"]["violations"] > 0.2
        assert found["controller"]["violations"] <= 0.1 * found["stock"]["violations"]
        assert found["controller"]["goodput"] > found["admission"]["goodput"]
        assert found["controller"]["recovery_s"] <= 10
        assert found["controller"]["below_one"] < 1 == found["floor"]["below_one"]


@pytest.mark.parametrize("pace", [0.25, 3])
def test_a_machine_that_is_not_as_fast_as_when_it_was_timed_is_found_out(pace):
    """Nobody is refused who could have been served, and the promise is kept all the same: of arrivals that are scaled
    with the machine, the promise too."""
    policy, ms = Policy(RUNGS, p95_ms=2000 * pace), {rung.alpha: rung.ms * pace for rung in RUNGS}
    profile = bursts(2, 120)
    arrivals = poisson(profile, 0.7 * 2.5 / pace, 1)
    run = simulate(arrivals, policy, lambda alpha, works: ms[alpha] * sum(works) / 1000)
    found = describe(run, policy, profile)
    assert found["violations"] < 0.1 and found["refused"] <= 0.03 * found["requests"]
    assert 0.1 < found["below_one"] < 0.9


def test_replicas_share_the_load():
    arrivals = poisson(steady(60), 8.0, 3)
    stock = policy_named("stock", POLICY)
    violations = [summary(simulate(arrivals, stock, replicas=k).outcomes, 2000, 60)["violations"] for k in (1, 2, 6)]
    assert violations[0] > violations[1] > violations[2] == 0


def test_poisson_arrivals_follow_the_profile():
    profile = bursts(5, 600)
    arrivals = poisson(profile, 4.0, 2)
    assert arrivals == sorted(arrivals) == poisson(profile, 4.0, 2)
    ((begin, end),) = profile.bursts
    inside = [at for at in arrivals if begin <= at < end]
    assert len(inside) == pytest.approx(20 * (end - begin), rel=0.05)
    assert len(arrivals) - len(inside) == pytest.approx(4 * (600 - (end - begin)), rel=0.1)
    gaps = [b - a for a, b in itertools.pairwise(inside)]
    assert statistics.stdev(gaps) == pytest.approx(statistics.fmean(gaps), rel=0.1)  # exponential
    noon = [at for at in poisson(day(600), 4.0, 2) if 250 < at < 350]
    assert len(noon) == pytest.approx(100 * 4 * 1.47, rel=0.15)
    with pytest.raises(ValueError, match="rate must be"):
        poisson(Profile("none", 1, lambda t: 1, 1), 0)


def test_what_a_summary_counts():
    outcomes = [
        Outcome(0, 100.0, 1.0, right=True),
        Outcome(1, 300.0, 0.9, right=False),
        Outcome(2, None, refused=True),
        Outcome(3, None),
    ]
    found = summary(outcomes, p95_ms=200, seconds=2)
    assert (found["answered"], found["refused"], found["lost"], found["late"]) == (2, 1, 1, 1)
    assert found["violations"] == pytest.approx(2 / 3, abs=1e-4)
    assert (found["goodput"], found["below_one"], found["graded"], found["correct"]) == (0.5, 0.5, 2, 1)
    assert summary([], 200, 2)["violations"] is None
    assert turns([1, 0.9, 0.9, 0.8, 0.9, 1]) == 1
    assert recovery_s([(0, 1), (5, 0.8), (9, 0.9), (11, 1)], 5) == 6
    assert recovery_s([(0, 1), (5, 0.8)], 5) is None


@pytest.mark.parametrize(("padded", "batches"), [(float("inf"), [[1.0], [1.0, 9.0]]), (1.25, [[1.0], [1.0], [9.0]])])
def test_a_long_request_does_not_pad_short_ones(padded, batches):
    ran = []
    simulate([0.0, 0.1, 0.2], ONE, lambda alpha, works: ran.append(works) or 1.0, [1.0, 1.0, 9.0], padded=padded)
    assert ran == batches


def test_a_batch_is_no_longer_than_its_share_of_the_promise():
    """Of a promise of 4 s a quarter: batches of two, and nobody who came first waits for all who came later."""
    ran, policy = [], Policy((Rung(1.0, 500.0),), p95_ms=4000, admits=False)
    simulate([0.0] * 7, policy, lambda alpha, works: ran.append(works) or 0.5 * len(works), [1, 1, 1, 3, 1, 1, 1])
    assert ran == [[1], [1, 1], [3], [1, 1], [1]]


def test_the_command_prints_a_row_for_each_policy(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["simulate", "--seconds", "20", "--replicas", "2"])
    simulator.main()
    assert capsys.readouterr().out.count('"policy"') == 4 * len(POLICIES)
