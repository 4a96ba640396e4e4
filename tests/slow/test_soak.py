"""An hour's work in minutes: streams and plain requests, clients that leave, engines that die.  Nothing may grow.

SOAK_SECONDS (default 300) says for how long; a few seconds show that the test itself works.
"""

from __future__ import annotations

import http.client
import json
import os
import random
import signal
import statistics
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from instances import processes
from tests.daemon import HANG_S, JSON, Daemon
from tests.support import wait_until

SECONDS = float(os.environ.get("SOAK_SECONDS", "300"))
CLIENTS = 16
LEAVING = 0.05
KILL_EVERY_S = 4.0          # with some 100 requests a second and 4 in an engine: about 1 % meet its death
WARM_UP = 0.25              # of the time
pytestmark = pytest.mark.timeout(SECONDS * 3 + 300)
EXPLAINED = {"engine_died", "upstream_error", "engine_unreachable", "engine_stopped"}


@dataclass(frozen=True)
class Usage:
    """Of the daemon's own processes: the worker, and its relay."""

    threads: int
    descriptors: int
    memory_bytes: int


class Load:
    """Clients that ask until told to stop, and what became of their requests."""

    def __init__(self, daemon: Daemon, models: list[str]) -> None:
        self._daemon = daemon
        self._models = models
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self.outcomes: Counter[str] = Counter()
        self.unexplained: list[str] = []

    @contextmanager
    def running(self) -> Iterator[None]:
        clients = [threading.Thread(target=self._ask_on, args=(seed,)) for seed in range(CLIENTS)]
        clients.append(threading.Thread(target=self._kill_on))
        for client in clients:
            client.start()
        try:
            yield
        finally:
            self._stop.set()
            for client in clients:
                client.join(HANG_S)
            assert not any(client.is_alive() for client in clients)

    def _ask_on(self, seed: int) -> None:
        chance = random.Random(seed)
        while not self._stop.is_set():
            outcome, detail = self._ask(chance)
            with self._lock:
                self.outcomes[outcome] += 1
                if outcome == "unexplained":
                    self.unexplained.append(detail)

    def _ask(self, chance: random.Random) -> tuple[str, str]:
        stream, leave = chance.random() < 0.6, chance.random() < LEAVING
        body = {"model": chance.choice(self._models), "prompt": "x" * chance.choice([10, 1000, 100_000]),
                "max_tokens": chance.choice([2, 20, 60]), "stream": stream}
        connection = http.client.HTTPConnection("127.0.0.1", self._daemon.port, timeout=HANG_S)
        try:
            connection.request("POST", "/v1/completions", json.dumps(body).encode(), JSON)
            if leave:
                if stream and chance.random() < 0.5:
                    connection.getresponse().read(100)
                return "left", ""
            answer = connection.getresponse()
            return judge(answer.status, answer.read(), stream)
        except (http.client.IncompleteRead, ConnectionError) as error:
            return "cut", repr(error)       # visible: no end where one was due
        except OSError as error:
            return "unexplained", repr(error)
        finally:
            connection.close()

    def _kill_on(self) -> None:
        chance = random.Random(1)
        while not self._stop.wait(min(KILL_EVERY_S, SECONDS / 8)):
            engines = [pid for pid in self._daemon.engine_processes()
                       if "::EngineCore" in processes.command_line(pid)]
            if engines:
                victim = chance.choice(engines)
                try:
                    os.kill(victim, signal.SIGKILL)
                except ProcessLookupError:
                    continue
                with self._lock:
                    self.outcomes["engines killed"] += 1


def judge(status: int, body: bytes, stream: bool) -> tuple[str, str]:
    if status == 200 and stream:
        if b'"error"' in body:
            return "told", ""
        return ("good", "") if body.endswith(b"data: [DONE]\n\n") else ("unexplained", repr(body[-200:]))
    if status == 200:
        return "good", str(json.loads(body)["choices"][0]["text"])
    try:
        error = json.loads(body)["error"]
    except ValueError:
        return "unexplained", f"{status} {body!r}"
    if status in (500, 502, 503) and (error["code"] in EXPLAINED or error["code"] in (500, 503)):
        return "told", ""
    return "unexplained", f"{status} {error}"


def usage(daemon: Daemon) -> Usage:
    worker = psutil.Process(daemon.worker_pid)
    relays = [child for child in worker.children() if "relay_child" in processes.command_line(child.pid)]
    return Usage(threads=worker.num_threads(), descriptors=worker.num_fds() + sum(one.num_fds() for one in relays),
                 memory_bytes=sum(one.memory_info().rss for one in [worker, *relays]))


def window(samples: list[Usage]) -> Usage:
    return Usage(*(int(statistics.median(getattr(sample, name) for sample in samples))
                   for name in ("threads", "descriptors", "memory_bytes")))


def test_nothing_grows(tmp_path: Path) -> None:
    patch = {"instances.instance.FAILURES_ALLOWED": 1_000_000, "instances.instance.BACKOFF_LIMIT_S": 0.2}
    with Daemon(tmp_path, patch=patch) as daemon:
        models = ["one", "two", "three", "four"]
        for model in models:
            daemon.create(model, timeout=0, sim={"tokens_per_s": 100})
        load, samples = Load(daemon, models), list[Usage]()
        with load.running():
            ends = time.monotonic() + SECONDS
            looks = max(20, int(SECONDS))
            for look in range(looks):
                due = ends - SECONDS * (1 - (look + 1) / looks)
                wait_until(lambda due=due: time.monotonic() >= due, SECONDS + 60)
                samples.append(usage(daemon))
        print(f"\n{dict(load.outcomes)}; {window(samples[:5])} to {window(samples[-5:])}")  # noqa: T201
        wait_until(lambda: all(one["in_flight"] == 0 for one in daemon.instances()))
        daemon.remove()
    assert load.unexplained == []
    assert load.outcomes["good"] > 10 * CLIENTS
    assert load.outcomes["engines killed"] > 0
    assert_steady(samples)


def assert_steady(samples: list[Usage]) -> None:
    """The last quarter against the first one after the warm-up."""
    warm = samples[int(len(samples) * WARM_UP):]
    quarter = max(5, len(warm) // 4)
    early, late = window(warm[:quarter]), window(warm[-quarter:])
    assert late.threads <= early.threads + 4, (early, late)
    assert late.descriptors <= early.descriptors * 1.1 + 20, (early, late)
    assert late.memory_bytes <= early.memory_bytes * 1.1 + 8_000_000, (early, late)
