"""All instances in memory, and the only lock: whatever others must agree on is decided here, in one place at a time.

Nothing in this file does I/O, waits for a process or calls into another part while it holds the lock (state changes
are logged): a method returns what there is to do, and its caller does it outside.  Keepers may read single fields of
their own instance without the lock; they write only through here.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from errors import DaemonError, NotFound, ShuttingDown
from instances.instance import ACTIVE, Candidate, Haste, Instance, InstanceSpec, InstanceView, Lease, Problem, State

FAILED_KEPT = 100     # failed instances that are listed with their cause until deleted; the oldest go first
ENDED_KEPT = 100      # ended ones of which the reason is remembered
DEEPEST = 2           # an engine that sleeps somehow is woken as one of this level
LOOK_S = 0.5          # how often one who waits is asked whether anybody still wants the answer


class Registry:
    """Thread-safe.  The methods stand by who asks: readers, requests, keepers; the rest is for the manager."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic, wall: Callable[[], float] = time.time) -> None:
        self.clock = clock
        self._wall = wall
        self._changed = threading.Condition(threading.Lock())
        self._instances: dict[str, Instance] = {}
        self._by_name: dict[str, tuple[Instance, ...]] = {}
        self._ended: deque[tuple[str, str]] = deque(maxlen=ENDED_KEPT)
        self._closing = False       # nothing starts any more and no request waits for a start
        self._detaching = False     # and the instances are left to the next daemon
        self._counters: Counter[str] = Counter()
        self._seconds: dict[str, tuple[int, float]] = {}    # what took how often how long, all together
        self._lines: dict[str, dict[object, float]] = {}    # model name -> who waits for it, and since when
        self.on_state: Callable[[Instance, State | None], None] | None = None
        """Told of each new state and the one before, under the lock: it must neither block nor raise."""

    # --- readers --------------------------------------------------------------------------------------------------

    def snapshot(self) -> list[InstanceView]:
        """Every instance, oldest first."""
        with self._changed:
            now, wall = self.clock(), self._wall()
            return [one.view(now, wall) for one in self._instances.values()]

    def get(self, instance_id: str) -> InstanceView:
        """Raises NotFound, with the reason when it ended not long ago."""
        with self._changed:
            return self._view(self._find(instance_id))

    def wait(self, instance_id: str, done: Callable[[InstanceView], bool], timeout_s: float | None = None,
             gone: Callable[[], bool] = lambda: False) -> InstanceView | None:
        """Block until `done(view)`; None when the instance has gone, the time is over, or `gone()` (asked twice a
        second) says that nobody waits any more.  Raises ShuttingDown when the daemon ends meanwhile."""
        deadline = None if timeout_s is None else self.clock() + timeout_s
        with self._changed:
            while (instance := self._instances.get(instance_id)) is not None:
                view = self._view(instance)
                if done(view):
                    return view
                if self._closing:
                    raise ShuttingDown(f"the daemon ends; nothing more is told of instance {instance_id}")
                if (deadline is not None and self.clock() >= deadline) or gone():
                    return None
                self._changed.wait(LOOK_S)
        return None

    def problem_of(self, instance_id: str) -> tuple[State, Problem | None, str] | None:
        """State, last problem and reason of an instance; None when it has gone."""
        with self._changed:
            one = self._instances.get(instance_id)
            return None if one is None else (one.state, one.last_error, one.why)

    def model_names(self) -> list[str]:
        """The names that requests may use now, sorted."""
        with self._changed:
            return sorted(name for name, served in self._by_name.items()
                          if any(one.state in ACTIVE for one in served))

    def in_flight(self) -> int:
        with self._changed:
            return sum(len(one.leases) for one in self._instances.values())

    @property
    def counters(self) -> dict[str, int]:
        """What has happened since the daemon began; a name is there once it has happened.

        loads (of models of the catalog), cancelled_loads, failures, restarts, memory_retries, idle_stops, sleeps,
        sleep_failures, wakes, wake_fallbacks, evictions_idle, evictions_in_use, evictions_host_memory, replicas_added,
        replicas_removed
        """
        with self._changed:
            return dict(self._counters)

    def waiting(self) -> int:
        """How many requests wait for a model."""
        with self._changed:
            return sum(map(len, self._lines.values()))

    @property
    def seconds(self) -> dict[str, tuple[int, float]]:
        """How many loads (from the launch on), wakes and swaps there were, and how long they took, all together."""
        with self._changed:
            return dict(self._seconds)

    def queues(self) -> dict[str, int]:
        """How many requests wait for each model that is not ready."""
        with self._changed:
            return {name: len(line) for name, line in self._lines.items()}

    def log_paths(self) -> list[Path]:
        with self._changed:
            return [Path(one.log_path) for one in self._instances.values()]

    def close_door(self) -> None:
        """The daemon is about to end: nothing starts any more, and who waits for an instance is told so at once."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()

    # --- requests -------------------------------------------------------------------------------------------------

    def candidates(self, name: str) -> list[Candidate]:
        """The instances that answer to a model name, an alias or an adapter, in any state but gone."""
        with self._changed:
            return [Candidate(one.id, one.state, len(one.leases)) for one in self._by_name.get(name, ())]

    def lease(self, instance_id: str) -> Lease:
        """The right to send it one request.  Raises NotReady; NotFound when it has gone; ShuttingDown."""
        with self._changed:
            if self._detaching:
                raise ShuttingDown("the daemon ends and takes no more requests")
            return self._find(instance_id).take_lease(self._release)

    def wait_for_change(self, timeout_s: float, wanted: Collection[str] = ()) -> None:
        """Block until any instance changes its state, at most `timeout_s` seconds.

        The `wanted` ones have a request waiting for them: they do not idle meanwhile, those that sleep are woken, and
        it does not wait when one of them is ready already.  Raises ShuttingDown: what is not ready now will not be.
        """
        with self._changed:
            if self._closing:
                raise ShuttingDown("the daemon is shutting down")
            found = [one for one in map(self._instances.get, wanted) if one is not None]
            if any(one.state is State.READY for one in found):
                return
            for one in found:
                self._begin_wake(one, "a request waits for it")
            with self._waiting_for(found):
                self._changed.wait(timeout_s)
            if self._closing:
                raise ShuttingDown("the daemon is shutting down")

    def start_deadline_s(self, instance_id: str) -> float:
        """How long its start may take.  Raises NotFound."""
        with self._changed:
            return self._find(instance_id).spec.start_timeout_s

    def rename(self, instance_id: str, names: tuple[str, ...]) -> None:
        """The names its engine answers to have changed (an adapter was loaded)."""
        with self._changed:
            instance = self._find(instance_id)
            instance.names = _names(instance.spec, names)
            self._index()

    # --- keepers --------------------------------------------------------------------------------------------------

    def view(self, instance: Instance) -> InstanceView:
        """Also of one that has been dropped."""
        with self._changed:
            return self._view(instance)

    def waits_for_old(self, instance: Instance) -> bool:
        """Whether one that it replaces is not gone yet."""
        with self._changed:
            return any(other in self._instances for other in instance.after)

    def note_phase(self, instance: Instance, phase: str, progress: float | None = None) -> None:
        with self._changed:
            instance.phase, instance.progress = phase, progress

    def note_port(self, instance: Instance, port: int) -> None:
        with self._changed:
            instance.port = port

    def note_process(self, instance: Instance, pid: int, runs: Callable[[], bool]) -> None:
        with self._changed:
            instance.pid, instance.phase, instance.progress = pid, "starting", 0.0
            instance.runs = runs
            instance.launched_at = self.clock()

    def became_ready(self, instance: Instance, names: tuple[str, ...], facts: Mapping[str, Any],
                     found: State = State.READY) -> bool:
        """Its engine answers; one that an earlier daemon left may be `found` asleep.  False when it was stopped
        meanwhile."""
        with self._changed:
            if instance.state is not State.STARTING:
                return False
            now = self.clock()
            instance.names = _names(instance.spec, names)
            instance.last_used, instance.phase, instance.progress = now, str(found), 1.0
            instance.ready_at, instance.squeeze, instance.robbed = now, None, 0
            if instance.launched_at is not None:
                self._took("load", now - instance.launched_at)
            self._note_swap(instance, now)
            instance.engine, instance.on_demand = facts, False
            if found is State.READY:
                instance.asleep_level = 0
            else:
                instance.asleep_level = instance.asleep_level or instance.spec.sleep_level or DEEPEST
            if found is State.SLEEPING:
                self._moved_out(instance)
            self._index()
            instance.change_state(found, now, "health answered" if found is State.READY else "found so")
            return True

    def may_fall_asleep(self, instance: Instance) -> bool:
        """The last moment before its engine is told.  False: it is wanted again, or was stopped meanwhile."""
        with self._changed:
            if instance.state is not State.FALLING_ASLEEP:
                return False
            if instance.drowsy and instance.waiting:
                instance.asleep_level, instance.phase = 0, "ready"
                instance.change_state(State.READY, self.clock(), "a request came before it slept")
                return False
            instance.drowsy = False
            return True

    def fell_asleep(self, instance: Instance) -> None:
        with self._changed:
            if instance.state is State.FALLING_ASLEEP:
                self._counters["sleeps"] += 1
                instance.phase = "sleeping"
                self._moved_out(instance)
                instance.change_state(State.SLEEPING, self.clock(), instance.why)
                if instance.waiting or instance.wake_wanted:
                    self._begin_wake(instance, "a request waits for it" if instance.waiting else "told to wake")

    def woke(self, instance: Instance) -> None:
        with self._changed:
            if instance.state is State.WAKING:
                self._counters["wakes"] += 1
                now = self.clock()
                self._took("wake", now - instance.changed_at)
                self._note_swap(instance, now)
                instance.asleep_level, instance.phase, instance.last_used = 0, "ready", now
                instance.ready_at, instance.wake_wanted = now, False
                instance.change_state(State.READY, now, f"awake: {instance.why}")

    def sleep_failed(self, instance: Instance, problem: Problem) -> None:
        """Nobody knows what its engine holds and takes now: it is ended, and started anew if a request waits."""
        with self._changed:
            self._counters["sleep_failures"] += 1
            instance.last_error = problem
            if instance.state is State.FALLING_ASLEEP:
                if instance.waiting:
                    self._restart_now(instance, problem)
                else:
                    instance.change_state(State.STOPPING, self.clock(), problem.message)

    def wake_failed(self, instance: Instance, problem: Problem) -> None:
        with self._changed:
            self._counters["wake_fallbacks"] += 1
            instance.last_error = problem
            if instance.state is State.WAKING:
                self._restart_now(instance, problem)

    def record_problem(self, instance: Instance, problem: Problem) -> None:
        """Backoff or failed, as the problem and the count of failures say; one that is being stopped goes at once."""
        with self._changed:
            self._record_problem(instance, problem)

    def restart_if_due(self, instance: Instance) -> bool:
        with self._changed:
            now = self.clock()
            due = instance.state is State.BACKOFF and instance.retry_at is not None and now >= instance.retry_at
            if due:
                instance.restarts += 1
                self._counters["restarts"] += 1
                instance.retry_at, instance.asleep_level, instance.wanted_at = None, 0, now
                instance.change_state(State.STARTING, now, "restart")
            return due

    def note_ended(self, instance: Instance) -> None:
        """Its processes are gone."""
        with self._changed:
            instance.pid, instance.devices, instance.held_on = None, (), None
            self._moved_out(instance)
            instance.phase, instance.progress, instance.launched_at = "", None, None

    def drop(self, instance: Instance) -> None:
        """It is stopped and nothing of it is left: take it off the list."""
        with self._changed:
            self._drop(instance, instance.why)

    def cut_leases(self, instance: Instance, error: DaemonError) -> None:
        """Close the connections of all requests in flight; each of their clients gets `error` or a visible cut."""
        with self._changed:
            leases = list(instance.leases)
        for lease in leases:
            lease.cut(error)

    # --- inside; the caller holds the lock ------------------------------------------------------------------------

    def _find(self, instance_id: str) -> Instance:
        instance = self._instances.get(instance_id)
        if instance is None:
            why = next((why for ended, why in reversed(self._ended) if ended == instance_id), None)
            raise NotFound(f"instance {instance_id} was stopped: {why}" if why else
                           f"there is no instance {instance_id[:64]!r}; GET /instances lists them",
                           code="instance_not_found", param="instance_id")
        return instance

    def _took(self, what: str, seconds: float) -> None:
        number, total_s = self._seconds.get(what, (0, 0.0))
        self._seconds[what] = number + 1, total_s + seconds

    def _note_swap(self, instance: Instance, now: float) -> None:
        """It is ready; if others had to go for it, that was a swap."""
        plan = instance.grant
        if plan is not None and (plan.sleep or plan.stop or plan.after):
            self._took("swap", now - instance.wanted_at)

    def _view(self, instance: Instance) -> InstanceView:
        return instance.view(self.clock(), self._wall())

    def _new_id(self) -> str:
        """One that no instance has or had not long ago."""
        used = self._instances.keys() | {ended for ended, _ in self._ended}
        while (instance_id := secrets.token_hex(4)) in used:
            pass
        return instance_id

    def _begin_sleep(self, instance: Instance, level: int, why: str, *, drowsy: bool = False) -> None:
        """It must be ready."""
        instance.asleep_level, instance.drowsy, instance.wake_wanted = level, drowsy, False
        instance.change_state(State.FALLING_ASLEEP, self.clock(), why)

    def _begin_wake(self, instance: Instance, why: str) -> None:
        """Nothing when it does not sleep."""
        if instance.state is State.SLEEPING:
            instance.wanted_at, instance.no_hope_since = self.clock(), None
            instance.change_state(State.WAKING, self.clock(), why)

    def _record_problem(self, instance: Instance, problem: Problem) -> None:
        instance.last_error = problem
        if instance.state not in ACTIVE:
            instance.haste = max(instance.haste, Haste.TERMINATE)
            return
        now = self.clock()
        if instance.state is State.SLEEPING and instance.spec.config_id is not None:
            instance.change_state(State.STOPPING, now, problem.message)     # the next request starts it
            return
        if instance.state is State.WAKING:
            self._counters["wake_fallbacks"] += 1
        delay_s = instance.record_failure(now)
        if problem.permanent or delay_s is None:
            why = problem.message if problem.permanent else f"failed too often; at last: {problem.message}"
            self._fail(instance, problem, why)
        else:
            instance.retry_at = now + delay_s
            instance.change_state(State.BACKOFF, now, f"next start in {delay_s:g} s: {problem.message}")

    def _fail(self, instance: Instance, problem: Problem, why: str) -> None:
        self._counters["failures"] += 1
        instance.last_error, instance.squeeze = problem, None
        instance.change_state(State.FAILED, self.clock(), why)

    def _moved_out(self, instance: Instance) -> None:
        """It holds its room no longer."""
        instance.grant = None

    def _queued(self, instance: Instance) -> int:
        """How many requests wait in the queues of its names."""
        return sum(len(self._lines[name]) for name in instance.names if name in self._lines)

    def _wanted(self, instance: Instance) -> bool:
        """Whether a request is in it or waits for it."""
        return bool(instance.leases or instance.waiting or self._queued(instance))

    def _restart_now(self, instance: Instance, problem: Problem) -> None:
        now = self.clock()
        instance.retry_at = now
        instance.change_state(State.BACKOFF, now, f"started anew: {problem.message}")

    def _register(self, instance: Instance) -> None:
        instance.on_change = self._on_change
        self._instances[instance.id] = instance
        self._index()
        self._tell(instance, None)
        self._changed.notify_all()

    def _on_change(self, instance: Instance, old: State) -> None:
        self._stir(instance)
        self._tell(instance, old)
        self._changed.notify_all()

    def _tell(self, instance: Instance, old: State | None) -> None:
        if self.on_state is not None:
            self.on_state(instance, old)

    def _stir(self, instance: Instance) -> None:
        """Its keeper has something to do now."""

    def _drop(self, instance: Instance, why: str) -> None:
        if instance.state is not State.STOPPED:
            instance.change_state(State.STOPPED, self.clock(), why)
        if self._instances.pop(instance.id, None) is not None:
            self._moved_out(instance)
            self._ended.append((instance.id, why))
            self._index()
        self._changed.notify_all()

    def _forget_failed(self, spec: InstanceSpec) -> None:
        """A new start takes the place of earlier failures; the oldest others go when there are many."""
        failed = [one for one in self._instances.values() if one.state is State.FAILED]
        same = [one for one in failed if one.spec.model == spec.model and not set(one.names).isdisjoint(spec.names)]
        others = [one for one in failed if one not in same]
        for one in [*same, *others[:max(0, len(others) - FAILED_KEPT)]]:
            self._drop(one, f"it had failed: {one.why}")

    def _index(self) -> None:
        index: dict[str, tuple[Instance, ...]] = {}
        for one in self._instances.values():
            for name in one.names:
                index[name] = (*index.get(name, ()), one)
        self._by_name = index

    @contextmanager
    def _waiting_for(self, instances: list[Instance]) -> Iterator[None]:
        for one in instances:
            one.waiting += 1
        try:
            yield
        finally:
            for one in instances:
                one.waiting -= 1
                one.last_used = self.clock()

    # --- inside; takes the lock -----------------------------------------------------------------------------------

    def _release(self, lease: Lease, ok: bool) -> None:
        """A lease came back, however its request ended; a second time counts for nothing."""
        with self._changed:
            instance = self._instances.get(lease.instance_id)
            if instance is None or lease not in instance.leases:
                return
            instance.leases.discard(lease)
            instance.last_used = self.clock()
            if ok:
                instance.last_success = instance.last_used
            else:
                instance.last_broken = instance.last_used
            drained = instance.state in (State.STOPPING, State.FALLING_ASLEEP) and not instance.leases
        if drained:
            self._nudge(lease.instance_id)

    def _nudge(self, instance_id: str) -> None:
        with self._changed:
            if (instance := self._instances.get(instance_id)) is not None:
                self._stir(instance)


def _names(spec: InstanceSpec, served: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(dict.fromkeys((*spec.names, *served)))
