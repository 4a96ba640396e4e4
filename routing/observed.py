"""What is counted of requests: how they ended, how long they took, where they went instead; and the last of them, one
by one, without their contents.  No I/O.

prometheus_client renders it (web/metrics.py); the counting is here because a request must not pay for labels and
locks of a general library several times over.
"""

from __future__ import annotations

import threading
import time
from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Callable, Collection, Mapping
from typing import NamedTuple

FIRST_BYTE_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
WHOLE_S = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0)
MAX_MODELS = 1000           # that have a label of their own; those that come later share OTHER
MAX_SERIES = 20_000         # of answers; beyond it those of backends that have gone are dropped
OTHER = "other"
RECENT = 500                # requests that are listed
FAILED_FROM = 400           # statuses
RECENT_FAILED = 200         # of those that failed, so that a flood of good ones does not wash them away
ABOUT = "vllm_server.about"  # in a request's environ: its About


class About:
    """One request, as it becomes known.  `model` stays empty when nobody has it: anything may be asked for."""

    __slots__ = ("at", "backend", "begun", "code", "first_byte_s", "key", "model", "open", "path", "request_id",
                 "seconds", "status")

    def __init__(self, begun: float) -> None:
        self.begun = begun              # monotonic
        self.model = ""
        self.backend = ""               # who answers: an instance's id, a server's url; empty: the daemon itself
        self.status: int | None = None  # of an answer that the daemon does not see; None: as the response says
        self.open = False               # its answer goes on after its head
        self.at = 0.0                   # wall clock: when it came
        self.path = ""
        self.key: str | None = None     # the name of the key that came with it
        self.request_id = ""
        self.code: str | None = None    # of the daemon's own error
        self.first_byte_s: float | None = None
        self.seconds: float | None = None       # the whole of it; None: its answer goes on


class Histogram(NamedTuple):
    """`counts` has one more than `bounds`: what is beyond the last."""

    bounds: tuple[float, ...]
    counts: list[int]
    total: list[float]          # of one: the sum of all values

    @staticmethod
    def of(bounds: tuple[float, ...]) -> Histogram:
        return Histogram(bounds, [0] * (len(bounds) + 1), [0.0])

    def add(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total[0] += value


class Seen(NamedTuple):
    """A copy of all that was counted."""

    answers: Mapping[tuple[str, str, str], int]     # model, backend, status
    by_key: Mapping[tuple[str, str], int]           # name of the key, status
    retries: Mapping[str, int]                      # why
    first_byte: Mapping[str, Histogram]             # by model
    whole: Mapping[str, Histogram]


class Observed:
    """Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._answers: Counter[tuple[str, str, str]] = Counter()
        self._by_key: Counter[tuple[str, str]] = Counter()
        self._retries: Counter[str] = Counter()
        self._first_byte: dict[str, Histogram] = {}
        self._whole: dict[str, Histogram] = {}
        self._recent: deque[About] = deque(maxlen=RECENT)
        self._failed: deque[About] = deque(maxlen=RECENT_FAILED)

    def answered(self, about: About, status: int, now: float) -> None:
        """Its head goes to the client now."""
        about.status, about.first_byte_s = status, now - about.begun
        about.at = time.time() - about.first_byte_s
        if not about.open and not about.backend:
            about.seconds = about.first_byte_s
        with self._lock:
            self._recent.append(about)
            if status >= FAILED_FROM:
                self._failed.append(about)
            model = self._label(about.model)
            self._answers[model, about.backend, str(status)] += 1
            if about.key is not None:
                self._by_key[about.key, str(status)] += 1
            if about.backend:
                _histogram(self._first_byte, model, FIRST_BYTE_S).add(now - about.begun)

    def ended(self, about: About, now: float) -> None:
        about.seconds = now - about.begun
        with self._lock:
            if about.code is not None and (about.status or 0) < FAILED_FROM:    # it broke after its head
                self._failed.append(about)
            _histogram(self._whole, self._label(about.model), WHOLE_S).add(now - about.begun)

    def end_of(self, about: About, clock: Callable[[], float],
               code: Callable[[], str | None] = lambda: None) -> Callable[[], None]:
        """To be called when its answer has ended; a second call counts for nothing.  `code`: why it was cut."""
        once = [about]
        about.open = True

        def ended() -> None:
            if once:
                once.clear()
                about.code = about.code or code()
                self.ended(about, clock())
        return ended

    def retried(self, why: str) -> None:
        with self._lock:
            self._retries[why] += 1

    def recent(self, *, failed: bool = False) -> list[About]:
        """The last requests, or the last that failed; oldest first."""
        with self._lock:
            return list(self._failed if failed else self._recent)

    def seen(self, backends: Collection[str]) -> Seen:
        """`backends` are those that there are."""
        with self._lock:
            if len(self._answers) > MAX_SERIES:
                for key in [key for key in self._answers if key[1] not in backends]:
                    del self._answers[key]
            return Seen(dict(self._answers), dict(self._by_key), dict(self._retries), _copy(self._first_byte),
                        _copy(self._whole))

    def _label(self, model: str) -> str:
        """Caller holds the lock."""
        return model if model in self._whole or len(self._whole) < MAX_MODELS else OTHER


def _histogram(found: dict[str, Histogram], model: str, bounds: tuple[float, ...]) -> Histogram:
    histogram = found.get(model)
    if histogram is None:
        histogram = found[model] = Histogram.of(bounds)
    return histogram


def _copy(found: Mapping[str, Histogram]) -> dict[str, Histogram]:
    return {model: Histogram(one.bounds, list(one.counts), list(one.total)) for model, one in found.items()}
