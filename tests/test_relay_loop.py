from __future__ import annotations

import random
import socket
import threading
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from routing.framing import CHUNKED, EOF, TUNNEL, Framing, content_length
from routing.poller import LINGER_S, READ_BYTES
from routing.relay_loop import Handover
from tests.relay_harness import (
    HEAD,
    Driven,
    at_end,
    driven_loop,
    fill,
    pump,
    read_all,
    read_exactly,
    reset,
)
from tests.relay_strategies import ChunkedText, chunked_texts
from tests.support import wait_until

WIRE = b"5\r\nhello\r\n6;x=y\r\n world\r\n0\r\nX-Sum: 1\r\n\r\n"  # a chunk extension and a trailer in it
BOUNDARIES = (0, 10, 25)
TEXT = b"hello world"
ERROR = b'{"error": {"message": "gone"}}'
ERROR_CHUNK = b"26\r\ndata: %s\n\n\r\n" % ERROR
ERROR_CHUNK_AFTER_TEXT = b"28\r\n\n\ndata: %s\n\n\r\n" % ERROR  # ends an event that was begun


CI_TIMEOUT_S = 1800  # of a test with thousands of examples

Act = Callable[[socket.socket], None]


def handover(exchange_id: int, to_client: bytes, framing: Framing) -> Handover:
    return Handover(exchange_id, to_client, framing, body_at=len(to_client))


@pytest.fixture
def driven() -> Iterator[Driven]:
    with driven_loop() as driven:
        yield driven


# --- the upstream's death ------------------------------------------------------------------------------------------

@pytest.mark.parametrize("die", [socket.socket.close, reset])
@pytest.mark.parametrize(("framing", "body"), [(CHUNKED, WIRE), (content_length(len(TEXT)), TEXT)])
def test_upstream_dies_at_every_byte(driven: Driven, framing: Framing, body: bytes, die: Act) -> None:
    for cut in range(len(body) + 1):
        exchange_id, client, upstream = driven.open(framing)
        upstream.sendall(body[:cut])
        die(upstream)
        assert read_all(client) == (HEAD + body[:cut], False)
        end = driven.end_of(exchange_id)
        whole = cut == len(body)
        assert (end.by, end.complete) == (("upstream", True) if whole else ("upstream_cut", False))
        assert end.bytes_to_client == len(HEAD) + cut
        assert (end.first_byte_s is None) == (cut == 0)
        client.close()


def test_a_body_that_ends_with_the_connection_is_complete_wherever_it_ends(driven: Driven) -> None:
    for cut in range(len(TEXT) + 1):
        exchange_id, client, upstream = driven.open(EOF)
        upstream.sendall(TEXT[:cut])
        upstream.close()
        assert read_all(client) == (HEAD + TEXT[:cut], False)
        assert driven.end_of(exchange_id).complete
        client.close()


def test_a_reset_of_a_body_that_ends_with_the_connection_is_passed_on_as_a_reset(driven: Driven) -> None:
    exchange_id, client, upstream = driven.open(EOF)
    upstream.sendall(TEXT)
    assert read_exactly(client, len(HEAD + TEXT)) == HEAD + TEXT
    reset(upstream)
    assert read_all(client) == (b"", True)
    assert driven.end_of(exchange_id).by == "upstream_cut"


def test_a_stream_of_events_tells_that_it_was_cut_where_its_framing_allows(driven: Driven) -> None:
    for cut in range(len(WIRE)):
        exchange_id, client, upstream = driven.open(CHUNKED, sse=True, cut_message=ERROR)
        upstream.sendall(WIRE[:cut])
        upstream.close()
        data, _ = read_all(client)
        told = ERROR_CHUNK if cut == 0 else ERROR_CHUNK_AFTER_TEXT if cut in BOUNDARIES else b""
        assert data == HEAD + WIRE[:cut] + told
        assert driven.end_of(exchange_id).by == "upstream_cut"
        client.close()


def test_a_body_that_is_not_chunked_as_announced_is_cut(driven: Driven) -> None:
    exchange_id, client, upstream = driven.open(CHUNKED, sse=True, cut_message=ERROR)
    upstream.sendall(b"5\r\nhello\r\nnonsense\r\n0\r\n\r\n")
    assert read_all(client) == (HEAD + b"5\r\nhello\r\n", False)
    assert driven.end_of(exchange_id).by == "upstream_cut"
    assert at_end(upstream)


# --- the client's death --------------------------------------------------------------------------------------------

def half_close(sock: socket.socket) -> None:
    sock.shutdown(socket.SHUT_WR)


@pytest.mark.parametrize("leave", [socket.socket.close, reset, half_close])
@pytest.mark.parametrize(("framing", "body"), [(CHUNKED, WIRE), (content_length(len(TEXT)), TEXT), (EOF, TEXT)])
def test_client_leaves_at_every_byte_of_a_silent_upstream(driven: Driven, framing: Framing, body: bytes,
                                                          leave: Act) -> None:
    for at in range(len(body)):
        exchange_id, client, upstream = driven.open(framing)
        upstream.sendall(body[:at])
        assert read_exactly(client, len(HEAD) + at) == HEAD + body[:at]
        leave(client)
        assert at_end(upstream)
        end = driven.end_of(exchange_id)
        assert (end.by, end.complete, end.bytes_to_client) == ("client", False, len(HEAD) + at)
        client.close()


def test_client_that_left_before_the_hand_over(driven: Driven) -> None:
    client, client_side = driven.sockets.pair()
    client.close()
    upstream, upstream_side = driven.sockets.pair()
    driven.loop.add(client_side, upstream_side, handover(7, HEAD, CHUNKED))
    assert driven.end_of(7).by == "client"
    assert at_end(upstream)


def test_client_that_leaves_an_upstream_that_never_stops_sending(driven: Driven) -> None:
    exchange_id, client, upstream = driven.open(EOF)
    read_exactly(client, len(HEAD))
    client.close()
    with pytest.raises((BrokenPipeError, ConnectionResetError)):
        while True:
            upstream.send(b"x" * 1000)
    assert driven.end_of(exchange_id).by == "client"


# --- whole bodies --------------------------------------------------------------------------------------------------

@pytest.mark.timeout(CI_TIMEOUT_S)
@given(text=chunked_texts(max_chunk=400), cuts=st.lists(st.integers(0, 10_000), max_size=6),
       read_ahead=st.integers(0, 10_000), beyond=st.sampled_from([b"", b"5\r\nmore!\r\n"]),
       read_bytes=st.integers(1, 3000), kind=st.sampled_from(["chunked", "length", "eof"]))
def test_bytes_are_identical_however_they_come(driven_for_all: Driven, text: ChunkedText, cuts: list[int],
                                               read_ahead: int, beyond: bytes, read_bytes: int, kind: str) -> None:
    driven = driven_for_all
    body = text.data
    framing = {"chunked": CHUNKED, "length": content_length(len(body)), "eof": EOF}[kind]
    data = body if kind == "eof" else body + beyond
    ahead = read_ahead % (len(data) + 1)
    exchange_id, client, upstream = driven.open(framing, to_client=HEAD + data[:ahead])
    places = sorted({ahead, len(data)} | {cut % len(data) for cut in cuts if cut % len(data) > ahead})
    pieces = [data[start:end] for start, end in zip(places, places[1:], strict=False)]
    if kind == "eof":
        upstream.sendall(b"".join(pieces))
        upstream.close()
        assert read_all(client) == (HEAD + body, False)
    else:
        assert pump(upstream, pieces, client, read_bytes) == HEAD + body
    end = driven.end_of(exchange_id)
    assert (end.by, end.complete, end.bytes_to_client) == ("upstream", True, len(HEAD + body))
    driven.forget()


@pytest.mark.timeout(CI_TIMEOUT_S)
@given(chunks=st.lists(st.integers(1, 60_000), min_size=1, max_size=8), write_bytes=st.integers(500, 100_000),
       read_bytes=st.integers(300, 50_000), buffer_bytes=st.sampled_from([2048, 8192, 65536]))
def test_bytes_are_identical_for_a_slow_client(driven_for_all: Driven, chunks: list[int], write_bytes: int,
                                               read_bytes: int, buffer_bytes: int) -> None:
    driven = driven_for_all
    body = b"".join(b"%x\r\n%s\r\n" % (size, random.Random(size).randbytes(size)) for size in chunks) + b"0\r\n\r\n"
    exchange_id, client, upstream = driven.open(CHUNKED, buffer_bytes=buffer_bytes)
    pieces = [body[at : at + write_bytes] for at in range(0, len(body), write_bytes)]
    assert pump(upstream, pieces, client, read_bytes) == HEAD + body
    assert driven.end_of(exchange_id).complete
    driven.forget()


@pytest.mark.timeout(CI_TIMEOUT_S)
@given(text=chunked_texts(max_chunk=200), at=st.integers(0, 10_000), read_ahead=st.integers(0, 10_000),
       death=st.sampled_from(["upstream closes", "upstream resets", "client closes", "client resets", "cut"]),
       buffer_bytes=st.sampled_from([None, 4096]))
def test_an_exchange_that_ends_anywhere_is_told_once_and_shows(driven_for_all: Driven, text: ChunkedText, at: int,
                                                               read_ahead: int, death: str,
                                                               buffer_bytes: int | None) -> None:
    driven = driven_for_all
    at %= len(text.data)
    ahead = read_ahead % (at + 1)
    exchange_id, client, upstream = driven.open(CHUNKED, to_client=HEAD + text.data[:ahead], sse=True,
                                                cut_message=ERROR, buffer_bytes=buffer_bytes)
    upstream.sendall(text.data[ahead:at])
    if death.startswith("upstream"):
        (reset if death == "upstream resets" and buffer_bytes is None else socket.socket.close)(upstream)
        by = "upstream_cut"
    else:
        assert read_exactly(client, len(HEAD) + at) == HEAD + text.data[:at]
        by = "client" if death.startswith("client") else "cut"
    if by == "client":
        (reset if death == "client resets" else socket.socket.close)(client)
    else:
        if by == "cut":
            driven.loop.cut(exchange_id)
        data, was_reset = read_all(client)
        assert not was_reset
        data = data if by == "cut" else data.removeprefix(HEAD + text.data[:at])
        assert data in ((ERROR_CHUNK, ERROR_CHUNK_AFTER_TEXT) if at in text.boundaries else (b"",))
    if not death.startswith("upstream"):
        assert at_end(upstream)
    end = driven.end_of(exchange_id)
    assert (end.by, end.complete) == (by, False)
    driven.forget()


@pytest.fixture(scope="module")
def driven_for_all() -> Iterator[Driven]:
    with driven_loop() as driven:
        yield driven


def test_a_body_that_came_whole_with_the_head(driven: Driven) -> None:
    for framing, body in ((CHUNKED, WIRE), (content_length(len(TEXT)), TEXT), (content_length(0), b"")):
        exchange_id, client, upstream = driven.open(framing, to_client=HEAD + body)
        assert read_all(client) == (HEAD + body, False)
        assert driven.end_of(exchange_id).complete
        assert at_end(upstream)


def test_the_upstream_is_closed_with_the_end_of_the_body_not_with_its_own(driven: Driven) -> None:
    _, client, upstream = driven.open(CHUNKED)
    upstream.sendall(WIRE)
    assert at_end(upstream)
    assert read_all(client) == (HEAD + WIRE, False)


# --- back-pressure -------------------------------------------------------------------------------------------------

def test_a_client_that_does_not_read_stops_the_upstream_and_then_gets_every_byte(driven: Driven) -> None:
    body = random.Random(1).randbytes(50_000_000)
    exchange_id, client, upstream = driven.open(content_length(len(body)), buffer_bytes=65536)
    sent = fill(driven, upstream, body)
    assert sent < 2_000_000  # what the kernel's four small buffers hold, and one read's bytes
    held = driven.held(exchange_id)
    assert 0 < held <= READ_BYTES
    driven.wait_for_rest()
    writer = threading.Thread(target=upstream.sendall, args=(memoryview(body)[sent:],))
    writer.start()
    data, was_reset = read_all(client)
    writer.join()
    assert not was_reset
    assert data == HEAD + body
    end = driven.end_of(exchange_id)
    assert end.complete and end.bytes_to_client == len(HEAD + body)


@pytest.mark.parametrize("die", [socket.socket.close, reset])
def test_an_upstream_that_dies_while_the_client_does_not_read(driven: Driven, die: Act) -> None:
    body = random.Random(2).randbytes(10_000_000)
    exchange_id, client, upstream = driven.open(content_length(len(body)), buffer_bytes=65536)
    sent = fill(driven, upstream, body)
    die(upstream)
    driven.wait_for_rest()
    data, was_reset = read_all(client)
    assert not was_reset
    assert (HEAD + body).startswith(data)
    if die is not reset:  # a reset throws away what its sender's kernel still held
        assert len(data) == len(HEAD) + sent
    assert driven.end_of(exchange_id).by == "upstream_cut"


def test_a_client_that_leaves_while_bytes_wait_for_it(driven: Driven) -> None:
    exchange_id, client, upstream = driven.open(EOF, buffer_bytes=65536)
    fill(driven, upstream, bytes(10_000_000))
    client.close()
    assert driven.end_of(exchange_id).by == "client"
    assert at_end(upstream)


def test_the_upstream_is_let_go_when_all_is_read_though_the_client_has_not_taken_it(driven: Driven) -> None:
    body = random.Random(6).randbytes(200_000)
    exchange_id, client, upstream = driven.open(content_length(len(body)), to_client=HEAD + body,
                                                client_buffer_bytes=4096)
    assert at_end(upstream)
    assert driven.ends == []
    driven.wait_for_rest()
    assert read_all(client) == (HEAD + body, False)
    assert driven.end_of(exchange_id).complete


# --- ends that are not the peers' ----------------------------------------------------------------------------------

def test_a_pipelined_request_is_neither_read_nor_spun_on_and_costs_no_byte(driven: Driven) -> None:
    exchange_id, client, upstream = driven.open(CHUNKED)
    client.sendall(b"GET / HTTP/1.1\r\n\r\n" * 500)
    assert read_exactly(client, len(HEAD)) == HEAD
    driven.wait_for_rest()
    before = driven.loop.turns
    for _ in range(50):
        upstream.sendall(b"1\r\nx\r\n")
        assert read_exactly(client, 6) == b"1\r\nx\r\n"
    assert driven.loop.turns - before <= 60
    client.sendall(b"more")
    upstream.sendall(b"5\r\nabcde\r\n0\r\n\r\n")
    assert driven.end_of(exchange_id).complete
    assert read_all(client) == (b"5\r\nabcde\r\n0\r\n\r\n", False)  # no reset has eaten the tail


def test_a_client_that_never_closes_is_let_go(driven: Driven) -> None:
    _, client, upstream = driven.open(CHUNKED)
    upstream.sendall(WIRE)
    assert read_all(client) == (HEAD + WIRE, False)
    for _ in range(3):
        client.sendall(b"still here")  # dropped, not answered with a reset
        driven.wait_for_rest()
    driven.advance(LINGER_S + 1)
    with pytest.raises((BrokenPipeError, ConnectionResetError)):
        while True:
            client.send(b"anybody?")


@pytest.mark.parametrize("framing", [CHUNKED, EOF])
def test_idle_timeout(driven: Driven, framing: Framing) -> None:
    exchange_id, client, upstream = driven.open(framing, idle_timeout_s=30, sse=True, cut_message=ERROR)
    assert read_exactly(client, len(HEAD)) == HEAD
    for _ in range(3):
        driven.advance(20)
        chunk = b"9\r\ndata: 1\n\n\r\n"
        upstream.sendall(chunk)
        assert read_exactly(client, len(chunk)) == chunk  # what moves starts the time anew
    assert driven.ends == []
    driven.advance(31)
    end = driven.end_of(exchange_id)
    assert (end.by, end.complete) == ("timeout", False)
    assert end.duration_s == pytest.approx(91)
    assert read_all(client) == ((ERROR_CHUNK, False) if framing == CHUNKED else (b"", True))
    assert at_end(upstream)


@pytest.mark.parametrize("at", range(len(WIRE)))
def test_cut(driven: Driven, at: int) -> None:
    exchange_id, client, upstream = driven.open(CHUNKED, sse=True)
    upstream.sendall(WIRE[:at])
    assert read_exactly(client, len(HEAD) + at) == HEAD + WIRE[:at]
    driven.loop.cut(exchange_id, ERROR)
    told, was_reset = read_all(client)
    assert not was_reset
    assert (ERROR in told) == (at in BOUNDARIES)
    end = driven.end_of(exchange_id)
    assert (end.by, end.complete) == ("cut", False)
    assert end.bytes_to_client == len(HEAD) + at + len(told)
    assert at_end(upstream)
    driven.loop.cut(exchange_id)  # again: nothing
    driven.settle()


def test_a_cut_of_a_body_that_ends_with_the_connection_is_a_reset(driven: Driven) -> None:
    exchange_id, client, upstream = driven.open(EOF)
    upstream.sendall(TEXT)
    read_exactly(client, len(HEAD + TEXT))
    driven.loop.cut(exchange_id)
    assert read_all(client) == (b"", True)


def test_stop_cuts_and_reports_what_is_open(driven: Driven) -> None:
    exchange_id, client, upstream = driven.open(CHUNKED)
    _, tunnel_client, tunnel_upstream = driven.open(TUNNEL)
    read_exactly(tunnel_client, len(HEAD))
    driven.stop()
    assert [(end.id, end.by) for end in driven.ends] == [(exchange_id, "cut"), (exchange_id + 1, "cut")]
    assert at_end(upstream) and at_end(tunnel_client) and at_end(tunnel_upstream)


def test_sockets_that_cannot_be_watched_are_closed_and_reported(driven: Driven) -> None:
    client, client_side = driven.sockets.pair()
    upstream, upstream_side = driven.sockets.pair()
    upstream_side.close()
    driven.loop.add(client_side, upstream_side, handover(9, HEAD, CHUNKED))
    assert driven.end_of(9).by == "cut"
    assert at_end(client)


# --- nothing is kept -----------------------------------------------------------------------------------------------

def test_nothing_is_kept_of_what_has_ended(driven: Driven) -> None:
    for _ in range(50):
        exchange_id, client, upstream = driven.open(CHUNKED)
        upstream.sendall(WIRE)
        read_all(client)
        client.close()
        driven.end_of(exchange_id)
    wait_until(lambda: driven.watched() == 1)  # its own wake-up
    assert driven.loop.open_count() == 0
    assert not driven.loop.busy()
