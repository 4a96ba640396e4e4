"""What repeated checks say about a server, with hysteresis: one lost answer takes nobody out, one good brings nobody
back.  Pure.

======== ===================================== ======================================
status   means                                 requests
======== ===================================== ======================================
unknown  not checked yet                       go there if its models are known
up       the last check was answered           go there
suspect  the last check failed                 go there only if nobody else can
down     FALL checks in a row failed           none; those without an answer go elsewhere
======== ===================================== ======================================
"""

from __future__ import annotations

import random
from enum import StrEnum
from typing import NamedTuple

FALL = 2                # failures in a row that take it down; a server that never answered is down at once
RISE = 2                # successes in a row that bring it back
HURRY = 0.2             # of the interval: the next check of one that is between two states
JITTER = 0.15           # of the interval, taken off at random: servers are not asked in step


class Status(StrEnum):
    UNKNOWN = "unknown"
    UP = "up"
    SUSPECT = "suspect"
    DOWN = "down"

    @property
    def takes_requests(self) -> bool:
        return self is not Status.DOWN


class Health(NamedTuple):
    status: Status = Status.UNKNOWN
    in_a_row: int = 0           # failures while suspect, successes while down
    why: str = "not checked yet"

    def succeeded(self) -> Health:
        if self.status is Status.DOWN and self.in_a_row + 1 < RISE:
            return Health(Status.DOWN, self.in_a_row + 1, "answers again")
        return self if self.status is Status.UP else Health(Status.UP, 0, "answers")

    def failed(self, why: str) -> Health:
        if self.status in (Status.UNKNOWN, Status.DOWN):
            return Health(Status.DOWN, 0, why)
        failures = self.in_a_row + 1
        return Health(Status.SUSPECT if failures < FALL else Status.DOWN, failures if failures < FALL else 0, why)

    def next_check_s(self, interval_s: float, draw: random.Random) -> float:
        """Seconds until the next one; never more than the interval, so that two of them bring a server back."""
        between = self.status is Status.SUSPECT or (self.status is Status.DOWN and self.in_a_row > 0)
        return interval_s * (HURRY if between else 1.0) * (1.0 - JITTER * draw.random())


def check_limit_s(interval_s: float) -> float:
    """How long one check may take."""
    return min(5.0, max(0.5, interval_s / 2))
