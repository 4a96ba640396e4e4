"""Notices clients that leave while their request thread waits for something else.

One thread and one epoll set for all: a socket is watched for its peer's end only (EPOLLRDHUP), never read.  A client
that shuts down its sending side counts as gone, as it does for nginx: HTTP/1.1 has no other sign of leaving, and an
engine that goes on generating for nobody costs more than the rare client that half-closes on purpose.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import threading
from collections.abc import Callable


class Watched:
    """One client during one request.  `gone` never goes back to False."""

    def __init__(self, watch: ClientWatch, fd: int) -> None:
        self._watch = watch
        self._fd = fd
        self.gone = False
        self._callback: Callable[[], None] | None = None

    def on_gone(self, callback: Callable[[], None] | None) -> None:
        """Call it when the client leaves, or now if it has left; None: nobody waits any more."""
        self._callback = callback
        if callback is not None and self.gone:
            callback()

    def watch_again(self, callback: Callable[[], None]) -> None:
        """After a `close`, when the socket is this request's again."""
        self._watch.put(self._fd, self)
        self.on_gone(callback)

    def close(self) -> None:
        """Before the socket is used for its next request or closed.  A second call does nothing."""
        self._watch.remove(self._fd, self)

    def left(self) -> None:
        self.gone = True
        if (callback := self._callback) is not None:
            callback()


class ClientWatch:
    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._lock = threading.Lock()
        self._watched: dict[int, Watched] = {}
        self._wake_read, self._wake_write = os.pipe()
        self._epoll.register(self._wake_read, select.EPOLLIN)
        self._thread = threading.Thread(target=self._run, name="client-watch", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def add(self, client: socket.socket) -> Watched:
        fd = client.fileno()
        watched = Watched(self, fd)
        self.put(fd, watched)
        return watched

    def put(self, fd: int, watched: Watched) -> None:
        with self._lock:
            self._watched[fd] = watched
            try:
                self._epoll.register(fd, select.EPOLLRDHUP | select.EPOLLONESHOT)
            except OSError:
                watched.gone = True
                self._watched.pop(fd, None)

    def remove(self, fd: int, watched: Watched) -> None:
        with self._lock:
            if self._watched.get(fd) is watched:
                del self._watched[fd]
                with contextlib.suppress(OSError):
                    self._epoll.unregister(fd)

    def close(self) -> None:
        os.write(self._wake_write, b"x")
        if self._thread.ident is not None:
            self._thread.join()
        self._epoll.close()
        os.close(self._wake_read)
        os.close(self._wake_write)

    def _run(self) -> None:
        while True:
            for fd, _ in self._epoll.poll():
                if fd == self._wake_read:
                    return
                self._notice(fd)

    def _notice(self, fd: int) -> None:
        """There was an event of this descriptor.  It may be an old one: of a client that left and was closed since,
        whose number the next client has got."""
        with self._lock:
            watched = self._watched.get(fd)
            if watched is None or not _has_ended(fd):
                return
        # Between the lock and this call the request may end: its abort then hits a closed exchange, which does nothing.
        watched.left()


def _has_ended(fd: int) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLRDHUP)
    return bool(poll.poll(0))
