"""How the daemon bears more than it can serve: `python benchmarks/overload.py`.

CONNECTIONS clients ask for plain completions in a closed loop, which keep every thread waiting for an engine and more
requests waiting for a thread, while one client asks for /health and another one manages.  Then the load ends at once.
Printed are the latencies of both before, under and after the load, the answers of the load, and what the worker holds.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import http.client
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from processes import raise_file_limit

from tests.daemon import Daemon

BODY = json.dumps({"model": "m", "prompt": "x", "max_tokens": 32}).encode()
REQUEST = (b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
           b"Content-Length: %d\r\n\r\n" % len(BODY)) + BODY
EVERY_S = 0.05


async def _client(port: int, until: float, statuses: Counter[str]) -> None:
    while time.monotonic() < until:
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            with contextlib.closing(writer):
                while time.monotonic() < until:
                    writer.write(REQUEST)
                    head = await reader.readuntil(b"\r\n\r\n")
                    statuses[head.split()[1].decode()] += 1
                    length = int(head.lower().partition(b"content-length: ")[2].split(b"\r")[0])
                    await reader.readexactly(length)
                    if head.startswith(b"HTTP/1.1 503"):
                        await asyncio.sleep(1)      # as Retry-After says; its connection is closed
                        break
        except (OSError, asyncio.IncompleteReadError):
            statuses["broken"] += 1
            await asyncio.sleep(0.1)


async def load(port: int, connections: int, seconds: float) -> None:
    """In a process of its own; prints the statuses."""
    statuses: Counter[str] = Counter()
    until = time.monotonic() + seconds
    clients = [asyncio.create_task(_client(port, until, statuses)) for _ in range(connections)]
    await asyncio.sleep(seconds)
    for client in clients:      # all leave at once
        client.cancel()
    print(json.dumps(statuses))


class Prober(threading.Thread):
    """Asks for one thing again and again, on connections that stay and on new ones in turn."""

    def __init__(self, port: int, method: str, path: str, status: int) -> None:
        super().__init__(daemon=True)
        self.samples: list[float] = []
        self.wrong = 0
        self._asked = (port, method, path, status)
        self._stop_asking = threading.Event()

    def run(self) -> None:
        port, method, path, status = self._asked
        connection: http.client.HTTPConnection | None = None
        number = 0
        while not self._stop_asking.wait(EVERY_S):
            number += 1
            began = time.monotonic()
            try:
                if connection is None:
                    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
                connection.request(method, path, b"{}" if method == "POST" else None,
                                   {"Content-Type": "application/json"} if method == "POST" else {})
                answer = connection.getresponse()
                answer.read()
                self.wrong += answer.status != status
            except OSError:
                self.wrong += 1
                connection = None
            self.samples.append(time.monotonic() - began)
            if number % 2 and connection is not None:
                connection.close()
                connection = None

    def end(self) -> str:
        self._stop_asking.set()
        self.join()
        ordered = sorted(self.samples)

        def share(part: float) -> float:
            return 1000 * ordered[min(len(ordered) - 1, int(part * len(ordered)))]

        return (f"{len(ordered)} asked, {self.wrong} wrong, p50 {share(0.5):.1f} ms, p99 {share(0.99):.1f} ms, "
                f"longest {1000 * ordered[-1]:.1f} ms")


@contextlib.contextmanager
def probed(port: int, when: str) -> Iterator[None]:
    probers = {"health": Prober(port, "GET", "/health", 200), "management": Prober(port, "POST", "/instances", 400)}
    for prober in probers.values():
        prober.start()
    yield
    for name, prober in probers.items():
        print(f"{when:<7}{name:<11}{prober.end()}", flush=True)


def held(daemon: Daemon) -> str:
    worker = psutil.Process(daemon.worker_pid)
    return f"{worker.memory_info().rss / 2**20:.0f} MiB, {worker.num_threads()} threads, {worker.num_fds()} descriptors"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--connections", type=int, default=2000)
    parser.add_argument("--threads", type=int, default=512)
    parser.add_argument("--seconds", type=float, default=30)
    parser.add_argument("--tokens-per-s", type=float, default=8, help="of each simulated answer of 32 tokens")
    parser.add_argument("--load", type=int, metavar="PORT", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    raise_file_limit()
    if arguments.load:
        asyncio.run(load(arguments.load, arguments.connections, arguments.seconds))
        return
    env = {"APP_THREADS": str(arguments.threads), "SIMULATOR_TOKENS_PER_S": str(arguments.tokens_per_s)}
    with tempfile.TemporaryDirectory() as folder, Daemon(Path(folder), env) as daemon:
        daemon.create("m", params={"max_num_seqs": 100_000}, timeout=0)
        print(f"before held       {held(daemon)}")
        with probed(daemon.port, "before"):
            time.sleep(3)
        child = subprocess.Popen([sys.executable, __file__, "--load", str(daemon.port), "--connections",
                                  str(arguments.connections), "--seconds", str(arguments.seconds)],
                                 stdout=subprocess.PIPE, text=True)
        time.sleep(arguments.seconds / 3)       # until all threads are there
        with probed(daemon.port, "under"):
            time.sleep(arguments.seconds / 3)
        print(f"under  held       {held(daemon)}", flush=True)
        statuses, _ = child.communicate()
        ended = time.monotonic()
        answer = daemon.post("/v1/completions", {"model": "m", "prompt": "x", "max_tokens": 1})
        print(f"load   answers    {statuses.strip()}")
        print(f"after  first      {answer.status} {1000 * (time.monotonic() - ended):.0f} ms after the load had ended")
        while any(one["in_flight"] for one in daemon.instances()):
            time.sleep(0.01)
        print(f"after  idle       {1000 * (time.monotonic() - ended):.0f} ms after it")
        with probed(daemon.port, "after"):
            time.sleep(3)
        print(f"after  held       {held(daemon)}")


if __name__ == "__main__":
    main()
