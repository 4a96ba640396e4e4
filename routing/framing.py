"""How an upstream's body ends, followed without touching its bytes.

A relay passes a response on byte for byte; it follows the framing only to know whether the body really ended.  The
trackers below are fed what was received and answer how much of it belongs to the body.  They copy nothing but a
chunk's size line, and cost a microsecond or less for a small chunk.
"""

from __future__ import annotations

from dataclasses import dataclass

LINE_LIMIT = 16 * 1024  # a chunk's size line or a trailer longer than this is no HTTP


@dataclass(frozen=True)
class Framing:
    """What the response head says about its body: one of the constants below or `content_length(n)`."""

    kind: str  # "chunked", "length", "eof", "tunnel"
    length: int = 0  # of kind "length": bytes of the whole body


CHUNKED = Framing("chunked")
EOF = Framing("eof")
TUNNEL = Framing("tunnel")  # no response body: both directions are copied until both sides closed


def content_length(length: int) -> Framing:
    return Framing("length", length)


class Body:
    """A body that ends with the connection; the base of the others.

    `done`: the body has ended.  `broken`: what came is not this framing, and its end cannot be known.
    """

    __slots__ = ("broken", "done")
    cut_shows = False  # can a client tell a connection that closed too early from the body's end?

    def __init__(self) -> None:
        self.done = False
        self.broken = False

    def feed(self, data: bytes | bytearray, size: int) -> int:
        """How many of data[:size], the bytes next received, belong to the body: all, unless it is done or broken."""
        return size

    def event_chunk(self, message: bytes) -> bytes:
        """One server-sent event that may be put in here without harm to the framing; empty where it may not."""
        return b""


class LengthBody(Body):
    """Content-Length."""

    __slots__ = ("_left",)
    cut_shows = True

    def __init__(self, length: int) -> None:
        super().__init__()
        self._left = length
        self.done = length == 0

    def feed(self, data: bytes | bytearray, size: int) -> int:
        taken = min(size, self._left)
        self._left -= taken
        self.done = self._left == 0
        return taken


class ChunkedBody(Body):
    """Transfer-Encoding: chunked, with extensions and trailers."""

    __slots__ = ("_in_trailers", "_line", "_skip", "_tail")
    cut_shows = True

    def __init__(self) -> None:
        super().__init__()
        self._skip = 0  # bytes of the current chunk that are still to come, with the line end after it
        self._line = b""  # the beginning of a line whose end is still to come
        self._in_trailers = False
        self._tail: bytes | bytearray = b"\n\n"  # how the last chunk's data ended, where the last feed ended with it

    def feed(self, data: bytes | bytearray, size: int) -> int:
        at = self._skip
        while at < size:
            end = data.find(b"\n", at, size)
            if end < 0:
                self._line += data[at:size]
                if len(self._line) > LINE_LIMIT:
                    self.broken = True
                self._skip = 0
                return size
            line: bytes | bytearray = data[at:end]
            if self._line:
                line = self._line + line
                self._line = b""
            if self._in_trailers:
                if not line.strip():
                    self.done = True
                    return end + 1
                at = end + 1
                continue
            try:
                length = int(line, 16)  # takes the \r that is left of the line end
            except ValueError:
                length = _size_before_extension(line)
            if length > 0:
                at = end + 3 + length  # \n, the data, \r\n
            elif length == 0:
                self._in_trailers = True
                at = end + 1
            else:
                self.broken = True
                return at
        self._skip = at - size
        if at == size > 0:
            self._tail = data[size - 6 : size - 2] if size >= 6 else b"?"
        return size

    def event_chunk(self, message: bytes) -> bytes:
        if self._skip or self._line or self._in_trailers or self.done or self.broken:
            return b""
        # an event that the upstream left unfinished is ended first: two lines that mean nothing otherwise
        before = b"" if self._tail.endswith((b"\n\n", b"\n\r\n")) else b"\n\n"
        event = b"%sdata: %s\n\n" % (before, message)
        return b"%x\r\n%s\r\n" % (len(event), event)


def _size_before_extension(line: bytes | bytearray) -> int:
    """The size in a line with a chunk extension; -1 where there is none."""
    try:
        return int(line.partition(b";")[0], 16)
    except ValueError:
        return -1


def follow(framing: Framing) -> Body:
    """A tracker that stands at the first byte of the body."""
    if framing.kind == "chunked":
        return ChunkedBody()
    if framing.kind == "length":
        return LengthBody(framing.length)
    return Body()
