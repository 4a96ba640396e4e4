"""Whose turn it is when more models are wanted than fit.  Pure; times are seconds.

Requests wait in a queue for each model.  Nobody's request is ever cut for another model: who has to go takes no more
requests, ends those that it has (all that came before), and goes.

- A holder in use may be taken for others once it has had MAX_HOLD_SECONDS: counted from when it became ready, or from
  when the first of the others began to wait, whichever is later.
- An idle holder may be taken once it has stayed for as long as loading it takes (at least 2 s, at most
  MAX_HOLD_SECONDS), or has been idle for a quarter of that.  Who asks in short intervals keeps it for a turn; one
  lonely request does not.
- Who has waited longest is next; others may start meanwhile only where nobody has to go for them.

With n models, room for one of them, hold H, load L (the longest) and drain D (the longest request), no request waits
longer than `longest_wait_s`: D + (n - 1) x (L + H + D) + L.  It came too late for its own model, which drains; each of
the others has a turn; its own is loaded.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from instances.eviction import RELOAD_S

IDLE_SHARE = 0.25           # of its residence: one that is idle for so long is not waited for
LEAST_STAY_S = 2.0
CANCEL_SHARE = 0.5          # a load that is farther than this is finished for nobody


@dataclass(frozen=True, slots=True)
class Waiter:
    """A model that is wanted and has no room: how many requests wait, and for how long the first of them."""

    id: str                             # of its instance
    count: int
    longest_s: float


def residence_s(reload_s: float | None, max_hold_s: float) -> float:
    """How long an idle holder stays although others wait: as long as its load took, so that half of the time serves.
    A little even if that was quick: then the switch itself, drain and stop and start, is what costs."""
    return min(max_hold_s, max(LEAST_STAY_S, RELOAD_S if reload_s is None else reload_s))


def may_go(*, busy: bool, hold_s: float, idle_s: float, reload_s: float | None, contended_s: float,
           max_hold_s: float) -> bool:
    """Whether a ready holder may be taken to make room (ledger.Resident.may_go).

    `hold_s` is the time since it became ready, `contended_s` how long another model has waited for room (the longest of
    them), 0 where none does.  Not asked about sleepers.
    """
    if busy:
        return contended_s > 0 and min(hold_s, contended_s) >= max_hold_s
    stay_s = residence_s(reload_s, max_hold_s)
    return hold_s >= stay_s or idle_s >= stay_s * IDLE_SHARE


def order(waiters: Iterable[Waiter]) -> tuple[str, ...]:
    """Ids, who is next first: the longest waiting.  One that nobody waits for any more comes last."""
    return tuple(waiter.id for waiter in sorted(
        waiters, key=lambda waiter: (waiter.count == 0, -waiter.longest_s, waiter.id)))


def give_up(*, waiting: int, elapsed_s: float, expected_s: float | None) -> bool:
    """Whether a load that nobody waits for any more is cancelled: not if half of its expected time has passed."""
    return waiting == 0 and elapsed_s < CANCEL_SHARE * (RELOAD_S if expected_s is None else expected_s)


def longest_wait_s(models: int, *, max_hold_s: float, drain_s: float, load_s: float) -> float:
    """The bound on any request's wait, where one model fits at a time and none fails to load.

    Each other model has one turn at most before it: who waited less comes later, and who had its turn waits anew.
    """
    return drain_s + max(0, models - 1) * (load_s + max_hold_s + drain_s) + load_s


def shortest_turn_s(reload_s: float | None, max_hold_s: float) -> float:
    """Nobody goes sooner after its load, so there is no more than one switch in a load and this time."""
    return IDLE_SHARE * residence_s(reload_s, max_hold_s)
