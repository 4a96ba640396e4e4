"""Every kind of answer, through the whole daemon, as raw bytes; the long runs are in tests/slow/test_torture.py."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator

import pytest

from tests.daemon import Daemon
from tests.data_plane import ANSWERS, CLOSING, ENDLESS, INVALID, closing_steps, scripted_daemon, steps
from tests.exchanges import (
    CLOSE,
    RESET,
    Reader,
    Step,
    assert_no_lease,
    assert_same,
    connect,
    exchange,
    parse,
    request,
    send,
)
from tests.relay_harness import read_all, read_exactly
from tests.support import wait_until

pytestmark = pytest.mark.whole

ENDS = b"Connection: close\r\n"


@pytest.fixture(scope="module", params=[1, 0], ids=["relayed", "by threads"])
def running(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Daemon, str]]:
    """With a relay process, and without: then request threads carry streams."""
    with scripted_daemon(tmp_path_factory.mktemp("daemon"), request.param) as found:
        yield found


@pytest.fixture
def daemon(running: tuple[Daemon, str]) -> Iterator[Daemon]:
    """Each test leaves no lease."""
    yield running[0]
    assert_no_lease(running[0])


@pytest.mark.parametrize("version", ["1.1", "1.0"])
@pytest.mark.parametrize("method", ["POST", "GET", "HEAD", "DELETE"])
def test_an_answer_means_the_same(daemon: Daemon, running: tuple[Daemon, str], version: str, method: str) -> None:
    path = "/v1/completions" if method == "POST" else f"/proxy/{running[1]}/x"
    body = b'{"model": "m"}' if method == "POST" else b""
    for name, answer in (ANSWERS | CLOSING).items():
        if method == "HEAD":
            answer = heads_of(answer)
        script = closing_steps(answer) if name in CLOSING else steps(answer)
        received, was_reset = exchange(daemon, request(script, method=method, path=path, version=version,
                                                       headers=ENDS, body=body))
        assert not was_reset, name
        assert_same(answer, False, received, was_reset, method)


def heads_of(answer: bytes) -> bytes:
    """As HEAD gets it: without the body."""
    head, end, rest = answer.partition(b"\r\n\r\n")
    return head + end + (heads_of(rest) if head.startswith(b"HTTP/1.1 1") else b"")


def test_an_answer_that_is_none(daemon: Daemon) -> None:
    scripts = {name: closing_steps(answer) for name, answer in INVALID.items()} | ENDLESS
    for name, script in scripts.items():
        received, _ = exchange(daemon, request(script, headers=ENDS))
        (got,) = parse(received)
        assert (got.status, json.loads(got.body)["error"]["type"]) == (502, "upstream_error"), name


@pytest.mark.parametrize("end", [CLOSE, RESET], ids=["close", "reset"])
@pytest.mark.parametrize("version", ["1.1", "1.0"])
def test_an_upstream_that_dies(daemon: Daemon, version: str, end: Step) -> None:
    """At some places of each; the slow tests take every byte."""
    for name in ("events", "length", "trailers", "until the end"):
        answer = (ANSWERS | CLOSING)[name]
        head = answer.index(b"\r\n\r\n") + 4
        for at in sorted({0, 5, head // 2, head - 2, head, head + 1, len(answer) - 1, len(answer)}):
            received, was_reset = exchange(daemon, request(steps(answer[:at], end), version=version, headers=ENDS))
            assert_same(answer[:at], end == RESET, received, was_reset)


def test_a_cut_shows_where_only_the_end_of_the_connection_ends_a_body(daemon: Daemon) -> None:
    """HTTP/1.0 has no chunks: a cut of what came in chunks can only be a reset."""
    answer = ANSWERS["events"]
    cut = answer[:answer.index(b"data: 2")]
    received, was_reset = exchange(daemon, request([send(cut), ["gap"], CLOSE], version="1.0"))
    assert was_reset and b"[DONE]" not in received


def test_a_connection_stays_after_each_plain_answer(daemon: Daemon, running: tuple[Daemon, str]) -> None:
    """Of the client and of the engine, whatever the order."""
    plain = ["length", "no body", "no content", "not modified", "error", "gzip", "100 before", "twice", "any bytes"]
    port = daemon.instances()[0]["port"]
    before = daemon.call("GET", "/stats", port=port).json
    asked = 0
    with connect(daemon.port) as client:
        reader = Reader(client)
        for first in plain:
            for name in (first, "length"):
                client.sendall(request(steps(ANSWERS[name])))
                assert [reader.answer()] == parse(ANSWERS[name])
                asked += 1
        head = b"HTTP/1.1 200 OK\r\nX-Own: 1\r\nContent-Length: 5\r\n\r\n"
        for method in ("HEAD", "GET"):
            client.sendall(request(steps(head + (b"hello" if method == "GET" else b"")), method=method,
                                   path=f"/proxy/{running[1]}/x", body=b""))
            assert reader.answer(method).headers[-1] == ("content-length", "5")
            asked += 1
    after = daemon.call("GET", "/stats", port=port).json
    assert after["requests"] - before["requests"] == asked
    assert after["first_uses"] - before["first_uses"] <= 1


def test_pipelined_requests_are_answered_in_order(daemon: Daemon) -> None:
    answers = [b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\n%d" % number for number in range(8)]
    asked = [request(steps(answer)) for answer in answers]
    with connect(daemon.port) as client:
        client.sendall(b"".join(asked))
        reader = Reader(client)
        assert [reader.answer().body for _ in answers] == [b"%d" % number for number in range(8)]
    # A stream in the midst of them may end the connection; what was asked after it is then not answered at all.
    received, was_reset = exchange(daemon, asked[0] + request(steps(ANSWERS["events"])) + asked[1]
                                   + request(steps(answers[2]), headers=ENDS))
    got = parse(received)
    assert not was_reset and got[:2] == parse(answers[0]) + parse(ANSWERS["events"])
    assert len(got) == 2 or got[2:] == parse(answers[1]) + parse(answers[2])


def test_expect_100_continue(daemon: Daemon) -> None:
    body = b'{"model": "m", "pad": "' + b"x" * 300_000 + b'"}'
    whole = request([["mirror"]], headers=b"Expect: 100-continue\r\n" + ENDS, body=body)
    head, _, _ = whole.partition(b"\r\n\r\n")
    for waits in (True, False):
        with connect(daemon.port) as client:
            client.sendall(head + b"\r\n\r\n")
            if waits:
                assert read_exactly(client, 25) == b"HTTP/1.1 100 Continue\r\n\r\n"
            client.sendall(body)
            received, was_reset = read_all(client)
        (got,) = parse(received)
        assert not was_reset and got.status == 200 and got.body.endswith(body)
        assert b"100-continue" not in got.body.partition(b"\r\n\r\n")[0]


def test_a_compressed_request_passes(daemon: Daemon, running: tuple[Daemon, str]) -> None:
    body = bytes(range(256)) * 10
    received, _ = exchange(daemon, request([["mirror"]], path=f"/proxy/{running[1]}/x", body=body,
                                           headers=b"Content-Encoding: gzip\r\n" + ENDS))
    (got,) = parse(received)
    assert got.body.endswith(b"\r\n\r\n" + body) and b"Content-Encoding: gzip" in got.body


def test_a_body_in_chunks_reaches_the_engine_whole(daemon: Daemon) -> None:
    data = b"5;a=b\r\n{\"mod\r\n9\r\nel\": \"m\"}\r\n0\r\nX-Trailer: 1\r\n\r\n"
    whole = request([["mirror"]], headers=b"Transfer-Encoding: chunked\r\n" + ENDS).partition(b"\r\n\r\n")[0]
    whole = whole.replace(b"Content-Length: 14\r\n", b"") + b"\r\n\r\n" + data
    (got,) = parse(exchange(daemon, whole)[0])
    assert got.status == 200 and got.body.endswith(b'\r\n\r\n{"model": "m"}')


def test_an_upload_that_is_cut_short(daemon: Daemon) -> None:
    whole = request(steps(ANSWERS["length"]), body=b'{"model": "m", "pad": "' + b"x" * 300_000 + b'"}')
    for cut in (10, 200, len(whole) // 2, len(whole) - 1):
        with connect(daemon.port) as client:
            client.sendall(whole[:cut])
            client.shutdown(socket.SHUT_WR)
            received, _ = read_all(client)
        assert not received or parse(received)[0].status in (400, 499), received


def test_an_engine_that_closes_a_connection_just_as_it_is_used_again(daemon: Daemon) -> None:
    """Once is the risk of every idle connection: the request is sent again, on a fresh one."""
    for number in range(5):
        for _ in range(2):
            exchange(daemon, request(steps(ANSWERS["length"]), headers=ENDS))
        received, _ = exchange(daemon, request([["once", f"{number}-{id(daemon)}"], send(ANSWERS["length"])],
                                               headers=ENDS))
        assert parse(received) == parse(ANSWERS["length"])


def test_a_request_whose_answer_has_begun_is_not_sent_again(daemon: Daemon) -> None:
    """The engine has done its work; a second time might do harm."""
    port = daemon.instances()[0]["port"]
    exchange(daemon, request(steps(ANSWERS["length"]), headers=ENDS))      # leaves a connection to use again
    before = daemon.call("GET", "/stats", port=port).json["requests"]
    received, _ = exchange(daemon, request(steps(ANSWERS["length"][:20], CLOSE), headers=ENDS))
    assert parse(received)[0].status == 502
    assert daemon.call("GET", "/stats", port=port).json["requests"] == before + 1


@pytest.mark.parametrize("leave", [CLOSE, RESET], ids=["close", "reset"])
def test_a_client_that_leaves_takes_its_upstream_along(daemon: Daemon, leave: Step) -> None:
    port = daemon.instances()[0]["port"]
    for name in ("events", "length"):
        answer = ANSWERS[name]
        for at in (0, 20, len(answer) - 4):
            with connect(daemon.port) as client:
                client.sendall(request([send(answer[:at]), ["wait", "never"]]))
                wait_until(lambda: daemon.instances()[0]["in_flight"] == 1)
                if leave == RESET:
                    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            assert_no_lease(daemon)
    idle = daemon.call("GET", "/stats", port=port).json["open"]
    assert idle < 8, "connections of clients that left are still open"


# --- tunnels --------------------------------------------------------------------------------------------------------

SWITCHED = b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n"
UPGRADE = b"Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Key: eA==\r\nSec-WebSocket-Version: 13\r\n"


def open_socket(daemon: Daemon, script: list[Step], path: str = "/v1/realtime?model=m") -> socket.socket:
    client = connect(daemon.port)
    client.sendall(request(script, method="GET", path=path, headers=UPGRADE, body=b""))
    return client


def test_a_websocket_carries_both_ways_and_closes_from_either_side(daemon: Daemon, running: tuple[Daemon, str]) -> None:
    for path in ("/v1/realtime?model=m", "/v1/realtime", f"/proxy/{running[1]}/any"):
        with open_socket(daemon, [send(SWITCHED), ["echo"]], path) as client:
            first = client.recv(5)
            if first == b"HTTP/" and not daemon_has_relays(daemon):
                (got,) = parse(first + read_all_after(client))
                assert (got.status, json.loads(got.body)["error"]["code"]) == (503, "no_relay")
                continue
            assert first + read_exactly(client, len(SWITCHED) - 5) == SWITCHED
            sent = b""
            for size in (1, 125, 70_000, 3):
                client.sendall(b"x" * size)
                assert read_exactly(client, size) == b"x" * size
                sent += b"x" * size
            assert daemon.instances()[0]["in_flight"] == 1
            client.shutdown(socket.SHUT_WR)
            assert read_all(client) == (b"", False)
    if daemon_has_relays(daemon):
        with open_socket(daemon, [send(SWITCHED), send(b"bye"), CLOSE]) as client:
            assert read_exactly(client, len(SWITCHED) + 3) == SWITCHED + b"bye"
            assert client.recv(1) == b""
        refusal = b"HTTP/1.1 403 Forbidden\r\nContent-Length: 2\r\nConnection: close\r\n\r\nno"
        with open_socket(daemon, [send(refusal), CLOSE]) as client:
            assert read_exactly(client, len(refusal)) == refusal


def daemon_has_relays(daemon: Daemon) -> bool:
    return daemon.env["RELAYS"] != "0"


def read_all_after(client: socket.socket) -> bytes:
    client.shutdown(socket.SHUT_WR)
    return read_all(client)[0]
