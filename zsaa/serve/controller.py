"""Which alpha the next batch gets, and who is turned away: plain arithmetic, the same in the server and in the
simulator.

A ladder of settings goes from alpha = 1 down to the floor, each with what a request costs there. At every batch the
controller takes the highest rung at which what is in the house would be done within its share of the promised p95. Down
it goes at once, however far; up one rung at a time, only to where all that arrives could be served, and only after the
stricter threshold of a calm spell has held for a while: so it does not swing. The cost model follows what
batches really take: its scale, and what no alpha makes less, of each request and of each batch, whatever is in it. If
the observed p95 is above the promise although the model says that all is well, it is trusted less, until it is well
again.

Time comes with each reading; nothing here looks at a clock, draws a number or keeps a secret: the same readings give
the same alphas.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product

LEAST_TRUST = 1 / 4
LEAST_PACE = 1 / 100
LATE, WELL = 1.0, 0.8  # times the promise: above the first trust falls, below the second it returns
FALLS, RETURNS = 0.7, 2.0  # what trust is multiplied by when late, and in a second when well
# Of `Watch.costs`: weights of the calibrated pace, of no costs beside it, and of a batch's calibrated price. With less
# of the last, what scatters on a CPU is taken for a price of batches.
PRIORS = (0.1, 0.01, 10.0)
FORGETS = 0.85  # how much of its batches' weight is left at the next one
USUAL = 0.95  # likewise, of the work of a request
STALL = 4.0  # times what it was to take: a batch that took longer was held up by something else, and teaches this much


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
    share: of the promise, that what is in the house may take. fills: of the promise, up to which requests are let in;
    the rest is for what nobody foresees. batch_share: of the promise, that a batch may take: who comes in waits for the
    one that runs, and then for all of its own, also for those that came to it later. calm_share: as `share`, of a calm
    spell. calm: utilization of a rung above which the controller does not go up to it; what arrives does not lower
    alpha before it waits, since a rate that is counted in seconds is mostly chance. hold_s: seconds of calm before each
    step up. batch_ms: what a batch is known to cost, whatever is in it.
    """

    rungs: tuple[Rung, ...]
    p95_ms: float
    admits: bool = True
    share: float = 0.7
    fills: float = 0.85
    batch_share: float = 0.25
    calm_share: float = 0.2
    calm: float = 1.0
    hold_s: float = 0.5
    batch_ms: float = 0.0

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
        if not 0 < self.batch_share <= 1:
            raise ValueError(f"batch_share must be a share of the promise in (0, 1], got {self.batch_share}.")
        if not (0 < self.calm_share <= self.share and self.calm > 0):
            raise ValueError(
                f"going up must be stricter than going down: calm_share {self.calm_share} at most share {self.share}, "
                f"and calm {self.calm}, all above 0."
            )

    @property
    def floor(self) -> float:
        return self.rungs[-1].alpha


@dataclass(frozen=True)
class Reading:
    """What is seen at one moment. now_s: seconds of any clock that runs forward. pending: requests in the house,
    waiting and running, in requests of reference length (one of twice its length counts 2). rate: such requests that
    arrive in a second. p95_ms: of the answers given lately, None if there were none. pace: what batches took lately,
    over what the cost model says; 2 on a machine that is half as fast as when it was timed. beside_ms: what a request
    took beside that, whatever its alpha. batch_ms: what a batch took beside that, whatever is in it. full: reference
    requests in a full batch."""

    now_s: float
    pending: float
    rate: float = 0.0
    p95_ms: float | None = None
    pace: float = 1.0
    beside_ms: float = 0.0
    batch_ms: float = 0.0
    full: float = 1.0

    def cost(self, rung: Rung) -> float:
        """Milliseconds of a reference request on this rung, as one of a full batch, as batches took lately."""
        return rung.ms * self.pace + self.beside_ms + self.batch_ms / self.full

    def takes(self, rung: Rung, work: float) -> float:
        """Milliseconds of so many reference requests, in batches as full as can be: one at least, if there is any."""
        batches = max(1.0, work / self.full) if work > 0 else 0.0
        return work * (rung.ms * self.pace + self.beside_ms) + batches * self.batch_ms


@dataclass(frozen=True)
class State:
    """What the controller remembers. rung: index into the policy's rungs. calm_since: when the calm spell began that
    has lasted until now, None if there is none. trust: in the cost model, (0, 1]. seen_s: time of the last reading.
    lowered_s: when trust was lowered last, None if it never was."""

    rung: int = 0
    calm_since: float | None = None
    trust: float = 1.0
    seen_s: float | None = None
    lowered_s: float | None = None


def step(policy: Policy, state: State, reading: Reading) -> State:
    """The state after one reading; `policy.rungs[state.rung].alpha` is the alpha of a batch that starts now."""
    trust, lowered_s = _trust(policy, state, reading)
    here = min(state.rung, len(policy.rungs) - 1)
    needed = _rung(policy, reading, policy.share * trust)
    if needed > here:
        return State(needed, None, trust, reading.now_s, lowered_s)
    if _rung(policy, reading, policy.calm_share * trust, policy.calm) >= here:
        return State(here, None, trust, reading.now_s, lowered_s)
    since = reading.now_s if state.calm_since is None else min(state.calm_since, reading.now_s)
    if reading.now_s - since < policy.hold_s:
        return State(here, since, trust, reading.now_s, lowered_s)
    return State(here - 1, reading.now_s, trust, reading.now_s, lowered_s)


def _rung(policy: Policy, reading: Reading, share: float, utilization: float = math.inf) -> int:
    """The first rung at which the others in the house take at most `share` of the promise, and at which arrivals keep
    the server at most so busy; else the last. A request alone never waits for anybody, and is never pruned."""
    others = max(0.0, reading.pending - 1)
    for index, rung in enumerate(policy.rungs):
        in_time = reading.takes(rung, others) <= share * policy.p95_ms
        if in_time and reading.rate * reading.cost(rung) <= 1000 * utilization:
            return index
    return len(policy.rungs) - 1


def _trust(policy: Policy, state: State, reading: Reading) -> tuple[float, float | None]:
    """Trust, and when it was lowered last. What was changed shows only in answers that are a promise's time away: until
    then it does not return."""
    passed = 0.0 if state.seen_s is None else min(1.0, max(0.0, reading.now_s - state.seen_s))
    if reading.p95_ms is not None and reading.p95_ms > LATE * policy.p95_ms:
        return max(LEAST_TRUST, state.trust * FALLS), reading.now_s
    waits = state.lowered_s is not None and 0 <= reading.now_s - state.lowered_s < policy.p95_ms / 1000
    if not waits and (reading.p95_ms is None or reading.p95_ms < WELL * policy.p95_ms):
        return min(1.0, state.trust * RETURNS**passed), state.lowered_s
    return state.trust, state.lowered_s


def retry_after(policy: Policy, state: State, reading: Reading, work: float = 1.0) -> int | None:
    """None if a request of `work` may come in as the last of `reading.pending` (itself included); else whole seconds
    after which it may try again: when even at the floor the house could not do them all within the promise, as far as
    the cost model is trusted. Nobody who finds the house empty is turned away."""
    over = reading.takes(policy.rungs[-1], reading.pending) - policy.fills * state.trust * policy.p95_ms
    if not policy.admits or over <= 0 or reading.pending <= max(1.0, work):
        return None
    return max(1, math.ceil(over / 1000))


def batch_work(policy: Policy, rung: int, reading: Reading) -> float:
    """Reference requests in a batch on this rung, at most, so that it takes `batch_share` of the promise. More than
    that is a request that is longer, and runs alone."""
    each = policy.rungs[rung].ms * reading.pace + reading.beside_ms
    return max(0.0, policy.batch_share * policy.p95_ms - reading.batch_ms) / each


@dataclass(frozen=True)
class Costs:
    """Of batches, lately: see `Reading`."""

    pace: float = 1.0
    beside_ms: float = 0.0
    batch_ms: float = 0.0


class Watch:
    """What happened in the last `window_s` seconds, of which readings are made; and what batches cost, of the last ten
    or so, which a silence does not change. batch: requests that run at once, at most. batch_ms: see `Policy`."""

    def __init__(self, window_s: float = 4.0, batch: int = 1, batch_ms: float = 0.0):
        self.window_s, self.batch, self.batch_ms = window_s, batch, batch_ms
        self._arrivals: deque[tuple[float, float]] = deque()
        self._arrived = 0.0  # the work of these
        self._answers: deque[tuple[float, float]] = deque()
        self._times: list[float] = []  # milliseconds of these, sorted: every arrival asks for their p95
        self._squares = [[0.0] * 3 for _ in range(3)]  # of batches: sums of products of what `ran` knows of each,
        self._products = [0.0] * 3  # and with what it took
        self._usual = 1.0  # work of a request
        self.costs = Costs(batch_ms=batch_ms)

    def arrived(self, now_s: float, work: float) -> None:
        """A request of `work` reference requests arrived, whether or not it was let in."""
        self._arrivals.append((now_s, work))
        self._arrived += work
        self._usual += (1 - USUAL) * (work - self._usual)

    def answered(self, now_s: float, latency_ms: float) -> None:
        self._answers.append((now_s, latency_ms))
        insort(self._times, latency_ms)

    def ran(self, expected_ms: float, took_ms: float, work: float = 1.0) -> None:
        """A batch of `work` reference requests ended. All is counted for each expected millisecond."""
        now = self.costs
        took_ms = min(took_ms, STALL * (now.pace * expected_ms + now.beside_ms * work + now.batch_ms))
        known, took = (1.0, work / expected_ms, 1 / expected_ms), took_ms / expected_ms
        for i, a in enumerate(known):
            self._products[i] = FORGETS * self._products[i] + a * took
            for j, b in enumerate(known):
                self._squares[i][j] = FORGETS * self._squares[i][j] + a * b
        self.costs = self._fitted()

    def _fitted(self) -> Costs:
        """A batch takes pace times what the model expects, beside_ms for each request and batch_ms for itself: the
        least squares of which none is below its least. Batches that are all alike do not tell these apart; then what
        they take too long counts first as `beside`, since to promise too little of a lower alpha, and of a fuller
        batch, is the safer error."""
        n, least = self._squares[0][0], (LEAST_PACE, 0.0, 0.0)
        scales = [(self._squares[0][i] / n) ** 2 for i in range(3)]  # so that a prior weighs the same in any unit
        squares = [[x + (i == j) * PRIORS[i] * scales[i] for j, x in enumerate(r)] for i, r in enumerate(self._squares)]
        expected = (1.0, 0.0, self.batch_ms)
        products = [x + p * scale * e for x, p, scale, e in zip(self._products, PRIORS, scales, expected)]

        def error(found: tuple[float, ...]) -> float:
            pulled = [sum(a * x for a, x in zip(row, found)) for row in squares]
            return sum(x * (p - 2 * y) for x, p, y in zip(found, pulled, products))

        tried = (_solved(squares, products, least, free) for free in product((True, False), repeat=3))
        return Costs(*min((found for found in tried if all(x >= low for x, low in zip(found, least))), key=error))

    def costing(self, now_s: float, pending: float) -> Reading:
        """A reading without what was observed: enough for `retry_after`, which need not sort the answers."""
        full = max(1.0, self.batch * self._usual)
        return Reading(now_s, pending, 0.0, None, self.costs.pace, self.costs.beside_ms, self.costs.batch_ms, full)

    def reading(self, now_s: float, pending: float, since_s: float | None = None) -> Reading:
        """The p95 is of the requests that arrived after `since_s`."""
        begin = now_s - self.window_s
        while self._arrivals and self._arrivals[0][0] <= begin:
            self._arrived -= self._arrivals.popleft()[1]
        while self._answers and self._answers[0][0] <= begin:
            self._times.pop(bisect_left(self._times, self._answers.popleft()[1]))
        if not self._arrivals:
            self._arrived = 0.0  # nothing of the rounding stays
        rate = max(0.0, self._arrived) / self.window_s
        times = self._times
        if since_s is not None and times and since_s > begin - times[-1] / 1000:
            times = sorted(ms for at, ms in self._answers if at - ms / 1000 >= since_s)
        return replace(self.costing(now_s, pending), rate=rate, p95_ms=_of_sorted(times, 0.95))


def _solved(
    squares: list[list[float]], products: list[float], least: Sequence[float], free: Sequence[bool]
) -> tuple[float, ...]:
    """The x at which x @ squares @ x - 2 x @ products is least, where those that are not `free` are at their least.
    squares: symmetric, positive definite. By Gauss and Jordan."""
    rows = [
        [*(x if free[i] and free[j] else float(i == j) for j, x in enumerate(row))]
        + [products[i] - sum(x * least[j] for j, x in enumerate(row) if not free[j]) if free[i] else least[i]]
        for i, row in enumerate(squares)
    ]
    for i, pivot in enumerate(rows):
        pivot[:] = [x / pivot[i] for x in pivot]
        for row in rows[:i] + rows[i + 1 :]:
            row[:] = [x - row[i] * y for x, y in zip(row, pivot)]
    return tuple(row[-1] for row in rows)


def percentile(values: Sequence[float], share: float) -> float | None:
    """The smallest of `values` that at least this share of them does not exceed; None of none."""
    return _of_sorted(sorted(values), share)


def _of_sorted(values: Sequence[float], share: float) -> float | None:
    return values[max(0, math.ceil(share * len(values)) - 1)] if values else None


class Controller:
    """A policy, its state and its window together: what one queue of one server has. batch: requests that run at once,
    at most."""

    def __init__(self, policy: Policy, window_s: float = 4.0, batch: int = 1):
        self.policy, self.state, self.watch = policy, State(), Watch(window_s, batch, policy.batch_ms)

    @property
    def alpha(self) -> float:
        return self.policy.rungs[self.state.rung].alpha

    def look(self, now_s: float, pending: float) -> float:
        """Take a reading; the alpha that follows from it."""
        self.state = step(self.policy, self.state, self.reading(now_s, pending))
        return self.alpha

    def reading(self, now_s: float, pending: float) -> Reading:
        return self.watch.reading(now_s, pending, self.state.lowered_s)

    def arrive(self, now_s: float, work: float, pending: float, behind: float = 0.0) -> int | None:
        """A request of `work` arrives, of `pending` with it: None if it may come in, else the seconds to wait. behind:
        work that comes after it, for which it need not wait."""
        self.watch.arrived(now_s, work)
        self.look(now_s, pending + behind)
        return retry_after(self.policy, self.state, self.watch.costing(now_s, pending), work)

    def batch_work(self, now_s: float) -> float:
        """Reference requests in the next batch, at most; see `batch_work`."""
        return batch_work(self.policy, self.state.rung, self.watch.costing(now_s, 0.0))

    def ran(self, works: Sequence[tuple[float, float]], took_ms: float) -> None:
        """A batch of requests (alpha, work) took so long. One with an alpha that is no rung teaches nothing."""
        costs = {rung.alpha: rung.ms for rung in self.policy.rungs}
        if all(alpha in costs for alpha, _ in works):
            total = sum(work for _, work in works)
            self.watch.ran(sum(costs[alpha] * work for alpha, work in works), took_ms, total)


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
