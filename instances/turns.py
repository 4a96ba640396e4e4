"""Turns on devices: starts and stops on a GPU go one at a time, as vLLM fails when memory changes while it measures."""

from __future__ import annotations

import threading
from collections.abc import Collection


class Turns:
    """Thread-safe; nobody waits in here, who is refused asks again.  A turn belongs to an instance, by its id."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._holders: dict[int, str] = {}

    def take(self, owner: str, devices: Collection[int]) -> bool:
        """All of these devices or none; True also when they are the owner's already."""
        with self._lock:
            if any(self._holders.get(device, owner) != owner for device in devices):
                return False
            self._holders.update(dict.fromkeys(devices, owner))
            return True

    def of_others(self, owner: str) -> frozenset[int]:
        with self._lock:
            return frozenset(device for device, holder in self._holders.items() if holder != owner)

    def give_back(self, owner: str) -> None:
        with self._lock:
            self._holders = {device: holder for device, holder in self._holders.items() if holder != owner}
