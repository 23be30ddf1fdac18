"""The queue before one model: who comes in, at which alpha a batch runs, and who has left meanwhile.

A batch is put together when the model is free, of those that have waited longest; it runs in the host's one worker
thread, and tells each request's own asyncio queue what happens to it. Everything else in here runs on the event loop.
(Ray Serve's @serve.batch puts the next batch together while the last one runs: of whoever came within its first
milliseconds, which under load is one request.)
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import ctypes
import gc
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import NoReturn

from zsaa.serve.controller import Controller, Policy, retry_after
from zsaa.serve.engine import Classifier, Engine, Wish

GATHER_S = 0.005  # that the first of a batch waits for others
TRIM_S = 10.0  # between two returns of free memory to the system
PADDED = 1.25  # columns of a classifier's batch, over its tokens, at most: padding costs as much as tokens do


def _hand_on(said: list[tuple[Job, Event | Exception]]) -> None:
    for job, event in said:
        job.events.put_nowait(event)


def settle() -> None:
    """Once all is loaded: what is there stays, so the collector need not look at it again. It would, for half a second
    at a time, and nothing else runs meanwhile."""
    gc.collect()
    gc.freeze()
    atexit.register(gc.unfreeze)  # what libraries tidy up at the end is in there


def trim() -> None:
    """Gives the system back what glibc's allocator keeps of freed tensors: texts of ever other lengths leave holes, and
    a server held a third more memory after half an hour. Does nothing where there is no glibc."""
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


class Busy(Exception):
    """No room now. The argument: whole seconds after which to try again (429, Retry-After)."""


class TooSlow(Exception):
    """The request took longer than the server allows."""


class Failed(Exception):
    """The model failed. The argument: the kind of error, which never holds any text."""


@dataclass(frozen=True)
class Event:
    """piece: text that was added. logits: of a classifier. reason: why it ended, None while it goes on."""

    piece: str = ""
    logits: tuple[float, ...] = ()
    reason: str | None = None


@dataclass
class Job:
    """One request in the house. asked: an alpha of its own, None for what the controller says. work: in requests of
    reference length. alpha: what it got, known from the first event on. spent: multiply-accumulates of its prefill, and
    what they would be at alpha = 1, known from the last. tokens: how many were written."""

    wish: Wish
    asked: float | None
    work: float
    born: float
    events: asyncio.Queue = field(default_factory=asyncio.Queue)
    alpha: float | None = None
    spent: tuple[float, float] | None = None
    gone: bool = False
    tokens: int = 0


class Lane:
    """One engine, its controller and its queue.

    reference: tokens of a request that counts as one. max_jobs: in the house at a time. timeout_s: for one request.
    batch: requests that run at once, at most.
    """

    def __init__(
        self,
        engine: Engine,
        policy: Policy,
        worker: Executor,
        reference: int,
        max_jobs: int = 256,
        timeout_s: float = 60.0,
        batch: int = 8,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.engine, self.worker, self.reference, self.clock = engine, worker, reference, clock
        self.controller = Controller(policy, batch=batch)
        self.max_jobs, self.timeout_s, self.batch = max_jobs, timeout_s, batch
        self.queue: deque[Job] = deque()
        self.drain: asyncio.Task | None = None
        self.jobs: dict[int, Job] = {}
        self.running: set[int] = set()
        self.door = 0.0  # work of those whose text is being cut into tokens
        self.counts: Counter = Counter()
        self.trimmed = clock()

    @property
    def pending(self) -> float:
        """Work in the house and at its door: who was let in to be cut into tokens has no place in the queue yet, but
        will come before whoever knocks now."""
        return self.door + self._inside

    @property
    def _inside(self) -> float:
        return sum(job.work for job in self.jobs.values())

    @property
    def waiting(self) -> int:
        return len(self.jobs) - len(self.running)

    def look(self) -> float:
        """What the controller says now; called by batches, arrivals, and a ticker, so that alpha returns in silence."""
        return self.controller.look(self.clock(), self.pending)

    def job(self, wish: Wish, asked: float | None, born: float | None = None) -> Job:
        """born: when the request came, by this lane's clock; None: now."""
        born = self.clock() if born is None else born
        return Job(wish, asked, max(1, len(wish.ids)) / self.reference, born)

    def knock(self, tokens: float) -> None:
        """Busy, if a request of so many tokens at least would not be let in now. To ask this before its text is cut
        into tokens spares the process in which the model runs most of what a refusal costs."""
        work, now = tokens / self.reference, self.clock()
        reading = self.controller.watch.costing(now, self.pending + work)
        retry = retry_after(self.controller.policy, self.controller.state, reading, work)
        if retry is not None:
            self.controller.watch.arrived(now, work)
            self._refuse(retry)

    @contextlib.contextmanager
    def entering(self, tokens: float) -> Iterator[None]:
        """While a request of so many tokens or so is at the door, it counts."""
        work = tokens / self.reference
        self.door += work
        try:
            yield
        finally:
            self.door = max(0.0, self.door - work)

    def _refuse(self, seconds: int) -> NoReturn:
        self.counts["refused"] += 1
        raise Busy(seconds)

    async def ask(self, job: Job) -> AsyncIterator[Event]:
        """The events of a job, the last with a reason. Busy, TooSlow, Failed. Closing it, or cancelling who reads it,
        takes the job out of the queue, or out of its batch."""
        retry = self.controller.arrive(job.born, job.work, self._inside + job.work, self.door)
        if retry is None and len(self.jobs) >= self.max_jobs:
            retry = 1
        if retry is not None:
            self._refuse(retry)
        self.jobs[id(job)] = job
        self.queue.append(job)
        if self.drain is None or self.drain.done():
            self.drain = asyncio.ensure_future(self._drain())
        try:
            while True:
                left = job.born + self.timeout_s - self.clock()
                try:
                    event = await asyncio.wait_for(job.events.get(), max(0.001, left))
                except asyncio.TimeoutError:
                    raise TooSlow(f"{self.timeout_s:g}") from None
                if isinstance(event, Exception):
                    raise event
                if event.reason is not None:
                    self._answered(job)
                yield event
                if event.reason is not None:
                    return
        finally:
            job.gone = True
            self.jobs.pop(id(job), None)
            self.running.discard(id(job))
            self.counts["left"] += job.alpha is None

    def _answered(self, job: Job) -> None:
        now = self.clock()
        self.controller.watch.answered(now, 1000 * (now - job.born))
        job.spent = self.engine.spent(len(job.wish.ids), job.alpha)
        self.counts["answered"] += 1
        self.counts["pruned"] += job.alpha < 1

    async def _drain(self) -> None:
        """Batch after batch. What a classifier said is handed on once the next batch runs: to answer a batch takes the
        event loop long enough to leave a GPU idle."""
        await asyncio.sleep(GATHER_S)
        said: list[tuple[Job, Event | Exception]] = []
        while jobs := self._next():
            running = asyncio.ensure_future(self.take(jobs))
            await asyncio.sleep(0)  # it is on its way
            _hand_on(said)
            said = await running
        _hand_on(said)

    def _next(self) -> list[Job]:
        """The next batch, in the order of arrival: `batch` requests, fewer where they would pad one another or take too
        much of the promise together."""
        self.look()
        room, found, longest, tokens = self.controller.batch_work(self.clock()), [], 0, 0
        reads = isinstance(self.engine, Classifier)  # and writes nothing, for which batches would pay all the same
        while self.queue and len(found) < self.batch:
            job = self.queue[0]
            if not job.gone:
                room -= job.work
                longest, tokens = max(longest, len(job.wish.ids)), tokens + len(job.wish.ids)
                if found and reads and (room < 0 or longest * (len(found) + 1) > PADDED * tokens):
                    break
                found.append(job)
            self.queue.popleft()
        return found

    async def take(self, jobs: list[Job]) -> list[tuple[Job, Event | Exception]]:
        """Run a batch; what it said that is still to be handed on."""
        alpha = self.look()
        for job in jobs:
            job.alpha = alpha if job.asked is None else job.asked
        ids = {id(job) for job in jobs}
        self.running |= ids
        loop, said = asyncio.get_running_loop(), []

        def tell(job: Job, event: Event) -> None:
            if isinstance(self.engine, Classifier):
                said.append((job, event))
            else:
                loop.call_soon_threadsafe(job.events.put_nowait, event)

        try:
            ran = await loop.run_in_executor(self.worker, self._run, jobs, tell)
            if ran is not None:
                self.controller.ran(*ran)
        except Exception as error:  # whatever a model raises; its words may hold a user's text, its kind does not
            said = [(job, Failed(type(error).__name__)) for job in jobs]
        finally:
            self.running -= ids
        for job, _ in said:
            self.jobs.pop(id(job), None)  # the next batch's alpha does not wait for them
        return said

    def _run(self, jobs: list[Job], tell: Callable[[Job, Event], None]) -> tuple[list, float] | None:
        """In the worker thread. What ran, and the milliseconds that it took."""
        jobs = [job for job in jobs if not job.gone]  # some may have left while another lane had the worker
        if not jobs:
            return None
        begun = self.clock()
        if isinstance(self.engine, Classifier):
            self._classify(jobs, tell)
        else:
            self._write(jobs, tell)
        took_ms = 1000 * (self.clock() - begun)
        if self.clock() - self.trimmed > TRIM_S:
            trim()
            self.trimmed = self.clock()
        return [(job.alpha, job.work) for job in jobs], took_ms

    def _classify(self, jobs: list[Job], tell: Callable[[Job, Event], None]) -> None:
        found = self.engine.run([job.wish.ids for job in jobs], [job.alpha for job in jobs])
        for job, logits in zip(jobs, found):
            tell(job, Event(logits=tuple(logits), reason="stop"))

    def _write(self, jobs: list[Job], tell: Callable[[Job, Event], None]) -> None:

        def told(index: int, piece: str, reason: str | None) -> None:
            tell(jobs[index], Event(piece, reason=reason))

        def gone(index: int) -> bool:
            jobs[index].tokens += 1
            return jobs[index].gone

        self.engine.run([job.wish for job in jobs], [job.alpha for job in jobs], told, gone)

    def live(self) -> dict:
        """What the page plots."""
        p95 = self.controller.watch.reading(self.clock(), self.pending).p95_ms
        costs = self.controller.watch.costs
        return {
            "running": len(self.running),
            "waiting": max(0, self.waiting),
            "pending": round(self.pending, 3),
            "alpha": self.controller.alpha,
            "floor": self.controller.policy.floor,
            "p95_ms": None if p95 is None else round(p95, 1),
            "pace": round(costs.pace, 4),
            "beside_ms": round(costs.beside_ms, 1),
            "batch_ms": round(costs.batch_ms, 1),
            "trust": round(self.controller.state.trust, 3),
            "promise_ms": self.controller.policy.p95_ms,
            **{name: self.counts[name] for name in ("answered", "pruned", "refused", "left")},
        }
