"""Which devices an instance gets, and who makes room for it.  Pure: values in, a plan or a refusal out.

The rules, in this order:

1. What was planned before is kept while it needs no victims: a start that waits does not wander about.
2. Several devices are of one kind, unless no such set can be had: the slowest of a tensor parallel set decides.
3. Devices with room now; then those that have it once others are gone that leave already; then those where the
   cheapest victims make it (`eviction`).  Nobody is evicted while there is room.
4. Among devices with room, those where no other instance starts or stops, and of them the tightest fit: large holes
   stay whole for large models.

vLLM compares total x --gpu-memory-utilization with what is free when it starts, also beside --kv-cache-memory-bytes:
the plan says which share to give it, the planned bytes rounded down, so that the check passes whenever the plan holds.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from errors import NoRoom
from gpu import Device
from instances.eviction import Choice, choose
from instances.footprint import DEFAULT_UTILIZATION, Footprint
from instances.ledger import Limits, Resident, Room, most_bytes, rooms, usable

__all__ = ["DEFAULT_UTILIZATION", "Limits", "Need", "Plan", "Resident", "devices_needed", "plan"]

GIB = 1 << 30
SHARE_STEPS = 10_000        # a share is told to vLLM in steps of a hundredth of a percent
NAMED_DEVICES = 3           # a refusal spells out so many, those that miss the least
NAMED_VICTIMS = 5           # and a plan so many


@dataclass(frozen=True)
class Need:
    """What is to be placed."""

    model: str
    footprint: Footprint
    count: int = 1                              # 0: its parallel sizes make no sense; the engine will say which
    ids: tuple[int, ...] | None = None          # the user's choice of GPUs
    id: str = ""                                # the instance, if it is among the residents: it starts or wakes
    prefer: tuple[int, ...] = ()                # where it was planned before, or where it sleeps


@dataclass(frozen=True)
class Plan:
    """The devices by index, what the instance will take of each, who makes room, and why so, in a sentence."""

    devices: tuple[int, ...]
    visible: str | None                 # CUDA_VISIBLE_DEVICES of the child; None where there is no GPU
    bytes_per_device: int | None
    because: str
    keep: Mapping[str, Any] = field(default_factory=dict)   # flags for the engine, --gpu-memory-utilization among them
    sleep: tuple[str, ...] = ()         # ids to put to sleep first
    stop: tuple[str, ...] = ()          # ids to stop first
    after: tuple[str, ...] = ()         # ids that leave already and have to be gone first


def devices_needed(flags: Mapping[str, Any]) -> int:
    """The product of the parallel sizes that run on this machine.  Raises ValueError on one that is no number."""
    try:
        return math.prod(int(flags.get(name, 1)) for name in
                         ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size"))
    except (TypeError, OverflowError) as error:
        raise ValueError(f"a parallel size is no number: {error}") from None


def plan(need: Need, devices: Sequence[Device], residents: Sequence[Resident], limits: Limits) -> Plan:
    """Raises NoRoom: with code not_enough_gpus where it can never fit, else with who is in the way."""
    allowed = usable(devices, limits)
    if need.count < 1:
        return _unchecked(allowed, "its parallel size or utilization makes no sense")
    on_host = not any(device.kind == "cuda" for device in devices)
    count = 1 if on_host else need.count
    if on_host and need.footprint.bytes_per_device is None and need.footprint.utilization is None:
        return _unchecked(allowed, "the host's memory is the only device")
    suited = _suited(need, count, allowed, limits, on_host)
    wanted = {device.index: _bytes_on(need, device, limits) for device in suited}
    found = rooms(suited, residents, limits, need.id)
    if (choice := _as_before(found, wanted, count, need)) is not None:
        return _planned(choice, found, wanted, need, residents)
    for groups in _tiers(suited, count):
        for attempt in (_with_room, _with_victims):
            choices = [choice for group in groups if (choice := attempt(
                {index: found[index] for index in group}, wanted, count, need, residents, limits)) is not None]
            if choices:
                return _planned(min(choices, key=lambda choice: choice.cost_us), found, wanted, need, residents)
    raise NoRoom(_refusal(need, count, suited, found, wanted, residents, limits))


# --- which devices come into question ---------------------------------------------------------------------------------

def _unchecked(allowed: Sequence[Device], because: str) -> Plan:
    working = [device for device in allowed if device.error is None]
    return Plan(tuple(device.index for device in working), _visible(working), None, because)


def _visible(chosen: Iterable[Device]) -> str | None:
    return ",".join(device.uuid for device in chosen if device.kind == "cuda") or None


def _suited(need: Need, count: int, allowed: Sequence[Device], limits: Limits, on_host: bool) -> list[Device]:
    """The devices that are large enough when nothing else is there.  Raises NoRoom where they are too few."""
    if need.ids is not None and not on_host:
        missing = sorted(set(need.ids) - {device.index for device in allowed})
        if missing:
            raise NoRoom(f"{need.model} is to run on GPU {_list(map(str, missing))}, which the daemon does not have or "
                         f"may not use (GPU_ID); it has {_list(str(device.index) for device in allowed) or 'none'}",
                         code="not_enough_gpus")
        allowed = [device for device in allowed if device.index in need.ids]
    if count > len(allowed):
        raise NoRoom(f"{need.model} needs {_devices(count)} (its parallel sizes); there "
                     f"{'is' if len(allowed) == 1 else 'are'} {len(allowed)} for it", code="not_enough_gpus")
    working = [device for device in allowed if device.error is None]
    if count > len(working):
        broken = _list(f"GPU {device.index} ({device.error})" for device in allowed if device.error is not None)
        raise NoRoom(f"{need.model} needs {_devices(count)} and {len(working)} of {len(allowed)} work: {broken}")
    large = [device for device in working if _bytes_on(need, device, limits) <= most_bytes(device, limits)]
    if count > len(large):
        device = max(working, key=lambda device: (most_bytes(device, limits), -device.index))
        raise NoRoom(
            f"{need.model} needs {_gib(_bytes_on(need, device, limits))} {_each(count, on_host)}; {_name(device)} has "
            f"{_gib(device.total_bytes)}, of which it may have {_gib(most_bytes(device, limits))}: "
            f"{_advice(need, on_host)}", code="not_enough_gpus")
    return large


def _bytes_on(need: Need, device: Device, limits: Limits) -> int:
    """What it takes of this device; a share that is only a default leaves alone what stays free.

    An estimate that is too high for the device is cut to all that can be had there: the engine finds out.
    """
    wanted, most = need.footprint, most_bytes(device, limits)
    count = wanted.bytes_per_device or 0
    if wanted.least_bytes is not None and wanted.least_bytes <= most < count:
        count = most
    if wanted.utilization is None:
        return count
    share = math.ceil(device.total_bytes * wanted.utilization)
    return max(count, share if wanted.given else min(share, most))


def _tiers(devices: Sequence[Device], count: int) -> list[list[tuple[int, ...]]]:
    """Groups of indexes to choose from within: one for each kind of device, then all as one."""
    kinds: dict[tuple[str, int], list[int]] = {}
    for device in devices:
        kinds.setdefault((device.name, device.total_bytes), []).append(device.index)
    every = [tuple(device.index for device in devices)]
    if count == 1 or len(kinds) == 1:
        return [every]
    return [[tuple(group) for _, group in sorted(kinds.items()) if len(group) >= count], every]


# --- the choice -------------------------------------------------------------------------------------------------------

def _as_before(found: Mapping[int, Room], wanted: Mapping[int, int], count: int, need: Need) -> Choice | None:
    if len(set(need.prefer)) == count and all(
            index in found and found[index].soon_bytes >= wanted[index] for index in need.prefer):
        return Choice(tuple(sorted(need.prefer)))
    return None


def _with_room(here: Mapping[int, Room], wanted: Mapping[int, int], count: int, need: Need,
               residents: Sequence[Resident], limits: Limits) -> Choice | None:
    """Devices where nobody has to go, or only those who go already."""
    for left in ({index: room.now_bytes - wanted[index] for index, room in here.items()},
                 {index: room.soon_bytes - wanted[index] for index, room in here.items()}):
        fitting = [index for index, spare in left.items() if spare >= 0 or not wanted[index]]
        if len(fitting) >= count:
            fitting.sort(key=lambda index: (index in limits.in_turn, left[index], index))
            return Choice(tuple(sorted(fitting[:count])))
    return None


def _with_victims(here: Mapping[int, Room], wanted: Mapping[int, int], count: int, need: Need,
                  residents: Sequence[Resident], limits: Limits) -> Choice | None:
    missing = {index: wanted[index] - room.soon_bytes for index, room in here.items()}
    others = [resident for resident in residents if resident.id != need.id]
    asleep = sum(resident.host_bytes for resident in others
                 if (resident.leaves if resident.awake else resident.leaves is None))
    return choose(missing, count, others, limits.sleep_host_bytes - asleep)


def _planned(choice: Choice, found: Mapping[int, Room], wanted: Mapping[int, int], need: Need,
             residents: Sequence[Resident]) -> Plan:
    chosen = [found[index].device for index in choice.devices]
    planned = max(wanted[index] for index in choice.devices)
    lacking = [index for index in choice.devices if wanted[index] and found[index].now_bytes < wanted[index]]
    after = tuple(sorted(resident.id for resident in residents
                         if resident.id != need.id and resident.leaves is not None
                         and any(resident.bytes_on.get(index, 0) > resident.leaves.get(index, 0) for index in lacking)))
    sleep = tuple(option.id for option in choice.options if option.sleeps)
    stop = tuple(option.id for option in choice.options if not option.sleeps)
    return Plan(choice.devices, _visible(chosen), planned or None,
                _because(choice, found, wanted, {resident.id: resident for resident in residents}, after),
                _flags(need, chosen, planned), sleep, stop, after)


def _flags(need: Need, chosen: Sequence[Device], planned: int) -> dict[str, Any]:
    """The share that lets vLLM's own check pass: the largest step that asks for no more than was planned."""
    keep = dict(need.footprint.keep)
    if planned < (need.footprint.bytes_per_device or 0):        # cut: its KV cache has to make do with what is left
        keep.pop("kv_cache_memory_bytes", None)
    if chosen[0].kind != "cuda" or need.footprint.given:
        return keep
    step = min(math.floor(planned / device.total_bytes * SHARE_STEPS) for device in chosen)
    while step > 1 and any(math.ceil(device.total_bytes * (step / SHARE_STEPS)) > planned for device in chosen):
        step -= 1
    return {**keep, "gpu_memory_utilization": max(step, 1) / SHARE_STEPS}


# --- for people -------------------------------------------------------------------------------------------------------

def _because(choice: Choice, found: Mapping[int, Room], wanted: Mapping[int, int], residents: Mapping[str, Resident],
             after: Sequence[str]) -> str:
    names = _list(_name(found[index].device) for index in choice.devices)
    planned = _gib(max(wanted[index] for index in choice.devices))
    if choice.options:
        shown = sorted(choice.options, reverse=True)[:NAMED_VICTIMS]       # those that cost the most
        victims = _list(_goes(residents[option.id], option.sleeps) for option in sorted(shown, key=lambda o: o.id))
        victims += f" and so on, {len(choice.options)} in all" if len(shown) < len(choice.options) else ""
        verb = "makes" if len(choice.options) == 1 else "make"
        gone = f", once {_list(residents[id].model for id in after)} made room too" if after else ""
        return f"{names}: {victims}, which {verb} room for {planned}{gone}"
    if after:
        return f"{names}: room for {planned} once {_list(residents[id].model for id in after)} made it"
    spare = min(found[index].now_bytes for index in choice.devices)
    return f"{names}: room for {planned}, {_gib(spare)} {'were' if len(choice.devices) == 1 else 'were at least'} free"


def _goes(resident: Resident, sleeps: bool) -> str:
    state = "in use for long while others wait" if resident.busy else (
        f"{'idle' if resident.awake else 'asleep, unused'} for {_span(resident.idle_s)}")
    return f"{resident.model} ({state}) {'goes to sleep' if sleeps else 'is stopped'}"


def _refusal(need: Need, count: int, suited: Sequence[Device], found: Mapping[int, Room], wanted: Mapping[int, int],
             residents: Sequence[Resident], limits: Limits) -> str:
    """How much is missing, where, and who holds it."""
    on_host = suited[0].kind == "host"
    freed = dict.fromkeys(found, 0)
    for resident in residents:
        if resident.evictable and resident.id != need.id:
            for index, held in resident.bytes_on.items():
                if index in freed:
                    freed[index] += held
    lacks = sorted((lack, index) for index, room in found.items()
                   if (lack := wanted[index] - room.soon_bytes - freed[index]) > 0)
    places = [f"{_name(found[index].device)} lacks {_gib(lack)} ({_holders(found[index], residents, need.id)})"
              for lack, index in lacks[:NAMED_DEVICES]]
    shown = _list(places, "; ")
    more = f"; {len(lacks) - NAMED_DEVICES} more lack as much or more" if len(lacks) > NAMED_DEVICES else ""
    kept = f"{_gib(limits.reserved_bytes)} of each stay free (RESERVED_MEMORY_MB); " if limits.reserved_bytes else ""
    return (f"{need.model} needs {_gib(max(wanted.values()))} {_each(count, on_host)} and nothing idle could make that "
            f"room: {shown}{more}; {kept}stop one of them, wait, or {_advice(need, on_host)}")


def _holders(room: Room, residents: Sequence[Resident], own_id: str) -> str:
    """Who keeps memory there that cannot be had."""
    staying = sorted(((resident.bytes_on[room.index], resident) for resident in residents
                      if resident.bytes_on.get(room.index) and resident.id != own_id and not resident.evictable
                      and resident.leaves is None), key=lambda pair: (-pair[0], pair[1].id))
    parts = [f"{resident.model} holds {_gib(held)} and is {'pinned' if resident.pinned else 'in use'}"
             for held, resident in staying]
    if room.foreign_bytes:
        ours = {pid for resident in residents for pid in resident.pids}
        pids = [str(process.pid) for process in room.device.processes if process.pid not in ours]
        parts.append(f"other processes hold {_gib(room.foreign_bytes)}"
                     + (f": pid {_list(pids[:8])}" if pids and room.device.kind == "cuda" else ""))
    return _list(parts) or "all of it is idle, and it is too small"


def _advice(need: Need, on_host: bool) -> str:
    if need.footprint.given:
        return "lower gpu_memory_utilization in its params"
    if on_host:
        return "take a smaller model, max_model_len or KV cache, or raise HOST_MEMORY_BUDGET_MB"
    return "lower max_model_len or memory_mb, or use more GPUs (tensor_parallel_size) or a quantized model"


def _name(device: Device) -> str:
    return f"GPU {device.index}" if device.kind == "cuda" else "the host's memory"


def _devices(count: int) -> str:
    return "a GPU" if count == 1 else f"{count} GPUs"


def _each(count: int, on_host: bool) -> str:
    if on_host:
        return "of the host's memory"
    return "on a GPU" if count == 1 else f"on each of {count} GPUs"


def _gib(count: int) -> str:
    return f"{count / GIB:.1f} GiB"


def _span(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.0f} h"


def _list(words: Iterable[str], comma: str = ", ") -> str:
    return comma.join(words)
