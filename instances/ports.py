"""The ports of instances: handed out from a base upward, tested by binding, given back when the engine has gone."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Collection

from instances import sockets

LOOPBACK = "127.0.0.1"
TRIES = 2000


class Ports:
    """Two callers never get the same port, whatever the kernel says between test and use."""

    def __init__(self, base: int) -> None:
        self._base = base
        self._lock = threading.Lock()
        self._owners: dict[int, str] = {}

    def reserve(self, owner: str, preferred: int | None = None, avoid: Collection[int] = ()) -> int | None:
        """A free port, reserved until `release(owner)`: `preferred` or the lowest; None when there is none.

        `avoid`: those that the owner could not use.  A port that it holds already is given back first.
        """
        self.release(owner)
        numbers = range(self._base, min(self._base + TRIES, 65536))
        for port in numbers if preferred is None else (preferred, *numbers):
            if port in avoid or not self._claim(port, owner):
                continue
            if is_free(port):
                return port
            self.release(owner)
        return None

    def take(self, owner: str, port: int) -> None:
        """An engine that runs holds it already."""
        with self._lock:
            self._owners[port] = owner

    def release(self, owner: str) -> None:
        with self._lock:
            self._owners = {port: holder for port, holder in self._owners.items() if holder != owner}

    def _claim(self, port: int, owner: str) -> bool:
        with self._lock:
            return self._owners.setdefault(port, owner) == owner


def is_free(port: int) -> bool:
    """Whether an engine could listen there.

    Connections in TIME_WAIT do not matter, as the engine binds with SO_REUSEADDR.  Tested with that option alone, a
    port would seem free that another engine has bound and, still loading, does not listen on yet.
    """
    return _binds(port, reuse=False) or (_binds(port, reuse=True) and sockets.has_connections(port))


def _binds(port: int, *, reuse: bool) -> bool:
    with contextlib.closing(socket.socket(socket.AF_INET, socket.SOCK_STREAM)) as test:
        test.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, int(reuse))
        try:
            test.bind((LOOPBACK, port))
            test.listen(1)
        except OSError:
            return False
    return True
