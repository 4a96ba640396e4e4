"""What the kernel shows of processes, read right however odd it looks."""

from __future__ import annotations

import errno
import os
import resource
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import pytest

from instances import processes
from instances.processes import Process
from tests.support import wait_until


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(["sleep", "600"], start_new_session=True, env={"A": "1", "B": "x=y", "EMPTY": ""})
    yield process
    process.kill()
    process.wait()


def read(pid: int) -> Process:
    found = processes.read_process(pid)
    assert found is not None
    return found


def polled(predicate: Callable[[], bool], timeout_s: float) -> bool:
    wait_until(predicate)
    return True


@pytest.mark.parametrize("name", [b"sleep", b"a b", b"a) S 1 2 (b", b"\xff\xfe)", b"((("])
def test_any_name_a_process_may_have(name: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "77"
    folder.mkdir()
    rest = b" S 5 6 7 " + b" ".join(b"%d" % number for number in range(8, 60)) + b"\n"
    (folder / "stat").write_bytes(b"77 (" + name + b")" + rest)
    monkeypatch.setattr(processes, "PROC", tmp_path)
    assert processes.read_process(77) == Process(pid=77, parent=5, session=7, started_ticks=23, zombie=False)
    assert processes.all_processes() == [read(77)]


def test_a_live_process(child: subprocess.Popen[bytes]) -> None:
    found = read(child.pid)
    assert (found.parent, found.session, found.zombie) == (os.getpid(), child.pid, False)
    assert found.alive() and processes.session_members(child.pid) == [found]
    assert found in processes.all_processes()
    wait_until(lambda: processes.command_line(child.pid) == "sleep 600")     # nothing, in the middle of its exec
    assert not processes.is_resource_tracker(child.pid)


def test_what_it_was_started_with(child: subprocess.Popen[bytes]) -> None:
    wait_until(lambda: processes.environment(child.pid))
    assert processes.environment(child.pid) == {"A": "1", "B": "x=y", "EMPTY": ""}
    assert processes.has_environment(child.pid, "B=x=y") and not processes.has_environment(child.pid, "B=x")


def test_a_zombie_is_dead(child: subprocess.Popen[bytes]) -> None:
    found = read(child.pid)
    child.kill()
    wait_until(lambda: read(child.pid).zombie)
    assert not found.alive() and processes.session_members(child.pid) == []


def test_nothing_is_known_of_a_pid_that_nobody_has(child: subprocess.Popen[bytes]) -> None:
    found = read(child.pid)
    child.kill()
    child.wait()
    assert processes.read_process(child.pid) is None and not found.alive()
    assert (processes.command_line(child.pid), processes.environment(child.pid)) == ("", {})
    assert processes.shared_memory_files([child.pid]) == set()
    assert not processes.send_signal(found, signal.SIGTERM)


@pytest.mark.parametrize("handles", [True, False])
def test_a_signal_is_for_this_very_process(
        child: subprocess.Popen[bytes], handles: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not handles:         # an older kernel, or a sandbox
        def missing(pid: int) -> int:
            raise OSError(errno.ENOSYS, "Function not implemented")
        monkeypatch.setattr(os, "pidfd_open", missing)
    found = read(child.pid)
    assert not processes.send_signal(replace(found, started_ticks=found.started_ticks - 1), signal.SIGKILL)
    assert child.poll() is None
    assert processes.send_signal(found, signal.SIGTERM)
    assert child.wait() == -signal.SIGTERM
    assert not processes.send_signal(found, signal.SIGTERM)


def test_a_session_is_killed_whole(child: subprocess.Popen[bytes]) -> None:
    assert processes.kill_session(child.pid, wait=polled)
    assert child.wait() == -signal.SIGKILL
    assert processes.kill_session(child.pid, wait=polled)       # an empty one is


def test_a_session_that_cannot_be_killed_is_told(
        child: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "send_signal", lambda process, number: False)
    assert not processes.kill_session(child.pid, wait=lambda predicate, timeout_s: predicate())


def test_a_tracker_that_does_not_end_is_killed_at_last(monkeypatch: pytest.MonkeyPatch) -> None:
    tracker = Process(1000, 1, 999, 5, False)
    left, sent = [tracker, replace(tracker, pid=999)], []

    def send(process: Process, number: signal.Signals) -> bool:
        sent.append(process.pid)
        left.remove(process)
        return True

    monkeypatch.setattr(processes, "session_members", lambda session: list(left))
    monkeypatch.setattr(processes, "is_resource_tracker", lambda pid: pid == 1000)
    monkeypatch.setattr(processes, "send_signal", send)

    def wait(predicate: Callable[[], bool], timeout_s: float) -> bool:
        return predicate() or predicate()

    assert processes.kill_session(999, wait=wait)
    assert sent == [999, 1000]


@pytest.mark.parametrize("name, ours", [
    ("/dev/shm/psm_0fcbc09a", True), ("/dev/shm/sem.mp-dd0tjvr3", True), ("/dev/shm/torch_12_34", True),
    ("/dev/shm/nccl-AbCdEf", True), ("/dev/shm/vllm_ring", True), ("/dev/shm/model.safetensors", False),
    ("/dev/shm/psm_folder/weights", False), ("/dev/shm/llama/psm_1", False), ("/tmp/psm_0fcbc09a", False)])
def test_which_shared_memory_engines_make(name: str, ours: bool) -> None:
    assert bool(processes.SHARED_MEMORY.fullmatch(name)) is ours


def test_boots_are_told_apart() -> None:
    assert len(processes.boot_id()) == 36


# --- without a descriptor left ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("look", [
    lambda pid: processes.read_process(pid), lambda pid: processes.session_members(pid),
    lambda pid: processes.command_line(pid), lambda pid: processes.environment(pid),
    lambda pid: processes.shared_memory_files([pid]), lambda pid: Process(pid, 0, pid, 1, False).alive(),
    lambda pid: processes.send_signal(Process(pid, 0, pid, 1, False), signal.SIGTERM)],
    ids=["stat", "session", "title", "environment", "memory", "alive", "signal"])
def test_who_cannot_look_does_not_say_that_nobody_is_there(
        child: subprocess.Popen[bytes], look: Callable[[int], object]) -> None:
    """An engine that was taken for dead would be started a second time, or its memory given away."""
    with no_descriptor_left(), pytest.raises(OSError) as caught:
        look(child.pid)
    assert caught.value.errno == errno.EMFILE
    assert child.poll() is None


@contextmanager
def no_descriptor_left() -> Iterator[None]:
    taken, before = [os.open(os.devnull, os.O_RDONLY)], resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(int(entry.name) for entry in os.scandir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 1, before[1]))
    try:
        with suppress(OSError):
            while True:
                taken.append(os.dup(taken[0]))
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
        for one in taken:
            os.close(one)
