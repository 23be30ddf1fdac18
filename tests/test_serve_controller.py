"""The controller: its promises for every reading, and the floor that a measured curve gives."""

import itertools
import json
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st

import zsaa
from zsaa.budget import Calibration
from zsaa.kit.store import RESULTS
from zsaa.serve import costs
from zsaa.serve.controller import (
    LEAST_TRUST,
    POLICIES,
    Controller,
    Costs,
    Policy,
    Reading,
    Rung,
    State,
    Watch,
    batch_work,
    percentile,
    policy_named,
    retry_after,
    step,
)

LADDER = tuple(Rung(alpha, ms) for alpha, ms in ((1.0, 400), (0.97, 250), (0.94, 160), (0.9, 100), (0.8, 60)))
POLICY = Policy(LADDER, p95_ms=2000)
amounts = st.floats(0, 1e4, allow_nan=False)


@st.composite
def policies(draw):
    alphas = sorted(draw(st.sets(st.floats(0.05, 0.999), max_size=6)) | {1.0}, reverse=True)
    costs = sorted(draw(st.lists(st.floats(0.1, 5000), min_size=len(alphas), max_size=len(alphas))), reverse=True)
    rungs = tuple(map(Rung, alphas, costs))
    return Policy(rungs, draw(st.floats(10, 1e4)), hold_s=draw(st.floats(0, 3)))


@st.composite
def states(draw, policy):
    return State(
        draw(st.integers(0, len(policy.rungs) - 1)),
        draw(st.none() | st.floats(0, 100)),
        draw(st.floats(LEAST_TRUST, 1)),
        draw(st.none() | st.floats(0, 100)),
        draw(st.none() | st.floats(0, 100)),
    )


@st.composite
def situations(draw):
    policy = draw(policies())
    beside_ms = draw(st.just(0.0) | st.floats(0, 1000))
    pace, p95_ms = draw(st.floats(0.01, 100)), draw(st.none() | amounts)
    batches = draw(st.just(0.0) | st.floats(0, 1000)), draw(st.floats(1, 100))
    reading = Reading(draw(st.floats(0, 200)), draw(amounts), draw(amounts), p95_ms, pace, beside_ms, *batches)
    return policy, draw(states(policy)), reading


def alpha(policy, state):
    return policy.rungs[state.rung].alpha


@given(situations())
def test_alpha_stays_between_the_floor_and_one_and_depends_on_nothing_else(situation):
    policy, state, reading = situation
    after = step(policy, state, reading)
    assert policy.floor <= alpha(policy, after) <= 1
    assert 0 < after.trust <= 1
    assert step(policy, state, reading) == after


@given(situations(), amounts, amounts, amounts, amounts, amounts, amounts)
def test_more_of_anything_never_raises_alpha(situation, pending, rate, p95, pace, beside, batch):
    policy, state, reading = situation
    p95 = None if reading.p95_ms is None else reading.p95_ms + p95
    costs = reading.pace + pace, reading.beside_ms + beside, reading.batch_ms + batch, reading.full
    worse = Reading(reading.now_s, reading.pending + pending, reading.rate + rate, p95, *costs)
    assert alpha(policy, step(policy, state, worse)) <= alpha(policy, step(policy, state, reading))


@given(situations())
def test_idle_it_is_back_at_one_after_a_hold_for_each_rung(situation):
    policy, state, reading = situation
    now = max(reading.now_s, state.seen_s or 0, state.calm_since or 0)
    now = max(now, (state.lowered_s or 0) + policy.p95_ms / 1000)
    for k in range(len(policy.rungs) + 1):
        state = step(policy, state, Reading(now + k * (policy.hold_s + 1e-6), pending=0))
    assert alpha(policy, state) == 1


@given(situations(), st.floats(0.05, 2))
def test_under_a_constant_load_it_turns_once_at_most_and_then_rests(situation, pause):
    """Once: down, since what was observed before made it careful, and up as trust returns."""
    policy, state, reading = situation
    now = max(reading.now_s, state.seen_s or 0, state.calm_since or 0)
    seen = [state.rung]
    for k in range(400):
        state = step(policy, state, replace(reading, now_s=now + k * pause))
        seen.append(state.rung)
    moves = [math.copysign(1, b - a) for a, b in itertools.pairwise(seen) if a != b]
    assert sum(a != b for a, b in itertools.pairwise(moves)) <= 1
    settled = math.ceil((20 + policy.p95_ms / 1000 + (len(policy.rungs) + 1) * (policy.hold_s + pause)) / pause)
    assert len(set(seen[settled:])) <= 1


@given(situations(), amounts)
def test_who_is_refused_has_everybody_at_the_floor(situation, pending):
    """Never is anybody sent away while a lower alpha is still allowed."""
    policy, state, reading = situation
    after = step(policy, state, replace(reading, pending=pending))
    reading = replace(reading, pending=pending)
    seconds = retry_after(policy, after, reading)
    least_ms = reading.takes(policy.rungs[-1], pending - 1)
    if seconds is not None and least_ms > policy.share * after.trust * policy.p95_ms:
        assert alpha(policy, after) == policy.floor
    assert seconds is None or (isinstance(seconds, int) and seconds >= 1)


@given(situations(), st.floats(0.01, 1), amounts)
def test_a_batch_takes_its_share_of_the_promise_at_most_and_as_much_of_it_as_it_can(situation, share, pace):
    policy, state, reading = situation
    policy = replace(policy, batch_share=share)
    room, most_ms = batch_work(policy, state.rung, reading), share * policy.p95_ms
    rung, cost_ms = policy.rungs[state.rung], reading.pace * policy.rungs[state.rung].ms + reading.beside_ms
    assert room * cost_ms == pytest.approx(max(0.0, most_ms - reading.batch_ms), rel=1e-6)
    assert room <= reading.full or reading.takes(rung, min(room, reading.full)) <= most_ms * (1 + 1e-6)
    assert batch_work(policy, state.rung, replace(reading, pace=reading.pace + pace)) <= room
    assert state.rung == 0 or batch_work(policy, state.rung - 1, reading) <= room


@given(situations(), st.floats(0.01, 20), st.floats(1, 20))
def test_who_finds_the_house_empty_is_let_in_and_the_door_closes_once(situation, work, more):
    """However slow the machine and however little the model is trusted; and with more in the house it stays closed."""
    policy, state, reading = situation
    assert retry_after(policy, state, replace(reading, pending=work), work) is None
    if retry_after(policy, state, reading) is not None:
        assert retry_after(policy, state, replace(reading, pending=reading.pending * more)) is not None


@given(st.floats(0.3, 3), st.floats(0, 500), st.floats(0.2, 3))
def test_a_promise_that_is_broken_is_not_answered_twice(pace, beside_ms, first_s):
    """Once trust has fallen, what counts is requests that came after: those in the house then are late anyway."""
    controller = Controller(POLICY)
    controller.look(0.0, 1)
    controller.watch.answered(1.0, 2500)
    controller.look(1.0, 5)
    fallen = controller.state.trust
    assert fallen < 1
    controller.watch.answered(1.0 + first_s, 1000 * first_s + 500)  # it came half a second before
    controller.look(1.0 + first_s, 5)
    assert controller.state.trust >= fallen and (first_s >= 2 or controller.state.trust == fallen)
    controller.watch.answered(3.7, 2600)  # and this one a tenth of a second after
    controller.look(3.7, 5)
    assert controller.state.trust < 1


def test_down_at_once_and_up_one_rung_after_the_hold():
    state = step(POLICY, State(), Reading(0, pending=20))
    assert alpha(POLICY, state) == 0.8
    seen = []
    for k in range(1, 60):
        state = step(POLICY, state, Reading(k / 10, pending=0))
        seen.append(state.rung)
    assert seen == sorted(seen, reverse=True) and seen[-1] == 0
    assert {a - b for a, b in itertools.pairwise(seen)} == {0, 1}
    first = seen.index(3) + 1
    assert first / 10 >= POLICY.hold_s


def test_a_break_in_the_calm_starts_the_hold_anew():
    state = step(POLICY, State(rung=2), Reading(0.0, pending=0))
    state = step(POLICY, state, Reading(0.4, pending=5))  # too many for a step up, too few for one down
    state = step(POLICY, state, Reading(0.6, pending=0))
    assert state.rung == 2
    assert step(POLICY, state, Reading(1.0, pending=0)).rung == 2
    assert step(POLICY, state, Reading(1.2, pending=0)).rung == 1


def test_an_observed_p95_above_the_promise_prunes_more_at_the_same_queue():
    def run(p95):
        state = State()
        for k in range(12):
            state = step(POLICY, state, Reading(k / 2, pending=4, p95_ms=p95))
        return alpha(POLICY, state)

    assert run(None) == run(500) == 1.0
    assert run(2500) < 1.0


def test_what_arrives_lowers_alpha_only_once_it_waits_and_keeps_it_from_rising():
    def after(rung, rate):
        calm = step(POLICY, State(rung), Reading(0, pending=0, rate=rate))
        return step(POLICY, calm, Reading(POLICY.hold_s, pending=0, rate=rate)).rung

    assert after(0, rate=100) == 0
    assert after(1, rate=3) == 1  # at alpha = 1 that is more than can be served
    assert after(1, rate=2.4) == 0


def test_retry_after_is_the_time_that_is_over():
    at_floor = State(rung=4)
    assert retry_after(POLICY, at_floor, Reading(0, 28)) is None  # 28 x 60 ms
    assert retry_after(POLICY, at_floor, Reading(0, 29)) == 1
    assert retry_after(POLICY, at_floor, Reading(0, 100)) == 5
    assert retry_after(POLICY, at_floor, Reading(0, 100, pace=0.5, beside_ms=10)) == 3
    assert retry_after(Policy(LADDER, 20.0), State(), Reading(0, 1)) is None  # a request alone is always let in
    assert retry_after(policy_named("stock", POLICY), State(), Reading(0, 1e9)) is None


def test_the_policies_to_compare_with():
    rungs = {name: [rung.alpha for rung in policy_named(name, POLICY).rungs] for name in POLICIES}
    assert rungs == {"controller": [1.0, 0.97, 0.94, 0.9, 0.8], "admission": [1.0], "stock": [1.0], "floor": [0.8]}
    assert {name for name in POLICIES if policy_named(name, POLICY).admits} == {"controller", "admission"}
    with pytest.raises(ValueError, match="one of controller, admission"):
        policy_named("best", POLICY)


@pytest.mark.parametrize(
    "rungs, options, message",
    [
        ((), {}, "rungs is empty"),
        ((Rung(1.2, 1),), {}, r"within \(0, 1\]"),
        ((Rung(0.5, 1), Rung(1.0, 2)), {}, "largest first"),
        ((Rung(1.0, 1), Rung(0.5, 2)), {}, "must not cost more"),
        ((Rung(1.0, math.nan),), {}, "milliseconds"),
        (LADDER, {"p95_ms": 0}, "p95_ms must be milliseconds"),
        (LADDER, {"calm_share": 0.8}, "stricter"),
    ],
)
def test_a_policy_that_makes_no_sense_is_refused(rungs, options, message):
    with pytest.raises(ValueError, match=message):
        Policy(rungs, **{"p95_ms": 100, **options})


@given(st.lists(st.floats(0, 1e6), min_size=1))
def test_percentile(values):
    found = percentile(values, 0.95)
    assert sum(v <= found for v in values) >= 0.95 * len(values)
    assert sum(v < found for v in values) < 0.95 * len(values)


@given(
    st.lists(st.tuples(st.floats(0, 0.5), st.floats(1, 3000)), min_size=1, max_size=40),
    st.one_of(st.none(), st.floats(-3, 8)),
)
def test_the_observed_p95_is_of_the_window_and_of_those_that_came_since(answers, since_s):
    watch, now, seen = Watch(2.0), 0.0, []
    for pause, ms in answers:
        now += pause
        watch.answered(now, ms)
        seen.append((now, ms))
        left = [ms for at, ms in seen if at > now - 2.0 and (since_s is None or at - ms / 1000 >= since_s)]
        assert watch.reading(now, 1.0, since_s).p95_ms == percentile(left, 0.95)


@given(st.lists(st.tuples(st.floats(0, 3), st.floats(0.1, 5)), max_size=40))
def test_the_rate_is_that_of_the_window_however_it_is_counted(steps):
    watch, now, arrived = Watch(window_s=4.0), 0.0, []
    for pause, work in steps:
        now += pause
        watch.arrived(now, work)
        arrived.append((now, work))
        expected = sum(w for at, w in arrived if at > now - 4.0) / 4.0
        assert watch.reading(now, 0.0).rate == pytest.approx(expected, abs=1e-9)
    assert watch.reading(now + 5, 0.0).rate == 0


def test_the_window_forgets():
    watch = Watch(window_s=4)
    for second in range(4):
        watch.arrived(second, 2.0)
        watch.answered(second, 100.0 * second)
    full = watch.reading(3.5, 1).full  # work of a usual request, which a silence does not change
    assert 1 < full < 2
    assert watch.reading(3.5, 1) == Reading(3.5, 1, rate=2.0, p95_ms=300.0, full=full)
    assert watch.reading(6.5, 0) == Reading(6.5, 0, rate=0.5, p95_ms=300.0, full=full)
    assert watch.reading(60, 0) == Reading(60, 0, rate=0, p95_ms=None, full=full)


def predicted(controller, alpha):
    (rung,) = [rung for rung in controller.policy.rungs if rung.alpha == alpha]
    return controller.reading(0.0, 1).cost(rung)


def test_what_batches_cost_is_what_they_took_lately():
    controller = Controller(POLICY)
    assert controller.watch.costs == Costs()
    for _ in range(30):
        controller.ran([(1.0, 2.0), (0.9, 1.0)], 1800)  # 2 x 400 + 100 were expected
    costs = controller.watch.costs
    assert 900 * costs.pace + 3 * costs.beside_ms + costs.batch_ms == pytest.approx(1800, rel=0.01)
    controller.ran([(0.5, 1.0)], 1e9)  # no rung: nothing is known of it
    assert controller.watch.costs == costs
    for _ in range(60):
        controller.ran([(1.0, 1.0)], 40)
    assert predicted(controller, 1.0) == pytest.approx(40, rel=0.15)
    assert controller.arrive(0.0, 1.0, 30.0) is None
    assert alpha(POLICY, step(POLICY, State(), Reading(0, pending=20, pace=0.1))) == 1.0


@given(st.floats(0.2, 5), st.floats(0, 1000), st.lists(st.sampled_from(LADDER), min_size=15, max_size=30))
def test_what_each_request_costs_beside_its_rung_is_told_apart(pace, beside_ms, ran):
    """Of batches on several rungs, but for a little of the prior; of one alone, so that lower rungs are promised no
    more than they can keep."""
    controller = Controller(POLICY)
    for rung in ran:
        controller.ran([(rung.alpha, 1.0)], pace * rung.ms + beside_ms)
    if len({rung.alpha for rung in ran[-5:]}) > 2:
        for rung in LADDER:
            assert predicted(controller, rung.alpha) == pytest.approx(pace * rung.ms + beside_ms, rel=0.25, abs=10)
    (last,) = {ran[-1].alpha}
    if len({rung.alpha for rung in ran}) == 1:
        lower = [rung for rung in LADDER if rung.alpha < last]
        assert all(predicted(controller, rung.alpha) >= 0.9 * (min(pace, 1.0) * rung.ms + beside_ms) for rung in lower)
    costs = [predicted(controller, rung.alpha) for rung in LADDER]
    assert costs == sorted(costs, reverse=True) and costs[-1] > 0


@given(st.floats(0.2, 3), st.floats(0, 300), st.lists(st.integers(1, 32), min_size=20, max_size=40))
def test_what_a_batch_costs_whatever_is_in_it_is_told_apart(pace, batch_ms, sizes):
    """Of batches of several sizes, as far as the prior lets it."""
    controller = Controller(replace(POLICY, batch_ms=0.8 * batch_ms), batch=32)
    for k, size in enumerate(sizes):
        rung = LADDER[2 + k % 2]
        controller.ran([(rung.alpha, 1.0)] * size, pace * rung.ms * size + batch_ms)
    costs = controller.watch.costs
    assert all(value >= 0 for value in (costs.pace, costs.beside_ms, costs.batch_ms))
    if len(set(sizes[-10:])) > 5:
        reading = replace(controller.reading(0.0, 1), full=32.0)
        for rung, work in itertools.product(LADDER[2:4], {min(sizes[-10:]), max(sizes[-10:])}):
            assert reading.takes(rung, work) == pytest.approx(pace * rung.ms * work + batch_ms, rel=0.4, abs=20)


@pytest.mark.parametrize("known_ms", [30.0, 60.0])
def test_a_price_of_each_batch_is_not_counted_once_per_request(known_ms):
    """Forty requests of 2 ms and batches that cost 60 ms by themselves: two batches, not 40 times 62 ms; the better,
    the better that is known from the start."""
    policy = Policy((Rung(1.0, 2.0), Rung(0.9, 1.0)), 500.0, batch_ms=known_ms)
    controller, unknown = Controller(policy, batch=32), Controller(replace(policy, batch_ms=0.0))
    for size in (1, 2, 1, 3, 2, 4, 2, 1):
        for each in (controller, unknown):
            each.ran([(1.0, 1.0)] * size, 60 + 2.0 * size)
    said, otherwise = (each.reading(0.0, 40).takes(policy.rungs[0], 40) for each in (controller, unknown))
    assert said < (0.2 if known_ms == 60 else 0.6) * otherwise
    assert known_ms != 60 or said == pytest.approx(60 * 40 / 32 + 80, rel=0.1)
    assert unknown.arrive(0.0, 1.0, 40.0) is not None
    assert known_ms != 60 or controller.arrive(0.0, 1.0, 40.0) is None


@given(amounts, st.floats(0.1, 100), st.floats(0.01, 10), st.floats(0, 1000), st.floats(0, 1000), st.floats(1, 100))
def test_more_work_takes_longer_and_fuller_batches_less(work, more, pace, beside_ms, batch_ms, full):
    reading = Reading(0.0, 1.0, 0.0, None, pace, beside_ms, batch_ms, full)
    rung = LADDER[0]
    assert reading.takes(rung, 0) == 0 <= reading.takes(rung, work) <= reading.takes(rung, work + more)
    assert replace(reading, full=full + more).takes(rung, work) <= reading.takes(rung, work)
    assert reading.takes(rung, full) == pytest.approx(full * reading.cost(rung))


def test_those_who_come_behind_lower_alpha_and_close_no_door():
    ahead, crowded = (Controller(POLICY) for _ in range(2))
    assert ahead.arrive(0.0, 1.0, 3.0) is None and crowded.arrive(0.0, 1.0, 3.0, behind=50.0) is None
    assert crowded.alpha == POLICY.floor < ahead.alpha
    assert crowded.arrive(0.0, 1.0, 53.0) is not None


def test_two_controllers_that_see_the_same_do_the_same():
    events = [(k / 7, (k * 5) % 11) for k in range(200)]
    one, other = Controller(POLICY), Controller(POLICY)
    assert [one.look(*event) for event in events] == [other.look(*event) for event in events]


# ------------------------------------------------------------------------------------------ costs and floors


def calibration(n=200, batch=4):
    """As if timed: half of the time is for what pruning cannot save."""
    config = zsaa.enable(tiny.make("llama")).config
    alphas = (1.0, 0.999, 0.9, 0.7, 0.4)
    key = {"n": n, "batch": batch, "tau": 5, "score": "column_sum", "schedule": "geometric"}
    stock = zsaa.macs(config, n)
    times = [40 * (0.5 + 0.5 * zsaa.macs(config, n, alpha) / stock) for alpha in alphas]
    return Calibration(config, key, [{"alpha": a, "latency_ms": ms} for a, ms in zip(alphas, times)], {})


def test_rungs_from_times_fall_evenly_to_the_floor():
    timed = calibration()
    rungs = costs.ladder_by_time(timed, 0.5, beside_ms=3)
    assert rungs[0].alpha == 1 and rungs[-1].alpha == 0.5 and len(rungs) == costs.RUNGS
    for rung in rungs:
        assert rung.ms == pytest.approx(timed.predict(rung.alpha) / 4 + 3, rel=1e-3)
    ratios = [(b.ms - 3) / (a.ms - 3) for a, b in itertools.pairwise(rungs)]
    assert max(ratios) - min(ratios) < 0.02
    Policy(rungs, 100)


def test_rungs_from_macs_fall_evenly_to_the_floor():
    config = tiny.CONFIGS["llama"]()
    rungs = costs.ladder_by_macs(config, 200, 50.0, 0.5)
    assert rungs[0] == Rung(1.0, 50.0) and rungs[-1].alpha == 0.5 and len(rungs) == costs.RUNGS
    assert rungs[-1].ms == pytest.approx(50 / zsaa.mac_reduction(config, 200, 0.5))
    assert costs.ladder_by_macs(config, 200, 50.0, 1.0) == (Rung(1.0, 50.0),)
    with pytest.raises(ValueError, match=r"in \(0, 1\]"):
        costs.ladder_by_macs(config, 200, 50.0, 0.0)


def test_what_a_batch_costs_by_itself_is_what_one_text_takes_beyond_its_share(monkeypatch):
    monkeypatch.setattr(costs, "prefill_ms", lambda engine, n, batch=1: 25.0 + 2.0 * batch)
    gpu, cpu = (SimpleNamespace(device=torch.device(name)) for name in ("cuda", "cpu"))
    assert costs.batch_ms(gpu, 256, 32) == pytest.approx(25.0)
    assert costs.batch_ms(gpu, 256, 1) == costs.batch_ms(cpu, 256, 32) == 0


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_a_gpu_is_warm_at_every_rung_before_the_first_request(monkeypatch, kind):
    ran = []
    monkeypatch.setattr(costs, "_prefill", lambda engine, lengths, alpha: ran.append((lengths, alpha)))
    engine = SimpleNamespace(device=torch.device(kind), max_tokens=64)
    costs.warm(engine, LADDER, batch=6)
    assert [(len(lengths), alpha) for lengths, alpha in ran[::2]] == [
        (size, rung.alpha) for rung in LADDER for size in (1, 2, 4, 6)
    ] * (kind == "cuda")
    for (whole, alpha), (ragged, same) in zip(ran[::2], ran[1::2]):
        assert alpha == same and set(whole) == {63} and len(ragged) == len(whole)
        assert len(set(ragged)) == min(2, len(ragged)) and 0 < min(ragged) <= max(ragged) < 63


def test_the_floor_is_read_off_a_committed_curve():
    result = json.loads((RESULTS / "accuracy/imdb-lora-salience.json").read_text())
    curve = costs.curve_of(result)
    assert costs.floor_of(result, 100) == curve[-1][0]
    for loss in (0, 0.5, 1.0, 2.0):
        floor = costs.floor_of(result, loss)
        assert all(curve[0][1] - value <= loss for alpha, value in curve if alpha >= floor)
        below = [value for alpha, value in curve if alpha < floor]
        assert curve[0][1] - below[0] > loss


def test_behind_a_dip_nothing_is_allowed():
    rows = [{"control": "alpha", "alpha": a, "accuracy": v} for a, v in ((1.0, 90), (0.9, 80), (0.8, 90))]
    assert costs.floor_of({"rows": rows}, 1.0) == 1.0
    with pytest.raises(ValueError, match="no accuracy curve"):
        costs.floor_of({"rows": [{"control": "first", "alpha": None, "accuracy": 3}]}, 1.0)
    with pytest.raises(ValueError, match="loss must be"):
        costs.floor_of({"rows": rows}, -1)
