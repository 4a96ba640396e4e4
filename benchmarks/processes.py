"""Programs under test: started in a session of their own, measured as a tree, ended as a tree."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import psutil

BUILD = Path(__file__).resolve().parent / "build"
LOAD = BUILD / "load"
UPSTREAM = BUILD / "upstream"

END_GRACE_S = 20.0
FIRST_PORT, LAST_PORT = 21000, 31999        # below Linux's ephemeral range, so no outgoing connection holds one
_given_ports: set[int] = set()


def build(names: Sequence[str] = ("load", "upstream")) -> None:
    """Compiles the C programs that are older than their source.  Raises CalledProcessError."""
    BUILD.mkdir(exist_ok=True)
    for name in names:
        source, target = BUILD.parent / f"{name}.c", BUILD / name
        if not target.exists() or target.stat().st_mtime < source.stat().st_mtime:
            compiler = os.environ.get("CC", "cc")
            subprocess.run([compiler, "-std=gnu11", "-O2", "-Wall", "-Wextra", "-o", str(target), str(source)],
                           check=True)


def raise_file_limit(wanted: int = 65536) -> int:
    """Lets this process and its children open `wanted` files, or as many as they may.  Returns the limit."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    for limit in ((wanted, max(wanted, hard)), (hard, hard)):
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, limit)
            return limit[0]
        except (ValueError, OSError):
            continue
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def free_port() -> int:
    """A loopback port that nobody listens on and that was not given before."""
    for port in range(FIRST_PORT, LAST_PORT):
        if port in _given_ports:
            continue
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        _given_ports.add(port)
        return port
    raise RuntimeError("no free port on loopback")


def wait_until(predicate: Callable[[], bool], timeout_s: float, every_s: float = 0.1) -> bool:
    """True as soon as the predicate is; False when it was not within timeout_s."""
    deadline = time.monotonic() + timeout_s
    while not predicate():
        if time.monotonic() >= deadline:
            return False
        time.sleep(every_s)
    return True


class Program:
    """One child with its descendants.  What it prints goes to `log`, which is shown when it does not start."""

    def __init__(self, argv: Sequence[str], cwd: Path, env: Mapping[str, str] | None = None) -> None:
        self.log = cwd / "output.log"
        with open(self.log, "ab") as output:
            self._child = subprocess.Popen(argv, cwd=cwd, env=dict(env) if env is not None else None,
                                           stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
                                           start_new_session=True)

    def alive(self) -> bool:
        return self._child.poll() is None

    def log_tail(self, lines: int = 15) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def tree(self, with_engines: bool = False) -> Iterator[psutil.Process]:
        """The child and its descendants, without the null upstreams that it started as engines."""
        try:
            root = psutil.Process(self._child.pid)
            family = [root, *root.children(recursive=True)]
        except psutil.NoSuchProcess:
            return
        for process in family:
            try:
                if with_engines or process.exe() != str(UPSTREAM):
                    yield process
            except psutil.Error:
                continue

    def cpu_s(self) -> float:
        """User and system time of the tree so far."""
        return sum(_cpu_s(process) for process in self.tree())

    def pss_bytes(self) -> int:
        """Proportional set size of the tree: resident memory in which a shared page counts once."""
        return sum(_pss_bytes(process.pid) for process in self.tree())

    def end(self) -> None:
        """TERM, then KILL for whatever of the tree is left; blocks for up to END_GRACE_S."""
        family = list(self.tree(with_engines=True))
        _signal_group(self._child.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._child.wait(END_GRACE_S)
        _signal_group(self._child.pid, signal.SIGKILL)
        self._child.wait()
        for process in family:                  # those in sessions of their own; psutil checks the start time
            try:
                process.kill()
            except psutil.Error:
                continue


def _signal_group(group: int, number: signal.Signals) -> None:
    try:
        os.killpg(group, number)
    except (ProcessLookupError, PermissionError):
        return


def _cpu_s(process: psutil.Process) -> float:
    try:
        times = process.cpu_times()
    except psutil.Error:
        return 0.0
    return float(times.user + times.system)


def _pss_bytes(pid: int) -> int:
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith("Pss:"))
