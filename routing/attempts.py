"""Where one request has been, and whether a failure may send it elsewhere.  Pure.

Only before the client has got anything: who calls this has not passed on a byte yet.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from errors import DaemonError, EngineStopped, UpstreamError, UpstreamTimeout
from routing.remote import Outcome

ELSEWHERE = frozenset({429, 502, 503, 504})
"""Answers that another backend might not give."""
ONCE = frozenset({500})
"""One other is asked for a second opinion: two of them say that it is the request."""
STALE = 404     # of a server: it may have lost the model since it was last asked what it has; one other is asked
DEATHS = 2      # engines of this machine that may die under one request: it may be the request that kills them


@dataclass
class Attempts:
    max_retries: int
    tried: set[str] = field(default_factory=set)    # backends that failed it
    retries: int = 0
    deaths: int = 0
    opinions: int = 0                               # answers for which one other is asked
    last: DaemonError | None = None                 # why it left the last one
    first_at: float | None = None                   # monotonic: when it was first sent

    def may_follow_error(self, error: DaemonError, *, local: bool, refused: bool) -> bool:
        """Whether another backend may be tried after this error.  `refused`: nothing was sent."""
        if not isinstance(error, UpstreamError) or isinstance(error, UpstreamTimeout):
            return False        # the client's, the daemon's own, or all of its time is spent
        if local and not refused and not isinstance(error, EngineStopped):
            self.deaths += 1
        return self.retries < self.max_retries and self.deaths < DEATHS

    def may_follow_status(self, status: int, *, local: bool) -> bool:
        once = status in ONCE or (status == STALE and not local)
        if once:
            self.opinions += 1
        return (status in ELSEWHERE or (once and self.opinions < 2)) and self.retries < self.max_retries

    def leave(self, backend: str, why: DaemonError) -> None:
        """It goes elsewhere now."""
        self.tried.add(backend)
        self.last = why
        self.retries += 1

    def left_s(self, limit_s: float, now: float) -> float:
        """What is left of the time to the first byte, all tries together; the first call starts it."""
        if self.first_at is None:
            self.first_at = now
        return self.first_at + limit_s - now


def outcome_of(status: int) -> Outcome:
    """What an answer's status says about who gave it."""
    if status in (429, 503):
        return Outcome.BUSY
    if status == STALE:
        return Outcome.STALE
    return Outcome.FAILED if status >= 500 else Outcome.GOOD


def retry_after_s(header: str) -> float | None:
    """The seconds of a Retry-After header; None without one, or in its other form, a date."""
    return float(header) if header.isascii() and header.isdigit() and len(header) < 10 else None
