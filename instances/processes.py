"""Process trees as the kernel shows them: who belongs to a session, and whether a pid is still the same process.

Linux only, as vLLM is.  A process is identified by its pid and its start time in clock ticks since boot
(`/proc/PID/stat`, field 22, proc(5)), which no clock change moves and which a reused pid cannot share.
Everything here raises OSError where this process cannot look (BLIND).
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import signal
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

PROC = Path("/proc")
BLIND = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM})
"""Why this process cannot look, which says nothing of what it looks for.  What is not seen for another reason is gone,
or not ours to see."""
SHARED_MEMORY = re.compile(r"/dev/shm/(?:psm_|sem\.|mp-|torch_|nccl-|vllm|__KMP_REGISTERED_LIB_)[^/]*")  # nosec B108
"""Files that engines make there: of multiprocessing, torch, NCCL, vLLM and OpenMP.  Others are not theirs to lose:
people keep whole models in /dev/shm, which an engine maps too.
"""


@dataclass(frozen=True)
class Process:
    pid: int
    parent: int
    session: int
    started_ticks: int
    zombie: bool
    stopped: bool = field(default=False, compare=False)     # by a signal

    def alive(self) -> bool:
        """Whether this very process still runs (a zombie does not)."""
        now = read_process(self.pid)
        return now is not None and now.started_ticks == self.started_ticks and not now.zombie


def read_process(pid: int) -> Process | None:
    """None when there is no such process."""
    line = _read(pid, "stat")
    if line is None:
        return None
    # The second field is the name in parentheses and may hold any bytes, spaces and parentheses too.
    fields = line[line.rindex(b")") + 2:].split()
    return Process(pid=pid, parent=int(fields[1]), session=int(fields[3]), started_ticks=int(fields[19]),
                   zombie=fields[0] in (b"Z", b"X"), stopped=fields[0] in (b"T", b"t"))


def _read(pid: int, name: str) -> bytes | None:
    """A file of a process; None when it is gone, or another user's.  Raises OSError when it is this process that cannot
    look (BLIND): then nobody may conclude that the other is gone."""
    try:
        with open(f"{PROC}/{pid}/{name}", "rb", buffering=0) as file:     # not by a Path: asked with each connection
            return file.read()
    except OSError as error:
        if error.errno in BLIND:
            raise
        return None


@cache
def boot_id() -> str:
    """Changes with every boot: ticks of another boot mean nothing."""
    return (PROC / "sys/kernel/random/boot_id").read_text().strip()


def all_processes() -> list[Process]:
    found = (read_process(int(entry.name)) for entry in os.scandir(PROC) if entry.name.isdigit())
    return [process for process in found if process is not None]


def session_members(session: int) -> list[Process]:
    """The live processes of one session, the leader included."""
    return [process for process in all_processes() if process.session == session and not process.zombie]


def command_line(pid: int) -> str:
    """The title of a process; empty when it is gone."""
    return (_read(pid, "cmdline") or b"").replace(b"\0", b" ").decode("utf-8", "replace").strip()


def environment(pid: int) -> dict[str, str]:
    """What the process was started with; empty when it is gone, another user's, or wiped (setproctitle does it)."""
    data = _read(pid, "environ") or b""
    entries = (entry.partition("=") for entry in data.decode("utf-8", "surrogateescape").split("\0"))
    return {name: value for name, found, value in entries if found}


def has_environment(pid: int, entry: str) -> bool:
    """Whether NAME=VALUE stands in the environment that the process was started with."""
    name, _, value = entry.partition("=")
    return environment(pid).get(name) == value


def is_resource_tracker(pid: int) -> bool:
    """Python's helper that removes shared memory and semaphores of a process that was killed."""
    return "multiprocessing.resource_tracker" in command_line(pid)


def shared_memory_files(pids: Iterable[int]) -> set[str]:
    """The SHARED_MEMORY files that these processes have open or mapped."""
    found: set[str] = set()
    for pid in pids:
        if (maps := _read(pid, "maps")) is not None:
            text = maps.decode("utf-8", "surrogateescape")
            found.update(line[line.index("/"):] for line in text.splitlines() if " /dev/shm/" in line)
        with contextlib.suppress(OSError):
            for entry in os.scandir(PROC / str(pid) / "fd"):
                with contextlib.suppress(OSError):
                    found.add(str(Path(entry.path).readlink()))
    return {name for name in found if SHARED_MEMORY.fullmatch(name) and not name.endswith(" (deleted)")}


def hold_still(session: int, *, wait: Callable[[Callable[[], bool], float], bool]) -> set[str]:
    """SIGSTOP every process of a session but the resource tracker, and the SHARED_MEMORY files that they have then.

    What is about to be killed must not make another file meanwhile: one that is killed between making it and telling
    the tracker of it leaves it for good.  A process that will not stop (in a driver) is waited for a second.
    """
    def all_stopped() -> bool:
        # Looked up anew each time, as they may fork until they stop.
        running = [member for member in _but_tracker(session) if not member.stopped]
        for member in running:
            send_signal(member, signal.SIGSTOP)
        return not running

    wait(all_stopped, 1.0)
    return shared_memory_files(member.pid for member in _but_tracker(session))


def _but_tracker(session: int) -> list[Process]:
    return [member for member in session_members(session) if not is_resource_tracker(member.pid)]


def remove_shared_memory(files: Iterable[str]) -> None:
    """Those of these SHARED_MEMORY files that are there still and nobody uses."""
    left = {name for name in files if SHARED_MEMORY.fullmatch(name) and Path(name).exists()}
    if left:
        for name in left - shared_memory_files(process.pid for process in all_processes()):
            with contextlib.suppress(OSError):
                Path(name).unlink(missing_ok=True)


def send_signal(process: Process, number: signal.Signals) -> bool:
    """Signal this very process and no other that has its pid now.  False when it is gone.  Raises OSError (BLIND)."""
    try:
        handle = os.pidfd_open(process.pid)
    except OSError as error:
        if error.errno in BLIND:
            raise
        if error.errno not in (errno.ENOSYS, errno.EPERM):
            return False
        return _send_by_pid(process, number)    # Linux before 5.3, or a sandbox
    try:
        # The handle is taken, so the pid cannot be reused any more: what is read now is what is signalled.
        if not process.alive():
            return False
        signal.pidfd_send_signal(handle, number)
    except OSError as error:
        if error.errno in BLIND:
            raise
        return False
    finally:
        os.close(handle)
    return True


def _send_by_pid(process: Process, number: signal.Signals) -> bool:
    if process.alive():
        with contextlib.suppress(OSError):
            os.kill(process.pid, number)
            return True
    return False


def kill_session(session: int, *, wait: Callable[[Callable[[], bool], float], bool]) -> bool:
    """SIGKILL every process of a session; True when none is left.  `wait(predicate, seconds)` polls.

    Python's resource tracker is spared at first: it removes the /dev/shm files of the killed and then ends by itself.
    """
    def others_gone() -> bool:
        # Looked up anew each time: one that forked just before it was killed leaves a child.
        left = _but_tracker(session)
        for member in left:
            send_signal(member, signal.SIGKILL)
        return not left

    def all_gone() -> bool:
        return not session_members(session)

    wait(others_gone, 10.0)
    if not wait(all_gone, 2.0):
        for member in session_members(session):
            send_signal(member, signal.SIGKILL)
    return wait(all_gone, 5.0)
