"""The HTTP face: OpenAI's paths, a classifier's, and those for people and machines that watch. No Ray in here.

Text goes to the model and back to who sent it, and nowhere else: it is in no log, no metric, no error message."""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel, ValidationError
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse

from zsaa.serve.engine import Classifier, Completer, Wish
from zsaa.serve.guard import Guard
from zsaa.serve.lane import Busy, Event, Failed, Job, Lane, TooSlow
from zsaa.serve.metrics import Metrics, merged
from zsaa.serve.refusals import Gone, Refused, answer_errors
from zsaa.serve.wishes import Chat, Classification, Completion, Written

LOG = logging.getLogger("zsaa.serve")
HERE = Path(__file__).parent
TICK_S = 0.25  # how often the controllers look, so that alpha returns to 1 without a request
LONG_TOKEN, USUAL_TOKEN = 8, 4  # characters: few texts have the first to a token, English has the second
CHAT_TOKENS = 256  # of an answer, where a chat names no limit

Gather = Callable[[], Awaitable[list[tuple[str, str, dict]]]]  # (replica, its metrics, its live numbers) of all


@dataclass(frozen=True)
class Answer:
    job: Job
    text: str
    logits: tuple[float, ...]
    reason: str


class House:
    """The lanes by the names of their models, and what the paths below do with them."""

    def __init__(
        self,
        lanes: dict[str, Lane],
        replica: str = "local",
        alive: Callable[[], bool] = lambda: True,
        clerks: int = 1,
    ):
        self.lanes, self.replica, self.alive, self.started = lanes, replica, alive, int(time.time())
        self.metrics = Metrics(lanes)
        # Threads for texts; where the model runs in this process, one: each more takes the interpreter from it.
        self.clerk = ThreadPoolExecutor(clerks, thread_name_prefix="tokens")

    def snapshot(self) -> tuple[str, str, dict]:
        return self.replica, self.metrics.text(), {name: lane.live() for name, lane in self.lanes.items()}

    def lane(self, kind: type, name: str | None) -> tuple[str, Lane]:
        """The lane of the model called `name`, or the first of its kind."""
        found = {key: lane for key, lane in self.lanes.items() if isinstance(lane.engine, kind)}
        if name is not None and name not in found:
            known = ", ".join(found) or "none"
            raise Refused(404, f"there is no such model here for this path; there is: {known}.", code="model_not_found")
        if not found:
            raise Refused(404, "this server has no model for this path.", code="model_not_found")
        key = name or next(iter(found))
        return key, found[key]

    def _full(self, name: str, busy: Busy) -> Refused:
        self.metrics.refused.labels(name).inc()
        message = f"the server is full, even at its lowest alpha. Try again in {busy} s."
        return Refused(429, message, {"Retry-After": str(busy)}, kind="rate_limit_error", code="rate_limit_exceeded")

    async def encoded(self, name: str, texts: Sequence[str]) -> list[list[int]]:
        """Each text as tokens. Refused at once, where all of them would be for their length alone."""
        lane, loop = self.lanes[name], asyncio.get_running_loop()
        most = lane.engine.max_tokens
        least, usual = (sum(min(len(text) / letters, most) for text in texts) for letters in (LONG_TOKEN, USUAL_TOKEN))
        try:
            lane.knock(least)
        except Busy as busy:
            raise self._full(name, busy) from None
        with lane.entering(usual):
            return [await loop.run_in_executor(self.clerk, lane.engine.encode, text) for text in texts]

    async def events(self, name: str, job: Job) -> AsyncIterator[Event]:
        """A job's events, counted. Refused, where it is not let in or not answered."""
        lane, first = self.lanes[name], True
        try:
            async with aclosing(lane.ask(job)) as events:
                async for event in events:
                    seconds = lane.clock() - job.born
                    if first:
                        self.metrics.first(name, seconds)
                    if event.reason is not None:
                        self.metrics.last(name, job, seconds, event.reason)
                    first = False
                    yield event
        except Busy as busy:
            raise self._full(name, busy) from None
        except TooSlow as limit:
            message = f"the request took longer than the {limit} s that are allowed. Ask for fewer tokens."
            raise Refused(504, message, kind="timeout_error", code="timeout") from None
        except Failed as failure:
            number = secrets.token_hex(4)
            LOG.error("request %s: the model failed with %s", number, failure)
            raise Refused(500, f"the model failed; the server's log has it as {number}.", kind="server_error") from None

    async def answer(self, name: str, job: Job) -> Answer:
        text, logits = [], ()
        async with aclosing(self.events(name, job)) as events:
            async for event in events:
                text.append(event.piece)
                logits = event.logits
                if event.reason is not None:
                    return Answer(job, "".join(text), logits, event.reason)
        raise AssertionError("a job ends with a reason or an exception")


def dialled(job: Job) -> dict:
    """What the answer says of its alpha."""
    spent, stock = job.spent
    return {"alpha": job.alpha, "mac_reduction": round(stock / spent, 3)}


def usage(jobs: Sequence[Job]) -> dict:
    read, written = sum(len(job.wish.ids) for job in jobs), sum(job.tokens for job in jobs)
    return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}


def _header(jobs: Sequence[Job]) -> dict[str, str]:
    return {"X-Zsaa-Alpha": ",".join(f"{job.alpha:g}" for job in jobs)}


async def while_there(request: Request, work: Awaitable):
    """The result of `work`, which is cancelled when the client leaves (Gone): its place is free at once."""

    async def left() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.ensure_future(work), asyncio.ensure_future(left())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            raise Gone
        return tasks[0].result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _all(works: Sequence[Awaitable]) -> list:
    """All results; if one fails the others are cancelled first."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _wish(lane: Lane, ids: Sequence[int], body: Written, max_tokens: int) -> Wish:
    limit = lane.engine.max_tokens
    if not ids:
        raise Refused(400, "the prompt is empty. Send at least one word.", param="prompt")
    if len(ids) + max_tokens > limit:
        message = (
            f"this model reads and writes {limit} tokens at most; the prompt has {len(ids)}, and {max_tokens} "
            "are to be written (max_tokens). Shorten one of them."
        )
        raise Refused(400, message, code="context_length_exceeded")
    seed = secrets.randbits(63) if body.seed is None else body.seed % (1 << 63)
    return Wish(tuple(ids), max_tokens, body.temperature, body.top_p, seed, body.stops)


async def _write(house: House, request: Request, body: Written, prompts: Sequence[Sequence[int]], limit, chat: bool):
    """The response to a completion or a chat, streamed or not."""
    name, lane = house.lane(Completer, body.model)
    wishes = [_wish(lane, ids, body, limit(len(ids), lane.engine.max_tokens)) for ids in prompts]
    jobs = [lane.job(wish, body.asked) for wish in wishes]
    kind = "chat.completion" if chat else "text_completion"
    number = f"{'chatcmpl' if chat else 'cmpl'}-{secrets.token_hex(12)}"
    head = {"id": number, "created": int(time.time()), "model": name}
    if body.stream:
        if len(jobs) > 1:
            raise Refused(400, "one prompt at a time can be streamed. Send several requests.", param="prompt")
        return await _stream(house, request, body, name, jobs[0], {**head, "object": kind + ".chunk" * chat}, chat)
    answers = await while_there(request, _all([house.answer(name, job) for job in jobs]))
    choices = [
        {
            "index": index,
            **({"message": {"role": "assistant", "content": a.text}} if chat else {"text": a.text}),
            "finish_reason": a.reason,
            "logprobs": None,
            "zsaa": dialled(a.job),
        }
        for index, a in enumerate(answers)
    ]
    return JSONResponse({**head, "object": kind, "choices": choices, "usage": usage(jobs)}, headers=_header(jobs))


async def _stream(house: House, request: Request, body: Written, name: str, job: Job, head: dict, chat: bool):
    """Server-sent events. The first piece is waited for, so that a refusal has its own status."""
    events = house.events(name, job)
    try:
        first = await while_there(request, anext(events))
    except BaseException:
        await events.aclose()
        raise

    def chunk(event: Event, begins: bool) -> str:
        delta = {**({"role": "assistant"} if begins else {}), "content": event.piece}
        choice = {"index": 0, **({"delta": delta} if chat else {"text": event.piece}), "finish_reason": event.reason}
        if event.reason is not None:
            choice["zsaa"] = dialled(job)
        return _sse({**head, "choices": [choice]})

    async def lines() -> AsyncIterator[str]:
        async with aclosing(events):
            try:
                yield chunk(first, True)
                async for event in events:
                    yield chunk(event, False)
            except Refused as refused:
                yield _sse(refused.content)
                return
        if body.stream_options is not None and body.stream_options.include_usage:
            yield _sse({**head, "choices": [], "usage": usage([job])})
        yield "data: [DONE]\n\n"

    return StreamingResponse(lines(), media_type="text/event-stream", headers=_header([job]))


def _sse(content: dict) -> str:
    return f"data: {json.dumps(content)}\n\n"


async def _classify(house: House, request: Request, body: Classification) -> Response:
    name, lane = house.lane(Classifier, body.model)
    engine, born = lane.engine, lane.clock()
    samples = await house.encoded(name, body.texts)
    if not all(samples):
        raise Refused(400, "a text is empty. Send at least one word.", param="input")
    jobs = [lane.job(Wish(tuple(ids[: engine.max_tokens])), body.asked, born) for ids in samples]
    answers = await while_there(request, _all([house.answer(name, job) for job in jobs]))
    data = []
    for index, (answer, ids) in enumerate(zip(answers, samples)):
        best = max(range(len(answer.logits)), key=answer.logits.__getitem__)
        cut = len(ids) > engine.max_tokens
        said = {"index": index, "label": engine.labels[best], "logits": dict(zip(engine.labels, answer.logits))}
        data.append({**said, "truncated": cut, "zsaa": dialled(answer.job)})
    content = {"object": "list", "model": name, "data": data, "usage": usage(jobs)}
    return JSONResponse(content, headers=_header(jobs))


def _posted(app: FastAPI, path: str, kind: type[BaseModel], answer: Callable[..., Awaitable[Response]]) -> None:
    """A path whose body is one `kind`, read in one step: FastAPI's way to an argument costs as much as all that this
    server does for a request."""

    async def respond(request: Request) -> Response:
        try:
            body = kind.model_validate_json(await request.body())
        except ValidationError as error:
            raise RequestValidationError(error.errors(include_input=False, include_context=False)) from None
        return await answer(request, body)

    app.add_route(path, respond, methods=["POST"])


def _watched(app: FastAPI, house: House, gather: Gather) -> None:
    @app.api_route("/health", methods=["GET", "HEAD"])
    async def health() -> dict:
        if not house.alive():
            raise Refused(503, "the model's process has ended. Start the server again.", kind="server_error")
        return {"status": "ok"}

    @app.get("/metrics")
    async def metrics() -> Response:
        pages = await gather()
        text = merged([(replica, page) for replica, page, _ in pages])
        return Response(text, headers={"content-type": CONTENT_TYPE_LATEST})

    @app.get("/live")
    async def live() -> dict:
        return {"replicas": {replica: numbers for replica, _, numbers in await gather()}}

    def described(name: str) -> dict:
        lane = house.lanes[name]
        about = {
            "path": "/v1/completions" if isinstance(lane.engine, Completer) else "/classify",
            "max_tokens": lane.engine.max_tokens,
            "rungs": [{"alpha": rung.alpha, "ms": round(rung.ms, 3)} for rung in lane.controller.policy.rungs],
            "reference_tokens": lane.reference,
        }
        return {"id": name, "object": "model", "created": house.started, "owned_by": "zsaa", "zsaa": about}

    @app.get("/v1/models")
    async def models() -> dict:
        return {"object": "list", "data": [described(name) for name in house.lanes]}

    @app.get("/v1/models/{name}")
    async def model(name: str) -> dict:
        if name not in house.lanes:
            known = ", ".join(house.lanes)
            raise Refused(404, f"there is no such model here; there is: {known}.", code="model_not_found")
        return described(name)

    def page(file: str, kind: str) -> Callable[[], Awaitable[FileResponse]]:
        async def respond() -> FileResponse:
            return FileResponse(HERE / file, media_type=f"text/{kind}")

        return respond

    for path, file, kind in (
        ("/", "page.html", "html"),
        ("/page.js", "page.js", "javascript"),
        ("/page.css", "page.css", "css"),
    ):
        app.add_api_route(path, page(file, kind), response_model=None)


def build(
    house: House,
    key: str | None = None,
    hosts: Sequence[str] = (),
    max_body: int = 1 << 20,
    gather: Gather | None = None,
):
    """The ASGI application over `house`. key, hosts, max_body: see Guard. gather: the snapshots of all replicas."""

    async def alone() -> list[tuple[str, str, dict]]:
        return [house.snapshot()]

    @asynccontextmanager
    async def lifespan(app: FastAPI):
        async def tick() -> None:
            while True:
                await asyncio.sleep(TICK_S)
                for lane in house.lanes.values():
                    lane.look()

        ticking = asyncio.ensure_future(tick())
        yield
        ticking.cancel()

    app = FastAPI(title="zsaa", docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan)
    answer_errors(app)

    async def completions(request: Request, body: Completion):
        name, _ = house.lane(Completer, body.model)
        prompts = await house.encoded(name, body.prompts)
        return await _write(house, request, body, prompts, lambda n, most: body.max_tokens, chat=False)

    async def chats(request: Request, body: Chat):
        _, lane = house.lane(Completer, body.model)
        if not getattr(lane.engine.tokenizer, "chat_template", None):
            raise Refused(400, "this model has no chat template. Use /v1/completions.", code="no_chat_template")
        said = [message.plain for message in body.messages]
        ids = await asyncio.to_thread(lane.engine.chat, said)
        asked = body.max_completion_tokens or body.max_tokens

        def limit(n: int, most: int) -> int:
            return asked or max(1, min(CHAT_TOKENS, most - n))

        return await _write(house, request, body, [ids], limit, chat=True)

    async def classify(request: Request, body: Classification):
        return await _classify(house, request, body)

    _posted(app, "/classify", Classification, classify)
    _posted(app, "/v1/completions", Completion, completions)
    _posted(app, "/v1/chat/completions", Chat, chats)
    _watched(app, house, gather or alone)
    return Guard(app, key, hosts, max_body)
