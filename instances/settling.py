"""Whether the memory of some devices stands still: a driver takes a moment to give back what a process had."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection

import gpu

log = logging.getLogger("vllm_server.instances")

READ_S = 0.1
LIMIT_S = 10.0
STILL_BYTES = 32 << 20      # what changes by less between two readings stands still


class Settling:
    """`read(now)` blocks as long as the driver does.  The host's memory never stands still and is not looked at."""

    def __init__(self, read: Callable[[float], gpu.Reading], devices: Collection[int]) -> None:
        self._read = read
        self._devices = frozenset(devices)
        self._began_at: float | None = None
        self._read_at = 0.0
        self._used: dict[int, int] = {}

    def look(self, now: float) -> bool:
        """Reads every 100 ms.  True once two readings agree, or after LIMIT_S, which is logged."""
        if self._began_at is not None and now - self._read_at < READ_S:
            return False
        first = self._began_at is None
        began_at = self._began_at = now if self._began_at is None else self._began_at
        before, self._read_at = self._used, now
        self._used = {device.index: device.used_bytes for device in self._read(now).devices
                      if device.index in self._devices and device.kind == "cuda" and not device.error}
        if not self._used:
            return True
        if not first and all(abs(self._used[index] - before.get(index, 0)) < STILL_BYTES for index in self._used):
            return True
        if now - began_at >= LIMIT_S:
            log.warning("the memory of devices %s does not settle within %g s", sorted(self._devices), LIMIT_S)
            return True
        return False
