"""Which threads a request gets: who watches and who manages has some of his own, which no inference can take.

So `GET /health` is answered, and an instance can be stopped, while every other thread waits for an engine and more
requests wait for a thread.  Told by the path as the client spelled it: an odd spelling only goes the common way.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

from web.auth import MANAGEMENT, OPEN
from web.threads import Threads

Job = TypeVar("Job")

WATCH_THREADS = 4       # these answer at once, from memory
MANAGE_THREADS = 64     # these may wait for a model (`wait`), or follow a log
WATCH = frozenset({b"/health", b"/ping", b"/version"})
_MANAGE = frozenset(path.encode() for path in (*OPEN, *MANAGEMENT)) - WATCH
_BELOW = tuple(f"{path}/".encode() for path in MANAGEMENT)


def is_reserved(path: bytes) -> bool:
    """Whether this path, without its query, is one that is answered under any load."""
    return path in WATCH or path in _MANAGE or path.startswith(_BELOW)


class Lanes(Generic[Job]):
    """Three pools of threads.  `run(job)` must not raise; `path_of` tells a job's path.

    At most `backlog` jobs wait for one of the `most` common threads.
    """

    def __init__(self, most: int, backlog: int, run: Callable[[Job], None], path_of: Callable[[Job], bytes]) -> None:
        self.common: Threads[Job] = Threads(most, run)
        self._watch: Threads[Job] = Threads(WATCH_THREADS, run, name="watch")
        self._manage: Threads[Job] = Threads(MANAGE_THREADS, run, name="manage")
        self._all = (self.common, self._watch, self._manage)
        self._backlog = backlog
        self._path_of = path_of

    def submit(self, job: Job) -> bool:
        """False: too many wait already, and it was not taken.  Any thread may call it."""
        path = self._path_of(job)
        if path in WATCH:
            self._watch.submit(job)
        elif is_reserved(path) and not self._manage.is_full():
            self._manage.submit(job)
        elif self.common.waiting_jobs() >= self._backlog and self.common.is_full():
            return False
        else:
            self.common.submit(job)
        return True

    def backlog(self) -> bool:
        """Whether jobs wait for a thread, and `grow` is to be called every LOOK_S seconds."""
        return self.common.backlog() or self._watch.backlog() or self._manage.backlog()

    def grow(self, now: float) -> None:
        for threads in self._all:
            if threads.backlog():
                threads.grow(now)

    def shut_down(self) -> None:
        for threads in self._all:
            threads.shut_down()
