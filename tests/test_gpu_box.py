"""The whole daemon as on a box with GPUs: a stand-in for NVML under the real pynvml, engines that take memory."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from instances import processes
from tests.gpu_box import GIB, RESERVED_BYTES, GpuBox, NoMemory, needs_compiler
from tests.support import wait_until

pytestmark = [needs_compiler, pytest.mark.whole]

HALF = {"gpu_memory_utilization": 0.5}


def test_the_devices_are_shown_as_the_driver_tells_them(tmp_path: Path) -> None:
    with GpuBox(tmp_path, [80, 80, 24]) as box:
        foreign = box.hold(1, 30.0)
        answer = box.daemon.get("/gpus").json
        assert (answer["driver"], answer["cuda"]) == ("570.86.15", "12.8")
        first, second, third = answer["data"]
        assert [one["uuid"] for one in answer["data"]] == box.uuids
        assert (first["kind"], first["utilization"], first["temperature_c"]) == ("cuda", 0, 41)
        assert first["memory"] == {"total": 80 * GIB, "used": 0, "free": 80 * GIB - RESERVED_BYTES}
        assert second["memory"]["used"] == 30 * GIB
        assert second["processes"] == [{"pid": foreign.pid, "memory": 30 * GIB}]
        assert third["memory"]["total"] == 24 * GIB
        foreign.take(10.0)
        assert box.gpus()[1]["memory"]["used"] == 10 * GIB
        foreign.free()
        assert box.gpus()[1]["memory"]["used"] == 0
        with pytest.raises(NoMemory):
            box.hold(2, 24.0)           # the driver keeps a part of it


def test_eight_instances_get_eight_gpus_and_a_ninth_goes_where_room_is(tmp_path: Path) -> None:
    with GpuBox(tmp_path, [80] * 8) as box:
        for number in range(8):
            box.daemon.create(f"org/{number}", params=HALF)
        assert sorted(one["gpus"] for one in box.daemon.instances()) == [[index] for index in range(8)]
        assert [len(one["instances"]) for one in box.gpus()] == [1] * 8
        foreign = [box.hold(index, 30.0) for index in range(8) if index != 5]
        assert box.daemon.create("org/eight", params={"gpu_memory_utilization": 0.45})["gpus"] == [5]
        for one in foreign:
            one.free()
        assert box.refused() == []


def test_a_tensor_parallel_one_takes_its_share_of_each_gpu(tmp_path: Path) -> None:
    with GpuBox(tmp_path, [80] * 4) as box:
        box.hold([0, 2], 70.0)
        one = box.daemon.create("org/big", params={"tensor_parallel_size": 2, **HALF})
        assert one["gpus"] == [1, 3]
        share = -(-box.capacity(1) // 2)
        assert [gpu["memory"]["used"] for gpu in box.gpus()] == [70 * GIB, share, 70 * GIB, share]
        assert one["memory"]["measured_bytes"] == 2 * share


def test_what_dies_gives_its_memory_back(tmp_path: Path) -> None:
    with GpuBox(tmp_path, [80]) as box:
        box.driver(frees_late_ms=1000)
        one = box.daemon.create("org/one", params=HALF)
        for member in processes.session_members(one["pid"]):
            if processes.command_line(member.pid).endswith("::EngineCore"):
                os.kill(member.pid, signal.SIGKILL)
        wait_until(lambda: box.daemon.instance(one["id"])["restarts"] == 1)
        wait_until(lambda: box.daemon.status_of(one["id"]) == "ready")
        box.daemon.remove()
        wait_until(lambda: box.gpus()[0]["memory"]["used"] == 0)


@pytest.mark.parametrize("driver", [{"processes": "none"}, {"processes": "no_memory"}, {"pid_offset": 1_000_000},
                                    {"old": 1}])
def test_a_driver_that_tells_less_still_serves(tmp_path: Path, driver: dict[str, object]) -> None:
    with GpuBox(tmp_path, [80, 80]) as box:
        box.driver(**driver)
        foreign = box.hold(0, 75.0)
        one = box.daemon.create("org/one", params=HALF)
        assert one["gpus"] == [1]
        taken = -(-box.capacity(1) // 2)
        if "old" in driver:             # it counts what it keeps for itself as used
            assert [gpu["memory"]["used"] for gpu in box.gpus()] == [75 * GIB + RESERVED_BYTES, taken + RESERVED_BYTES]
            assert one["memory"]["measured_bytes"] == taken
        else:
            assert [gpu["memory"]["used"] for gpu in box.gpus()] == [75 * GIB, taken]
        shown = {"none": [], "no_memory": [{"pid": foreign.pid, "memory": None}]}.get(
            str(driver.get("processes")), [{"pid": foreign.pid + int(str(driver.get("pid_offset", 0))),
                                            "memory": 75 * GIB}])
        assert box.gpus()[0]["processes"] == shown


def test_a_device_that_vanishes_keeps_its_place_and_gets_nothing_until_it_is_back(tmp_path: Path) -> None:
    patch = {"instances.rooms.HOPELESS_S": 0.5, "instances.instance.BACKOFF_LIMIT_S": 0.2}
    with GpuBox(tmp_path, [80, 80, 80], patch=patch) as box:
        assert [gpu["error"] for gpu in box.gpus()] == [None] * 3
        box.driver(lost=1)
        assert [gpu["error"] for gpu in box.gpus()] == [None, "GPU is lost", None]
        assert [gpu["uuid"] for gpu in box.gpus()] == box.uuids
        placed = [box.daemon.create(f"org/{number}", params={"gpu_memory_utilization": 0.9})["gpus"]
                  for number in range(2)]
        assert sorted(placed) == [[0], [2]]
        answer = box.daemon.post("/instances", {"model_name": "org/big", "params": {"tensor_parallel_size": 3},
                                                "wait": True})
        assert answer.error["code"] == "no_gpu_memory" and "2 of 3 work" in answer.error["message"]
        box.driver()
        assert [gpu["error"] for gpu in box.gpus()] == [None] * 3
        assert box.daemon.create("org/third", params={"gpu_memory_utilization": 0.9})["gpus"] == [1]


def test_gpus_keep_their_numbers_when_another_driver_is_loaded(tmp_path: Path) -> None:
    with GpuBox(tmp_path, [80, 80], patch={"gpu._RETRY_S": 0.0}) as box:
        one = box.daemon.create("org/one", params=HALF)
        (index,) = one["gpus"]
        box.driver(down=1)
        gone = box.gpus()
        assert [(gpu["uuid"], gpu["error"]) for gpu in gone] == [(uuid, "Driver Not Loaded") for uuid in box.uuids]
        assert box.daemon.instance(one["id"])["status"] == "ready"
        box.driver(epoch=1, order="1 0")
        wait_until(lambda: all(gpu["error"] is None for gpu in box.gpus()))
        assert [gpu["uuid"] for gpu in box.gpus()] == box.uuids
        assert box.gpus()[index]["memory"]["used"] > 30 * GIB
        assert box.daemon.get("/gpus").json["driver"] == "580.65.06"


def test_a_gpu_that_is_split_by_mig_is_left_out(tmp_path: Path) -> None:
    with GpuBox(tmp_path, [80, 80]) as box:
        box.driver(mig=0)
        assert [gpu["index"] for gpu in box.gpus()] == [1]
