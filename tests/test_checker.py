"""routing/checker.py: one thread that watches many servers, none of which holds up another."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from configuration.servers import ServerConfig, ServersConfig
from routing.balancer import Balancer
from routing.checker import Checker, LocalTarget
from routing.health import Status
from routing.questions import MAX_BYTES, Conversation, NoAnswer
from routing.remote import Fleet, Origin
from routing.scrape import Offered
from tests.stub_server import StubServer
from tests.support import wait_until


@contextlib.contextmanager
def checking(*servers: StubServer, interval_s: float = 0.2, instances: Any = tuple, **entry: Any) -> Iterator[Fleet]:
    listed = tuple(ServerConfig(one.url, 4, **entry) for one in servers)
    fleet = Fleet(ServersConfig(listed, health_check_interval_s=interval_s), name="me")
    checker = Checker(Balancer(fleet), instances)
    checker.start()
    try:
        yield fleet
    finally:
        checker.close()


def status(fleet: Fleet, server: StubServer) -> Status:
    health = fleet.health(server.url)
    assert health is not None
    return health.status


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    # the stub's own threads, one a connection, end when they see that it is closed
    wait_until(lambda: all("process_request" in one.name for one in set(threading.enumerate()) - before))


def test_a_server_comes_up_with_its_models_and_its_load() -> None:
    with StubServer() as server, checking(server) as fleet:
        server.running, server.waiting = 3, 2
        wait_until(lambda: fleet.views()[0].running)
        view = fleet.views()[0]
        assert (view.status, view.running, view.waiting, view.cache_usage) == (Status.UP, 3, 2, 0.5)
        assert view.models == {"m": Offered(True)} and view.checked_at is not None
        server.entries.append({"id": "n"})
        wait_until(lambda: "n" in fleet.models())


def test_a_server_that_goes_and_comes_back() -> None:
    with StubServer() as server, checking(server) as fleet:
        wait_until(lambda: status(fleet, server) is Status.UP)
        server.stop()
        wait_until(lambda: status(fleet, server) is Status.DOWN)
        assert "/health" in fleet.views()[0].why and "m" in fleet.models()
        server.start()
        wait_until(lambda: status(fleet, server) is Status.UP)


def test_a_server_that_is_not_there_at_the_start() -> None:
    server = StubServer()
    server.server_close()
    with checking(server) as fleet:
        wait_until(lambda: status(fleet, server) is Status.DOWN)
        assert "refused" in fleet.views()[0].why


@pytest.mark.parametrize(("path", "code", "found"), [
    ("/health", 503, Status.DOWN), ("/v1/models", 401, Status.DOWN), ("/health", 404, Status.UP),
    ("/metrics", 500, Status.UP)])
def test_what_an_answer_says(path: str, code: int, found: Status) -> None:
    with StubServer() as server:
        server.statuses[path] = code
        with checking(server) as fleet:
            wait_until(lambda: status(fleet, server) is found)


def test_a_server_that_hangs_delays_no_other() -> None:
    with StubServer("good") as good, contextlib.ExitStack() as stack:
        hung = [stack.enter_context(StubServer(f"hung {n}")) for n in range(20)]
        for one in hung:
            one.hangs["*"] = True
        with checking(*hung, good) as fleet:
            wait_until(lambda: good.asked["/health"] >= 5)
            assert status(fleet, good) is Status.UP
            wait_until(lambda: all(status(fleet, one) is Status.DOWN for one in hung))
            assert "within 0.5 s" in fleet.views()[0].why
            asked = good.asked["/health"]
            wait_until(lambda: good.asked["/health"] >= asked + 5)


def test_servers_join_and_leave_while_it_runs() -> None:
    with StubServer() as first, StubServer() as second, checking(first) as fleet:
        wait_until(lambda: status(fleet, first) is Status.UP)
        fleet.use(ServersConfig((ServerConfig(second.url, 4),), health_check_interval_s=0.2))
        wait_until(lambda: status(fleet, second) is Status.UP)
        asked = first.asked.total()
        wait_until(lambda: second.asked["/health"] >= 5)
        assert first.asked.total() <= asked + 2         # at most what was under way


def test_what_the_file_says_is_sent_along() -> None:
    with StubServer() as server, checking(server, api_key="k", headers={"X-Team": "blue"}) as fleet:
        wait_until(lambda: status(fleet, server) is Status.UP)
        assert all((one["Authorization"], one["X-Team"]) == ("Bearer k", "blue") for one in server.headers)


def test_a_request_that_failed_hurries_the_next_check() -> None:
    with StubServer() as server:
        fleet = Fleet(ServersConfig((ServerConfig(server.url, 4),), health_check_interval_s=60))
        checker = Checker(Balancer(fleet))
        checker.start()
        try:
            wait_until(lambda: status(fleet, server) is Status.UP)
            asked = server.asked["/health"]
            checker.hurry(server.url)
            wait_until(lambda: server.asked["/health"] > asked, 20)      # not after a minute
        finally:
            checker.close()


def test_an_instance_whose_load_matters_is_read_and_another_is_not() -> None:
    with StubServer() as watched, StubServer() as other:
        watched.running = 2
        targets = [LocalTarget("x", watched.port, 8, watched=True),
                   LocalTarget("y", other.port, 9, watched=False)]
        balancer = Balancer(Fleet())
        checker = Checker(balancer, lambda: targets)
        checker.start()
        try:
            wait_until(lambda: balancer._tracks.get("x") and balancer._tracks["x"].reading)
            assert balancer._tracks["x"].capacity == 8 and balancer._tracks["y"].reading is None
            assert not other.asked
            answers = checker.ask_all({one.name: Origin.local(one.port) for one in (watched, other)}, "/metrics", 5)
            assert answers.keys() == {"stub"} and answers["stub"].status == 200
        finally:
            checker.close()


def test_who_does_not_answer_is_left_out() -> None:
    with StubServer("good") as good, StubServer("hung") as hung:
        hung.hangs["*"] = True
        checker = Checker(Balancer(Fleet()))
        assert checker.ask_all({"good": Origin.local(good.port)}, "/metrics", 1) == {}      # not started yet
        checker.start()
        try:
            found = checker.ask_all({one.name: Origin.local(one.port) for one in (good, hung)}, "/metrics", 0.5)
            assert found.keys() == {"good"}
        finally:
            checker.close()
        assert checker.ask_all({"good": Origin.local(good.port)}, "/metrics", 1) == {}


# --- one question -----------------------------------------------------------------------------------------------------

@contextlib.contextmanager
def raw(*answers: bytes, tls: ssl.SSLContext | None = None) -> Iterator[Origin]:
    """A server that answers the n-th connection with these bytes and closes it."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        with contextlib.suppress(OSError):
            for answer in answers:
                connection, _ = listener.accept()
                with connection:
                    connection.recv(65536)
                    connection.sendall(answer)
                    with contextlib.suppress(OSError):
                        connection.shutdown(socket.SHUT_WR)
                        connection.recv(65536)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield Origin.local(listener.getsockname()[1])
    finally:
        with contextlib.suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join()


def ask(origin: Origin, path: str = "/health", limit_s: float = 20) -> Any:
    async def once() -> Any:
        async with Conversation(origin) as server:
            return await server.get(path, limit_s)
    return asyncio.run(once())


@pytest.mark.parametrize(("answer", "body"), [
    (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nabX", b"ab"),
    (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n2;x=y\r\nbc\r\n0\r\nT: u\r\n\r\n", b"abc"),
    (b"HTTP/1.0 200 OK\r\n\r\nall of it", b"all of it"),
    (b"HTTP/1.1 204 No Content\r\n\r\n", b""),
    (b"HTTP/1.1 302 Found\r\nLocation: http://elsewhere/\r\nContent-Length: 0\r\n\r\n", b""),
])
def test_every_framing_is_read_and_no_redirect_followed(answer: bytes, body: bytes) -> None:
    with raw(answer) as origin:
        found = ask(origin)
        assert (found.body, found.status) == (body, int(answer.split()[1]))


@pytest.mark.parametrize("answer", [
    b"", b"SSH-2.0-OpenSSH\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nshort",
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nX: y",
    b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % (MAX_BYTES + 1),
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nffffffff\r\n",
    b"HTTP/1.1 200 OK\r\nX: " + b"y" * 200_000 + b"\r\n\r\n",
])
def test_what_is_no_answer_is_told(answer: bytes) -> None:
    with raw(answer, answer) as origin, pytest.raises(NoAnswer):
        ask(origin)


def test_a_connection_is_used_again_and_made_anew_when_it_was_closed() -> None:
    with StubServer() as server:
        async def twice() -> None:
            async with Conversation(Origin.local(server.port)) as talk:
                assert (await talk.get("/health", 20)).status == 200
                assert (await talk.get("/v1/models", 20)).status == 200
                await asyncio.to_thread(server.stop)
                await asyncio.to_thread(server.start)
                assert (await talk.get("/health", 20)).status == 200
        asyncio.run(twice())


def test_the_path_of_a_servers_url_is_a_prefix() -> None:
    with StubServer() as server:
        ask(Origin(f"{server.url}/gpu/1", "127.0.0.1", server.port, {"A": "b"}))
        assert server.asked == {"/gpu/1/health": 1}
        assert server.headers[0]["Host"] == f"127.0.0.1:{server.port}" and server.headers[0]["A"] == "b"
