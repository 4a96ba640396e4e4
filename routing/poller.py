"""One thread that waits for many sockets: epoll, its handlers, commands from other threads, and closing.

Level-triggered.  A handler is called with the event mask and does one read and one write at most, so that no socket
starves the others.
"""

from __future__ import annotations

import os
import select
import socket
import struct
import time
from _thread import allocate_lock  # threading would be a tenth of the relay process's memory
from collections import deque
from collections.abc import Callable

READ_BYTES = 64 * 1024  # at most this much is read for one event
LINGER_S = 2.0
TICK_S = 1.0
_EVENTS_A_TURN = 512
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)
_NO_LINGER = struct.pack("ii", 0, 0)


def reset_on_close(sock: socket.socket, on: bool) -> None:
    """With `on`, closing it, be it by the death of this process, is seen by the peer as a reset."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE if on else _NO_LINGER)


class Poller:
    """`run` is one thread; of the rest only `call_soon` and `stop` may be called from others."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.buffer = bytearray(READ_BYTES)  # everything is read into this one
        self.view = memoryview(self.buffer)
        self.now = clock()  # read once a turn
        self.turns = 0
        self._clock = clock
        self._epoll = select.epoll()
        self._handlers: dict[int, Callable[[int], None]] = {}
        self._masks: dict[int, int] = {}
        self._commands: deque[Callable[[], None]] = deque()
        self._lingering: dict[socket.socket, float] = {}
        self._stopping = False
        self._closed = False
        self._wake_lock = allocate_lock()  # nobody may write to the descriptor while it is closed
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.watch(self._wake_fd, select.EPOLLIN, self._woken)

    def run(self) -> None:
        """Until `stop`; then closes what is left."""
        next_tick = self.now + TICK_S
        try:
            while not self._stopping:
                timeout = TICK_S if self.busy() else None
                events = self._epoll.poll(timeout, _EVENTS_A_TURN)
                self.turns += 1
                self.now = self._clock()
                handler_of = self._handlers.get
                for fd, mask in events:
                    handler = handler_of(fd)
                    if handler is not None:  # None: closed earlier in this turn
                        handler(mask)
                # after the events, so that a new socket never meets an old one's event under the same number
                while self._commands:
                    self._commands.popleft()()
                if self.now >= next_tick:
                    next_tick = self.now + TICK_S
                    self.tick()
        finally:
            self.close()

    def call_soon(self, command: Callable[[], None]) -> None:
        self._commands.append(command)
        self._wake()

    def stop(self) -> None:
        self._stopping = True
        self._wake()

    def _wake(self) -> None:
        with self._wake_lock:
            if not self._closed:
                os.eventfd_write(self._wake_fd, 1)

    def _woken(self, _mask: int) -> None:
        os.eventfd_read(self._wake_fd)

    # --- for the loop's own thread ---------------------------------------------------------------------------------

    def busy(self) -> bool:
        """Is there anything that a tick might end?"""
        return bool(self._lingering)

    def tick(self) -> None:
        """About once a second while busy."""
        for sock in [sock for sock, until in self._lingering.items() if self.now >= until]:
            self._linger_over(sock)

    def watch(self, fd: int, mask: int, handler: Callable[[int], None]) -> None:
        self._epoll.register(fd, mask)
        self._handlers[fd] = handler
        self._masks[fd] = mask

    def change(self, fd: int, mask: int) -> None:
        if self._masks[fd] != mask:
            self._epoll.modify(fd, mask)
            self._masks[fd] = mask

    def watched(self, fd: int) -> bool:
        return fd in self._handlers

    def forget(self, fd: int) -> None:
        """No matter whether it was watched.  To be called before a close: another process may hold the same socket a
        moment longer, and epoll would go on to report it."""
        if self._handlers.pop(fd, None) is not None:
            del self._masks[fd]
            self._epoll.unregister(fd)

    def discard(self, sock: socket.socket) -> None:
        self.forget(sock.fileno())
        sock.close()

    def linger(self, sock: socket.socket) -> None:
        """Closes it properly: a close with unread bytes of the peer's would be a reset, and a reset may take the tail
        of what was sent with it.  So: end our direction, drop what comes until the peer closes, for 2 s at most."""
        self.forget(sock.fileno())
        try:
            sock.shutdown(socket.SHUT_WR)
        except OSError:
            sock.close()
            return
        self._lingering[sock] = self.now + LINGER_S
        self.watch(sock.fileno(), select.EPOLLIN, lambda _mask: self._drop_input(sock))

    def _drop_input(self, sock: socket.socket) -> None:
        try:
            received = sock.recv_into(self.buffer)
        except BlockingIOError:
            return
        except OSError:
            received = 0
        if not received:
            self._linger_over(sock)

    def _linger_over(self, sock: socket.socket) -> None:
        del self._lingering[sock]
        self.discard(sock)

    def close(self) -> None:
        while self._commands:
            self._commands.popleft()()
        for sock in list(self._lingering):
            self._linger_over(sock)
        with self._wake_lock:
            self._closed = True
            self._epoll.close()
            os.close(self._wake_fd)
