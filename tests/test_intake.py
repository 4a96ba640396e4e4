"""web/intake.py: requests come out whole, however their bytes were cut on the way."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from errors import TooLarge
from web.intake import KEPT_BYTES, KEPT_S, LARGE_BODY_BYTES, MAX_HEAD_BYTES, Buffers, Collected, Intake, Taken

LIMIT = 1 << 20
GET = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"


def post(body: bytes, *headers: bytes) -> bytes:
    return b"\r\n".join([b"POST / HTTP/1.1", b"Content-Length: %d" % len(body), *headers, b"", b""]) + body


def chunked(*chunks: bytes, trailers: bytes = b"") -> bytes:
    parts = b"".join(b"%x;ext=1\r\n%s\r\n" % (len(chunk), chunk) for chunk in chunks)
    return b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n" + parts + b"0\r\n" + trailers + b"\r\n"


def drive(intake: Intake, data: bytes, step: int) -> list[Taken]:
    """Feed it as the server does, `step` bytes at a time; what was taken whenever it was ready."""
    taken, at = [], 0
    while at < len(data):
        room = intake.room()
        count = min(step, len(data) - at, len(room) if room is not None else step)
        if room is not None:
            room[:count] = data[at:at + count]
            ready = intake.filled(count)
        else:
            ready = intake.feed(data[at:at + count])
        at += count
        while ready:
            taken.append(intake.take())
            ready = intake.begun and intake.ready()
    return taken


@given(st.integers(1, 400), st.lists(st.sampled_from([
    GET, post(b""), post(b"abc"), post(b"y" * 70_000), post(b"z" * 200_000, b"Expect: 100-continue"),
    chunked(b"abc", b"hello"), chunked(trailers=b"A: 1\r\nB: 2\r\n"), chunked(b"\r\n0\r\n\r\n")]),
    min_size=1, max_size=5))
def test_any_cut_gives_the_same_requests(thousandths: int, requests: list[bytes]) -> None:
    data = b"".join(requests)
    step = max(1, len(data) * thousandths // 1000)
    taken = drive(Intake(LIMIT), data, step)
    assert [bytes(one.body) for one in taken] == [body_of(request) for request in requests]
    assert all(one.whole and one.refusal is None for one in taken)
    assert all(one.head.endswith(b"\r\n\r\n") and b"Expect" not in one.head for one in taken)


def body_of(request: bytes) -> bytes:
    head, _, body = request.partition(b"\r\n\r\n")
    if b"chunked" not in head:
        return body
    return {chunked(b"abc", b"hello"): b"abchello", chunked(b"\r\n0\r\n\r\n"): b"\r\n0\r\n\r\n"}.get(request, b"")


def test_a_body_that_is_declared_too_large_is_not_waited_for() -> None:
    intake = Intake(1000)
    assert intake.feed(b"POST / HTTP/1.1\r\nContent-Length: 1001\r\n\r\n")
    taken = intake.take()
    assert isinstance(taken.refusal, TooLarge) and not taken.whole


@pytest.mark.parametrize("chunks", [(b"x" * 600, b"x" * 600), (b"x" * 5000,)])
def test_a_chunked_body_that_grows_too_large_is_refused_as_it_grows(chunks: tuple[bytes, ...]) -> None:
    intake = Intake(1000)
    assert any(intake.feed(bytes([byte])) for byte in chunked(*chunks))
    assert isinstance(intake.take().refusal, TooLarge)


@pytest.mark.parametrize("body", [b"zz\r\nabc\r\n0\r\n\r\n", b"-1\r\n", b"3\r\nabcd\r\n0\r\n\r\n", b"0x3\r\nabc\r\n",
                                  b"\r\n\r\n", b"f" * 5000, b"0\r\n" + b"A: b\r\n" * 30_000])
def test_broken_chunks_are_told_and_nothing_after_them_is_believed(body: bytes) -> None:
    intake = Intake(LIMIT)
    assert intake.feed(b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n" + body)
    taken = intake.take()
    assert taken.refusal is not None and taken.refusal.code == "invalid_chunk" and not taken.whole
    assert not intake.begun


def test_a_head_without_end_is_handed_over_to_be_refused() -> None:
    intake = Intake(LIMIT)
    assert not intake.feed(b"GET / HTTP/1.1\r\nA: " + b"x" * (MAX_HEAD_BYTES // 2))
    assert intake.feed(b"x" * MAX_HEAD_BYTES)
    assert not intake.take().whole


@pytest.mark.parametrize("length", [10, LARGE_BODY_BYTES * 2])
def test_a_client_that_ends_early_is_told_how_early(length: int) -> None:
    intake = Intake(LIMIT)
    drive(intake, b"POST / HTTP/1.1\r\nContent-Length: %d\r\n\r\n1234" % length, 1)
    intake.end()
    taken = intake.take()
    assert taken.refusal is not None and taken.refusal.code == "incomplete_body" and not taken.whole
    assert f"ended after 4 bytes; its Content-Length says {length}" in taken.refusal.message
    assert taken.head.endswith(b"\r\n\r\n") and not intake.begun


def test_a_client_that_ends_within_chunks_is_broken() -> None:
    intake = Intake(LIMIT)
    assert not intake.feed(chunked(b"abc")[:-3])
    intake.end()
    refusal = intake.take().refusal
    assert refusal is not None and refusal.code == "invalid_chunk"


def test_expect_is_noticed_once_the_head_is_there() -> None:
    intake = Intake(LIMIT)
    intake.feed(b"POST / HTTP/1.1\r\nContent-Length: 3\r\nExpect: 100-con")
    assert not intake.wants_continue
    intake.feed(b"tinue\r\n\r\n")
    assert intake.wants_continue


def test_a_collected_body_is_read_like_any_file_and_taken_whole() -> None:
    body = Collected(bytearray(b"hello world"))
    assert body.read(5) == b"hello"
    assert body.read() == b" world"
    assert body.read(1) == b""
    whole = Collected(b"abc")
    assert whole.take() == b"abc"
    assert whole.read(1024) == b""      # a server that discards what is left finds nothing


def test_the_place_of_a_large_body_is_used_again() -> None:
    buffers = Buffers()
    places = []
    for fill in (b"a", b"b"):
        intake = Intake(LIMIT, buffers)
        [taken] = drive(intake, post(fill * 100_000), 4096)
        assert bytes(taken.body) == fill * 100_000
        assert taken.place is not None
        places.append(id(taken.place))
        buffers.give_back(taken.place)
    assert places[0] == places[1]


def test_places_are_kept_within_a_bound_and_not_given_to_much_smaller_bodies() -> None:
    buffers = Buffers()
    for _ in range(10):
        buffers.give_back(bytearray(KEPT_BYTES // 4))
    assert sum(one.__alloc__() for one in buffers._free) <= KEPT_BYTES
    assert len(buffers.take(LARGE_BODY_BYTES)) < KEPT_BYTES // 4


def test_places_for_large_bodies_are_given_back_when_there_are_no_more() -> None:
    buffers = Buffers()
    buffers.give_back(bytearray(1 << 20))
    buffers.tick(100.0)
    buffers.tick(100.0 + KEPT_S - 1)
    place = buffers.take_kept(1 << 20)
    assert place is not None
    buffers.give_back(place)
    buffers.tick(100.0 + KEPT_S)
    buffers.tick(99.0 + 2 * KEPT_S)
    assert len(buffers._free) == 1
    buffers.tick(100.0 + 2 * KEPT_S)
    assert buffers.take_kept(1 << 20) is None
