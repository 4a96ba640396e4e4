"""routing/upstream.py: one request to an engine of a socket, and what becomes of connections that are used again."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from errors import BadRequest, UpstreamError, UpstreamTimeout
from routing.upstream import ConnectionRefused, Exchange, Upstream, request_head, request_headers

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
Talk = Callable[[socket.socket], None]


@contextmanager
def engine(*talks: Talk) -> Iterator[str]:
    """Serves one connection after the other, each by its talk; the URL of it."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        def serve() -> None:
            for talk in talks:
                client, _ = listener.accept()
                with client:
                    talk(client)

        thread = threading.Thread(target=serve)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        thread.join()


def answer(*answers: bytes) -> Talk:
    def talk(client: socket.socket) -> None:
        for one in answers:
            read_request(client)
            client.sendall(one)
        client.recv(1)
    return talk


def read_request(client: socket.socket) -> bytes:
    data = b""
    while b"\r\n\r\n" not in data:
        data += client.recv(1 << 16)
    head, _, body = data.partition(b"\r\n\r\n")
    length = next((int(line.split(b":")[1]) for line in head.split(b"\r\n") if line.startswith(b"Content-Length")), 0)
    while len(body) < length:
        body += client.recv(1 << 16)
    return head + b"\r\n\r\n" + body


@pytest.fixture
def upstream() -> Iterator[Upstream]:
    upstream = Upstream(4)
    yield upstream
    upstream.close()


def ask(upstream: Upstream, url: str, body: bytes | bytearray | None = b"{}", timeout_s: float = 60) -> bytes:
    headers = request_headers([("X-A", "1")], body)
    found = upstream.send(Exchange(), "POST", url + "/v1/x?y=z", headers, body, timeout_s)
    data = b"".join(found.pieces())
    found.close(complete=True)
    return data


def test_a_stranger_on_the_port_of_a_dead_engine_gets_nothing(upstream: Upstream) -> None:
    """Asked when the connection is there, and not before: the engine may die in between."""
    received, connected = list[bytes](), threading.Event()

    def talk(client: socket.socket) -> None:
        connected.set()
        received.append(client.recv(1))

    with engine(talk) as url, pytest.raises(ConnectionRefused, match="takes no connections"):
        upstream.send(Exchange(), "POST", url + "/v1/x", {}, b"{}", 60, runs=lambda: not connected.wait(60))
    assert received == [b""]


@pytest.mark.parametrize("body", [None, b"{}", b"x" * 20_000, bytearray(b"y" * 3_000_000)],
                         ids=["none", "small", "in two", "large"])
def test_what_an_engine_receives(upstream: Upstream, body: bytes | bytearray | None) -> None:
    received: list[bytes] = []

    def talk(client: socket.socket) -> None:
        received.append(read_request(client))
        client.sendall(OK)
        client.recv(1)

    with engine(talk) as url:
        assert ask(upstream, url, body) == b"ok"
        upstream.close()
    length = b"Content-Length: %d\r\n" % len(body) if body is not None else b""
    host = url.removeprefix("http://").encode()
    assert received == [b"POST /v1/x?y=z HTTP/1.1\r\nHost: " + host + b"\r\nX-A: 1\r\n" + length + b"\r\n"
                        + bytes(body or b"")]


def test_a_connection_is_used_again(upstream: Upstream) -> None:
    with engine(answer(OK, OK, OK)) as url:
        assert [ask(upstream, url) for _ in range(3)] == [b"ok"] * 3
        upstream.close()


def test_a_stale_connection_is_replaced_once(upstream: Upstream) -> None:
    """The engine closes it when the next request comes, before it says a word."""
    def close_at_the_second(client: socket.socket) -> None:
        read_request(client)
        client.sendall(OK)
        read_request(client)

    with engine(close_at_the_second, answer(OK)) as url:
        assert [ask(upstream, url) for _ in range(2)] == [b"ok"] * 2
        upstream.close()


def test_a_connection_that_the_engine_has_closed_is_not_used(upstream: Upstream) -> None:
    """Else the request would count as sent, and could not go elsewhere."""
    def close_after_the_first(client: socket.socket) -> None:
        read_request(client)
        client.sendall(OK)

    with engine(close_after_the_first) as url:
        assert ask(upstream, url) == b"ok"
    with pytest.raises(ConnectionRefused):
        ask(upstream, url)


def test_two_connections_are_there_before_the_requests(upstream: Upstream) -> None:
    with engine(lambda client: None, answer(OK)) as url:    # which serves these and no third
        for _ in range(4):
            upstream.prepare(url)
        assert ask(upstream, url) == b"ok"
        upstream.close()
    upstream.prepare(url)               # nobody listens, which the next request will find out


def test_nothing_is_sent_twice_once_an_answer_has_begun(upstream: Upstream) -> None:
    def cut_the_second(client: socket.socket) -> None:
        read_request(client)
        client.sendall(OK)
        read_request(client)
        client.sendall(b"HTTP/1.1 2")

    with engine(cut_the_second) as url:
        ask(upstream, url)
        with pytest.raises(UpstreamError) as raised:
            ask(upstream, url)
    assert raised.value.code == "bad_answer"


def test_an_answer_of_which_only_the_head_comes_is_none(upstream: Upstream) -> None:
    """vLLM writes its head before its body, and may be killed in between; nothing is sent a second time for it."""
    def die_after_the_head(client: socket.socket) -> None:
        read_request(client)
        client.sendall(OK)
        read_request(client)
        client.sendall(OK[:-2])

    with engine(die_after_the_head) as url:
        ask(upstream, url)
        with pytest.raises(UpstreamError, match="in the middle of its answer"):
            upstream.send(Exchange(), "POST", url + "/v1/x", {}, b"{}", 60)


def test_an_engine_that_does_not_answer_in_time(upstream: Upstream) -> None:
    with engine(answer(b"")) as url, pytest.raises(UpstreamTimeout):
        ask(upstream, url, timeout_s=0.05)


def test_a_new_connection_that_breaks_is_not_tried_again(upstream: Upstream) -> None:
    with engine(lambda client: None) as url, pytest.raises(UpstreamError) as raised:
        ask(upstream, url)
    assert not isinstance(raised.value, ConnectionRefused)


def test_nobody_listens(upstream: Upstream) -> None:
    with engine() as url:
        pass
    with pytest.raises(ConnectionRefused):
        ask(upstream, url)


def test_an_engine_that_answers_before_it_has_read_everything(upstream: Upstream) -> None:
    """And closes: its answer is passed on, and the connection not used again."""
    def refuse(client: socket.socket) -> None:
        client.recv(100)
        client.sendall(b"HTTP/1.1 413 Too Large\r\nContent-Length: 3\r\n\r\nbig")
        client.shutdown(socket.SHUT_WR)
        while client.recv(1 << 16):
            pass

    with engine(refuse, answer(OK)) as url:
        assert ask(upstream, url, b"x" * 8_000_000) == b"big"
        assert ask(upstream, url) == b"ok"
        upstream.close()


def test_an_abort_ends_a_request_that_waits(upstream: Upstream) -> None:
    exchange = Exchange()

    def never(client: socket.socket) -> None:
        read_request(client)
        exchange.abort()
        assert client.recv(1) == b""

    with engine(never) as url, pytest.raises(UpstreamError):
        upstream.send(exchange, "GET", url + "/", {}, None, 60)


@pytest.mark.parametrize(("target", "value"), [("/a b", "x"), ("/a\r\nX: y", "x"), ("/a", "x\r\nX: y"), ("/a", "x\ny"),
                                               ("/a", "x\ry"), ("/a\0", "x"), ("/a", "\0")])
def test_a_head_cannot_hold_another_one(target: str, value: str) -> None:
    with pytest.raises(BadRequest):
        request_head("GET", target, "h", {"A": value})


def test_bytes_beyond_ascii_pass_in_a_head() -> None:
    head = request_head("GET", "/?q=\xe4", "h:1", {"A": "\xff"})
    assert head == b"GET /?q=\xe4 HTTP/1.1\r\nHost: h:1\r\nA: \xff\r\n\r\n"
