"""What is on the devices and what can still be promised there.  Pure values and sums; placement decides on them.

Memory is counted the careful way round: what an instance was promised counts although it has not taken it yet, what it
took counts although nobody promised it, and what is in use on a device beyond the sum of ours is a stranger's.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from gpu import Device


@dataclass(frozen=True, slots=True)
class Resident:
    """One instance that has memory, or a promise of it.  Times are seconds, `*_on` are bytes by device index."""

    id: str
    model: str
    bytes_on: Mapping[int, int]                     # what counts for it: see `footprint.claim`
    held_on: Mapping[int, int] | None = None        # how much of it the devices show as used now; None: all of it
    awake: bool = True                              # False: asleep; `bytes_on` is what it holds while it sleeps
    busy: bool = False                              # a request runs or waits, or it is neither ready nor asleep
    may_go: bool | None = None                      # None: unless busy; else what `switching.may_go` says
    leaves: Mapping[int, int] | None = None         # it goes, or falls asleep: what will be left; None: it stays
    pinned: bool = False
    priority: int = 0                               # each step up doubles what its eviction costs
    idle_s: float = 0.0                             # since its last request ended
    reload_s: float | None = None                   # a cold start, as measured
    wake_s: float | None = None                     # a wake, as measured
    can_sleep: int = 0                              # 0, or the level of its sleep
    asleep_on: Mapping[int, int] = field(default_factory=dict)      # what it would hold asleep
    host_bytes: int = 0                             # the host's RAM that it holds asleep, or would
    pids: Collection[int] = ()

    @property
    def evictable(self) -> bool:
        if self.pinned or self.leaves is not None:
            return False
        return not self.busy if self.may_go is None else self.may_go


@dataclass(frozen=True, slots=True)
class Limits:
    """What the user allows the daemon to use."""

    reserved_bytes: int = 0                         # stays free on every device
    gpu_ids: Collection[int] | None = None          # None: all GPUs
    sleep_host_bytes: int = 0                       # of the host's RAM for all sleepers together
    host_budget_bytes: int | None = None            # where the host is the device: for all of ours together
    in_turn: Collection[int] = ()                   # devices where another instance starts, stops or falls asleep now


@dataclass(frozen=True, slots=True)
class Room:
    """One device's sums.  A negative figure is what is promised or taken beyond it."""

    device: Device
    now_bytes: int          # can be taken at once
    soon_bytes: int         # when those are gone that leave now
    foreign_bytes: int

    @property
    def index(self) -> int:
        return self.device.index


def usable(devices: Sequence[Device], limits: Limits) -> list[Device]:
    """GPUs the daemon may use, failed ones too; the host's memory where there is no GPU at all."""
    cuda = [device for device in devices if device.kind == "cuda"]
    if not cuda:
        return [device for device in devices if device.kind == "host"]
    return [device for device in cuda if limits.gpu_ids is None or device.index in limits.gpu_ids]


def most_bytes(device: Device, limits: Limits) -> int:
    """What an instance can have of a device that nothing else uses.

    NVML's total includes what the driver keeps for itself; used and free do not.
    """
    capacity = min(device.total_bytes, device.used_bytes + device.free_bytes) - limits.reserved_bytes
    if device.kind == "host" and limits.host_budget_bytes is not None:
        capacity = min(capacity, limits.host_budget_bytes)
    return max(0, capacity)


def rooms(devices: Sequence[Device], residents: Sequence[Resident], limits: Limits, own_id: str) -> dict[int, Room]:
    """By index, for devices that answer.  What `own_id` holds or was promised counts as free: it is planned anew."""
    claims = dict.fromkeys((device.index for device in devices if device.error is None), 0)
    held, going = dict(claims), dict(claims)
    for resident in residents:
        promised = resident.bytes_on
        taken = promised if resident.held_on is None else resident.held_on
        own = resident.id == own_id
        for index, count in taken.items():
            if index in held:
                held[index] += count
        if own:
            continue
        for index, count in promised.items():
            if index in claims:
                claims[index] += count
                if resident.leaves is not None:
                    going[index] += max(0, count - resident.leaves.get(index, 0))
    found = {}
    for device in devices:
        index = device.index
        if device.error is not None:
            continue
        foreign = max(0, device.used_bytes - held[index])
        capacity = min(device.total_bytes, device.used_bytes + device.free_bytes)
        now = capacity - limits.reserved_bytes - foreign - claims[index]
        if device.kind == "host" and limits.host_budget_bytes is not None:
            now = min(now, limits.host_budget_bytes - claims[index])
        found[index] = Room(device, now, now + going[index], foreign)
    return found
