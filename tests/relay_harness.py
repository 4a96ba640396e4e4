"""Sockets and a running loop for the relay's tests."""

from __future__ import annotations

import select
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from routing.framing import Framing
from routing.poller import reset_on_close
from routing.relay_loop import Ended, Handover, RelayLoop
from tests.support import wait_until

HANG_S = 120.0
HEAD = b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n"


class Sockets:
    """Connections on loopback, all closed at the end.  May be used by several threads."""

    def __init__(self) -> None:
        self._peers: list[socket.socket] = []
        self._ours: list[socket.socket] = []
        self._lock = threading.Lock()  # so that who connects is who is accepted
        self._listener = socket.create_server(("127.0.0.1", 0))

    def pair(self, buffer_bytes: int | None = None) -> tuple[socket.socket, socket.socket]:
        """(the peer's end, the relay's end); with `buffer_bytes` each of their four kernel buffers is that small.

        Below 64 KiB, the size of a segment on loopback, TCP waits for its timers, so that they are Unix sockets then.
        """
        if buffer_bytes and buffer_bytes < 65536:
            peer, ours = socket.socketpair()
            set_buffers(peer, buffer_bytes)
        else:
            peer = socket.socket()
            if buffer_bytes:
                set_buffers(peer, buffer_bytes)  # before the connection: it fixes the window
            with self._lock:
                peer.connect(self._listener.getsockname())
                ours, _ = self._listener.accept()
        if buffer_bytes:
            set_buffers(ours, buffer_bytes)
        peer.settimeout(HANG_S)
        self._peers.append(peer)
        self._ours.append(ours)
        return peer, ours

    def close_peers(self) -> None:
        """The relay's ends are given away: it closes them, or a ResourceWarning fails the test."""
        for peer in self._peers:
            peer.close()
        self._peers.clear()
        self._ours.clear()

    def close(self) -> None:
        """When no relay runs any more: also closes what no relay was given."""
        for ours in self._ours:
            ours.close()
        self.close_peers()
        self._listener.close()


def set_buffers(sock: socket.socket, size: int) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, size)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, size)


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Driven:
    """A loop in a thread, with a clock that stands still unless told otherwise."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.ends: list[Ended] = []
        self.loop = RelayLoop(self.ends.append, self.clock)
        self.sockets = Sockets()
        self._ids = 0
        self._thread = threading.Thread(target=self.loop.run, name="relay loop")
        self._thread.start()

    def open(self, framing: Framing, *, to_client: bytes = HEAD, body_at: int = len(HEAD), to_upstream: bytes = b"",
             idle_timeout_s: float | None = None, sse: bool = False, cut_message: bytes = b"",
             buffer_bytes: int | None = None, client_buffer_bytes: int | None = None
             ) -> tuple[int, socket.socket, socket.socket]:
        """An exchange: its id, the client, the upstream."""
        client, client_side = self.sockets.pair(client_buffer_bytes or buffer_bytes)
        upstream, upstream_side = self.sockets.pair(buffer_bytes)
        self._ids += 1
        self.loop.add(client_side, upstream_side, Handover(
            self._ids, to_client, framing, body_at, to_upstream, idle_timeout_s, sse, cut_message))
        return self._ids, client, upstream

    def end_of(self, exchange_id: int) -> Ended:
        wait_until(lambda: any(end.id == exchange_id for end in list(self.ends)))
        ends = [end for end in list(self.ends) if end.id == exchange_id]
        assert len(ends) == 1
        return ends[0]

    def advance(self, seconds: float) -> None:
        self.clock.now += seconds
        self.settle()

    def wait_for_rest(self) -> None:
        """Returns when nothing is ready for the loop; one that spins on an event never comes to that.  (A loop's
        events are level-triggered: to look at them takes none away.)"""
        self.settle()
        wait_until(lambda: self.loop._epoll.poll(0) == [])

    def settle(self) -> None:
        """Returns when the loop has finished a turn that began after this call."""
        for _ in range(2):
            done = threading.Event()
            self.loop.call_soon(done.set)
            assert done.wait(HANG_S)

    def held(self, exchange_id: int) -> int:
        """Bytes that the loop keeps of one exchange."""
        return len(self.loop._exchanges[exchange_id]._pending)  # type: ignore[attr-defined]

    def watched(self) -> int:
        """Descriptors in the loop's epoll."""
        return len(self.loop._handlers)

    def forget(self) -> None:
        """For one loop that serves thousands of examples."""
        self.sockets.close_peers()
        self.ends.clear()

    def stop(self) -> None:
        self.loop.stop()
        self._thread.join(HANG_S)
        assert not self._thread.is_alive()

    def close(self) -> None:
        self.stop()
        self.sockets.close()


@contextmanager
def driven_loop() -> Iterator[Driven]:
    driven = Driven()
    try:
        yield driven
    finally:
        driven.close()


def fill(driven: Driven, upstream: socket.socket, data: bytes) -> int:
    """Writes until nothing moves any more: the relay holds bytes, and the upstream can send no more."""
    upstream.setblocking(False)
    view = memoryview(data)
    sent = 0
    refused = 0
    while refused < 20:
        try:
            sent += upstream.send(view[sent:])
            refused = 0
        except BlockingIOError:
            refused += 1
            driven.settle()
    upstream.setblocking(True)
    return sent


def read_all(sock: socket.socket) -> tuple[bytes, bool]:
    """Until the end: what came, and whether the end was a reset."""
    data = bytearray()
    while True:
        try:
            part = sock.recv(1 << 16)
        except ConnectionResetError:
            return bytes(data), True
        if not part:
            return bytes(data), False
        data += part


def read_exactly(sock: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        part = sock.recv(size - len(data))
        assert part, f"ended after {data!r}"
        data += part
    return data


def reset(sock: socket.socket) -> None:
    reset_on_close(sock, True)
    sock.close()


def at_end(sock: socket.socket) -> bool:
    """Has the peer ended, or reset, this connection?  Waits for it."""
    try:
        return sock.recv(1) == b""
    except ConnectionResetError:
        return True


def pump(source: socket.socket, pieces: list[bytes], sink: socket.socket, read_bytes: int) -> bytes:
    """Writes all pieces into one socket, one write each, while reading from another until its end."""
    source.setblocking(False)
    received = bytearray()
    left = [memoryview(piece) for piece in pieces if piece]
    poller = select.poll()
    poller.register(sink, select.POLLIN)
    if left:
        poller.register(source, select.POLLOUT)
    while True:
        ready = dict(poller.poll(HANG_S * 1000))
        assert ready, "nothing moves"
        if source.fileno() in ready and left:
            try:
                left[0] = left[0][source.send(left[0]):]
            except (BrokenPipeError, ConnectionResetError):
                left.clear()  # the relay has read the body's end and closed
            if left and not left[0]:
                left.pop(0)
            if not left:
                poller.unregister(source)
        if sink.fileno() in ready:
            part = sink.recv(read_bytes)
            if not part:
                return bytes(received)
            received += part
