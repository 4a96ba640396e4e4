"""The daemon that chaos strikes: models on demand on two GPUs with room for three of five, sleepers among them, and a
disk, a clock and a process table that can be turned against it."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from instances import processes
from tests.chaos.shim import Shim
from tests.daemon import Daemon
from tests.gpu_box import GpuBox
from tests.support import wait_until

MODELS = ("alpha", "beta", "gamma", "delta", "epsilon")
GPUS_GIB = (80.0, 40.0)
EACH_MIB = 34 << 10
DISK_BYTES = 8 << 20

SETTINGS = {
    "MAX_HOLD_SECONDS": "2", "PROBE_INTERVAL": "1", "PROBE_TIMEOUT": "15", "SLEEP_HOST_MEMORY_MB": "1000000",
    "DRAIN_TIMEOUT": "3", "STOP_TIMEOUT": "5", "SHUTDOWN_GRACE": "3", "START_TIMEOUT": "180", "APP_THREADS": "64",
    "VLLM_SERVER_DEV_MODE": "1"}
PATCH = {
    # Minutes become seconds, and no instance gives up for good: hours of a box are packed into minutes.
    "instances.instance.FAILURES_ALLOWED": 1_000_000, "instances.instance.BACKOFF_LIMIT_S": 1.0,
    "instances.demand.FAILED_FOR_S": 1.0, "instances.demand.NO_ROOM_FOR_S": 1.0, "instances.rooms.HOPELESS_S": 3.0,
    "instances.settling.STILL_S": 0.2}


def entry(name: str) -> dict[str, Any]:
    knobs = {"start_s": 0.3, "tokens_per_s": 100, "wake_s": 0.1, "sleep_s": 0.1}
    return {"model_path": f"org/{name}", "memory_mb": EACH_MIB, "params": {"additional_config": {"sim": knobs}},
            **({"sleep": 1} if name in ("alpha", "beta") else {}),
            **({"idle_timeout_seconds": 2} if name in ("beta", "epsilon") else {})}


def config() -> dict[str, Any]:
    return {"models": {name: entry(name) for name in MODELS}}


@dataclass(frozen=True)
class Victim:
    """An engine, as its record tells of it."""

    id: str
    model: str
    state: str
    pid: int
    port: int | None

    def members(self) -> list[processes.Process]:
        return processes.session_members(self.pid)

    def signal(self, number: signal.Signals, members: Iterable[processes.Process] | None = None) -> None:
        for one in self.members() if members is None else members:
            processes.send_signal(one, number)


class Tmpfs:
    """STATE_DIR on a file system of its own that can really be full.  Needs the right to mount."""

    name = "a tmpfs"

    def __init__(self, path: Path) -> None:
        self._path = path
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES},mode=0700", "chaos", path], check=True,
                       capture_output=True)

    def fill(self) -> None:
        with open(self._path / "ballast", "wb", buffering=0) as file:
            for size in (1 << 16, 1):
                with contextlib.suppress(OSError):
                    while file.write(bytes(size)):
                        pass

    def free(self) -> None:
        (self._path / "ballast").unlink(missing_ok=True)

    def close(self) -> None:
        subprocess.run(["umount", "-l", self._path], check=True)


class ShimDisk:
    """Where nothing can be mounted: every write below STATE_DIR fails with ENOSPC (shim.c)."""

    name = "the shim"

    def __init__(self, shim: Shim) -> None:
        self._shim = shim

    def fill(self) -> None:
        self._shim.set("disk_full", 1)

    def free(self) -> None:
        self._shim.set("disk_full", 0)

    def close(self) -> None:
        self.free()


class World:
    """As a context manager it runs the daemon; at the end nothing may be left of it."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        state = folder / "daemon" / "state"
        self.shim = Shim(folder, disk=state, logs=[state / "logs", folder / "daemon" / "daemon.log"])
        self.box = GpuBox(folder, GPUS_GIB, SETTINGS | dict(self.shim.environment), config=config(), patch=PATCH)
        self.daemon: Daemon = self.box.daemon
        self.state = state
        self.disk: Tmpfs | ShimDisk = ShimDisk(self.shim)
        self.bystanders: list[subprocess.Popen[bytes]] = []
        self.hit: set[str] = set()          # models whose engines were struck since somebody cleared it
        self.refusals: list[str] = []       # what the daemon said where it did not start

    def __enter__(self) -> Self:
        self.daemon.folder.mkdir(parents=True)
        with contextlib.suppress(OSError, subprocess.CalledProcessError):
            self.disk = Tmpfs(self.state)
        self.box.write_config(config())
        self.daemon.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 traceback: TracebackType | None) -> None:
        if self.daemon.exited():
            self.daemon.process = None
        left = ""
        if error is None:
            if self.daemon.process is not None:
                self.daemon.stop()
            if left := self.left():
                error = AssertionError(f"the daemon has ended and has left {left}")
        try:
            self.box.__exit__(type(error) if error else None, error, traceback)
            if left and error:
                raise error
        finally:
            for one in self.bystanders:
                one.kill()
                one.wait()
            self.disk.close()
            self.shim.close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.daemon.port}"

    def left(self) -> str:
        """What is still there of the daemon, which has ended; empty where that is nothing."""
        found = {
            "processes": [(pid, processes.command_line(pid)) for pid in self.daemon.engine_processes()],
            "shared memory": self.daemon.engine_memory(), "records": self.daemon.records(),
            "run folders": [(path.name, [one.name for one in path.iterdir()] if path.is_dir() else "")
                            for path in self.daemon.temporary.iterdir()]}
        return "; ".join(f"{what} {things}" for what, things in found.items() if things)

    # --- the daemon -----------------------------------------------------------------------------------------------

    def worker(self) -> int | None:
        """None while there is none."""
        if self.daemon.exited():
            return None
        return next((one.pid for one in processes.all_processes()
                     if one.parent == self.daemon.pid and not one.zombie), None)

    def relays(self) -> list[int]:
        worker = self.worker()
        return [one.pid for one in processes.all_processes() if one.parent == worker and not one.zombie
                and "relay_child" in processes.command_line(one.pid)]

    def ensure_running(self) -> bool:
        """Start it where it does not run; whether that was needed."""
        if not self.daemon.exited():
            return False
        self.daemon.process = None
        self.daemon.start()
        return True

    # --- engines --------------------------------------------------------------------------------------------------

    def records(self) -> list[dict[str, Any]]:
        """Those that can be read: whether all can is for the invariants to say."""
        found = []
        for path in sorted((self.state / "instances").glob("*.json")):
            with contextlib.suppress(OSError, ValueError):
                found.append(json.loads(path.read_bytes()))
        return found

    def victims(self, *states: str) -> list[Victim]:
        """Engines that run, by the records: they tell while no daemon does."""
        found = [Victim(one["id"], one["spec"]["names"][0], one["state"], one["engine"]["pid"], one["port"])
                 for one in self.records() if one["engine"] is not None and one["state"] in states]
        return sorted((one for one in found if one.members()), key=lambda one: (one.model, one.id))

    def victim(self, dice: random.Random, *states: str, wait_s: float = 20.0) -> Victim | None:
        """One of them; None when there is none for so long."""
        draw, deadline = dice.random(), time.monotonic() + wait_s
        with contextlib.suppress(AssertionError):
            wait_until(lambda: self.victims(*states) or time.monotonic() > deadline)
        found = self.victims(*states)
        return found[int(draw * len(found))] if found else None

    def bystander(self) -> subprocess.Popen[bytes]:
        """A process that is none of the daemon's, in a session of its own, that nobody may kill."""
        found = subprocess.Popen(["sleep", "3600"], start_new_session=True, stdin=subprocess.DEVNULL)
        self.bystanders.append(found)
        return found

    def write_config(self, text: bytes | None) -> None:
        """config.yaml as it is, in place and not renamed into it; None: it is gone."""
        path = self.daemon.folder / "config.yaml"
        if text is None:
            path.unlink(missing_ok=True)
        else:
            path.write_bytes(text)

    def restore_config(self) -> None:
        self.box.write_config(config())


@contextlib.contextmanager
def limited(pid: int, kind: int, soft: int) -> Iterator[None]:
    """A process under a limit that it had not before."""
    import resource
    before = resource.prlimit(pid, kind)
    resource.prlimit(pid, kind, (soft, before[1]))
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            resource.prlimit(pid, kind, before)


def descriptors(pid: int) -> int:
    """The lowest number above all that it has open."""
    return max(int(entry.name) for entry in os.scandir(f"/proc/{pid}/fd")) + 1
