"""The registry of instances and its only lock.

Everything that others must agree on is decided here under the lock and acted on outside it: keepers (one thread an
instance, instances/keeper.py) do the I/O, request threads hold leases, the reaper's `tick(now)` ends what idles.
A method says so when its caller must hold the lock; no other method may be called while holding it.
"""

from __future__ import annotations

import logging
import os
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import gpu
from config import Settings, child_environment, merge_flags, to_argv
from errors import (
    Conflict,
    DaemonError,
    NoFreePort,
    NotFound,
    ShuttingDown,
    TooManyInstances,
)
from instances import placement
from instances.instance import ACTIVE, Candidate, Instance, InstanceSpec, InstanceView, Lease, Problem, State
from instances.keeper import Keeper
from instances.launcher import Engine, EngineRecord, Launcher
from instances.loop import Loop
from instances.ports import Ports
from instances.store import Record, StateDir

log = logging.getLogger("vllm_server.manager")

FAILED_KEPT = 100     # failed instances that are listed with their cause until deleted; the oldest go first
ENDED_KEPT = 100      # ended ones of which the reason is remembered
REAPER_STEP_S = 0.5
FIXED = ("host", "port", "threads", "keepalive_s", "max_connections", "access_log", "base_port", "state_dir",
         "keep_instances", "log_level", "debug", "shutdown_grace_s", "command")
"""Settings that a reload leaves as they were at the start."""


@dataclass(frozen=True)
class CreateRequest:
    """`timeout_s` and `start_timeout_s` None: the settings' values."""

    model: str
    params: Mapping[str, Any]
    timeout_s: float | None = None
    start_timeout_s: float | None = None
    replace: bool = False
    new: bool = False


class InstanceManager:
    """Thread-safe.  `start()` adopts what an earlier daemon left and begins to reap; `shutdown()` ends it."""

    def __init__(self, settings: Settings, state_dir: StateDir, *, launcher: Launcher | None = None,
                 devices: gpu.GpuReader | None = None, environ: Mapping[str, str] = os.environ,
                 clock: Callable[[], float] = time.monotonic, wall: Callable[[], float] = time.time,
                 run: Callable[[Loop], None] = Loop.start) -> None:
        self.settings = settings
        self.launcher = launcher or Launcher()
        self.devices = devices or gpu.GpuReader(visible=settings.engine_env.get("CUDA_VISIBLE_DEVICES"))
        self.clock = clock
        self._wall = wall
        self._run = run
        self._state_dir = state_dir
        self._environ = environ
        self._environment = child_environment(settings, environ)
        self._changed = threading.Condition(threading.Lock())
        self._instances: dict[str, Instance] = {}
        self._loops: dict[str, Loop] = {}
        self._by_name: dict[str, tuple[Instance, ...]] = {}
        self._ended: deque[tuple[str, str]] = deque(maxlen=ENDED_KEPT)
        self._turns: dict[int, str] = {}
        self._closing = False
        self._ports = Ports(settings.base_port)
        self._reaper = Loop(name="reaper", tick=self.tick, interval_s=REAPER_STEP_S, clock=clock)

    # --- what the management routes ask ---------------------------------------------------------------------------

    def create(self, request: CreateRequest) -> tuple[InstanceView, bool]:
        """The instance for this request, and whether it was made now.

        One that is active with the same flags is returned, its idle clock started anew and its timeout updated if
        the request names one.  Raises Conflict, TooManyInstances, ShuttingDown, BadRequest.
        """
        spec = self._spec(request)
        now = self.clock()
        with self._changed:
            if self._closing:
                raise ShuttingDown("the daemon is shutting down and starts no instances")
            active = [one for one in self._instances.values() if one.spec.model == spec.model and one.state in ACTIVE]
            same = next((one for one in active if one.spec.flags == spec.flags and one.spec.names == spec.names), None)
            if same is not None and not request.new:
                same.last_used = now
                if request.timeout_s is not None:
                    same.spec = replace(same.spec, timeout_s=request.timeout_s)
                return same.view(now, self._wall()), False
            if active and not (request.replace or request.new):
                raise Conflict(_other_params(active[0], spec), code="instance_exists", param="params")
            self._check_names(spec)
            replaced = active if request.replace and not request.new else []
            running = sum(one.state is not State.FAILED for one in self._instances.values()) - len(replaced)
            if running >= self.settings.max_instances:
                raise TooManyInstances(f"{running} instances are running and VLLM_MAX_INSTANCES is "
                                       f"{self.settings.max_instances}: delete one, or raise it")
            for one in replaced:
                one.change_state(State.STOPPING, now, "replaced")
            self._forget_failed(spec.model, now)
            instance = self._add(spec, now, after=frozenset(one.id for one in replaced))
            view = instance.view(now, self._wall())
        self._run_keeper(instance)
        for one in replaced:
            self._wake(one.id)
        return view, True

    def snapshot(self) -> list[InstanceView]:
        """Every instance, oldest first."""
        with self._changed:
            now, wall = self.clock(), self._wall()
            return [one.view(now, wall) for one in self._instances.values()]

    def get(self, instance_id: str) -> InstanceView:
        with self._changed:
            return self._find(instance_id).view(self.clock(), self._wall())

    def stop(self, instance_id: str, *, force: bool = False, why: str = "deleted") -> InstanceView:
        """Begin to drain and stop it; a failed one is just forgotten.  Raises NotFound."""
        with self._changed:
            instance, now = self._find(instance_id), self.clock()
            instance.force_stop = instance.force_stop or force
            if instance.state is State.FAILED:
                self._drop(instance, now, why)
            elif instance.state is not State.STOPPING:
                instance.change_state(State.STOPPING, now, why)
            view = instance.view(now, self._wall())
        self._wake(instance_id)
        return view

    def wait(self, instance_id: str, done: Callable[[InstanceView], bool], timeout_s: float | None = None,
             gone: Callable[[], bool] = lambda: False) -> InstanceView | None:
        """Block until `done(view)`; None when the instance has gone, the time is over, or `gone()` (asked twice a
        second) says that nobody waits any more."""
        deadline = None if timeout_s is None else self.clock() + timeout_s
        with self._changed:
            while (instance := self._instances.get(instance_id)) is not None:
                now = self.clock()
                view = instance.view(now, self._wall())
                if done(view):
                    return view
                if (deadline is not None and now >= deadline) or gone():
                    return None
                self._changed.wait(0.5)
        return None

    # --- what the router asks -------------------------------------------------------------------------------------

    def candidates(self, name: str) -> list[Candidate]:
        """The instances that answer to a model name, an alias or an adapter, in any state but gone."""
        with self._changed:
            return [Candidate(one.id, one.state, len(one.leases)) for one in self._by_name.get(name, ())]

    def lease(self, instance_id: str) -> Lease:
        """The right to send it one request.  Raises NotReady; NotFound when it has gone."""
        with self._changed:
            return self._find(instance_id).take_lease(self._release)

    def wait_for_change(self, timeout_s: float, wanted: Collection[str] = ()) -> None:
        """Block until any instance changes its state, at most `timeout_s` seconds.

        The `wanted` ones have requests waiting for them: their idle clocks start anew.
        """
        with self._changed:
            for instance_id in wanted:
                if instance_id in self._instances:
                    self._instances[instance_id].last_used = self.clock()
            self._changed.wait(timeout_s)

    def start_deadline_s(self, instance_id: str) -> float:
        with self._changed:
            return self._find(instance_id).spec.start_timeout_s

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

    def rename(self, instance_id: str, names: tuple[str, ...]) -> None:
        """The names its engine answers to have changed (an adapter was loaded)."""
        with self._changed:
            instance = self._find(instance_id)
            instance.names = _names(instance.spec, names)
            self._index()

    # --- life of the daemon ---------------------------------------------------------------------------------------

    def start(self) -> None:
        """Adopt or end what an earlier daemon left; blocks for the latter only.  Then reap idle instances."""
        for record in self._state_dir.load():
            self._adopt(record)
        self._run(self._reaper)

    def tick(self, now: float) -> None:
        """One round of the reaper: stop what is idle past its timeout."""
        with self._changed:
            idle = [one.id for one in self._instances.values() if one.state in (State.READY, State.BACKOFF)
                    and one.expired(now)]
        for instance_id in idle:
            self._expire(instance_id, now)

    def shutdown(self, *, keep: bool, hurry: Callable[[], bool] = lambda: False,
                 alive: Callable[[], None] = lambda: None) -> None:
        """Stop all instances and wait for it; or leave them running (`keep`) for the next daemon.

        Both callbacks are asked twice a second: `hurry` to kill instead of drain, `alive` to say that it goes on.
        """
        with self._changed:
            self._closing = True
            ids = list(self._instances)
        self._reaper.stop()
        if keep:
            for loop in list(self._loops.values()):
                loop.stop()
        else:
            for instance_id in ids:
                self._stop_quietly(instance_id, force=hurry())
            self._wait_all_gone(hurry, alive)
        for loop in [*list(self._loops.values()), self._reaper]:
            loop.join(20.0)
        self.devices.close()

    def reconfigure(self, settings: Settings) -> list[str]:
        """Use other settings from now on; the names of those that changed.

        Running instances keep the flags they were started with.  What only a restart can change (FIXED) stays.
        """
        wanted = replace(settings, **{name: getattr(self.settings, name) for name in FIXED})
        changed = [name for name in vars(wanted) if getattr(wanted, name) != getattr(self.settings, name)]
        ignored = [name for name in FIXED if getattr(settings, name) != getattr(self.settings, name)]
        if ignored:
            log.warning("these settings change only with a restart: %s", ", ".join(ignored))
        with self._changed:
            self.settings = wanted
            self._environment = child_environment(wanted, self._environ)
        return changed

    # --- what keepers ask -----------------------------------------------------------------------------------------

    def update(self, instance: Instance, **fields: Any) -> None:
        """Note phase, progress or pid."""
        with self._changed:
            for name, value in fields.items():
                setattr(instance, name, value)

    def blocked_by(self, instance: Instance) -> str | None:
        """Why it may not start yet; None: it has its turn on its devices."""
        with self._changed:
            if any(other in self._instances for other in instance.after):
                return "waiting_for_old_instance"
        return "waiting_for_device" if self.must_wait_for_turn(instance) else None

    def must_wait_for_turn(self, instance: Instance) -> bool:
        """Starts and stops on a GPU go one at a time: vLLM fails when memory changes while it measures.

        An instance takes the turn of every GPU until it is ready, has failed or is gone; on a machine without GPUs
        there is nothing to take turns for.
        """
        indexes = [device.index for device in self.devices.read(self.clock()).devices if device.kind == "cuda"]
        with self._changed:
            mine = [index for index in indexes if not instance.devices or index in instance.devices]
            if any(self._turns.get(index, instance.id) != instance.id for index in mine):
                return True
            self._turns.update(dict.fromkeys(mine, instance.id))
            return False

    def place(self, instance: Instance) -> placement.Plan:
        """Choose devices and note them.  Raises NoRoom."""
        plan = placement.plan(instance.spec.model, instance.spec.flags, self.devices.read(self.clock()).devices)
        with self._changed:
            instance.devices = plan.devices
            instance.memory_planned_bytes = plan.bytes_per_device
            self._turns = {index: owner for index, owner in self._turns.items()
                           if owner != instance.id or index in plan.devices}
        log.info("%s (%s): devices %s (%s)", instance.id, instance.spec.model, list(plan.devices), plan.because)
        return plan

    def reserve_port(self, instance: Instance) -> int:
        """Its port if that is still free, else the lowest that is.  Raises NoFreePort."""
        port = self._ports.reserve(instance.id, preferred=instance.port)
        if port is None:
            raise NoFreePort(f"no free port from {self.settings.base_port} upward (VLLM_BASE_PORT)")
        with self._changed:
            instance.port = port
        return port

    def command_line(self, instance: Instance, port: int) -> list[str]:
        spec = instance.spec
        return [*self.settings.command, "serve", spec.model, "--host", "127.0.0.1", "--port", str(port),
                "--served-model-name", *spec.names, *to_argv(spec.flags)]

    def engine_environment(self, visible_devices: str | None) -> dict[str, str]:
        return self._environment | ({"CUDA_VISIBLE_DEVICES": visible_devices} if visible_devices else {})

    def became_ready(self, instance: Instance, *, names: tuple[str, ...], facts: Any) -> bool:
        now = self.clock()
        with self._changed:
            self._end_turn(instance)
            if instance.state is not State.STARTING:
                return False
            instance.names = _names(instance.spec, names)
            instance.last_used, instance.phase, instance.progress = now, "ready", 1.0
            instance.engine = {name: value for name, value in asdict(facts).items() if value is not None}
            instance.change_state(State.READY, now, "health answered")
            return True

    def record_problem(self, instance: Instance, problem: Problem) -> None:
        """Backoff or failed, as the problem and the count of failures say."""
        now = self.clock()
        with self._changed:
            instance.last_error = problem
            if instance.state not in ACTIVE:
                return
            delay_s = instance.record_failure(now)
            if problem.permanent or delay_s is None:
                why = problem.message if problem.permanent else f"failed too often; at last: {problem.message}"
                instance.change_state(State.FAILED, now, why)
            else:
                instance.retry_at = now + delay_s
                instance.change_state(State.BACKOFF, now, f"next start in {delay_s:g} s: {problem.message}")

    def restart_if_due(self, instance: Instance) -> None:
        now = self.clock()
        with self._changed:
            if instance.state is State.BACKOFF and instance.retry_at is not None and now >= instance.retry_at:
                instance.restarts += 1
                instance.retry_at = None
                instance.change_state(State.STARTING, now, "restart")

    def cut_leases(self, instance: Instance, error: DaemonError) -> None:
        """Close the connections of all requests in flight; each of their clients gets `error` or a visible cut."""
        with self._changed:
            leases = list(instance.leases)
        for lease in leases:
            lease.cut(error)

    def release_resources(self, instance: Instance) -> None:
        """Its processes are gone: port and devices are free."""
        self._ports.release(instance.id)
        with self._changed:
            self._end_turn(instance)
            instance.pid, instance.devices = None, ()
            instance.memory_measured_bytes = None
            instance.phase, instance.progress = "", None

    def finished(self, instance: Instance) -> None:
        """It is stopped and nothing of it is left: take it off the list."""
        self._state_dir.remove(instance.id)
        with self._changed:
            self._drop(instance, self.clock(), instance.why)

    def keeper_ended(self, instance: Instance) -> None:
        """A failed instance stays listed, with its cause, but the next daemon need not know of it."""
        self._state_dir.remove(instance.id)
        with self._changed:
            self._loops.pop(instance.id, None)
            self._changed.notify_all()

    def save(self, instance: Instance, engine: EngineRecord | None) -> None:
        """Write its record.  Raises OSError only while it starts: one that serves goes on with an older record."""
        with self._changed:
            known = instance.id in self._instances
            record = Record(id=instance.id, spec=instance.spec, state=instance.state, created_at=instance.created_at,
                            port=instance.port, devices=instance.devices, restarts=instance.restarts,
                            log_path=instance.log_path, engine=engine)
        if not known:
            return
        try:
            self._state_dir.save(record)
        except OSError as error:
            if record.state is State.STARTING and engine is None:
                raise
            log.error("%s: its record cannot be written: %s", instance.id, error)

    def measure(self, instance: Instance, pids: list[int]) -> None:
        """Note the memory that its processes hold now, on its GPUs or in the host's memory."""
        reading = self.devices.read(self.clock())
        measured: int | None
        if any(device.kind == "cuda" for device in reading.devices):
            found = gpu.memory_by_group(reading, {instance.id: pids})
            measured = sum(found[instance.id].values()) if instance.id in found else None
        else:
            measured = gpu.host_memory(pids)
        with self._changed:
            if instance.state in ACTIVE:
                instance.memory_measured_bytes = measured

    def log_paths(self) -> list[Path]:
        with self._changed:
            return [Path(one.log_path) for one in self._instances.values()]

    # --- inside ---------------------------------------------------------------------------------------------------

    def _spec(self, request: CreateRequest) -> InstanceSpec:
        settings = self.settings
        flags = merge_flags(settings.flags_default, settings.flags_config, settings.flags_env, request.params)
        given = flags.pop("served_model_name", None) or ()
        names = (given,) if isinstance(given, str) else tuple(str(name) for name in given)
        return InstanceSpec(
            model=request.model, names=tuple(dict.fromkeys((*names, request.model))), flags=flags,
            params=dict(request.params),
            timeout_s=settings.default_timeout_s if request.timeout_s is None else request.timeout_s,
            start_timeout_s=settings.start_timeout_s if request.start_timeout_s is None else request.start_timeout_s)

    def _check_names(self, spec: InstanceSpec) -> None:
        """An alias must not take another model's name.  Caller holds the lock."""
        for name in spec.names:
            for one in self._by_name.get(name, ()):
                if one.spec.model != spec.model and one.state in ACTIVE:
                    raise Conflict(f"the name {name!r} belongs to instance {one.id} of {one.spec.model}; choose "
                                   "another served_model_name", code="name_taken", param="params.served_model_name")

    def _add(self, spec: InstanceSpec, now: float, after: frozenset[str]) -> Instance:
        """Caller holds the lock."""
        instance_id = secrets.token_hex(4)
        while instance_id in self._instances:
            instance_id = secrets.token_hex(4)
        instance = Instance(id=instance_id, spec=spec, created_at=self._wall(), last_used=now, changed_at=now,
                            log_path=str(self._state_dir.logs / f"{instance_id}.log"), after=after)
        self._register(instance)
        return instance

    def _register(self, instance: Instance) -> None:
        """Caller holds the lock."""
        instance.on_change = self._note_change
        self._instances[instance.id] = instance
        self._index()
        self._changed.notify_all()

    def _run_keeper(self, instance: Instance, engine: Engine | None = None, served_before: bool = False) -> None:
        keeper = Keeper(instance, self, engine=engine, served_before=served_before)
        loop = Loop(name=f"keeper-{instance.id}", tick=keeper.tick, interval_s=0.1, clock=self.clock)
        with self._changed:
            self._loops[instance.id] = loop
        self._run(loop)

    def _adopt(self, record: Record) -> None:
        engine = None
        if record.engine is not None:
            engine = self.launcher.adopt(record.id, record.engine, Path(record.log_path))
        else:
            self.launcher.end_unrecorded(record.id)
        if engine is None and record.state is State.STOPPING:
            self._state_dir.remove(record.id)
            return
        now = self.clock()
        served = record.state is State.READY
        instance = Instance(
            id=record.id, spec=record.spec, created_at=record.created_at, last_used=now, changed_at=now,
            log_path=record.log_path, port=record.port, devices=record.devices, restarts=record.restarts,
            pid=engine.pid if engine else None, why="found again" if engine else "its engine had died; starting anew")
        if engine is not None and record.port is not None:
            self._ports.take(record.id, record.port)
        with self._changed:
            self._register(instance)
            if record.state is State.STOPPING:
                instance.change_state(State.STOPPING, now, "it was being stopped")
        log.info("%s (%s): %s", record.id, record.spec.model, instance.why)
        self._run_keeper(instance, engine, served)

    def _expire(self, instance_id: str, now: float) -> None:
        with self._changed:
            instance = self._instances.get(instance_id)
            # Looked at again: a request may have come since the round began.
            if instance is None or instance.state not in (State.READY, State.BACKOFF) or not instance.expired(now):
                return
            instance.change_state(State.STOPPING, now, f"idle for {instance.spec.timeout_s:g} s")
        self._wake(instance_id)

    def _release(self, lease: Lease, ok: bool) -> None:
        now = self.clock()
        with self._changed:
            instance = self._instances.get(lease.instance_id)
            if instance is None or lease not in instance.leases:
                return
            instance.leases.discard(lease)
            instance.last_used = now
            if ok:
                instance.last_success = now
            drained = instance.state is State.STOPPING and not instance.leases
        if drained:
            self._wake(lease.instance_id)

    def _stop_quietly(self, instance_id: str, *, force: bool) -> None:
        try:
            self.stop(instance_id, force=force, why="the daemon ends")
        except NotFound:
            return

    def _wait_all_gone(self, hurry: Callable[[], bool], alive: Callable[[], None]) -> None:
        hurried = False
        while True:
            alive()
            with self._changed:
                left = list(self._instances)
                if left:
                    self._changed.wait(0.5)
            if not left:
                return
            if hurry() and not hurried:
                hurried = True
                for instance_id in left:
                    self._stop_quietly(instance_id, force=True)

    def _wake(self, instance_id: str) -> None:
        with self._changed:
            loop = self._loops.get(instance_id)
        if loop is not None:
            loop.wake()

    def _find(self, instance_id: str) -> Instance:
        """Caller holds the lock.  Raises NotFound, with the reason when it ended not long ago."""
        instance = self._instances.get(instance_id)
        if instance is None:
            why = next((why for ended, why in reversed(self._ended) if ended == instance_id), None)
            raise NotFound(f"instance {instance_id} was stopped: {why}" if why else
                           f"there is no instance {instance_id[:64]!r}; GET /instances lists them",
                           code="instance_not_found", param="instance_id")
        return instance

    def _note_change(self, instance: Instance, old: State) -> None:
        """Caller holds the lock."""
        self._changed.notify_all()

    def _end_turn(self, instance: Instance) -> None:
        """Caller holds the lock."""
        self._turns = {index: owner for index, owner in self._turns.items() if owner != instance.id}

    def _drop(self, instance: Instance, now: float, why: str) -> None:
        """Take it out of the registry.  Caller holds the lock."""
        if instance.state is not State.STOPPED:
            instance.change_state(State.STOPPED, now, why)
        self._instances.pop(instance.id, None)
        self._ended.append((instance.id, why))
        self._index()
        self._changed.notify_all()

    def _forget_failed(self, model: str, now: float) -> None:
        """A new start takes the place of earlier failures; the oldest others go when there are many.

        Caller holds the lock.
        """
        failed = [one for one in self._instances.values() if one.state is State.FAILED]
        for one in failed:
            if one.spec.model == model or len(failed) > FAILED_KEPT:
                self._drop(one, now, f"it had failed: {one.why}")

    def _index(self) -> None:
        """Caller holds the lock."""
        index: dict[str, tuple[Instance, ...]] = {}
        for one in self._instances.values():
            for name in one.names:
                index[name] = (*index.get(name, ()), one)
        self._by_name = index


def _names(spec: InstanceSpec, served: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(dict.fromkeys((*spec.names, *served)))


def _other_params(active: Instance, spec: InstanceSpec) -> str:
    mine, theirs = dict(spec.flags), dict(active.spec.flags)
    different = sorted(name for name in mine.keys() | theirs.keys() if mine.get(name) != theirs.get(name))
    what = ", ".join(different) or "served_model_name"
    return (f"{spec.model} is active as instance {active.id} with other params ({what}): send \"replace\": true to "
            "drain it and start anew with these, or \"new\": true for one more replica")
