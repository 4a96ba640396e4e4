"""Whose turn it is: the rules alone, then n models with room for one under all kinds of traffic, in simulated time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from errors import NoRoom
from gpu import Device
from instances import switching
from instances.footprint import Footprint
from instances.ledger import Limits, Resident
from instances.placement import Need, plan
from instances.switching import (
    LEAST_STAY_S,
    Waiter,
    give_up,
    longest_wait_s,
    may_go,
    order,
    residence_s,
    shortest_turn_s,
)

GIB = 1 << 30
HOLD_S = 30.0


def allowed(*, busy: bool, hold_s: float, idle_s: float = 0.0, contended_s: float = 0.0,
            reload_s: float | None = 20.0) -> bool:
    return may_go(busy=busy, hold_s=hold_s, idle_s=idle_s, reload_s=reload_s, contended_s=contended_s,
                  max_hold_s=HOLD_S)


@pytest.mark.parametrize(("hold_s", "contended_s", "goes"), [
    (29.9, 90, False), (30, 90, True), (900, 29.9, False), (900, 30, True), (900, 0, False)])
def test_a_holder_in_use_has_its_turn_from_when_it_is_ready_and_others_wait(
        hold_s: float, contended_s: float, goes: bool) -> None:
    assert allowed(busy=True, hold_s=hold_s, contended_s=contended_s) is goes


@pytest.mark.parametrize(("hold_s", "idle_s", "goes"), [
    (19.9, 0.1, False), (20, 0.1, True), (6, 4.9, False), (6, 5, True), (900, 300, True)])
def test_an_idle_holder_stays_as_long_as_its_load_took_if_it_is_still_asked(
        hold_s: float, idle_s: float, goes: bool) -> None:
    assert allowed(busy=False, hold_s=hold_s, idle_s=idle_s) is goes


def test_a_turn_is_never_longer_than_the_setting_nor_unknown() -> None:
    assert residence_s(300.0, HOLD_S) == HOLD_S and residence_s(3.0, HOLD_S) == 3.0
    assert residence_s(0.1, HOLD_S) == LEAST_STAY_S and residence_s(0.1, 0.0) == 0.0
    assert residence_s(None, HOLD_S) == HOLD_S and residence_s(None, 600.0) == 60.0
    assert allowed(busy=True, hold_s=0, contended_s=1) is False
    assert may_go(busy=True, hold_s=0, idle_s=0, reload_s=1, contended_s=1, max_hold_s=0)       # set to 0: at once


def test_the_longest_waiting_is_next() -> None:
    waiters = [Waiter("c", 1, 5.0), Waiter("b", 9, 5.0), Waiter("gone", 0, 99.0), Waiter("a", 2, 70.0)]
    assert order(waiters) == ("a", "b", "c", "gone")


def test_a_load_that_nobody_waits_for_is_given_up_in_its_first_half() -> None:
    assert give_up(waiting=0, elapsed_s=9, expected_s=20) and not give_up(waiting=0, elapsed_s=10, expected_s=20)
    assert not give_up(waiting=1, elapsed_s=0, expected_s=20) and give_up(waiting=0, elapsed_s=29, expected_s=None)


# --- n models, room for one -------------------------------------------------------------------------------------------

DEVICE = Device(0, "GPU-0", "H200", "cuda", 10 * GIB, 0, 10 * GIB)


@dataclass
class Client:
    """Asks for its models in turn: each request is served for so many seconds, then it thinks for as many others."""

    models: Sequence[int]
    serve_s: int
    think_s: int
    starts_at: int
    sent: int = 0


@dataclass
class Box:
    """One device, room for one model; a tick is a second.  The daemon's part in the least number of lines."""

    models: int
    load_s: int
    hold_s: int
    holder: int | None = None
    ready_at: int | None = None         # None: nothing is loaded; in the future: it loads
    drains: bool = False
    idle_since: int = 0
    leases: list[tuple[int, Client]] = field(default_factory=list)      # (ends at, whose)
    queues: dict[int, list[tuple[int, Client]]] = field(default_factory=dict)   # (since, whose)
    waits: list[int] = field(default_factory=list)
    turns: list[int] = field(default_factory=list)
    switches: int = 0

    def tick(self, now: int, arrivals: Sequence[Client]) -> list[Client]:
        """Clients whose request ended."""
        for client in arrivals:
            self.queues.setdefault(client.models[client.sent % len(client.models)], []).append((now, client))
        ended = [client for until, client in self.leases if until <= now]
        if ended:
            self.idle_since = now
        self.leases = [(until, client) for until, client in self.leases if until > now]
        if self.drains and not self.leases:
            self.turns.append(now - (self.ready_at or 0))
            self.holder, self.drains = None, False
        self._grant(now)
        self._switch(now)
        return ended

    def _grant(self, now: int) -> None:
        if self.holder is None or self.drains or self.ready_at is None or self.ready_at > now:
            return
        if self.ready_at == now:
            self.idle_since = now
        for since, client in self.queues.pop(self.holder, []):
            self.waits.append(now - since)
            self.leases.append((now + client.serve_s, client))

    def _switch(self, now: int) -> None:
        waiting = [Waiter(str(model), len(queue), now - queue[0][0]) for model, queue in self.queues.items()
                   if queue and (model != self.holder or self.drains)]
        if not waiting or self.drains or (self.holder is not None and (self.ready_at or 0) > now):
            return
        contended = max((each.longest_s for each in waiting), default=0.0)
        following = int(order(waiting)[0])
        resident = [] if self.holder is None else [self._resident(now, contended)]
        try:
            found = plan(Need("next", Footprint(8 * GIB)), [DEVICE], resident, Limits())
        except NoRoom:
            return
        if found.stop:
            self.drains = True
            if not self.leases:
                self.turns.append(now - (self.ready_at or 0))
                self.holder, self.drains = None, False
        if self.holder is None:
            self.holder, self.ready_at, self.switches = following, now + self.load_s, self.switches + 1

    def _resident(self, now: int, contended_s: float) -> Resident:
        assert self.ready_at is not None
        busy, idle_s = bool(self.leases), float(now - self.idle_since)
        return Resident("holder", "holder", {0: 8 * GIB}, held_on={}, busy=busy, idle_s=idle_s, reload_s=self.load_s,
                        may_go=may_go(busy=busy, hold_s=now - self.ready_at, idle_s=idle_s, reload_s=self.load_s,
                                      contended_s=contended_s, max_hold_s=self.hold_s))


def run(box: Box, clients: Sequence[Client], until_s: int) -> None:
    due: dict[int, list[Client]] = {}
    for client in clients:
        due.setdefault(client.starts_at, []).append(client)
    for now in range(until_s):
        for client in box.tick(now, due.pop(now, [])):
            client.sent += 1
            due.setdefault(now + 1 + client.think_s, []).append(client)
    for queue in box.queues.values():        # who waits still has not waited too long either
        box.waits.extend(until_s - since for since, _ in queue)


CLIENTS = st.builds(Client, st.lists(st.integers(0, 3), min_size=1, max_size=4), serve_s=st.integers(1, 8),
                    think_s=st.integers(0, 12), starts_at=st.integers(0, 40))


@given(st.lists(CLIENTS, min_size=1, max_size=8), st.integers(2, 4), st.integers(0, 12), st.integers(0, 15))
def test_nobody_waits_longer_than_the_bound_and_nobody_thrashes(
        clients: list[Client], models: int, load_s: int, hold_s: int) -> None:
    clients = [Client([model % models for model in each.models], each.serve_s, each.think_s, each.starts_at)
               for each in clients]
    box = Box(models, load_s, hold_s)
    run(box, clients, 400)
    drain_s = max(client.serve_s for client in clients)
    late_s = 2 * models         # a tick for each decision, and one for each end
    assert max(box.waits) <= longest_wait_s(models, max_hold_s=hold_s, drain_s=drain_s, load_s=load_s) + late_s
    assert all(turn >= shortest_turn_s(load_s, hold_s) for turn in box.turns)
    assert box.switches <= 1 + 400 / max(1, load_s + shortest_turn_s(load_s, hold_s))


def test_the_bound_is_not_much_too_large() -> None:
    """Three models that are always in use: each waits for two others' turns, and that is what the bound says."""
    clients = [Client([model], 4, 0, 0) for model in (0, 1, 2) for _ in range(2)]
    box = Box(3, 10, 15)
    run(box, clients, 2000)
    bound = longest_wait_s(3, max_hold_s=15, drain_s=4, load_s=10)
    assert 0.7 * bound < max(box.waits) <= bound + 6


def test_two_agents_on_two_models_do_not_thrash() -> None:
    """Each asks again after 2 s.  With a switch for each request both would do nothing but load, 10 s a time."""
    box = Box(2, 10, 30)
    run(box, [Client([0], 1, 2, 0), Client([1], 1, 2, 0)], 2000)
    assert box.switches <= 2000 / (10 + 10) and len(box.waits) > 3 * box.switches


def test_one_client_that_takes_turns_is_served_without_waiting_for_nothing() -> None:
    """Models 0, 1, 0, 1: each request loads, and is followed after a short look whether more of the kind come."""
    box = Box(2, 12, 30)
    run(box, [Client([0, 1], 1, 0, 0)], 1000)
    assert max(box.waits) <= 12 + 12 * switching.IDLE_SHARE + 1
