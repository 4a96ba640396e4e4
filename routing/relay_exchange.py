"""The two kinds of exchange that a relay loop carries: a response's body, and a tunnel.

Both hold at most what one read brought and the peer did not take (64 KiB; at first the bytes that were handed over),
and do not read on while they hold something: this is the back-pressure.
"""

from __future__ import annotations

import contextlib
import select
import socket
from collections.abc import Callable

from routing.framing import follow
from routing.poller import Poller, reset_on_close
from routing.relay_wire import CLIENT, UPSTREAM, UPSTREAM_CUT, Ended, Handover

IN, OUT, RDHUP = select.EPOLLIN, select.EPOLLOUT, select.EPOLLRDHUP
GONE = select.EPOLLHUP | select.EPOLLERR  # reported whether asked for or not
_NOTHING = memoryview(b"")

OnEnd = Callable[[Ended], None]


class Exchange:
    """What the loop sees of either kind.  Owns both sockets from its making on; `on_end` is called exactly once."""

    __slots__ = ("active_at", "bytes_to_client", "bytes_to_upstream", "client", "first_byte_at", "id",
                 "idle_timeout_s", "loop", "on_end", "started_at", "upstream")

    def __init__(self, loop: Poller, client: socket.socket, upstream: socket.socket, handover: Handover,
                 on_end: OnEnd) -> None:
        self.loop = loop
        self.client = client
        self.upstream = upstream
        self.on_end = on_end
        self.id = handover.id
        self.idle_timeout_s = handover.idle_timeout_s
        self.started_at = loop.now if handover.started_at is None else handover.started_at
        self.active_at = loop.now
        self.first_byte_at: float | None = None
        self.bytes_to_client = 0
        self.bytes_to_upstream = 0
        for sock in (client, upstream):
            sock.setblocking(False)
            if sock.family != socket.AF_UNIX:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def start(self) -> None:
        raise NotImplementedError

    def abort(self, by: str, message: bytes = b"") -> None:
        """Ends it now, visibly for the client; `message` stands for the hand-over's `cut_message`."""
        raise NotImplementedError

    def report(self, by: str, complete: bool) -> None:
        first, now = self.first_byte_at, self.loop.now
        self.on_end(Ended(
            id=self.id, bytes_to_client=self.bytes_to_client, bytes_to_upstream=self.bytes_to_upstream,
            first_byte_s=None if first is None else max(0.0, first - self.started_at),
            duration_s=max(0.0, now - self.started_at), by=by, complete=complete,
        ))


class Stream(Exchange):
    """A response body on its way from the upstream to the client.

    A client that ends its direction (FIN) counts as one that left, as it does for nginx: nearly all that do so have
    closed, and waiting for the reset that a write would bring keeps the engine generating for nobody.  What a client
    sends meanwhile is a pipelined request; it is not even read, as the connection closes after this response.
    """

    __slots__ = ("_body", "_body_at", "_cut_message", "_ends_by", "_pending", "_receive", "_send")

    def __init__(self, loop: Poller, client: socket.socket, upstream: socket.socket, handover: Handover,
                 on_end: OnEnd) -> None:
        super().__init__(loop, client, upstream, handover, on_end)
        self._receive = upstream.recv_into
        self._send = client.send
        self._body = follow(handover.framing)
        self._body_at = handover.body_at
        self._cut_message = handover.cut_message if handover.sse else None
        body = handover.to_client[handover.body_at :]
        end = handover.body_at + self._body.feed(body, len(body))
        self._pending = memoryview(handover.to_client)[handover.sent : end]
        self.bytes_to_client = handover.sent
        if handover.sent > handover.body_at:
            self.first_byte_at = loop.now
        self._ends_by: str | None = None  # the upstream is over; what is pending is the last of it
        if not self._body.cut_shows:
            reset_on_close(client, True)

    def start(self) -> None:
        self.loop.watch(self.client.fileno(), RDHUP, self._on_client)
        if self._body.done or self._body.broken:
            self._upstream_over(UPSTREAM if self._body.done else UPSTREAM_CUT)
        else:
            self._flush()

    def _on_upstream(self, _mask: int) -> None:
        loop = self.loop
        try:
            received = self._receive(loop.buffer)
        except BlockingIOError:
            return
        except OSError:
            self._upstream_gone(reset=True)
            return
        if not received:
            self._upstream_gone(reset=False)
            return
        self.active_at = loop.now
        body = self._body
        size = body.feed(loop.buffer, received)
        try:
            sent = self._send(loop.view[:size])
        except BlockingIOError:
            sent = 0
        except OSError:
            self._close_both(CLIENT)
            return
        self.bytes_to_client += sent
        if self.first_byte_at is None and sent:
            self.first_byte_at = loop.now
        if sent < size:
            self._pending = memoryview(bytes(loop.view[sent:size]))
            loop.forget(self.upstream.fileno())  # not just no EPOLLIN: a hang-up would be reported all the same
            loop.change(self.client.fileno(), RDHUP | OUT)
        if body.done or body.broken:
            self._upstream_over(UPSTREAM if body.done else UPSTREAM_CUT)

    def _on_client(self, mask: int) -> None:
        if mask & (RDHUP | GONE):
            self._close_both(CLIENT)
        else:
            self._flush()

    def _flush(self) -> None:
        """Sends what is pending; when nothing is any more, reads on, or ends."""
        if self._pending:
            try:
                sent = self._send(self._pending)
            except BlockingIOError:
                sent = 0
            except OSError:
                self._close_both(CLIENT)
                return
            if sent:
                self.active_at = self.loop.now
            self.bytes_to_client += sent
            if self.first_byte_at is None and self.bytes_to_client > self._body_at:
                self.first_byte_at = self.loop.now
            self._pending = self._pending[sent:]
            if self._pending:
                self.loop.change(self.client.fileno(), RDHUP | OUT)
                return
        self._pending = _NOTHING  # lets go of the bytes
        if self._ends_by is not None:
            self._finish(self._ends_by)
            return
        self.loop.change(self.client.fileno(), RDHUP)
        self.loop.watch(self.upstream.fileno(), IN, self._on_upstream)

    def _upstream_gone(self, reset: bool) -> None:
        if not self._body.cut_shows and not reset:
            self._upstream_over(UPSTREAM)  # the legal end of a body without a length
            return
        if self._cut_message:
            self._pending = memoryview(self._body.event_chunk(self._cut_message))
        self._upstream_over(UPSTREAM_CUT)

    def _upstream_over(self, by: str) -> None:
        """Nothing more is wanted of the upstream; the end is the client's taking of what is pending."""
        self.loop.discard(self.upstream)
        self._ends_by = by
        self._flush()

    def _finish(self, by: str) -> None:
        self.loop.discard(self.upstream)
        if self._body.cut_shows:
            self.loop.linger(self.client)  # with or without the end of its framing, which tells one from the other
        elif by == UPSTREAM:
            reset_on_close(self.client, False)
            self.loop.linger(self.client)
        else:
            self.loop.discard(self.client)  # with a reset
        self.report(by, complete=by == UPSTREAM)

    def abort(self, by: str, message: bytes = b"") -> None:
        if self._cut_message is not None and not self._pending and (message := message or self._cut_message):
            with contextlib.suppress(OSError):  # told as well as can be
                self.bytes_to_client += self._send(self._body.event_chunk(message))
        self._finish(by)

    def _close_both(self, by: str) -> None:
        self.loop.discard(self.upstream)
        self.loop.discard(self.client)
        self.report(by, complete=False)


class _Way:
    """One direction of a tunnel."""

    __slots__ = ("closed", "pending", "sink", "source")

    def __init__(self, source: socket.socket, sink: socket.socket, pending: bytes) -> None:
        self.source = source
        self.sink = sink
        self.pending = memoryview(pending)
        self.closed = False  # the source has ended its direction

    def over(self) -> bool:
        return self.closed and not self.pending


class Tunnel(Exchange):
    """Bytes both ways until both sides have closed; a half-close is passed on."""

    __slots__ = ("_down", "_first", "_up")

    def __init__(self, loop: Poller, client: socket.socket, upstream: socket.socket, handover: Handover,
                 on_end: OnEnd) -> None:
        super().__init__(loop, client, upstream, handover, on_end)
        self._down = _Way(upstream, client, handover.to_client)
        self._up = _Way(client, upstream, handover.to_upstream)
        self._first = UPSTREAM  # who closed first

    def start(self) -> None:
        # OUT is reported at once, and with it the bytes that came with the hand-over are sent
        self.loop.watch(self.client.fileno(), IN | OUT, self._on_client)
        self.loop.watch(self.upstream.fileno(), IN | OUT, self._on_upstream)

    def _on_client(self, mask: int) -> None:
        self._on_side(mask, self._up, self._down, CLIENT)

    def _on_upstream(self, mask: int) -> None:
        self._on_side(mask, self._down, self._up, UPSTREAM_CUT)

    def _on_side(self, mask: int, from_here: _Way, to_here: _Way, if_dead: str) -> None:
        sock = from_here.source
        alive = True
        if to_here.pending and mask & (OUT | GONE):
            alive = self._write(to_here)
        if alive and mask & (IN | GONE):
            if not from_here.closed and not from_here.pending:
                alive = self._read(from_here)
            elif from_here.closed and mask & select.EPOLLERR:
                alive = False
            elif mask & GONE:
                self.loop.forget(sock.fileno())  # comes back when there is something to do for it
        if not alive:
            self.abort(if_dead)
            return
        if self._up.over() and self._down.over():
            self._close(self._first, complete=True)
            return
        self._arm(self.client, self._up, self._down)
        self._arm(self.upstream, self._down, self._up)

    def _read(self, way: _Way) -> bool:
        """One read and its write; False if the source is dead.  A dead sink is found by its own event."""
        loop = self.loop
        try:
            received = way.source.recv_into(loop.buffer)
        except BlockingIOError:
            return True
        except OSError:
            return False
        self.active_at = loop.now
        if received:
            way.pending = loop.view[:received]
            self._write(way)
            if way.pending:
                way.pending = memoryview(bytes(way.pending))
            return True
        if not self._up.closed and not self._down.closed:
            self._first = CLIENT if way is self._up else UPSTREAM
        way.closed = True
        self._end_sink(way)
        return True

    def _write(self, way: _Way) -> bool:
        """False if the sink is dead."""
        try:
            sent = way.sink.send(way.pending)
        except BlockingIOError:
            return True
        except OSError:
            return False
        self.active_at = self.loop.now
        if way is self._down:
            self.bytes_to_client += sent
            if self.first_byte_at is None:
                self.first_byte_at = self.loop.now
        else:
            self.bytes_to_upstream += sent
        way.pending = way.pending[sent:] if sent < len(way.pending) else _NOTHING
        self._end_sink(way)
        return True

    def _end_sink(self, way: _Way) -> None:
        if way.over():
            with contextlib.suppress(OSError):  # it is dead, which its own event will tell
                way.sink.shutdown(socket.SHUT_WR)

    def _arm(self, sock: socket.socket, from_here: _Way, to_here: _Way) -> None:
        mask = (OUT if to_here.pending else 0) | (0 if from_here.closed or from_here.pending else IN)
        fd = sock.fileno()
        if self.loop.watched(fd):
            self.loop.change(fd, mask)
        elif mask:
            self.loop.watch(fd, mask, self._on_client if sock is self.client else self._on_upstream)

    def abort(self, by: str, message: bytes = b"") -> None:
        self._close(by, complete=False)

    def _close(self, by: str, complete: bool) -> None:
        self.loop.discard(self.upstream)
        self.loop.discard(self.client)
        self.report(by, complete)
