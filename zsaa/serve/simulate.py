"""A server played without a model: the very controller of the real one, its queue, its batches and its replicas, in a
discrete-event simulation. A thousand replicas cost seconds.

    python -m zsaa.serve.simulate --replicas 1000 --rate 2000 --ms 400 --floor-ms 100
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import json
import math
import random
from bisect import bisect
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from zsaa.serve.controller import POLICIES, Controller, Policy, Rung, policy_named
from zsaa.serve.traces import Outcome, bursts, day, poisson, recovery_s, steady, summary, turns

Service = Callable[[float, list[float]], float]  # alpha and the requests' work -> seconds that the batch takes


@dataclass
class Replica:
    controller: Controller
    waiting: deque = field(default_factory=deque)  # (index, arrived, work)
    pending: float = 0.0
    running: int = 0  # requests in a batch


@dataclass(frozen=True)
class Run:
    """outcomes: one per arrival, in their order. seen: (second, alpha, pending) of the first replica, at every tick."""

    outcomes: list[Outcome]
    seen: list[tuple[float, float, float]]


def served_as_calibrated(policy: Policy, per_batch_ms: float = 0.0) -> Service:
    """Batches that take what the cost model says, and so much on top."""
    ms = {rung.alpha: rung.ms for rung in policy.rungs}
    return lambda alpha, works: (per_batch_ms + ms[alpha] * sum(works)) / 1000


def simulate(
    arrivals: Sequence[float],
    policy: Policy,
    service: Service | None = None,
    works: Sequence[float] | None = None,
    replicas: int = 1,
    batch: int = 8,
    tick_s: float = 0.25,
    seed: int = 0,
    padded: float = math.inf,
    most: float = math.inf,
    door_s: float = 0.0,
) -> Run:
    """Play requests that arrive at these seconds, each of 1 reference request or of `works`.

    A request goes to the emptier of two replicas drawn by lot (as Ray Serve does), which lets it in or not; a replica
    that is free takes up to `batch` of those that wait, at the alpha of that moment. Every controller looks at every
    tick, too. padded: columns of a batch over its tokens at most (`lane.PADDED` of a classifier). most: requests in
    one house at a time, as the server's --max-jobs. door_s: what each arrival takes of the process in which
    the model runs, let in or not: its text is cut into tokens and its answer written; a batch takes so much longer.
    """
    works = [1.0] * len(arrivals) if works is None else works
    service = served_as_calibrated(policy) if service is None else service
    draw, order = random.Random(seed), itertools.count()
    houses = [Replica(Controller(policy, batch=batch)) for _ in range(replicas)]
    outcomes: list[Outcome | None] = [None] * len(arrivals)
    seen: list[tuple[float, float, float]] = []
    ends = max(arrivals, default=0.0) + 15
    events: list = [(at, next(order), "arrival", index) for index, at in enumerate(arrivals)]
    events += [(k * tick_s, next(order), "tick", None) for k in range(int(ends / tick_s))]
    heapq.heapify(events)

    def next_batch(house: Replica, now: float) -> list:
        taken, longest, total, room = [], 0.0, 0.0, house.controller.batch_work(now)
        while house.waiting and len(taken) < batch:
            longest, total = max(longest, house.waiting[0][2]), total + house.waiting[0][2]
            if taken and (total > room or longest * (len(taken) + 1) > padded * total):
                break
            taken.append(house.waiting.popleft())
        return taken

    def disturbed(now: float, alone_s: float) -> float:
        first, took_s, before = bisect(arrivals, now), alone_s, 0.0
        while door_s and took_s > before:
            came = bisect(arrivals, now + took_s) - first
            before, took_s = took_s, alone_s + door_s * came / replicas
        return took_s

    def start(house: Replica, now: float) -> None:
        house.running = 0
        if house.waiting:
            alpha = house.controller.look(now, house.pending)
            taken = next_batch(house, now)
            house.running = len(taken)
            took_s = disturbed(now, service(alpha, [work for *_, work in taken]))
            heapq.heappush(events, (now + took_s, next(order), "done", (house, taken, alpha, took_s)))

    def arrive(index: int, now: float) -> None:
        house = min(draw.sample(houses, 2), key=lambda h: h.pending) if replicas > 1 else houses[0]
        work = works[index]
        full = len(house.waiting) + house.running >= most
        if house.controller.arrive(now, work, house.pending + work) is not None or full:
            outcomes[index] = Outcome(now, None, refused=True)
            return
        house.pending += work
        house.waiting.append((index, now, work))
        if not house.running:
            start(house, now)

    def done(house: Replica, taken: list, alpha: float, took_s: float, now: float) -> None:
        house.controller.ran([(alpha, work) for *_, work in taken], 1000 * took_s)
        for index, arrived, work in taken:
            house.pending = max(0.0, house.pending - work)
            latency_ms = 1000 * (now - arrived)
            house.controller.watch.answered(now, latency_ms)
            outcomes[index] = Outcome(arrived, latency_ms, alpha)
        start(house, now)

    while events:
        now, _, kind, what = heapq.heappop(events)
        if kind == "arrival":
            arrive(what, now)
        elif kind == "done":
            done(*what, now)
        else:
            for house in houses:
                house.controller.look(now, house.pending)
            seen.append((now, houses[0].controller.alpha, houses[0].pending))
    return Run(outcomes, seen)


def describe(run: Run, policy: Policy, profile) -> dict:
    """`summary` of a run, how often alpha turned, and how long after the last burst it was back at 1."""
    seen = [(at, alpha) for at, alpha, _ in run.seen]
    return {
        **summary(run.outcomes, policy.p95_ms, profile.seconds),
        "turns": turns([alpha for _, alpha in seen]),
        "recovery_s": recovery_s(seen, profile.bursts[-1][1]) if profile.bursts else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m zsaa.serve.simulate", description=__doc__.split("\n\n")[0])
    parser.add_argument("--replicas", type=int, default=1)
    parser.add_argument("--rate", type=float, default=1.6, help="requests a second, all replicas together")
    parser.add_argument("--ms", type=float, default=400, help="what a request costs at alpha = 1")
    parser.add_argument("--floor-ms", type=float, default=100, help="and at the floor")
    parser.add_argument("--p95-ms", type=float, default=2000)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    steps = 6
    ratio = (chosen.floor_ms / chosen.ms) ** (1 / (steps - 1))
    # The simulator knows costs, not what an alpha keeps: its rungs are numbered, and only 1 means what it says.
    rungs = tuple(Rung(1 - k / 100, chosen.ms * ratio**k) for k in range(steps if ratio < 1 else 1))
    for profile in (steady(chosen.seconds), bursts(2, chosen.seconds), bursts(5, chosen.seconds), day(chosen.seconds)):
        arrivals = poisson(profile, chosen.rate, chosen.seed)
        for name in POLICIES:
            policy = policy_named(name, Policy(rungs, chosen.p95_ms))
            run = simulate(arrivals, policy, replicas=chosen.replicas, seed=chosen.seed)
            found = describe(run, policy, profile)
            del found["mean_alpha"], found["graded"], found["correct"]
            print(json.dumps({"profile": profile.name, "policy": name, **found}))


if __name__ == "__main__":
    main()
