"""2,000 clients at 512 threads: what is held is bounded, who watches and manages is answered, then all is as before.

benchmarks/overload.py measures how quickly.
"""

from __future__ import annotations

import contextlib
import json
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.daemon import Daemon
from tests.exchanges import connect, held
from tests.support import wait_until
from web.lanes import MANAGE_THREADS, WATCH_THREADS

CONNECTIONS = 2000
THREADS = 512
OTHERS = 40             # threads of the daemon and its relay that serve no request
MOST_BYTES = 400 << 20
BODY = json.dumps({"model": "m", "prompt": "x", "max_tokens": 1500}).encode()      # lasts longer than any test
SLOW = (b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n" % len(BODY)) + BODY
pytestmark = pytest.mark.timeout(600)


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limits[1], limits[1]))
    try:
        with Daemon(tmp_path, {"APP_THREADS": str(THREADS), "SIMULATOR_TOKENS_PER_S": "1"}) as running:
            running.create("m", params={"max_num_seqs": 100_000}, timeout=0)
            yield running
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_more_clients_than_can_be_served(daemon: Daemon) -> None:
    for _ in range(3):
        with contextlib.ExitStack() as stack:
            clients = [stack.enter_context(connect(daemon.port)) for _ in range(CONNECTIONS)]
            for client in clients:
                client.sendall(SLOW)
            wait_until(lambda: daemon.instances()[0]["in_flight"] == THREADS)
            for _ in range(20):     # not one of the requests ends meanwhile
                assert daemon.get("/health").status == 200
                assert daemon.get("/metrics").status == 200
                assert daemon.post("/instances", {"model_name": ""}).status == 400
            assert daemon.instances()[0]["in_flight"] == THREADS
            now = held(daemon)
            assert now.threads <= THREADS + WATCH_THREADS + MANAGE_THREADS + OTHERS
            assert now.resident_bytes < MOST_BYTES
        wait_until(lambda: daemon.instances()[0]["in_flight"] == 0)
        assert daemon.post("/v1/completions", {"model": "m", "prompt": "x", "max_tokens": 1}).status == 200
    assert held(daemon).descriptors < 200
