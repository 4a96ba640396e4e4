"""routing/answer.py: lines and pieces of a socket, however they come, and when a connection is good for another one."""

from __future__ import annotations

import io
import socket
from collections.abc import Iterator
from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from errors import UpstreamError
from routing.answer import Answer, Incoming
from routing.response_head import read_head
from tests.data_plane import ANSWERS, CLOSING
from tests.exchanges import parse


class Cut:
    """A socket that brings `data` in pieces of these sizes, over and over, and then ends."""

    def __init__(self, data: bytes, sizes: list[int]) -> None:
        self._pieces = self._cut(data, sizes)

    def _cut(self, data: bytes, sizes: list[int]) -> Iterator[bytes]:
        at = 0
        while at < len(data):
            for size in sizes:
                yield data[at:at + size]
                at += size

    def recv(self, limit: int) -> bytes:
        return next((piece for piece in self._pieces if piece), b"")[:limit]


def incoming(data: bytes, sizes: list[int]) -> Incoming:
    return Incoming(cast(socket.socket, Cut(data, sizes)))


SIZES = st.lists(st.integers(1, 20), min_size=1, max_size=5)
READS = st.lists(st.tuples(st.sampled_from(["readline", "read1", "peek"]), st.integers(1, 12)), max_size=30)


@given(st.lists(st.sampled_from([b"\n", b"\r\n", b"a", b"longer than a limit"])).map(b"".join), SIZES, READS)
def test_lines_are_those_of_a_file_and_no_byte_is_lost(data: bytes, sizes: list[int],
                                                      reads: list[tuple[str, int]]) -> None:
    file, ours = io.BytesIO(data), incoming(data, sizes)
    for what, limit in reads:
        if what == "readline":
            assert ours.readline(limit) == file.readline(limit)
        elif what == "read1":
            piece = ours.read1(limit)
            assert len(piece) <= limit and piece == file.read(len(piece))
            assert piece or not file.read()
        else:
            assert data[file.tell():].startswith(ours.peek())


def answer_of(data: bytes, sizes: list[int], method: str = "POST") -> tuple[Answer, list[bool]]:
    given_back: list[bool] = []
    source = incoming(data, sizes)
    head = read_head(source)
    return Answer(head, source, method == "HEAD" or head.status in (204, 304), given_back.append), given_back


@pytest.mark.parametrize("name", ANSWERS | CLOSING)
@given(sizes=SIZES)
def test_a_whole_answer_is_read_and_its_connection_kept_if_it_stays(name: str, sizes: list[int]) -> None:
    data = (ANSWERS | CLOSING)[name]
    answer, given_back = answer_of(data, sizes)
    assert b"".join(answer.pieces()) == parse(data)[0].body
    answer.close(complete=True)
    assert given_back == [name in ANSWERS]


@pytest.mark.parametrize("name", ["events", "trailers", "length"])
@given(at=st.integers(1, 60), sizes=SIZES)
def test_a_cut_is_told(name: str, at: int, sizes: list[int]) -> None:
    body_at = ANSWERS[name].index(b"\r\n\r\n") + 4
    data = ANSWERS[name][:max(body_at, len(ANSWERS[name]) - at)]
    with pytest.raises(UpstreamError):
        list(answer_of(data, sizes)[0].pieces())


@pytest.mark.parametrize(("data", "complete"), [
    (ANSWERS["length"], False), (ANSWERS["length"] + b"HTTP/1.1 200 OK\r\n", True), (ANSWERS["length"] + b"x", True)])
def test_a_connection_of_which_more_may_come_is_not_used_again(data: bytes, complete: bool) -> None:
    answer, given_back = answer_of(data, [1 << 16])
    assert b"".join(answer.pieces()) == b'{"id": "x"}'
    answer.close(complete)
    assert given_back == [False]


def test_the_answer_to_head_has_a_length_and_no_body() -> None:
    data = ANSWERS["length"].partition(b"\r\n\r\n")[0] + b"\r\n\r\n"
    answer, given_back = answer_of(data, [7], "HEAD")
    assert answer.head.length == 11 and list(answer.pieces()) == []
    answer.close(complete=True)
    assert given_back == [True]
