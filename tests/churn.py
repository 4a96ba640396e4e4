"""Lives of instances, one after another and some at a time, each ended in another way; nothing may be left behind."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

from instances import processes
from tests.support import wait_until

WAYS = ("ready, then deleted", "deleted while it loads", "deleted at once", "killed by force", "fails to start",
        "its engine dies", "its server dies")


class Driver(Protocol):
    """Whoever holds the registry: a manager in this process, or a daemon behind HTTP."""

    def create(self, model: str, params: Mapping[str, Any]) -> str: ...
    def status(self, instance_id: str) -> str: ...
    def pid(self, instance_id: str) -> int | None: ...
    def delete(self, instance_id: str, *, force: bool) -> None: ...


def churn(driver: Driver, count: int, parallel: int) -> set[str]:
    """That many lives, `parallel` at a time; the files in /dev/shm that their engines had."""
    shared: set[str] = set()
    with ThreadPoolExecutor(parallel) as pool:
        for found in pool.map(lambda number: _live(driver, number), range(count)):
            shared |= found
    return shared


def _live(driver: Driver, number: int) -> set[str]:
    way = WAYS[number % len(WAYS)]
    knobs = {"deleted while it loads": {"start_s": 600}, "fails to start": {"fail": "no_weights"},
             "its engine dies": {"engine_death_exit_s": 0.1}}.get(way, {})
    instance_id = driver.create(f"churn/{number}", {"additional_config": {"sim": knobs}})
    shared: set[str] = set()
    if way == "deleted while it loads":
        wait_until(lambda: driver.pid(instance_id))
    elif way == "fails to start":
        wait_until(lambda: driver.status(instance_id) == "failed")
    elif way != "deleted at once":
        wait_until(lambda: driver.status(instance_id) == "ready")
        pid = driver.pid(instance_id)
        assert pid is not None
        members = [member.pid for member in processes.session_members(pid)]
        shared = processes.shared_memory_files(members)
        assert shared, "the simulated engine has shared memory"
        if way.endswith("dies"):
            core = next(one for one in members if processes.command_line(one).endswith("::EngineCore"))
            os.kill(core if way == "its engine dies" else pid, signal.SIGKILL)
            wait_until(lambda: driver.status(instance_id) == "backoff")
    driver.delete(instance_id, force=way == "killed by force")
    wait_until(lambda: driver.status(instance_id) == "gone")
    return shared


def assert_no_process(temporary: Path) -> None:
    """None of an engine that had its temporary folder there, dead ones that nobody waited for included."""
    own = processes.all_processes()
    assert [one for one in own if processes.environment(one.pid).get("TMPDIR", "").startswith(f"{temporary}/")] == []
    assert [one for one in own if one.parent == os.getpid() and one.zombie] == []


def assert_no_file(temporary: Path, state: Path, shared: set[str], engines: Sequence[str] = ("vllm-server-",)) -> None:
    assert [path for path in temporary.iterdir() if path.name.startswith(tuple(engines))] == []
    assert list((state / "instances").iterdir()) == []
    assert [name for name in shared if Path(name).exists()] == []


def descriptors(pid: int | str = "self") -> int:
    return len(list((Path("/proc") / str(pid) / "fd").iterdir()))


def threads(pid: int | str = "self") -> int:
    return len(list((Path("/proc") / str(pid) / "task").iterdir()))


def settles(measure: Callable[[], int], limit: int) -> None:
    """What was closed a moment ago may still be counted."""
    wait_until(lambda: measure() <= limit)
