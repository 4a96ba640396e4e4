"""Collects a request's bytes until a thread can take it without waiting for its client.  Pure: bytes in, a verdict out.

A slow client costs a buffer here and no thread.  The real parsing and every refusal stay gunicorn's: this only finds
where the head ends and how much body follows.  Where it cannot tell, it hands over what there is, to be refused.
"""

from __future__ import annotations

import io
import re
import threading
from typing import Any, NamedTuple

from errors import BadRequest, DaemonError, Overloaded, TooLarge

KEPT_BYTES = 1 << 25
KEPT_S = 10.0                   # since the last large body
HELD_BYTES = 1 << 31            # all large bodies that are here at one time, unless a setting says otherwise
ROUND_BYTES = 1 << 20
LARGE_BODY_BYTES = 1 << 16      # from here on a body is received into its place, not appended piece by piece
MAX_HEAD_BYTES = 1 << 17        # past gunicorn's own limits, so that its 431 says what is too large
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"

_LINE = re.compile(rb"[!-~]+ [!\"$-~\x80-\xff]+ HTTP/1\.[01]\r\n")
_LENGTH = re.compile(rb"\r\ncontent-length:[ \t]*([0-9]+)[ \t]*\r\n", re.IGNORECASE)
_CODING = re.compile(rb"\r\ntransfer-encoding:[ \t]*([^\r\n]*?)[ \t]*(?=\r\n)", re.IGNORECASE)
_EXPECT = re.compile(rb"\r\nexpect:[ \t]*100-continue[ \t]*\r\n", re.IGNORECASE)
_SIZE = re.compile(rb"([0-9a-fA-F]{1,15})[ \t]*(?:;[^\r\n]*)?\r\n")
MAX_SIZE_LINE = 4096
MAX_PATH = 1024                 # a longer one is none that the server has threads of its own for


class Taken(NamedTuple):
    """One request.  `whole`: nothing of it is left on the connection; if it is not, the body is empty."""

    head: bytes
    body: bytes | bytearray
    whole: bool
    refusal: DaemonError | None = None      # what is wrong with the body
    place: bytearray | None = None  # a buffer to give back when the request is done
    held_bytes: int = 0             # of what all large bodies may take together; to give back likewise


class Buffers:
    """Places for large bodies, used again: fresh memory costs a page fault every 4 KiB, a fifth of such a request.

    Keeps at most `KEPT_BYTES`, and nothing for long after the last one.  It also counts what all large bodies take,
    from their first bytes to the end of their requests: at most `most_bytes`.  Any thread may call it.
    """

    def __init__(self, most_bytes: int = HELD_BYTES) -> None:
        self._free: list[bytearray] = []
        self._most_bytes = most_bytes
        self._held_bytes = 0
        self._used = False          # since the last `tick`
        self._used_at = 0.0
        self._lock = threading.Lock()

    def hold(self, size: int) -> bool:
        """Whether there is room for so many bytes more; they then count until `release`."""
        with self._lock:
            if self._held_bytes + size > self._most_bytes:
                return False
            self._held_bytes += size
        return True

    def release(self, size: int) -> None:
        with self._lock:
            self._held_bytes -= size

    def done(self, taken: Taken) -> None:
        """With the request; nobody looks at its body any more."""
        if taken.held_bytes:
            self.release(taken.held_bytes)
        if taken.place is not None:
            self.give_back(taken.place)

    def take(self, size: int) -> bytearray:
        """One of `size` bytes, with whatever stood there before."""
        if (kept := self.take_kept(size)) is not None:
            return kept
        buffer = bytearray(-(-size // ROUND_BYTES) * ROUND_BYTES)
        del buffer[size:]
        return buffer

    def take_kept(self, size: int) -> bytearray | None:
        """One that was used before, if there is one of about that size."""
        if (buffer := self._find(size)) is None:
            return None
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
            self._used = True
            if sum(one.__alloc__() for one in self._free) + buffer.__alloc__() <= KEPT_BYTES:
                self._free.append(buffer)

    def tick(self, now: float) -> None:
        """Gives back to the system what nobody has used for KEPT_S seconds."""
        with self._lock:
            if self._used:
                self._used, self._used_at = False, now
            elif now - self._used_at >= KEPT_S:
                self._free.clear()

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
        self._held = 0                          # bytes that this body counts for among all
        self._ready = False
        self._expects = False
        self.wants_continue = False     # until it has been told to go on

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

    @property
    def refused(self) -> bool:
        """Whether it is known already that this body will not be taken."""
        return self._refusal is not None

    @property
    def has_room(self) -> bool:
        """Whether more of a large body is to be received into its place."""
        return self._place is not None and not self._ready

    def room(self) -> memoryview | None:
        """Where the rest of a large body is to be received to; `filled` then says how much came.

        The place grows as it fills, for a length is only a promise; so the view must be released before the next call.
        """
        if self._place is None or self._ready:
            return None
        if self._filled == len(self._place) and not self._grow():
            self._ready = True
            return None
        return memoryview(self._place)[self._filled:]

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
            taken = Taken(head, b"", whole=False, refusal=self._refusal, place=self._place, held_bytes=self._held)
            self._buffer.clear()
        else:
            taken = Taken(*self._head_and_body(), whole=True, place=self._place, held_bytes=self._held)
        self._start()
        return taken

    def abandon(self) -> None:
        """The client has left: nothing of a body counts any more."""
        self._buffers.release(self._held)
        self._held = 0

    @property
    def path(self) -> bytes:
        """Of the request, once it is ready, as its client spelled it, without the query; empty where it has none."""
        words = bytes(self._buffer[:MAX_PATH]).split(b" ", 2)
        return words[1].partition(b"?")[0] if len(words) == 3 else b""

    def _head_and_body(self) -> tuple[bytes, bytes | bytearray]:
        """Of a whole request; what follows it stays in the buffer."""
        head = bytes(self._buffer[:self._head_end])
        if self._expects:
            head = _EXPECT.sub(b"\r\n", head)
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
        if _LINE.match(head) is None:       # gunicorn's parser is more lenient than servers on the way may be
            self._refusal = BadRequest("the request cannot be read: Invalid HTTP request line", code="invalid_request")
            return True
        if codings := _CODING.findall(head):
            self._chunked = codings[-1].lower().endswith(b"chunked")
            if [coding.lower() for coding in codings] != [b"chunked"]:
                self._refusal = BadRequest("the only Transfer-Encoding of a request is chunked", code="invalid_request")
                return True
        if not self._chunked and (length := _LENGTH.search(head)):
            # Of a length beyond all bounds its first digits are enough: it is refused, and must not count as none.
            self._length = int(length[1].lstrip(b"0")[:19] or b"0")
        self._expects = self.wants_continue = _EXPECT.search(head) is not None
        if LARGE_BODY_BYTES <= self._length <= self._max and len(self._buffer) < self._head_end + self._length:
            self._make_room()
        return True

    def _make_room(self) -> None:
        kept = self._buffers.take_kept(self._length)
        first = self._length if kept is not None else min(self._length, max(ROUND_BYTES, len(self._buffer)))
        if not self._hold(first):
            return
        self._place = kept if kept is not None else self._buffers.take(first)
        self._filled = len(self._buffer) - self._head_end
        with memoryview(self._buffer) as view:
            self._place[:self._filled] = view[self._head_end:]
        del self._buffer[self._head_end:]

    def _grow(self) -> bool:
        """Make the full place larger; False: there is no room for it."""
        assert self._place is not None
        size = min(self._length, 2 * len(self._place))
        if not self._hold(size):
            return False
        self._place *= 2        # in place, and without a second buffer to copy from
        del self._place[size:]
        return True

    def _hold(self, size: int) -> bool:
        """Count this body as `size` bytes; False, with a refusal: all together would be too many."""
        if size > self._held:
            if not self._buffers.hold(size - self._held):
                self._refusal = Overloaded("the server holds as many bytes of requests as it may (MAX_BODY_MEMORY); "
                                           "ask again in a moment", retry_after_s=1)
                return False
            self._held = size
        return True

    def _body_is_there(self) -> bool:
        if self._refusal is not None:
            return True
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
            if line is None or line.end() - at > MAX_SIZE_LINE:
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
            pending = self._decoded_bytes + len(self._buffer) - self._head_end
            if pending > LARGE_BODY_BYTES and not self._hold(-(-pending // ROUND_BYTES) * ROUND_BYTES):
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
        if end >= 0 and end - at <= MAX_HEAD_BYTES:
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
