"""Finds room for who seeks it: reads the devices, plans, and has the registry promise what was planned.

Keepers of those that seek call `arrange` from their ticks; one call serves all who seek, in their order.  Reading and
planning happen outside the registry's lock, promising under it.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace

from errors import NoRoom
from gpu import Device
from instances import eviction, placement
from instances.instance import Instance, State
from instances.ledger import Limits, Resident
from instances.placement import Need, Plan
from instances.resources import Resources
from instances.rooms import Rooms, Seeker, Survey

log = logging.getLogger("vllm_server.instances")

MOST_TRIED = 16         # seekers that are planned for in one go; the others come later anyway
PAUSE_S = 0.1           # between two rounds in which nothing has changed


@dataclass(frozen=True)
class Refusal:
    """`hopeless`: not even if all that are in use, and may be taken some time, were gone."""

    error: NoRoom
    hopeless: bool


@dataclass(frozen=True)
class PlanReport:
    """What a load would do, without doing it.  `sleep` and `stop` are ids of those who would go for it."""

    fits: bool
    devices: tuple[int, ...]
    bytes_per_device: int | None
    source: str                         # where the bytes come from (footprint.Source)
    sleep: tuple[str, ...]
    stop: tuple[str, ...]
    seconds_expected: float | None      # by earlier starts or wakes; None: there were none
    because: str


class Arranger:
    """Thread-safe; blocks for as long as the driver and the model's files do."""

    def __init__(self, rooms: Rooms, resources: Resources) -> None:
        self._rooms = rooms
        self._resources = resources
        self._one_at_a_time = threading.Lock()
        self._needs: dict[str, tuple[float, Need]] = {}
        self._seen = (-1, float("-inf"))        # epoch and time of the last round that changed nothing

    def arrange(self, now: float) -> None:
        with self._one_at_a_time:
            epoch, at = self._seen
            if epoch == self._rooms.epoch and now - at < PAUSE_S:
                return
            while self._serve_one(now):
                pass
            self._seen = (self._rooms.epoch, now)

    def report(self, instance: Instance, now: float, *, may_evict: bool = True) -> PlanReport:
        """For one that is there, or that might be.  Nothing is promised."""
        if instance.grant is not None:
            return PlanReport(True, instance.devices, instance.memory_planned_bytes, "running", (), (), 0.0,
                              instance.because)
        state = State.WAKING if instance.state in (State.SLEEPING, State.WAKING) else State.STARTING
        seeker = Seeker(instance, state, since=now, count=1, modest=False)
        need, settings = self._resources.need(instance, now, state), self._resources.settings
        reading = self._resources.read(now)
        survey = self._rooms.survey(reading, max_hold_s=settings.max_hold_s, max_instances=settings.max_instances)
        found = decide(seeker, need, reading.devices, survey, self._resources.limits(now), may_evict=may_evict)
        entry = self._resources.known(instance.spec, now)
        seconds = None if entry is None else entry.median_wake_s if state is State.WAKING else entry.reload_s
        if isinstance(found, Refusal):
            return PlanReport(False, (), need.footprint.bytes_per_device, need.footprint.source, (), (), seconds,
                              found.error.message)
        return PlanReport(True, found.devices, found.bytes_per_device, need.footprint.source, found.sleep, found.stop,
                          seconds, found.because)

    def _serve_one(self, now: float) -> bool:
        """Whether another round may find room for somebody else."""
        seekers = self._rooms.seekers()
        self._needs = {one.instance.id: self._needs[one.instance.id] for one in seekers
                       if one.instance.id in self._needs}
        if not seekers:
            return False
        needs = {one.instance.id: self._need(one, now) for one in seekers[:MOST_TRIED]}
        settings = self._resources.settings
        reading = self._resources.read(now)
        survey = self._rooms.survey(reading, max_hold_s=settings.max_hold_s, max_instances=settings.max_instances)
        limits = self._resources.limits(now)
        first = True
        for seeker in survey.seekers[:MOST_TRIED]:
            need = needs.get(seeker.instance.id)
            if need is None:        # it came after the others were counted
                return True
            found = decide(seeker, need, reading.devices, survey, limits, may_evict=first and not seeker.modest)
            if isinstance(found, Plan):
                return self._promise(seeker, found, survey)
            if first or found.hopeless:
                self._rooms.no_room(seeker, found.error, hopeless=found.hopeless)
            first = first and found.hopeless      # who waits for others to end keeps its place before the next ones
        return False

    def _promise(self, seeker: Seeker, plan: Plan, survey: Survey) -> bool:
        if self._rooms.grant(seeker, plan, survey):
            one = seeker.instance
            log.info("%s (%s): devices %s (%s)", one.id, one.spec.model, list(plan.devices), plan.because)
        return True

    def _need(self, seeker: Seeker, now: float) -> Need:
        """Reckoned once for each search: it looks at the model's files."""
        one = seeker.instance
        known = self._needs.get(one.id)
        if known is None or known[0] != one.wanted_at:
            known = one.wanted_at, self._resources.need(one, now, seeker.state)
            self._needs[one.id] = known
        return known[1]


# --- pure -------------------------------------------------------------------------------------------------------------

def decide(seeker: Seeker, need: Need, devices: Sequence[Device], survey: Survey, limits: Limits, *,
           may_evict: bool) -> Plan | Refusal:
    """A plan that keeps to VLLM_MAX_INSTANCES too, or why there is none."""
    residents = [replace(one, may_go=False) if not may_evict or one.model == seeker.instance.spec.names[0] else one
                 for one in survey.residents]
    try:
        found = _with_squeeze(seeker, need, devices, residents, limits)
    except NoRoom as error:
        return Refusal(error, error.code != NoRoom.code or not _hope(need, devices, survey.residents, limits))
    return found if seeker.instance.seated else _with_seat(seeker, found, residents, survey)


def _hope(need: Need, devices: Sequence[Device], residents: Sequence[Resident], limits: Limits) -> bool:
    try:
        placement.plan(need, devices, [replace(one, may_go=True) for one in residents], limits)
    except NoRoom:
        return False
    return True


def _with_squeeze(seeker: Seeker, need: Need, devices: Sequence[Device], residents: Sequence[Resident],
                  limits: Limits) -> Plan:
    """After it ran out of memory: as much of a device as can be had; else as before, with what its log suggested and
    without the others that idle there.  Raises NoRoom."""
    squeeze = seeker.instance.squeeze
    if squeeze is None or seeker.state is not State.STARTING:
        return placement.plan(need, devices, residents, limits)
    given = need.footprint.given
    if not given and any(device.kind == "cuda" for device in devices):
        keep = {name: value for name, value in need.footprint.keep.items() if name != "kv_cache_memory_bytes"}
        largest = replace(need.footprint, utilization=placement.DEFAULT_UTILIZATION, keep=keep)
        try:
            whole = placement.plan(replace(need, footprint=largest), devices, residents, limits)
        except NoRoom:
            pass
        else:
            if (whole.bytes_per_device or 0) > (squeeze.bytes_per_device or 0):
                return whole
    plan = placement.plan(need, devices, residents, limits)
    flags = {**plan.keep, **{name: value for name, value in squeeze.flags.items() if name != "gpu_memory_utilization"}}
    share = squeeze.flags.get("gpu_memory_utilization")
    if isinstance(share, float) and not given:
        flags["gpu_memory_utilization"] = min(share, plan.keep.get("gpu_memory_utilization", share))
    idle = [one for one in residents if one.evictable and not one.busy and one.id not in (*plan.sleep, *plan.stop)
            and not set(plan.devices).isdisjoint(one.bytes_on)]
    return replace(plan, keep=flags, stop=(*plan.stop, *(one.id for one in idle)),
                   because=f"{plan.because}; the second try, after it ran out of memory")


def _with_seat(seeker: Seeker, plan: Plan, residents: Sequence[Resident], survey: Survey) -> Plan | Refusal:
    """VLLM_MAX_INSTANCES is like a device that holds so many: who is cheapest to bring back is stopped."""
    short = 1 - survey.seats_left - len(plan.stop) - len(survey.leaving)
    if short <= 0:
        missing = 1 - survey.seats_left - len(plan.stop)    # wait for so many of those that leave
        return plan if missing <= 0 else replace(plan, after=tuple(sorted({*plan.after, *survey.leaving})))
    names = {one.id: one.model for one in residents}
    stops = sorted(option for one in residents if one.id not in (*plan.stop, *plan.sleep)
                   for option in eviction.options(one) if not option.sleeps)[:short]
    if len(stops) < short:
        return Refusal(NoRoom(f"{seeker.instance.spec.names[0]} waits: there are as many instances as "
                              "VLLM_MAX_INSTANCES allows, and all of them are in use or pinned"), hopeless=False)
    gone = ", ".join(names[option.id] for option in stops)
    return replace(plan, stop=(*plan.stop, *(option.id for option in stops)),
                   because=f"{plan.because}; {gone} is stopped for its place (VLLM_MAX_INSTANCES)")
