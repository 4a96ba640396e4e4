"""More and fewer replicas of a model of the catalog, as its load is: what `scaling` decides is done here.

Whatever is added for load takes room that is free and nobody else waits for; nobody goes for it.  Instances that were
made with `new` are their maker's: they are not counted and not stopped.
"""

from __future__ import annotations

import logging
import time
from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from config import ModelConfig
from errors import DaemonError
from instances import scaling
from instances.demand import FAILED_FOR_S, Demand
from instances.instance import ACTIVE, Haste, Instance, State
from instances.scaling import Change, Decision, Look, Rule
from instances.specs import entry_changed, spec_of

log = logging.getLogger("vllm_server.manager")

_COMING = (State.STARTING, State.WAKING, State.BACKOFF)
_ASLEEP = (State.FALLING_ASLEEP, State.SLEEPING)


class EngineLoad(NamedTuple):
    """What an instance has to do: what its engine said last, and what the daemon sent since."""

    running: float
    waiting: float
    capacity: float


@dataclass(frozen=True)
class ReplicasView:
    """Of one entry, for readers."""

    wanted: int
    running: int            # those that serve or will, without those asleep
    because: str


@dataclass
class _Memory:
    """What is known of one entry from one look to the next."""

    looks: tuple[Look, ...] = ()
    full_at: float | None = None
    decision: Decision = Decision(Change.STAY, 0, "it is not loaded")


class Replicas(Demand):
    """Thread-safe, on the registry's lock."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic, wall: Callable[[], float] = time.time) -> None:
        super().__init__(clock=clock, wall=wall)
        self._memories: dict[str, _Memory] = {}

    @abstractmethod
    def why_no_room(self, instance: Instance) -> str | None:
        """Why there is no free room for one like this, or None; takes the lock itself, and reads devices."""

    # --- readers --------------------------------------------------------------------------------------------------

    def scaled(self) -> frozenset[str]:
        """Ids of the instances whose load decides how many there are of them."""
        with self._changed:
            return frozenset(one.id for entry in self._scaled_entries() for one in self._serving(entry))

    def replicas(self) -> Mapping[str, ReplicasView]:
        """How many there are to be of each entry that may grow, and why."""
        with self._changed:
            found = {}
            for entry in self._scaled_entries():
                own, memory = self._own(entry), self._memories.get(entry.id, _Memory())
                awake = sum(one.state not in _ASLEEP for one in own)
                found[entry.id] = ReplicasView(memory.decision.wanted, awake, memory.decision.because)
            return found

    # --- one round ------------------------------------------------------------------------------------------------

    def scale(self, now: float, loads: Mapping[str, EngineLoad]) -> None:
        """Look at each model that may grow, and add or end one replica where that is called for.

        `loads` are those of the `scaled` ones.  Called by one thread only; blocks for as long as devices take to read.
        """
        growing: list[ModelConfig] = []
        with self._changed:
            if self._closing:
                return
            entries = self._scaled_entries()
            self._memories = {entry.id: self._memories.get(entry.id, _Memory()) for entry in entries}
            for entry in entries:
                decision = self._decide(entry, now, loads)
                if decision.change is Change.GROW:
                    growing.append(entry)
                elif decision.change is Change.SHRINK:
                    self._shrink(entry, decision)
        for entry in growing:
            self._grow(entry)

    def _decide(self, entry: ModelConfig, now: float, loads: Mapping[str, EngineLoad]) -> Decision:
        """Caller holds the lock."""
        memory, rule = self._memories[entry.id], self._rule(entry)
        look = self._look(entry, now, loads)
        memory.looks = scaling.remembered(memory.looks, look, rule)
        decision = scaling.decide(memory.looks, look, rule, full_at=memory.full_at)
        if decision.change is Change.GROW and (why := self._hindrance(entry, now)) is not None:
            decision = scaling.decide(memory.looks, look, rule, full_at=memory.full_at, hindered=why)
        if decision.change is Change.GROW:
            memory.full_at = scaling.places_in_use(memory.looks) or memory.full_at
        memory.decision = decision
        return decision

    def _grow(self, entry: ModelConfig) -> None:
        """Wake one that sleeps, else make one more, if there is free room for it."""
        with self._changed:
            sleeper = next((one for one in self._own(entry) if one.state is State.SLEEPING), None)
            example = sleeper or Instance(id="", spec=spec_of(self.settings, entry), created_at=0.0, log_path="",
                                          last_used=self.clock(), seated=False)
        why_not = self.why_no_room(example)
        with self._changed:
            memory = self._memories[entry.id]
            decision, made = memory.decision, []
            if why_not is not None:
                memory.decision = Decision(Change.STAY, decision.wanted - 1, f"{decision.because}; {why_not}")
                return
            if self._closing or self._entry_of(example) != entry:
                return      # things have changed: the next round sees them
            if sleeper is None:
                made = [self._add(example.spec, frozenset())]
                made[0].seated, made[0].grown = False, True
                self._counters["loads"] += 1
            elif sleeper.state is State.SLEEPING:
                sleeper.modest, sleeper.wake_wanted = True, True
                self._begin_wake(sleeper, f"one more is wanted: {decision.because}")
            self._counters["replicas_added"] += 1
            memory.looks = ()
            log.info("%s: one more replica, %d in all (%s)", entry.id, decision.wanted, decision.because)
        try:
            self._begin_all(made)
        except DaemonError as error:
            log.error("%s gets no further replica: %s", entry.id, error.message)

    def _shrink(self, entry: ModelConfig, decision: Decision) -> None:
        """End the one with the fewest requests, the youngest of these; it finishes what it has.  Caller holds the
        lock."""
        victim = min((one for one in self._own(entry) if one.state not in _ASLEEP),
                     key=lambda one: (len(one.leases), -one.created_at))
        self._counters["replicas_removed"] += 1
        self._memories[entry.id].looks = ()
        self._begin_stop(victim, Haste.PATIENT, f"one replica fewer is needed: {decision.because}")
        log.info("%s: one replica fewer, %d in all (%s)", entry.id, decision.wanted, decision.because)

    # --- inside; the caller holds the lock ------------------------------------------------------------------------

    def _scaled_entries(self) -> tuple[ModelConfig, ...]:
        return self.settings.catalog.with_replicas

    def _own(self, entry: ModelConfig) -> list[Instance]:
        """The entry's active instances that are not somebody's own."""
        return [one for one in self._by_name.get(entry.id, ())
                if one.spec.config_id == entry.id and not one.apart and one.state in ACTIVE]

    def _serving(self, entry: ModelConfig) -> list[Instance]:
        """All that answer to its name now."""
        return [one for one in self._by_name.get(entry.id, ()) if one.state is State.READY]

    def _rule(self, entry: ModelConfig) -> Rule:
        settings = self.settings
        return Rule(*entry.replicas, grow_waiting=settings.replicas_grow_waiting,
                    grow_s=settings.replicas_grow_s, shrink_s=settings.replicas_shrink_s)

    def _look(self, entry: ModelConfig, now: float, loads: Mapping[str, EngineLoad]) -> Look:
        own, serving = self._own(entry), self._serving(entry)
        known = [loads[one.id] for one in serving if one.id in loads]
        queued = sum(len(self._lines.get(name, ())) for name in entry.served_names)
        return Look(
            at=now, replicas=sum(one.state not in _ASLEEP for one in own), serving=len(serving),
            coming=sum(one.state in _COMING for one in own), asleep=sum(one.state in _ASLEEP for one in own),
            waiting=sum(one.waiting for one in known) + queued, running=sum(one.running for one in known),
            places=sum(one.capacity for one in known) or 1.0)

    def _hindrance(self, entry: ModelConfig, now: float) -> str | None:
        """Why there cannot be one more, as far as that is known without looking at the devices."""
        if any(seeker.instance.spec.config_id != entry.id for seeker in self._seekers(now)):
            return "others wait for room"
        wanted = spec_of(self.settings, entry)
        found = self._by_name.get(entry.id, ())
        if any(one.outdated and one.state in ACTIVE for one in found):
            return "its configuration has changed, and those that run are to be replaced first"
        for one in found:
            problem = one.last_error
            if one.state is State.FAILED and problem is not None and not entry_changed(one.spec, wanted) and (
                    problem.permanent or now - one.changed_at < FAILED_FOR_S):
                return f"the last start failed: {problem.message}"
        return None
