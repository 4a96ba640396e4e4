"""Where the daemon's threads run, and before whom: all on one core, the last of those that others use least, and there
before all other programs.

Only one thread of a Python process runs at a time.  Where the system spreads threads over cores, each system call of
one gives the interpreter's lock to another on another core, which must be woken there and finds nothing of the work in
its caches; on one core a call that does not wait gives nothing away.  Measured (docs/PERFORMANCE.md): twice the
requests a second, on a quiet machine as on one whose cores are all busy.  Relays and engines are processes of their
own, and run on all cores.

The last one, as vLLM binds the threads of an engine on CPUs to the first cores and leaves the last to others: a core of
which a thread never lets go is the worst to be on, however busy the others are.

Before all others, as those who wait for their turn would have everyone wait who asks them: a proxy, and who is to stop
what keeps the machine busy.  sched(7): of real-time threads the lowest, which no engine is.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from instances.loop import PASSING

log = logging.getLogger("vllm_server.cores")

ALL = frozenset(os.sched_getaffinity(0))    # when the daemon started: a user or a container may have left it only some

REALTIME = (os.SCHED_RR, os.SCHED_FIFO)

BETTER = 0.25       # so much less of another core must be used by others before we move there
ALIKE = 0.125       # cores that differ by no more count as used alike

_lock = threading.Lock()
_everywhere: set[int] = set()       # native ids of the threads that are left alone
_place: Collection[int] = ALL       # where all others are to be


def go_first() -> None:
    """Threads and processes that the caller starts inherit it, but for those in `everywhere`.  Where the system does
    not allow it, that is said, and all stays as it is."""
    if os.sched_getscheduler(0) in REALTIME:        # it was started so, by chrt or systemd
        return
    try:
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(os.sched_get_priority_min(os.SCHED_RR)))
    except OSError as error:
        log.info("the daemon waits for its turn among other programs: real-time priority is refused (%s); "
                 "docs/OPERATIONS.md says how to allow it", error.strerror or error)


def hurry(pid: int, on: bool) -> None:
    """Have a process of ours go before others for a while, as the daemon does; nothing where that does not."""
    if os.sched_getscheduler(0) not in REALTIME:
        return
    policy = os.SCHED_RR if on else os.SCHED_OTHER
    with contextlib.suppress(OSError):      # it has ended, or must not
        os.sched_setscheduler(pid, policy, os.sched_param(os.sched_get_priority_min(policy)))


@contextlib.contextmanager
def everywhere() -> Iterator[None]:
    """What the calling thread starts meanwhile may run on all cores, and goes before nobody; a process inherits both
    from the thread."""
    thread, policy, param = threading.get_native_id(), os.sched_getscheduler(0), os.sched_getparam(0)
    with _lock, contextlib.suppress(OSError):       # a container's cores were changed: it has what is left
        _everywhere.add(thread)
        if policy in REALTIME:
            os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
        os.sched_setaffinity(0, ALL)
    try:
        yield
    finally:
        with _lock, contextlib.suppress(OSError):
            _everywhere.discard(thread)
            if policy in REALTIME:
                os.sched_setscheduler(0, policy, param)
            os.sched_setaffinity(0, _place)


@dataclass(frozen=True)
class Use:
    """`busy`: by core, how much of it was used, 0 to 1, by us too.  `own`: how much of a core this process used."""

    busy: Mapping[int, float]
    own: float

    def by_others(self, ours: int) -> dict[int, float]:
        """By core.  `ours`: the one that we were on."""
        return {core: max(0.0, share - self.own * (core == ours)) for core, share in self.busy.items()}


def choose(ours: int, use: Use) -> int:
    """The core to run on from now."""
    others = use.by_others(ours)
    least = min(others.values())
    best = max(core for core, share in others.items() if share <= least + ALIKE)
    return best if best > ours or others[ours] - least >= BETTER else ours


class Cores:
    """`look(now)` once a second: it moves this process's threads when there is a better core for them.  The first time,
    when nothing can be compared yet, the last one is taken to be."""

    def __init__(self, read: Callable[[], Mapping[int, float]] | None = None,
                 move: Callable[[Collection[int]], None] | None = None) -> None:
        self._read = read or idle_s
        self._move = move or move_threads
        self.core: int | None = None
        self._last: tuple[float, float, Mapping[int, float]] | None = None     # when, our seconds, idle seconds
        self._able = len(ALL) > 1
        self._again = False     # a thread may have been started by one that had not been moved yet

    def look(self, now: float) -> None:
        if not self._able:
            return
        try:
            use = self._use(now)
            core = max(ALL) if self.core is None else self.core
            if use is not None:
                core = choose(core, use)
            if core != self.core or self._again:
                self._again = core != self.core
                self.core = core
                self._move({core})
        except (OSError, LookupError, ValueError) as error:
            if isinstance(error, OSError) and error.errno in PASSING:
                return
            self._able = False
            log.warning("the daemon's threads stay where the system places them: %s", error)
            with contextlib.suppress(OSError):
                self._move(ALL)

    def _use(self, now: float) -> Use | None:
        own_s, idle = time.process_time(), self._read()
        last, self._last = self._last, (now, own_s, idle)
        if last is None or now <= last[0]:
            return None
        passed_s = now - last[0]
        busy = {core: min(1.0, max(0.0, 1 - (idle[core] - last[2][core]) / passed_s)) for core in ALL}
        return Use(busy, (own_s - last[1]) / passed_s)


def idle_s() -> Mapping[int, float]:
    """By core, the seconds in which it had nothing to do, since the machine started; proc_stat(5).  psutil numbers the
    cores that are on, the system all."""
    tick_s = 1 / os.sysconf("SC_CLK_TCK")
    lines = (line.split() for line in Path("/proc/stat").read_text().splitlines())
    return {int(words[0][3:]): (int(words[4]) + int(words[5])) * tick_s
            for words in lines if words[0].startswith("cpu") and words[0] != "cpu"}


def move_threads(cores: Collection[int]) -> None:
    """All of this process, but for those in `everywhere`.  Raises OSError where the system does not allow it."""
    global _place
    with _lock:
        _place = cores
        for name in os.listdir("/proc/self/task"):  # noqa: PTH208  # there may be thousands
            if int(name) not in _everywhere:
                with contextlib.suppress(ProcessLookupError):       # it has just ended
                    os.sched_setaffinity(int(name), cores)
