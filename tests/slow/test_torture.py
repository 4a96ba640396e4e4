"""The data plane on raw sockets: everything that may break, at every byte; then at random.

Either side's end must show on the other, what is whole must be whole, and nothing may be held afterwards.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.daemon import Daemon
from tests.data_plane import ANSWERS, CLOSING, scripted_daemon, steps
from tests.exchanges import (
    CLOSE,
    RESET,
    Held,
    Step,
    assert_no_lease,
    assert_same,
    connect,
    exchange,
    held,
    parse,
    request,
    send,
)
from tests.relay_harness import read_all, read_exactly, reset
from tests.support import wait_until

ENDS = b"Connection: close\r\n"
AT_ONCE = 8
WARM = 32
EXAMPLES = max(50, settings().max_examples // 20)      # 500 in CI: each is a whole exchange
SWITCHED = b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n"
UPGRADE = b"Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Key: eA==\r\nSec-WebSocket-Version: 13\r\n"

Leave = Callable[[socket.socket], None]
Item = TypeVar("Item")
pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module", params=[1, 0], ids=["relayed", "by threads"])
def daemon(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """At the end it holds no more than after the first exchanges."""
    with scripted_daemon(tmp_path_factory.mktemp("daemon"), request.param) as (daemon, _):
        warm_up(daemon)
        before = at_rest(daemon)
        yield daemon
        warm_up(daemon)
        wait_until(lambda: held(daemon).threads <= before.threads + 2, 120)     # more may have been needed meanwhile
        after = at_rest(daemon)
        assert after.descriptors <= before.descriptors + AT_ONCE, (before, after)
        assert "Traceback" not in daemon.log


@pytest.fixture(autouse=True)
def no_lease(daemon: Daemon) -> Iterator[None]:
    yield
    assert_no_lease(daemon)


def warm_up(daemon: Daemon) -> None:
    """As many requests at once as any test has, all waiting for the engine.

    That starts every thread and leaves as many connections to the engine, to be used again.
    """
    at_once(lambda _: exchange(daemon, request(steps(ANSWERS["events"]), headers=ENDS)), range(WARM))
    name = f"warm-{time.monotonic_ns()}"
    port = daemon.instances()[0]["port"]
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(connect(daemon.port)) for _ in range(WARM)]
        for client in clients:
            client.sendall(request([["wait", name], send(ANSWERS["length"])], headers=ENDS))
        wait_until(lambda: daemon.instances()[0]["in_flight"] == WARM)
        daemon.call("GET", f"/release/{name}", port=port)
        for client in clients:
            assert parse(read_all(client)[0]) == parse(ANSWERS["length"])


def at_rest(daemon: Daemon) -> Held:
    assert_no_lease(daemon)
    return held(daemon)


def at_once(work: Callable[[Item], object], items: Sequence[Item]) -> None:
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for _ in pool.map(work, items):
            pass


# --- at every byte ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("end", [CLOSE, RESET], ids=["close", "reset"])
@pytest.mark.parametrize("version", ["1.1", "1.0"])
@pytest.mark.parametrize("name", ["events", "trailers", "length", "until the end", "103 before"])
def test_an_upstream_that_dies_at_every_byte(daemon: Daemon, name: str, version: str, end: Step) -> None:
    answer = (ANSWERS | CLOSING)[name]

    def die(at: int) -> None:
        asked = request([*steps(answer[:at]), ["gap"], end], version=version, headers=ENDS)
        assert_same(answer[:at], end == RESET, *exchange(daemon, asked))

    at_once(die, range(len(answer) + 1))


def half_close(client: socket.socket) -> None:
    client.shutdown(socket.SHUT_WR)
    read_all(client)
    client.close()


CHUNKED_BODY = b"5;a=b\r\n{\"mod\r\n9\r\nel\": \"m\"}\r\n0\r\nX-Trailer: 1\r\n\r\n"
REQUESTS: dict[str, bytes] = {
    "length": request(steps(ANSWERS["length"])),
    "stream": request(steps(ANSWERS["events"])),
    "chunks": request(steps(ANSWERS["length"])).partition(b"\r\n\r\n")[0].replace(
        b"Content-Length: 14\r\n", b"Transfer-Encoding: chunked\r\n") + b"\r\n\r\n" + CHUNKED_BODY,
    "expect": request(steps(ANSWERS["length"]), headers=b"Expect: 100-continue\r\n"),
    "upgrade": request([send(SWITCHED), ["echo"]], method="GET", path="/v1/realtime?model=m", headers=UPGRADE,
                       body=b""),
    "two": request(steps(ANSWERS["length"])) * 2,
}


@pytest.mark.parametrize("leave", [socket.socket.close, reset, half_close])
@pytest.mark.parametrize("name", REQUESTS)
def test_a_client_that_leaves_at_every_byte_of_its_request(daemon: Daemon, name: str, leave: Leave) -> None:
    leave_at_every_byte_of_a_request(daemon, REQUESTS[name], leave)


def leave_at_every_byte_of_a_request(daemon: Daemon, asked: bytes, leave: Leave) -> None:
    """And the next one is answered."""
    def go(at: int) -> None:
        with connect(daemon.port) as client:
            client.sendall(asked[:at])
            leave(client)

    at_once(go, range(len(asked) + 1))
    assert parse(exchange(daemon, request(steps(ANSWERS["length"]), headers=ENDS))[0]) == parse(ANSWERS["length"])


@pytest.mark.parametrize("leave", [socket.socket.close, reset])
@pytest.mark.parametrize("name", ["events", "length", "until the end"])
def test_a_client_that_leaves_at_every_byte_of_the_answer(daemon: Daemon, name: str, leave: Leave) -> None:
    leave_at_every_byte_of_an_answer(daemon, (ANSWERS | CLOSING)[name], leave)
    assert_no_lease(daemon)
    assert engine_connections(daemon) <= WARM + AT_ONCE


def leave_at_every_byte_of_an_answer(daemon: Daemon, answer: bytes, leave: Leave) -> None:
    """The engine falls silent after that byte, and is told of the client's end by the end of its connection."""
    def go(at: int) -> None:
        with connect(daemon.port) as client:
            client.sendall(request([*steps(answer[:at]), ["wait", "never"]]))
            said = parse(answer[:at], was_reset=True)
            received = b""
            while said and said[0].body and [got.body for got in parse(received)] != [said[0].body]:
                piece = client.recv(65536)
                assert piece, received
                received += piece
            leave(client)

    at_once(go, range(len(answer)))


def engine_connections(daemon: Daemon) -> int:
    port = daemon.instances()[0]["port"]
    return int(daemon.call("GET", "/stats", port=port).json["open"])


# --- sizes and speeds ---------------------------------------------------------------------------------------------

LARGE = 4_000_000
LARGE_ANSWERS: dict[str, list[Step]] = {
    "length": [send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % LARGE), ["repeat", "0123456789" * 100, 4000]],
    "chunks": [send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"),
               ["repeat", "3e8\r\n" + "0123456789" * 100 + "\r\n", 4000], send(b"0\r\n\r\n")],
    "end": [send(b"HTTP/1.1 200 OK\r\n\r\n"), ["repeat", "0123456789" * 100, 4000], CLOSE],
}


@pytest.mark.parametrize("version", ["1.1", "1.0"])
@pytest.mark.parametrize("name", LARGE_ANSWERS)
def test_slow_clients_get_every_byte_and_hold_little(daemon: Daemon, name: str, version: str) -> None:
    clients = [connect(daemon.port, 65536) for _ in range(AT_ONCE)]
    before = held(daemon).resident_bytes
    begin_large_answers(clients, name, version)
    assert held(daemon).resident_bytes - before < AT_ONCE * 1_000_000
    assert exchange(daemon, request(steps(ANSWERS["length"]), headers=ENDS))[0]
    read_large_answers(clients)


def begin_large_answers(clients: Sequence[socket.socket], name: str, version: str) -> None:
    """All have begun, and none reads on."""
    for client in clients:
        client.sendall(request(LARGE_ANSWERS[name], version=version, headers=ENDS))
    heads = [read_exactly(client, 12) for client in clients]
    assert heads == [f"HTTP/{version} 200".encode()] * len(clients)


def read_large_answers(clients: Sequence[socket.socket]) -> None:
    def drain(client: socket.socket) -> None:
        with client:
            received, was_reset = read_all(client)
        (got,) = parse(b"HTTP/1.1 200" + received, was_reset=was_reset)
        assert got.complete and got.body == b"0123456789" * (LARGE // 10)

    at_once(drain, clients)


def test_large_uploads_that_are_cut_short(daemon: Daemon) -> None:
    whole = request(steps(ANSWERS["length"]), body=b'{"model": "m", "pad": "' + b"x" * 3_000_000 + b'"}')

    def cut(number: int) -> None:
        with connect(daemon.port) as client:
            client.sendall(whole[:len(whole) * number // 40])
            (reset if number % 2 else socket.socket.close)(client)

    before = held(daemon)
    at_once(cut, range(40))
    assert_no_lease(daemon)
    assert held(daemon).resident_bytes - before.resident_bytes < 64_000_000
    got = parse(exchange(daemon, request([["mirror"]], body=whole[-3_000_025:], headers=ENDS))[0])
    assert got[0].status == 200 and got[0].body.endswith(whole[-3_000_025:])


def test_connections_that_the_engine_closes_as_they_are_used_again(daemon: Daemon) -> None:
    """Many at once: each is tried again on a fresh one, not on the next stale one."""
    def ask(name: str) -> None:
        received, _ = exchange(daemon, request([["once", name], send(ANSWERS["length"])], headers=ENDS))
        assert parse(received) == parse(ANSWERS["length"]), name

    for round_ in range(5):
        warm_up(daemon)             # leaves as many connections as were used at once
        at_once(ask, [f"{daemon.env['RELAYS']}-{round_}-{number}" for number in range(AT_ONCE // 2)])


def test_an_engine_that_ends_in_the_midst_of_many(daemon: Daemon) -> None:
    """Each client sees an end or an explained error, and the engine comes back."""
    head = ANSWERS["events"][:ANSWERS["events"].index(b"data: 2")]
    clients = [connect(daemon.port) for _ in range(24)]
    for number, client in enumerate(clients):
        silent: list[Step] = [["wait", "never"]]
        client.sendall(request([send(head), *silent] if number % 2 else silent, headers=ENDS))
    wait_until(lambda: daemon.instances()[0]["in_flight"] == len(clients))
    exchange(daemon, request([["exit"]], headers=ENDS))
    for number, client in enumerate(clients):
        with client:
            received, was_reset = read_all(client)
        if number % 2:
            assert_same(head, False, received, was_reset)
        else:
            assert parse(received)[0].status == 502
    wait_until(lambda: daemon.instances()[0]["restarts"] == 1 and daemon.instances()[0]["status"] == "ready")
    assert parse(exchange(daemon, request(steps(ANSWERS["length"]), headers=ENDS))[0]) == parse(ANSWERS["length"])


def test_a_relay_that_dies_in_the_midst_of_many(daemon: Daemon) -> None:
    """Each client sees the cut, no lease is left, and the next stream finds another relay."""
    if daemon.env["RELAYS"] == "0":
        return
    begun = ANSWERS["events"][:ANSWERS["events"].index(b"9\r\ndata: 2")]
    for _ in range(3):
        (relay,) = relays(daemon)
        clients = [connect(daemon.port) for _ in range(24)]
        for client in clients:
            client.sendall(request([send(begun), ["wait", "never"]]))
        received = [b""] * len(clients)
        for number, client in enumerate(clients):
            while b"data: 1\n\n" not in received[number]:
                received[number] += client.recv(65536)
        os.kill(relay, signal.SIGKILL)
        for number, client in enumerate(clients):
            with client:
                rest, was_reset = read_all(client)
            (got,) = parse(received[number] + rest, was_reset=was_reset)
            assert not got.complete and got.body == b"data: 1\n\n"
        assert_no_lease(daemon)
        assert_same(ANSWERS["events"], False, *exchange(daemon, request(steps(ANSWERS["events"]), headers=ENDS)))
        wait_until(lambda relay=relay: relays(daemon) not in ([], [relay]))


def relays(daemon: Daemon) -> list[int]:
    return [child.pid for child in psutil.Process(daemon.worker_pid).children()
            if "relay_child" in " ".join(child.cmdline())]


# --- at random ----------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Case:
    version: str
    answer: bytes
    cuts: tuple[int, ...]       # where the engine's writes end
    death: int | None           # after so many bytes the engine ends
    end: Step
    receive_bytes: int | None
    is_closing: bool

    def script(self) -> list[Step]:
        sent = self.sent()
        places = sorted({0, len(sent), *(cut % (len(sent) + 1) for cut in self.cuts)})
        script: list[Step] = []
        for start, stop in zip(places, places[1:], strict=False):
            script += [send(sent[start:stop]), ["gap"]]
        return [*script, self.end] if self.death is not None or self.is_closing else script

    def sent(self) -> bytes:
        return self.answer if self.death is None else self.answer[:self.death % (len(self.answer) + 1)]

    def was_reset(self) -> bool:
        return self.end == RESET and (self.death is not None or self.is_closing)


@st.composite
def cases(draw: st.DrawFn, statuses: Sequence[int] = (200, 200, 201, 400, 500, 503)) -> Case:
    chunks = draw(st.lists(st.binary(min_size=1, max_size=200), max_size=6))
    kind = draw(st.sampled_from(["chunked", "length", "end", "events"]))
    head = [b"HTTP/1.1 %d X" % draw(st.sampled_from(statuses)),
            b"X-Own: " + draw(st.binary(max_size=20)).hex().encode()]
    if kind == "events":
        chunks = [b"data: %s\n\n" % chunk.hex().encode() for chunk in chunks]
        head.append(b"Content-Type: text/event-stream")
    if kind in ("chunked", "events"):
        head.append(b"Transfer-Encoding: chunked")
        extension = draw(st.sampled_from([b"", b";a=b", b" ; c=\"d\""]))
        trailers = draw(st.sampled_from([b"", b"X-Sum: 1\r\n", b"A: 0\r\nB: \r\n"]))
        body = b"".join(b"%x%s\r\n%s\r\n" % (len(chunk), extension, chunk) for chunk in chunks) + b"0\r\n" + trailers
        body += b"\r\n"
    else:
        body = b"".join(chunks)
        head.append(b"Content-Length: %d" % len(body) if kind == "length" else b"Connection: close")
    return Case(
        version=draw(st.sampled_from(["1.1", "1.1", "1.0"])), answer=b"\r\n".join([*head, b"", b""]) + body,
        cuts=tuple(draw(st.lists(st.integers(0, 2000), max_size=5))),
        death=draw(st.none() | st.integers(0, 2000)), end=draw(st.sampled_from([CLOSE, RESET])),
        receive_bytes=draw(st.sampled_from([None, None, 2048])), is_closing=kind == "end")


@settings(max_examples=EXAMPLES)
@given(case=cases())
def test_any_exchange(daemon: Daemon, case: Case) -> None:
    received, was_reset = exchange(daemon, request(case.script(), version=case.version, headers=ENDS),
                                   receive_bytes=case.receive_bytes)
    assert_same(case.sent(), case.was_reset(), received, was_reset)


@settings(max_examples=EXAMPLES)
@given(several=st.lists(cases(), min_size=2, max_size=6), leave_after=st.integers(0, 3000),
       how=st.sampled_from([socket.socket.close, reset]))
def test_any_exchanges_at_once_with_a_client_that_leaves(daemon: Daemon, several: list[Case], leave_after: int,
                                                         how: Leave) -> None:
    """Nobody notices what happens to another one."""
    with connect(daemon.port) as leaver:
        leaver.sendall(request(several[0].script(), version=several[0].version, headers=ENDS))

        def go(case: Case) -> None:
            received, was_reset = exchange(daemon, request(case.script(), version=case.version, headers=ENDS))
            assert_same(case.sent(), case.was_reset(), received, was_reset)

        at_once(go, several[1:])
        if leave_after:
            with contextlib.suppress(ConnectionResetError):     # of an answer that was cut
                leaver.recv(leave_after)
        how(leaver)


@settings(max_examples=EXAMPLES // 2)
@given(requests=st.lists(st.tuples(st.binary(max_size=300), st.booleans()), min_size=1, max_size=6),
       cuts=st.lists(st.integers(0, 5000), max_size=6))
def test_any_cut_of_pipelined_requests(daemon: Daemon, requests: list[tuple[bytes, bool]], cuts: list[int]) -> None:
    data = b""
    for number, (pad, chunked) in enumerate(requests):
        body = b'{"model": "m", "pad": "' + pad.hex().encode() + b'"}'
        last = number == len(requests) - 1
        one = request([["mirror"]], body=body, headers=ENDS if last else b"")
        if chunked:
            one = one.partition(b"\r\n\r\n")[0].replace(b"Content-Length: %d\r\n" % len(body),
                                                        b"Transfer-Encoding: chunked\r\n")
            one += b"\r\n\r\n%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
        data += one
    places = sorted({0, len(data), *(cut % len(data) for cut in cuts)})
    with connect(daemon.port) as client:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for start, stop in zip(places, places[1:], strict=False):
            client.sendall(data[start:stop])
        received, was_reset = read_all(client)
    assert not was_reset
    answers = parse(received)
    assert len(answers) == len(requests)
    for (pad, _), answer in zip(requests, answers, strict=True):
        assert answer.body.endswith(b'\r\n\r\n{"model": "m", "pad": "' + pad.hex().encode() + b'"}')


@settings(max_examples=EXAMPLES // 4)
@given(messages=st.lists(st.integers(1, 100_000), min_size=1, max_size=8), ends=st.sampled_from(["half", "close",
                                                                                                 "reset"]))
def test_any_tunnel(daemon: Daemon, messages: list[int], ends: str) -> None:
    if daemon.env["RELAYS"] == "0":
        return
    with connect(daemon.port) as client:
        client.sendall(REQUESTS["upgrade"])
        assert read_exactly(client, len(SWITCHED)) == SWITCHED
        for size in messages:
            client.sendall(bytes([size % 256]) * size)
            assert read_exactly(client, size) == bytes([size % 256]) * size
        if ends == "half":
            client.shutdown(socket.SHUT_WR)
            assert read_all(client) == (b"", False)
        elif ends == "reset":
            reset(client)
