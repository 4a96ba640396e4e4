"""An engine's answer: its head, and its body as it comes, read from the socket with nothing in between.

http.client, urllib3 and requests each wrap a response once more, which costs a request more time here than all that
the daemon itself does with it.
"""

from __future__ import annotations

import errno
import socket
import ssl
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from errors import UpstreamError
from routing.framing import LINE_LIMIT
from routing.response_head import Head

READ_BYTES = 1 << 16
SSE = "text/event-stream"
CUT = "the engine closed the connection in the middle of its answer"
BODYLESS = frozenset({204, 304})


class Incoming:
    """What a socket brings, by lines and pieces.  Blocks for up to its timeout, and raises what it raises."""

    __slots__ = ("_at", "_data", "_sock")

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._data = b""
        self._at = 0

    def more(self) -> bool:
        """Wait for more; False: the other side has ended."""
        try:
            data = self._sock.recv(READ_BYTES)
        except ssl.SSLEOFError as error:        # without TLS's own goodbye: as a reset where there is no TLS
            raise ConnectionResetError(errno.ECONNRESET, CUT) from error
        self._data = self._data[self._at:] + data if self._at < len(self._data) else data
        self._at = 0
        return bool(data)

    def readline(self, limit: int) -> bytes:
        """With its end; without, where it has more than `limit` bytes or the other side has ended."""
        while (end := self._data.find(b"\n", self._at, self._at + limit) + 1) == 0:
            if len(self._data) - self._at >= limit or not self.more():
                end = min(self._at + limit, len(self._data))
                break
        line = self._data[self._at:end]
        self._at = end
        return line

    def read1(self, limit: int) -> bytes:
        """What is there, or what comes next; empty: the other side has ended."""
        if self._at == len(self._data) and not self.more():
            return b""
        piece = self._data[self._at:self._at + limit] if self._at or limit < len(self._data) else self._data
        self._at += len(piece)
        return piece

    def peek(self) -> bytes:
        """What has been received and not been taken."""
        return self._data[self._at:]


@dataclass(eq=False)
class Answer:
    """`give_back(reusable)` is called once, by `close`: the connection may carry the next request, or not."""

    head: Head
    incoming: Incoming
    is_bodyless: bool       # whatever its head says of a length: the answer to HEAD, 204, 304
    give_back: Callable[[bool], None]

    @property
    def is_event_stream(self) -> bool:
        return self.header("content-type").startswith(SSE)

    def header(self, name: str) -> str:
        """The first one of this name (in lower case); empty when there is none."""
        for given, value in self.head.headers:
            if given.lower() == name:
                return value
        return ""

    def begin(self) -> None:
        """Wait for the first byte of a body with a length.  Raises UpstreamError where it is cut, OSError as the socket
        does.

        A server writes the head first, and may die before the body follows: its client has got nothing yet.
        """
        if self.head.length and not self.is_bodyless and not self.incoming.peek() and not self.incoming.more():
            raise UpstreamError(CUT)

    def pieces(self) -> Iterator[bytes]:
        """The data of the body as it comes.  Raises UpstreamError where it is cut, OSError as the socket does."""
        if self.is_bodyless:
            return
        if self.head.chunked:
            yield from read_chunks(self.incoming)
        elif self.head.length is None:
            while piece := self.incoming.read1(READ_BYTES):
                yield piece
        else:
            left = self.head.length
            while left > 0:
                if not (piece := self.incoming.read1(min(left, READ_BYTES))):
                    raise UpstreamError(CUT)
                left -= len(piece)
                yield piece

    def close(self, complete: bool) -> None:
        """`complete`: all of it was read."""
        ends_itself = self.is_bodyless or self.head.chunked or self.head.length is not None
        self.give_back(complete and ends_itself and not self.head.closes and not self.incoming.peek())


def read_chunks(incoming: Incoming) -> Iterator[bytes]:
    """The data of a chunked body as it comes; the trailers are dropped.  Raises UpstreamError where it is cut."""
    while size := _chunk_size(_line(incoming)):
        while size > 0:
            if not (piece := incoming.read1(min(size, READ_BYTES))):
                raise UpstreamError(CUT)
            size -= len(piece)
            yield piece
        if _line(incoming).strip():
            raise UpstreamError("a chunk of the engine's answer is longer than it says")
    while _line(incoming).strip():
        pass


def _line(incoming: Incoming) -> bytes:
    line = incoming.readline(LINE_LIMIT)
    if not line.endswith(b"\n"):
        raise UpstreamError(CUT)
    return line


def _chunk_size(line: bytes) -> int:
    digits = line.partition(b";")[0].strip()
    try:
        if digits.isalnum():    # neither a sign nor an underscore, which int would take
            return int(digits, 16)
    except ValueError:
        pass
    raise UpstreamError(f"the engine's answer is not chunked as it says: {line[:40]!r}", code="bad_answer")
