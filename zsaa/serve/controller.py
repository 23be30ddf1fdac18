"""Which alpha the next batch gets, and who is turned away: plain arithmetic, the same in the server and in the
simulator.

A ladder of settings goes from alpha = 1 down to the floor, each with what a request costs there. At every batch the
controller takes the highest rung at which what is in the house would be done within its share of the promised p95, and
at which what arrives is no more than can be served. Down it goes at once, however far; up one rung at a time, and only
after the stricter threshold of a calm spell has held for a while: so it does not swing. The scale of the
cost model follows what batches really take; and if the observed p95 is above the promise although the model says that
all is well, it is trusted less, until it is well again.

Time comes with each reading; nothing here looks at a clock, draws a number or keeps a secret: the same readings give
the same alphas.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace

LEAST_TRUST = 1 / 4
LATE, WELL = 1.0, 0.8  # times the promise: above the first trust falls, below the second it returns
FALLS, RETURNS = 0.7, 2.0  # what trust is multiplied by in a second of either


@dataclass(frozen=True)
class Rung:
    """One setting. alpha: share of tokens that each layer keeps. ms: milliseconds that a request of reference length
    costs there, as one of a full batch."""

    alpha: float
    ms: float


@dataclass(frozen=True)
class Policy:
    """What was promised, and what may be done about it.

    rungs: from the highest alpha (1, unless it is fixed below) down to the floor; none costs more than the one before
    it. p95_ms: the promise, from arrival to the last byte. admits: may a request be turned away (429)?
    share: of the promise, that what is in the house may take. busy, calm: utilization above which the controller goes
    down, and below which it may go up. hold_s: seconds of calm before each step up.
    """

    rungs: tuple[Rung, ...]
    p95_ms: float
    admits: bool = True
    share: float = 0.7
    calm_share: float = 0.35
    busy: float = 1.0
    calm: float = 0.85
    hold_s: float = 0.5

    def __post_init__(self):
        if not self.rungs:
            raise ValueError("rungs is empty: give one setting at least, Rung(1.0, ms).")
        for name, value in (("p95_ms", self.p95_ms), *(("ms", rung.ms) for rung in self.rungs)):
            if not 0 < value < math.inf:
                raise ValueError(f"{name} must be milliseconds in (0, inf), got {value}.")
        alphas, costs = [rung.alpha for rung in self.rungs], [rung.ms for rung in self.rungs]
        if not all(0 < alpha <= 1 for alpha in alphas) or sorted(set(alphas), reverse=True) != alphas:
            raise ValueError(
                f"the alphas of the rungs must fall within (0, 1], got {alphas}. Sort them, largest first."
            )
        if sorted(costs, reverse=True) != costs:
            raise ValueError(f"a lower alpha must not cost more, got {costs} ms for the alphas {alphas}.")
        if not (0 < self.calm_share <= self.share and 0 < self.calm <= self.busy):
            raise ValueError(
                f"going up must be stricter than going down: calm_share {self.calm_share} at most share {self.share}, "
                f"and calm {self.calm} at most busy {self.busy}, all above 0."
            )

    @property
    def floor(self) -> float:
        return self.rungs[-1].alpha


@dataclass(frozen=True)
class Reading:
    """What is seen at one moment. now_s: seconds of any clock that runs forward. pending: requests in the house,
    waiting and running, in requests of reference length (one of twice its length counts 2). rate: such requests that
    arrive in a second. p95_ms: of the answers given lately, None if there were none. pace: what batches took lately,
    over what the cost model says; 2 on a machine that is half as fast as when it was timed."""

    now_s: float
    pending: float
    rate: float = 0.0
    p95_ms: float | None = None
    pace: float = 1.0


@dataclass(frozen=True)
class State:
    """What the controller remembers. rung: index into the policy's rungs. calm_since: when the calm spell began that
    has lasted until now, None if there is none. trust: in the cost model, (0, 1]. seen_s: time of the last reading."""

    rung: int = 0
    calm_since: float | None = None
    trust: float = 1.0
    seen_s: float | None = None


def step(policy: Policy, state: State, reading: Reading) -> State:
    """The state after one reading; `policy.rungs[state.rung].alpha` is the alpha of a batch that starts now."""
    trust = _trust(policy, state, reading)
    here = min(state.rung, len(policy.rungs) - 1)
    needed = _rung(policy, reading, policy.share * trust, policy.busy)
    if needed > here:
        return State(needed, None, trust, reading.now_s)
    if _rung(policy, reading, policy.calm_share * trust, policy.calm) >= here:
        return State(here, None, trust, reading.now_s)
    since = reading.now_s if state.calm_since is None else min(state.calm_since, reading.now_s)
    if reading.now_s - since < policy.hold_s:
        return State(here, since, trust, reading.now_s)
    return State(here - 1, reading.now_s, trust, reading.now_s)


def _rung(policy: Policy, reading: Reading, share: float, utilization: float) -> int:
    """The first rung at which the others in the house take at most `share` of the promise, and at which arrivals keep
    the server at most so busy; else the last. A request alone never waits for anybody, and is never pruned."""
    others = max(0.0, reading.pending - 1)
    for index, rung in enumerate(policy.rungs):
        ms = rung.ms * reading.pace
        if others * ms <= share * policy.p95_ms and reading.rate * ms <= 1000 * utilization:
            return index
    return len(policy.rungs) - 1


def _trust(policy: Policy, state: State, reading: Reading) -> float:
    passed = 0.0 if state.seen_s is None else min(1.0, max(0.0, reading.now_s - state.seen_s))
    if reading.p95_ms is not None and reading.p95_ms > LATE * policy.p95_ms:
        return max(LEAST_TRUST, state.trust * FALLS**passed)
    if reading.p95_ms is None or reading.p95_ms < WELL * policy.p95_ms:
        return min(1.0, state.trust * RETURNS**passed)
    return state.trust


def retry_after(policy: Policy, state: State, pending: float, pace: float = 1.0) -> int | None:
    """None if a request may come in as the last of `pending` (itself included); else whole seconds after which it may
    try
    again: when even at the floor the house could not do them all within the promise, as far as the cost model is
    trusted."""
    over = pending * policy.rungs[-1].ms * pace - state.trust * policy.p95_ms
    if not policy.admits or over <= 0 or pending <= 1:
        return None
    return max(1, math.ceil(over / 1000))


class Watch:
    """What happened in the last `window_s` seconds, of which readings are made; and the pace, of the last ten batches
    or so, which a silence does not change."""

    def __init__(self, window_s: float = 4.0):
        self.window_s = window_s
        self._arrivals: deque[tuple[float, float]] = deque()
        self._answers: deque[tuple[float, float]] = deque()
        self._took = self._expected = 0.0

    def arrived(self, now_s: float, work: float) -> None:
        """A request of `work` reference requests arrived, whether or not it was let in."""
        self._arrivals.append((now_s, work))

    def answered(self, now_s: float, latency_ms: float) -> None:
        self._answers.append((now_s, latency_ms))

    def ran(self, expected_ms: float, took_ms: float) -> None:
        """A batch ended. The first one counts half: the other half is for the cost model."""
        keep = 0.8 if self._expected else 1.0
        self._took = keep * (self._took or expected_ms) + took_ms
        self._expected = keep * (self._expected or expected_ms) + expected_ms

    @property
    def pace(self) -> float:
        return self._took / self._expected if self._expected and self._took else 1.0

    def reading(self, now_s: float, pending: float) -> Reading:
        for events in (self._arrivals, self._answers):
            while events and events[0][0] <= now_s - self.window_s:
                events.popleft()
        rate = sum(work for _, work in self._arrivals) / self.window_s
        return Reading(now_s, pending, rate, percentile([ms for _, ms in self._answers], 0.95), self.pace)


def percentile(values: Sequence[float], share: float) -> float | None:
    """The smallest of `values` that at least this share of them does not exceed; None of none."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)] if values else None


class Controller:
    """A policy, its state and its window together: what one queue of one server has."""

    def __init__(self, policy: Policy, window_s: float = 4.0):
        self.policy, self.state, self.watch = policy, State(), Watch(window_s)

    @property
    def alpha(self) -> float:
        return self.policy.rungs[self.state.rung].alpha

    def look(self, now_s: float, pending: float) -> float:
        """Take a reading; the alpha that follows from it."""
        self.state = step(self.policy, self.state, self.watch.reading(now_s, pending))
        return self.alpha

    def arrive(self, now_s: float, work: float, pending: float) -> int | None:
        """A request of `work` arrives, of `pending` with it: None if it may come in, else the seconds to wait."""
        self.watch.arrived(now_s, work)
        self.look(now_s, pending)
        return retry_after(self.policy, self.state, pending, self.watch.pace)

    def ran(self, works: Sequence[tuple[float, float]], took_ms: float) -> None:
        """A batch of requests (alpha, work) took so long. One with an alpha that is no rung teaches nothing."""
        costs = {rung.alpha: rung.ms for rung in self.policy.rungs}
        if all(alpha in costs for alpha, _ in works):
            self.watch.ran(sum(costs[alpha] * work for alpha, work in works), took_ms)


POLICIES = ("controller", "admission", "stock", "floor")


def policy_named(name: str, controlled: Policy) -> Policy:
    """A policy to compare with: "controller" (as given), "admission" (alpha = 1, and 429 where that is too slow),
    "stock" (alpha = 1, everybody waits), "floor" (the floor always, everybody waits)."""
    if name not in POLICIES:
        raise ValueError(f"policy is {name!r}; it must be one of {', '.join(POLICIES)}.")
    rungs = (
        controlled.rungs if name == "controller" else controlled.rungs[-1:] if name == "floor" else controlled.rungs[:1]
    )
    return replace(controlled, rungs=rungs, admits=name in ("controller", "admission"))
