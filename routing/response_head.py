"""The head of an engine's answer, read strictly.  Pure but for reading lines from a file.

http.client takes the end of the connection for the end of a head, a 103 for the answer, the first of two lengths for
the length, and lets control characters through: each makes a good-looking answer of a broken one.  It also reads the
head with the email parser, which costs more than all the rest of a request here.
"""

from __future__ import annotations

import re
from http.client import HTTPException, RemoteDisconnected
from typing import NamedTuple, Protocol

MAX_LINE_BYTES = 1 << 16
MAX_LINES = 256
LENGTH_DIGITS = 18

_STATUS = re.compile(rb"HTTP/1\.([01]) ([1-9][0-9]{2})(?: ([^\x00-\x08\x0a-\x1f\x7f]*))?\r?\n")
_FIELD = re.compile(rb"([!#$%&'*+\-.^_`|~0-9A-Za-z]+):([^\x00-\x08\x0a-\x1f\x7f]*)\r?\n")
_BLANK = (b"\r\n", b"\n")


class Lines(Protocol):
    def readline(self, limit: int, /) -> bytes:
        """As of a file."""


class BadHead(HTTPException):
    """What came is no head of an answer that may be passed on."""


class Head(NamedTuple):
    """`length` is the body's as announced; None: chunked, or until the connection's end.  `headers` say the same."""

    minor: int                              # of the version: HTTP/1.x
    status: int
    reason: str
    headers: list[tuple[str, str]]
    chunked: bool
    length: int | None
    closes: bool


def read_head(file: Lines) -> Head:
    """The head of the final answer; interim ones (1xx) are passed over.

    Raises RemoteDisconnected where nothing came at all, else BadHead.
    """
    lines_left = MAX_LINES
    first = True
    while True:
        line = file.readline(MAX_LINE_BYTES)
        if first and not line:
            raise RemoteDisconnected("the connection ended without an answer")
        first = False
        found = _STATUS.fullmatch(line)
        if found is None:
            raise BadHead(f"the status line is {line[:60]!r}")
        fields: list[tuple[str, str]] = []
        while (line := file.readline(MAX_LINE_BYTES)) not in _BLANK:
            lines_left -= 1
            field = _FIELD.fullmatch(line)
            if field is None or lines_left < 0:
                raise BadHead(_what_is_wrong(line, lines_left))
            fields.append((field[1].decode("latin-1"), field[2].decode("latin-1").strip(" \t")))
        status = int(found[2])
        if status >= 200:
            return _head(int(found[1]), status, (found[3] or b"").decode("latin-1"), fields)
        lines_left -= 1
        if status == 101 or lines_left < 0:
            raise BadHead(f"the status is {status}")


def _what_is_wrong(line: bytes, lines_left: int) -> str:
    if lines_left < 0:
        return f"the head has more than {MAX_LINES} lines"
    if line.endswith(b"\n"):
        return f"a line of the head is {line[:60]!r}"
    too_long = len(line) == MAX_LINE_BYTES
    return f"a line of the head has more than {MAX_LINE_BYTES} bytes" if too_long else "it has no end"


def _head(minor: int, status: int, reason: str, fields: list[tuple[str, str]]) -> Head:
    codings: list[str] = []
    lengths: set[str] = set()
    connection = ""
    for name, value in fields:
        lower = name.lower()
        if lower == "transfer-encoding":
            codings.append(value.lower())
        elif lower == "content-length":
            lengths.update(part.strip(" \t") for part in value.split(","))
        elif lower == "connection":
            connection += "," + value.lower()
    if codings not in ([], ["chunked"]) or (codings and minor == 0):
        raise BadHead(f"the transfer encoding is {', '.join(codings)[:60]!r} in HTTP/1.{minor}")
    if len(lengths) > 1 or not all(_is_length(one) for one in lengths):
        raise BadHead(f"the length is {', '.join(sorted(lengths))[:60]!r}")
    # chunks overrule a length, which must not go on then (RFC 9112, 6.3)
    length = int(next(iter(lengths))) if lengths and not codings else None
    if lengths or codings:
        fields = _with_length(fields, length)
    options = {option.strip() for option in connection.split(",")}
    closes = "close" in options or (minor == 0 and "keep-alive" not in options)
    return Head(minor, status, reason, fields, bool(codings), length, closes)


def _is_length(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= LENGTH_DIGITS


def _with_length(fields: list[tuple[str, str]], length: int | None) -> list[tuple[str, str]]:
    """With the one length in the place of whatever said it, or with none."""
    kept: list[tuple[str, str]] = []
    for name, value in fields:
        if name.lower() != "content-length":
            kept.append((name, value))
        elif length is not None:
            kept.append((name, str(length)))
            length = None
    return kept
