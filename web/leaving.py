"""When the worker cannot go on for want of threads or memory, it leaves, and the master makes another one.

Its engines run on, and the next worker finds them by their records.  What must not happen is that it stays and hangs:
without memory Python drops work at places where no program can catch it.
"""

from __future__ import annotations

import contextlib
import logging
import mmap
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

log = logging.getLogger("vllm_server.http")

TRY_AGAIN = 1               # exit status of a worker that could not go on: neither of gunicorn's two for 'never'
TRY_AGAIN_S = 1.0
NO_MEMORY = b"vllm-server: no memory is left; the worker ends, and another one is started\n"
NO_THREAD = b"vllm-server: a thread was lost for want of memory; the worker ends, and another one is started\n"

LOOK_S = 0.25
ARENA_BYTES = 1 << 20       # what Python asks the system for when it needs memory (obmalloc.h: ARENA_SIZE)
TWICE = 2                   # looks in a row: a large body may have taken the last of it, and be refused by now
BORN_WITHIN_S = 15.0        # a thread gets the processor in that time, even on a machine that does much else


def leave(why: bytes) -> None:
    """At once, with what is there: nothing here needs memory."""
    os.write(2, why)
    os._exit(TRY_AGAIN)


def leave_without_memory(unraisable: Any) -> None:
    """For `sys.unraisablehook`: a thread that dies for want of memory before its first line leaves whoever started it
    waiting for ever."""
    if unraisable.exc_type is MemoryError and "thread" in (unraisable.err_msg or ""):
        leave(NO_THREAD)
        return
    sys.__unraisablehook__(unraisable)


@contextlib.contextmanager
def to_be_tried_again() -> Iterator[None]:
    """A worker that the system grants no thread leaves: the master makes another one, which may have more luck."""
    try:
        yield
    except RuntimeError as error:
        if "can't start new thread" not in str(error):
            raise
        log.error("the daemon cannot start now: %s (ulimit -u, pids.max, memory); trying again", error)
        time.sleep(TRY_AGAIN_S)
        sys.exit(TRY_AGAIN)


class MemoryWatch:
    """Looks four times a second whether Python could get memory, and whether each thread that was started lives.

    With not one page left Python cannot even call `leave_without_memory`.  This thread has all that it needs from the
    start, so that it sees that.
    """

    def __init__(self, leave: Callable[[bytes], None] = leave, has_memory: Callable[[], bool] | None = None) -> None:
        self._leave = leave
        self._has_memory = has_memory or can_have_memory
        self._without = 0                                   # looks in a row
        self._unborn: dict[threading.Thread, float] = {}    # started, and not seen alive since then

    def start(self) -> None:
        """Raises RuntimeError when the system has no thread left."""
        threading.Thread(target=self._run, name="memory-watch", daemon=True).start()

    def _run(self) -> None:
        while True:
            time.sleep(LOOK_S)
            self.look(time.monotonic())

    def look(self, now: float) -> None:
        try:
            self._without = 0 if self._has_memory() else self._without + 1
            unborn = [thread for thread in threading.enumerate() if thread.ident is None]
            self._unborn = {thread: self._unborn.get(thread, now) for thread in unborn}
            if any(now - since >= BORN_WITHIN_S for since in self._unborn.values()):
                self._leave(NO_THREAD)
        except MemoryError:
            self._without += 1
        if self._without >= TWICE:
            self._leave(NO_MEMORY)


def can_have_memory() -> bool:
    try:
        mmap.mmap(-1, ARENA_BYTES).close()
    except OSError:
        return False
    return True
