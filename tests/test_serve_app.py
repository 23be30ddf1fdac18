"""The HTTP application over tiny models, called in this process: no Ray, no network."""

import asyncio
import json
import logging
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import tiny

pytest.importorskip("fastapi", reason="the server needs FastAPI: pip install 'zsaa[serve]'")
pytest.importorskip("prometheus_client", reason="the server needs prometheus-client: pip install 'zsaa[serve]'")

from asgi import call
from prometheus_client.parser import text_string_to_metric_families

import zsaa
from zsaa.serve import lane as lanes
from zsaa.serve.app import House, build
from zsaa.serve.controller import Policy, Rung
from zsaa.serve.engine import Classifier, Completer, Wish
from zsaa.serve.lane import Job, Lane
from zsaa.serve.metrics import merged

TEXT = " ".join(f"w{3 + (7 * i) % 94}" for i in range(30))
CANARY = "w91 w92 w93 w94"
RUNGS = (Rung(1.0, 100.0), Rung(0.9, 50.0), Rung(0.7, 20.0))
TEMPLATE = "{% for m in messages %}{{ m['content'] }} {% endfor %}"


class Recorded(Lane):
    """A lane that says of how many tokens each of its batches was made, and when these requests came."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.batches, self.born = [], []

    async def take(self, jobs):
        self.batches.append([len(job.wish.ids) for job in jobs])
        self.born += [job.born for job in jobs]
        return await super().take(jobs)


@pytest.fixture(scope="module")
def engines():
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = TEMPLATE
    return {
        "tiny": Completer(tiny.make("llama"), tokenizer, max_tokens=120),
        "mood": Classifier(
            tiny.make("llama", "sequence-classification"), tiny.tokenizer(), 64, labels=("negative", "positive")
        ),
    }


@pytest.fixture
def serve(engines):
    """serve(rungs=..., **options) gives (app, house)."""
    pools = []

    def make(rungs=RUNGS[:1], p95_ms=60_000.0, admits=True, most=8, max_jobs=64, timeout_s=60.0, **options):
        pools.append(ThreadPoolExecutor(1))
        lanes = {}
        for name, engine in engines.items():
            lanes[name] = Recorded(engine, Policy(rungs, p95_ms, admits), pools[-1], 30, max_jobs, timeout_s, most)
        house = House(lanes, "r1")
        return build(house, **options), house

    yield make
    for pool in pools:
        pool.shutdown()


def ask(app, *arguments, **options):
    return asyncio.run(call(app, *arguments, **options))


def alone(engine, text, alpha, max_tokens):
    found = []
    engine.run([Wish(tuple(engine.encode(text)), max_tokens)], [alpha], lambda i, piece, reason: found.append(piece))
    return "".join(found)


def test_completions(serve, engines):
    app, _ = serve()
    body = {"prompt": TEXT, "max_tokens": 7, "temperature": 0}
    response = ask(app, "/v1/completions", body)
    said = response.json()
    assert response.status == 200 and said["object"] == "text_completion" and said["model"] == "tiny"
    (choice,) = said["choices"]
    assert choice["text"] == alone(engines["tiny"], TEXT, 1.0, 7) and choice["finish_reason"] == "length"
    assert choice["zsaa"] == {"alpha": 1.0, "mac_reduction": 1.0}
    assert said["usage"] == {"prompt_tokens": 30, "completion_tokens": 7, "total_tokens": 37}
    assert response.headers["x-zsaa-alpha"] == "1"


def test_a_request_asks_for_its_own_alpha_or_forbids_pruning(serve, engines):
    app, house = serve(rungs=RUNGS[2:])  # the server itself is at its floor
    body = {"prompt": TEXT, "max_tokens": 5, "temperature": 0}
    for more, alpha in (
        ({}, 0.7),
        ({"alpha": 0.8}, 0.8),
        ({"pruning": False}, 1.0),
        ({"alpha": 0.5, "pruning": False}, 1),
    ):
        (choice,) = ask(app, "/v1/completions", {**body, **more}).json()["choices"]
        assert choice["zsaa"]["alpha"] == alpha
        assert choice["text"] == alone(engines["tiny"], TEXT, alpha, 5)
        expected = zsaa.mac_reduction(engines["tiny"].model.config, 30, alpha)
        assert choice["zsaa"]["mac_reduction"] == pytest.approx(expected, abs=1e-3)
    assert house.lanes["tiny"].counts == {"answered": 4, "pruned": 2, "left": 0}


def test_several_prompts_are_one_batch(serve, engines):
    app, house = serve()
    prompts = [TEXT, "w3 w4", CANARY]
    said = ask(app, "/v1/completions", {"prompt": prompts, "max_tokens": 4, "temperature": 0}).json()
    assert [c["text"] for c in said["choices"]] == [alone(engines["tiny"], text, 1.0, 4) for text in prompts]
    assert house.lanes["tiny"].batches == [[30, 2, 4]]


def test_streams_carry_the_same_text(serve, engines):
    app, _ = serve()
    body = {
        "prompt": TEXT,
        "max_tokens": 6,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    response = ask(app, "/v1/completions", body)
    assert response.headers["content-type"].startswith("text/event-stream") and response.headers["x-zsaa-alpha"] == "1"
    *chunks, usage, done = response.events()
    assert done == "[DONE]" and usage["usage"]["completion_tokens"] == 6 and usage["choices"] == []
    assert len(chunks) > 3
    assert "".join(c["choices"][0]["text"] for c in chunks) == alone(engines["tiny"], TEXT, 1.0, 6)
    assert [c["choices"][0]["finish_reason"] for c in chunks] == [None] * (len(chunks) - 1) + ["length"]
    assert chunks[-1]["choices"][0]["zsaa"]["alpha"] == 1.0


def test_chats(serve, engines):
    app, _ = serve()
    messages = [{"role": "system", "content": "w3 w4"}, {"role": "user", "content": "w5 w6 w7"}]
    body = {"messages": messages, "max_completion_tokens": 5, "temperature": 0}
    said = ask(app, "/v1/chat/completions", body).json()
    expected = alone(engines["tiny"], "w3 w4 w5 w6 w7", 1.0, 5)
    assert said["choices"][0]["message"] == {"role": "assistant", "content": expected}
    assert said["object"] == "chat.completion" and said["usage"]["prompt_tokens"] == 5
    *chunks, done = ask(app, "/v1/chat/completions", {**body, "stream": True}).events()
    assert "".join(c["choices"][0]["delta"]["content"] for c in chunks) == expected
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    assert chunks[0]["object"] == "chat.completion.chunk"


def test_what_clients_always_send_changes_nothing(serve):
    app, _ = serve()
    plain = {"prompt": TEXT, "max_tokens": 3, "temperature": 0}
    neutral = {"presence_penalty": 0.0, "frequency_penalty": 0, "logit_bias": {}, "stop": None, "seed": None}
    more = {"logprobs": None, "suffix": None, "echo": False, "best_of": 1}
    bare, full = (ask(app, "/v1/completions", body).json() for body in (plain, {**plain, **neutral, **more}))
    assert bare["choices"] == full["choices"]
    said = [{"role": "system", "content": "w3 w4"}, {"role": "user", "content": "w5 w6"}]
    parts = [{"type": "text", "text": "w5 "}, {"type": "text", "text": "w6"}]
    newer = [{"role": "developer", "content": "w3 w4"}, {"role": "user", "content": parts}]
    chat = {"max_tokens": 3, "temperature": 0}
    old = ask(app, "/v1/chat/completions", {**chat, "messages": said}).json()
    neutral |= {"response_format": {"type": "text"}, "logprobs": False}
    new = ask(app, "/v1/chat/completions", {**chat, **neutral, "messages": newer}).json()
    assert old["choices"] == new["choices"]


def test_classifications(serve, engines):
    app, _ = serve()
    texts = [TEXT, "w3 w4 w5", " ".join(["w9"] * 80)]
    response = ask(app, "/classify", {"input": texts, "alpha": 0.8})
    engine = engines["mood"]
    for text, row in zip(texts, response.json()["data"]):
        ids = engine.encode(text)[:64]
        assert list(row["logits"].values()) == pytest.approx(engine.run([ids], [0.8])[0], abs=1e-6)
        assert row["label"] == max(row["logits"], key=row["logits"].get)
        assert row["zsaa"]["alpha"] == 0.8
    assert [row["truncated"] for row in response.json()["data"]] == [False, False, True]


def test_the_queue_lowers_alpha_and_calm_raises_it(serve):
    app, house = serve(rungs=RUNGS, p95_ms=250.0, admits=False, most=2)

    async def rush():
        body = {"input": TEXT}
        responses = await asyncio.gather(*(call(app, "/classify", body) for _ in range(12)))
        return [response.json()["data"][0]["zsaa"]["alpha"] for response in responses]

    alphas = asyncio.run(rush())
    assert min(alphas) == 0.7
    lane = house.lanes["mood"]
    lane.controller.state = type(lane.controller.state)(rung=2)
    now = lane.clock()
    for k in range(20):
        lane.controller.look(now + k, lane.pending)
    assert lane.controller.alpha == 1.0 and lane.pending == 0


def test_beyond_the_floor_requests_are_told_to_come_again(serve):
    app, house = serve(rungs=(Rung(1.0, 9000.0), Rung(0.7, 4000.0)), p95_ms=10_000.0)

    async def rush():
        return await asyncio.gather(*(call(app, "/classify", {"input": TEXT}) for _ in range(8)))

    responses = asyncio.run(rush())
    refused = [response for response in responses if response.status == 429]
    assert sorted({response.status for response in responses}) == [200, 429] and len(refused) == 6
    assert all(int(response.headers["retry-after"]) >= 1 for response in refused)
    assert refused[0].json()["error"]["type"] == "rate_limit_error"
    assert ask(app, "/metrics").body.decode().count("zsaa:requests_refused_total{") == 2
    assert house.lanes["mood"].counts["refused"] == 6 and house.lanes["mood"].jobs == {}


@pytest.mark.parametrize("path, body", [("/classify", {"input": TEXT}), ("/v1/completions", {"prompt": TEXT})])
def test_where_the_house_is_full_no_text_is_cut_into_tokens_first(serve, engines, path, body, monkeypatch):
    app, house = serve(rungs=RUNGS, p95_ms=1000.0)
    cut = []
    for name, engine in engines.items():
        encode = engine.encode
        monkeypatch.setattr(engine, "encode", lambda text, encode=encode: cut.append(text) or encode(text))
        house.lanes[name].jobs[0] = Job(Wish((1,)), None, 1000.0, 0.0)
    response = ask(app, path, body)
    assert response.status == 429 and int(response.headers["retry-after"]) == 20 and not cut
    assert sum(lane.counts["refused"] for lane in house.lanes.values()) == 1
    for lane in house.lanes.values():
        lane.jobs.clear()
    assert ask(app, path, body).status == 200 and len(cut) == 1


def test_who_is_being_cut_into_tokens_is_before_who_knocks_later(serve, engines, monkeypatch):
    app, house = serve(rungs=(Rung(1.0, 1000.0),), p95_ms=3000.0)
    lane, engine, free = house.lanes["mood"], engines["mood"], threading.Event()
    encode = engine.encode
    monkeypatch.setattr(engine, "encode", lambda text: free.wait() and encode(text))
    text = " ".join(["w5"] * 15)  # half of a request of reference length

    async def rush():
        sent = [asyncio.ensure_future(call(app, "/classify", {"input": text})) for _ in range(12)]
        while lane.counts["refused"] == 0:
            await asyncio.sleep(0.001)
        inside, door = len(lane.jobs), lane.door
        free.set()
        return inside, door, [response.status for response in await asyncio.gather(*sent)]

    inside, door, statuses = asyncio.run(rush())
    assert inside == 0 and door > 1 and statuses.count(200) >= 3 and statuses.count(429) >= 3
    assert lane.door == 0


def test_a_batch_is_answered_while_the_next_one_runs(serve):
    app, house = serve(most=1, admits=False)
    lane, seen = house.lanes["mood"], []
    answered, classify, free = lane._answered, lane._classify, threading.Semaphore(1)

    def tell(job):
        seen.append((len(lane.batches), len(lane.jobs)))
        answered(job)
        free.release()

    def held(*arguments):
        assert free.acquire(timeout=10), "the batch before was not answered meanwhile"
        classify(*arguments)

    lane._answered, lane._classify = tell, held

    async def rush():
        return await asyncio.gather(*(call(app, "/classify", {"input": TEXT}) for _ in range(3)))

    assert [response.status for response in asyncio.run(rush())] == [200] * 3
    assert seen == [
        (2, 2),
        (3, 1),
        (3, 0),
    ]  # batches begun, and who is still in the house: not those who have an answer


def test_no_more_are_let_in_than_there_is_room_for(serve):
    app, _ = serve(max_jobs=2, admits=False)

    async def rush():
        return await asyncio.gather(*(call(app, "/classify", {"input": TEXT}) for _ in range(5)))

    assert sorted(response.status for response in asyncio.run(rush())) == [200, 200, 429, 429, 429]


@pytest.mark.parametrize("stream", [False, True])
def test_who_leaves_frees_the_place(serve, engines, stream):
    app, house = serve(most=1)
    lane, seen_to_leave = house.lanes["tiny"], threading.Event()
    write = lane._write

    def held(jobs, tell):  # behind the first token, until it is known who has left
        write(jobs, lambda job, event: (tell(job, event), seen_to_leave.wait(10)))

    lane._write = held

    async def run():
        leave, body = asyncio.Event(), {"prompt": TEXT, "max_tokens": 80, "temperature": 0, "stream": stream}
        first = asyncio.ensure_future(call(app, "/v1/completions", body, leave=leave))
        second = asyncio.ensure_future(call(app, "/v1/completions", body, leave=leave))
        while not lane.running or len(lane.jobs) < 2:
            await asyncio.sleep(0.001)
        (job,) = [job for key, job in lane.jobs.items() if key in lane.running]
        leave.set()
        while not job.gone:
            await asyncio.sleep(0.001)
        seen_to_leave.set()
        await asyncio.gather(first, second, return_exceptions=True)
        last = await call(app, "/v1/completions", {"prompt": TEXT, "max_tokens": 2, "temperature": 0})
        return job, last

    job, last = asyncio.run(run())
    assert last.status == 200 and job.tokens < 80
    assert lane.jobs == {} and lane.running == set()
    assert len(lane.batches) <= 2  # the one that waited was never run


@pytest.mark.parametrize("alpha", [1.0, 0.7])
def test_a_batch_is_made_when_the_model_is_free_of_those_that_have_waited_longest(serve, alpha):
    """A classifier's are of like lengths."""
    app, house = serve(rungs=(Rung(alpha, 1.0),), admits=False, most=3)
    lane, lengths = house.lanes["mood"], [30, 28, 4, 3, 3, 30, 29]

    async def rush():
        free = threading.Event()
        lane.worker.submit(free.wait)
        texts = [" ".join(["w5"] * length) for length in lengths]
        sent = [asyncio.ensure_future(call(app, "/classify", {"input": text})) for text in texts]
        while len(lane.jobs) < 7:
            await asyncio.sleep(0.001)
        free.set()
        return [response.status for response in await asyncio.gather(*sent)]

    assert asyncio.run(rush()) == [200] * 7
    assert lane.born == sorted(lane.born) and len(lane.born) == 7  # nobody is overtaken
    for batch in lane.batches:
        assert len(batch) <= 3 and max(batch) * len(batch) <= 1.25 * sum(batch)
    assert len(lane.batches) < 7


def test_what_takes_too_long_is_given_up(serve):
    app, house = serve(timeout_s=0.02)
    response = ask(app, "/v1/completions", {"prompt": TEXT, "max_tokens": 90, "temperature": 0})
    assert response.status == 504 and response.json()["error"]["code"] == "timeout"
    assert house.lanes["tiny"].jobs == {}


BAD = [
    ({"prompt": TEXT, "max_tokens": 0}, "max_tokens"),
    ({"prompt": TEXT, "max_tokens": True}, "max_tokens"),
    ({"prompt": TEXT, "alpha": 0}, "alpha"),
    ({"prompt": TEXT, "alpha": 1.5}, "alpha"),
    ({"prompt": TEXT, "alpha": "NaN"}, "alpha"),
    ({"prompt": TEXT, "temperature": -1}, "temperature"),
    ({"prompt": TEXT, "top_p": 0}, "top_p"),
    ({"prompt": TEXT, "n": 2}, "n"),
    ({"prompt": TEXT, "logit_bias": {"3": 1}}, "logit_bias"),
    ({"prompt": TEXT, "logprobs": 2}, "logprobs"),
    ({"prompt": TEXT, "echo": True}, "echo"),
    ({"prompt": TEXT, "guided": 1}, "does not know this field"),
    ({"prompt": [], "max_tokens": 1}, "prompt"),
    ({"prompt": ["w3"] * 17}, "prompt"),
    ({"prompt": ""}, "prompt"),
    ({"prompt": TEXT, "stop": ""}, "stop"),
    ({"prompt": TEXT, "stop": ["w3"] * 5}, "stop"),
    ({"prompt": TEXT, "max_tokens": 91}, "120 tokens at most"),
    ({"prompt": [TEXT, TEXT], "stream": True}, "one prompt at a time"),
    ({"max_tokens": 3}, "prompt"),
    (b"{", "body"),
    (b"[1]", "body"),
]


@pytest.mark.parametrize("body, named", BAD, ids=str)
def test_what_is_wrong_is_said_in_openai_s_shape(serve, body, named):
    app, house = serve()
    response = ask(app, "/v1/completions", body)
    error = response.json()["error"]
    assert response.status == 400 and set(error) == {"message", "type", "param", "code"}
    assert named in error["message"] or str(error["param"]).startswith(named)
    assert TEXT not in response.body.decode() and house.lanes["tiny"].jobs == {}


def test_short_prompts_teach_nothing_wrong_of_long_ones(engines):
    """What a request writes costs the same whatever it read: counted by what was read alone, a few short prompts made
    long ones seem six times as dear, which were then turned away."""

    def took_ms(read, written):
        return 2.0 * read + 30.0 * written

    whole = took_ms(256, 16)
    policy = Policy((Rung(1.0, whole),), 3000.0)
    lane = Lane(engines["tiny"], policy, None, 256, written=took_ms(0, 16) / whole)
    assert lane.work(256, 16) == pytest.approx(1)
    for _ in range(20):
        lane.controller.ran([(1.0, lane.work(20, 16))], took_ms(20, 16))
    assert lane.controller.watch.costing(0.0, 0.0).takes(policy.rungs[0], lane.work(512, 32)) == pytest.approx(
        2 * whole
    )
    wish = Wish((1,) * 256, 16)
    assert lane.job(wish, None, 0.0).work == pytest.approx(1)


def test_health_answers_probes_that_want_no_body(serve):
    app, _ = serve()
    assert ask(app, "/health", method="HEAD").status == 200


def test_models_that_are_not_there(serve):
    app, _ = serve()
    response = ask(app, "/v1/completions", {"prompt": TEXT, "model": "mood"})
    assert response.status == 404 and response.json()["error"]["code"] == "model_not_found"
    assert ask(app, "/nothing").json()["error"]["type"] == "invalid_request_error"
    listed = ask(app, "/v1/models").json()["data"]
    assert [model["id"] for model in listed] == ["tiny", "mood"]
    assert ask(app, "/v1/models/mood").json() == listed[1]
    response = ask(app, "/v1/models/none")
    assert response.status == 404 and response.json()["error"]["code"] == "model_not_found"


def test_bodies_are_bounded_told_or_not(serve):
    app, _ = serve(max_body=2000)
    long = {"prompt": "w3 " * 2000}
    assert ask(app, "/v1/completions", long).status == 413
    assert ask(app, "/v1/completions", long, headers={"content-length": "10"}).status == 413
    pieces = [b'{"prompt": "'] + [b"w3 " * 200] * 5 + [b'"}']
    assert ask(app, "/v1/completions", b"", chunks=pieces).status == 413
    assert ask(app, "/v1/completions", {"prompt": "w3 w4", "max_tokens": 1}).status == 200


def test_the_key_is_asked_for(serve):
    app, _ = serve(key="s3cret")
    body = {"input": TEXT}
    for sent in (
        {},
        {"authorization": "Bearer s3cre"},
        {"authorization": "s3cret"},
        {"authorization": "Bearer s3crét"},
    ):
        headers = {k: v.encode().decode("latin-1") for k, v in sent.items()}
        response = ask(app, "/classify", body, headers=headers)
        assert response.status == 401 and response.json()["error"]["code"] == "invalid_api_key"
    assert ask(app, "/classify", body, headers={"authorization": "Bearer s3cret"}).status == 200
    assert {path: ask(app, path).status for path in ("/health", "/", "/metrics", "/live", "/v1/models")} == {
        "/health": 200, "/": 200, "/metrics": 401, "/live": 401, "/v1/models": 401,
    }  # fmt: skip


def test_other_web_pages_cannot_use_it(serve):
    app, _ = serve(hosts=("127.0.0.1", "localhost"))
    assert ask(app, "/health", headers={"host": "evil.example:8000"}).status == 403
    assert ask(app, "/health", headers={"host": "localhost:8000"}).status == 200
    response = ask(app, "/classify", json.dumps({"input": TEXT}).encode(), headers={"content-type": "text/plain"})
    assert response.status == 415
    page = ask(app, "/")
    assert page.status == 200 and b"page.js" in page.body
    assert "default-src 'none'" in page.headers["content-security-policy"]


def test_a_failure_is_told_by_its_kind_and_no_text_is_logged(serve, monkeypatch, caplog, capfd):
    app, house = serve()
    caplog.set_level(logging.DEBUG)
    assert ask(app, "/classify", {"input": CANARY}).status == 200
    assert ask(app, "/v1/completions", {"prompt": CANARY, "max_tokens": 2}).status == 200
    assert ask(app, "/v1/completions", {"prompt": CANARY, "alpha": 7}).status == 400

    def fail(*arguments):
        raise RuntimeError(f"cannot read {CANARY}")

    monkeypatch.setattr(house.lanes["mood"].engine, "run", fail, raising=False)
    response = ask(app, "/classify", {"input": CANARY})
    assert response.status == 500 and response.json()["error"]["type"] == "server_error"
    assert "RuntimeError" in caplog.text
    logged = caplog.text + "".join(capfd.readouterr()) + response.body.decode() + ask(app, "/metrics").body.decode()
    assert "w92" not in logged
    assert house.lanes["mood"].jobs == {}


def test_metrics_have_vllm_s_names_and_ours(serve):
    app, _ = serve(rungs=RUNGS[2:])
    ask(app, "/v1/completions", {"prompt": TEXT, "max_tokens": 4, "temperature": 0})
    ask(app, "/v1/completions", {"prompt": TEXT, "max_tokens": 4, "temperature": 0, "pruning": False})
    page = ask(app, "/metrics")
    assert "version=" in page.headers["content-type"]  # without it Prometheus 3 does not read the page
    families = {f.name: f for f in text_string_to_metric_families(page.body.decode())}

    def value(name, sample=None, **labels):
        labels = {"model_name": "tiny", "replica": "r1", **labels}
        (found,) = [s.value for s in families[name].samples if s.name == (sample or name) and s.labels == labels]
        return found

    assert value("vllm:num_requests_running") == value("vllm:num_requests_waiting") == 0
    assert value("vllm:time_to_first_token_seconds", "vllm:time_to_first_token_seconds_count") == 2
    assert value("vllm:prompt_tokens", "vllm:prompt_tokens_total") == 60
    assert value("vllm:generation_tokens", "vllm:generation_tokens_total") == 8
    assert value("vllm:request_success", "vllm:request_success_total", finished_reason="length") == 2
    assert value("zsaa:alpha") == 0.7 and value("zsaa:requests_below_one_ratio") == 0.5
    spent = value("zsaa:prefill_macs", "zsaa:prefill_macs_total")
    assert spent < value("zsaa:prefill_macs_stock", "zsaa:prefill_macs_stock_total") < 2 * spent


def test_metrics_of_several_replicas_are_one_page(serve):
    pages = []
    for name in ("a", "b"):
        _, house = serve()
        pages.append((name, house.metrics.text()))
    text = merged(pages)
    assert text.count("# TYPE vllm:num_requests_running gauge") == 1
    assert 'vllm:num_requests_running{model_name="mood",replica="b"} 0.0' in text


def test_the_live_numbers(serve):
    app, _ = serve(rungs=RUNGS)
    ask(app, "/classify", {"input": TEXT})
    lanes = ask(app, "/live").json()["replicas"]["r1"]
    assert lanes["mood"]["answered"] == 1 and lanes["mood"]["alpha"] == 1.0 and lanes["mood"]["floor"] == 0.7
    assert lanes["tiny"]["p95_ms"] is None


def test_memory_is_given_back_now_and_then(serve, monkeypatch):
    app, house = serve()
    trims = []
    monkeypatch.setattr(lanes, "trim", lambda: trims.append(1))

    async def three():
        for _ in range(3):
            assert (await call(app, "/classify", {"input": "w3 w4"})).status == 200

    asyncio.run(three())
    assert not trims
    monkeypatch.setattr(lanes, "TRIM_S", 0.0)
    asyncio.run(three())
    assert len(trims) >= 2  # the last one comes after its answer


def test_a_soak_loses_nobody_and_leaves_nothing_behind(serve):
    """Waves of requests of every kind, some of whose clients leave: each is answered or refused, and all places are
    free."""
    app, house = serve(rungs=RUNGS, p95_ms=300.0)

    async def wave(k):
        leave = asyncio.Event()
        kinds = [("/classify", {"input": TEXT}), ("/v1/completions", {"prompt": TEXT, "max_tokens": 2})]
        kinds.append(("/v1/completions", {"prompt": TEXT, "max_tokens": 2, "stream": True}))
        stay = [call(app, *kinds[(k + i) % 3]) for i in range(9)]
        left = [call(app, *kinds[i], leave=leave) for i in range(3)]
        asyncio.get_running_loop().call_later(0.002 * (k % 4), leave.set)
        answers = await asyncio.gather(*stay)
        await asyncio.gather(*left, return_exceptions=True)
        return [response.status for response in answers]

    async def soak():
        statuses = [status for k in range(12) for status in await wave(k)]
        await asyncio.sleep(0.05)
        return statuses, [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]

    statuses, tasks = asyncio.run(soak())
    assert len(statuses) == 108 and set(statuses) <= {200, 429} and statuses.count(200) > 50
    assert tasks == []
    for lane in house.lanes.values():
        assert (lane.jobs, lane.running, lane.pending) == ({}, set(), 0)
