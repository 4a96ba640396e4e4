"""The machine at its limits, one at a time, and looked at more closely than chaos can: disk, clock, pids, files."""

from __future__ import annotations

import contextlib
import http.client
import os
import resource
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from instances import processes
from tests.chaos.shim import Shim
from tests.chaos.world import ShimDisk, Tmpfs
from tests.daemon import Answer, Daemon
from tests.gpu_box import needs_compiler
from tests.support import wait_until

pytestmark = needs_compiler

FEW = 256
LAST_PID = Path("/proc/sys/kernel/ns_last_pid")


@pytest.fixture
def shim(tmp_path: Path) -> Iterator[Shim]:
    state = tmp_path / "daemon" / "state"
    found = Shim(tmp_path, disk=state, logs=[state / "logs"])
    yield found
    found.close()


def ask(daemon: Daemon, model: str = "m") -> Answer:
    return daemon.post("/v1/completions", {"model": model, "prompt": "x", "max_tokens": 1})


def answers(daemon: Daemon) -> bool:
    with contextlib.suppress(OSError, http.client.HTTPException):
        return daemon.get("/health").status == 200
    return False


# --- the disk ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", ["tmpfs", "shim"])
def test_on_a_full_disk_nothing_is_begun_and_nothing_is_lost(tmp_path: Path, shim: Shim, kind: str) -> None:
    daemon = Daemon(tmp_path / "daemon", shim.environment)
    disk: Tmpfs | ShimDisk = ShimDisk(shim)
    if kind == "tmpfs":
        try:
            disk = Tmpfs(daemon.state)
        except (OSError, subprocess.CalledProcessError):
            pytest.skip("this user may mount nothing")
    try:
        with daemon:
            made = daemon.create("m")
            record = daemon.state / "instances" / f"{made['id']}.json"
            wait_until(lambda: '"ready"' in record.read_text())
            before = record.read_bytes()
            disk.fill()
            refused = daemon.post("/instances", {"model_name": "other", "wait": True})
            assert (refused.status, refused.error["code"]) == (503, "state_dir")
            said = refused.error["message"]
            assert "No space left on device" in said and str(daemon.state) in said
            assert ask(daemon).status == 200
            assert daemon.records() == [record.name] and record.read_bytes() == before
            daemon.kill()
            daemon.start()          # one that starts on a full disk finds what was there
            wait_until(lambda: daemon.status_of(made["id"]) == "ready")
            assert daemon.instance(made["id"])["pid"] == made["pid"] and ask(daemon).status == 200
            disk.free()
            assert daemon.create("other")["status"] == "ready"
    finally:
        disk.close()


# --- the clock --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("days", [-400, 400])
def test_a_clock_that_jumps_ages_nobody(tmp_path: Path, shim: Shim, days: int) -> None:
    with Daemon(tmp_path / "daemon", shim.environment, patch={"instance_manager.REAPER_STEP_S": 0.05}) as daemon:
        made = daemon.create("m", timeout=3600)
        loading = daemon.create("loading", sim={"start_s": 3}, wait=False)
        shim.set("clock_offset_s", days * 86400)
        wait_until(lambda: daemon.status_of(loading["id"]) == "ready")
        after = daemon.instance(made["id"])
        assert (after["status"], after["pid"], after["restarts"]) == ("ready", made["pid"], 0)
        assert 3000 < after["expires_in"] <= 3600
        assert ask(daemon).status == 200
        daemon.kill()
        daemon.start()              # nor does a daemon that was started in another year lose anything
        wait_until(lambda: daemon.status_of(made["id"]) == "ready")
        assert daemon.instance(made["id"])["pid"] == made["pid"]


# --- pids -------------------------------------------------------------------------------------------------------------

def test_a_stranger_with_an_engines_pid_is_never_killed(tmp_path: Path) -> None:
    """The kernel's own reuse of a pid, hurried along; where it may not be, tests/chaos/faults.py edits a record."""
    if not os.access(LAST_PID, os.W_OK):
        pytest.skip(f"{LAST_PID} cannot be written")
    with Daemon(tmp_path / "daemon") as daemon:
        made = daemon.create("m")
        daemon.kill()
        for member in processes.session_members(made["pid"]):
            os.kill(member.pid, signal.SIGKILL)
        wait_until(lambda: processes.read_process(made["pid"]) is None)
        stranger = reuse(made["pid"])
        try:
            daemon.start()
            wait_until(lambda: daemon.status_of(made["id"]) == "ready")
            assert daemon.instance(made["id"])["pid"] != made["pid"]
            daemon.remove()
            assert stranger.poll() is None
        finally:
            stranger.kill()
            stranger.wait()


def reuse(pid: int) -> subprocess.Popen[bytes]:
    """Another process, leader of a session like the one before, with this pid."""
    for _ in range(200):
        LAST_PID.write_text(str(pid - 1))
        found = subprocess.Popen(["sleep", "600"], start_new_session=True)
        if found.pid == pid:
            return found
        found.kill()
        found.wait()
    pytest.skip("others take the pid each time")


# --- processes, threads and descriptors -------------------------------------------------------------------------------

def test_without_a_process_to_be_had_the_daemon_waits_for_one(tmp_path: Path, shim: Shim) -> None:
    """Its worker is killed, and none can be forked, then none can have a thread: its master lives and tries again."""
    with Daemon(tmp_path / "daemon", shim.environment) as daemon:
        made = daemon.create("m")
        master = daemon.pid
        shim.set("no_process", 1)
        daemon.signal(signal.SIGKILL, daemon.worker_pid)
        wait_until(lambda: "no worker process can be had now" in daemon.log)
        shim.set("no_process", 0)
        wait_until(lambda: answers(daemon))
        wait_until(lambda: daemon.status_of(made["id"]) == "ready")
        assert daemon.pid == master and daemon.instance(made["id"])["pid"] == made["pid"]
        assert ask(daemon).status == 200


class FewDescriptors(Daemon):
    """As under `ulimit -n 256`."""

    def start(self) -> FewDescriptors:
        self._argv = ["/bin/sh", "-c", f'ulimit -n {FEW}; exec "$@"', "sh", *self._argv]
        super().start()
        return self


def test_under_ulimit_n_256_more_clients_than_descriptors_wait_and_are_served(tmp_path: Path) -> None:
    with FewDescriptors(tmp_path / "daemon") as daemon, contextlib.ExitStack() as open_ones:
        made = daemon.create("m")
        assert resource.prlimit(daemon.worker_pid, resource.RLIMIT_NOFILE) == (FEW, FEW)
        first = open_ones.enter_context(contextlib.closing(
            http.client.HTTPConnection("127.0.0.1", daemon.port, timeout=120)))
        first.connect()
        idle = [open_ones.enter_context(socket.create_connection(("127.0.0.1", daemon.port), 120))
                for _ in range(2 * FEW)]
        wait_until(lambda: "descriptor" in daemon.log)      # it says what is missing
        assert made["pid"] in daemon.engine_processes()
        for one in idle:
            one.close()
        first.request("GET", "/health")
        assert first.getresponse().status == 200
        wait_until(lambda: answers(daemon))
        after = daemon.instance(made["id"])
        assert (after["status"], after["pid"], after["restarts"]) == ("ready", made["pid"], 0)
        assert ask(daemon).status == 200
