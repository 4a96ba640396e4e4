"""Who has which memory, who seeks some, and who goes for it: decided and marked under the registry's lock.

The arranger (arranger.py) takes a `survey`, plans outside the lock, and comes back with `grant`: what was planned on
is compared with what is by then, so nobody is promised what another one was, and nobody who serves is told to go.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import gpu
from errors import NoRoom
from instances import footprint, switching
from instances.instance import ACTIVE, Haste, Instance, Problem, Squeeze, State
from instances.ledger import Resident
from instances.placement import Plan
from instances.registry import Registry

log = logging.getLogger("vllm_server.instances")

HOPELESS_S = 5.0        # memory that a driver frees late looks like a stranger's for a moment
OUT_OF_MEMORY = frozenset({"gpu_memory_in_use", "out_of_memory", "kv_cache_too_small"})
"""Causes of a failed start that more room, or a smaller KV cache, may heal."""
DISTURBED = "memory_profiling_failed"
SHARE = "gpu_memory_utilization"
"""That others gave back memory while it measured: it has only to be begun anew."""
ROBBED_ALLOWED = 3      # starts that strangers spoil before they count as failures, with their pauses


@dataclass(frozen=True)
class Seeker:
    """One that wants room and has none.  `count` requests wait for it, or somebody ordered it; `modest`: nobody is to
    go for it."""

    instance: Instance
    state: State
    since: float
    count: int
    modest: bool


@dataclass(frozen=True)
class Survey:
    """What is to be planned on."""

    epoch: int
    seekers: Sequence[Seeker]                   # who is next first
    residents: Sequence[Resident]
    seats_left: int                             # of VLLM_MAX_INSTANCES; may be negative
    leaving: frozenset[str]                     # who is being stopped: their seats will be free


class Rooms(Registry):
    """Thread-safe, on the registry's lock."""

    _epoch = 0          # counts what changes who is where: a plan made before is void

    @property
    def epoch(self) -> int:
        return self._epoch

    # --- the arranger ---------------------------------------------------------------------------------------------

    def seekers(self) -> list[Seeker]:
        """Who wants room and has none, in the order in which they are served: who waits longest comes first."""
        with self._changed:
            return self._seekers(self.clock())

    def survey(self, reading: gpu.Reading, *, max_hold_s: float, max_instances: int) -> Survey:
        with self._changed:
            now = self.clock()
            seekers = self._seekers(now)
            used = {device.index: device.used_bytes for device in reading.devices if not device.error}
            contended_s = max((now - one.since for one in seekers if one.count and not one.modest), default=0.0)
            residents = [resident for one in self._instances.values() if (
                resident := self._resident(one, now, used, max_hold_s, contended_s)) is not None]
            seated = [one for one in self._instances.values() if one.seated and one.state is not State.FAILED]
            return Survey(self._epoch, seekers, residents, max_instances - len(seated),
                          frozenset(one.id for one in seated if one.state is State.STOPPING))

    def grant(self, seeker: Seeker, plan: Plan, survey: Survey) -> bool:
        """Promise it that room, and tell those to go who have to.  False: things have changed, plan anew."""
        with self._changed:
            if survey.epoch != self._epoch or any(
                    self._busy(self._instances[one.id]) and not one.busy
                    for one in survey.residents if one.id in plan.sleep or one.id in plan.stop):
                return False
            instance = seeker.instance
            for victim in map(self._instances.__getitem__, (*plan.sleep, *plan.stop)):
                self._evict(victim, asleep=victim.id in plan.sleep, why=f"makes room for {instance.spec.names[0]}")
            for id_ in plan.after:
                self._instances[id_].drowsy = False      # it was about to sleep, and may not change its mind any more
            instance.grant, instance.because, instance.seated = plan, plan.because, True
            instance.evicts = frozenset((*plan.sleep, *plan.stop, *plan.after))
            instance.devices, instance.used_before, instance.no_hope_since = plan.devices, {}, None
            if instance.state is State.STARTING:
                instance.memory_planned_bytes = plan.bytes_per_device
            instance.phase = "waiting_for_memory" if instance.evicts else "starting"
            self._epoch += 1
            self._stir(instance)
            return True

    def no_room(self, seeker: Seeker, error: NoRoom, *, hopeless: bool) -> None:
        """It has to wait for others to end or, `hopeless`, for what is not ours to give: then it is told so soon."""
        with self._changed:
            one, now = seeker.instance, self.clock()
            if one.state is not seeker.state or one.grant is not None:
                return
            one.phase, one.because = "waiting_for_room", error.message
            if seeker.modest:
                self._give_up_modest(one, error.message)
                return
            permanent = error.code != NoRoom.code
            one.no_hope_since = None if not hopeless else now if one.no_hope_since is None else one.no_hope_since
            if not permanent and (one.no_hope_since is None or (
                    now - one.no_hope_since < HOPELESS_S and not one.failures_in_a_row)):
                return
            problem = Problem(error.code, error.message, status=error.status, permanent=permanent)
            one.no_hope_since = None
            if one.state is State.WAKING:       # where it sleeps there is no room; perhaps there is elsewhere
                self._counters["wake_fallbacks"] += 1
                self._restart_now(one, problem)
            elif one.on_demand:
                self._fail(one, problem, problem.message)
            else:
                self._record_problem(one, problem)

    # --- keepers --------------------------------------------------------------------------------------------------

    def waits_for_others(self, instance: Instance) -> bool:
        """Whether those that were told to go for it hold their room still."""
        with self._changed:
            return bool(instance.evicts)

    def note_used_before(self, instance: Instance, used: Mapping[int, int]) -> None:
        """What all others use of its devices, as it begins to take its room."""
        with self._changed:
            instance.used_before = used

    def note_memory(self, instance: Instance, held_on: Mapping[int, int] | None) -> None:
        with self._changed:
            if instance.state in ACTIVE:
                instance.held_on = held_on

    def note_known(self, instance: Instance, *, reload_s: float | None, wake_s: float | None,
                   asleep_on: Mapping[int, int], host_bytes: int) -> None:
        """What earlier runs of the same configuration tell."""
        with self._changed:
            instance.reload_s, instance.wake_s = reload_s, wake_s
            if instance.state is not State.SLEEPING:
                instance.asleep_on, instance.host_bytes = asleep_on, host_bytes

    def start_failed(self, instance: Instance, problem: Problem, fixed: Collection[str]) -> None:
        """One that ran out of memory tries once more; `fixed` are flags that the user has set.

        Where the KV cache is too small, that helps if the log suggests what would fit, or has nothing to suggest since
        the weights alone fill what there is: that was planned too small, or a stranger came, unless the user said it.
        """
        with self._changed:
            suggested = {name: value for name, value in (problem.suggestion or {}).items() if name not in fixed}
            disturbed = problem.code == DISTURBED and instance.robbed < ROBBED_ALLOWED
            again = disturbed or (problem.code in OUT_OF_MEMORY and instance.squeeze is None and (
                problem.code != "kv_cache_too_small" or suggested
                or (problem.suggestion is None and SHARE not in fixed)))
            if not again or instance.state is not State.STARTING:
                self._record_problem(instance, problem)
                return
            self._counters["memory_retries"] += 1
            instance.last_error = problem
            if disturbed:
                instance.robbed += 1
            else:
                instance.squeeze = Squeeze(instance.memory_planned_bytes, suggested)
            self._restart_now(instance, problem)

    def was_robbed(self, instance: Instance) -> None:
        """Its start failed because others took its room meanwhile: the next one is as if this had never been."""
        with self._changed:
            if instance.squeeze is not None and instance.robbed < ROBBED_ALLOWED:
                instance.squeeze = None
                instance.robbed += 1
                log.info("%s (%s): other processes took its room while it started; it seeks anew", instance.id,
                         instance.spec.model)

    def lose_room(self, instance: Instance, problem: Problem) -> None:
        """What it was promised does not come free: it seeks anew, one that was to wake sleeps on until then."""
        with self._changed:
            if instance.state is State.WAKING:
                instance.last_error, instance.grant, instance.evicts = problem, None, frozenset()
                instance.change_state(State.SLEEPING, self.clock(), problem.message)
            elif instance.state is not State.STARTING or instance.robbed >= ROBBED_ALLOWED:
                self._record_problem(instance, problem)
            else:
                log.info("%s (%s): %s; it seeks anew", instance.id, instance.spec.model, problem.message)
                instance.robbed += 1
                instance.phase, instance.devices, instance.memory_planned_bytes = "waiting_for_room", (), None
                self._moved_out(instance)

    # --- inside; the caller holds the lock ------------------------------------------------------------------------

    def _begin_stop(self, instance: Instance, haste: Haste, why: str) -> None:
        raise NotImplementedError

    def _give_up_modest(self, one: Instance, why: str) -> None:
        what = "for load" if one.grown or one.state is State.WAKING else "ahead of requests"
        log.warning("%s is not loaded %s: %s", one.spec.names[0], what, why)
        if one.state is State.WAKING:
            one.wake_wanted = False
            one.change_state(State.SLEEPING, self.clock(), f"no room to wake it {what}")
        else:
            self._begin_stop(one, Haste.KILL, f"there was no room to load it {what}")

    def _on_change(self, instance: Instance, old: State) -> None:
        super()._on_change(instance, old)
        self._room_changed()

    def _room_changed(self) -> None:
        """There may be room now: who seeks some is stirred; one of them arranges it for all."""
        self._epoch += 1
        if (seeker := next((one for one in self._instances.values() if one.grant is None and one.state in (
                State.STARTING, State.WAKING)), None)) is not None:
            self._stir(seeker)

    def _moved_out(self, instance: Instance) -> None:
        """It holds its room no longer: who waited for that may go on."""
        instance.grant, instance.evicts = None, frozenset()
        for one in self._instances.values():
            if instance.id in one.evicts:
                one.evicts -= {instance.id}
                self._stir(one)
        self._room_changed()

    def _busy(self, instance: Instance) -> bool:
        """Whether a request is in it or waits for it, or nobody can tell yet."""
        return instance.state not in (State.READY, State.SLEEPING) or self._wanted(instance)

    def _evict(self, victim: Instance, *, asleep: bool, why: str) -> None:
        self._counters["evictions_in_use" if self._busy(victim) else "evictions_idle"] += 1
        if asleep:
            self._begin_sleep(victim, victim.spec.sleep_level, why)
        else:
            self._begin_stop(victim, Haste.PATIENT, why)

    def _make_host_room(self, instance: Instance, budget_bytes: int) -> bool:
        """Stop other sleepers until this one's weights fit into the host's RAM beside theirs: the least important, and
        of these the longest asleep.  False: it is too large for the whole budget."""
        others = [one for one in self._instances.values() if one is not instance and one.host_bytes
                  and one.state in (State.SLEEPING, State.FALLING_ASLEEP)]
        taken = sum(one.host_bytes for one in others)
        going = sorted((one for one in others if one.state is State.SLEEPING and not self._wanted(one)
                        and not one.spec.pinned), key=lambda one: (one.spec.priority, one.changed_at))
        while taken + instance.host_bytes > budget_bytes and going:
            victim = going.pop(0)
            taken -= victim.host_bytes
            self._counters["evictions_host_memory"] += 1
            self._begin_stop(victim, Haste.PATIENT, f"its room in the host's RAM is for {instance.spec.names[0]}")
        return taken + instance.host_bytes <= budget_bytes

    def _seekers(self, now: float) -> list[Seeker]:
        found: dict[str, Seeker] = {}
        waiters: list[switching.Waiter] = []
        for one in self._instances.values():
            if one.grant is not None or one.state not in (State.STARTING, State.WAKING) or any(
                    other in self._instances for other in one.after):
                continue
            count, since = self._line(one)
            if not one.on_demand and one.state is State.STARTING:   # somebody ordered it, who need not wait here
                count, since = max(1, count), min(since, one.wanted_at)
            modest = one.grown or (one.modest and not self._wanted(one))
            found[one.id] = Seeker(one, one.state, since, count, modest)
            # of two that came at once, the one that was made first
            waiters.append(switching.Waiter(one.id, count, now - since - 1e-9 * len(waiters)))
        return [found[id_] for id_ in switching.order(waiters)]

    def _line(self, instance: Instance) -> tuple[int, float]:
        """How many requests wait for it, and since when the first of them does; no longer than it wants room."""
        lines = [line for name in instance.names if (line := self._lines.get(name))]
        if not lines:
            return instance.waiting, instance.wanted_at
        return sum(map(len, lines)), min(next(iter(line.values())) for line in lines)

    def _resident(self, one: Instance, now: float, used: Mapping[int, int], max_hold_s: float,
                  contended_s: float) -> Resident | None:
        """Nothing of those who hold nothing and were promised nothing."""
        if one.grant is None and one.state not in (State.SLEEPING, State.WAKING):
            return None
        asleep = one.grant is None
        claim = dict(one.asleep_on) if asleep else {index: footprint.claim(
            one.memory_planned_bytes, (one.held_on or {}).get(index)) for index in one.devices}
        busy = self._busy(one)
        resident = Resident(
            id=one.id, model=one.spec.names[0], bytes_on=claim, held_on=self._held(one, claim, used), awake=not asleep,
            busy=busy, may_go=False if one.state is not State.SLEEPING else None, pinned=one.spec.pinned,
            priority=one.spec.priority, idle_s=one.idle_for(now), reload_s=one.reload_s, wake_s=one.wake_s,
            can_sleep=one.spec.sleep_level, asleep_on=one.asleep_on, host_bytes=one.host_bytes)
        if one.state in (State.STOPPING, State.BACKOFF):
            return replace(resident, leaves={})
        if one.state is State.FALLING_ASLEEP:
            return replace(resident, leaves=one.asleep_on)
        if one.state is State.READY:
            return replace(resident, may_go=(self._comes_back(one) or not busy) and switching.may_go(
                busy=busy, hold_s=now - one.ready_at, idle_s=one.idle_for(now), reload_s=one.reload_s,
                contended_s=contended_s, max_hold_s=max_hold_s))
        return resident

    def _held(self, one: Instance, claim: Mapping[int, int], used: Mapping[int, int]) -> Mapping[int, int] | None:
        """How much of its claim the devices show as used; None: all of it."""
        if one.state in (State.STARTING, State.WAKING) and one.grant is not None:
            base = one.asleep_on if one.state is State.WAKING else {}
            if not one.used_before:             # it has not begun yet, or an earlier daemon began it
                return one.held_on if one.state is State.STARTING and one.pid is not None else base
            return {index: min(count, base.get(index, 0) + max(0, used.get(index, 0) - one.used_before.get(index, 0)))
                    for index, count in claim.items()}
        return one.held_on

    def _comes_back(self, instance: Instance) -> bool:
        """Whether its next request would bring it back after a stop."""
        raise NotImplementedError
