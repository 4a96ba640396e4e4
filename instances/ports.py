"""The ports of instances: handed out from a base upward, tested by binding, given back when the engine has gone."""

from __future__ import annotations

import contextlib
import socket
import threading

LOOPBACK = "127.0.0.1"
TRIES = 2000


class Ports:
    """Two callers never get the same port, whatever the kernel says between test and use."""

    def __init__(self, base: int) -> None:
        self._base = base
        self._lock = threading.Lock()
        self._owners: dict[int, str] = {}

    def reserve(self, owner: str, preferred: int | None = None) -> int | None:
        """A port that nothing listens on, reserved until `release(owner)`; None when there is none."""
        self.release(owner)
        candidates: list[int] = list(range(self._base, min(self._base + TRIES, 65536)))
        for port in [preferred, *candidates] if preferred is not None else candidates:
            with self._lock:
                if port in self._owners:
                    continue
                self._owners[port] = owner
            if can_bind(port):
                return port
            with self._lock:
                del self._owners[port]
        return None

    def take(self, owner: str, port: int) -> None:
        """An adopted engine holds it already."""
        with self._lock:
            self._owners[port] = owner

    def release(self, owner: str) -> None:
        with self._lock:
            self._owners = {port: held_by for port, held_by in self._owners.items() if held_by != owner}


def can_bind(port: int) -> bool:
    """Whether nothing listens there.  SO_REUSEADDR: connections in TIME_WAIT do not matter, as for the engine."""
    with contextlib.closing(socket.socket(socket.AF_INET, socket.SOCK_STREAM)) as test:
        test.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            test.bind((LOOPBACK, port))
            test.listen(1)
        except OSError:
            return False
    return True
