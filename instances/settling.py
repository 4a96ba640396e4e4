"""Whether the memory of some devices stands still: a driver takes a moment to give back what a process had."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping

import gpu

log = logging.getLogger("vllm_server.instances")

READ_S = 0.1
STILL_S = 1.0               # what was to change and stands still for so long will not change
LIMIT_S = 10.0
STILL_BYTES = 32 << 20      # what changes by less between two readings stands still


class Settling:
    """`read(now)` blocks as long as the driver does.  The host's memory never stands still and is not looked at.

    `below`: what these devices are expected to come down to.  Without it, two readings that agree are enough.
    """

    def __init__(self, read: Callable[[float], gpu.Reading], devices: Collection[int],
                 below: Mapping[int, int] | None = None) -> None:
        self._read = read
        self._devices = frozenset(devices)
        self._below = below
        self._began_at: float | None = None
        self._read_at = self._moved_at = 0.0
        self._used: dict[int, int] = {}

    def look(self, now: float) -> bool:
        """Reads every 100 ms.  True once it is settled, or after LIMIT_S, which is logged."""
        if self._began_at is not None and now - self._read_at < READ_S:
            return False
        first = self._began_at is None
        began_at = self._began_at = now if self._began_at is None else self._began_at
        before, self._read_at = self._used, now
        self._used = {device.index: device.used_bytes for device in self._read(now).devices
                      if device.index in self._devices and device.kind == "cuda" and not device.error}
        if first or any(abs(self._used[index] - before.get(index, 0)) >= STILL_BYTES for index in self._used):
            self._moved_at = now
        if not self._used or self._settled(now, first=first):
            return True
        if now - began_at >= LIMIT_S:
            log.warning("the memory of devices %s does not settle within %g s", sorted(self._devices), LIMIT_S)
            return True
        return False

    def _settled(self, now: float, *, first: bool) -> bool:
        if self._below is None:
            return not first and self._moved_at < now
        down = all(used <= self._below.get(index, used) + STILL_BYTES for index, used in self._used.items())
        return down or now - self._moved_at >= STILL_S
