"""What the daemon tells the service manager that started it, over a socket as systemd's."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from instances import processes
from tests.daemon import HANG_S, Daemon
from web.notify import Notifier

pytestmark = pytest.mark.whole


class Manager:
    """The other end of $NOTIFY_SOCKET."""

    def __init__(self, address: str) -> None:
        self.address = address
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(address.replace("@", "\0", 1) if address.startswith("@") else address)

    def next(self) -> dict[str, str]:
        self._socket.settimeout(HANG_S)
        return dict(line.split("=", 1) for line in self._socket.recv(4096).decode().split("\n"))

    def wait_for(self, name: str) -> dict[str, str]:
        while name not in (told := self.next()):
            assert "WATCHDOG" in told, told
        return told

    def silent(self) -> bool:
        self._socket.setblocking(False)
        try:
            self._socket.recv(4096)
        except BlockingIOError:
            return True
        return False

    def close(self) -> None:
        self._socket.close()


@contextmanager
def manager(address: str) -> Iterator[Manager]:
    made = Manager(address)
    try:
        yield made
    finally:
        made.close()


@pytest.mark.parametrize("abstract", [False, True], ids=["path", "abstract"])
def test_a_daemons_life_is_told(tmp_path: Path, short_folder: Path, abstract: bool) -> None:
    address = f"@vllm-server-test-{os.getpid()}" if abstract else str(short_folder / "notify")
    with manager(address) as systemd, Daemon(tmp_path, {"NOTIFY_SOCKET": address}) as daemon:
        told = systemd.next()
        assert (told["READY"], told["STATUS"]) == ("1", f"serves on http://127.0.0.1:{daemon.port}")
        assert daemon.get("/health").status == 200
        daemon.signal(signal.SIGHUP)
        told = systemd.next()
        assert told["RELOADING"] == "1"
        assert 0 <= time.monotonic_ns() // 1000 - int(told["MONOTONIC_USEC"]) < HANG_S * 1e6
        assert systemd.next()["READY"] == "1"
        daemon.stop()
        told = systemd.next()
        assert told["STOPPING"] == "1"
        assert int(told["EXTEND_TIMEOUT_USEC"]) >= 100_000_000      # grace, drain and stop
        assert systemd.silent()


def test_ready_is_told_after_the_engines_are_taken_over(tmp_path: Path, short_folder: Path) -> None:
    address = str(short_folder / "notify")
    with manager(address) as systemd, Daemon(tmp_path, {"NOTIFY_SOCKET": address, "KEEP_INSTANCES": "true"}) as daemon:
        systemd.wait_for("READY")
        instance = daemon.create("m")
        assert "NOTIFY_SOCKET" not in processes.environment(instance["pid"])    # an engine cannot speak for it
        daemon.stop()
        systemd.wait_for("STOPPING")
        daemon.start()
        systemd.wait_for("READY")
        assert [one["pid"] for one in daemon.instances()] == [instance["pid"]]
        daemon.signal(signal.SIGKILL, daemon.worker_pid)        # a worker that was replaced serves again
        systemd.wait_for("READY")
        daemon.remove()


def test_a_watchdog_is_fed_by_the_master_only_where_it_is_asked_for(tmp_path: Path, short_folder: Path) -> None:
    address = str(short_folder / "notify")
    with manager(address) as systemd, Daemon(tmp_path, {"NOTIFY_SOCKET": address, "WATCHDOG_USEC": "3000000"}):
        systemd.wait_for("READY")
        for _ in range(2):
            assert systemd.wait_for("WATCHDOG") == {"WATCHDOG": "1"}


def test_a_bad_reload_is_over_too(tmp_path: Path, short_folder: Path) -> None:
    address = str(short_folder / "notify")
    with manager(address) as systemd, Daemon(tmp_path, {"NOTIFY_SOCKET": address}) as daemon:
        systemd.wait_for("READY")
        (tmp_path / "config.yaml").write_text("models: [\n")
        daemon.signal(signal.SIGHUP)
        systemd.wait_for("RELOADING")
        systemd.wait_for("READY")
        assert "not reloaded" in daemon.log


def test_its_variables_are_taken_out() -> None:
    environ = {"NOTIFY_SOCKET": "/run/n", "WATCHDOG_USEC": "3000000", "WATCHDOG_PID": str(os.getpid()), "HOME": "/"}
    Notifier.taken_from(environ)
    assert environ == {"HOME": "/"}


@pytest.mark.parametrize("environ", [{}, {"NOTIFY_SOCKET": ""}, {"NOTIFY_SOCKET": "vsock:2:9"},
                                     {"NOTIFY_SOCKET": "/nowhere/notify"}])
def test_nobody_to_tell_is_no_error(environ: dict[str, str]) -> None:
    Notifier.taken_from(environ).ready("serves")


def test_a_watchdog_of_another_process_is_not_ours(short_folder: Path) -> None:
    address = str(short_folder / "notify")
    with manager(address) as systemd:
        asked = {"NOTIFY_SOCKET": address, "WATCHDOG_USEC": "1000000"}
        Notifier.taken_from({**asked, "WATCHDOG_PID": "1"}).alive(1.0)
        assert systemd.silent()
        notifier = Notifier.taken_from({**asked, "WATCHDOG_PID": str(os.getpid())})
        for now in (1.0, 1.1, 1.4):
            notifier.alive(now)
        assert [systemd.next(), systemd.next()] == [{"WATCHDOG": "1"}] * 2
        assert systemd.silent()
