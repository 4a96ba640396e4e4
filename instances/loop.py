"""The one thread loop of the daemon: its body is `tick(now)`, which a test calls alone."""

from __future__ import annotations

import errno
import logging
import threading
import time
from collections.abc import Callable

log = logging.getLogger("vllm_server.loop")

PASSING = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN})     # no bug: the system has no more
AFTER_ERROR_S = 1.0     # at least; a log that fills with one traceback helps nobody


class Loop:
    """Calls `tick(now)` every `interval_s` seconds, or sooner after `wake()`, until it returns False or `stop()`.

    A tick may return the seconds until the next one.
    A tick that raises is logged and tried again after a pause: one bug must not end the watch over an engine.
    """

    def __init__(self, *, name: str, tick: Callable[[float], float | bool | None], interval_s: float,
                 clock: Callable[[], float] = time.monotonic) -> None:
        self.tick = tick
        self._interval_s = interval_s
        self._clock = clock
        self._woken = threading.Event()
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        """Raises RuntimeError when the system has no thread left."""
        self._thread.start()

    def wake(self) -> None:
        self._woken.set()

    def stop(self) -> None:
        self._stopped = True
        self._woken.set()

    def join(self, timeout_s: float | None = None) -> bool:
        """True when the thread has ended.  Joining oneself is a mistake of the caller and returns False."""
        if self._thread is threading.current_thread() or self._thread.ident is None:
            return self._thread.ident is None
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while not self._stopped:
            self._woken.clear()
            wait_s: float | bool | None = None
            try:
                wait_s = self.tick(self._clock())
            except Exception as error:
                if isinstance(error, OSError) and error.errno in PASSING:
                    log.error("%s cannot do its work now: %s; it is tried again", self._thread.name, error)
                else:
                    log.exception("a tick of %s failed; it goes on", self._thread.name)
                wait_s = max(self._interval_s, AFTER_ERROR_S)
            if wait_s is False or self._stopped:    # the stop may have come just before `clear`
                return
            self._woken.wait(self._interval_s if wait_s is None or wait_s is True else wait_s)
