from __future__ import annotations

import io
from http.client import RemoteDisconnected

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from routing.response_head import MAX_LINE_BYTES, MAX_LINES, BadHead, Head, read_head
from tests.data_plane import ANSWERS, CLOSING, INVALID

NAMES = st.text("abcXYZ-_019!#$%&'*+.^`|~", min_size=1, max_size=12).map(lambda text: f"X{text}")
VALUES = st.text(st.characters(min_codepoint=0x20, max_codepoint=0xFF, exclude_characters="\x7f"),
                 max_size=20).map(lambda text: text.strip(" \t"))


def read(data: bytes) -> Head:
    return read_head(io.BytesIO(data))


@given(status=st.integers(200, 999), reason=VALUES, headers=st.lists(st.tuples(NAMES, VALUES), max_size=8),
       before=st.integers(0, 3), line_end=st.sampled_from([b"\r\n", b"\n"]))
def test_what_a_head_says_comes_out(status: int, reason: str, headers: list[tuple[str, str]], before: int,
                                    line_end: bytes) -> None:
    lines = [f"HTTP/1.1 {status} {reason}", *(f"{name}:  {value}\t" for name, value in headers), "", ""]
    interim = line_end.join([b"HTTP/1.1 103 Early Hints", b"Link: </x>", b"", b""]) * before
    file = io.BytesIO(interim + line_end.join(line.encode("latin-1") for line in lines) + b"rest")
    head = read_head(file)
    assert (head.status, head.reason, head.headers) == (status, reason, headers)
    assert (head.length, head.chunked, head.closes) == (None, False, False)
    assert file.read() == b"rest"


@pytest.mark.parametrize("answer", (ANSWERS | CLOSING).values(), ids=ANSWERS | CLOSING)
def test_a_head_that_is_cut_anywhere_is_none(answer: bytes) -> None:
    file = io.BytesIO(answer)
    read_head(file)
    with pytest.raises(RemoteDisconnected):
        read(b"")
    for at in range(1, file.tell()):
        # Between an interim head and the final one, too.
        with pytest.raises(BadHead):
            read(answer[:at])


@pytest.mark.parametrize("answer", [answer for answer in INVALID.values() if answer],
                         ids=[name for name, answer in INVALID.items() if answer])
def test_a_head_that_cannot_be_passed_on(answer: bytes) -> None:
    with pytest.raises(BadHead):
        read(answer)


@given(st.binary(max_size=80))
@example(b"HTTP/1.1 200 OK\r\n: x\r\n\r\n")
@example(b"HTTP/1.1 200 OK\r\n folded: x\r\n\r\n")
def test_any_bytes_are_a_head_or_refused(data: bytes) -> None:
    for answer in (data, b"HTTP/1.1 200 OK\r\n" + data):
        try:
            head = read(answer)
        except (BadHead, RemoteDisconnected):
            continue
        for name, value in head.headers:
            assert name and not set(f"{name}{value}") & {"\r", "\n", "\0"}


def test_framing() -> None:
    def of(*lines: str, version: str = "1.1") -> tuple[bool, int | None, bool, list[tuple[str, str]]]:
        head = read("\r\n".join([f"HTTP/{version} 200 OK", *lines, "", ""]).encode())
        return head.chunked, head.length, head.closes, head.headers

    assert of() == (False, None, False, [])
    assert of("Content-Length: 5") == (False, 5, False, [("Content-Length", "5")])
    assert of("Content-Length: 5, 5", "X: 1", "content-length: 5") == (
        False, 5, False, [("Content-Length", "5"), ("X", "1")])
    assert of("Transfer-Encoding: Chunked")[:2] == (True, None)
    assert of("Transfer-Encoding: chunked", "Content-Length: 5") == (
        True, None, False, [("Transfer-Encoding", "chunked")])
    assert of("Connection: x, Close")[2] is True
    assert of(version="1.0")[2] is True
    assert of("Connection: Keep-Alive", version="1.0")[2] is False
    with pytest.raises(BadHead, match=r"chunked.*HTTP/1\.0"):
        of("Transfer-Encoding: chunked", version="1.0")


def test_bounds() -> None:
    line = b"X: " + b"x" * (MAX_LINE_BYTES - 5) + b"\r\n"
    assert len(read(b"HTTP/1.1 200 OK\r\n" + line + b"\r\n").headers) == 1
    with pytest.raises(BadHead, match="a line of the head has more than"):
        read(b"HTTP/1.1 200 OK\r\nX" + line + b"\r\n")
    assert len(read(b"HTTP/1.1 200 OK\r\n" + b"X: 1\r\n" * MAX_LINES + b"\r\n").headers) == MAX_LINES
    with pytest.raises(BadHead, match="more than 256 lines"):
        read(b"HTTP/1.1 200 OK\r\n" + b"X: 1\r\n" * (MAX_LINES + 1) + b"\r\n")
    with pytest.raises(BadHead):
        read(b"HTTP/1.1 102 Processing\r\n\r\n" * 10_000)
