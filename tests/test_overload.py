"""Past its bounds the daemon says 503 at once, and who watches and manages is answered all the same."""

from __future__ import annotations

import contextlib
import json
import math
import select
import selectors
import socket
from collections.abc import Iterator
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest

from tests.daemon import Answer, Daemon
from tests.exchanges import Reader, connect, exchange, parse
from tests.relay_harness import read_all
from tests.support import wait_until
from web.connection import Connection, Parked
from web.worker import Worker

if TYPE_CHECKING:
    from _typeshed import FileDescriptorLike

CONNECTIONS = 40
THREADS = 20
BACKLOG = 4
BODY_BYTES = 3 << 20
ENV = {"APP_MAX_CONNECTIONS": str(CONNECTIONS), "APP_THREADS": str(THREADS), "APP_BACKLOG": str(BACKLOG),
       "MAX_REQUEST_BYTES": str(BODY_BYTES), "MAX_BODY_MEMORY": str(2 * BODY_BYTES), "SIMULATOR_TOKENS_PER_S": "1"}
HEALTH = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
SLOW = json.dumps({"model": "m", "prompt": "x", "max_tokens": 1500}).encode()
"""Is not answered while a test lasts, and not as a stream: it keeps its thread."""


def post(body: bytes, path: str = "/v1/completions", length: int | None = None) -> bytes:
    return (f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            f"Connection: close\r\nContent-Length: {len(body) if length is None else length}\r\n\r\n").encode() + body


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    with Daemon(tmp_path_factory.mktemp("daemon"), ENV) as daemon:
        daemon.create("m", timeout=0)
        yield daemon


@pytest.fixture(autouse=True)
def nothing_is_kept(daemon: Daemon) -> Iterator[None]:
    yield
    wait_until(lambda: daemon.instances()[0]["in_flight"] == 0)


def refusal(data: bytes) -> Answer:
    head, _, body = data.partition(b"\r\n\r\n")
    status, *lines = head.decode().split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    answer = Answer(int(status.split()[1]), headers, body)
    assert (answer.status, answer.error["code"]) == (503, "overloaded"), data
    assert headers["retry-after"] == "1" and headers["connection"] == "close" and headers["x-request-id"]
    return answer


def test_no_thread_is_free(daemon: Daemon) -> None:
    with contextlib.ExitStack() as stack:
        busy = [stack.enter_context(connect(daemon.port)) for _ in range(THREADS)]
        for client in busy:
            client.sendall(post(SLOW))
        wait_until(lambda: daemon.instances()[0]["in_flight"] == THREADS)       # which is management, and answered
        others = [stack.enter_context(connect(daemon.port)) for _ in range(BACKLOG + 3)]
        for client in others:
            client.sendall(post(SLOW))
        wait_until(lambda: len(select.select(others, [], [], 0)[0]) == 3)
        for client in select.select(others, [], [], 0)[0]:
            assert "requests" in refusal(read_all(client)[0]).error["message"]
        assert daemon.get("/health").status == 200 and daemon.get("/metrics").status == 200
        assert daemon.post("/instances", {"model_name": ""}).status == 400
        for client in busy[:BACKLOG]:
            client.close()
        wait_until(lambda: daemon.instances()[0]["in_flight"] == THREADS)
    wait_until(lambda: daemon.instances()[0]["in_flight"] == 0)
    assert daemon.post("/v1/completions", {"model": "m", "prompt": "x", "max_tokens": 1}).status == 200
    wait_until(lambda: "were refused with 503" in daemon.log)


def read_all_of(daemon: Daemon, data: bytes) -> bytes:
    received, was_reset = exchange(daemon, data)
    assert not was_reset
    return received


def test_all_connections_are_taken_by_clients_that_ask_something(daemon: Daemon) -> None:
    with contextlib.ExitStack() as stack:
        for _ in range(CONNECTIONS):
            stack.enter_context(connect(daemon.port)).sendall(post(SLOW)[:-5])      # half a request each
        wait_until(lambda: b"503" in exchange(daemon, post(SLOW))[0])
        assert "connections" in refusal(read_all_of(daemon, post(SLOW))).error["message"]
        # A large body is refused at its head: nobody waits for the rest of it.
        refusal(read_all_of(daemon, post(b"", length=BODY_BYTES)))
        assert parse(read_all_of(daemon, HEALTH))[0].status == 200      # and closed: it was a spare one
        assert parse(read_all_of(daemon, HEALTH.replace(b"/health", b"/instances?x=1")))[0].status == 200
    wait_until(lambda: daemon.post("/v1/completions", {"model": "m", "prompt": "x", "max_tokens": 1}).status == 200)


def test_who_only_idles_goes_for_who_asks(daemon: Daemon) -> None:
    with contextlib.ExitStack() as stack:
        first, second = (stack.enter_context(connect(daemon.port)) for _ in range(2))
        second.sendall(HEALTH)
        assert Reader(second).answer().status == 200    # the first one is known, too, and has idled longer
        for _ in range(CONNECTIONS - 2):
            stack.enter_context(connect(daemon.port))
        newest = stack.enter_context(connect(daemon.port))
        newest.sendall(post(json.dumps({"model": "m", "prompt": "x", "max_tokens": 1}).encode()))
        assert Reader(newest).answer().status == 200
        assert first.recv(1) == b""


def test_bodies_take_no_more_memory_than_they_may(daemon: Daemon) -> None:
    half = post(b"x" * (2 << 20), length=BODY_BYTES)
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(connect(daemon.port)) for _ in range(8)]
        for client in clients:
            with contextlib.suppress(ConnectionError):
                client.sendall(half)
        refused = [client for client in clients if answered(client)]
        assert 5 <= len(refused) <= 7
        for client in refused:
            data, _ = read_all(client)
            assert b'"code":"overloaded"' in data and b"MAX_BODY_MEMORY" in data
        assert daemon.get("/health").status == 200
    whole = json.dumps({"model": "m", "prompt": "x", "max_tokens": 1, "user": "x" * (2 << 20)}).encode()
    wait_until(lambda: b" 200 " in exchange(daemon, post(whole))[0][:20])       # all of it came back


def answered(client: socket.socket) -> bool:
    """Whether the daemon says something to it without having its body."""
    return bool(select.select([client], [], [], 1.0)[0])


def test_a_connection_that_made_room_may_have_an_event_left() -> None:
    """Both came with one look: a client that needs room, and a word of the idle one that goes for it."""
    worker = Worker.__new__(Worker)
    worker._parked = {}
    ours, client = socket.socketpair()
    with ours, client:
        worker._wake_parked(ours)


def test_a_connection_may_be_parked_while_the_loop_closes_all_that_are() -> None:
    """The daemon ends as a request does: whatever the loop finds parked it can take out of the poller again."""
    worker = Worker.__new__(Worker)
    worker._parked, closed = {}, []

    class Poller(selectors.DefaultSelector):
        """At each step of a request's thread, the loop has a turn."""

        def register(self, fileobj: FileDescriptorLike, events: int, data: Any = None) -> selectors.SelectorKey:
            worker._close_expired(math.inf)
            key = super().register(fileobj, events, data)
            worker._close_expired(math.inf)
            return key

    ours, client = socket.socketpair()
    with ours, client, Poller() as worker.poller:
        connection = cast(Connection, SimpleNamespace(sock=ours))
        worker._close = closed.append   # type: ignore[method-assign]
        worker._park(connection, Parked(connection, 0.0, worker._receive))
        assert not closed and list(worker.poller.get_map()) == [ours.fileno()]
        worker._close_expired(math.inf)
        assert closed == [connection] and not worker.poller.get_map() and not worker._parked
