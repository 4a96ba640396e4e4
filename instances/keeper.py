"""Moves one instance through its life.  The only place that does an instance's I/O; each keeper has its own thread.

`tick(now)` looks at the state that the registry shows and takes the next small step; decisions that others must see
go back through the registry, which may refuse them when the state has moved on meanwhile.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path

from errors import DaemonError, EngineDied, EngineStopped, NoRoom
from instances import probe, problems, sleeping
from instances.instance import SERVED, UNTOLD, Haste, Instance, Problem, State
from instances.launcher import Engine, LaunchSpec
from instances.log_file import prune_logs, read_tail
from instances.resources import LOGS_KEPT, Resources
from instances.rooms import Rooms
from instances.sleeping import Talk
from instances.sockets import Listener
from instances.start_watch import StartWatch
from instances.store import Record
from instances.tenancy import Tenancy
from instances.watchdog import HUNG, Watchdog

log = logging.getLogger("vllm_server.keeper")

STEP_S = {State.STARTING: 0.1, State.READY: 0.25, State.FALLING_ASLEEP: 0.02, State.SLEEPING: 0.25,
          State.WAKING: 0.02, State.BACKOFF: 0.1, State.STOPPING: 0.05}
SEEK_STEP_S = 0.25          # while it seeks room: all devices are read each time
WAIT_STEP_S = 0.1           # while it waits for memory to come free, or for its turn
HOUSEKEEPING_S = 5.0
LAST_WORDS_S = 1.0          # a dying API server tells its clients within 0.1 s; then it is ended
CUT_WAIT_S = 2.0            # for request threads to let go of a connection that was cut
SETTLE_S = 0.5              # vLLM aborts a request 0.06 s after its client has left; SIGTERM must not come sooner
TURN_PATIENCE_S = 30.0      # a stop waits so long for another instance to be done on the same GPU
ADOPTED_READY_S = 30.0      # an engine that served before and is silent now is restarted after so long
MEMORY_STEP_S = 1.0         # an engine that is killed with its resource tracker while it loads leaves no more than this
MEASURE_S = 30.0            # the kernel counts an engine's pages for it, 0.1 s of work that holds the engine up


class Keeper:
    """`tick` returns the seconds until it wants to be called again, or False when there is nothing left to keep.

    `engine` is one that an earlier daemon left running and `was` the state it was in; `remains` ends what such a
    daemon left of an engine that does not run any more.
    """

    def __init__(self, instance: Instance, registry: Rooms, resources: Resources, tenancy: Tenancy, *,
                 engine: Engine | None = None, was: State = State.STARTING,
                 remains: Callable[[], object] | None = None) -> None:
        self._instance = instance
        self._registry = registry
        self._resources = resources
        self._tenancy = tenancy
        self._engine = engine
        self._was = was
        self._served = engine is not None and was in SERVED
        self._told = engine is not None and was in UNTOLD       # to do what its state says
        self._remains = remains
        self._holds_nothing = False         # no process, port or turn, and no request on its connections
        self._waits = False
        self._avoid: set[int] = set()       # ports that it could not use
        self._saved: Record | None = None
        self._save_at = self._housekeeping_at = self._measure_at = self._memory_at = 0.0
        self._cut_at: float | None = None
        self._drained_at: float | None = None
        self._term_at: float | None = None
        self._health: probe.Probe | None = None
        self._watchdog: Watchdog | None = None
        self._talk: Talk | None = None
        self._woken_at = 0.0
        self._follow_start(registry.clock(), ADOPTED_READY_S if self._served else instance.spec.start_timeout_s)

    def tick(self, now: float) -> float | bool:
        if self._remains is not None:
            self._remains()
            self._remains = None
        steps: dict[State, Callable[[float], object]] = {
            State.STARTING: self._start, State.READY: self._watch, State.FALLING_ASLEEP: self._fall_asleep,
            State.SLEEPING: self._rest, State.WAKING: self._wake_up, State.BACKOFF: self._back_off,
            State.STOPPING: self._stop}
        state = self._instance.state
        self._waits = False
        if state in steps:
            steps[state](now)
        else:   # failed, or failed and already deleted: its cause stays listed, but the next daemon need not know it
            self._end_processes(self._death())
            self._let_go()
            self._resources.forget(self._instance.id)
            return False
        if self._instance.state is State.STOPPED:
            return False
        self._save(now)
        if self._waits:
            return SEEK_STEP_S if self._instance.grant is None else WAIT_STEP_S
        return STEP_S.get(self._instance.state, 0.0)

    def _save(self, now: float) -> None:
        """Make the record on disk say what is.  If it cannot be written, what serves goes on serving."""
        engine = self._engine.record if self._engine is not None else None
        record = self._resources.record(self._registry.view(self._instance), engine, self._engine_state())
        if record == self._saved or now < self._save_at:
            return
        try:
            self._resources.state_dir.save(record)
        except OSError as error:
            log.error("%s: its record cannot be written: %s", self._instance.id, error)
            self._save_at = now + HOUSEKEEPING_S
        else:
            self._saved = record

    def _engine_state(self) -> State:
        """What its engine does, which is what the next daemon must know of it."""
        state = self._instance.state
        if state is State.STARTING and self._served and self._engine is not None:
            return self._was        # found again, and not asked yet
        return state if self._told else UNTOLD.get(state, state)

    # --- starting -------------------------------------------------------------------------------------------------

    def _follow_start(self, now: float, limit_s: float) -> None:
        """Watch an engine's start from now on; it has `limit_s` seconds."""
        self._start_watch = StartWatch(self._instance.spec, Path(self._instance.log_path),
                                       self._resources.environment, now, limit_s)

    def _start(self, now: float) -> None:
        if self._engine is None:
            self._launch(now)
            return
        watch = self._start_watch
        watch.look(now, self._resources.settings.instance_log_bytes)
        if now >= self._memory_at:
            self._memory_at = now + MEMORY_STEP_S
            self._engine.note_memory()
        self._registry.note_phase(self._instance, watch.phase, watch.progress)
        if not self._engine.running():
            self._fail_start()
        elif self._health_answers():
            self._become_ready(now)
        elif watch.late(now):
            self._fail(watch.lateness(permanent=not self._served))

    def _launch(self, now: float) -> None:
        if self._registry.waits_for_old(self._instance):
            self._registry.note_phase(self._instance, "waiting_for_old_instance")
            return
        self._holds_nothing = False
        try:
            if not self._tenancy.enter(now):
                self._waits = True
                return
        except NoRoom as error:
            self._registry.lose_room(self._instance, problems.of_launch(self._instance.spec.model, error))
            self._waits = True
            return
        try:
            self._engine = self._run_engine()
        except (DaemonError, OSError) as error:
            self._fail(problems.of_launch(self._instance.spec.model, error))
            return
        self._served = False
        self._registry.note_process(self._instance, self._engine.pid, self._engine.lives)
        log.info("%s (%s): launched, pid %d, port %s", self._instance.id, self._instance.spec.model, self._engine.pid,
                 self._instance.port)
        self._follow_start(now, self._instance.spec.start_timeout_s)
        prune_logs(Path(self._instance.log_path).parent, LOGS_KEPT, self._registry.log_paths())

    def _run_engine(self) -> Engine:
        """Raises DaemonError and OSError."""
        instance, resources, plan = self._instance, self._resources, self._instance.grant
        assert plan is not None
        port = resources.reserve_port(instance.id, instance.port, self._avoid)
        self._registry.note_port(instance, port)
        return resources.launcher.launch(LaunchSpec(
            instance_id=instance.id, argv=resources.command_line(instance.spec, port, plan.keep),
            env=resources.engine_environment(instance.spec, plan.visible), log_path=Path(instance.log_path)))

    def _health_answers(self) -> bool:
        assert self._instance.port is not None
        if self._health is None:
            self._health = probe.health(self._instance.port)
        answer = self._health.poll()
        if answer is None:
            return False
        self._health = None
        return answer.status == 200

    def _become_ready(self, now: float) -> None:
        assert self._engine is not None and self._instance.port is not None
        if (problem := self._check_listener(self._engine, self._instance.port)) is not None:
            self._fail(problem)
            return
        answer = probe.wait(probe.models(self._instance.port))
        names = tuple(probe.model_names(answer.body)) if answer is not None else ()
        state = self._adopted_state() if self._served else State.READY
        self._engine.watch_core()
        self._learn_start(now)
        if not self._served:
            self._save(now)     # its shared memory is on record before anybody knows it as ready
        self._served = True
        self._watch_ready()
        if state in (State.READY, State.SLEEPING):
            self._tenancy.end_turn()
        self._registry.became_ready(self._instance, names, self._start_watch.facts(), state)

    def _learn_start(self, now: float) -> None:
        """Only of starts: of an engine that an earlier daemon left nobody knows when it began."""
        held, began_at = self._measure(now), self._instance.launched_at
        if self._served:
            self._tenancy.recall(self._start_watch.facts(), now)
        else:
            seconds = None if began_at is None or self._start_watch.downloaded else now - began_at
            self._tenancy.learn_start(held, self._start_watch.facts(), seconds, now)

    def _adopted_state(self) -> State:
        """What the engine of an earlier daemon does; one that was told to sleep or to wake is told so again."""
        if self._told:
            return self._was
        assert self._instance.port is not None
        asleep = self._instance.spec.sleep_level and sleeping.is_asleep(self._instance.port)
        return State.SLEEPING if asleep else State.READY

    def _watch_ready(self) -> None:
        """It serves from now on: look after it."""
        assert self._instance.port is not None
        now = self._registry.clock()
        self._stop_watchdog()
        self._housekeeping_at = now + HOUSEKEEPING_S
        self._watchdog = Watchdog(self._instance.port, self._instance.spec.names[0], now)

    def _check_listener(self, engine: Engine, port: int) -> Problem | None:
        """Health was answered: by this engine, and to this machine only?"""
        found = engine.listener(port)
        if found is Listener.STRANGER:
            self._avoid.add(port)
        return problems.of_listener(self._instance.spec.model, port, found)

    def _fail_start(self) -> None:
        assert self._engine is not None
        problem = self._start_watch.cause(self._engine.exit_code())
        if problem.code == "port_in_use" and self._instance.port is not None:
            self._avoid.add(self._instance.port)
        log.warning("%s (%s): %s", self._instance.id, self._instance.spec.model, problem.message)
        self._registry.start_failed(self._instance, problem, fixed=self._instance.spec.flags.keys())

    # --- ready ----------------------------------------------------------------------------------------------------

    def _watch(self, now: float) -> bool:
        """Whether all is well with it."""
        assert self._watchdog is not None
        if not self._lives(now):
            return False
        settings = self._resources.settings
        verdict = self._watchdog.look(now, last_success=self._instance.last_success,
                                      interval_s=settings.probe_interval_s, timeout_s=settings.probe_timeout_s)
        if verdict is not None and verdict in HUNG:
            self._fail(problems.hung(self._instance.spec.model, verdict.value, settings.probe_timeout_s))
        elif verdict is not None:
            self._died(verdict.value)
        return verdict is None

    def _lives(self, now: float) -> bool:
        """Whether its processes are all there; then its log and its figures are kept, too."""
        assert self._engine is not None
        if not self._engine.running():
            self._died(f"its server process {self._engine.pid} ended (exit code {self._engine.exit_code()})")
            return False
        if (dead := self._engine.dead_core()) is not None:
            self._died(f"its engine process {dead} ended")
            return False
        if now >= self._housekeeping_at:
            self._housekeeping_at = now + HOUSEKEEPING_S
            self._start_watch.reader.trim(self._resources.settings.instance_log_bytes)
        if now >= self._measure_at:
            self._measure(now)
        return True

    def _measure(self, now: float) -> Mapping[int, int] | None:
        assert self._engine is not None
        self._measure_at = now + MEASURE_S
        return self._tenancy.measure(self._engine.pids(), now)

    def _died(self, what: str) -> None:
        self._fail(problems.of_death(self._instance.spec.model, what, read_tail(Path(self._instance.log_path))))

    # --- asleep, and on the way there and back --------------------------------------------------------------------

    def _fall_asleep(self, now: float) -> None:
        """Drain, wait for the turn, and tell it to sleep: from then on there is only one way."""
        instance = self._instance
        if self._talk is None:
            self._watch(now)    # who is in flight may depend on it
            if instance.state is not State.FALLING_ASLEEP or self._drains_for_sleep(now):
                return
            assert self._watchdog is not None and instance.port is not None
            self._watchdog.ask_health_alone()
            self._tenancy.falls_asleep(adopted=self._told)
            self._tell(now)
            self._registry.note_phase(instance, "falling_asleep")
            self._talk = Talk(sleeping.put_to_sleep(
                instance.port, instance.asleep_level, self._tenancy.settled()), now)
        elif not self._watch(now):
            return
        if not self._talk.poll(now):
            return
        problem = self._talk.problem
        self._stop_talk()
        if problem is None:
            assert self._engine is not None
            problem = self._tenancy.fell_asleep(self._engine.pids(), now)
        self._tenancy.end_turn()
        if problem is None:
            self._registry.fell_asleep(instance)
        else:
            self._registry.sleep_failed(instance, problems.no_sleep(instance.spec.model, problem))

    def _drains_for_sleep(self, now: float) -> bool:
        """Whether it cannot be told yet, or not any more: a request may have come before it was."""
        if self._instance.leases:
            self._registry.note_phase(self._instance, "draining")
            return True
        self._waits = not self._tenancy.take_turn(now)
        if not self._waits and self._registry.may_fall_asleep(self._instance):
            return False
        if self._instance.state is State.READY:
            self._tenancy.end_turn()
        return True

    def _rest(self, now: float) -> bool:
        """Whether all is well with a sleeper, or one that is to wake."""
        assert self._watchdog is not None
        self._watchdog.ask_health_alone()
        return self._watch(now)

    def _wake_up(self, now: float) -> None:
        instance = self._instance
        if not self._rest(now):
            return
        if self._talk is None:
            try:
                # One that an earlier daemon told to wake has taken some of its room, or all.
                enter = self._tenancy.take_turn if self._told else self._tenancy.enter
                self._waits = not enter(now)
            except NoRoom as error:
                self._registry.lose_room(instance, Problem(error.code, error.message, status=error.status))
                return
            if self._waits or instance.state is not State.WAKING:
                return
            self._tell(now)
            self._woken_at = now
            assert instance.port is not None
            self._registry.note_phase(instance, "waking")
            self._talk = Talk(sleeping.wake_up(
                instance.port, instance.spec.names[0], instance.asleep_level, self._tenancy.settled(),
                self._resources.settings.probe_timeout_s), now)
        if not self._talk.poll(now):
            return
        problem = self._talk.problem
        self._stop_talk()
        if problem is None:
            self._measure(now)
            self._tenancy.woke(now - self._woken_at, now)
            self._watch_ready()
            self._tenancy.end_turn()
            self._registry.woke(instance)
        else:
            self._registry.wake_failed(instance, problems.no_wake(instance.spec.model, problem))

    def _tell(self, now: float) -> None:
        """From here on it may do so: a daemon that finds it must know."""
        self._told = True
        self._save(now)

    def _stop_watchdog(self) -> None:
        if self._watchdog is not None:
            self._watchdog.close()
            self._watchdog = None

    def _stop_talk(self) -> None:
        if self._talk is not None:
            self._talk.close()
        self._talk, self._told = None, False

    # --- failing --------------------------------------------------------------------------------------------------

    def _fail(self, problem: Problem) -> None:
        log.warning("%s (%s): %s", self._instance.id, self._instance.spec.model, problem.message)
        self._registry.record_problem(self._instance, problem)

    def _back_off(self, now: float) -> None:
        if not self._holds_nothing:
            dying = self._served and self._instance.leases and self._engine is not None and self._engine.running()
            if dying and now - self._instance.changed_at < LAST_WORDS_S:
                return
            if not self._end_processes(self._death()) or self._asks_who_has_its_room(now):
                return      # what cannot be killed holds its memory: a new one would fail
            self._let_go()
        self._registry.restart_if_due(self._instance)

    def _asks_who_has_its_room(self, now: float) -> bool:
        """Whether it is not clear yet why a start ran out of memory: if strangers came, it was not too large."""
        if self._instance.squeeze is None:
            return False
        if (robbed := self._tenancy.robbed(now)):
            self._registry.was_robbed(self._instance)
        return robbed is None

    def _death(self) -> DaemonError:
        """What requests in flight are told of it."""
        problem = self._instance.last_error
        return EngineDied("the engine died") if problem is None else EngineDied(problem.message, code=problem.code)

    def _end_processes(self, error: DaemonError) -> bool:
        """The tree, and what waits on it; whether all of it is gone."""
        if self._health is not None:
            self._health.close()
            self._health = None
        self._stop_watchdog()
        self._stop_talk()
        self._registry.cut_leases(self._instance, error)
        gone = self._engine is None or self._engine.destroy()
        if gone or self._instance.state is not State.BACKOFF:
            self._engine = None
        return gone

    def _let_go(self) -> None:
        self._registry.note_ended(self._instance)
        self._tenancy.release()
        self._holds_nothing = True

    # --- stopping -------------------------------------------------------------------------------------------------

    def _stop(self, now: float) -> None:
        """Drain, cut, SIGTERM, SIGKILL: each step only when the one before is over."""
        self._stop_talk()
        if self._drains_patiently(now):
            return
        self._stop_watchdog()
        if self._drains(now):
            return
        if self._engine is not None and self._instance.haste <= Haste.DRAIN:
            self._tenancy.begin_to_leave(now)
        if self._settles(now) or self._terminates(now):
            return
        instance = self._instance
        self._end_processes(EngineStopped(f"instance {instance.id} of {instance.spec.model} was stopped"))
        if instance.haste <= Haste.DRAIN and not self._tenancy.left(now):
            return      # a start that was promised this memory waits for it
        self._let_go()
        self._resources.forget(instance.id)
        self._registry.drop(instance)

    def _drains_patiently(self, now: float) -> bool:
        """Whether requests in flight may take as long as they like; not in an engine that is dead or hangs."""
        instance = self._instance
        if instance.haste is not Haste.PATIENT or not instance.leases:
            return False
        if self._watchdog is not None:
            self._watch(now)
        return instance.haste is Haste.PATIENT

    def _drains(self, now: float) -> bool:
        """Whether requests in flight have to be waited for still."""
        instance = self._instance
        if not instance.leases:
            return False
        if instance.haste <= Haste.DRAIN and now - instance.changed_at < self._resources.settings.drain_timeout_s:
            return True
        # An engine that gets SIGTERM with a connection open never ends: ours are closed first.
        if self._cut_at is None:
            self._cut_at = now
        self._registry.cut_leases(instance, EngineStopped(
            f"instance {instance.id} of {instance.spec.model} is being stopped ({instance.why})"))
        return instance.haste is not Haste.KILL and bool(instance.leases) and now - self._cut_at < CUT_WAIT_S

    def _settles(self, now: float) -> bool:
        """Whether the engine may still be busy with requests that were broken off: SIGTERM would hang it for ever."""
        if self._instance.haste is Haste.KILL or not self._served:
            return False
        return any(at is not None and now - at < SETTLE_S for at in (self._cut_at, self._instance.last_broken))

    def _terminates(self, now: float) -> bool:
        """Whether an engine that serves is on its way out still; one that loads swallows SIGTERM and is killed."""
        engine, haste = self._engine, self._instance.haste
        if engine is None or not self._served or haste is Haste.KILL or not engine.running():
            return False
        if self._term_at is None:
            if self._drained_at is None:
                self._drained_at = now
            if (haste <= Haste.DRAIN and now - self._drained_at < TURN_PATIENCE_S
                    and not self._tenancy.take_turn(now)):
                return True
            engine.terminate()
            self._term_at = now
        if now - self._term_at < (limit_s := self._resources.settings.stop_timeout_s):
            return True
        log.warning("%s: still there %g s after SIGTERM; killing it", self._instance.id, limit_s)
        return False
