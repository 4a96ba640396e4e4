"""Starts, finds again and ends the process trees of engines.  The only place that uses subprocess.

An engine runs in a session of its own, so that the daemon's Ctrl-C does not reach it and every process of it can be
found by session id.  Its output goes straight into a file: the engine outlives a daemon that dies, and the next
daemon reads on where the log stands.
"""

from __future__ import annotations

import contextlib
import errno
import getpass
import logging
import os
import resource
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from errors import ManagerError
from instances import cores, processes, sockets
from instances.log_file import open_log
from instances.processes import Process

log = logging.getLogger("vllm_server.launcher")

RUN_DIR_PREFIX = "vllm-server-"
PASSING = frozenset({errno.EAGAIN, errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.ETXTBSY})
"""Why a program cannot be run now, though it could a little later."""


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
    """What must be on disk to find an engine again, or to end what is left of it.

    `shared_memory`: its files in /dev/shm, known once it is ready.  When all of its processes are dead, nothing else
    tells whose they are.
    """

    pid: int
    started_ticks: int
    boot_id: str
    run_dir: str
    shared_memory: tuple[str, ...] = ()


class LaunchError(ManagerError):
    """The engine's command cannot be run."""

    status, code = 500, "engine_not_found"


class LaunchRefused(ManagerError):
    """The system is out of something: another try may succeed."""

    code = "engine_not_started"


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

    def lives(self) -> bool:
        """The same for any thread: it asks the kernel, and waits for nobody who is just burying it."""
        return self._leader.alive()

    def exit_code(self) -> int | None:
        """None while it runs, and of an adopted engine for ever: only a parent learns it."""
        return self._child.poll() if self._child is not None else None

    def pids(self) -> list[int]:
        return [member.pid for member in processes.session_members(self.pid)]

    def listener(self, port: int) -> sockets.Listener:
        """Whether it is this engine that listens there."""
        return sockets.listener(port, self.pids())

    def watch_core(self) -> None:
        """Remember the processes behind the API server (EngineCore, workers), and their files in /dev/shm, as they are
        once it is ready."""
        members = processes.session_members(self.pid)
        others = [member for member in members if member.pid != self.pid]
        self._core = [member for member in others if has_title(member.pid, self.instance_id)] or [
            member for member in others if "multiprocessing.spawn" in processes.command_line(member.pid)]
        self.note_memory()

    def note_memory(self) -> None:
        """Remember its files in /dev/shm.  It reads all that its processes have mapped: milliseconds of work."""
        files = processes.shared_memory_files(self.pids())
        if files:       # those of one that has just died are known, and gone from /proc
            self.record = replace(self.record, shared_memory=tuple(sorted(files)))

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
        members = self._members()
        files = set(self.record.shared_memory)
        if members:
            files |= processes.hold_still(self.pid, wait=self._wait)
        gone = not members or processes.kill_session(self.pid, wait=self._wait)
        if self._child is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._child.wait(5.0)
        processes.remove_shared_memory(files)
        remove_run_dir(self.record.run_dir)
        if not gone:
            log.error("%s: processes of session %d survive SIGKILL (a driver that hangs?)", self.instance_id, self.pid)
        return gone

    def _wait(self, predicate: Callable[[], bool], timeout_s: float) -> bool:
        def reaped() -> bool:
            self.exit_code()  # a zombie child of ours would be counted as alive by nobody, but must be reaped
            return predicate()
        return wait_until(reaped, timeout_s)

    def _members(self) -> list[Process]:
        """Its live processes; none when somebody else's session has its number now."""
        members = processes.session_members(self.pid)
        if self._child is not None or self._leader.alive():
            return members
        return members if any(is_named(member.pid, self.instance_id) for member in members) else []


class Launcher:
    """Makes engines out of launch specs and out of records."""

    def launch(self, spec: LaunchSpec) -> Engine:
        """Start the tree.  Raises LaunchError when the command cannot be run, LaunchRefused, OSError (a full disk, no
        descriptor left); then none of it runs."""
        # Short on purpose, as socket paths end at 107 bytes, and with the id: no record names it yet.
        run_dir = tempfile.mkdtemp(prefix=f"{RUN_DIR_PREFIX}{spec.instance_id}-")
        try:
            spec.log_path.parent.mkdir(parents=True, exist_ok=True)
            with open_log(spec.log_path) as output:
                child = _run(spec, output, run_dir)
        except BaseException:
            _remove_empty(run_dir)
            raise
        try:
            leader = processes.read_process(child.pid)
            ticks = leader.started_ticks if leader is not None else 0
            record = EngineRecord(pid=child.pid, started_ticks=ticks, boot_id=processes.boot_id(), run_dir=run_dir)
        except BaseException:       # nobody would know of it
            child.kill()
            child.wait()
            _remove_empty(run_dir)
            raise
        return Engine(instance_id=spec.instance_id, record=record, log_path=spec.log_path, child=child)

    def find(self, instance_id: str, record: EngineRecord, log_path: Path) -> Engine | None:
        """The engine of an earlier daemon, if its API server still runs."""
        engine = Engine(instance_id=instance_id, record=record, log_path=log_path, child=None)
        return engine if record.boot_id == processes.boot_id() and engine.running() else None

    def end_remains(self, instance_id: str, record: EngineRecord | None) -> None:
        """End whatever still runs for an instance without a server, and remove its run folder.  Blocks as `destroy`.

        Also one whose daemon died between starting it and writing its pid down: its processes bear the instance's id.
        """
        if record is not None and record.boot_id == processes.boot_id():
            Engine(instance_id=instance_id, record=record, log_path=Path(os.devnull), child=None).destroy()
        elif record is not None:
            remove_run_dir(record.run_dir)
        named = [process for process in processes.all_processes() if is_named(process.pid, instance_id)]
        for session in {process.session for process in named} - {os.getsid(0)}:
            log.warning("%s: ending session %d, which no record knows", instance_id, session)
            members = processes.session_members(session)
            files = processes.hold_still(session, wait=wait_until)
            run_dirs = {processes.environment(member.pid).get("VLLM_RPC_BASE_PATH") for member in members}
            processes.kill_session(session, wait=wait_until)
            processes.remove_shared_memory(files)
            for run_dir in filter(None, run_dirs):
                remove_run_dir(run_dir)
        for path in Path(tempfile.gettempdir()).glob(f"{RUN_DIR_PREFIX}{instance_id}-*"):
            remove_run_dir(str(path))


def _run(spec: LaunchSpec, output: int, run_dir: str) -> subprocess.Popen[bytes]:
    ours = engine_environment(spec.instance_id, run_dir)
    # setproctitle finds a program's title by walking back from its first variable, and gives up, silently, when that
    # was set anew by then: the first is one that vLLM only reads.
    env = {**ours, **compile_cache(), **spec.env, **ours}
    try:
        with cores.everywhere():
            child = subprocess.Popen(list(spec.argv), stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
                                     env=env, start_new_session=True)
    except OSError as error:
        what = f"the engine's command {spec.argv[0]!r} cannot be run: {error.strerror or error}"
        if error.errno in PASSING:
            raise LaunchRefused(what) from error
        raise LaunchError(f"{what}; set VLLM_COMMAND to the vllm program") from error
    # The daemon may go before all others (instances/cores.py), the code that a model brings along may not.
    with contextlib.suppress(OSError):      # it has ended, or its command changes the user, who has limits of his own
        resource.prlimit(child.pid, resource.RLIMIT_RTPRIO, (0, 0))
    return child


def engine_environment(instance_id: str, run_dir: str) -> dict[str, str]:
    """What the daemon adds for vLLM: titles that name the instance, and a private folder for its ipc sockets and for
    the temporary files that it never removes."""
    return {"VLLM_PROCESS_NAME_PREFIX": instance_id, "VLLM_RPC_BASE_PATH": run_dir, "TMPDIR": run_dir}


def compile_cache() -> dict[str, str]:
    """What torch compiled is kept where torch keeps it itself, not in the temporary folder of one run."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):     # a container without a name for this user
        user = str(os.getuid())
    return {"TORCHINDUCTOR_CACHE_DIR": str(Path(tempfile.gettempdir()) / f"torchinductor_{user}")}


def is_named(pid: int, instance_id: str) -> bool:
    """Whether a process bears the instance's id, in its title (which vLLM sets late) or in its first environment."""
    return (has_title(pid, instance_id)
            or processes.has_environment(pid, f"VLLM_PROCESS_NAME_PREFIX={instance_id}"))


def has_title(pid: int, instance_id: str) -> bool:
    """Whether it is called `<id>::EngineCore` or the like."""
    return processes.command_line(pid).startswith(f"{instance_id}::")


def _remove_empty(run_dir: str) -> None:
    """That of an engine that was not started: it needs no descriptor, which may be what is missing."""
    with contextlib.suppress(OSError):
        Path(run_dir).rmdir()


def remove_run_dir(path: str) -> None:
    """Only what `launch` made: a record that someone edited must not remove another folder.  Raises OSError where it
    can be done later (BLIND)."""
    if not Path(path).name.startswith(RUN_DIR_PREFIX):
        return
    try:
        shutil.rmtree(path)
    except OSError as error:
        if error.errno in processes.BLIND:
            raise
        shutil.rmtree(path, ignore_errors=True)
