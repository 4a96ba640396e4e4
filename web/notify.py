"""What a service manager is told of the daemon, by the protocol of sd_notify(3): datagrams to $NOTIFY_SOCKET.

systemd gives the address where the unit says Type=notify; scripts/start.sh -d gives one to hear when the daemon serves.
Without one nothing is sent.  Only the process that the manager started may speak: the master (web/server.py).
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import time
from collections.abc import MutableMapping

log = logging.getLogger("vllm_server")

LOOKS_EACH_WATCHDOG = 3     # of the master's loop, at the least: systemd asks for two


class Notifier:
    """Not thread-safe.  `address` is a path, or an abstract socket's name after an `@`."""

    def __init__(self, address: str | None = None, watchdog_s: float | None = None) -> None:
        self._address = None if address is None else "\0" + address[1:] if address.startswith("@") else address
        self._every_s = None if watchdog_s is None else watchdog_s / LOOKS_EACH_WATCHDOG
        self._next_alive = 0.0      # monotonic

    @classmethod
    def taken_from(cls, environ: MutableMapping[str, str]) -> Notifier:
        """Its variables are removed: an engine that inherited them could speak for the daemon."""
        address = environ.pop("NOTIFY_SOCKET", "")
        every_us, pid = environ.pop("WATCHDOG_USEC", ""), environ.pop("WATCHDOG_PID", "")
        if address and not address.startswith(("/", "@")):
            log.warning("NOTIFY_SOCKET=%s is no Unix socket: the service manager is told nothing", address)
            address = ""
        watched = every_us.isdigit() and pid in ("", str(os.getpid()))
        return cls(address or None, int(every_us) / 1e6 if watched else None)

    def ready(self, status: str) -> None:
        """It listens, and has taken over what an earlier daemon left."""
        self._send("READY=1", f"STATUS={status}")

    def reloading(self) -> None:
        """`ready` follows, whatever came of it."""
        self._send("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}", "STATUS=reads its settings anew")

    def stopping(self, within_s: float) -> None:
        """`within_s`: how long that may take, by the daemon's own deadlines; the manager waits for so long."""
        self._send("STOPPING=1", f"EXTEND_TIMEOUT_USEC={int(within_s * 1e6)}", "STATUS=stops")

    def alive(self, now: float) -> None:
        """Called once a second or so."""
        if self._every_s is not None and now >= self._next_alive:
            self._next_alive = now + self._every_s
            self._send("WATCHDOG=1")

    def _send(self, *lines: str) -> None:
        if self._address is None:
            return
        # Who asked may have gone, as start.sh has once the daemon serves.
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            sender.setblocking(False)
            sender.sendto("\n".join(lines).encode(), self._address)
