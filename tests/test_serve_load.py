"""The load generator against a server that is made of an answer and a pause."""

import asyncio
import contextlib
import json
import os
import random
import subprocess
import threading

import pytest

pytest.importorskip("aiohttp", reason="the load generator needs aiohttp: pip install 'zsaa[serve]'")

from aiohttp import web

from zsaa.serve import load, soak
from zsaa.serve.controller import Rung
from zsaa.serve.traces import Outcome, bursts, steady

SAMPLES = [("a good film", "positive"), ("a bad film", "negative"), ("a good bad film", "positive")]


class Fake:
    """Says positive of whatever is good and not bad, after a pause; every seventh request is refused, every eleventh
    fails."""

    def __init__(self, pause_s=0.005):
        self.pause_s, self.asked, self.times = pause_s, 0, []

    async def classify(self, request):
        body = await request.json()
        self.asked += 1
        if "pruning" not in body:
            self.times.append(asyncio.get_running_loop().time())
            if len(self.times) % 7 == 0:
                return web.json_response({}, status=429)
            if len(self.times) % 11 == 0:
                return web.json_response({}, status=500)
        await asyncio.sleep(self.pause_s)
        text = body["input"]
        label = "positive" if "good" in text and "bad" not in text else "negative"
        data = [{"label": label, "zsaa": {"alpha": 0.9 if "pruning" not in body else 1.0}}]
        return web.json_response({"data": data, "usage": {"prompt_tokens": 3}})

    async def models(self, request):
        rungs = [{"alpha": 1.0, "ms": 5.0}, {"alpha": 0.9, "ms": 2.0}]
        return web.json_response({"data": [{"id": "mood", "zsaa": {"rungs": rungs, "reference_tokens": 3}}]})

    async def live(self, request):
        lane = {"waiting": 1, "running": 2, "alpha": 0.9, "pace": 1.1, "beside_ms": 2.0, "batch_ms": 0.0, "trust": 1.0}
        return web.json_response({"replicas": {"a": {"mood": lane}}})


@contextlib.contextmanager
def served(fake):
    """On a free port of loopback, in a thread of its own."""
    loop, ready, found, runners = asyncio.new_event_loop(), threading.Event(), [], []

    async def start():
        app = web.Application()
        app.add_routes([web.post("/classify", fake.classify), web.get("/v1/models", fake.models)])
        app.add_routes([web.get("/live", fake.live)])
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        runners.append(runner)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        found.append(f"http://127.0.0.1:{site._server.sockets[0].getsockname()[1]}")
        ready.set()

    def run():
        loop.run_until_complete(start())
        loop.run_forever()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    assert ready.wait(30)
    yield found[0]
    asyncio.run_coroutine_threadsafe(runners[0].cleanup(), loop).result(30)
    loop.call_soon_threadsafe(loop.stop)
    thread.join(30)


@pytest.fixture
def fake(monkeypatch):
    made, started = Fake(), []

    @contextlib.contextmanager
    def server(options):
        started.append(options)
        with served(made) as address:
            yield address, os.getpid()

    for module in (load, soak):
        monkeypatch.setattr(module, "server", server)
        monkeypatch.setattr(module, "samples_of", lambda *asked: SAMPLES)
    monkeypatch.setattr(load, "DRAIN_S", 0.3)
    monkeypatch.setattr(load, "CALM_S", 0.3)
    made.started = started
    return made


def test_every_policy_gets_every_profile_and_the_answers_are_graded(fake, tmp_path, monkeypatch, capsys):
    given = ["--output", str(tmp_path), "--seconds", "0.6", "--profiles", "burst2,steady", "--probe-s", "0.3"]
    given += ["--calm-s", "0.1"]
    monkeypatch.setattr(
        "sys.argv", ["load", *given, "--policies", "stock,controller", "--rate", "75", "--", "--batch", "4"]
    )
    load.main()
    result = json.loads((tmp_path / "results" / "serve.json").read_text())
    assert [options[:2] for options in fake.started] == [["--policy", "stock"], ["--policy", "controller"]]
    assert all(options[-2:] == ["--batch", "4"] for options in fake.started)
    assert result["kind"] == "serve" and result["provenance"]["samples"] == 3 and result["capacity"] > 0
    rows = {(row["policy"], row["profile"]): row for row in result["rows"]}
    assert list(rows) == [(p, f) for p in ("stock", "controller") for f in ("burst 2x", "steady")]
    for (_, name), row in rows.items():
        assert row["requests"] == rows[("stock", name)]["requests"] > 20
        assert row["answered"] + row["refused"] + row["lost"] == row["requests"]
        assert row["refused"] > 0 and row["lost"] > 0 and row["mean_alpha"] == 0.9
        assert 55 < row["accuracy"] < 80  # two texts of three are told rightly
        assert row["seen"] and row["seen"][0][1:] == [0.9, 3]
        assert row["costs"][0][1:] == [1.1, 2.0, 0.0, 1.0]
        assert row["simulated"]["answered"] > 0
    assert "against_stock" not in rows[("stock", "steady")]
    assert rows[("controller", "steady")]["against_stock"]["points"] == 0
    assert "controller" in capsys.readouterr().out

    monkeypatch.setattr("sys.argv", ["load", *given, "--policies", "floor", "--go-on"])
    load.main()
    more = json.loads((tmp_path / "results" / "serve.json").read_text())
    assert more["rows"][:4] == result["rows"] and [row["policy"] for row in more["rows"][4:]] == ["floor", "floor"]
    assert not result["gone_on_with"] and [run["commit"] for run in more["gone_on_with"]] == [
        result["provenance"]["commit"]
    ]
    assert {key: more[key] for key in load.FACTS} == {key: result[key] for key in load.FACTS}
    assert (
        more["rows"][5]["against_stock"]["n"] > 0
        and more["rows"][4]["requests"] == rows["stock", "burst 2x"]["requests"]
    )


@pytest.mark.full
def test_requests_are_sent_when_they_are_due_however_slow_the_answers(fake):
    fake.pause_s = 0.4
    arrivals = [k / 20 for k in range(20)]

    async def play():
        with load.server([]) as (address, _):
            async with load.aiohttp.ClientSession(address) as session:
                client = load.Client(session, SAMPLES)
                return await client.play(arrivals, steady(1.0))

    played = asyncio.run(play())
    sent = [at - fake.times[0] for at in fake.times]
    assert sent[-1] == pytest.approx(0.95, abs=0.3)  # one after the other would take eight seconds
    answered = [outcome for outcome, _ in played if outcome.latency_ms is not None]
    assert answered and all(outcome.latency_ms >= 400 for outcome in answered)


def test_what_was_lost_against_alpha_1_counts_texts_that_both_answered():
    def row(policy, right):
        return {"policy": policy, "profile": "day", "right": right}

    rows = [row("stock", [True, True, True, None]), row("floor", [True, False, None, True])]
    stock, floor = (load._with_loss(r, rows, 400) for r in rows)
    assert floor["against_stock"]["n"] == 2 and floor["against_stock"]["points"] == -50
    assert "against_stock" not in stock and floor["right"] == "10-1"


def test_a_text_that_is_asked_often_is_one_text():
    """Twelve answers to three texts, of which one is always lost: no narrower than three answers."""
    lost, kept = [[True, True, False] * times for times in (1, 4)], [[True] * 3 * times for times in (1, 4)]
    found = []
    for right, stock in zip(lost, kept):
        rows = [
            {"policy": "stock", "profile": "x", "right": stock},
            {"policy": "floor", "profile": "x", "right": right},
        ]
        found.append(load._with_loss(rows[1], rows, 3)["against_stock"])
    assert [said["n"] for said in found] == [3, 12] and [said["texts"] for said in found] == [3, 3]
    assert found[0]["points"] == found[1]["points"] == pytest.approx(-100 / 3)
    assert found[0]["ci95"] == pytest.approx(found[1]["ci95"])


def test_the_simulator_is_told_what_was_measured():
    played = [(Outcome(k / 4, 100.0, 1.0), 6) for k in range(40)]
    rungs = [Rung(1.0, 100.0), Rung(0.9, 20.0)]
    slow = load.simulated(rungs, "stock", 500.0, played, 3, bursts(2, 12), scale=2.0)
    fast = load.simulated(rungs, "stock", 500.0, played, 3, bursts(2, 12), scale=1.0)
    assert slow["violations"] > fast["violations"] == 0  # 400 ms of work every 250, or 200
    assert slow["answered"] == 40


def test_unknown_policies_and_profiles_are_refused(monkeypatch, capsys):
    for option in ("--policies", "--profiles"):
        monkeypatch.setattr("sys.argv", ["load", option, "best"])
        with pytest.raises(SystemExit):
            load.main()
        assert "best" in capsys.readouterr().err


def test_memory_that_grows_is_told_from_memory_that_jumps():
    draw, seconds = random.Random(0), [10.0 * k for k in range(360)]
    leak = soak.growth([(at, 900 + at / 36 + draw.gauss(0, 3)) for at in seconds])  # 100 MiB an hour
    assert leak["ci95"][0] < 100 < leak["ci95"][1] and leak["ci95"][1] - leak["ci95"][0] < 10
    jump = soak.growth([(at, 900 + 40 * (at > 3300) + draw.gauss(0, 3)) for at in seconds])
    assert abs(jump["mib_an_hour"]) < 10
    young = soak.growth([(at, 2 * at if at < 600 else 1200.0) for at in seconds])  # a process that starts
    assert young["mib_an_hour"] == 0
    assert soak.growth([(0.0, 900.0), (10.0, 901.0)])["mib_an_hour"] is None


def test_a_process_that_ended_before_it_was_looked_at_has_no_memory(monkeypatch):
    ended = subprocess.Popen(["true"])
    ended.wait()
    monkeypatch.setattr(soak, "processes", lambda parent: {os.getpid(): "here", ended.pid: "ended"})
    seen = soak.Soak(os.getpid())

    async def look():
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(seen.watch(0.01), 0.05)

    asyncio.run(look())
    assert list(seen.memory) == [os.getpid()] and list(seen.content()["growth"]) == ["process 0"]


@pytest.mark.full
def test_a_soak_counts_what_became_of_every_request(fake, tmp_path, monkeypatch):
    given = ["--output", str(tmp_path), "--seconds", "2", "--rate", "40", "--every-s", "0.05"]
    monkeypatch.setattr("sys.argv", ["soak", *given, "--", "--replicas", "2"])
    monkeypatch.setattr(soak, "replica_processes", lambda parent: [parent])
    soak.main()
    result = json.loads((tmp_path / "results" / "soak.json").read_text())
    found = result["statuses"]
    assert fake.started == [["--replicas", "2"]] and result["killed"] is None  # one replica is not killed
    assert result["requests"] == sum(found.values()) > 50 and found["429"] > 0 and found["500"] > 0
    assert len(result["memory"]) == 1 and result["growth"]["process 0"]["last_mib"] > 10
    assert result["left_in_the_house"] == 3


@pytest.mark.full
def test_a_server_that_does_not_start_is_told(monkeypatch):
    monkeypatch.setattr(load, "_ready", lambda address: False)
    with (
        pytest.raises(RuntimeError, match="unrecognized arguments: --no-such-option\nStart it alone"),
        load.server(["--no-such-option"]),
    ):
        pass
