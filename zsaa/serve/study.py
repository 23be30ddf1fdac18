"""The controller against its rivals by simulation, many rushes each, with costs that a measured run gives:

    python -m zsaa.serve.study --output outputs/serve

A request on a busy machine costs what its rung says, times a pace, and something beside it that no alpha makes less.
Both are fitted to how long alpha = 1 and the floor, which decide nothing, took in the largest measured rush, or other
policies that are named. The rest of the measured rows is predicted, and stands beside what was measured.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import random
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean

from zsaa.kit.store import RESULTS
from zsaa.measure import output_folder, provenance, stats, write_json
from zsaa.serve.controller import POLICIES, Policy, Rung, policy_named
from zsaa.serve.furnish import Settings, engines
from zsaa.serve.lane import PADDED
from zsaa.serve.load import DRAIN_S, samples_of
from zsaa.serve.simulate import Run, Service, describe, simulate
from zsaa.serve.traces import Profile, bursts, day, poisson

SHOWN = ("requests", "answered", "refused", "late", "lost", "violations", "goodput", "p50_ms", "p95_ms")
ALPHA = ("mean_alpha", "below_one", "turns", "recovery_s")
FLEET_S = 30.0  # seconds of a rush that many replicas play, at most
FIT_ON = ("stock", "floor")  # they decide nothing
PACES, BESIDES_MS = [k / 20 for k in range(5, 41)], [10.0 * k for k in range(41)]


@dataclass(frozen=True)
class Costs:
    """pace: times what the rung says. beside_ms: for each request. scatter: standard deviation of the logarithm of what
    one takes, over what it takes on average. batch_ms: for each batch, whatever is in it. door_ms: for each arrival,
    see `simulate`."""

    pace: float
    beside_ms: float
    scatter: float = 0.0
    batch_ms: float = 0.0
    door_ms: float = 0.0

    def service(self, rungs: Sequence[Rung], seed: int = 0) -> Service:
        ms, draw = {rung.alpha: rung.ms for rung in rungs}, random.Random(seed)

        def took_s(alpha: float, works: list[float]) -> float:
            each = [ms[alpha] * self.pace * work + self.beside_ms for work in works] + [self.batch_ms]
            return sum(t * math.exp(draw.gauss(-(self.scatter**2) / 2, self.scatter)) for t in each) / 1000

        return took_s


@dataclass(frozen=True)
class World:
    """What a rush is played with. lengths: tokens of the requests, in turn. batch: requests that run at once, at
    most. most: in the house. known_ms: what the server is told at its start that a batch costs by itself. replicas: of
    the server; `rate` is of each."""

    rungs: tuple[Rung, ...]
    p95_ms: float
    rate: float
    reference: int
    lengths: tuple[int, ...]
    batch: int
    most: int = 256
    known_ms: float = 0.0
    replicas: int = 1

    def play(self, name: str, profile: Profile, costs: Costs, arrivals: int, first: int = 0, seed: int = 0) -> dict:
        """One rush by this policy. arrivals: seed of the moments; first: sample that the first request asks of."""
        at = poisson(profile, self.rate * self.replicas, arrivals)
        works = [self.lengths[(first + k) % len(self.lengths)] / self.reference for k in range(len(at))]
        policy = policy_named(name, Policy(self.rungs, self.p95_ms, batch_ms=self.known_ms))
        options = {"batch": self.batch, "seed": seed, "padded": PADDED, "most": self.most}
        options |= {"door_s": costs.door_ms / 1000, "replicas": self.replicas}
        run = simulate(at, policy, costs.service(self.rungs, seed), works, **options)
        found = describe(_ended(run, profile), policy, profile)
        return {key: found[key] for key in (*SHOWN, *ALPHA)}


def _ended(run: Run, profile: Profile) -> Run:
    """As the load generator sees it: what is not answered DRAIN_S after the end is lost."""
    end = profile.seconds + DRAIN_S
    over = (o.latency_ms is not None and o.at_s + o.latency_ms / 1000 > end for o in run.outcomes)
    return replace(run, outcomes=[replace(o, latency_ms=None) if x else o for o, x in zip(run.outcomes, over)])


def profile_of(row: dict) -> Profile:
    """What a measured row was sent."""
    if row["profile"] == "day":
        return day(row["seconds"])
    return bursts(float(row["profile"].removeprefix("burst ").removesuffix("x")), row["seconds"])


def rushes(measured: dict) -> list[dict]:
    """The rows of rushes and days, each with the seed of its moments; where a file does not say it, its profiles were
    numbered in turn."""
    names, first = list(dict.fromkeys(row["profile"] for row in measured["rows"])), measured["provenance"]["seed"]
    rows = [row for row in measured["rows"] if row["profile"] != "steady"]
    return [{"seed": first + names.index(row["profile"]), **row} for row in rows]


def replicas_of(measured: dict) -> int:
    """How many replicas the measured server had."""
    options = measured["rows"][0].get("server", [])
    return int(options[options.index("--replicas") + 1]) if "--replicas" in options else 1


def fit(world: World, rows: Sequence[dict]) -> Costs:
    """The costs, of a grid, at which these rows' p50 and p95 are closest to the measured ones, in logarithms."""

    def error(costs: Costs) -> float:
        found = [(row, world.play(row["policy"], profile_of(row), costs, row["seed"])) for row in rows]
        return sum(math.log(said[key] / row[key]) ** 2 for row, said in found for key in ("p50_ms", "p95_ms"))

    return min(itertools.starmap(Costs, itertools.product(PACES, BESIDES_MS)), key=error)


def compared(rows: Sequence[dict], seeds: int) -> list[dict]:
    """Each policy's means over the seeds; of the controller also what it has more than each rival, seed by seed."""
    found = []
    for profile, name in itertools.product(dict.fromkeys(row["profile"] for row in rows), POLICIES):
        mine = [row for row in rows if (row["profile"], row["policy"]) == (profile, name)]
        means = {key: round(fmean(row[key] or 0 for row in mine), 4) for key in (*SHOWN, *ALPHA)}
        recovered = [row["recovery_s"] for row in mine if row["recovery_s"] is not None]
        means |= {"recovery_s": max(recovered, default=None), "recovered": len(recovered)}
        found.append({"profile": profile, "policy": name, "n": seeds, **means, **_gain(rows, profile, name)})
    return found


def _gain(rows: Sequence[dict], profile: str, name: str) -> dict:
    """Goodput of the controller less that of this policy: mean and its 95% interval over seeds."""
    if name == "controller":
        return {}
    by = {(row["policy"], row["seed"]): row["goodput"] for row in rows if row["profile"] == profile}
    gains = [value - by[name, seed] for (policy, seed), value in by.items() if policy == "controller"]
    half, mean = stats.half_width(gains), fmean(gains)
    return {"controller_gain": round(mean, 4), "gain_ci95": [round(mean - half, 4), round(mean + half, 4)]}


def fleet(world: World, costs: Costs, seconds: float, counts: Sequence[int]) -> list[dict]:
    """One rush of two and one of five for each policy and each number of replicas: what each replica does on average,
    and what is gained by being many, where the emptier of two gets the next request."""
    found = []
    for replicas, times, name in itertools.product(counts, (2, 5), POLICIES):
        profile = bursts(times, seconds)
        row = replace(world, replicas=replicas).play(name, profile, costs, times, seed=times)
        each = {"goodput_each": round(row["goodput"] / replicas, 4)}
        found.append({"replicas": replicas, "profile": profile.name, "policy": name, **row, **each})
        print(json.dumps(found[-1]), flush=True)
    return found


def study(
    measured: dict,
    lengths: Sequence[int],
    batch: int,
    seeds: Sequence[int],
    scatter: float,
    costs: Costs | None = None,
    known_ms: float = 0.0,
    counts: Sequence[int] = (),
    times: Sequence[float] = (2, 5),
    fit_on: Sequence[str] = FIT_ON,
) -> dict:
    """The content of the result file. costs: None to fit them to the rows of the policies `fit_on` in the largest rush.
    counts: of replicas, see `fleet`. times: of rushes."""
    rungs = tuple(Rung(**rung) for rung in measured["rungs"])
    replicas, reference = replicas_of(measured), measured["reference_tokens"]
    world = World(rungs, measured["promise_ms"], measured["rate"] / replicas, reference, tuple(lengths), batch)
    world = replace(world, known_ms=known_ms, replicas=replicas)
    rows = rushes(measured)
    largest = max(rows, key=lambda row: profile_of(row).most)["profile"]
    fitted = [row for row in rows if row["profile"] == largest and row["policy"] in fit_on]
    fitted = fitted if costs is None else []
    costs = fit(world, fitted) if costs is None else costs
    predicted = [
        {
            **{key: row[key] for key in ("profile", "policy", "seed")},
            "fitted": row in fitted,
            "measured": {key: row[key] for key in (*SHOWN, "mean_alpha")},
            "simulated": world.play(row["policy"], profile_of(row), costs, row["seed"]),
        }
        for row in rows
    ]
    noisy, seconds = replace(costs, scatter=scatter), rows[0]["seconds"]
    played = [
        {"profile": profile.name, "policy": name, "seed": seed}
        | world.play(name, profile, noisy, seed, 31 * seed, seed)
        for profile in (bursts(many, seconds) for many in times)
        for name in POLICIES
        for seed in seeds
    ]
    facts = {**asdict(costs), "scatter": scatter, "batch": batch, "known_ms": known_ms, "first_seed": seeds[0]}
    many = {"replicas": fleet(world, noisy, min(seconds, FLEET_S), counts)} if counts else {}
    rows = compared(played, len(seeds))
    return {"costs": facts, "seconds": seconds, "predicted": predicted, "rows": rows, **many}


def main() -> None:
    made = argparse.ArgumentParser(prog="python -m zsaa.serve.study", description=__doc__.split("\n\n")[0])
    add = made.add_argument
    add("--output", default="outputs/serve", help="folder; the file is results/simulated.json in it")
    add("--measured", default=str(RESULTS / "serving" / "serve-cpu.json"), help="a result file of zsaa.serve.load")
    add("--batch", type=int, default=8, help="requests that ran at once in it")
    add("--seeds", type=int, default=20)
    add("--first-seed", type=int, default=0, help="others than those on which anything was chosen")
    add("--times", type=float, nargs="*", default=[2, 5], help="how many times as many requests come in a rush")
    add("--scatter", type=float, default=0.15, help="of what requests take: assumed, not measured")
    add("--samples", type=int, default=400, help="reviews, as in the measured run")
    add("--least-words", type=int, default=0, help="of the reviews, as in the measured run")
    add("--costs", type=float, nargs=4, metavar="X", help="pace, beside_ms, batch_ms and door_ms instead of a fit")
    add("--fit-on", nargs="*", default=list(FIT_ON), help="policies to whose largest rush costs are fitted")
    add("--known-ms", type=float, default=0.0, help="of a batch's price, what the server is told at its start")
    add("--replicas", type=int, nargs="*", default=[], help="numbers of replicas that are played, too")
    chosen, begun = made.parse_args(), time.monotonic()
    output, path = output_folder(chosen.output), Path(chosen.measured)
    measured = json.loads(path.read_text(encoding="utf-8"))
    (engine,) = engines(Settings(model=None)).values()
    texts = samples_of(chosen.samples, measured["provenance"]["seed"], chosen.least_words)
    lengths = [min(len(engine.encode(text)), engine.max_tokens) for text, _ in texts]
    costs = Costs(*chosen.costs[:2], 0.0, *chosen.costs[2:]) if chosen.costs else None
    seeds = range(chosen.first_seed, chosen.first_seed + chosen.seeds)
    options = chosen.scatter, costs, chosen.known_ms, chosen.replicas, chosen.times, chosen.fit_on
    content = study(measured, lengths, chosen.batch, seeds, *options)
    command = shlex.join(["python", "-m", "zsaa.serve.study", *sys.argv[1:]])
    facts = provenance(seed=0, seconds=round(time.monotonic() - begun, 1), samples=len(lengths))
    head = {"kind": "serve-simulated", "command": command, "measured": path.name}
    print(write_json(output / "results" / "simulated.json", {**head, **content, "provenance": facts}))


if __name__ == "__main__":
    main()
