"""When a model gets one more replica, and when one fewer will do.  Pure; times are seconds.

`replicas: {min, max}` of an entry of the catalog.  Its load is looked at once a second (`Look`); looks of a steady
time, in which no replica came or went, make a window, and a decision needs a whole window of them:

- **One more** when, on average over REPLICAS_GROW_SECONDS, more than REPLICAS_GROW_WAITING requests wait for each
  replica that serves, in the engines (`num_requests_waiting`) or in the daemon's queue.
- **One fewer** when, throughout REPLICAS_SHRINK_SECONDS, the rest would have run all that there was with half of their
  places (or one request): of those places that were in use when requests had to wait, where that is known.
- One at a time: while one loads there is nothing to see.  Who was just added starts the next window, so a load that
  grows by one replica cannot shrink by one before it has halved for REPLICAS_SHRINK_SECONDS.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

SHARE_IN_USE = 0.5      # of the places of those that would stay: the hysteresis between growing and shrinking
LEAST_LOOKS = 3         # a window of fewer says nothing, however long it is


class Change(Enum):
    GROW = "grow"
    SHRINK = "shrink"
    STAY = "stay"


@dataclass(frozen=True, slots=True)
class Rule:
    """What the configuration says."""

    least: int
    most: int
    grow_waiting: float
    grow_s: float
    shrink_s: float


@dataclass(frozen=True, slots=True)
class Look:
    """One model at one moment."""

    at: float                   # monotonic
    replicas: int               # of the entry: those that serve or will
    serving: int                # instances of this machine that answer to its name now
    coming: int = 0             # of the entry: those that load or wake
    asleep: int = 0             # of the entry, beside `replicas`
    waiting: float = 0.0        # requests that wait, in engines and here
    running: float = 0.0        # requests that run
    places: float = 1.0         # requests at once that all who serve are meant for

    @property
    def steady(self) -> bool:
        return self.serving > 0 and self.coming == 0


@dataclass(frozen=True, slots=True)
class Decision:
    """`wanted` replicas there shall be."""

    change: Change
    wanted: int
    because: str


def remembered(looks: Sequence[Look], new: Look, rule: Rule) -> tuple[Look, ...]:
    """The window with one look more; what was seen with other replicas, or is older than it takes, does not count."""
    if not new.steady:
        return ()
    old = looks if looks and (looks[-1].replicas, looks[-1].serving) == (new.replicas, new.serving) else ()
    longest_s = max(rule.grow_s, rule.shrink_s)
    # The youngest of those that are too old stays: it shows that the window is whole.
    first = next((index for index in reversed(range(len(old))) if old[index].at <= new.at - longest_s), 0)
    return (*old[first:], new)


def places_in_use(looks: Sequence[Look]) -> float | None:
    """How many requests one replica ran, on average, while others waited; None: nothing waited."""
    full = [one.running / one.serving for one in looks if one.waiting > 0 and one.serving]
    return max(1.0, sum(full) / len(full)) if full else None


def decide(looks: Sequence[Look], now: Look, rule: Rule, *, full_at: float | None = None,
           hindered: str | None = None) -> Decision:
    """`looks` is the window up to `now`; `full_at` the `places_in_use` when it last grew; `hindered` why there cannot
    be one more now."""
    count = now.replicas
    if count == 0:
        return Decision(Change.STAY, 0, "it is not loaded")
    if count > rule.most:
        return Decision(Change.SHRINK, count - 1, f"{count} run, and its most is {rule.most}")
    if now.coming:
        return Decision(Change.STAY, count, "one is being loaded")
    if count + now.asleep < rule.least and (now.running or now.waiting):
        return _grown(count, f"{count} run, and its least is {rule.least}", hindered)
    waiting = _waiting(looks, rule)
    if waiting is not None and waiting > rule.grow_waiting:
        seen = f"{waiting:.1f} requests waited for each of {now.serving} replicas, on average over {rule.grow_s:g} s"
        if count >= rule.most:
            return Decision(Change.STAY, count, f"{seen}; {rule.most} is its most")
        return _grown(count, seen, hindered)
    if count > rule.least and _is_quiet(looks, rule, full_at):
        return Decision(Change.SHRINK, count - 1,
                        f"for {rule.shrink_s:g} s there was no more than half of what {count - 1} can run")
    return Decision(Change.STAY, count, "its load calls for no other number")


def _grown(count: int, seen: str, hindered: str | None) -> Decision:
    if hindered is not None:
        return Decision(Change.STAY, count, f"{seen}; {hindered}")
    return Decision(Change.GROW, count + 1, seen)


def _whole(looks: Sequence[Look], span_s: float) -> Sequence[Look]:
    """The looks of the last `span_s` seconds; none if they do not reach so far back."""
    if not looks or looks[0].at > looks[-1].at - span_s:
        return ()
    window = [one for one in looks if one.at >= looks[-1].at - span_s]
    return window if len(window) >= LEAST_LOOKS else ()


def _waiting(looks: Sequence[Look], rule: Rule) -> float | None:
    """On average, for each replica that serves."""
    window = _whole(looks, rule.grow_s)
    return sum(one.waiting / one.serving for one in window) / len(window) if window else None


def _is_quiet(looks: Sequence[Look], rule: Rule, full_at: float | None) -> bool:
    window = _whole(looks, rule.shrink_s)
    if not window:
        return False
    last = window[-1]
    places = last.places / last.serving if full_at is None else min(full_at, last.places / last.serving)
    return max(one.running + one.waiting for one in window) <= max(1.0, SHARE_IN_USE * places * (last.serving - 1))
