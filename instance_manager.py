"""The registry of instances, as the daemon uses it: what is started, replaced, found again and ended, and why.

Everything that others must agree on is decided under the one lock and acted on outside it: keepers (one thread an
instance, instances/keeper.py) do the I/O, request threads hold leases, the reaper's `tick(now)` ends what idles.

One class in five layers: instances/registry.py (instances, leases, queues), rooms.py (who has which memory, who seeks
some, and who goes for it), demand.py (models of the catalog: loaded for requests, replaced when they change),
replicas.py (how many of each), and this file, in the order of an instance's life.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import gpu
from config import Settings, diff
from errors import Conflict, EngineStopped, ManagerError, ShuttingDown, TooManyInstances
from instances.arranger import Arranger, PlanReport
from instances.instance import ACTIVE, Haste, Instance, InstanceSpec, InstanceView, State
from instances.keeper import Keeper
from instances.launcher import Launcher, LaunchRefused
from instances.loop import Loop
from instances.placement import Plan
from instances.registry import LOOK_S
from instances.replicas import Replicas
from instances.resources import Resources
from instances.specs import CreateRequest, differences, entry_for, spec_for, spec_of
from instances.store import Record, StateDir
from instances.tenancy import Tenancy

__all__ = ["FIXED", "CreateRequest", "InstanceManager"]

log = logging.getLogger("vllm_server.manager")

REAPER_STEP_S = 0.5
LAST_TICK_S = 20.0    # a keeper's step blocks no longer than it takes to kill a tree
FIXED = ("host", "port", "threads", "one_core", "realtime", "keepalive_s", "max_connections", "relays", "access_log",
         "base_port", "state_dir", "keep_instances", "log_level", "debug", "shutdown_grace_s", "command",
         "max_request_bytes", "body_memory_bytes", "backlog")
"""Settings that a reload leaves as they were at the start."""


class InstanceManager(Replicas):
    """Thread-safe.  `start()` takes over what an earlier daemon left and begins to reap; `shutdown()` ends it."""

    def __init__(self, settings: Settings, state_dir: StateDir, *, launcher: Launcher | None = None,
                 devices: gpu.GpuReader | None = None, environ: Mapping[str, str] = os.environ,
                 clock: Callable[[], float] = time.monotonic, wall: Callable[[], float] = time.time,
                 run: Callable[[Loop], None] = Loop.start) -> None:
        super().__init__(clock=clock, wall=wall)
        self.resources = Resources(
            settings, state_dir, launcher=launcher or Launcher(), environ=environ,
            devices=devices or gpu.GpuReader(visible=settings.engine_env.get("CUDA_VISIBLE_DEVICES")))
        self._arranger = Arranger(self, self.resources)
        self._run = run
        self._loops: dict[str, Loop] = {}       # of the keepers that have something left to do
        self._reaper = Loop(name="reaper", tick=self.tick, interval_s=REAPER_STEP_S, clock=clock)

    @property
    def settings(self) -> Settings:
        return self.resources.settings

    @property
    def devices(self) -> gpu.GpuReader:
        return self.resources.devices

    # --- create and stop ------------------------------------------------------------------------------------------

    def create(self, request: CreateRequest) -> tuple[InstanceView, bool]:
        """The instance for this request, and whether it was made now.

        One that is active with the same flags is returned, its idle clock started anew and its timeout updated if
        the request names one.  Raises Conflict, TooManyInstances, ShuttingDown; ManagerError when its record cannot
        be written, and then nothing has happened.
        """
        spec = spec_for(self.settings, request)
        with self._changed:
            if self._closing:
                raise ShuttingDown("the daemon is shutting down and starts no instances")
            active = [one for one in self._instances.values() if one.spec.model == spec.model and one.state in ACTIVE
                      and not set(one.spec.names).isdisjoint(spec.names)]
            same = next((one for one in active if not differences(one.spec, spec)), None)
            if same is not None and not request.new:
                self._touch(same, request.timeout_s)
                same.on_demand, same.wake_wanted = False, True
                self._begin_wake(same, "created again")
                return self._view(same), False
            if active and not (request.replace or request.new):
                raise Conflict(_other_params(active[0], spec), code="instance_exists", param="params")
            self._check_names(spec)
            replaced = active if request.replace and not request.new else []
            self._check_room(sum(one.seated for one in replaced))
            instance = self._add(spec, after=frozenset(one.id for one in replaced))
            instance.apart = request.new
        self._begin(instance)
        with self._changed:
            now = self.clock()
            for one in replaced:
                if one.state in ACTIVE:
                    one.change_state(State.STOPPING, now, "replaced")
            self._forget_failed(spec)
            return self._view(instance), True

    def stop(self, instance_id: str, *, force: bool = False, why: str = "deleted") -> InstanceView:
        """Begin to drain and stop it; a failed one is just forgotten.  Raises NotFound."""
        with self._changed:
            instance = self._find(instance_id)
            self._begin_stop(instance, Haste.KILL if force else Haste.DRAIN, why)
            view = self._view(instance)
        self._nudge(instance_id)
        return view

    # --- sleep and wake -------------------------------------------------------------------------------------------

    def sleep(self, instance_id: str, level: int | None = None) -> InstanceView:
        """Begin to put it to sleep: no request enters any more, those in flight end first.  `level` 1 or 2; None: as
        it was made for.  Nothing happens to one that sleeps or is about to.  Raises NotFound, Conflict."""
        host_bytes = self.resources.sleep_host_bytes()
        with self._changed:
            instance = self._find(instance_id)
            if not instance.spec.sleep_level:
                raise Conflict(f"instance {instance_id} cannot be put to sleep: it was started without sleep mode; "
                               "create it with \"sleep\": 1 (or 2), or set `sleep` in its entry of config.yaml",
                               code="not_sleepable", param="instance_id")
            if instance.state is State.READY:
                level = level or instance.spec.sleep_level
                if level == 1 and not self._make_host_room(instance, host_bytes):
                    raise Conflict(f"the weights of instance {instance_id} do not fit into the host's RAM beside those "
                                   "of other sleepers: raise SLEEP_HOST_MEMORY_MB, or let it sleep at level 2",
                                   code="no_host_memory", param="instance_id")
                self._begin_sleep(instance, level, "told to sleep")
            elif instance.state not in (State.FALLING_ASLEEP, State.SLEEPING):
                raise Conflict(f"instance {instance_id} is {instance.state}: only a ready one can be put to sleep",
                               code="not_ready", param="instance_id")
            return self._view(instance)

    def wake(self, instance_id: str) -> InstanceView:
        """Begin to wake it; nothing happens to one that is awake or about to be.  Raises NotFound, Conflict."""
        with self._changed:
            instance = self._find(instance_id)
            instance.wake_wanted = True
            self._begin_wake(instance, "told to wake")
            if instance.state not in (State.READY, State.WAKING, State.FALLING_ASLEEP):
                raise Conflict(f"instance {instance_id} is {instance.state}: only one that sleeps can be woken",
                               code="not_sleeping", param="instance_id")
            return self._view(instance)

    # --- what a load would do -------------------------------------------------------------------------------------

    def plan_for(self, name: str) -> PlanReport:
        """Would it fit, where, who would go for it, and how long should it take.  Raises ModelNotFound."""
        with self._changed:
            there = next((one for one in self._by_name.get(name, ()) if one.state in ACTIVE), None)
            spec = spec_of(self.settings, self._entry(name)) if there is None else there.spec
        now = self.clock()
        return self._arranger.report(there or Instance(
            id="", spec=spec, created_at=0.0, last_used=now, log_path="", seated=False), now)

    def why_no_room(self, instance: Instance) -> str | None:
        report = self._arranger.report(instance, self.clock(), may_evict=False)
        return None if report.fits else report.because

    def expected_start_s(self, name: str) -> float | None:
        """How long a start of this model, or a wake of it if it sleeps, took before; None: nobody knows."""
        with self._changed:
            there = next((one for one in self._by_name.get(name, ()) if one.state in ACTIVE), None)
            if there is not None:
                return there.wake_s if there.asleep_level else there.reload_s
            entry = entry_for(self.settings, name)
        known = None if entry is None else self.resources.known(spec_of(self.settings, entry), self.clock())
        return None if known is None else known.reload_s

    # --- life of the daemon ---------------------------------------------------------------------------------------

    def start(self) -> None:
        """Take over what an earlier daemon left: adopt the engines that run, end the rest.  Then reap what idles."""
        found = self.resources.state_dir.load()
        for instance_id in found.unreadable:
            self.resources.launcher.end_remains(instance_id, None)
        for record in found.records:
            self._take_over(record)
        with self._changed:
            self._apply_catalog()
        self.preload([entry.id for entry in self.settings.catalog.models.values() if entry.preload])
        self._run(self._reaper)

    def tick(self, now: float) -> None:
        """One round of the reaper: what is idle past its timeout sleeps if it may, and is stopped otherwise; loads
        that nobody waits for any more are given up, and what the configuration no longer has goes."""
        host_bytes = self.resources.sleep_host_bytes()
        with self._changed:
            self._give_up_loads(now)
            made = self._retire_outdated()
            for one in list(self._instances.values()):
                if one.expired(now) and not self._queued(one):
                    self._expire(one, host_bytes)
        self._begin_all(made)

    def shutdown(self, *, keep: bool, hurry: Callable[[], bool] = lambda: False,
                 alive: Callable[[], None] = lambda: None) -> None:
        """Stop all instances and wait for it; or leave them running (`keep`) for the next daemon.

        Requests in flight have had their time when this is called: they are cut.  Both callbacks are asked twice a
        second: `hurry` to kill instead of terminate, `alive` to say that it goes on.
        """
        with self._changed:
            self._closing, self._detaching = True, keep
            everyone = list(self._instances.values())
            self._changed.notify_all()
        self._reaper.stop()
        if keep:
            for one in everyone:
                self.cut_leases(one, EngineStopped("the daemon ends; send the request again when it is back"))
            for loop in self._running_loops():
                loop.stop()
        else:
            self._stop_all(hurry, alive)
        self._join([*self._running_loops(), self._reaper], alive)
        self.devices.close()

    def reconfigure(self, settings: Settings) -> list[str]:
        """Use other settings from now on; the names of those that changed.

        Running instances keep the flags they were started with, unless their entry of the catalog changed: then others
        take their place, when nobody uses them or with the next request.  What only a restart can change (FIXED) stays.
        """
        current = self.settings
        wanted = replace(settings, **{name: getattr(current, name) for name in FIXED})
        changed = [name for name in vars(wanted) if getattr(wanted, name) != getattr(current, name)]
        ignored = [name for name in FIXED if getattr(settings, name) != getattr(current, name)]
        if ignored:
            log.warning("these settings change only with a restart: %s", ", ".join(ignored))
        self.resources.use(wanted)
        with self._changed:
            self._apply_catalog()
        different = diff(current.catalog, wanted.catalog)
        self.preload([id_ for id_ in (*different.added, *different.changed) if wanted.catalog.models[id_].preload])
        return changed

    # --- a new instance -------------------------------------------------------------------------------------------

    def _touch(self, instance: Instance, timeout_s: float | None) -> None:
        """Caller holds the lock."""
        instance.last_used = self.clock()
        if timeout_s is not None:
            instance.spec = replace(instance.spec, timeout_s=timeout_s)

    def _check_names(self, spec: InstanceSpec) -> None:
        """An alias must not take another model's name.  Caller holds the lock."""
        for name in spec.names:
            for one in self._by_name.get(name, ()):
                if one.spec.model != spec.model and one.state in ACTIVE:
                    raise Conflict(f"the name {name!r} belongs to instance {one.id} of {one.spec.model}; choose "
                                   "another served_model_name", code="name_taken", param="params.served_model_name")

    def _check_room(self, replaced: int) -> None:
        """Those that are being stopped count: they hold memory still.  Caller holds the lock."""
        there = [one for one in self._instances.values() if one.seated and one.state is not State.FAILED]
        if len(there) - replaced >= self.settings.max_instances:
            stopping = sum(one.state is State.STOPPING for one in there)
            raise TooManyInstances(
                f"there are {len(there)} instances{f', {stopping} of them being stopped,' if stopping else ''} and "
                f"VLLM_MAX_INSTANCES is {self.settings.max_instances}: delete one, or raise it",
                retry_after_s=5 if stopping else None)

    def _add(self, spec: InstanceSpec, after: frozenset[str]) -> Instance:
        """Caller holds the lock."""
        instance_id, now = self._new_id(), self.clock()
        instance = Instance(id=instance_id, spec=spec, created_at=self._wall(), last_used=now, changed_at=now,
                            wanted_at=now, log_path=str(self.resources.log_path(instance_id)), after=after)
        self._register(instance)
        return instance

    def _begin(self, instance: Instance) -> None:
        """Write its record, then let its keeper start it: no engine runs that the next daemon would not find."""
        try:
            self.resources.state_dir.save(self.resources.record(self.view(instance), None, instance.state))
            self._run_keeper(instance, self._keeper(instance))
        except (OSError, RuntimeError) as error:
            with self._changed:
                self._loops.pop(instance.id, None)
                self._begin_stop(instance, Haste.KILL, "it could not be started")
                self._drop(instance, "it could not be started")
            self.resources.forget(instance.id)
            raise _not_begun(instance.spec.model, error, self.resources.state_dir) from error

    def _take_over(self, record: Record) -> None:
        """An instance of an earlier daemon goes on: with its engine if that runs, else with a new one.

        What the catalog has is not started anew: the next request for it, or its preload, will do that.
        """
        launcher, now = self.resources.launcher, self.clock()
        log_path = self.resources.log_path(record.id)
        engine = None if record.engine is None else launcher.find(record.id, record.engine, log_path)
        instance = Instance(
            id=record.id, spec=record.spec, created_at=record.created_at, last_used=now, changed_at=now,
            log_path=str(log_path), port=record.port, devices=record.devices if engine else (),
            restarts=record.restarts, pid=engine.pid if engine else None, wanted_at=now,
            runs=engine.lives if engine else lambda: False,
            grant=Plan(record.devices, None, record.memory_planned_bytes, record.because) if engine else None,
            memory_planned_bytes=record.memory_planned_bytes if engine else None, because=record.because,
            asleep_level=record.asleep_level if engine else 0, grown=record.grown, apart=record.apart,
            why="found again" if engine else "no engine of it was running; starting anew")
        if engine is not None and record.port is not None:
            self.resources.ports.take(record.id, record.port)
            if record.state in (State.STARTING, State.FALLING_ASLEEP, State.WAKING):    # its memory may be changing
                self.resources.take_turn(record.id, record.devices, now)
        with self._changed:
            self._register(instance)
            if record.state is State.STOPPING:
                self._begin_stop(instance, Haste.DRAIN, "it was being stopped")
            elif engine is None and record.spec.config_id is not None:
                self._begin_stop(instance, Haste.DRAIN, "no engine of it was running")
        log.info("%s (%s): %s", record.id, record.spec.model, instance.why)
        self._run_keeper(instance, self._keeper(
            instance, engine=engine, was=record.state,
            remains=None if engine else lambda: launcher.end_remains(record.id, record.engine)))

    # --- ends -----------------------------------------------------------------------------------------------------

    def _begin_stop(self, instance: Instance, haste: Haste, why: str) -> None:
        """Caller holds the lock, and nudges the keeper when it has let go of it: the haste may have grown."""
        instance.haste = max(instance.haste, haste)
        if instance.state is State.FAILED:
            self._drop(instance, why)
        elif instance.state in ACTIVE:
            instance.change_state(State.STOPPING, self.clock(), why)

    def _expire(self, instance: Instance, host_bytes: int) -> None:
        """Nobody wants it any more.  Caller holds the lock."""
        why = f"idle for {instance.spec.timeout_s:g} s"
        if instance.state is State.SLEEPING:
            self._begin_stop(instance, Haste.DRAIN, f"asleep for {instance.spec.stop_after_s:g} s")
        elif (instance.state is State.READY and instance.spec.sleep_level and not instance.grown
                and self._make_host_room(instance, host_bytes)):
            self._begin_sleep(instance, instance.spec.sleep_level, why, drowsy=True)
        elif instance.state in (State.READY, State.BACKOFF):
            self._counters["idle_stops"] += 1
            self._begin_stop(instance, Haste.DRAIN, why)

    def _stop_all(self, hurry: Callable[[], bool], alive: Callable[[], None]) -> None:
        haste = None
        while True:
            alive()
            wanted = Haste.KILL if hurry() else Haste.TERMINATE
            with self._changed:
                left = list(self._instances.values())
                if not left:
                    return
                if wanted is haste:
                    self._changed.wait(LOOK_S)
                    continue
                haste = wanted
                for one in left:
                    self._begin_stop(one, haste, "the daemon ends")
            for one in left:
                self._nudge(one.id)

    # --- the keepers' threads -------------------------------------------------------------------------------------

    def _keeper(self, instance: Instance, **adopted: Any) -> Keeper:
        tenancy = Tenancy(instance, self, self.resources, self._arranger)
        return Keeper(instance, self, self.resources, tenancy, **adopted)

    def _run_keeper(self, instance: Instance, keeper: Keeper) -> None:
        """Raises RuntimeError when the system has no thread left."""
        def tick(now: float) -> float | bool:
            wait_s = keeper.tick(now)
            if wait_s is False:
                with self._changed:
                    self._loops.pop(instance.id, None)
            return wait_s

        loop = Loop(name=f"keeper-{instance.id}", tick=tick, interval_s=0.1, clock=self.clock)
        with self._changed:
            if self._detaching:
                return      # its record is there: the next daemon goes on with it
            self._loops[instance.id] = loop
        self._run(loop)

    def _stir(self, instance: Instance) -> None:
        if (loop := self._loops.get(instance.id)) is not None:
            loop.wake()

    def _running_loops(self) -> list[Loop]:
        with self._changed:
            return list(self._loops.values())

    def _join(self, loops: Iterable[Loop], alive: Callable[[], None]) -> None:
        """Wait for their last ticks, which may end a process tree."""
        deadline = time.monotonic() + LAST_TICK_S
        for loop in loops:
            while not loop.join(LOOK_S) and time.monotonic() < deadline:
                alive()


def _not_begun(model: str, error: OSError | RuntimeError, state_dir: StateDir) -> ManagerError:
    if isinstance(error, RuntimeError):
        return LaunchRefused(f"{model} is not started: the system grants no thread more ({error}); check the limits of "
                             "processes (ulimit -u, pids.max) and of memory")
    return ManagerError(f"{model} is not started: {error.strerror or error}; check {state_dir.path} (STATE_DIR)",
                        code="state_dir")


def _other_params(active: Instance, spec: InstanceSpec) -> str:
    return (f"{spec.model} is active as instance {active.id} with other params "
            f"({', '.join(differences(active.spec, spec))}): send \"replace\": true to drain it and start anew with "
            "these, or \"new\": true for one more replica")
