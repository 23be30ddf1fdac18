"""Long, light load on a real server: does memory grow, is a request lost, and what does a killed replica cost?

    python -m zsaa.serve.soak --output outputs/serve --seconds 3600 -- --replicas 2 --cpus 0.5 --threads 1

Requests arrive as a Poisson process, three times as many in every fifth minute; one client in ten gives up early. What
the server's processes hold is read from /proc every few seconds. Halfway one replica is killed, if there are two. The
file is written anew every minute, so that a soak that is ended leaves what it has.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import math
import os
import random
import shlex
import signal
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
from scipy import stats as distributions

from zsaa.measure import output_folder, provenance, write_json
from zsaa.serve.load import Client, samples_of, server
from zsaa.serve.traces import Profile, poisson

REPLICA = "ServeReplica:zsaa"  # how Ray names the processes of ours
IMPATIENT = 0.1  # share of the clients that go away before they are answered
PATIENCE_S = 120.0  # after which an answer counts as lost
SETTLED = 0.25  # of each process' time, which it gets to warm up before growth is looked at
TROUGHS = 24  # spells of which each gives the least that was held


def processes(parent: int) -> dict[int, str]:
    """Process ids of `parent` and all that it started (itself, or through others), in ascending order, each with the
    beginning of its command."""
    parents, names = {}, {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            names[int(folder.name)] = (folder / "cmdline").read_text().split("\0")[0].rpartition("/")[2]

    def ours(pid: int) -> bool:
        return pid == parent or (pid in parents and ours(parents[pid]))

    return {pid: names[pid] for pid in sorted(names) if ours(pid)}


def replica_processes(parent: int) -> list[int]:
    """Process ids of the replicas that `parent` started, in ascending order."""
    return [pid for pid, name in processes(parent).items() if REPLICA in name]


def held_mib(pid: int) -> tuple[float, float]:
    """A process' own memory (RssAnon), and what it has mapped of files (RssFile: code and weights), in MiB."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    anonymous, files = (int(status[key].split()[0]) / 1024 for key in ("RssAnon", "RssFile"))
    return anonymous, files


def waves(seconds: float) -> Profile:
    """The usual rate, and three times it in every fifth minute."""
    return Profile("waves", seconds, lambda t: 3.0 if t % 300 >= 240 else 1.0, 3.0)


def growth(seen: Sequence[tuple[float, ...]]) -> dict:
    """Slope of the least that a process holds, in MiB an hour, seen as (second, MiB, ...), once it has settled: by
    Theil and Sen, whose 95% interval a few jumps do not move. The least is that of TROUGHS spells: what a batch holds
    while it runs, and what is freed until the system gets it back, is no growth."""
    begin, end = seen[0][0] + SETTLED * (seen[-1][0] - seen[0][0]), seen[-1][0]
    troughs: dict[int, tuple[float, float]] = {}
    for at, mib, *_ in seen:
        if at >= begin:
            spell = int(TROUGHS * (at - begin) / max(1e-9, end - begin))
            troughs[spell] = min(troughs.get(spell, (at, mib)), (at, mib), key=lambda one: one[1])
    late = list(troughs.values())
    if len(late) < 8:
        return {"seen": len(late), "mib_an_hour": None}
    slope = distributions.theilslopes([mib for _, mib in late], [at / 3600 for at, _ in late])
    return {
        "seen": len(late),
        "first_mib": round(late[0][1], 1),
        "last_mib": round(late[-1][1], 1),
        "mib_an_hour": round(float(slope.slope), 2),
        "ci95": [round(float(slope.low_slope), 2), round(float(slope.high_slope), 2)],
    }


@dataclass
class Soak:
    """What is known so far. parent: the server's process. memory: (second, MiB of its own, MiB of files) of each of its
    processes, by id; names: what they are. found: what became of requests, by HTTP status or cause. killed: of the
    replica. latencies: seconds, of the answered."""

    parent: int
    begun: float = field(default_factory=time.monotonic)
    memory: dict[int, list[tuple[float, float, float]]] = field(default_factory=dict)
    names: dict[int, str] = field(default_factory=dict)
    found: Counter = field(default_factory=Counter)
    killed: dict | None = None
    latencies: list[float] = field(default_factory=list)

    async def watch(self, every_s: float) -> None:
        while True:
            for pid, name in processes(self.parent).items():
                self.names[pid] = name  # Ray names a process once it has work for it
                with contextlib.suppress(OSError, KeyError):  # it may have ended since
                    held = held_mib(pid)
                    self.memory.setdefault(pid, []).append((time.monotonic() - self.begun, *held))
            await asyncio.sleep(every_s)

    async def kill(self, at_s: float) -> None:
        """Kills one replica at that second, and sees when there are as many again."""
        await asyncio.sleep(at_s)
        before = replica_processes(self.parent)
        if len(before) < 2:
            return
        os.kill(before[0], signal.SIGKILL)
        self.killed = {"at_s": round(time.monotonic() - self.begun, 1), "replicas_before": len(before)}
        begun = time.monotonic()
        while len(set(replica_processes(self.parent)) - {before[0]}) < len(before):
            await asyncio.sleep(0.5)
        self.killed["replaced_after_s"] = round(time.monotonic() - begun, 1)

    async def ask(self, client: Client, index: int, at_s: float, gives_up_s: float | None) -> None:
        await asyncio.sleep(max(0.0, self.begun + at_s - time.monotonic()))
        sent = time.monotonic()
        try:
            status, _ = await asyncio.wait_for(client.ask(index), gives_up_s or PATIENCE_S)
        except asyncio.TimeoutError:
            self.found["gave_up" if gives_up_s else "lost"] += 1
        except aiohttp.ContentTypeError as error:  # Ray's own words, of a replica that is gone
            self.found[str(error.status)] += 1
        except aiohttp.ClientError as error:
            self.found[f"broken: {type(error).__name__}"] += 1
        else:
            self.found[str(status)] += 1
            if status == 200:
                self.latencies.append(time.monotonic() - sent)

    def content(self) -> dict:
        answers = sorted(self.latencies)
        return {
            "elapsed_s": round(time.monotonic() - self.begun, 1),
            "statuses": dict(sorted(self.found.items())),
            "killed": self.killed,
            "p50_ms": round(1000 * answers[len(answers) // 2], 1) if answers else None,
            "p95_ms": round(1000 * answers[math.ceil(0.95 * len(answers)) - 1], 1) if answers else None,
            "growth": {f"process {k}": self._growth(pid) for k, pid in enumerate(self.memory)},
            "memory": [
                [[round(at), round(own, 1), round(files, 1)] for at, own, files in seen[:: max(1, len(seen) // 120)]]
                for seen in self.memory.values()
            ],
        }

    def _growth(self, pid: int) -> dict:
        return {"name": self.names[pid], **growth(self.memory[pid])}


async def run(chosen: argparse.Namespace, address: str, parent: int, write) -> dict:
    samples = samples_of(chosen.samples, chosen.seed)
    arrivals, draw = poisson(waves(chosen.seconds), chosen.rate, chosen.seed), random.Random(chosen.seed)
    timeout = aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(address, timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as session:
        client = Client(session, samples)
        await client.ask(0)
        soak = Soak(parent)
        hands = [asyncio.ensure_future(soak.watch(chosen.every_s))]
        if chosen.kill:
            hands.append(asyncio.ensure_future(soak.kill(chosen.seconds / 2)))
        asked = [
            soak.ask(client, k, at, draw.uniform(0.05, 0.5) if draw.random() < IMPATIENT else None)
            for k, at in enumerate(arrivals)
        ]
        whole = asyncio.gather(*asked)
        while not (await asyncio.wait([whole], timeout=60.0))[0]:
            write({"requests": len(asked), **soak.content()})
        await whole
        async with session.get("/live") as response:
            lanes = [lane for replica in (await response.json())["replicas"].values() for lane in replica.values()]
        for hand in hands:
            hand.cancel()
    left = sum(lane["waiting"] + lane["running"] for lane in lanes)
    return {"requests": len(asked), **soak.content(), "left_in_the_house": left}


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m zsaa.serve.soak", description=__doc__.split("\n\n")[0])
    add = made.add_argument
    add("--output", default="outputs/serve", help="folder; the file is results/soak.json in it")
    add("--seconds", type=float, default=3600.0)
    add("--rate", type=float, default=0.2, help="requests a second, as usual")
    add("--every-s", type=float, default=10.0, help="seconds between two looks at memory")
    add("--kill", action=argparse.BooleanOptionalAction, default=True, help="one of two replicas, halfway")
    add("--samples", type=int, default=400, help="held-out reviews, asked in turn")
    add("--seed", type=int, default=0)
    add("server", nargs="*", help="options of python -m zsaa.serve, after --: for example -- --replicas 2")
    return made


def main() -> None:
    chosen = parser().parse_args()
    output, command = output_folder(chosen.output), shlex.join(["python", "-m", "zsaa.serve.soak", *sys.argv[1:]])

    begun = provenance(seed=chosen.seed)  # the code that runs, whatever is checked out an hour later

    def write(content: dict) -> Path:
        facts = {**begun, "seconds": content["elapsed_s"], "samples": content["requests"]}
        head = {"kind": "serve-soak", "command": command, "seconds": chosen.seconds, "rate": chosen.rate}
        return write_json(output / "results" / "soak.json", {**head, **content, "provenance": facts})

    with server(chosen.server) as (address, process):
        print(write(asyncio.run(run(chosen, address, process, write))))


if __name__ == "__main__":
    main()
