"""The circuit breaker of one backend: what real requests say about it.  Pure.

Some failures in a row open it: nothing is sent there for a while.  Then it is half open: one request goes through,
and its outcome closes it or opens it again, for twice as long.
"""

from __future__ import annotations

import math
from typing import NamedTuple

FAILURES = 3            # in a row; fewer may be the requests' own fault
FIRST_S = 1.0           # open for so long the first time
LONGEST_S = 10.0


class Circuit(NamedTuple):
    failures: int = 0           # in a row
    trips: int = 0              # how often it opened since the last success
    open_until: float = 0.0     # monotonic
    probing: bool = False       # half open, and its one request is under way

    @property
    def is_open(self) -> bool:
        """Or half open: not yet closed again."""
        return self.trips > 0

    @property
    def blocked_until(self) -> float:
        """When the next request may enter: 0.0 at once, inf not before the one under way has ended."""
        return math.inf if self.probing else self.open_until

    def state(self, now: float) -> str:
        if not self.is_open:
            return "closed"
        return "open" if now < self.open_until else "half_open"

    def entered(self) -> Circuit:
        """A request was let in."""
        return self._replace(probing=True) if self.is_open else self

    def left(self) -> Circuit:
        """A request ended that says nothing about the backend (its client left, say)."""
        return self._replace(probing=False) if self.probing else self

    def succeeded(self) -> Circuit:
        return self if self is CLOSED else CLOSED

    def failed(self, now: float, longest_s: float = LONGEST_S) -> Circuit:
        """Requests that were under way when it opened do not open it again."""
        failures = self.failures + 1
        if self.is_open and not self.probing:
            return self._replace(failures=failures)
        if not self.is_open and failures < FAILURES:
            return self._replace(failures=failures)
        trips = self.trips + 1
        open_s = min(FIRST_S * 2.0 ** min(trips - 1, 20), longest_s)
        return Circuit(failures, trips, now + open_s)


CLOSED = Circuit()
