"""Whom to put to sleep or to stop so that something fits: the cheapest set that makes room.  Pure.

What an eviction costs is told in seconds: those that it takes (EVICT_S), and those that coming back takes, weighed by
how soon that is to be expected.  Who was wanted t seconds ago is taken to be wanted about once in t seconds; so the
least recently used goes first, one that loads slowly stays longer, and each step of priority doubles the weight.  Fewer
victims are cheaper than more of the same kind, yet two small ones that nobody used for hours go before a large one that
is in use every minute.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from instances.ledger import HOST, Resident

EVICT_S = 1.0               # the requests that make it go wait so much longer: a drain, SIGTERM, memory that settles
WINDOW_S = 60.0             # the time for which coming back is weighed
RELOAD_S = 60.0             # where nothing was measured yet
WAKE_S = 5.0
MOST_STEPS = 40             # of priority, either way: the figures stay figures
EXACT_CANDIDATES = 7        # of so many the cheapest set is found for certain
NODES = 300                 # steps of the search on one device with more


class Option(NamedTuple):
    """One thing to do with one resident.  `frees` has negative bytes of HOST for one that goes to sleep."""

    cost_us: int
    id: str
    sleeps: bool
    frees: Mapping[int, int]


@dataclass(frozen=True)
class Choice:
    """Which devices fit then, and what has to be done for it; in no case more than that."""

    devices: tuple[int, ...]
    options: tuple[Option, ...] = ()

    @property
    def cost_us(self) -> int:
        return sum(option.cost_us for option in self.options)


def options(resident: Resident) -> tuple[Option, ...]:
    """What may be done with it, the cheapest first; nothing with one that is busy, pinned or leaves anyway."""
    if not resident.evictable:
        return ()
    weight = 2.0 ** max(-MOST_STEPS, min(resident.priority, MOST_STEPS)) * WINDOW_S / (1.0 + max(0.0, resident.idle_s))
    reload_s = RELOAD_S if resident.reload_s is None else resident.reload_s
    stop = Option(round(1e6 * (EVICT_S + weight * reload_s)), resident.id, False,
                  resident.bytes_on if resident.awake else {**resident.bytes_on, HOST: resident.host_bytes})
    if not (resident.awake and resident.can_sleep):
        return (stop,)
    wake_s = WAKE_S if resident.wake_s is None else resident.wake_s
    frees = {index: max(0, count - resident.asleep_on.get(index, 0)) for index, count in resident.bytes_on.items()}
    if wake_s >= reload_s or not any(frees.values()):
        return (stop,)
    return Option(round(1e6 * (EVICT_S + weight * wake_s)), resident.id, True,
                  {**frees, HOST: -resident.host_bytes}), stop


def choose(missing: Mapping[int, int], count: int, residents: Iterable[Resident], host_left: int) -> Choice | None:
    """The cheapest way to have `count` devices miss nothing; None if there is none.

    `missing` are bytes by device, zero or less where it fits; of several devices that do then, the tightest fit is
    taken.  `host_left` is what sleepers may still take of the host's RAM.
    """
    every = [(resident, found) for resident in residents if (found := options(resident))]
    within = sum(resident.host_bytes for resident, found in every if found[0].sleeps) <= host_left
    asked = {index for index, lack in missing.items() if lack > 0}
    candidates = sorted(found for resident, found in every
                        if not asked.isdisjoint(resident.bytes_on) or not (within or resident.awake))
    if len(candidates) <= EXACT_CANDIDATES:
        chosen = _cheapest(candidates, missing, count, host_left)
    else:
        chosen = _greedy(candidates, missing, count, host_left)
    if chosen is None:
        return None
    left = _left(missing, chosen)
    fitting = sorted((-lack, index) for index, lack in left.items() if lack <= 0)[:count]
    devices = sorted(index for _, index in fitting)
    kept = _needed(chosen, {index: missing[index] for index in devices}, count, host_left)
    return Choice(tuple(devices), tuple(sorted(kept, key=lambda option: option.id)))


Candidates = Sequence[tuple[Option, ...]]


def _left(missing: Mapping[int, int], chosen: Iterable[Option]) -> dict[int, int]:
    left = dict(missing)
    for option in chosen:
        for index, count in option.frees.items():
            if index in left:
                left[index] -= count
    return left


def _host(chosen: Iterable[Option]) -> int:
    return sum(option.frees.get(HOST, 0) for option in chosen)


def _fits(missing: Mapping[int, int], chosen: Collection[Option], count: int, host_left: int) -> bool:
    taken = _host(chosen)
    return ((host_left + taken >= 0 or not any(option.sleeps for option in chosen))
            and sum(lack <= 0 for lack in _left(missing, chosen).values()) >= count)


def _needed(chosen: Collection[Option], missing: Mapping[int, int], count: int, host_left: int) -> list[Option]:
    """Without those that are not needed after all; the most expensive are tried first."""
    kept = sorted(chosen, reverse=True)
    for option in tuple(kept):
        rest = [other for other in kept if other is not option]
        if _fits(missing, rest, count, host_left):
            kept = rest
    return kept


def _cheapest(candidates: Candidates, missing: Mapping[int, int], count: int, host_left: int) -> list[Option] | None:
    """Branch and bound over everything that could be done; exact."""
    hopes: list[dict[int, int]] = [dict.fromkeys(missing, 0)]      # what candidates i.. could free at most
    for found in reversed(candidates):
        hope = dict(hopes[-1])
        for index, freed in found[-1].frees.items():               # a stop frees the most
            if index in hope:
                hope[index] += freed
        hopes.append(hope)
    hopes.reverse()
    best: list[Option] | None = None
    best_us = 0

    def visit(position: int, cost_us: int, chosen: list[Option]) -> None:
        nonlocal best, best_us
        left = _left(missing, chosen)
        if _fits(missing, chosen, count, host_left):
            best, best_us = chosen, cost_us
            return
        hope = hopes[position]
        if position == len(candidates) or sum(lack <= hope[index] for index, lack in left.items()) < count:
            return
        for option in candidates[position]:
            if best is None or cost_us + option.cost_us < best_us:
                visit(position + 1, cost_us + option.cost_us, [*chosen, option])
        visit(position + 1, cost_us, chosen)

    visit(0, 0, [])
    return best


# --- many candidates --------------------------------------------------------------------------------------------------

def _greedy(candidates: Candidates, missing: Mapping[int, int], count: int, host_left: int) -> list[Option] | None:
    """Device by device, each time the one that is cheapest to clear after what was decided already."""
    chosen: list[Option] = []
    left = dict(missing)
    fitting = {index for index, lack in left.items() if lack <= 0}
    on: dict[int, list[tuple[Option, ...]]] = {index: [] for index in missing}
    for found in candidates:
        for index in found[-1].frees:
            if index in on:
                on[index].append(found)
    bounds: dict[int, float | None] = {}
    while len(fitting) < count:
        taken = {option.id for option in chosen}
        host = host_left + _host(chosen)
        best: list[Option] | None = None
        for index in left:
            if index not in fitting and index not in bounds:
                on[index] = [found for found in on[index] if found[0].id not in taken]
                bounds[index] = _bound(_items(on[index], index), left[index])
        order = sorted((bound, index) for index, bound in bounds.items() if bound is not None)
        for bound, index in order:
            if best is not None and bound >= sum(option.cost_us for option in best):
                break
            cover = _cover(_items(on[index], index), index, left[index], host, best)
            best = best if cover is None else cover
        if best is None:
            return None
        chosen += best
        left = _left(missing, chosen)
        fitting = {index for index, lack in left.items() if lack <= 0}
        changed = {index for option in best for index in option.frees}
        bounds = {index: bound for index, bound in bounds.items() if index not in changed and index not in fitting}
    return _sleep_instead(chosen, candidates, missing, count, host_left)


class Item(NamedTuple):
    """A candidate as one device sees it: the least that a byte of it costs, and all that it could free there."""

    us_per_byte: float
    freed: int
    options: tuple[Option, ...]


def _items(candidates: Candidates, index: int) -> list[Item]:
    """The cheapest bytes first."""
    items = []
    for found in candidates:
        useful = tuple(option for option in found if option.frees.get(index, 0) > 0)
        if useful:
            rate = min(option.cost_us / option.frees[index] for option in useful)
            items.append(Item(rate, max(option.frees[index] for option in useful), useful))
    return sorted(items)


def _bound(items: Sequence[Item], lack: int, start: int = 0) -> float | None:
    """No set of these costs less, even if parts of victims could be taken; None: they do not suffice."""
    cost = 0.0
    for position in range(start, len(items)):
        item = items[position]
        if item.freed >= lack:
            return cost + lack * item.us_per_byte
        cost += item.freed * item.us_per_byte
        lack -= item.freed
    return None


def _cover(items: Sequence[Item], index: int, lack: int, host: int, best: list[Option] | None) -> list[Option] | None:
    """A set that frees `lack` bytes of one device and is cheaper than `best`; None where there is none.

    The first dive takes the cheapest bytes; the search then improves on it for NODES steps.
    """
    found: list[Option] | None = None
    limit = None if best is None else sum(option.cost_us for option in best)
    nodes = NODES

    def visit(position: int, cost_us: int, lack: int, host: int, chosen: list[Option]) -> None:
        nonlocal found, limit, nodes
        if lack <= 0:
            if limit is None or cost_us < limit:
                found, limit = chosen, cost_us
            return
        nodes -= 1
        if nodes < 0 and found is not None:
            return
        bound = _bound(items, lack, position)
        if bound is None or (limit is not None and cost_us + bound >= limit):
            return
        for option in items[position].options:
            spare = host + option.frees.get(HOST, 0)
            if not option.sleeps or spare >= 0:
                visit(position + 1, cost_us + option.cost_us, lack - option.frees[index], spare, [*chosen, option])
        visit(position + 1, cost_us, lack, host, chosen)

    visit(0, 0, lack, host, [])
    return found


def _sleep_instead(chosen: list[Option], candidates: Candidates, missing: Mapping[int, int], count: int,
                   host_left: int) -> list[Option]:
    """Let victims sleep that are to be stopped only for want of host RAM, where stopping older sleepers is cheaper."""
    sleepers = sorted(found[0] for found in candidates if found[0].frees.get(HOST, 0) > 0)
    by_id = {found[0].id: found[0] for found in candidates if found[0].sleeps}
    for victim in sorted(option for option in chosen if not option.sleeps and option.id in by_id):
        others = [option for option in chosen if option is not victim]
        plan = [*others, by_id[victim.id]]
        taken = {option.id for option in plan}
        for sleeper in sleepers:
            if host_left + _host(plan) < 0 and sleeper.id not in taken:
                plan.append(sleeper)
        if (_fits(missing, plan, count, host_left)
                and sum(option.cost_us for option in plan) < sum(option.cost_us for option in chosen)):
            chosen = plan
    return chosen
