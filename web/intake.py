"""Collects a request's bytes until a thread can take it without waiting for its client.  Pure: bytes in, a verdict out.

A slow client costs a buffer here and no thread.  The real parsing and every refusal stay gunicorn's: this only finds
where the head ends and how much body follows.  Where it cannot tell, it hands over what there is, to be refused.
"""

from __future__ import annotations

import io
import re
import threading
from dataclasses import dataclass
from typing import Any

from errors import BadRequest, DaemonError, TooLarge

KEPT_BYTES = 1 << 25
ROUND_BYTES = 1 << 20
LARGE_BODY_BYTES = 1 << 16      # from here on a body is received into its place, not appended piece by piece
MAX_HEAD_BYTES = 1 << 17        # past gunicorn's own limits, so that its 431 says what is too large
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"

_LENGTH = re.compile(rb"\r\ncontent-length:[ \t]*([0-9]+)[ \t]*\r\n", re.IGNORECASE)
_CHUNKED = re.compile(rb"\r\ntransfer-encoding:[^\r\n]*chunked[ \t]*\r\n", re.IGNORECASE)
_EXPECT = re.compile(rb"\r\nexpect:[ \t]*100-continue[ \t]*\r\n", re.IGNORECASE)
_SIZE = re.compile(rb"([0-9a-fA-F]{1,15})[ \t]*(?:;[^\r\n]*)?\r\n")
MAX_SIZE_LINE = 4096


@dataclass(frozen=True)
class Taken:
    """One request.  `whole`: nothing of it is left on the connection; if it is not, the body is empty."""

    head: bytes
    body: bytes | bytearray
    whole: bool
    refusal: DaemonError | None = None      # what is wrong with the body
    place: bytearray | None = None  # a buffer to give back when the request is done


class Buffers:
    """Places for large bodies, used again: fresh memory costs a page fault every 4 KiB, a fifth of such a request.

    Keeps at most `KEPT_BYTES`.  Any thread may call it.
    """

    def __init__(self) -> None:
        self._free: list[bytearray] = []
        self._lock = threading.Lock()

    def take(self, size: int) -> bytearray:
        """One of `size` bytes, with whatever stood there before."""
        buffer = self._find(size)
        if buffer is None:
            buffer = bytearray(-(-size // ROUND_BYTES) * ROUND_BYTES)
        # Within what it has allocated, a bytearray changes its size in place.
        if len(buffer) < size:
            buffer += bytes(size - len(buffer))
        del buffer[size:]
        return buffer

    def give_back(self, buffer: bytearray) -> None:
        """Nobody uses it any more; one of which somebody still holds a view is not kept."""
        try:
            buffer.append(0)
        except BufferError:
            return
        with self._lock:
            if sum(one.__alloc__() for one in self._free) + buffer.__alloc__() <= KEPT_BYTES:
                self._free.append(buffer)

    def _find(self, size: int) -> bytearray | None:
        with self._lock:
            for index, buffer in enumerate(self._free):
                if size < buffer.__alloc__() <= 2 * size + ROUND_BYTES:
                    return self._free.pop(index)
        return None


class Intake:
    """Feed it what was received; `take` once `feed` has said True.  What a client sent beyond stays for the next."""

    def __init__(self, max_body_bytes: int, buffers: Buffers | None = None) -> None:
        self._max = max_body_bytes
        self._buffers = buffers or Buffers()
        self._buffer = bytearray()
        self._start()

    def _start(self) -> None:
        self._head_end = 0          # 0: not found yet
        self._scanned = 0
        self._length = 0            # of the body on the wire, once known
        self._chunked = False
        self._decoded: list[bytes] = []
        self._decoded_bytes = 0
        self._refusal: DaemonError | None = None
        self._place: bytearray | None = None    # a large body's
        self._filled = 0                        # bytes of it that are there
        self._ready = False
        self.wants_continue = False

    @property
    def begun(self) -> bool:
        """Whether the client has sent a part of a request."""
        return bool(self._buffer) or self._place is not None

    @property
    def in_body(self) -> bool:
        return self._head_end > 0

    def feed(self, data: bytes) -> bool:
        """Whether a request is complete, or can be refused as it stands.  Not to be called while there is a `room`."""
        self._buffer += data
        return self.ready()

    def room(self) -> memoryview | None:
        """Where the rest of a large body is to be received to; `filled` then says how much came."""
        return memoryview(self._place)[self._filled:] if self._place is not None and not self._ready else None

    def filled(self, count: int) -> bool:
        """As `feed`, for `count` bytes that were received into `room`."""
        self._filled += count
        return self.ready()

    def ready(self) -> bool:
        if not self._ready:
            if not self._head_end and not self._find_head():
                self._ready = len(self._buffer) > MAX_HEAD_BYTES
            else:
                self._ready = self._body_is_there()
        return self._ready

    def end(self) -> None:
        """The client sends nothing more: what is there is all."""
        if self.in_body and not self.ready():
            got = self._filled if self._place is not None else len(self._buffer) - self._head_end
            self._refusal = _broken("it ended before its last chunk") if self._chunked else BadRequest(
                f"the body ended after {got} bytes; its Content-Length says {self._length}", code="incomplete_body")
        self._ready = True

    def take(self) -> Taken:
        """The request; the intake then stands at the next one."""
        if self._length > self._max or self._decoded_bytes > self._max:
            self._refusal = TooLarge(f"the body is larger than MAX_REQUEST_BYTES ({self._max}) allows")
        if not self._head_end or self._refusal is not None:
            head = bytes(self._buffer[:self._head_end or None])
            taken = Taken(head, b"", whole=False, refusal=self._refusal, place=self._place)
            self._buffer.clear()
        else:
            taken = Taken(*self._head_and_body(), whole=True, place=self._place)
        self._start()
        return taken

    def _head_and_body(self) -> tuple[bytes, bytes | bytearray]:
        """Of a whole request; what follows it stays in the buffer."""
        head = _EXPECT.sub(b"\r\n", bytes(self._buffer[:self._head_end]))
        body: bytes | bytearray
        if self._place is not None:
            end, body = self._head_end, self._place
        elif self._chunked:
            end, body = self._scanned, b"".join(self._decoded)
        else:
            end = self._head_end + self._length
            body = bytes(self._buffer[self._head_end:end])
        del self._buffer[:end]
        return head, body

    def _find_head(self) -> bool:
        end = self._buffer.find(b"\r\n\r\n", max(0, self._scanned - 3))
        if end < 0:
            self._scanned = len(self._buffer)
            return False
        self._head_end = self._scanned = end + 4
        head = bytes(self._buffer[:self._head_end])
        self._chunked = _CHUNKED.search(head) is not None
        if not self._chunked and (length := _LENGTH.search(head)):
            # Of a length beyond all bounds its first digits are enough: it is refused, and must not count as none.
            self._length = int(length[1].lstrip(b"0")[:19] or b"0")
        self.wants_continue = _EXPECT.search(head) is not None
        if LARGE_BODY_BYTES <= self._length <= self._max and len(self._buffer) < self._head_end + self._length:
            self._make_room()
        return True

    def _make_room(self) -> None:
        self._place = self._buffers.take(self._length)
        self._filled = len(self._buffer) - self._head_end
        with memoryview(self._buffer) as view:
            self._place[:self._filled] = view[self._head_end:]
        del self._buffer[self._head_end:]

    def _body_is_there(self) -> bool:
        if self._chunked:
            return self._decode()
        if self._place is not None:
            return self._filled == self._length
        return self._length > self._max or len(self._buffer) >= self._head_end + self._length

    def _decode(self) -> bool:
        """Take whole chunks off (RFC 9112, 7.1); True at the end of the last one, or where it cannot go on."""
        while self._refusal is None and self._decoded_bytes <= self._max:
            at = self._scanned
            line = _SIZE.match(self._buffer, at)
            if line is None:
                if self._buffer.find(b"\r\n", at) >= 0 or len(self._buffer) - at > MAX_SIZE_LINE:
                    self._refusal = _broken("a chunk's size line is not valid")
                    return True
                return False
            size = int(line[1], 16)
            if size == 0:
                return self._trailers(line.end())
            end = line.end() + size
            if size > self._max:
                self._decoded_bytes = size
                return True
            if len(self._buffer) < end + 2:
                return False
            if self._buffer[end:end + 2] != b"\r\n":
                self._refusal = _broken("a chunk is longer than its size line says")
                return True
            self._decoded.append(bytes(self._buffer[line.end():end]))
            self._decoded_bytes += size
            self._scanned = end + 2
        return True

    def _trailers(self, at: int) -> bool:
        """Trailers are dropped: nothing behind the daemon reads them."""
        if self._buffer[at:at + 2] == b"\r\n":
            self._scanned = at + 2
            return True
        end = self._buffer.find(b"\r\n\r\n", at)
        if end >= 0:
            self._scanned = end + 4
            return True
        if len(self._buffer) - at > MAX_HEAD_BYTES:
            self._refusal = _broken("the trailers are too large")
            return True
        return False


def _broken(why: str) -> BadRequest:
    return BadRequest(f"the body cannot be read: {why}", code="invalid_chunk")


class Collected(io.RawIOBase):
    """`wsgi.input` over a body that is already here.  Who knows that takes it whole, without a copy."""

    def __init__(self, data: bytes | bytearray) -> None:
        super().__init__()
        self._data = data
        self._at = 0

    def take(self) -> bytes | bytearray:
        self._at = len(self._data)
        return self._data

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = min(len(buffer), len(self._data) - self._at)
        buffer[:count] = self._data[self._at:self._at + count]
        self._at += count
        return count
