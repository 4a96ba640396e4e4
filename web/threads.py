"""The request threads: few as long as few are enough, more when all of them wait for an engine.

A pool that starts a thread for every request that finds none idle ends, in a storm of 1,000 streams, with hundreds of
threads that take the interpreter from each other, while eight would be done sooner.  So past a small core a thread is
added only when requests wait and hardly any was taken up lately: then the threads are blocked, not busy.

A job goes to the thread that became idle last: its stack is still in the processor's caches, and the others, which are
not needed, end in time.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

log = logging.getLogger("vllm_server.http")

Job = TypeVar("Job")

CORE = 16               # threads that are started without looking
LOOK_S = 0.02           # how often a backlog is looked at
MOST_WAITING = 4096     # threads beyond the bound, for jobs that only wait
FEW = 1                 # requests taken up between two looks: no more than this means blocked
IDLE_S = 30.0           # a thread past the core that had nothing to do for so long ends


class Threads(Generic[Job]):
    """`run(job)` is called on one of at most `most` threads; it must not raise.

    `waiting` says how many of the jobs under way only wait for something that may take minutes: their threads do not
    count, or a few hundred of them would keep out all others.
    """

    waiting: Callable[[], int] = staticmethod(lambda: 0)

    def __init__(self, most: int, run: Callable[[Job], None], *, name: str = "request") -> None:
        self._most = most
        self._name = name
        self._run = run
        self._jobs: deque[Job | None] = deque()     # that wait for a thread; none does while one is idle
        self._idle: list[queue.SimpleQueue[Job | None]] = []    # what each of them waits for its next job at
        self._count = 0
        self._taken = 0         # jobs taken up since the last look
        self._lock = threading.Lock()
        self._looked_at = 0.0
        self._denied_at = 0     # how many there were when the system granted no more

    @property
    def count(self) -> int:
        return self._count

    def backlog(self) -> bool:
        """Whether requests wait for a thread."""
        return bool(self._jobs)

    def waiting_jobs(self) -> int:
        return len(self._jobs)

    def is_full(self) -> bool:
        """Whether a job more would wait, and no thread can be added for it."""
        return not self._idle and self._count >= self._bound()

    def submit(self, job: Job) -> None:
        """Any thread may call it; `grow` is for one."""
        if not self._hand_over(job) and self._count < CORE:
            self._start()

    def _hand_over(self, job: Job | None) -> bool:
        """Whether a thread was idle; if none was, the next one takes it."""
        with self._lock:
            if not self._idle:
                self._jobs.append(job)
                return False
            self._idle.pop().put(job)
            return True

    def grow(self, now: float) -> None:
        """Add threads if the backlog does not move; call it every LOOK_S seconds while there is one."""
        if now - self._looked_at < LOOK_S:
            return
        self._looked_at = now
        with self._lock:
            taken, self._taken = self._taken, 0
            missing = len(self._jobs)
        if taken <= FEW:
            for _ in range(min(max(1, self._count // 8), missing)):
                self._start()

    def shut_down(self) -> None:
        """Let the threads end once they are idle; does not wait for them."""
        for _ in range(self._count):
            self._hand_over(None)

    def _bound(self) -> int:
        return self._most + min(self.waiting(), MOST_WAITING)

    def _start(self) -> None:
        most = self._bound()
        with self._lock:
            if self._count >= most:
                return
            self._count += 1
            number = self._count
        try:
            threading.Thread(target=self._work, name=f"{self._name}-{number}", daemon=True).start()
        except RuntimeError:        # the system grants no more: those that there are go on
            with self._lock:
                self._count -= 1
            if self._denied_at != number:
                self._denied_at = number
                log.error("no more than %d threads can be had (ulimit -u, TasksMax= in the unit)", number - 1)

    def _work(self) -> None:
        mailbox: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        while self._next(mailbox):
            pass

    def _next(self, mailbox: queue.SimpleQueue[Job | None]) -> bool:
        """Do one job, wherever it comes from.  False: this thread is not needed any more."""
        with self._lock:
            is_idle = not self._jobs
            if is_idle:
                self._idle.append(mailbox)
            else:
                job = self._jobs.popleft()
        while is_idle:
            try:
                job, is_idle = mailbox.get(timeout=IDLE_S), False
            except queue.Empty:
                with self._lock:
                    if self._count > CORE and mailbox in self._idle:    # else a job is just being put there
                        self._idle.remove(mailbox)
                        self._count -= 1
                        return False
        if job is None:
            return False
        with self._lock:
            self._taken += 1
        self._run(job)      # nothing here holds on to it while this thread idles
        return True
