"""instances/cores.py: threads on the least used core, and children on all."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import psutil
import pytest

from instances import cores
from instances.cores import Cores, Use, choose, everywhere
from tests.daemon import CHECKOUT, Daemon
from tests.support import wait_until

several = pytest.mark.skipif(len(cores.ALL) < 2, reason="there is one core")


@pytest.mark.parametrize(("ours", "busy", "own", "to", "why"), [
    (0, {0: 0.2, 1: 0.2}, 0.0, 1, "the last of equals"),
    (0, {0: 0.2, 1: 0.3, 2: 0.4}, 0.0, 1, "the last of those used alike"),
    (0, {0: 1.0, 1: 0.0}, 1.0, 1, "only we use it, and the last would do as well"),
    (0, {0: 1.0, 1: 0.1}, 0.5, 1, "others came"),
    (0, {0: 1.0, 1: 1.0}, 0.1, 1, "crowded everywhere: engines are bound to the first"),
    (0, {0: 1.0, 1: 1.0}, 0.4, 0, "it is worse there"),
    (1, {0: 0.0, 1: 1.0}, 1.0, 1, "only we use it"),
    (1, {0: 0.4, 1: 1.0}, 0.5, 1, "it is hardly better there"),
    (1, {0: 0.7, 1: 1.0}, 0.0, 0, "crowded everywhere, and better there"),
    (2, {0: 0.5, 1: 0.2, 2: 0.9}, 0.3, 1, "the least used of many"),
])
def test_where_to_run(ours: int, busy: dict[int, float], own: float, to: int, why: str) -> None:
    assert choose(ours, Use(busy, own)) == to, why


class Machine:
    """Cores whose use a test sets, and who was moved where."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, count: int = 2) -> None:
        monkeypatch.setattr(cores, "ALL", frozenset(range(count)))
        monkeypatch.setattr(cores.time, "process_time", lambda: self.own_s)
        self.idle_s = dict.fromkeys(range(count), 0.0)
        self.own_s = 0.0
        self.now = 100.0
        self.moves: list[set[int]] = []
        self.cores = Cores(lambda: dict(self.idle_s), lambda where: self.moves.append(set(where)))

    def second(self, busy: Mapping[int, float], own: float) -> int | None:
        self.now += 1
        self.own_s += own
        for core, share in busy.items():
            self.idle_s[core] += 1 - share
        self.cores.look(self.now)
        return self.cores.core


def test_threads_follow_what_others_do(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch)
    assert machine.second({}, 0) == 1           # nothing to compare with yet
    assert machine.second({0: 0.2, 1: 0.1}, 0.1) == 1
    assert machine.second({0: 0.1, 1: 1.0}, 1.0) == 1
    assert machine.second({0: 0.1, 1: 1.0}, 0.3) == 0
    assert machine.second({0: 1.0, 1: 1.0}, 0.3) == 0
    assert machine.second({0: 1.0, 1: 1.0}, 0.3) == 0
    # each time once more, for threads that were started by one that had not been moved yet
    assert machine.moves == [{1}, {1}, {0}, {0}]


def test_one_core_is_nothing_to_choose_from(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch, count=1)
    assert [machine.second({0: 0.0}, 0.0) for _ in range(3)] == [None] * 3 and machine.moves == []


def out_of_descriptors() -> Mapping[int, float]:
    raise OSError(errno.EMFILE, "Too many open files")


def refused(*_: object) -> Iterable[int]:
    raise PermissionError("not in this container")


@pytest.mark.parametrize("broken", [refused, lambda: {0: 1.0}], ids=["refused", "a core without figures"])
def test_where_it_cannot_be_done_it_is_said_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
                                                 broken: Callable[..., Mapping[int, float]]) -> None:
    machine = Machine(monkeypatch)
    machine.cores = Cores(broken, machine.moves.append)
    for _ in range(4):
        machine.second({0: 0.0, 1: 0.0}, 0.0)
    assert machine.moves[-1] == {0, 1} and len(caplog.records) == 1
    assert "stay where the system places them" in caplog.text


def test_what_the_system_has_none_of_now_is_tried_again(monkeypatch: pytest.MonkeyPatch,
                                                        caplog: pytest.LogCaptureFixture) -> None:
    """Such as a descriptor to read the figures with."""
    machine = Machine(monkeypatch)
    machine.second({}, 0)
    with monkeypatch.context() as patched:
        patched.setattr(machine.cores, "_read", out_of_descriptors)
        assert machine.second({0: 0.0, 1: 0.5}, 0.0) == 1
    assert machine.second({0: 0.0, 1: 0.5}, 0.0) == 0 and caplog.records == []


def test_each_core_that_there_is_has_its_idle_time() -> None:
    before = cores.idle_s()
    assert before.keys() >= cores.ALL and all(seconds >= 0 for seconds in before.values())
    wait_until(lambda: any(seconds > before[core] for core, seconds in cores.idle_s().items()))


@pytest.fixture
def one_core() -> Iterator[int]:
    core = min(cores.ALL)
    try:
        cores.move_threads({core})
        yield core
    finally:
        cores.move_threads(cores.ALL)


@several
def test_what_is_started_everywhere_runs_everywhere(one_core: int) -> None:
    says = [sys.executable, "-c", "import os; print(sorted(os.sched_getaffinity(0)))"]
    assert subprocess.run(says, capture_output=True, check=True).stdout.split() == [b"[%d]" % one_core]
    other = max(cores.ALL)
    with everywhere():
        cores.move_threads({other})         # which leaves this thread alone now
        assert eval(subprocess.run(says, capture_output=True, check=True).stdout) == sorted(cores.ALL)
    assert os.sched_getaffinity(0) == {other}       # where the others have gone meanwhile


@several
def test_cores_that_are_taken_away_meanwhile_are_no_failure(monkeypatch: pytest.MonkeyPatch, one_core: int) -> None:
    """Such as by a change of a container's cpuset: the engine has been started, and its record must be written."""
    with monkeypatch.context() as patched, everywhere():
        patched.setattr(os, "sched_setaffinity", refused)
    with monkeypatch.context() as patched:
        patched.setattr(os, "sched_setaffinity", refused)
        with everywhere():
            pass
    assert cores._everywhere == set()


@several
def test_new_threads_are_where_the_others_are(one_core: int) -> None:
    found: list[set[int]] = []
    thread = threading.Thread(target=lambda: found.append(os.sched_getaffinity(0)))
    thread.start()
    thread.join()
    assert found == [{one_core}]


FIRST = """
import logging, os, subprocess, sys, threading
sys.path.insert(0, sys.argv[1])
from instances.cores import everywhere, go_first

SAYS = [sys.executable, "-c", "import os; print(os.sched_getscheduler(0))"]
logging.basicConfig(level=logging.INFO)
go_first()
child = lambda: int(subprocess.run(SAYS, capture_output=True, check=True).stdout)
threads = []
thread = threading.Thread(target=lambda: threads.append(os.sched_getscheduler(0)))
thread.start()
thread.join()
with everywhere():
    inside = child()
print(threads[0], inside, os.sched_getscheduler(0), os.sched_getparam(0).sched_priority)
"""


def go_first(*before: str) -> subprocess.CompletedProcess[str]:
    command = [*before, sys.executable, "-c", FIRST, str(CHECKOUT)]
    return subprocess.run(command, capture_output=True, text=True, check=True)


def allows_realtime() -> bool:
    """A thread's priority is its own."""
    allowed: list[bool] = []

    def tries() -> None:
        with contextlib.suppress(PermissionError):
            os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
            allowed.append(True)
    thread = threading.Thread(target=tries)
    thread.start()
    thread.join()
    return allowed == [True]


realtime = pytest.mark.skipif(not allows_realtime(), reason="the system does not allow real-time priorities")


@realtime
def test_who_goes_first_takes_its_threads_along_and_no_engine() -> None:
    assert go_first().stdout.split() == [str(os.SCHED_RR), str(os.SCHED_OTHER), str(os.SCHED_RR), "1"]


@realtime
@pytest.mark.skipif(shutil.which("chrt") is None, reason="there is no chrt")
def test_a_priority_that_the_daemon_was_started_with_stays() -> None:
    assert go_first("chrt", "--fifo", "3").stdout.split() == [
        str(os.SCHED_FIFO), str(os.SCHED_OTHER), str(os.SCHED_FIFO), "3"]


@realtime
@pytest.mark.parametrize(("ours", "hurried"), [(os.SCHED_RR, os.SCHED_RR), (os.SCHED_OTHER, os.SCHED_OTHER)])
def test_a_process_is_hurried_by_who_goes_first_himself(ours: int, hurried: int) -> None:
    seen: list[int] = []

    def hurries(pid: int) -> None:
        os.sched_setscheduler(0, ours, os.sched_param(os.sched_get_priority_min(ours)))
        for on in (True, False):
            cores.hurry(pid, on)
            seen.append(os.sched_getscheduler(pid))

    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        thread = threading.Thread(target=hurries, args=(child.pid,))    # whose priority is its own
        thread.start()
        thread.join()
        child.communicate(b"\n")
    assert seen == [hurried, os.SCHED_OTHER]
    cores.hurry(child.pid, True)        # nobody is there any more


def test_where_nobody_may_go_first_that_is_said_and_nothing_changes(monkeypatch: pytest.MonkeyPatch,
                                                                    caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(os, "sched_setscheduler", refused)
    with caplog.at_level(logging.INFO):
        cores.go_first()
        with everywhere():      # which has nothing to take back
            pass
    assert [record.levelname for record in caplog.records] == ["INFO"] and "docs/OPERATIONS.md" in caplog.text


def allowed(pid: int) -> set[frozenset[int]]:
    return {frozenset(os.sched_getaffinity(int(task.name))) for task in Path(f"/proc/{pid}/task").iterdir()}


def policies(pid: int) -> set[int]:
    return {os.sched_getscheduler(int(task.name)) for task in Path(f"/proc/{pid}/task").iterdir()}


@pytest.mark.whole
@realtime
@pytest.mark.parametrize(("setting", "policy"), [("true", os.SCHED_RR), ("false", os.SCHED_OTHER)])
def test_a_daemon_goes_first_and_its_engines_and_relays_do_not(tmp_path: Path, setting: str, policy: int) -> None:
    with Daemon(tmp_path, {"APP_REALTIME": setting}) as daemon:
        worker = psutil.Process(daemon.worker_pid)
        engine = daemon.create("m")["pid"]
        assert daemon.post("/v1/completions", {"model": "m", "prompt": "x", "max_tokens": 1}).status == 200
        assert policies(worker.pid) == policies(worker.ppid()) == {policy}
        children = [child.pid for child in worker.children()]
        assert engine in children and len(children) > 1     # and a relay
        assert all(policies(pid) == {os.SCHED_OTHER} for pid in children)


@pytest.mark.whole
@several
@pytest.mark.parametrize(("setting", "together"), [("true", True), ("false", False)])
def test_a_daemon_is_on_one_core_and_its_engines_and_relays_are_on_all(tmp_path: Path, setting: str,
                                                                       together: bool) -> None:
    with Daemon(tmp_path, {"APP_ONE_CORE": setting}) as daemon:
        worker = daemon.worker_pid
        if together:
            wait_until(lambda: len(places := allowed(worker)) == 1 and len(next(iter(places))) == 1)
        engine = daemon.create("m")["pid"]
        children = [child.pid for child in psutil.Process(worker).children()]
        assert engine in children and len(children) > 1     # and a relay
        assert all(allowed(pid) == {cores.ALL} for pid in children)
        assert daemon.post("/v1/completions", {"model": "m", "prompt": "x", "max_tokens": 1}).status == 200
        assert (allowed(worker) == {cores.ALL}) != together


CHILD = f"import sys; sys.path.insert(0, {str(CHECKOUT)!r}); from instances import cores; print(sorted(cores.ALL))"


@several
def test_all_is_what_the_daemon_was_left(one_core: int) -> None:
    """Such as by taskset or a container's cpuset."""
    assert subprocess.run([sys.executable, "-c", CHILD], capture_output=True, check=True).stdout.split() == [
        b"[%d]" % one_core]
