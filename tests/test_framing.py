from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from routing.framing import CHUNKED, EOF, LINE_LIMIT, ChunkedBody, Framing, content_length, follow
from tests.relay_strategies import ChunkedText, chunked_texts


def feed(body: ChunkedBody, data: bytes, room: int = 0) -> int:
    """As the loop does it: the data at the head of a larger buffer, with an old read's bytes behind."""
    buffer = bytearray(data + b"5\r\nstale\r\n0\r\n\r\n" * room)
    return body.feed(buffer, len(data))


@given(chunked_texts(), st.lists(st.integers(0, 2000)), st.binary(max_size=20))
def test_the_end_is_found_however_the_bytes_are_split(text: ChunkedText, cuts: list[int], beyond: bytes) -> None:
    body = ChunkedBody()
    data = text.data + beyond
    places = sorted({cut % len(text.data) for cut in cuts} | {0, len(data)})
    taken = 0
    for start, end in zip(places, places[1:], strict=False):
        assert not body.done
        taken += feed(body, data[start:end], room=3)
        if end < len(text.data):
            assert not body.done
            assert bool(body.event_chunk(b"{}")) == (end in text.boundaries)
    assert taken == len(text.data)
    assert body.done and not body.broken
    assert body.event_chunk(b"{}") == b""


@given(chunked_texts())
def test_a_byte_at_a_time(text: ChunkedText) -> None:
    body = ChunkedBody()
    for at in range(len(text.data)):
        assert not body.done
        assert bool(body.event_chunk(b"{}")) == (at in text.boundaries)
        assert feed(body, text.data[at : at + 1]) == 1
    assert body.done


@pytest.mark.parametrize("line", [b"zz", b"", b";only=extension", b"-5", b"5 5"])
def test_a_line_that_is_no_size_breaks_the_body(line: bytes) -> None:
    body = ChunkedBody()
    good = b"3\r\nabc\r\n"
    assert feed(body, good + line + b"\r\nrest") == len(good)
    assert body.broken and not body.done
    assert body.event_chunk(b"{}") == b""


def test_a_line_without_end_breaks_the_body_and_is_not_kept_for_ever() -> None:
    body = ChunkedBody()
    for _ in range(LINE_LIMIT // 1024 + 1):
        feed(body, b"1" * 1024)
    assert body.broken


def test_an_event_is_put_after_a_finished_event_as_it_is_and_else_after_an_empty_line() -> None:
    body = ChunkedBody()
    assert body.event_chunk(b"{}") == b"a\r\ndata: {}\n\n\r\n"
    feed(body, b"9\r\ndata: 1\n\n\r\n")
    assert body.event_chunk(b"{}") == b"a\r\ndata: {}\n\n\r\n"
    feed(body, b"6\r\ndata: \r\n")
    assert body.event_chunk(b"{}") == b"c\r\n\n\ndata: {}\n\n\r\n"


def test_a_body_with_a_length() -> None:
    body = follow(content_length(5))
    assert body.feed(b"abc", 3) == 3
    assert not body.done
    assert body.feed(b"defg", 4) == 2
    assert body.done
    assert follow(content_length(0)).done


@pytest.mark.parametrize(("framing", "shows"), [(CHUNKED, True), (content_length(1), True), (EOF, False)])
def test_whether_a_client_sees_a_cut(framing: Framing, shows: bool) -> None:
    assert follow(framing).cut_shows == shows
