"""Process trees as the kernel shows them: who belongs to a session, and whether a pid is still the same process.

Linux only, as vLLM is.  A process is identified by its pid and its start time in clock ticks since boot
(`/proc/PID/stat`, field 22, proc(5)), which no clock change moves and which a reused pid cannot share.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")
SHARED_MEMORY = "/dev/shm/"


@dataclass(frozen=True)
class Process:
    pid: int
    parent: int
    session: int
    started_ticks: int
    zombie: bool

    def alive(self) -> bool:
        """Whether this very process still runs (a zombie does not)."""
        now = read_process(self.pid)
        return now is not None and now.started_ticks == self.started_ticks and not now.zombie


def read_process(pid: int) -> Process | None:
    """None when there is no such process."""
    try:
        text = (PROC / str(pid) / "stat").read_text()
    except (OSError, UnicodeDecodeError):
        return None
    # The second field is the name in parentheses and may itself hold spaces and parentheses.
    fields = text[text.rindex(")") + 2:].split()
    return Process(pid=pid, parent=int(fields[1]), session=int(fields[3]), started_ticks=int(fields[19]),
                   zombie=fields[0] in "ZX")


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
    try:
        return (PROC / str(pid) / "cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace").strip()
    except OSError:
        return ""


def has_environment(pid: int, entry: str) -> bool:
    """Whether NAME=VALUE stands in the environment that the process was started with."""
    try:
        return entry.encode() in (PROC / str(pid) / "environ").read_bytes().split(b"\0")
    except OSError:
        return False


def is_resource_tracker(pid: int) -> bool:
    """Python's helper that removes shared memory and semaphores of a process that was killed."""
    return "multiprocessing.resource_tracker" in command_line(pid)


def shared_memory_files(pids: Iterable[int]) -> set[str]:
    """The files under /dev/shm that these processes have open or mapped."""
    found: set[str] = set()
    for pid in pids:
        with contextlib.suppress(OSError, UnicodeDecodeError):
            for line in (PROC / str(pid) / "maps").read_text().splitlines():
                if SHARED_MEMORY in line and not line.endswith("(deleted)"):
                    found.add(line[line.index(SHARED_MEMORY):])
        with contextlib.suppress(OSError):
            for entry in os.scandir(PROC / str(pid) / "fd"):
                with contextlib.suppress(OSError):
                    target = str(Path(entry.path).readlink())
                    if target.startswith(SHARED_MEMORY) and not target.endswith("(deleted)"):
                        found.add(target)
    return found


def shared_memory_in_use() -> set[str]:
    return shared_memory_files(process.pid for process in all_processes())


def send_signal(process: Process, number: signal.Signals) -> bool:
    """Signal this very process and no other that has its pid now.  False when it is gone."""
    try:
        handle = os.pidfd_open(process.pid)
    except OSError:
        return False
    try:
        # The handle is taken, so the pid cannot be reused any more: what is read now is what is signalled.
        if not process.alive():
            return False
        signal.pidfd_send_signal(handle, number)
    except OSError:
        return False
    finally:
        os.close(handle)
    return True


def kill_session(session: int, *, wait: Callable[[Callable[[], bool], float], bool],
                 accept: Callable[[list[Process]], bool] = lambda members: True) -> bool:
    """SIGKILL every process of a session; True when none is left.

    Python's resource tracker is spared at first: it removes the /dev/shm files of the killed and then ends by
    itself.  `wait(predicate, seconds)` polls; `accept` may look at the members first and refuse.  What shared
    memory remains, and nobody else uses, is removed here.
    """
    members = session_members(session)
    if not members:
        return True
    if not accept(members):
        return False
    files = shared_memory_files(member.pid for member in members)

    def others_gone() -> bool:
        # Looked up anew each time: one that forked just before it was killed leaves a child.
        left = [member for member in session_members(session) if not is_resource_tracker(member.pid)]
        for member in left:
            send_signal(member, signal.SIGKILL)
        return not left

    wait(others_gone, 10.0)
    if not wait(lambda: not session_members(session), 2.0):
        for member in session_members(session):
            send_signal(member, signal.SIGKILL)
    gone = wait(lambda: not session_members(session), 5.0)
    leftovers = {name for name in files if Path(name).exists()}
    for name in leftovers - (shared_memory_in_use() if leftovers else set()):
        Path(name).unlink(missing_ok=True)
    return gone
