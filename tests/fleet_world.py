"""A daemon with simulated servers on other 'machines': processes that are killed, hung and brought back under load.

Every server answers for the model `m`, and its answers say which one it was: their `model` is the server's own name.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import socket
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import aiohttp
import psutil
import requests

from tests.daemon import HANG_S, Daemon
from tests.simulator_harness import Simulator
from tests.support import wait_until

MODEL = "m"
PATH = "/v1/completions"


class SimulatedServer:
    """One simulator on one port, over several lives."""

    def __init__(self, folder: Path, name: str, capacity: int, seqs: int | None = None, **sim: Any) -> None:
        self.folder = folder
        self.name = name
        self.capacity = capacity                # max_concurrent_requests
        self._seqs = seqs or capacity           # --max-num-seqs
        self._sim = sim
        self._lives = 0
        self._claim = socket.socket()
        self._claim.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._claim.bind(("127.0.0.1", 0))      # never listens: it only keeps the port from others
        self.port = self._claim.getsockname()[1]
        self.simulator: Simulator | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Returns before it serves; `ready` waits for that."""
        self._lives += 1
        folder = self.folder / f"{self.name}-{self._lives}"
        folder.mkdir(parents=True)
        self._claim.close()
        self.simulator = Simulator(folder, "--port", str(self.port), "--served-model-name", self.name, MODEL,
                                   "--max-num-seqs", str(self._seqs), model=self.name, sim=self._sim,
                                   VLLM_SERVER_DEV_MODE="1")

    def ready(self) -> None:
        assert self.simulator is not None
        self.simulator.ready()

    def set(self, **knobs: Any) -> None:
        requests.post(f"{self.url}/sim", json=knobs, timeout=HANG_S).raise_for_status()

    def kill(self) -> None:
        """As a power cut."""
        if self.simulator is not None:
            self.resume()
            self.simulator.end()
            self.simulator = None

    def hang(self) -> None:
        """It takes connections and never answers."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> None:
        assert self.simulator is not None
        for process in self.simulator.family().values():
            with contextlib.suppress(psutil.NoSuchProcess):
                os.kill(process.pid, number)


class FleetWorld:
    """A context manager: the servers, and a daemon whose servers.toml lists them."""

    def __init__(self, folder: Path, servers: Sequence[SimulatedServer], *, interval_s: float = 1.0,
                 timeout_s: float = 10.0, env: dict[str, str] | None = None, entry: str | None = None) -> None:
        self.servers = {one.name: one for one in servers}
        self._interval_s = interval_s
        self._timeout_s = timeout_s
        folder.mkdir(parents=True, exist_ok=True)
        self.daemon = Daemon(folder / "daemon", env)
        self.daemon.folder.mkdir()
        if entry is not None:       # Python that runs the daemon in its own way
            self.daemon._argv[1:2] = ["-c", entry]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.daemon.port}"

    def write(self, names: Sequence[str]) -> None:
        """servers.toml with these servers."""
        self.write_text(self.text(names))

    def write_text(self, text: str) -> None:
        (self.daemon.folder / "servers.toml").write_text(text)

    def text(self, names: Sequence[str]) -> str:
        entries = "".join(f'  {{ url = "{one.url}", max_concurrent_requests = {one.capacity} }},\n'
                          for one in map(self.servers.__getitem__, names))
        return (f"[servers]\nservers = [\n{entries}]\n[config]\nhealth_check_interval = {self._interval_s}\n"
                f"request_timeout = {self._timeout_s}\nmax_retries = 3\n")

    def __enter__(self) -> Self:
        try:
            for one in self.servers.values():
                one.start()
            for one in self.servers.values():
                one.ready()
            self.write(list(self.servers))
            self.daemon.__enter__()
            wait_until(lambda: self.health() == dict.fromkeys(self.servers, "up"))
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 traceback: TracebackType | None) -> None:
        try:
            self.daemon.__exit__(kind, error, traceback)
        finally:
            self._end()

    def _end(self) -> None:
        for one in self.servers.values():
            one.kill()

    def load(self) -> dict[str, dict[str, Any]]:
        """The entries of /load-stats by server."""
        by_url = {one.url: name for name, one in self.servers.items()}
        return {by_url[entry["url"]]: entry for entry in self.daemon.get("/load-stats").json["servers"]}

    def health(self) -> dict[str, str]:
        return {name: entry["health"] for name, entry in self.load().items()}


# --- load -------------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Asked:
    """One request; times are seconds of the monotonic clock."""

    sent_at: float
    ended_at: float
    server: str                 # who answered; empty: nobody
    problem: str | None = None  # None: a good answer
    first_at: float | None = None

    @property
    def took_s(self) -> float:
        return self.ended_at - self.sent_at


@dataclass
class Load:
    """What a run of requests came to."""

    asked: list[Asked] = field(default_factory=list)

    @property
    def problems(self) -> list[Asked]:
        return [one for one in self.asked if one.problem is not None]

    def shares(self, begin: float = 0.0) -> Counter[str]:
        return Counter(one.server for one in self.asked if one.problem is None and one.ended_at >= begin)

    def between(self, begin: float, end: float) -> Load:
        """Those that were under way at some moment of it."""
        return Load([one for one in self.asked if one.sent_at <= end and one.ended_at >= begin])

    def worst_s(self) -> float:
        return max((one.took_s for one in self.asked), default=0.0)


async def ask(session: aiohttp.ClientSession, url: str, body: dict[str, Any]) -> Asked:
    sent_at = time.monotonic()
    first_at: float | None = None
    try:
        async with session.post(url + PATH, json=body) as response:
            data = b""
            async for piece in response.content.iter_any():
                first_at = first_at or time.monotonic()
                data += piece
            if response.status != 200:
                return Asked(sent_at, time.monotonic(), "", f"{response.status} {data[:300]!r}", first_at)
    except (aiohttp.ClientError, OSError, TimeoutError) as error:
        return Asked(sent_at, time.monotonic(), "", f"{type(error).__name__}: {error}", first_at)
    last = data.rpartition(b"\n\ndata: [DONE]")[0].rpartition(b"data: ")[2] if body.get("stream") else data
    return Asked(sent_at, time.monotonic(), str(json.loads(last)["model"]), None, first_at)


def body(tokens: int = 4, *, stream: bool = False, prompt: str = "x") -> dict[str, Any]:
    return {"model": MODEL, "prompt": prompt, "max_tokens": tokens, "stream": stream}


async def closed_loop(url: str, streams: int, seconds: float, tokens: int) -> Load:
    """So many clients, each of which asks for a stream, reads it and asks again."""
    load, end = Load(), time.monotonic() + seconds

    async def client(session: aiohttp.ClientSession) -> None:
        while time.monotonic() < end:
            load.asked.append(await ask(session, url, body(tokens, stream=True)))

    async with _session() as session:
        await asyncio.gather(*(client(session) for _ in range(streams)))
    return load


class OpenLoop:
    """Requests at a rate, whatever becomes of the earlier ones.  An async context manager: at its end all are over."""

    def __init__(self, url: str, rate: float, tokens: int = 4) -> None:
        self.load = Load()
        self._url = url
        self._rate = rate
        self._tokens = tokens
        self._draw = random.Random(1)
        self._going = True

    async def __aenter__(self) -> Self:
        self._session = _session()
        self._sender = asyncio.create_task(self._send())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._going = False
        await self._sender
        await self._session.close()

    async def _send(self) -> None:
        due, tasks = time.monotonic(), set[asyncio.Task[None]]()
        while self._going:
            due += self._draw.expovariate(self._rate)
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            task = asyncio.create_task(self._one())
            tasks.add(task)
            task.add_done_callback(tasks.discard)
        await asyncio.gather(*tasks)

    async def _one(self) -> None:
        self.load.asked.append(await ask(self._session, self._url, body(self._tokens)))


def _session() -> aiohttp.ClientSession:
    return aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=30),
                                 timeout=aiohttp.ClientTimeout(total=HANG_S))


async def until(predicate: Any, timeout_s: float = HANG_S) -> None:
    """As `wait_until`, without holding up the load."""
    deadline = time.monotonic() + timeout_s
    while not await asyncio.to_thread(predicate):
        assert time.monotonic() < deadline, f"not within {timeout_s:g} s"
        await asyncio.sleep(0.02)


@contextlib.contextmanager
def world(folder: Path, capacities: dict[str, int], *, seqs: int | None = None, sim: dict[str, Any] | None = None,
          **options: Any) -> Iterator[FleetWorld]:
    """Servers with these capacities; `seqs` None: they run as many requests as their capacity says."""
    servers = [SimulatedServer(folder / "servers", name, capacity, seqs, **(sim or {}))
               for name, capacity in capacities.items()]
    with FleetWorld(folder, servers, **options) as made:
        yield made
