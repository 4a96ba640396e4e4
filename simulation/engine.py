"""The scheduler of a simulated engine: who runs, who waits, who is parked, and the tokens each of them gets.

It lives on the event loop of the API server; the EngineCore process stands for it outside.  A request is in one of
four places: parked (the engine sleeps, is paused or hangs: in no gauge, as in vLLM), waiting, running, or gone.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterable

from simulation.knobs import Knobs
from simulation.metrics import Metrics
from simulation.prefix_cache import PrefixCache

LEVEL_NAMES = {1: "weights_offloaded", 2: "discard_all"}


class EngineDead(Exception):
    """The engine process died: the request fails with a 500."""


class QueueFull(Exception):
    """Past --max-num-queued-reqs: the request is refused with a 503."""


class Job:
    """One request in the engine: `n` sequences that advance together."""

    __slots__ = ("aborted", "arrived_at", "n", "queued", "started", "waiter")

    def __init__(self, n: int) -> None:
        self.n = n
        self.aborted = False
        self.queued = False             # it is past the gate: no pause parks it any more
        self.started = False            # it has its place among the running
        self.waiter: asyncio.Future[None] | None = None
        self.arrived_at = time.monotonic()

    def wake(self) -> None:
        if self.waiter is not None and not self.waiter.done():
            self.waiter.set_result(None)


class Engine:
    """All methods belong to the event loop's thread."""

    def __init__(self, knobs: Knobs, metrics: Metrics, *, max_num_seqs: int, max_num_queued_reqs: int | None,
                 on_chunk: Callable[[int], None]) -> None:
        self.knobs = knobs
        self.metrics = metrics
        self.sleep_level = 0
        self.weights_lost = False       # by a sleep of level 2, until they are loaded again: it talks nonsense
        self.paused = False             # new requests are parked
        self.frozen = False             # and the running ones stand still
        self.dead = False
        self.gone = False               # ended by SIGTERM: who is in flight waits for ever
        self._max_num_seqs = max_num_seqs
        self._max_num_queued_reqs = max_num_queued_reqs
        self._on_chunk = on_chunk       # told how many tokens a request has got, after each
        self._jobs: set[Job] = set()
        self._running: set[Job] = set()
        self._waiting: deque[Job] = deque()
        self._drained = asyncio.Event()
        self._cache = PrefixCache(knobs.prefix_cache_tokens)
        self._prefilled_at = 0.0        # by the loop's clock: when the prompts that are here are computed
        self._awake_tags: set[str] = set()      # what is back of an engine that is woken in parts

    @property
    def running_count(self) -> int:
        return sum(job.n for job in self._running)

    @property
    def waiting_count(self) -> int:
        return sum(job.n for job in self._waiting)

    @property
    def unfinished_count(self) -> int:
        return sum(job.n for job in self._jobs)

    def check_admission(self, n: int = 1) -> None:
        """Raises EngineDead or QueueFull, before a response is begun."""
        if self.dead:
            raise EngineDead
        limit = self._max_num_queued_reqs
        if limit is not None and self.unfinished_count + n > limit:
            self.metrics.rejections += 1
            raise QueueFull

    async def generate(self, prompt_tokens: int, tokens: int, finish: str, n: int = 1,
                       prompt: str = "") -> AsyncGenerator[tuple[str, str | None], None]:
        """The text of each token with the finish reason of the last: `finish`, or abort when a sleep ended it.

        Raises EngineDead when the engine dies meanwhile.  Closing the iterator frees its place at once.
        """
        job = Job(n)
        self._jobs.add(job)
        reason: str | None = None
        try:
            await self._admit(job)
            self.metrics.prompt_tokens += prompt_tokens
            await self._wait(job, self.knobs.first_token_s + self._prefill_s(prompt, prompt_tokens))
            due = asyncio.get_running_loop().time()
            for number in range(1, tokens + 1):
                await self._stand_still(job)
                if job.aborted:
                    reason = "abort"
                    yield "", reason
                    return
                reason = finish if number == tokens else None
                self.metrics.token(n, since=job.arrived_at if number == 1 else None)
                yield "!" if self.weights_lost else token_text(number), reason
                self._on_chunk(number)
                if reason is None:
                    due += 1 / self.knobs.tokens_per_s if self.knobs.tokens_per_s > 0 else 0
                    await self._wait(job, due - asyncio.get_running_loop().time())
                    due = min(due, asyncio.get_running_loop().time())   # a knob that was turned counts from now on
        except EngineDead:
            reason = "error"
            raise
        finally:
            self._leave(job, reason)

    def _prefill_s(self, prompt: str, tokens: int) -> float:
        """Until a prompt is computed, after those that came before it."""
        hits = self._cache.hits(prompt, tokens)
        self.metrics.prefix_hits += hits
        now = asyncio.get_running_loop().time()
        if self.knobs.prefill_tokens_per_s <= 0:
            return 0.0
        self._prefilled_at = max(now, self._prefilled_at) + (tokens - hits) / self.knobs.prefill_tokens_per_s
        return self._prefilled_at - now

    async def compute(self, prompt_tokens: int) -> None:
        """What a pooling request costs: one pass.  Raises EngineDead."""
        async for _ in self.generate(prompt_tokens, 1, "stop"):
            pass

    async def _admit(self, job: Job) -> None:
        while not job.started:
            if self.dead:
                raise EngineDead
            if job.aborted:
                return
            if not job.queued and not (self.paused or self.gone or self.knobs.hang):
                job.queued = True
                self._waiting.append(job)
                self._schedule()
            if not job.started:
                await self._wait(job)

    def _schedule(self) -> None:
        """Moves the first of the waiting to the running while there is room.  A job too big for all runs alone."""
        while self._waiting:
            job = self._waiting[0]
            if self._running and self.running_count + job.n > self._max_num_seqs:
                return
            self._waiting.popleft()
            self._running.add(job)
            job.started = True
            job.wake()

    async def _stand_still(self, job: Job) -> None:
        while not self.dead and not job.aborted and (self.frozen or self.gone or self.knobs.hang):
            await self._wait(job)
        if self.dead:
            raise EngineDead

    async def _wait(self, job: Job, delay_s: float | None = None) -> None:
        """Until `delay_s` is over (for ever without one) or the job is woken; a short turn of the loop at the least."""
        if delay_s is not None and delay_s <= 0:
            await asyncio.sleep(0)
            return
        loop = asyncio.get_running_loop()
        job.waiter = loop.create_future()
        timer = loop.call_later(delay_s, job.wake) if delay_s is not None else None
        try:
            await job.waiter
        finally:
            job.waiter = None
            if timer is not None:
                timer.cancel()

    def _leave(self, job: Job, reason: str | None) -> None:
        self._jobs.discard(job)
        self._running.discard(job)
        if job in self._waiting:
            self._waiting.remove(job)
        if reason is not None:
            self.metrics.finished(reason, since=job.arrived_at)
        self._schedule()
        if not self._running and not self._waiting:
            self._drained.set()

    def _wake_all(self) -> None:
        for job in list(self._jobs):
            job.wake()

    async def pause(self, mode: str) -> None:
        """Parks new requests; `abort` ends those in flight, `wait` returns when they are done, `keep` freezes them."""
        in_flight = [*self._running, *self._waiting]
        self._drained.clear()
        self.paused = True
        self.frozen = mode == "keep"
        if mode == "abort":
            for job in in_flight:
                job.aborted = True
        self._wake_all()
        if in_flight and mode != "keep":
            await self._drained.wait()

    def resume(self) -> None:
        self.paused = self.frozen = False
        self._schedule()
        self._wake_all()

    async def sleep(self, level: int, mode: str) -> None:
        await self.pause(mode)
        self.sleep_level = level

    def wake_up(self, tags: Iterable[str] | None) -> bool:
        """True when it is fully awake: a wake of the weights alone leaves it asleep."""
        if tags is not None:
            self._awake_tags |= {*tags}
            if not {"weights", "kv_cache"} <= self._awake_tags:
                return self.sleep_level == 0
        self._awake_tags = set()
        self.sleep_level = 0
        self.resume()
        return True

    def set_knobs(self, knobs: Knobs) -> None:
        self.knobs = knobs
        self._wake_all()

    def die(self) -> None:
        self.dead = True
        self._wake_all()

    def vanish(self) -> None:
        self.gone = True


def token_text(number: int) -> str:
    return "simulated token 1" if number == 1 else f" token {number}"
