"""What happens, told to whoever listens: server-sent events, by one thread for all listeners.

A listener costs a socket and what it has not read yet, and no request thread.  One that does not read is cut off once
PENDING_BYTES wait for it; it comes back by itself (`Last-Event-ID`) and is told what it missed, as far as it is kept.
"""

from __future__ import annotations

import itertools
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

import orjson

from errors import ManagerError
from routing.poller import Poller

KEPT = 500                      # events that are remembered
LISTENERS = 100
PENDING_BYTES = 1 << 20
SILENCE_S = 15.0                # then a comment is sent: nothing on the way may think that the connection is dead
HEAD = ("HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\nCache-Control: no-store\r\n"
        "X-Accel-Buffering: no\r\nConnection: close\r\n")
COMMENT = b": still here\n\n"


class TooManyListeners(ManagerError):
    code = "too_many_listeners"


class Event(NamedTuple):
    id: int
    at: float                   # wall clock
    kind: str
    data: dict[str, Any]

    def shown(self) -> dict[str, Any]:
        return {"id": self.id, "at": round(self.at, 3), "event": self.kind} | self.data


class Feed:
    """`publish` never blocks: it may be called with any lock held.  `start` and `close` bound its thread's life."""

    def __init__(self, *, wall: Callable[[], float] = time.time) -> None:
        self._wall = wall
        self._lock = threading.Lock()
        self._ids = itertools.count(1)
        self._last_id = 0
        self._kept: deque[Event] = deque(maxlen=KEPT)
        self._loop: _Listeners | None = None
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        self._loop = _Listeners()
        self._thread = threading.Thread(target=self._loop.run, name="events", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Ends all listeners' connections.  A second call does nothing."""
        loop, self._loop = self._loop, None
        if loop is not None and self._thread is not None:
            loop.stop()
            self._thread.join()

    def publish(self, kind: str, data: dict[str, Any], *, keep: bool = True) -> None:
        """`keep`: it is remembered, for those who come later."""
        with self._lock:
            event = Event(next(self._ids), self._wall(), kind, data)
            self._last_id = event.id
            if keep:
                self._kept.append(event)
            loop = self._loop
            if loop is not None:
                text = _text(event, keep)
                loop.call_soon(lambda: loop.tell(event.id, text))

    def last(self, count: int) -> list[Event]:
        """The newest that are remembered, oldest first."""
        with self._lock:
            return list(self._kept)[-count:] if count else []

    def count(self) -> int:
        """How many listen."""
        loop = self._loop
        return loop.count() if loop is not None else 0

    def join(self, client: socket.socket, request_id: str, after: int | None) -> None:
        """Take over a client's connection and tell it what comes; first what is kept after the id that it had last.

        The caller's socket object is closed by it.  Raises TooManyListeners, and the socket is still the caller's.
        """
        loop = self._loop
        if loop is None or self.count() >= LISTENERS:
            raise TooManyListeners(f"{LISTENERS} clients listen to events, which is the most; ask for them without "
                                   "follow", retry_after_s=30)
        taken = socket.socket(fileno=client.detach())
        taken.setblocking(False)

        def begin() -> None:
            with self._lock:
                seen, missed = self._last_id, [] if after is None else [one for one in self._kept if one.id > after]
            hello = _text(Event(seen, self._wall(), "hello", {}), True)     # from here on nothing is missed
            head = f"{HEAD}X-Request-Id: {request_id}\r\n\r\n".encode()
            loop.add(taken, seen, b"".join([head, *(_text(one, True) for one in missed), hello]))

        loop.call_soon(begin)


def _text(event: Event, with_id: bool) -> bytes:
    """JSON has no line's end in it, so one data line holds it."""
    number = b"id: %d\n" % event.id if with_id else b""
    return b"%sevent: %b\ndata: %b\n\n" % (number, event.kind.encode(), orjson.dumps(event.shown()))


class _Listener:
    __slots__ = ("last_sent", "pending", "seen", "size", "socket")

    def __init__(self, sock: socket.socket, seen: int, now: float) -> None:
        self.socket = sock
        self.seen = seen            # the id of the last event that it knows or cannot need
        self.pending: deque[bytes] = deque()
        self.size = 0               # bytes of them
        self.last_sent = now


class _Listeners(Poller):
    """All of it happens on its own thread, but for `count`."""

    def __init__(self) -> None:
        super().__init__()
        self._listeners: dict[int, _Listener] = {}

    def count(self) -> int:
        return len(self._listeners)

    def add(self, sock: socket.socket, seen: int, first: bytes) -> None:
        listener = self._listeners[sock.fileno()] = _Listener(sock, seen, self.now)
        self.watch(sock.fileno(), select.EPOLLIN | select.EPOLLRDHUP, lambda mask: self._ready(listener, mask))
        self._send(listener, first)

    def tell(self, event_id: int, text: bytes) -> None:
        for listener in list(self._listeners.values()):
            if event_id > listener.seen:
                listener.seen = event_id
                self._send(listener, text)

    def busy(self) -> bool:
        return bool(self._listeners) or super().busy()

    def tick(self) -> None:
        super().tick()
        for listener in list(self._listeners.values()):
            if self.now - listener.last_sent >= SILENCE_S:
                self._send(listener, COMMENT)

    def close(self) -> None:
        for listener in list(self._listeners.values()):
            self._end(listener)
        super().close()

    def _ready(self, listener: _Listener, mask: int) -> None:
        if mask & (select.EPOLLHUP | select.EPOLLERR | select.EPOLLRDHUP):
            self._end(listener)
            return
        if mask & select.EPOLLIN:       # it has nothing to say
            try:
                if not listener.socket.recv_into(self.buffer):
                    self._end(listener)
                    return
            except BlockingIOError:
                pass
            except OSError:
                self._end(listener)
                return
        if mask & select.EPOLLOUT:
            self._flush(listener)

    def _send(self, listener: _Listener, text: bytes) -> None:
        if listener.size + len(text) > PENDING_BYTES:
            self._end(listener)
            return
        listener.pending.append(text)
        listener.size += len(text)
        listener.last_sent = self.now
        self._flush(listener)

    def _flush(self, listener: _Listener) -> None:
        while listener.pending:
            text = listener.pending[0]
            try:
                sent = listener.socket.send(text)
            except BlockingIOError:
                break
            except OSError:
                self._end(listener)
                return
            listener.size -= sent
            if sent < len(text):
                listener.pending[0] = text[sent:]
                break
            listener.pending.popleft()
        waits = select.EPOLLOUT if listener.pending else 0
        self.change(listener.socket.fileno(), select.EPOLLIN | select.EPOLLRDHUP | waits)

    def _end(self, listener: _Listener) -> None:
        if self._listeners.pop(listener.socket.fileno(), None) is not None:
            self.discard(listener.socket)
