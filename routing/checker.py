"""Watches the servers, and reads the load of instances: one thread of its own, where each server has its own tasks.

A server that hangs holds up nothing but its own task, until the time limit of one question.  What is found goes to
the fleet and the balancer, which decide what it means.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import threading
import time
from collections.abc import Callable, Coroutine, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from routing.balancer import Balancer
from routing.health import Health, Status, check_limit_s
from routing.policies import Reading
from routing.questions import Answer, Conversation, NoAnswer
from routing.remote import Check, Origin
from routing.scrape import Gauges, gauges, offered

log = logging.getLogger("vllm_server.checker")

LOOK_S = 1.0            # how often it is looked which servers and instances there are
SCRAPE_S = 2.0          # between two readings of one server's load
SCRAPES_A_SECOND = 100  # over all servers: many of them are read less often
MODELS_EVERY = 5        # checks; that often /v1/models is asked too
REFRESH_LIMIT_S = 1.0
APART_S = 0.002         # between the first checks of two servers
RESOLVERS = 32          # threads that look names up: a name server that hangs must not hold up the other names


class LocalTarget(NamedTuple):
    """An instance that serves.  `watched`: its load decides something, so it is read all the time."""

    id: str
    port: int
    capacity: int
    watched: bool


class Checker:
    """`start` and `close` bound the life of its thread.  Every other method may be called from any thread."""

    def __init__(self, balancer: Balancer, instances: Callable[[], Iterable[LocalTarget]] = tuple, *,
                 clock: Callable[[], float] = time.monotonic, draw: random.Random | None = None) -> None:
        self._balancer = balancer
        self._fleet = balancer.fleet
        self._instances = instances
        self._clock = clock
        self._draw = draw or random.Random()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="checker", daemon=True)
        self._wake = asyncio.Event()
        self._hurry: dict[str, asyncio.Event] = {}
        self._tasks: dict[tuple[str, str], asyncio.Task[None]] = {}
        self._closing = False
        self._scrape_s = SCRAPE_S
        self._refreshed_at = -SCRAPE_S

    def start(self) -> None:
        self._fleet.on_change, self._fleet.on_failure = self.look_again, self.hurry
        self._thread.start()

    def close(self) -> None:
        """Ends the thread, in the middle of whatever it waits for."""
        self._closing = True
        if self._thread.ident is not None:
            self.look_again()
            self._thread.join()
        if not self._loop.is_closed():
            self._loop.close()

    def look_again(self) -> None:
        """There are other servers than before."""
        self._soon(self._wake.set)

    def hurry(self, url: str) -> None:
        """Check this server soon: a request has failed there."""
        if (event := self._hurry.get(url)) is not None:
            self._soon(event.set)

    def ask_all(self, origins: Mapping[str, Origin], path: str, limit_s: float) -> dict[str, Answer]:
        """Ask several at once and wait for it; those that do not answer within the limit are not in the result."""
        if self._closing or not self._thread.is_alive():
            return {}
        done = asyncio.run_coroutine_threadsafe(_ask_all(origins, path, limit_s), self._loop)
        with contextlib.suppress(TimeoutError):
            return done.result(limit_s + 5)
        return {}

    def refresh(self) -> None:
        """Read the load of the instances now that are not read all the time.  Blocks for up to REFRESH_LIMIT_S."""
        if self._clock() - self._refreshed_at < SCRAPE_S:
            return
        self._refreshed_at = self._clock()
        others = {one.id: Origin.local(one.port) for one in self._instances() if not one.watched}
        for instance_id, answer in self.ask_all(others, "/metrics", REFRESH_LIMIT_S).items() if others else ():
            found = gauges(answer.body) if answer.status == 200 else None
            if found is not None:
                self._balancer.note_reading(instance_id, Reading(self._clock(), found.running, found.waiting,
                                                                 cache_usage=found.cache_usage))

    def _soon(self, callback: Callable[[], object]) -> None:
        with contextlib.suppress(RuntimeError):     # it is closed already
            self._loop.call_soon_threadsafe(callback)

    # --- on its thread --------------------------------------------------------------------------------------------

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.set_default_executor(ThreadPoolExecutor(RESOLVERS, "resolve"))
        try:
            self._loop.run_until_complete(self._supervise())
        finally:
            tasks = asyncio.all_tasks(self._loop)
            for task in tasks:
                task.cancel()
            self._loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
            asyncio.set_event_loop(None)

    async def _supervise(self) -> None:
        while not self._closing:
            try:
                self._reconcile()
            except Exception:
                log.exception("a look at the servers failed; it goes on")
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_S):
                    await self._wake.wait()
            self._wake.clear()

    def _reconcile(self) -> None:
        """A task for everything that is to be watched, and none for anything else."""
        instances = list(self._instances())
        self._balancer.note_locals({one.id: one.capacity for one in instances})
        wanted: dict[tuple[str, str], Callable[[float], Coroutine[Any, Any, None]]] = {}
        urls = self._fleet.urls()
        self._scrape_s = max(SCRAPE_S, len(urls) / SCRAPES_A_SECOND)
        for url in urls:
            wanted["check", url] = lambda delay_s, url=url: self._check_on(url, delay_s)      # type: ignore[misc]
            wanted["load", url] = lambda delay_s, url=url: self._read_on(url, delay_s)        # type: ignore[misc]
        for one in instances:
            if one.watched:
                wanted["instance", one.id] = lambda delay_s, one=one: self._read_instance(one, delay_s)  # type: ignore[misc]
        for key in self._tasks.keys() - wanted.keys():
            self._tasks.pop(key).cancel()
            self._hurry.pop(key[1], None)
        started = 0
        for key, watch in wanted.items():
            if key not in self._tasks or self._tasks[key].done():
                self._tasks[key] = self._loop.create_task(watch(started * APART_S))
                started += 1

    async def _check_on(self, url: str, delay_s: float) -> None:
        await asyncio.sleep(delay_s)
        hurry = self._hurry.setdefault(url, asyncio.Event())
        count = 0
        while (origin := self._fleet.origin(url)) is not None and (health := self._fleet.health(url)):
            interval_s = self._fleet.config.health_check_interval_s
            with_models = count % MODELS_EVERY == 0 or health.status is not Status.UP or hurry.is_set()
            check = await self._check(origin, check_limit_s(interval_s), with_models)
            self._fleet.note_check(url, check)
            count += 1
            await self._pause(url, hurry, interval_s)

    async def _pause(self, url: str, hurry: asyncio.Event, interval_s: float) -> None:
        """Until the next check; a hurried one comes after a part of the interval at the earliest."""
        hurry.clear()
        health = self._fleet.health(url) or Health()
        wait_s = health.next_check_s(interval_s, self._draw)
        least_s = min(wait_s, interval_s * 0.1)
        await asyncio.sleep(least_s)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(wait_s - least_s):
                await hurry.wait()

    async def _check(self, origin: Origin, limit_s: float, with_models: bool) -> Check:
        try:
            async with Conversation(origin) as server:
                answer = await server.get("/health", limit_s)
                if answer.status >= 400 and answer.status != 404:       # 404: it has no such route, but it lives
                    return Check(False, f"/health answers {answer.status}")
                found = None
                if with_models:
                    answer = await server.get("/v1/models", limit_s)
                    if answer.status != 200:
                        return Check(False, f"/v1/models answers {answer.status}")
                    found = offered(answer.body, self._fleet.name)
                return Check(True, offered=found)
        except NoAnswer as error:
            return Check(False, str(error))

    async def _read_on(self, url: str, delay_s: float) -> None:
        await asyncio.sleep(delay_s)
        while (origin := self._fleet.origin(url)) is not None:
            if (health := self._fleet.health(url)) and health.status in (Status.UP, Status.SUSPECT):
                before = self._fleet.in_flight(url)
                found = await _gauges(origin, check_limit_s(self._scrape_s * 2))
                if found is not None:
                    self._fleet.note_load(url, found, (before + self._fleet.in_flight(url)) / 2)
            await asyncio.sleep(self._scrape_s * self._draw.uniform(0.9, 1.1))

    async def _read_instance(self, one: LocalTarget, delay_s: float) -> None:
        await asyncio.sleep(delay_s)
        while True:
            found = await _gauges(Origin.local(one.port), check_limit_s(SCRAPE_S * 2))
            if found is not None:
                self._balancer.note_reading(one.id, Reading(self._clock(), found.running, found.waiting,
                                                            cache_usage=found.cache_usage))
            await asyncio.sleep(SCRAPE_S * self._draw.uniform(0.9, 1.1))


async def _gauges(origin: Origin, limit_s: float) -> Gauges | None:
    try:
        async with Conversation(origin) as server:
            answer = await server.get("/metrics", limit_s)
    except NoAnswer:
        return None
    return gauges(answer.body) if answer.status == 200 else None


async def _ask_all(origins: Mapping[str, Origin], path: str, limit_s: float) -> dict[str, Answer]:
    async def ask(origin: Origin) -> Answer | None:
        try:
            async with Conversation(origin) as server:
                return await server.get(path, limit_s)
        except NoAnswer:
            return None

    answers = await asyncio.gather(*(ask(origin) for origin in origins.values()))
    return {name: answer for name, answer in zip(origins, answers, strict=True) if answer is not None}
