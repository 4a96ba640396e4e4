"""web/lanes.py: who watches and who manages has threads of his own."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from tests.support import wait_until
from web.lanes import MANAGE_THREADS, WATCH_THREADS, Lanes, is_reserved
from web.threads import LOOK_S, Threads

INFERENCE = b"/v1/completions"


class Blocked:
    """Lanes whose common jobs, and those that follow a log, wait for a gate."""

    def __init__(self, most: int, backlog: int) -> None:
        self.gate = threading.Event()
        self.running: list[bytes] = []
        self.done: list[bytes] = []
        self.lanes: Lanes[bytes] = Lanes(most, backlog, self._run, lambda job: job)

    def _run(self, job: bytes) -> None:
        self.running.append(job)
        if job in (INFERENCE, b"/instances/x/logs"):
            self.gate.wait(120)
        self.done.append(job)

    def grow(self) -> None:
        for look in range(1, 300):
            self.lanes.grow(look * LOOK_S)


@pytest.fixture
def blocked() -> Iterator[Blocked]:
    found = Blocked(most=20, backlog=5)
    yield found
    found.gate.set()
    found.lanes.shut_down()
    wait_until(lambda: not any(thread.name.startswith(("request-", "watch-", "manage-"))
                               for thread in threading.enumerate()))


@pytest.mark.parametrize(("path", "reserved"), [
    (b"/health", True), (b"/ping", True), (b"/instances", True), (b"/instances/ab/logs", True), (b"/gpus", True),
    (b"/admin/models/a/load", True), (b"/metrics", True), (b"/", True), (b"/v1/models", False), (b"", False),
    (b"/instancesx", False), (b"/health/", False), (b"/v1/completions", False), (b"//health", False)])
def test_who_has_threads_of_his_own(path: bytes, reserved: bool) -> None:
    assert is_reserved(path) is reserved


def test_watching_and_managing_go_on_when_no_thread_is_free(blocked: Blocked) -> None:
    taken = [blocked.lanes.submit(INFERENCE) for _ in range(20)]
    wait_until(lambda: len(blocked.running) == 16)
    blocked.grow()
    wait_until(lambda: len(blocked.running) == 20)
    taken += [blocked.lanes.submit(INFERENCE) for _ in range(7)]
    assert taken == [True] * 25 + [False] * 2      # 20 run, 5 wait, and the rest is told so at once
    for path in (b"/health", b"/instances", b"/metrics"):
        assert blocked.lanes.submit(path)
        wait_until(lambda path=path: path in blocked.done)
    assert blocked.running.count(INFERENCE) == 20
    blocked.gate.set()
    wait_until(lambda: blocked.done.count(INFERENCE) == 25)
    assert blocked.lanes.submit(INFERENCE)


def test_who_follows_logs_keeps_nobody_from_watching_or_managing(blocked: Blocked) -> None:
    for number in range(MANAGE_THREADS):
        blocked.lanes.submit(b"/instances/x/logs")
        if number % 8 == 7:
            blocked.grow()
    wait_until(lambda: blocked.grow() or len(blocked.running) == MANAGE_THREADS)
    for path in (b"/instances", b"/health"):
        assert blocked.lanes.submit(path)
        wait_until(lambda path=path: path in blocked.done)
    watching = [thread for thread in threading.enumerate() if thread.name.startswith("watch-")]
    assert len(watching) <= WATCH_THREADS


def test_a_system_that_grants_no_more_threads_leaves_those_there_are(monkeypatch: pytest.MonkeyPatch,
                                                                     caplog: pytest.LogCaptureFixture) -> None:
    done: list[int] = []
    threads: Threads[int] = Threads(8, done.append)
    threads.submit(0)
    wait_until(lambda: done == [0] and len(threads._idle) == 1)
    start = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    for job in range(1, 20):
        threads.submit(job)
    wait_until(lambda: sorted(done) == list(range(20)))
    assert threads.count == 1
    monkeypatch.setattr(threading.Thread, "start", start)
    assert len([one for one in caplog.records if "threads" in one.getMessage()]) <= 1
    threads.shut_down()
