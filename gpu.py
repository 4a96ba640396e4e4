"""Devices and their memory as frozen values: NVIDIA GPUs through NVML, else the host's RAM as the one device.

`GpuReader.read` is the only place that asks NVML; the rest are functions of readings, of /proc and of /sys.  Sizes are
bytes, times are seconds of the monotonic clock.
"""

from __future__ import annotations

import logging
import os
import re
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import pynvml

log = logging.getLogger(__name__)

_RETRY_S = 30.0    # a driver that is loaded later (or again) is found within this time


@dataclass(frozen=True)
class DeviceProcess:
    """A process with memory on a device.  In a container `pid` may be the host's number for it."""

    pid: int
    memory_bytes: int | None    # None: the driver does not tell


@dataclass(frozen=True)
class Device:
    """One device.  `uuid` is what a child's CUDA_VISIBLE_DEVICES gets; `error` says why the figures are zero."""

    index: int
    uuid: str
    name: str
    kind: str                   # "cuda" or "host"
    total_bytes: int = 0
    used_bytes: int = 0
    free_bytes: int = 0
    utilization: float | None = None    # 0..1
    temperature_c: int | None = None
    processes: tuple[DeviceProcess, ...] = ()
    error: str | None = None


@dataclass(frozen=True)
class Reading:
    """All devices at one moment (`at`, monotonic), and the versions of the driver and of the CUDA that it offers."""

    at: float
    devices: tuple[Device, ...]
    driver: str | None = None
    cuda: str | None = None


class GpuReader:
    """Reads all devices.  Thread-safe: one reading at a time, and `read` blocks for as long as the driver does.

    `nvml` is the pynvml module; `host` tells (total, available) bytes of RAM; `visible` limits and orders the GPUs as
    CUDA_VISIBLE_DEVICES does (None: that variable of this process).  Once a GPU was seen it keeps its index, and stays
    listed with an error when it or the driver fails, so that nothing is planned onto another device in its place.
    """

    def __init__(self, nvml: Any | None = None, host: Callable[[], tuple[int, int]] | None = None, *,
                 visible: str | None = None) -> None:
        self._nvml: Any = pynvml if nvml is None else nvml
        self._host = host or host_totals
        self._visible = os.environ.get("CUDA_VISIBLE_DEVICES") if visible is None else visible
        self._mismatch = getattr(self._nvml, "NVMLLibraryMismatchError", self._nvml.NVMLError)
        self._lock = threading.Lock()
        self._running = False                  # NVML is initialised
        self._retry_at = float("-inf")
        self._problem = "the NVIDIA driver is not loaded"
        self._known: dict[str, Device] = {}    # every GPU seen so far, by uuid, as it was last read
        self._noted: set[str] = set()

    def read(self, now: float) -> Reading:
        """All devices.  A device's failure stands in its `error`; nothing is raised for it."""
        with self._lock:
            gpus = visible_devices(self._gpus(now), self._visible)
            if gpus:
                return Reading(now, gpus, *self._versions())
            return Reading(now, (_host_device(*self._host()),))

    def close(self) -> None:
        """Lets go of the driver; a later `read` would take it up again."""
        with self._lock:
            self._stop()
            self._retry_at = float("-inf")

    # --- caller holds the lock ---

    def _start(self, now: float) -> None:
        """Initialises NVML, tried at most every _RETRY_S."""
        if self._running or now < self._retry_at:
            return
        self._retry_at = now + _RETRY_S
        try:
            self._nvml.nvmlInit()
            self._running = True
        except self._nvml.NVMLError as error:
            self._problem = str(error)
            self._note(f"No NVIDIA driver to talk to ({error})", logging.WARNING if self._known else logging.INFO)

    def _stop(self) -> None:
        if self._running:
            self._running = False
            with suppress(self._nvml.NVMLError):
                self._nvml.nvmlShutdown()

    def _gpus(self, now: float) -> list[Device]:
        self._start(now)
        found: list[Device] = []
        if self._running:
            try:
                positions = range(self._nvml.nvmlDeviceGetCount())
                found = [gpu for position in positions if (gpu := self._gpu(position))]
                errors = [gpu.error for gpu in found if gpu.error]
                self._problem = errors[0] if errors else "the GPU is gone"
            except self._nvml.NVMLError as error:
                self._problem = str(error)
            if all(gpu.error for gpu in found):    # none at all, too: begin anew, after the usual pause
                self._stop()
        self._known |= {gpu.uuid: gpu for gpu in found if not gpu.error}
        present = {gpu.uuid for gpu in found}
        lost = [_without_figures(gpu, self._problem) for gpu in self._known.values() if gpu.uuid not in present]
        # A GPU that answers stands before one that does not, should both claim one index.
        by_index = {gpu.index: gpu for gpu in sorted(lost + found, key=lambda gpu: gpu.error is None)}
        return [by_index[index] for index in sorted(by_index)]

    def _gpu(self, position: int) -> Device | None:
        """The GPU at NVML's `position`; None for one that is split by MIG."""
        nvml = self._nvml
        gpu = next((known for known in self._known.values() if known.index == position),
                   Device(position, "", "NVIDIA GPU", "cuda"))
        try:
            handle = nvml.nvmlDeviceGetHandleByIndex(position)
            uuid, name = _text(nvml.nvmlDeviceGetUUID(handle)), _text(nvml.nvmlDeviceGetName(handle))
            gpu = Device(self._index(uuid, position), uuid, name, "cuda")
            # The parts of a GPU in MIG mode are devices of their own kind (own uuids, no utilisation) that nothing
            # here plans for, and the whole cannot be used: it is left out.
            if (mode := self._optional(nvml.nvmlDeviceGetMigMode, handle)) and mode[0]:
                self._note(f"GPU {position} ({name}) is in MIG mode and is not used", logging.WARNING)
                return None
            total, used, free = self._memory(handle)
        except nvml.NVMLError as error:
            self._note(f"GPU {position} ({gpu.name}): {error}", logging.WARNING)
            return _without_figures(gpu, str(error))
        rates = self._optional(nvml.nvmlDeviceGetUtilizationRates, handle)
        return replace(gpu, total_bytes=total, used_bytes=used, free_bytes=free,
                       utilization=None if rates is None else rates.gpu / 100,
                       temperature_c=self._optional(nvml.nvmlDeviceGetTemperature, handle,
                                                    nvml.NVML_TEMPERATURE_GPU),
                       processes=self._processes(handle))

    def _index(self, uuid: str, position: int) -> int:
        """NVML counts anew when a driver is loaded again; here a GPU keeps the index that it had."""
        if uuid in self._known:
            return self._known[uuid].index
        taken = {gpu.index for gpu in self._known.values()}
        return max(taken) + 1 if position in taken else position

    def _memory(self, handle: Any) -> tuple[int, int, int]:
        """Total, used and free bytes.  Version 2 does not count what the driver reserves for itself as used."""
        nvml = self._nvml
        if version := getattr(nvml, "nvmlMemory_v2", None):
            with suppress(nvml.NVMLError):    # an older driver has version 1 only
                info = nvml.nvmlDeviceGetMemoryInfo(handle, version=version)
                return info.total, info.used, info.free
        try:
            info = nvml.nvmlDeviceGetMemoryInfo(handle)
        except nvml.NVMLError_NotSupported:    # an integrated GPU has no memory but the host's
            total, available = self._host()
            return total, total - available, available
        return info.total, info.used, info.free

    def _processes(self, handle: Any) -> tuple[DeviceProcess, ...]:
        for call in (self._nvml.nvmlDeviceGetComputeRunningProcesses,
                     self._nvml.nvmlDeviceGetComputeRunningProcesses_v2):
            try:
                return tuple(DeviceProcess(each.pid, each.usedGpuMemory) for each in call(handle))
            except self._mismatch:
                continue              # an older driver
            except self._nvml.NVMLError:
                break                 # not supported, or not permitted
        return ()

    def _versions(self) -> tuple[str | None, str | None]:
        if not self._running:
            return None, None
        driver = self._optional(self._nvml.nvmlSystemGetDriverVersion)
        cuda = self._optional(self._nvml.nvmlSystemGetCudaDriverVersion)
        return _text(driver) if driver else None, f"{cuda // 1000}.{cuda % 1000 // 10}" if cuda else None

    def _optional(self, call: Callable[..., Any], *args: Any) -> Any:
        """The call's answer, or None where this GPU or driver does not have it."""
        try:
            return call(*args)
        except self._nvml.NVMLError:
            return None

    def _note(self, message: str, level: int) -> None:
        """Logs once, however often it is read again."""
        if message not in self._noted:
            self._noted.add(message)
            log.log(level, "%s", message)


def visible_devices(devices: Iterable[Device], visible: str | None) -> tuple[Device, ...]:
    """The devices that CUDA_VISIBLE_DEVICES=`visible` leaves, in its order, by index or (beginning of a) uuid.

    As CUDA does it, the list ends at its first entry that names no device.  An index is NVML's, which is CUDA's with
    CUDA_DEVICE_ORDER=PCI_BUS_ID.
    """
    devices = tuple(devices)
    if visible is None:
        return devices
    chosen: list[Device] = []
    for word in visible.replace(" ", "").split(","):
        by_uuid = word.startswith("GPU-")
        device = next((device for device in devices
                       if (device.uuid.startswith(word) if by_uuid else str(device.index) == word)), None)
        if device is None or device in chosen:
            break
        chosen.append(device)
    return tuple(chosen)


def device_json(device: Device) -> dict[str, Any]:
    """One device of GET /gpus."""
    return {
        "index": device.index, "uuid": device.uuid, "name": device.name, "kind": device.kind,
        "memory": {"total": device.total_bytes, "used": device.used_bytes, "free": device.free_bytes},
        "utilization": device.utilization, "temperature_c": device.temperature_c,
        "processes": [{"pid": each.pid, "memory": each.memory_bytes} for each in device.processes],
        "error": device.error,
    }


def memory_by_group(reading: Reading, groups: Mapping[str, Collection[int]]) -> dict[str, dict[int, int]]:
    """Bytes by device index for each group of pids (an instance's tree), as the driver accounts for them.

    A group that cannot be measured this way is left out: one with a process whose memory is not told, and all of them
    where no pid is known to the driver, which is so in a container that sees other numbers than the host.  A group
    without memory, beside one that has some, is measured: it has none.
    """
    owner = {pid: group for group, pids in groups.items() for pid in pids}
    measured: dict[str, dict[int, int]] = {group: {} for group in groups}
    matched = False
    for device in reading.devices:
        for process in device.processes:
            group = owner.get(process.pid)
            if group is None:
                continue
            matched = True
            if process.memory_bytes is None:
                measured.pop(group, None)
            elif group in measured:
                measured[group][device.index] = measured[group].get(device.index, 0) + process.memory_bytes
    return measured if matched else {}


def memory_by_difference(before: Reading, after: Reading, device_indexes: Iterable[int]) -> dict[int, int]:
    """How much more of each device is in use than before; a device that did not answer both times is left out.

    Right only while nothing else starts or stops on it.
    """
    was = {device.index: device.used_bytes for device in before.devices if not device.error}
    now = {device.index: device.used_bytes for device in after.devices if not device.error}
    return {index: max(0, now[index] - was[index]) for index in device_indexes if index in was and index in now}


# --- the host as a device -------------------------------------------------------------------------------------------

def host_memory(pids: Iterable[int], proc: Path = Path("/proc")) -> int:
    """Resident bytes of these processes; what they share counts once where the kernel tells (PSS)."""
    return sum(_resident(proc / str(pid)) for pid in pids)


def host_totals(root: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")) -> tuple[int, int]:
    """(total, available) bytes of RAM for this process: the machine's, or less where a cgroup sets a limit."""
    machine = psutil.virtual_memory()
    total, available = machine.total, machine.available
    for folder, limit_name, usage_name, cache_key in _cgroups(root, membership):
        limit = _number(folder / limit_name)
        if limit is None or limit >= machine.total:    # "max", or the huge number that means the same in version 1
            continue
        total = min(total, limit)
        used = (_number(folder / usage_name) or 0) - _statistic(folder / "memory.stat", cache_key)
        available = min(available, max(0, limit - used))
    return total, available


def _cgroups(root: Path, membership: Path) -> Iterator[tuple[Path, str, str, str]]:
    """The cgroups that bound this process, each with the names of limit, usage and reclaimable file cache.

    Every ancestor's limit holds too.  In a container the path may be the host's, of which only the root is mounted.
    """
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        number, controllers, path = line.split(":", 2)
        if number == "0":
            top, names = root, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            top, names = root / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        own = Path(path.lstrip("/"))
        for folder in (own, *own.parents):
            yield top / folder, *names


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def _statistic(path: Path, key: str) -> int:
    try:
        match = re.search(rf"^{key} (\d+)$", path.read_text(), re.MULTILINE)
    except OSError:
        return 0
    return int(match[1]) if match else 0


def _resident(folder: Path) -> int:
    with suppress(OSError):    # gone, a zombie, another user's, or a kernel without it
        if match := re.search(r"^Pss:\s+(\d+) kB$", (folder / "smaps_rollup").read_text(), re.MULTILINE):
            return int(match[1]) * 1024
    with suppress(OSError, IndexError, ValueError):
        return int((folder / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0


def _host_device(total_bytes: int, available_bytes: int) -> Device:
    return Device(0, "", "CPU host memory", "host", total_bytes, total_bytes - available_bytes, available_bytes)


def _without_figures(gpu: Device, error: str) -> Device:
    return Device(gpu.index, gpu.uuid, gpu.name, gpu.kind, error=error)


def _text(value: str | bytes) -> str:
    """Older versions of pynvml give bytes."""
    return value.decode() if isinstance(value, bytes) else value
