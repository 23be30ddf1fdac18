"""Real load on a real server: bursts and a day, by each policy, the answers graded. One command, one result file:

    python -m zsaa.serve.load --output outputs/serve

starts `python -m zsaa.serve` anew for each policy, on loopback, with the classifier alone; finds what alpha = 1 can
serve (clients that always ask), and sends held-out reviews as a Poisson process of 0.7 times that rate through each
profile: the same texts at the same moments to every policy. A latency counts from the moment at which a request was
due. Beside each run stands what the simulator says of it. The file is written anew after each run.

On a GPU, without Ray (its router and proxy cost more than the model):

    python -m zsaa.serve.load --clients 64 --least-words 380 --p95-ms 1000 -- --bare --device cuda --batch 64
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import shlex
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import aiohttp

from zsaa.data.tasks import load_task
from zsaa.measure import output_folder, provenance, stats, write_json
from zsaa.serve.controller import POLICIES, Policy, Rung, percentile, policy_named
from zsaa.serve.simulate import describe, simulate
from zsaa.serve.traces import Outcome, Profile, bursts, day, poisson, recovery_s, steady, summary, turns

DRAIN_S = 15.0  # after a profile: what is not answered by then is lost
CALM_S = 8.0  # before each, so that it begins with an empty window and alpha back at 1
UTILIZATION = 0.7  # of alpha = 1, outside of bursts
PROFILES = {f"burst{n}": partial(bursts, n) for n in (2, 3, 5)} | {"day": day, "steady": steady}

COSTS = ("pace", "beside_ms", "batch_ms", "trust")  # of a lane's live numbers
FACTS = ("capacity", "mean_tokens", "rate", "scale", "rungs", "reference_tokens")  # of a result file

Sample = tuple[str, str]  # a text, and the label that it should get


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@contextlib.contextmanager
def server(options: Sequence[str], wait_s: float = 600.0) -> Iterator[tuple[str, int]]:
    """A server of its own process with these options, on a port that is free: its address and process id, once it is
    ready."""
    port = free_port()
    command = [sys.executable, "-m", "zsaa.serve", "--model", "none", "--port", str(port), *options]
    address, begun = f"http://127.0.0.1:{port}", time.monotonic()
    with tempfile.TemporaryFile("w+", errors="replace") as said:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=said)
        try:
            while not _ready(address):
                if process.poll() is not None or time.monotonic() - begun > wait_s:
                    said.seek(0)
                    last = "".join(said.readlines()[-3:]).strip() or "nothing"
                    raise RuntimeError(
                        f"the server was not ready; the last that it said: {last}\nStart it alone to see more: "
                        f"{shlex.join(command)}"
                    )
                time.sleep(0.5)
            yield address, process.pid
        finally:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()


def _ready(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/health", timeout=5) as response:
            return response.status == 200
    except OSError:
        return False


class Client:
    """Asks one server, and keeps what it saw."""

    def __init__(self, session: aiohttp.ClientSession, samples: Sequence[Sample]):
        self.session, self.samples = session, samples
        self.seen: list[tuple] = []  # second, least alpha, requests in the house; the costs that the first lane learned
        self.lags_ms: list[float] = []  # by which requests were sent later than due: more than a few, and this is slow

    async def model(self) -> dict:
        async with self.session.get("/v1/models") as response:
            return (await response.json())["data"][0]

    async def ask(self, index: int, **more) -> tuple[int, dict]:
        """Status and content. index: of the sample."""
        text = self.samples[index % len(self.samples)][0]
        async with self.session.post("/classify", json={"input": text, **more}) as response:
            return response.status, await response.json()

    async def capacity(self, seconds: float, clients: int) -> tuple[float, float]:
        """Requests a second that are answered at alpha = 1 with so many `clients` always asking, and a request's mean
        tokens."""
        numbers, begun, tokens = itertools.count(), time.monotonic(), []

        async def one() -> None:
            while time.monotonic() - begun < seconds:
                status, content = await self.ask(next(numbers), pruning=False)
                if status == 200:
                    tokens.append(content["usage"]["prompt_tokens"])

        await asyncio.gather(*(one() for _ in range(clients)))
        if not tokens:
            raise RuntimeError(
                "the server answered nothing while its capacity was measured. Start it alone to see why."
            )
        return len(tokens) / (time.monotonic() - begun), sum(tokens) / len(tokens)

    async def request(self, index: int, at: float, begun: float) -> tuple[Outcome, int]:
        """What became of the request that is due at second `at`, and its tokens."""
        await asyncio.sleep(max(0.0, begun + at - time.monotonic()))
        self.lags_ms.append(1000 * (time.monotonic() - begun - at))
        try:
            status, content = await self.ask(index)
        except (aiohttp.ClientError, asyncio.CancelledError):
            return Outcome(at, None), 0
        if status == 429:
            return Outcome(at, None, refused=True), 0
        if status != 200:
            return Outcome(at, None), 0
        (said,) = content["data"]
        right = said["label"] == self.samples[index % len(self.samples)][1]
        latency_ms = 1000 * (time.monotonic() - begun - at)
        return Outcome(at, latency_ms, said["zsaa"]["alpha"], right=right), content["usage"]["prompt_tokens"]

    async def watch(self, begun: float) -> None:
        while True:
            with contextlib.suppress(aiohttp.ClientError, asyncio.TimeoutError, ValueError):
                async with self.session.get("/live", timeout=aiohttp.ClientTimeout(total=2)) as response:
                    lanes = [lane for r in (await response.json())["replicas"].values() for lane in r.values()]
                house = sum(lane["waiting"] + lane["running"] for lane in lanes)
                costs = tuple(lanes[0][key] for key in COSTS)
                self.seen.append((time.monotonic() - begun, min(lane["alpha"] for lane in lanes), house, costs))
            await asyncio.sleep(0.25)

    async def play(
        self, arrivals: Sequence[float], profile: Profile, calm_s: float = CALM_S
    ) -> list[tuple[Outcome, int]]:
        """One profile, from its first request to the last answer, or to DRAIN_S after its end; and `calm_s` more."""
        self.seen.clear(), self.lags_ms.clear()
        begun = time.monotonic() + 0.5
        watching = asyncio.ensure_future(self.watch(begun))
        tasks = [asyncio.ensure_future(self.request(i, at, begun)) for i, at in enumerate(arrivals)]
        await asyncio.wait(tasks, timeout=profile.seconds + 0.5 + DRAIN_S)
        for task in tasks:
            task.cancel()
        found = await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.sleep(calm_s)
        watching.cancel()
        return [f if isinstance(f, tuple) else (Outcome(at, None), 0) for f, at in zip(found, arrivals)]


def samples_of(count: int, seed: int, least_words: int = 0) -> list[Sample]:
    """Held-out film reviews of `least_words` words or more, with the names of their labels."""
    task = load_task("imdb", test=None if least_words else count, seed=seed)
    found = [(text, task.label_names[label]) for text, label in zip(task.test["text"], task.test["label"])]
    long = [sample for sample in found if len(sample[0].split()) >= least_words]
    if len(long) < count and least_words:
        raise ValueError(f"{len(long)} held-out reviews have {least_words} words or more: ask for fewer than {count}.")
    return long[:count]


def row_of(name: str, profile: Profile, played: list[tuple[Outcome, int]], seen: list, p95_ms: float) -> dict:
    """A policy's row in the result: what was counted, and how alpha went."""
    outcomes = [outcome for outcome, _ in played]
    found = summary(outcomes, p95_ms, profile.seconds)
    graded = {}
    if found["graded"]:
        share = found["correct"] / found["graded"]
        graded = {"accuracy": round(100 * share, 2), "ci95": stats.interval(found["correct"], found["graded"])}
    alphas = [(at, alpha) for at, alpha, *_ in seen]
    return {
        "policy": name,
        "profile": profile.name,
        "seconds": profile.seconds,
        **found,
        **graded,
        "turns": turns([alpha for _, alpha in alphas]),
        "recovery_s": recovery_s(alphas, profile.bursts[-1][1]) if profile.bursts else None,
        "seen": [[round(at, 1), round(alpha, 4), house] for at, alpha, house, _ in seen[::4]],  # once a second
        "costs": [[round(at, 1), *costs] for at, *_, costs in seen[::4]],
    }


def simulated(rungs: Sequence[Rung], name: str, p95_ms: float, played, reference: int, profile: Profile, scale: float):
    """What the simulator says of the same arrivals and lengths, where a request costs `scale` times what was
    calibrated: the capacity at alpha = 1 was measured, and the rest is what the cost model says."""
    tokens = [n for _, n in played if n]
    mean = sum(tokens) / len(tokens) if tokens else reference
    works = [(n or mean) / reference for _, n in played]
    policy = policy_named(name, Policy(tuple(rungs), p95_ms))
    ms = {rung.alpha: rung.ms * scale for rung in rungs}
    run = simulate(
        [outcome.at_s for outcome, _ in played], policy, lambda alpha, batch: ms[alpha] * sum(batch) / 1000, works
    )
    keys = ("answered", "refused", "violations", "goodput", "p50_ms", "p95_ms", "mean_alpha", "below_one", "recovery_s")
    found = describe(run, policy, profile)
    return {key: found[key] for key in keys}


@dataclass
class Measured:
    """What is known so far. rate: requests a second outside of bursts, None before the first server was measured.
    scale: what a request costs at alpha = 1, over what the cost model says. facts: for the result file."""

    rate: float | None
    scale: float = 1.0
    facts: dict = field(default_factory=dict)
    rows: list[dict] = field(default_factory=list)

    def found(self, capacity: float, tokens: float) -> None:
        self.rate = UTILIZATION * capacity if self.rate is None else self.rate
        self.facts = {"capacity": round(capacity, 3), "mean_tokens": round(tokens, 1), "rate": round(self.rate, 3)}

    def recall(self, content: dict) -> None:
        """What a result file holds of the policies that were measured before."""
        self.rate, self.scale = content["rate"], content.get("scale", 1.0)
        self.facts = {key: content[key] for key in FACTS if key in content}
        code = {"-": None, "0": False, "1": True}
        rows = ({**row, "right": [code[right] for right in row["right"]]} for row in content["rows"])
        self.rows = [{key: value for key, value in row.items() if key != "against_stock"} for row in rows]

    def told(self, ladder: Sequence[Rung], reference: int) -> None:
        if ladder[0].alpha == 1:
            expected_ms = ladder[0].ms * self.facts["mean_tokens"] / reference
            self.scale = 1000 / self.facts["capacity"] / expected_ms
            self.facts["scale"] = round(self.scale, 4)


async def measure(
    chosen: argparse.Namespace, samples: Sequence[Sample], write: Callable[[dict], object], before: dict | None = None
) -> None:
    """All policies, all profiles. write: what to do with the content of the result file, as far as it is known.
    before: that content, where a file is gone on with."""
    so_far = Measured(chosen.rate)
    if before is not None:
        so_far.recall(before)

    def tell() -> None:
        write({**so_far.facts, "rows": [_with_loss(row, so_far.rows) for row in so_far.rows]})

    for name in chosen.policies:
        with server(["--policy", name, "--p95-ms", str(chosen.p95_ms), *chosen.server]) as (address, _):
            options = {"timeout": aiohttp.ClientTimeout(total=None), "connector": aiohttp.TCPConnector(limit=0)}
            async with aiohttp.ClientSession(address, **options) as session:
                await _play_all(chosen, name, Client(session, samples), so_far, tell)


async def _play_all(
    chosen: argparse.Namespace, name: str, client: Client, so_far: Measured, tell: Callable[[], None]
) -> None:
    """The rows of one policy. tell: called after each."""
    about = (await client.model())["zsaa"]
    await client.ask(0)
    if not so_far.facts:
        so_far.found(*await client.capacity(chosen.probe_s, chosen.clients))
        await asyncio.sleep(chosen.calm_s)
    ladder, reference = [Rung(**rung) for rung in about["rungs"]], about["reference_tokens"]
    so_far.told(ladder, reference)
    if name == "controller":
        so_far.facts |= {"rungs": about["rungs"], "reference_tokens": reference}
    profiles = [PROFILES[name](chosen.seconds) for name in chosen.profiles] * chosen.repeats
    for seed, profile in enumerate(profiles, chosen.seed):
        played = await client.play(poisson(profile, so_far.rate, seed), profile, chosen.calm_s)
        row = row_of(name, profile, played, client.seen, chosen.p95_ms) | {"seed": seed, "server": chosen.server}
        row["simulated"] = simulated(ladder, name, chosen.p95_ms, played, reference, profile, so_far.scale)
        row["right"] = [outcome.right for outcome, _ in played]
        row["sent_late_p95_ms"] = round(percentile(client.lags_ms, 0.95) or 0.0, 1)
        so_far.rows.append(row)
        print(
            f"{name:>10} {profile.name:>8}: {row['answered']} answered, {row['refused']} refused, "
            f"{row['violations']} late or lost, p95 {row['p95_ms']} ms, goodput {row['goodput']}/s, "
            f"costs {row['costs'][-1:]}",
            flush=True,
        )
        tell()


def _with_loss(row: dict, rows: Sequence[dict]) -> dict:
    """The row with the points of accuracy that it lost against alpha = 1, on the texts that both answered; and of each
    text, in the order in which they were asked, whether it was answered rightly (1), wrongly (0) or not at all (-)."""
    same = (r for r in rows if (r["profile"], r.get("seed")) == (row["profile"], row.get("seed")))
    stock = next((r for r in same if r["policy"] == "stock"), None)
    both = [
        (a, b) for a, b in zip(row["right"], stock["right"]) if a is not None and b is not None
    ] if stock else []  # fmt: skip
    found = {**row, "right": "".join("-" if right is None else str(int(right)) for right in row["right"])}
    if both and row is not stock:
        ones, others = ([int(pair[k]) for pair in both] for k in (0, 1))
        gain, interval = stats.difference("accuracy", [1] * len(both), ones, others)
        found["against_stock"] = {"n": len(both), "points": gain, "ci95": list(interval)}
    return found


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m zsaa.serve.load", description=__doc__.split("\n\n")[0])
    add = made.add_argument
    add("--output", default="outputs/serve", help="folder; the file is results/serve.json in it")
    add("--seconds", type=float, default=45.0, help="of each profile")
    add("--profiles", default="burst2,burst5,day", type=lambda text: text.split(","), help=f"of {', '.join(PROFILES)}")
    add("--policies", default="stock,floor,admission,controller", type=lambda text: text.split(","))
    add("--p95-ms", type=float, default=3000.0, help="the promise")
    add("--repeats", type=int, default=1, help="of all profiles, each time with the next seeds")
    add("--rate", type=float, default=None, help="requests a second outside of bursts; default: 0.7 of the capacity")
    add("--probe-s", type=float, default=10.0, help="seconds in which the capacity is measured")
    add("--clients", type=int, default=8, help="that find the capacity, each always asking")
    add("--calm-s", type=float, default=CALM_S, help="seconds of silence after each profile")
    add("--least-words", type=int, default=0, help="of the reviews that are sent")
    add("--samples", type=int, default=400, help="held-out reviews, asked in turn")
    add("--seed", type=int, default=0)
    add("--go-on", action="store_true", help="with the file in the output folder: add these policies, by its rate")
    add("server", nargs="*", help="options of python -m zsaa.serve, after --: for example -- --replicas 2")
    return made


def main() -> None:
    made = parser()
    chosen = made.parse_args()
    for given, known in ((chosen.profiles, PROFILES), (chosen.policies, POLICIES)):
        if unknown := set(given) - set(known):
            made.error(f"{sorted(unknown)} are not known; there are {', '.join(known)}.")
    output, begun = output_folder(chosen.output), time.monotonic()
    samples = samples_of(chosen.samples, chosen.seed, chosen.least_words)
    command = shlex.join(["python", "-m", "zsaa.serve.load", *sys.argv[1:]])

    path = output / "results" / "serve.json"
    before = json.loads(path.read_text(encoding="utf-8")) if chosen.go_on else None
    earlier_s = before["provenance"]["seconds"] if before else 0.0
    earlier = [*before.get("gone_on_with", ()), before["provenance"] | {"command": before["command"]}] if before else []

    def write(content: dict) -> None:
        seconds = round(earlier_s + time.monotonic() - begun, 1)
        facts = provenance(seed=chosen.seed, seconds=seconds, samples=len(samples))
        head = {"kind": "serve", "command": command, "promise_ms": chosen.p95_ms, "gone_on_with": earlier}
        write_json(path, {**head, **content, "provenance": facts})

    asyncio.run(measure(chosen, samples, write, before))
    print(path)


if __name__ == "__main__":
    main()
