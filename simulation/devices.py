"""The memory of simulated devices: a folder of files, changed under one lock, as a real GPU's is by its driver.

In it
  devices.json    `[{"index", "total_bytes", "reserved_bytes"?, "uuid"?, "name"?}]`: the devices and their sizes
  <pid>.json      `{"pid", "memory_bytes", "devices", …}`: what a process holds on each of these devices; when the
                  process is gone it counts for nothing, unless it says `"always": true`
  <pid>.dead      the same of a process that has ended, while its memory is not free yet (`frees_late_ms`)
  driver          `name value…` a line: how the driver behaves (tests/nvml/nvml.c reads the most of them)
  refused         a line for every claim that found no room
  overcommitted   a line for every moment at which more was held than a device has: that must never be

A stand-in for NVML and the tests read the same files.  Without devices.json sizes are unknown and nothing is refused.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class SimulatedDevice:
    index: int
    total_bytes: int
    reserved_bytes: int = 0         # by the driver for itself: nobody can have it
    uuid: str = ""

    @property
    def capacity_bytes(self) -> int:
        """What CUDA calls its total."""
        return self.total_bytes - self.reserved_bytes


@dataclass(frozen=True)
class Holding:
    """What one process holds on each of `devices`, and in the host's memory for a model that sleeps."""

    pid: int
    memory_bytes: int
    devices: tuple[int, ...]
    host_bytes: int = 0
    label: str = ""                 # of the instance, for pictures
    always: bool = False            # of a process that only the files know
    ended: bool = field(default=False, compare=False)   # the process is gone, its memory is not free yet


class NoMemory(Exception):
    """A claim found no room on a device; nothing has changed."""

    def __init__(self, device: int, wanted_bytes: int, free_bytes: int) -> None:
        super().__init__(f"{wanted_bytes} bytes wanted on device {device}, {free_bytes} free")
        self.device, self.wanted_bytes, self.free_bytes = device, wanted_bytes, free_bytes


class DeviceFolder:
    """Any number of processes may use one folder at a time."""

    def __init__(self, path: Path) -> None:
        self.path = path

    # --- reading --------------------------------------------------------------------------------------------------

    def devices(self) -> dict[int, SimulatedDevice]:
        """By index; none where there is no devices.json."""
        try:
            found = json.loads((self.path / "devices.json").read_text())
        except FileNotFoundError:
            return {}
        return {one["index"]: SimulatedDevice(one["index"], one["total_bytes"], one.get("reserved_bytes", 0),
                                              one.get("uuid", "")) for one in found}

    def holdings(self) -> list[Holding]:
        """All that is held now."""
        late_s = float(self.driver().get("frees_late_ms", "0")) / 1000
        found = []
        for path in self.path.glob("[0-9]*.json"):
            holding = _read(path)
            if holding is None:
                continue
            if holding.always or alive(holding.pid):
                found.append(holding)
            elif late_s > 0:
                _end(path)
        for path in self.path.glob("[0-9]*.dead"):
            with contextlib.suppress(FileNotFoundError):
                age_s = time.time() - path.stat().st_mtime
                holding = _read(path)
                if holding is not None and age_s < late_s:
                    found.append(replace(holding, ended=True))
        return found

    def held(self) -> dict[int, int]:
        """Bytes by device, of all processes together."""
        sums: dict[int, int] = {}
        for holding in self.holdings():
            for device in holding.devices:
                sums[device] = sums.get(device, 0) + holding.memory_bytes
        return sums

    def free(self) -> dict[int, int]:
        with self.locked():
            held = self.held()
        return {device.index: device.capacity_bytes - held.get(device.index, 0) for device in self.devices().values()}

    def driver(self) -> dict[str, str]:
        try:
            lines = (self.path / "driver").read_text().splitlines()
        except FileNotFoundError:
            return {}
        return {name: value for name, _, value in (line.partition(" ") for line in lines)}

    # --- changing -------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Nobody else changes what is held meanwhile, but by dying."""
        with open(self.path / "lock", "ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def claim(self, *holdings: Holding) -> None:
        """From now on each of these processes holds that, in place of what it held.  Raises NoMemory."""
        with self.locked():
            self._remove_dead()
            devices, held = self.devices(), self.held()
            own = {one.pid: one for one in self.holdings() if not one.ended}
            for holding in holdings:
                before = own.get(holding.pid)
                for index in holding.devices:
                    had = before.memory_bytes if before is not None and index in before.devices else 0
                    more = holding.memory_bytes - had
                    held[index] = held.get(index, 0) + more
                    if index in devices and more > 0 and held[index] > devices[index].capacity_bytes:
                        free = devices[index].capacity_bytes - held[index] + more
                        self.note("refused", f"{holding.label} pid {holding.pid}: {more} bytes on device {index}, "
                                             f"{free} free")
                        raise NoMemory(index, more, free)
            for holding in holdings:
                self._write(holding)
            self._check()

    def release(self, pids: Collection[int]) -> None:
        """These processes have ended: what they held is free, at once or a little later."""
        late = float(self.driver().get("frees_late_ms", "0")) > 0
        for pid in pids:
            path = self.path / f"{pid}.json"
            if late:
                _end(path)
            else:
                path.unlink(missing_ok=True)

    def note(self, name: str, line: str) -> None:
        """One line more in a file of this folder."""
        with open(self.path / name, "ab") as file:
            file.write(f"{time.time():.3f} {line}\n".encode())

    def _write(self, holding: Holding) -> None:
        content: dict[str, Any] = {"pid": holding.pid, "memory_bytes": holding.memory_bytes,
                                   "devices": list(holding.devices)}
        content |= {name: value for name in ("host_bytes", "label", "always") if (value := getattr(holding, name))}
        path = self.path / f"{holding.pid}.json"
        draft = path.with_suffix(".tmp")
        draft.write_text(json.dumps(content))
        draft.replace(path)

    def _remove_dead(self) -> None:
        """The files that count for nothing any more: another process may get the number.  Caller holds the lock."""
        held = {(one.pid, one.ended) for one in self.holdings()}
        for path in [*self.path.glob("[0-9]*.json"), *self.path.glob("[0-9]*.dead")]:
            if (int(path.stem), path.suffix == ".dead") not in held:
                path.unlink(missing_ok=True)

    def _check(self) -> None:
        """Caller holds the lock."""
        held = self.held()
        for device in self.devices().values():
            if held.get(device.index, 0) > device.capacity_bytes:
                self.note("overcommitted", f"device {device.index}: {held[device.index]} bytes held of "
                                           f"{device.capacity_bytes}")


def visible_devices(visible: str, devices: Mapping[int, SimulatedDevice]) -> list[int]:
    """The indexes that CUDA_VISIBLE_DEVICES names, by index or (beginning of a) uuid, up to the first that is none."""
    found: list[int] = []
    for word in visible.replace(" ", "").split(","):
        if word.startswith("GPU-"):
            index = next((one.index for one in devices.values() if one.uuid.startswith(word)), None)
        else:
            index = int(word) if word.isdigit() else None
        if index is None:
            break
        found.append(index)
    return found


def alive(pid: int) -> bool:
    """Whether it runs: a dead process that nobody has waited for holds no memory."""
    try:
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0] not in (b"Z", b"X")
    except (OSError, IndexError):
        return False


def _read(path: Path) -> Holding | None:
    try:
        entry = json.loads(path.read_text())
    except (OSError, ValueError):
        return None                     # it ended meanwhile
    return Holding(entry["pid"], entry["memory_bytes"], tuple(entry["devices"]), entry.get("host_bytes", 0),
                   entry.get("label", ""), entry.get("always", False))


def _end(path: Path) -> None:
    """Its process has ended just now, as far as anybody knows."""
    with contextlib.suppress(FileNotFoundError):
        os.utime(path)
        path.replace(path.with_suffix(".dead"))
