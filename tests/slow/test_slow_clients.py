"""Hundreds of clients that send a byte a second, and thousands that send nothing: nobody else notices them."""

from __future__ import annotations

import contextlib
import resource
import selectors
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.daemon import Daemon
from tests.data_plane import ANSWERS, scripted_daemon, steps
from tests.exchanges import Reader, assert_no_lease, connect, exchange, parse, request
from tests.relay_harness import read_all

SLOW = 600
IDLE = 2000
BYTE_EVERY_S = 1.0
SECONDS = 8
ENDS = b"Connection: close\r\n"
WHOLE = request(steps(ANSWERS["length"]), headers=ENDS, body=b'{"model": "m", "pad": "' + b"x" * 100_000 + b'"}')
HEAD_BYTES = WHOLE.index(b"\r\n\r\n") + 4
pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limits[1], limits[1]))
    try:
        with scripted_daemon(tmp_path_factory.mktemp("daemon")) as (daemon, _):
            yield daemon
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def threads(daemon: Daemon) -> int:
    return len(list(Path(f"/proc/{daemon.worker_pid}/task").iterdir()))


def ask(daemon: Daemon) -> None:
    asked = request(steps(ANSWERS["length"]), headers=ENDS)
    assert parse(exchange(daemon, asked)[0]) == parse(ANSWERS["length"])


@contextlib.contextmanager
def connections(daemon: Daemon, count: int) -> Iterator[list[socket.socket]]:
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(connect(daemon.port)) for _ in range(count)]


def test_clients_that_send_a_byte_a_second(daemon: Daemon) -> None:
    """A third stands in the head, a third in a small body, a third in a large one that is received into its place."""
    ask(daemon)
    small = request(steps(ANSWERS["length"]), headers=ENDS)
    asked = [small, small, WHOLE]
    with connections(daemon, SLOW) as clients:
        sent = []
        for number, client in enumerate(clients):
            begin = (10, len(small) - SECONDS - 3, HEAD_BYTES + 5)[number % 3]
            client.sendall(asked[number % 3][:begin])
            sent.append(begin)
        before = threads(daemon)
        for second in range(SECONDS):
            began = time.monotonic()
            for number, client in enumerate(clients):
                client.sendall(asked[number % 3][sent[number]:sent[number] + 1])
                sent[number] += 1
                if number % 50 == 0:
                    ask(daemon)
            wait_for_next(began + BYTE_EVERY_S)
            assert threads(daemon) <= before + 1, second
            assert daemon.instances()[0]["in_flight"] == 0
        # They come to their end after all, and each is answered.
        for number, client in enumerate(clients):
            client.sendall(asked[number % 3][sent[number]:])
        for client in clients:
            assert parse(read_all(client)[0]) == parse(ANSWERS["length"])
    assert_no_lease(daemon)


def wait_for_next(at: float) -> None:
    """The clients' slowness itself: nothing is waited for that the daemon does."""
    with selectors.DefaultSelector() as nothing:
        nothing.select(max(0.0, at - time.monotonic()))


def test_idle_connections_are_kept_and_answered(daemon: Daemon) -> None:
    ask(daemon)
    asked = request(steps(ANSWERS["length"]))
    with connections(daemon, IDLE) as clients:
        for client in clients[::2]:        # half have had an answer, half have asked nothing yet
            client.sendall(asked)
        readers = [Reader(client) for client in clients]
        for reader in readers[::2]:
            assert [reader.answer()] == parse(ANSWERS["length"])
        before = threads(daemon)
        for _ in range(50):
            ask(daemon)
        assert threads(daemon) <= before
        for client in clients:
            client.sendall(asked)
        for reader in readers:
            assert [reader.answer()] == parse(ANSWERS["length"])
    assert_no_lease(daemon)
