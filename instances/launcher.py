"""Starts, finds again and ends the process trees of engines.  The only place that uses subprocess.

An engine runs in a session of its own, so that the daemon's Ctrl-C does not reach it and every process of it can be
found by session id.  Its output goes straight into a file: the engine outlives a daemon that dies, and the next
daemon reads on where the log stands.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from errors import ManagerError
from instances import processes
from instances.processes import Process

log = logging.getLogger("vllm_server.launcher")

KEEP_AFTER_TRIM = 4  # a log past its bound is cut down to a quarter of it


def wait_until(predicate: Callable[[], bool], timeout_s: float, step_s: float = 0.02) -> bool:
    """Poll; blocks at most `timeout_s` seconds."""
    deadline = time.monotonic() + timeout_s
    while not predicate():
        if time.monotonic() >= deadline:
            return False
        time.sleep(step_s)
    return True


@dataclass(frozen=True)
class LaunchSpec:
    instance_id: str
    argv: Sequence[str]
    env: Mapping[str, str]
    log_path: Path


@dataclass(frozen=True)
class EngineRecord:
    """What must be on disk to find an engine again, or to end what is left of it."""

    pid: int
    started_ticks: int
    boot_id: str
    run_dir: str


class LaunchError(ManagerError):
    status, code = 500, "engine_not_found"


class Engine:
    """A process tree that runs: a child of this daemon, or one that an earlier daemon left."""

    def __init__(self, *, instance_id: str, record: EngineRecord, log_path: Path,
                 child: subprocess.Popen[bytes] | None) -> None:
        self.instance_id = instance_id
        self.record = record
        self.log_path = log_path
        self._child = child
        self._leader = Process(pid=record.pid, parent=0, session=record.pid,
                               started_ticks=record.started_ticks, zombie=False)
        self._core: list[Process] = []

    @property
    def pid(self) -> int:
        return self.record.pid

    def running(self) -> bool:
        """Whether the API server, the process that was started, is alive."""
        if self._child is not None:
            return self._child.poll() is None
        return self._leader.alive()

    def exit_code(self) -> int | None:
        """None while it runs, and of an adopted engine for ever: only a parent learns it."""
        return self._child.poll() if self._child is not None else None

    def pids(self) -> list[int]:
        return [member.pid for member in processes.session_members(self.pid)]

    def watch_core(self) -> None:
        """Remember the processes behind the API server (EngineCore, workers), as they are once it is ready."""
        self._core = [member for member in processes.session_members(self.pid)
                      if member.pid != self.pid and f"{self.instance_id}::" in processes.command_line(member.pid)]

    def dead_core(self) -> int | None:
        """The pid of an engine process that has died, if one has: the API server would notice only seconds later."""
        return next((member.pid for member in self._core if not member.alive()), None)

    def terminate(self) -> None:
        """SIGTERM to the API server alone: it ends its own tree.  It hangs if a request is in flight (close first)."""
        processes.send_signal(self._leader, signal.SIGTERM)

    def destroy(self) -> bool:
        """End everything that is left of it and remove what it leaves behind.  Blocks, at most about 17 s.

        True when no process of it is left.
        """
        gone = processes.kill_session(self.pid, wait=self._wait, accept=self._is_ours)
        if self._child is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._child.wait(5.0)
        shutil.rmtree(self.record.run_dir, ignore_errors=True)
        if not gone:
            log.error("%s: processes of session %d survive SIGKILL (a driver that hangs?)", self.instance_id, self.pid)
        return gone

    def _wait(self, predicate: Callable[[], bool], timeout_s: float) -> bool:
        def reaped() -> bool:
            self.exit_code()  # a zombie child of ours would be counted as alive by nobody, but must be reaped
            return predicate()
        return wait_until(reaped, timeout_s)

    def _is_ours(self, members: list[Process]) -> bool:
        """A session id that an unrelated session has got since must not be killed."""
        if self._child is not None or self._leader.alive():
            return True
        if any(member.pid == self.pid or member.started_ticks < self.record.started_ticks for member in members):
            return False
        return any(f"{self.instance_id}::" in processes.command_line(member.pid) for member in members) or all(
            processes.is_resource_tracker(member.pid) for member in members)


class Launcher:
    """Makes engines out of launch specs and out of records."""

    def launch(self, spec: LaunchSpec) -> Engine:
        """Start the tree.  Raises LaunchError when the command cannot be run."""
        run_dir = tempfile.mkdtemp(prefix="vllm-server-")  # short on purpose: socket paths end at 107 bytes
        env = {**spec.env, **engine_environment(spec.instance_id, run_dir)}
        spec.log_path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open_log(spec.log_path) as output:
                child = subprocess.Popen(
                    list(spec.argv), stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=env,
                    start_new_session=True)
        except OSError as error:
            shutil.rmtree(run_dir, ignore_errors=True)
            raise LaunchError(f"the engine's command {spec.argv[0]!r} cannot be run: {error.strerror or error}; "
                              "set VLLM_COMMAND to the vllm program") from error
        leader = processes.read_process(child.pid)
        ticks = leader.started_ticks if leader is not None else 0
        record = EngineRecord(pid=child.pid, started_ticks=ticks, boot_id=processes.boot_id(), run_dir=run_dir)
        return Engine(instance_id=spec.instance_id, record=record, log_path=spec.log_path, child=child)

    def adopt(self, instance_id: str, record: EngineRecord, log_path: Path) -> Engine | None:
        """The engine of an earlier daemon, if its API server still runs.  Otherwise its remains are ended."""
        if record.boot_id != processes.boot_id():
            shutil.rmtree(record.run_dir, ignore_errors=True)
            return None
        engine = Engine(instance_id=instance_id, record=record, log_path=log_path, child=None)
        if engine.running():
            return engine
        engine.destroy()
        return None

    def end_unrecorded(self, instance_id: str) -> None:
        """End an engine whose daemon died between starting it and writing its pid down: its environment names it."""
        entry = f"VLLM_PROCESS_NAME_PREFIX={instance_id}"
        for process in processes.all_processes():
            if process.pid == process.session and processes.has_environment(process.pid, entry):
                log.warning("%s: ending an engine without a pid on record (%d)", instance_id, process.pid)
                processes.kill_session(process.pid, wait=wait_until)


def engine_environment(instance_id: str, run_dir: str) -> dict[str, str]:
    """What the daemon adds for vLLM: titles that name the instance, and a private folder for its ipc sockets."""
    return {"VLLM_PROCESS_NAME_PREFIX": instance_id, "VLLM_RPC_BASE_PATH": run_dir}


@contextlib.contextmanager
def open_log(path: Path) -> Iterator[int]:
    """The file that an engine writes to, empty; that of the start before is kept beside it as `.1`.

    Opened for appending, so that a trim by the daemon moves the writer's position too.
    """
    if path.exists():
        path.replace(previous_log(path))
    output = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC, 0o600)
    try:
        yield output
    finally:
        os.close(output)


def previous_log(path: Path) -> Path:
    return path.with_name(path.name + ".1")


def prune_logs(folder: Path, keep: int, in_use: Collection[Path]) -> None:
    """Delete the oldest logs of instances that are gone, so that the folder stays bounded."""
    spare = {path for log_path in in_use for path in (log_path, previous_log(log_path))}
    with contextlib.suppress(OSError):
        old = sorted((path for path in folder.iterdir() if path not in spare), key=lambda path: path.stat().st_mtime)
        for path in old[:-keep] if keep else old:
            path.unlink(missing_ok=True)


def trim_log(path: Path, limit_bytes: int) -> bool:
    """Cut a log that grew past its bound down to its newest quarter.  True when it was cut.

    Copy and truncate, as the writer is another process that goes on; a line written in between may be lost.
    """
    try:
        size = path.stat().st_size
        if size <= limit_bytes:
            return False
        with open(path, "r+b") as file:
            file.seek(size - limit_bytes // KEEP_AFTER_TRIM)
            tail = file.read()
            tail = tail[tail.find(b"\n") + 1:]
            file.truncate(0)
        with open(path, "ab") as file:
            file.write(tail)
    except OSError as error:
        log.warning("the log %s cannot be trimmed: %s", path, error)
        return False
    return True
