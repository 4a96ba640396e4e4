"""Whom to put to sleep or to stop so that something fits: the cheapest set that makes room.  Pure.

What an eviction costs is told in seconds: those that it takes (EVICT_S), and those that coming back takes, weighed by
how soon that is to be expected.  Who was wanted t seconds ago is taken to be wanted about once in t seconds; so the
least recently used goes first, one that loads slowly stays longer, and each step of priority doubles the weight.  Fewer
victims are cheaper than more of the same kind, yet two small ones that nobody used for hours go before a large one that
is in use every minute.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from instances.ledger import Resident

EVICT_S = 1.0               # the requests that make it go wait so much longer: a drain, SIGTERM, memory that settles
WINDOW_S = 60.0             # the time for which coming back is weighed
RELOAD_S = 60.0             # where nothing was measured yet
WAKE_S = 5.0
MOST_STEPS = 40             # of priority, either way: the figures stay figures
EXACT_CANDIDATES = 7        # of so many the cheapest set is found for certain: 3 ** 7 of them
STEPS = 3 ** (EXACT_CANDIDATES + 1) // 2
SEARCHED_CANDIDATES = 14    # of so many it is looked for among all sets, with the same number of steps
REFINED_DEVICES = 3         # of more, for these devices only: the cheapest by the first guess
NODES = 120                 # with so many steps
MOST_REVISED = 12           # victims: of more none is looked at once more


class Option(NamedTuple):
    """One thing to do with one resident."""

    cost_us: int
    id: str
    sleeps: bool
    resident: Resident

    def frees(self, index: int) -> int:
        """Bytes of a device."""
        held = self.resident.bytes_on.get(index, 0)
        return max(0, held - self.resident.asleep_on.get(index, 0)) if self.sleeps else held

    @property
    def host_bytes(self) -> int:
        """Of the host's RAM; what it takes for its sleep is negative."""
        if self.sleeps:
            return -self.resident.host_bytes
        return 0 if self.resident.awake else self.resident.host_bytes


@dataclass(frozen=True)
class Choice:
    """Which devices fit then, and what has to be done for it; in no case more than that."""

    devices: tuple[int, ...]
    options: tuple[Option, ...] = ()

    @property
    def cost_us(self) -> int:
        return _cost(self.options)


def options(resident: Resident) -> tuple[Option, ...]:
    """What may be done with it, the cheapest first; nothing with one that is busy, pinned or leaves anyway."""
    if not resident.evictable:
        return ()
    stop_us, sleep_us = _weigh(resident)
    stop = Option(stop_us, resident.id, False, resident)
    return (Option(sleep_us, resident.id, True, resident), stop) if sleep_us else (stop,)


def _weigh(resident: Resident) -> tuple[int, int]:
    """The cost of a stop, and that of sleep; 0 where it cannot sleep, or sleep is of no use."""
    idle_s = resident.idle_s
    weight = WINDOW_S / (1.0 + idle_s) if idle_s > 0 else WINDOW_S
    if resident.priority:
        weight *= 2.0 ** max(-MOST_STEPS, min(resident.priority, MOST_STEPS))
    reload_s = RELOAD_S if resident.reload_s is None else resident.reload_s
    stop_us = int(1e6 * (EVICT_S + weight * reload_s))
    if resident.awake and resident.can_sleep:
        wake_s = WAKE_S if resident.wake_s is None else resident.wake_s
        if wake_s < reload_s:
            for index, held in resident.bytes_on.items():
                if resident.asleep_on.get(index, 0) < held:
                    return stop_us, int(1e6 * (EVICT_S + weight * wake_s))
    return stop_us, 0


def choose(missing: Mapping[int, int], count: int, residents: Iterable[Resident], host_left: int) -> Choice | None:
    """The cheapest way to have `count` devices miss nothing; None if there is none.

    `missing` are bytes by device, zero or less where it fits; of several devices that do then, the tightest fit is
    taken.  `host_left` is what sleepers may still take of the host's RAM.
    """
    field = _survey(residents, missing)
    clearable = {index: lack for index, lack in missing.items() if field.hope.get(index, 0) >= lack}
    if len(clearable) < count:
        return None
    chosen = _greedy(field, clearable, count, host_left)
    candidates = field.few_candidates(beyond=host_left < field.wish_bytes)
    if candidates is not None:
        chosen = _cheapest(candidates, clearable, count, host_left, chosen)
    fitting = sorted((-lack, index) for index, lack in _left(missing, chosen).items() if lack <= 0)[:count]
    devices = sorted(index for _, index in fitting)
    kept = _stop_instead(chosen, {index: missing[index] for index in devices}, host_left)
    return Choice(tuple(devices), tuple(sorted(kept, key=lambda option: option.id)))


# A candidate as one device sees it: what a byte of it costs at least, what it frees there stopped and asleep, the costs
# of both (0: it cannot sleep), and who it is.  A plain tuple, for there are as many as models.
Item = tuple[float, int, int, int, int, str, Resident]
ID = 5


@dataclass(frozen=True)
class Field:
    """Everybody who might go, gathered in one pass: there may be a thousand."""

    items: Mapping[int, list[Item]]     # by device that misses something
    hope: Mapping[int, int]             # what all of them together could free there
    sleepers: Sequence[Option]          # the end of those who hold the host's RAM, wherever they are
    wish_bytes: int                     # what they would take of the host's RAM if all went to sleep

    def few_candidates(self, *, beyond: bool) -> list[Resident] | None:
        """Those on devices that miss something, `beyond` also those who could give the host's RAM; None: many."""
        found: dict[str, Resident] = {option.id: option.resident for option in self.sleepers if beyond}
        for here in self.items.values():
            for _, _, _, _, _, name, resident in here:
                found[name] = resident
            if len(found) > SEARCHED_CANDIDATES:
                return None
        return list(found.values())


def _survey(residents: Iterable[Resident], missing: Mapping[int, int]) -> Field:
    items: dict[int, list[Item]] = {index: [] for index, lack in missing.items() if lack > 0}
    hope = dict.fromkeys(items, 0)
    sleepers, wish = [], 0
    for resident in residents:
        if not resident.evictable:
            continue
        stop_us, sleep_us = _weigh(resident)
        if resident.host_bytes:
            if sleep_us:
                wish += resident.host_bytes
            elif not resident.awake:
                sleepers.append(Option(stop_us, resident.id, False, resident))
        for index, held in resident.bytes_on.items():
            if held > 0 and index in items:
                rate, asleep = stop_us / held, 0
                if sleep_us and (asleep := max(0, held - resident.asleep_on.get(index, 0))):
                    rate = min(rate, sleep_us / asleep)
                items[index].append((rate, held, asleep, stop_us, sleep_us, resident.id, resident))
                hope[index] += held
    return Field(items, hope, sleepers, wish)


def _cost(chosen: Iterable[Option]) -> int:
    return sum(option.cost_us for option in chosen)


def _hope(candidates: Iterable[Resident], missing: Mapping[int, int]) -> dict[int, int]:
    """What all of them together could free."""
    hope = dict.fromkeys(missing, 0)
    for resident in candidates:
        for index, held in resident.bytes_on.items():
            if index in hope:
                hope[index] += held
    return hope


def _left(missing: Mapping[int, int], chosen: Iterable[Option]) -> dict[int, int]:
    left = dict(missing)
    for option in chosen:
        for index in option.resident.bytes_on:
            if index in left:
                left[index] -= option.frees(index)
    return left


def _host(chosen: Iterable[Option]) -> int:
    return sum(option.host_bytes for option in chosen)


def _fits(missing: Mapping[int, int], chosen: Collection[Option], count: int, host_left: int) -> bool:
    return ((host_left + _host(chosen) >= 0 or not any(option.sleeps for option in chosen))
            and sum(lack <= 0 for lack in _left(missing, chosen).values()) >= count)


def _needed(chosen: Sequence[Option], missing: Mapping[int, int], host_left: int) -> list[Option]:
    """Without those that are not needed after all to clear these devices; the most expensive are tried first."""
    left, host = _left(missing, chosen), host_left + _host(chosen)
    sleeping = sum(option.sleeps for option in chosen)
    kept = []
    for option in sorted(chosen, reverse=True):
        others = sleeping - option.sleeps
        devices = [index for index in option.resident.bytes_on if index in left]
        if (all(left[index] + option.frees(index) <= 0 for index in devices)
                and (not others or host - option.host_bytes >= 0)):
            left.update((index, left[index] + option.frees(index)) for index in devices)
            host, sleeping = host - option.host_bytes, others
        else:
            kept.append(option)
    return kept


def _stop_instead(chosen: Sequence[Option], missing: Mapping[int, int], host_left: int) -> list[Option]:
    """What is needed of them; where a stop in place of a sleep spares others, that."""
    kept = _needed(chosen, missing, host_left)
    for option in [option for option in kept if option.sleeps and len(kept) <= MOST_REVISED]:
        if option in kept:
            others = [other for other in kept if other is not option]
            plan = _needed([*others, options(option.resident)[-1]], missing, host_left)
            kept = plan if _cost(plan) < _cost(kept) else kept
    return kept


def _cheapest(candidates: Iterable[Resident], missing: Mapping[int, int], count: int, host_left: int,
              guess: list[Option]) -> list[Option]:
    """Branch and bound over everything that could be done, for STEPS steps: exact for EXACT_CANDIDATES."""
    lacking = {index: lack for index, lack in missing.items() if lack > 0}
    count -= len(missing) - len(lacking)
    every = sorted(map(options, candidates))
    ways = [[(option, tuple(map(option.frees, lacking)), option.host_bytes) for option in found] for found in every]
    hopes = [tuple(_hope([found[0].resident for found in every[position:]], lacking).values())
             for position in range(len(every) + 1)]
    best, best_us, steps = guess, _cost(guess), STEPS

    def visit(position: int, cost_us: int, left: tuple[int, ...], host: int, chosen: tuple[Option, ...]) -> None:
        """Only reached with a cost below the best."""
        nonlocal best, best_us, steps
        steps -= 1
        if (sum(lack <= 0 for lack in left) >= count
                and (host >= 0 or not any(option.sleeps for option in chosen))):
            best, best_us = list(chosen), cost_us
            return
        if steps < 0 or position == len(ways) or sum(map(int.__le__, left, hopes[position])) < count:
            return
        for option, freed, host_bytes in ways[position]:
            if cost_us + option.cost_us < best_us:
                visit(position + 1, cost_us + option.cost_us, tuple(map(int.__sub__, left, freed)), host + host_bytes,
                      (*chosen, option))
        visit(position + 1, cost_us, left, host, chosen)

    visit(0, 0, tuple(lacking.values()), host_left, ())
    return best


# --- many candidates --------------------------------------------------------------------------------------------------

class Guess(NamedTuple):
    """A way to clear one device, and what it takes of the host's RAM (negative: gives)."""

    cost_us: int
    takes_bytes: int
    options: list[Option]


def _greedy(field: Field, missing: Mapping[int, int], count: int, host_left: int) -> list[Option]:
    """Device by device, each time the one that is cheapest to clear after what was decided already."""
    chosen: list[Option] = []
    left = dict(missing)
    items = {index: sorted(field.items[index]) for index, lack in missing.items() if lack > 0}
    guesses: dict[int, Guess | None] = {}
    search = Search(NODES)
    while sum(lack <= 0 for lack in left.values()) < count:
        host = host_left + _host(chosen)
        best = min((search.cover(items[index], left[index], host, guess)
                    for index, guess in _cheapest_guesses(items, left, host, guesses)),
                   key=lambda guess: guess.cost_us, default=Guess(0, 0, []))
        if best.options:
            chosen += best.options
        else:       # some would sleep, and that is not enough
            assert any(option.sleeps for option in chosen)
            chosen = [options(option.resident)[-1] for option in chosen]
        left = _left(missing, chosen)
        gone = {option.id for option in best.options}
        for index in {index for option in best.options or chosen for index in option.resident.bytes_on} & items.keys():
            items[index] = [item for item in items[index] if item[ID] not in gone]
            guesses.pop(index, None)
        if (spare := host_left + _host(chosen)) < host:     # what others would do may not hold any more
            guesses = {index: guess for index, guess in guesses.items() if guess is None or guess.takes_bytes <= spare}
    return _sleep_instead(chosen, field, missing, count, host_left)


def _cheapest_guesses(items: Mapping[int, list[Item]], left: Mapping[int, int], host: int,
                      guesses: dict[int, Guess | None]) -> list[tuple[int, Guess]]:
    """The REFINED_DEVICES that are cheapest to clear; guesses are made in `guesses`, where they are not yet.

    None is made for a device whose cheapest byte is so expensive that it cannot be one of them.
    """
    at_least = sorted((here[0][0] * left[index], index) for index, here in items.items() if left[index] > 0 and here)
    ranked: list[tuple[int, int, int]] = []
    for least_us, index in at_least:
        if len(ranked) >= REFINED_DEVICES and least_us >= ranked[REFINED_DEVICES - 1][0]:
            break
        if index not in guesses:
            guesses[index] = _guess(items[index], left[index], host)
        if (guess := guesses[index]) is not None:
            insort(ranked, (guess.cost_us, left[index], index))
    return [(index, guess) for _, _, index in ranked[:REFINED_DEVICES] if (guess := guesses[index]) is not None]


def _guess(items: Iterable[Item], lack: int, host: int) -> Guess | None:
    """The cheapest bytes until it is enough, without those that were not needed in the end; None if it never is."""
    taken: list[tuple[int, int, str, bool, Resident]] = []
    for _, freed, asleep, stop_us, sleep_us, name, resident in items:
        if asleep and host >= resident.host_bytes:
            host -= resident.host_bytes
            taken.append((sleep_us, asleep, name, True, resident))
            lack -= asleep
        else:
            taken.append((stop_us, freed, name, False, resident))
            lack -= freed
        if lack <= 0:
            break
    if lack > 0:        # some would sleep, and that is not enough: all of them have to go
        every = list(items)
        lack += sum(freed for _, freed, *_ in taken) - sum(item[1] for item in every)
        if lack > 0:
            return None
        taken = [(stop_us, freed, name, False, resident) for _, freed, _, stop_us, _, name, resident in every]
    taken.sort(reverse=True)
    kept = []
    for cost_us, freed, name, sleeps, resident in taken:
        if lack + freed <= 0:
            lack += freed
        else:
            kept.append(Option(cost_us, name, sleeps, resident))
    return Guess(_cost(kept), -_host(kept), kept)


class Search:
    """Looks for something cheaper than a guess, for a number of steps in all."""

    def __init__(self, nodes: int) -> None:
        self._nodes = nodes

    def cover(self, items: Sequence[Item], lack: int, host: int, guess: Guess) -> Guess:
        """The cheapest set found that frees `lack` bytes of one device."""
        best, limit = guess.options, guess.cost_us

        def visit(position: int, cost_us: int, lack: int, host: int, chosen: tuple[Option, ...]) -> None:
            nonlocal best, limit
            if lack <= 0:
                if cost_us < limit:
                    best, limit = list(chosen), cost_us
                return
            if self._nodes <= 0 or not _promising(items, position, lack, limit - cost_us):
                return
            self._nodes -= 1
            _, freed, asleep, stop_us, sleep_us, name, resident = items[position]
            if asleep and (spare := host - resident.host_bytes) >= 0:
                visit(position + 1, cost_us + sleep_us, lack - asleep, spare,
                      (*chosen, Option(sleep_us, name, True, resident)))
            back = 0 if resident.awake else resident.host_bytes
            visit(position + 1, cost_us + stop_us, lack - freed, host + back,
                  (*chosen, Option(stop_us, name, False, resident)))
            visit(position + 1, cost_us, lack, host, chosen)

        visit(0, 0, lack, host, ())
        return guess if best is guess.options else Guess(limit, -_host(best), best)


def _promising(items: Sequence[Item], start: int, lack: int, below_us: float) -> bool:
    """Whether items from `start` on might free this for less, if parts of victims could be taken."""
    for position in range(start, len(items)):
        rate, freed = items[position][:2]
        if freed >= lack:
            return lack * rate < below_us
        below_us -= freed * rate
        lack -= freed
        if below_us <= 0:
            return False
    return False


def _sleep_instead(chosen: list[Option], field: Field, missing: Mapping[int, int], count: int,
                   host_left: int) -> list[Option]:
    """Let victims sleep that are to be stopped only for want of host RAM, where stopping older sleepers is cheaper."""
    spare = host_left + _host(chosen)
    most = spare + sum(each.resident.host_bytes for each in field.sleepers)
    victims = [(option, found[0]) for option in sorted(chosen) if not option.sleeps
               and len(found := options(option.resident)) > 1 and option.resident.host_bytes <= most]
    saves_us = max((victim.cost_us - asleep.cost_us for victim, asleep in victims), default=0)
    sleepers = sorted(each for each in field.sleepers if each.cost_us < saves_us)      # no other one is worth it
    for victim, asleep in victims:
        short, saved_us = asleep.resident.host_bytes - spare, victim.cost_us - asleep.cost_us
        gone = {option.id for option in chosen}
        plan = [*(option for option in chosen if option is not victim), asleep]
        for sleeper in sleepers:
            if short <= 0 or saved_us <= 0:
                break
            if sleeper.id not in gone:
                plan.append(sleeper)
                short -= sleeper.resident.host_bytes
                saved_us -= sleeper.cost_us
        if short <= 0 < saved_us and _fits(missing, plan, count, host_left):
            chosen, spare = plan, host_left + _host(plan)
    return chosen
