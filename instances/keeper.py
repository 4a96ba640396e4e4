"""Moves one instance through its life.  The only place that does an instance's I/O; each keeper has its own thread.

`tick(now)` looks at the state that the registry shows and takes the next small step; decisions that others must see
go back through the registry, which may refuse them when the state has moved on meanwhile.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from errors import DaemonError, EngineDied, EngineStopped, NoRoom
from instances import downloads, probe
from instances.instance import Instance, Problem, State
from instances.launcher import Engine, LaunchSpec, prune_logs, trim_log
from instances.startup_log import StartupLog

if TYPE_CHECKING:
    from instance_manager import InstanceManager

log = logging.getLogger("vllm_server.keeper")

STARTING_STEP_S = 0.1
READY_STEP_S = 0.25
STOPPING_STEP_S = 0.05
HOUSEKEEPING_S = 5.0
LAST_WORDS_S = 1.0          # a dying API server tells its clients within 0.1 s; then it is ended
CUT_WAIT_S = 2.0            # for request threads to let go of a connection that was cut
ADOPTED_READY_S = 30.0      # an engine that served before and is silent now is restarted after so long
DOWNLOAD_LOOK_S = 2.0
LOGS_KEPT = 50
TAIL_BYTES = 1 << 16


class LogReader:
    """Reads what was added to a log since the last time; begins anew where the file was trimmed."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._position = 0

    def read(self) -> str:
        try:
            with open(self._path, "rb") as file:
                if file.seek(0, 2) < self._position:
                    self._position = 0
                file.seek(self._position)
                data = file.read(1 << 20)
                self._position += len(data)
        except OSError:
            return ""
        return data.decode("utf-8", "replace")


class Keeper:
    """`tick` returns the seconds until it wants to be called again, or False when the instance is gone."""

    def __init__(self, instance: Instance, registry: InstanceManager, *,
                 engine: Engine | None = None, served_before: bool = False) -> None:
        self._instance = instance
        self._registry = registry
        self._engine = engine
        self._served = served_before
        self._begin_watch(registry.clock())
        if engine is not None and served_before:
            self._deadline = registry.clock() + ADOPTED_READY_S
        self._cleaned_at = self._probed_at = registry.clock()
        self._term_at: float | None = None
        self._cut_at: float | None = None

    def tick(self, now: float) -> float | bool:
        steps: Mapping[State, tuple[Callable[[float], None], float]] = {
            State.STARTING: (self._start, STARTING_STEP_S), State.READY: (self._watch, READY_STEP_S),
            State.BACKOFF: (self._back_off, STARTING_STEP_S), State.STOPPING: (self._stop, STOPPING_STEP_S),
        }
        state = self._instance.state
        if state not in steps:  # failed, or a failed one that was deleted before this tick
            self._clean_up(EngineDied(self._instance.why))
            self._registry.keeper_ended(self._instance)
            return False
        step, interval_s = steps[state]
        step(now)
        return interval_s

    # --- starting -------------------------------------------------------------------------------------------------

    def _begin_watch(self, now: float) -> None:
        self._log = StartupLog()
        self._reader = LogReader(Path(self._instance.log_path))
        self._download = downloads.DownloadWatch(
            downloads.cache_folder(self._instance.spec.model, self._registry.engine_environment(None)), now)
        self._looked_at = now
        self._deadline = now + self._instance.spec.start_timeout_s
        self._health: probe.Probe | None = None
        self._question: probe.Probe | None = None
        self._question_is_health = True
        self._inference_path: str | None = None
        self._tokens: float | None = None

    def _start(self, now: float) -> None:
        if self._engine is None:
            self._launch(now)
            return
        self._log.feed(self._reader.read())
        phase = self._watch_download(now)
        self._registry.update(self._instance, phase=phase, progress=self._log.progress)
        if not self._engine.running():
            self._log.feed(self._reader.read())
            self._fail_start()
        elif self._health_answers():
            self._become_ready()
        elif now >= self._deadline:
            self._fail(Problem(
                "start_timeout", f"{self._instance.spec.model} was not ready within "
                f"{self._instance.spec.start_timeout_s:g} s (it hung in phase {phase}); its log tells more, and "
                "start_timeout in the request or START_TIMEOUT gives it longer", status=504))

    def _launch(self, now: float) -> None:
        instance, registry = self._instance, self._registry
        if waits_for := registry.blocked_by(instance):
            registry.update(instance, phase=waits_for)
            return
        try:
            plan = registry.place(instance)
            port = registry.reserve_port(instance)
            spec = LaunchSpec(instance_id=instance.id, argv=registry.command_line(instance, port),
                              env=registry.engine_environment(plan.visible), log_path=Path(instance.log_path))
            registry.save(instance, None)
            self._engine = registry.launcher.launch(spec)
        except OSError as error:
            self._fail(Problem("state_dir", f"{instance.spec.model} is not started, its record cannot be written: "
                                            f"{error.strerror or error} (STATE_DIR)", status=503))
            return
        except DaemonError as error:
            self._fail(Problem(error.code, error.message, status=error.status,
                               permanent=not isinstance(error, NoRoom) or error.code == "not_enough_gpus"))
            return
        registry.update(instance, pid=self._engine.pid, phase="starting", progress=0.0)
        registry.save(instance, self._engine.record)
        self._served = False
        self._begin_watch(now)
        prune_logs(Path(instance.log_path).parent, LOGS_KEPT, registry.log_paths())

    def _watch_download(self, now: float) -> str:
        if now - self._looked_at >= DOWNLOAD_LOOK_S:
            self._looked_at = now
            self._deadline += self._download.look(now)
        return "downloading" if self._download.growing(now) else self._log.phase

    def _health_answers(self) -> bool:
        assert self._instance.port is not None
        if self._health is None:
            self._health = probe.health(self._instance.port)
        answer = self._health.poll()
        if answer is None:
            return False
        self._health = None
        return answer.status == 200

    def _become_ready(self) -> None:
        assert self._engine is not None and self._instance.port is not None
        names = self._ask_names(self._instance.port)
        self._engine.watch_core()
        self._served = True
        self._probed_at = self._registry.clock()
        self._measure()
        self._registry.became_ready(self._instance, names=names, facts=self._log.facts)
        self._registry.save(self._instance, self._engine.record)

    def _ask_names(self, port: int) -> tuple[str, ...]:
        question = probe.models(port)
        answer = probe.wait(question)
        return tuple(probe.model_names(answer.body)) if answer is not None else ()

    def _fail_start(self) -> None:
        assert self._engine is not None
        cause = self._log.cause(self._engine.exit_code(), self._instance.spec.model)
        self._fail(Problem(cause.code, cause.message, cause.detail, cause.status, cause.permanent, cause.suggestion))

    # --- ready ----------------------------------------------------------------------------------------------------

    def _watch(self, now: float) -> None:
        assert self._engine is not None
        if not self._engine.running():
            self._died(f"its server process {self._engine.pid} ended (exit code {self._engine.exit_code()})")
        elif (dead := self._engine.dead_core()) is not None:
            self._died(f"its engine process {dead} ended")
        else:
            if now - self._cleaned_at >= HOUSEKEEPING_S:
                self._cleaned_at = now
                trim_log(Path(self._instance.log_path), self._registry.settings.instance_log_bytes)
                self._measure()
            self._probe(now)

    def _measure(self) -> None:
        assert self._engine is not None
        self._registry.measure(self._instance, self._engine.pids())

    def _died(self, what: str) -> None:
        tail = StartupLog()
        tail.feed(read_tail(Path(self._instance.log_path)))
        cause = tail.cause(None, self._instance.spec.model)
        known = "" if cause.code == "exited" else f": {cause.detail or cause.message}"
        self._fail(Problem("engine_died", f"the engine of {self._instance.spec.model} died, {what}{known}",
                           cause.detail))

    def _probe(self, now: float) -> None:
        """Find an engine that hangs: health first, then a real request, unless real requests are being answered."""
        interval_s = self._registry.settings.probe_interval_s
        if self._question is not None:
            self._read_question(now)
        elif interval_s > 0 and now - max(self._probed_at, self._instance.last_success) >= interval_s:
            self._ask(now, is_health=True)

    def _ask(self, now: float, *, is_health: bool) -> None:
        assert self._instance.port is not None
        port = self._instance.port
        if not is_health and self._inference_path is None:
            self._inference_path = next(iter(probe.INFERENCE))
        self._question_is_health = is_health
        if is_health or not self._inference_path:
            self._question = probe.health(port)
        else:
            # Under load a probe may queue for long: then the tokens made meanwhile tell busy from hung.
            self._tokens = self._tokens_done(port) if self._instance.leases else None
            self._question = probe.inference(port, self._instance.names[0], self._inference_path)
        self._probed_at = now

    def _read_question(self, now: float) -> None:
        assert self._question is not None
        answer = self._question.poll()
        if answer is None:
            if now - self._probed_at >= self._registry.settings.probe_timeout_s:
                self._close_question()
                self._judge_silence(now)
            return
        self._close_question()
        if self._question_is_health and answer.status == 503:
            self._died("it reports that its engine is dead")
        elif self._question_is_health and self._inference_path != "":
            self._ask(now, is_health=False)
        elif not self._question_is_health and answer.status in (400, 404) and self._inference_path:
            self._next_inference_path(now)
        self._probed_at = now

    def _next_inference_path(self, now: float) -> None:
        """This runner has no such route: ask in the next way, or be content with health ('')."""
        paths = list(probe.INFERENCE)
        index = paths.index(self._inference_path or paths[0]) + 1
        self._inference_path = paths[index] if index < len(paths) else ""
        if self._inference_path:
            self._ask(now, is_health=False)

    def _judge_silence(self, now: float) -> None:
        """Nothing came back in time: it hangs, unless other requests were answered or tokens were made meanwhile."""
        assert self._instance.port is not None
        if self._instance.last_success > self._probed_at:
            return
        if self._tokens is not None and self._tokens_done(self._instance.port) not in (None, self._tokens):
            return
        self._fail(Problem(
            "engine_hung", f"the engine of {self._instance.spec.model} hangs: a small request was not answered within "
            f"{self._registry.settings.probe_timeout_s:g} s and no tokens were made meanwhile; it is restarted"))

    def _tokens_done(self, port: int) -> float | None:
        answer = probe.wait(probe.metrics(port))
        return probe.tokens_done(answer.body) if answer is not None and answer.status == 200 else None

    def _close_question(self) -> None:
        if self._question is not None:
            self._question.close()
            self._question = None

    # --- failing --------------------------------------------------------------------------------------------------

    def _fail(self, problem: Problem) -> None:
        log.warning("%s (%s): %s", self._instance.id, self._instance.spec.model, problem.message)
        self._registry.record_problem(self._instance, problem)

    def _back_off(self, now: float) -> None:
        dying = self._engine is not None and self._served and self._engine.running() and self._instance.leases
        if dying and now - self._instance.changed_at < LAST_WORDS_S:
            return
        if self._engine is not None:
            problem = self._instance.last_error
            self._clean_up(EngineDied(problem.message if problem else "the engine died"))
            self._registry.save(self._instance, None)
        self._registry.restart_if_due(self._instance)

    def _clean_up(self, error: DaemonError) -> None:
        """End the tree and what waits on it; afterwards the device and the port are free."""
        self._close_question()
        if self._health is not None:
            self._health.close()
            self._health = None
        self._registry.cut_leases(self._instance, error)
        if self._engine is not None:
            self._engine.destroy()
            self._engine = None
        self._registry.release_resources(self._instance)

    # --- stopping -------------------------------------------------------------------------------------------------

    def _stop(self, now: float) -> None:
        instance, engine = self._instance, self._engine
        force = instance.force_stop
        self._close_question()
        if instance.leases and not force and now - instance.changed_at < self._registry.settings.drain_timeout_s:
            return
        if instance.leases:
            # An engine that gets SIGTERM with a connection open never ends: ours are closed first.
            self._cut_at = self._cut_at or now
            self._registry.cut_leases(instance, EngineStopped(
                f"instance {instance.id} of {instance.spec.model} is being stopped ({instance.why})"))
            if now - self._cut_at < CUT_WAIT_S:
                return
        if engine is not None and self._served and not force and engine.running():
            if self._term_at is None:
                if self._registry.must_wait_for_turn(instance):
                    return
                self._term_at = now
                engine.terminate()
            if now - self._term_at < (grace_s := self._registry.settings.stop_timeout_s):
                return
            log.warning("%s: still there %g s after SIGTERM; killing it", instance.id, grace_s)
        self._clean_up(EngineStopped(f"instance {instance.id} of {instance.spec.model} was stopped"))
        self._registry.finished(instance)  # the next tick ends this keeper


def read_tail(path: Path, limit_bytes: int = TAIL_BYTES) -> str:
    try:
        with open(path, "rb") as file:
            file.seek(max(0, file.seek(0, 2) - limit_bytes))
            return file.read().decode("utf-8", "replace")
    except OSError:
        return ""
