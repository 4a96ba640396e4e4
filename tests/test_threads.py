"""web/threads.py: threads are added when all are blocked, not because many requests came at once."""

from __future__ import annotations

import threading

from tests.support import wait_until
from web.threads import CORE, LOOK_S, Threads


class Blocked:
    """Jobs that wait for a gate."""

    def __init__(self, most: int) -> None:
        self.gate = threading.Event()
        self.running = 0
        self.done = 0
        self._lock = threading.Lock()
        self.threads = Threads[int](most, self._run)

    def _run(self, job: int) -> None:
        with self._lock:
            self.running += 1
        self.gate.wait(120)
        with self._lock:
            self.done += 1


def end(threads: Threads[int]) -> None:
    threads.shut_down()
    wait_until(lambda: not any(thread.name.startswith("request-") for thread in threading.enumerate()))


def test_one_request_at_a_time_takes_one_thread() -> None:
    done: list[int] = []
    threads = Threads[int](100, done.append)
    for job in range(50):
        threads.submit(job)
        wait_until(lambda job=job: len(done) == job + 1)
        wait_until(lambda: len(threads._idle) == threads.count)
    assert done == list(range(50))
    assert threads.count <= 2
    end(threads)


def test_the_thread_that_became_idle_last_gets_the_next_job() -> None:
    blocked, names = Blocked(most=8), list[str]()
    for job in range(8):
        blocked.threads.submit(job)
    wait_until(lambda: blocked.running == 8)
    blocked.gate.set()
    wait_until(lambda: len(blocked.threads._idle) == 8)
    blocked.threads._run = lambda job: names.append(threading.current_thread().name)
    for job in range(20):
        blocked.threads.submit(job)
        wait_until(lambda job=job: len(names) == job + 1 and len(blocked.threads._idle) == 8)
    assert len(set(names)) == 1
    end(blocked.threads)


def test_threads_that_only_wait_keep_nobody_out() -> None:
    blocked = Blocked(most=CORE)
    blocked.threads.waiting = lambda: 3
    for job in range(CORE + 5):
        blocked.threads.submit(job)
    for look in range(1, 100):
        blocked.threads.grow(look * LOOK_S)
    wait_until(lambda: blocked.running == CORE + 3)
    assert blocked.threads.count == CORE + 3
    blocked.gate.set()
    wait_until(lambda: blocked.done == CORE + 5)
    end(blocked.threads)


def test_blocked_threads_are_joined_by_others_up_to_the_bound() -> None:
    blocked = Blocked(most=CORE + 5)
    for job in range(CORE + 10):
        blocked.threads.submit(job)
    wait_until(lambda: blocked.running == CORE)
    now = 0.0
    for _ in range(200):
        now += LOOK_S
        blocked.threads.grow(now)
    wait_until(lambda: blocked.running == CORE + 5)
    assert blocked.threads.count == CORE + 5
    assert blocked.threads.backlog()
    blocked.gate.set()
    wait_until(lambda: blocked.done == CORE + 10)
    end(blocked.threads)


def test_a_backlog_that_moves_adds_nobody() -> None:
    blocked = Blocked(most=200)
    for job in range(CORE * 3):
        blocked.threads.submit(job)
    wait_until(lambda: blocked.running == CORE)
    blocked.threads._taken = 50     # many were taken up since the last look
    blocked.threads.grow(1.0)
    assert blocked.threads.count == CORE
    blocked.gate.set()
    wait_until(lambda: blocked.done == CORE * 3)
    end(blocked.threads)


def test_idle_threads_that_have_not_got_the_processor_yet_are_not_added_to() -> None:
    blocked = Blocked(most=200)
    blocked.gate.set()
    for job in range(CORE):
        blocked.threads.submit(job)
    wait_until(lambda: blocked.done == CORE and len(blocked.threads._idle) == blocked.threads.count)
    before = blocked.threads.count
    blocked.threads.submit(1)
    blocked.threads.grow(1.0)
    assert blocked.threads.count <= max(before, CORE)
    end(blocked.threads)
