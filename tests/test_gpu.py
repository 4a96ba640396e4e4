"""Devices: readings from an NVML that fails in every way it can, the host's RAM, and the arithmetic on readings."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from dataclasses import FrozenInstanceError, dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pynvml
import pytest

from gpu import (
    Device,
    DeviceProcess,
    GpuReader,
    Reading,
    device_json,
    host_memory,
    host_totals,
    memory_by_difference,
    memory_by_group,
    visible_devices,
)

GIB = 1 << 30


def nvml_error(code: int) -> Exception:
    error: Exception = pynvml.NVMLError(code)
    return error


@dataclass
class Card:
    uuid: str
    total: int = 80 * GIB
    used: int = 10 * GIB
    reserved: int = GIB
    processes: list[tuple[int, int | None]] = field(default_factory=list)
    mig: int = 0
    fails: dict[str, int] = field(default_factory=dict)    # function name -> NVML error code


class FakeNvml:
    """The functions of pynvml that a driver stands behind, with the real module's error classes and constants."""

    NVMLError = pynvml.NVMLError
    NVMLError_NotSupported = pynvml.NVMLError_NotSupported
    NVMLLibraryMismatchError = pynvml.NVMLLibraryMismatchError
    NVML_TEMPERATURE_GPU = pynvml.NVML_TEMPERATURE_GPU
    nvmlMemory_v2 = pynvml.nvmlMemory_v2

    def __init__(self, *cards: Card) -> None:
        self.cards = list(cards)
        self.fails: dict[str, int] = {}
        self.initialised = self.inits = self.shutdowns = 0
        self.old_driver = self.as_bytes = False

    def _call(self, name: str, card: Card | None = None) -> None:
        assert self.initialised or name == "nvmlInit", f"{name} without nvmlInit"
        code = self.fails.get(name) or (card.fails.get(name) if card else None)
        if code:
            raise nvml_error(code)

    def _text(self, text: str) -> str | bytes:
        return text.encode() if self.as_bytes else text

    def nvmlInit(self) -> None:
        self.inits += 1
        self._call("nvmlInit")
        self.initialised += 1

    def nvmlShutdown(self) -> None:
        self.initialised -= 1
        self.shutdowns += 1
        assert self.initialised >= 0

    def nvmlDeviceGetCount(self) -> int:
        self._call("nvmlDeviceGetCount")
        return len(self.cards)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> Card:
        self._call("nvmlDeviceGetHandleByIndex", self.cards[index])
        return self.cards[index]

    def nvmlDeviceGetUUID(self, card: Card) -> str | bytes:
        self._call("nvmlDeviceGetUUID", card)
        return self._text(card.uuid)

    def nvmlDeviceGetName(self, card: Card) -> str | bytes:
        return self._text("NVIDIA H200")

    def nvmlDeviceGetMigMode(self, card: Card) -> list[int]:
        self._call("nvmlDeviceGetMigMode", card)
        return [card.mig, 0]

    def nvmlDeviceGetMemoryInfo(self, card: Card, version: int | None = None) -> Any:
        self._call("nvmlDeviceGetMemoryInfo", card)
        if version is None:
            return SimpleNamespace(total=card.total, used=card.used + card.reserved,
                                   free=card.total - card.used - card.reserved)
        if self.old_driver:
            raise nvml_error(pynvml.NVML_ERROR_FUNCTION_NOT_FOUND)
        return SimpleNamespace(total=card.total, used=card.used, free=card.total - card.used - card.reserved)

    def nvmlDeviceGetUtilizationRates(self, card: Card) -> Any:
        self._call("nvmlDeviceGetUtilizationRates", card)
        return SimpleNamespace(gpu=45, memory=10)

    def nvmlDeviceGetTemperature(self, card: Card, sensor: int) -> int:
        self._call("nvmlDeviceGetTemperature", card)
        assert sensor == pynvml.NVML_TEMPERATURE_GPU
        return 61

    def nvmlDeviceGetComputeRunningProcesses(self, card: Card) -> list[Any]:
        if self.old_driver:
            raise pynvml.NVMLLibraryMismatchError("v3")
        return self.nvmlDeviceGetComputeRunningProcesses_v2(card)

    def nvmlDeviceGetComputeRunningProcesses_v2(self, card: Card) -> list[Any]:
        self._call("nvmlDeviceGetComputeRunningProcesses", card)
        return [SimpleNamespace(pid=pid, usedGpuMemory=used) for pid, used in card.processes]

    def nvmlSystemGetDriverVersion(self) -> str | bytes:
        self._call("nvmlSystemGetDriverVersion")
        return self._text("580.95")

    def nvmlSystemGetCudaDriverVersion(self) -> int:
        self._call("nvmlSystemGetCudaDriverVersion")
        return 12080


def reader(nvml: FakeNvml, visible: str | None = None, host: Callable[[], tuple[int, int]] = lambda: (100, 40),
           ) -> GpuReader:
    made = GpuReader(nvml, host, visible=visible)
    if visible is None:    # whatever this machine's own variable says
        made._visible = None
    return made


# --- readings -------------------------------------------------------------------------------------------------------

def test_a_reading_of_two_gpus() -> None:
    fake = FakeNvml(Card("GPU-aa", processes=[(10, 5 * GIB), (11, None)]), Card("GPU-bb", used=0))
    got = reader(fake).read(3.0)
    assert (got.at, got.driver, got.cuda) == (3.0, "580.95", "12.8")
    assert got.devices[0] == Device(
        0, "GPU-aa", "NVIDIA H200", "cuda", 80 * GIB, 10 * GIB, 69 * GIB, 0.45, 61,
        (DeviceProcess(10, 5 * GIB), DeviceProcess(11, None)), None)
    assert [(each.index, each.uuid, each.used_bytes) for each in got.devices] == [
        (0, "GPU-aa", 10 * GIB), (1, "GPU-bb", 0)]
    with pytest.raises(FrozenInstanceError):
        got.devices[0].used_bytes = 1    # type: ignore[misc]


def test_an_older_driver_and_an_older_module() -> None:
    fake = FakeNvml(Card("GPU-aa", processes=[(10, 5)]))
    fake.old_driver = fake.as_bytes = True
    got = reader(fake).read(0)
    assert (got.driver, got.devices[0].uuid, got.devices[0].name) == ("580.95", "GPU-aa", "NVIDIA H200")
    assert got.devices[0].used_bytes == 11 * GIB    # version 1 counts what is reserved
    assert got.devices[0].processes == (DeviceProcess(10, 5),)


def test_what_a_gpu_does_not_support_is_none_and_no_error() -> None:
    unsupported = dict.fromkeys(["nvmlDeviceGetUtilizationRates", "nvmlDeviceGetTemperature", "nvmlDeviceGetMigMode",
                                 "nvmlDeviceGetComputeRunningProcesses"], pynvml.NVML_ERROR_NOT_SUPPORTED)
    fake = FakeNvml(Card("GPU-aa", fails=unsupported, processes=[(1, 1)]))
    fake.fails = {"nvmlSystemGetDriverVersion": pynvml.NVML_ERROR_UNKNOWN,
                  "nvmlSystemGetCudaDriverVersion": pynvml.NVML_ERROR_FUNCTION_NOT_FOUND}
    got = reader(fake).read(0)
    device = got.devices[0]
    assert (device.utilization, device.temperature_c, device.processes, device.error) == (None, None, (), None)
    assert (device.used_bytes, got.driver, got.cuda) == (10 * GIB, None, None)


def test_an_integrated_gpu_has_the_hosts_memory() -> None:
    fake = FakeNvml(Card("GPU-aa", fails={"nvmlDeviceGetMemoryInfo": pynvml.NVML_ERROR_NOT_SUPPORTED}))
    device = reader(fake).read(0).devices[0]
    assert (device.kind, device.total_bytes, device.used_bytes, device.free_bytes) == ("cuda", 100, 60, 40)


@pytest.mark.parametrize("function", ["nvmlDeviceGetHandleByIndex", "nvmlDeviceGetUUID", "nvmlDeviceGetMemoryInfo"])
def test_a_lost_gpu_keeps_its_place_with_the_error(function: str) -> None:
    fake = FakeNvml(Card("GPU-aa"), Card("GPU-bb"))
    tested = reader(fake)
    tested.read(0)
    fake.cards[0].fails[function] = pynvml.NVML_ERROR_GPU_IS_LOST
    lost, well = tested.read(1).devices
    assert lost == Device(0, "GPU-aa", "NVIDIA H200", "cuda", error="GPU is lost")
    assert (well.index, well.error, well.used_bytes) == (1, None, 10 * GIB)
    fake.cards[0].fails.clear()
    assert tested.read(2).devices[0].error is None


def test_a_gpu_that_never_answered_is_listed_without_a_name() -> None:
    fake = FakeNvml(Card("GPU-aa", fails={"nvmlDeviceGetHandleByIndex": pynvml.NVML_ERROR_GPU_IS_LOST}), Card("GPU-bb"))
    first, second = reader(fake).read(0).devices
    assert (first.index, first.uuid, first.error) == (0, "", "GPU is lost")
    assert second.uuid == "GPU-bb"


def test_a_gpu_that_vanishes_does_not_pass_its_index_on() -> None:
    fake = FakeNvml(Card("GPU-aa"), Card("GPU-bb"))
    tested = reader(fake)
    tested.read(0)
    del fake.cards[0]    # NVML counts anew: GPU-bb is at position 0 now
    gone, well = tested.read(1).devices
    assert (gone.index, gone.uuid, gone.total_bytes, bool(gone.error)) == (0, "GPU-aa", 0, True)
    assert (well.index, well.uuid, well.error) == (1, "GPU-bb", None)
    fake.cards.append(Card("GPU-cc"))
    assert [(each.index, each.uuid) for each in tested.read(2).devices] == [
        (0, "GPU-aa"), (1, "GPU-bb"), (2, "GPU-cc")]
    fake.cards.insert(0, Card("GPU-aa"))
    assert tested.read(3).devices[0].error is None


def test_a_driver_that_fails_later_is_not_replaced_by_the_host_and_is_found_again() -> None:
    fake = FakeNvml(Card("GPU-aa"))
    tested = reader(fake)
    tested.read(0)
    fake.fails = dict.fromkeys(["nvmlDeviceGetCount", "nvmlInit"], pynvml.NVML_ERROR_DRIVER_NOT_LOADED)
    for now in (10, 20, 41):
        device, = tested.read(now).devices
        assert (device.kind, device.uuid, device.error) == ("cuda", "GPU-aa", "Driver Not Loaded")
    assert fake.initialised == 0
    fake.fails = {}
    assert tested.read(60).devices[0].error == "Driver Not Loaded"    # the next try is not due
    assert tested.read(72).devices[0].error is None
    assert fake.initialised == 1


def test_nvml_is_begun_anew_when_every_gpu_fails() -> None:
    fake = FakeNvml(Card("GPU-aa"))
    tested = reader(fake)
    tested.read(0)
    fake.cards[0].fails["nvmlDeviceGetHandleByIndex"] = pynvml.NVML_ERROR_UNINITIALIZED
    assert tested.read(5).devices[0].error == "Uninitialized"
    assert fake.shutdowns == 1
    fake.cards[0].fails.clear()
    assert tested.read(31).devices[0].error is None


def test_a_driver_that_comes_later_is_tried_every_30_seconds() -> None:
    fake = FakeNvml(Card("GPU-aa"))
    fake.fails = {"nvmlInit": pynvml.NVML_ERROR_LIBRARY_NOT_FOUND}
    tested = reader(fake)
    assert [tested.read(now).devices[0].kind for now in (0, 1, 29.9)] == ["host"] * 3
    assert fake.inits == 1
    fake.fails = {}
    assert tested.read(29.9).devices[0].kind == "host"
    assert tested.read(30).devices[0].kind == "cuda"
    assert fake.inits == 2


def test_a_driver_without_gpus_leaves_the_host() -> None:
    fake = FakeNvml()
    tested = reader(fake)
    got = tested.read(0)
    assert got.devices == (Device(0, "", "CPU host memory", "host", 100, 60, 40),)
    assert (got.driver, got.cuda) == (None, None)
    fake.cards.append(Card("GPU-aa"))
    assert tested.read(31).devices[0].uuid == "GPU-aa"


def test_a_gpu_in_mig_mode_is_left_out_and_noted_once(caplog: pytest.LogCaptureFixture) -> None:
    tested = reader(FakeNvml(Card("GPU-aa", mig=1), Card("GPU-bb")))
    for now in (0, 1):
        assert [(each.index, each.uuid) for each in tested.read(now).devices] == [(1, "GPU-bb")]
    assert sum("MIG" in record.message for record in caplog.records) == 1


def test_close_lets_go_once() -> None:
    fake = FakeNvml(Card("GPU-aa"))
    tested = reader(fake)
    tested.read(0)
    tested.close()
    tested.close()
    assert (fake.initialised, fake.shutdowns) == (0, 1)
    assert tested.read(1).devices[0].error is None


def test_two_threads_read_one_after_the_other() -> None:
    entered = [threading.Event(), threading.Event()]
    together = []

    class Watched(FakeNvml):
        def nvmlDeviceGetCount(self) -> int:
            if not entered[0].is_set():
                entered[0].set()
                together.append(entered[1].wait(0.2))    # time enough for the second to come in, were it let in
            else:
                entered[1].set()
            return super().nvmlDeviceGetCount()

    fake, results = Watched(Card("GPU-aa")), []
    tested = reader(fake)
    first, second = (threading.Thread(target=lambda: results.append(tested.read(0))) for _ in range(2))
    first.start()
    assert entered[0].wait(120)
    second.start()
    first.join(120)
    second.join(120)
    assert together == [False]
    assert len(results) == 2
    assert results[0] == results[1]
    assert (fake.inits, fake.initialised) == (1, 1)


def test_the_real_module_on_this_machine() -> None:
    tested = GpuReader()
    try:
        got = tested.read(0)
    finally:
        tested.close()
    assert got.devices
    for device in got.devices:
        assert device.kind in ("cuda", "host")
        assert device.error or 0 < device.used_bytes + device.free_bytes <= device.total_bytes


# --- CUDA_VISIBLE_DEVICES -------------------------------------------------------------------------------------------

CARDS = tuple(Device(index, uuid, "NVIDIA H200", "cuda") for index, uuid in enumerate(("GPU-a1", "GPU-a2", "GPU-b3")))


@pytest.mark.parametrize(("visible", "indexes"), [
    (None, [0, 1, 2]), ("2,0", [2, 0]), ("GPU-b3, GPU-a1", [2, 0]), ("1,GPU-b", [1, 2]), ("0,7,1", [0]),
    ("", []), ("-1", []), ("NoDevFiles", []), ("1,1", [1]), ("0,,1", [0]), ("MIG-x", []), ("00", [])])
def test_visible_devices(visible: str | None, indexes: list[int]) -> None:
    assert [device.index for device in visible_devices(CARDS, visible)] == indexes


def test_the_reader_honours_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeNvml(Card("GPU-aa"), Card("GPU-bb"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert [device.uuid for device in GpuReader(fake, lambda: (1, 1)).read(0).devices] == ["GPU-bb"]
    assert [device.uuid for device in reader(fake, "GPU-bb,0").read(0).devices] == ["GPU-bb", "GPU-aa"]
    assert reader(fake, "").read(0).devices[0].kind == "host"


# --- whose memory it is ---------------------------------------------------------------------------------------------

def reading(*devices: list[tuple[int, int | None]]) -> Reading:
    return Reading(0, tuple(Device(index, f"GPU-{index}", "x", "cuda",
                                   processes=tuple(DeviceProcess(*process) for process in processes))
                            for index, processes in enumerate(devices)))


def test_memory_by_group() -> None:
    got = memory_by_group(reading([(10, 5), (11, 6), (99, 100)], [(12, 7), (20, 8)]),
                          {"a": {10, 11, 12}, "b": [20, 21], "idle": {30}})
    assert got == {"a": {0: 11, 1: 7}, "b": {1: 8}, "idle": {}}


def test_memory_by_group_leaves_out_what_it_cannot_know() -> None:
    told = reading([(10, 5), (20, None)], [(20, 8)])
    assert memory_by_group(told, {"a": {10}, "b": {20}}) == {"a": {0: 5}}
    host_pids = reading([(4001, 5), (4002, 6)])
    assert memory_by_group(host_pids, {"a": {10}, "b": {20}}) == {}
    assert memory_by_group(reading([]), {"a": {10}}) == {}    # a container may be shown no processes at all


def test_memory_by_difference() -> None:
    def at(*used: int) -> Reading:
        return Reading(0, tuple(Device(index, "", "", "cuda", used_bytes=each) for index, each in enumerate(used)))

    before, after = at(10, 20, 30), at(25, 15, 99)
    assert memory_by_difference(before, after, [0, 1]) == {0: 15, 1: 0}
    failed = replace(after, devices=(replace(after.devices[0], error="lost"), *after.devices[1:]))
    assert memory_by_difference(before, failed, [0, 1, 7]) == {1: 0}


def test_device_json() -> None:
    device = Device(1, "GPU-x", "NVIDIA H200", "cuda", 100, 60, 40, 0.5, 61, (DeviceProcess(7, None),), None)
    assert device_json(device) == {
        "index": 1, "uuid": "GPU-x", "name": "NVIDIA H200", "kind": "cuda",
        "memory": {"total": 100, "used": 60, "free": 40}, "utilization": 0.5, "temperature_c": 61,
        "processes": [{"pid": 7, "memory": None}], "error": None}


# --- the host -------------------------------------------------------------------------------------------------------

def cgroup(root: Path, folder: str, **files: str) -> None:
    where = root / folder
    where.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (where / name.replace("__", ".")).write_text(text + "\n")


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    memory = SimpleNamespace(total=1000, available=600)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    return memory


def totals(tmp_path: Path, membership: str) -> tuple[int, int]:
    (tmp_path / "membership").write_text(membership)
    return host_totals(tmp_path / "root", tmp_path / "membership")


def test_cgroup_v2_limit_without_the_cache_that_can_be_reclaimed(tmp_path: Path, machine: SimpleNamespace) -> None:
    cgroup(tmp_path / "root", "a/b", memory__max="400", memory__current="300",
           memory__stat="anon 100\ninactive_file 120\nactive_file 80")
    assert totals(tmp_path, "0::/a/b\n") == (400, 400 - (300 - 120))


def test_cgroup_v2_without_a_limit_and_with_one_above(tmp_path: Path, machine: SimpleNamespace) -> None:
    cgroup(tmp_path / "root", "a/b", memory__max="max", memory__current="300")
    assert totals(tmp_path, "0::/a/b\n") == (1000, 600)
    cgroup(tmp_path / "root", "a", memory__max="500", memory__current="450")
    assert totals(tmp_path, "0::/a/b\n") == (500, 50)


def test_cgroup_v2_in_a_container_that_mounts_only_its_own_root(tmp_path: Path, machine: SimpleNamespace) -> None:
    cgroup(tmp_path / "root", "", memory__max="300", memory__current="100")
    assert totals(tmp_path, "0::/../../docker/abc\n") == (300, 200)
    assert totals(tmp_path, "0::/\n") == (300, 200)


def test_cgroup_v1(tmp_path: Path, machine: SimpleNamespace) -> None:
    files = {"memory__usage_in_bytes": "250", "memory__stat": "inactive_file 1\ntotal_inactive_file 50"}
    cgroup(tmp_path / "root", "memory/docker/x", memory__limit_in_bytes="400", **files)
    cgroup(tmp_path / "root", "memory", memory__limit_in_bytes="9223372036854771712", **files)
    assert totals(tmp_path, "5:cpu,cpuacct:/y\n4:memory:/docker/x\n0::/\n") == (400, 200)


def test_a_cgroup_over_its_limit_and_none_at_all(tmp_path: Path, machine: SimpleNamespace) -> None:
    cgroup(tmp_path / "root", "a", memory__max="400", memory__current="450")
    assert totals(tmp_path, "0::/a\n") == (400, 0)
    assert host_totals(tmp_path / "nowhere", tmp_path / "nothing") == (1000, 600)
    machine.available = 30
    cgroup(tmp_path / "root", "a", memory__current="1")
    assert totals(tmp_path, "0::/a\n") == (400, 30)    # the machine has no more


def test_host_memory_counts_shared_pages_once_where_it_can(tmp_path: Path) -> None:
    for pid, files in {1: {"smaps_rollup": "Rss:  900 kB\nPss:    300 kB\nPss_Dirty: 9 kB\n", "statm": "9 8 7"},
                       2: {"statm": "1000 25 3 1 0 5 0"}, 3: {}, 4: {"smaps_rollup": "", "statm": "10 2"}}.items():
        (tmp_path / str(pid)).mkdir()
        for name, text in files.items():
            (tmp_path / str(pid) / name).write_text(text)
    page = os.sysconf("SC_PAGE_SIZE")
    assert host_memory([1], tmp_path) == 300 * 1024
    assert host_memory([2], tmp_path) == 25 * page
    assert host_memory([1, 2, 3, 4, 5], tmp_path) == 300 * 1024 + 27 * page


def test_host_memory_of_a_real_process() -> None:
    own = psutil.Process().memory_info().rss
    assert 0 < host_memory([os.getpid(), 2 ** 22 + 1]) <= own * 2
