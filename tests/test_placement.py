"""Which devices an instance gets: values in, a plan or a refusal out."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from errors import NoRoom
from gpu import Device
from instances.placement import plan_alone as plan

GIB = 1 << 30
HOST = Device(0, "", "CPU host memory", "host", 64 * GIB, 0, 64 * GIB)


def card(index: int, free_gib: float, total_gib: float = 80, **fields: Any) -> Device:
    total, free = int(total_gib * GIB), int(free_gib * GIB)
    return replace(Device(index, f"GPU-{index}", "H200", "cuda", total, total - free, free), **fields)


def test_the_host_is_the_one_device_where_there_is_no_gpu() -> None:
    found = plan("m", {"tensor_parallel_size": 4}, [HOST])
    assert (found.devices, found.visible, found.bytes_per_device) == ((0,), None, None)


def test_the_freest_gpu() -> None:
    found = plan("m", {}, [card(0, 75), card(1, 80), card(2, 79)])
    assert (found.devices, found.visible) == ((1,), "GPU-1")
    assert found.bytes_per_device == pytest.approx(0.92 * 80 * GIB, abs=1)


def test_the_first_of_equals() -> None:
    assert plan("m", {}, [card(1, 80), card(0, 80)]).devices == (0,)


def test_as_many_as_its_parallel_sizes_ask_for_in_order() -> None:
    flags = {"tensor_parallel_size": 2, "pipeline_parallel_size": "2"}
    found = plan("m", flags, [card(n, 80 - n) for n in range(6)])
    assert (found.devices, found.visible) == ((0, 1, 2, 3), "GPU-0,GPU-1,GPU-2,GPU-3")


def test_a_lower_utilization_needs_less() -> None:
    found = plan("m", {"gpu_memory_utilization": 0.25}, [card(0, 21)])
    assert found.bytes_per_device == 20 * GIB


def test_too_little_memory_says_how_much_there_is() -> None:
    with pytest.raises(NoRoom) as caught:
        plan("org/model", {}, [card(0, 10), card(1, 40)])
    assert caught.value.code == "no_gpu_memory" and caught.value.status == 503
    for part in ("org/model needs 73.6 GiB", "GPU 1 has 40.0 GiB free", "gpu_memory_utilization"):
        assert part in caught.value.message


def test_one_gpu_of_several_that_is_too_full_is_too_full() -> None:
    with pytest.raises(NoRoom):
        plan("m", {"tensor_parallel_size": 2}, [card(0, 80), card(1, 10)])


def test_too_few_gpus() -> None:
    with pytest.raises(NoRoom, match="needs 3 GPUs .* this machine has 2") as caught:
        plan("m", {"tensor_parallel_size": 3}, [card(0, 80), card(1, 80)])
    assert caught.value.code == "not_enough_gpus"


def test_a_gpu_that_failed_is_none() -> None:
    broken = card(0, 80, error="GPU is lost")
    assert plan("m", {}, [broken, card(1, 80)]).devices == (1,)
    with pytest.raises(NoRoom):
        plan("m", {"tensor_parallel_size": 2}, [broken, card(1, 80)])


@pytest.mark.parametrize("flags", [
    {"tensor_parallel_size": "two"}, {"tensor_parallel_size": 0}, {"data_parallel_size": -1},
    {"tensor_parallel_size": [1]}, {"tensor_parallel_size": float("inf")},
    {"gpu_memory_utilization": "nan"}, {"gpu_memory_utilization": "inf"},
    {"gpu_memory_utilization": 0}, {"gpu_memory_utilization": 1.5}, {"gpu_memory_utilization": {}},
    {"gpu_memory_utilization": -0.5}])
def test_a_value_that_makes_no_sense_is_left_to_the_engine_to_name(flags: dict[str, Any]) -> None:
    found = plan("m", flags, [card(0, 1), card(1, 80)])
    assert (found.devices, found.visible, found.bytes_per_device) == ((0, 1), "GPU-0,GPU-1", None)


VALUES = st.none() | st.booleans() | st.integers(-3, 9) | st.floats() | st.text(max_size=4) | st.lists(st.integers())


@given(st.lists(st.tuples(st.integers(0, 80), st.booleans()), max_size=5),
       st.dictionaries(st.sampled_from(["tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size",
                                        "gpu_memory_utilization"]), VALUES))
def test_whatever_is_asked_for_there_is_a_plan_or_a_refusal(
        cards: list[tuple[int, bool]], flags: dict[str, Any]) -> None:
    devices = [card(index, free, error="lost" if lost else None) for index, (free, lost) in enumerate(cards)]
    try:
        found = plan("m", flags, devices or [HOST])
    except NoRoom as refusal:
        assert refusal.message
        return
    chosen = [device for device in devices if device.index in found.devices]
    if found.bytes_per_device is not None:
        assert all(device.free_bytes >= found.bytes_per_device and device.error is None for device in chosen)
    assert list(found.devices) == sorted(set(found.devices))
