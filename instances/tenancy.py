"""One instance's stay on its devices: how it gets in, what it holds there, and when what it held is free again.

Used by its keeper, in the keeper's thread.  Everything here may block for as long as the driver does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

from errors import NoRoom
from instances.arranger import Arranger
from instances.instance import Instance, State
from instances.resources import GIB, Resources
from instances.rooms import Rooms
from instances.settling import Settling

MEMORY_WAIT_S = 30.0        # for memory that was promised and that somebody still has,
STILL_LACKS_S = 5.0         # if it becomes more; what lacks as much for so long is a stranger's
ASLEEP_BYTES = 2 * GIB      # of a GPU, what a sleeper holds until it was measured: CUDA's context and more
OVERRUN = 0.1               # of its plan, that an engine may take beyond it
FREED_SHARE = 0.1           # a sleeper that has given back less does not really sleep


class Tenancy:
    def __init__(self, instance: Instance, rooms: Rooms, resources: Resources, arranger: Arranger) -> None:
        self._instance = instance
        self._rooms = rooms
        self._resources = resources
        self._arranger = arranger
        self._lacks_since: float | None = None
        self._lacks: tuple[float, dict[int, int]] = (0.0, {})       # how much, and since when so much
        self._leaving: Settling | None = None
        self._held_awake: Mapping[int, int] | None = None

    # --- in -------------------------------------------------------------------------------------------------------

    def enter(self, now: float) -> bool:
        """Whether it may take its room now: it was promised, who had to go is gone, and it has its turn there.

        The devices are asked once more at the last moment.  Raises NoRoom when its memory does not come free although
        nobody of ours has it: somebody else was quicker.
        """
        one = self._instance
        if one.grant is None:
            self._arranger.arrange(now)
        if one.grant is None:
            return False                # the registry has noted why
        if self._rooms.waits_for_others(one):
            self._rooms.note_phase(one, "waiting_for_memory")
            return False
        if not self.take_turn(now):
            return False
        if lacking := self._lacking(now):
            self._rooms.note_phase(one, "waiting_for_memory")
            self._await_memory(lacking, now)
            return False
        self._lacks_since = None
        self.recall(one.engine, now)
        self._rooms.note_used_before(one, self._resources.used_on(one.devices, now))
        return True

    def _await_memory(self, lacking: dict[int, int], now: float) -> None:
        """Raises NoRoom once that is of no use any more."""
        if self._lacks_since is None:
            self._lacks_since, self._lacks = now, (now, lacking)
        if lacking != self._lacks[1]:
            self._lacks = now, lacking
        if now - self._lacks_since < MEMORY_WAIT_S and now - self._lacks[0] < STILL_LACKS_S:
            return
        self._lacks_since = None
        self.end_turn()
        missing = ", ".join(f"{count / GIB:.1f} GiB on GPU {index}" for index, count in lacking.items())
        raise NoRoom(f"{self._instance.spec.names[0]} was promised room that does not come free: it lacks {missing}, "
                     "which no instance holds; GET /gpus shows who does")

    def take_turn(self, now: float) -> bool:
        mine = self._resources.take_turn(self._instance.id, self._instance.devices, now)
        if not mine:
            self._rooms.note_phase(self._instance, "waiting_for_device")
        return mine

    def end_turn(self) -> None:
        self._resources.end_turn(self._instance.id)

    def _lacking(self, now: float) -> dict[int, int]:
        """Bytes by GPU that are to be free, and are not."""
        one = self._instance
        if one.memory_planned_bytes is None:
            return {}
        found = {}
        for device in self._resources.read(now).devices:
            if device.index not in one.devices or device.kind != "cuda":
                continue
            has = one.asleep_on.get(device.index, 0) if one.state is State.WAKING else 0
            lack = one.memory_planned_bytes - has - (0 if device.error else device.free_bytes)
            if lack > 0:
                found[device.index] = lack
        return found

    def robbed(self, now: float) -> bool | None:
        """Whether others have its room, now that its engine has failed to start for want of memory and is gone; None
        while what that held itself may not be free yet."""
        if self._leaving is None:
            self._leaving = Settling(self._resources.devices.read, self._instance.devices, self._instance.used_before)
        if not self._leaving.look(now):
            return None
        self._leaving = None
        return bool(self._lacking(now))

    # --- there ----------------------------------------------------------------------------------------------------

    def measure(self, pids: Collection[int], now: float) -> Mapping[int, int] | None:
        """What it holds of each device.  Where the driver tells nothing of processes: what came in use while it took
        its room, as nobody else starts or stops there meanwhile."""
        one = self._instance
        held: Mapping[int, int] | None = self._resources.held_on(one.id, pids, now)
        if held is None and one.used_before and one.state in (State.STARTING, State.WAKING):
            used = self._resources.used_on(one.devices, now)
            held = {index: self._own_part(used[index] - before) for index, before in one.used_before.items()
                    if index in used}
        elif held is None:
            held = one.held_on
        self._rooms.note_memory(one, held)
        if held and one.state is State.READY:
            self._resources.learn_memory(one, held, now)
        return held

    def _own_part(self, came_bytes: int) -> int:
        """Of what came in use on a device: what is far beyond the plan is a stranger's who came meanwhile."""
        planned = self._instance.memory_planned_bytes
        return max(0, came_bytes if planned is None or came_bytes <= (1 + OVERRUN) * planned else planned)

    def settled(self) -> Callable[[], bool]:
        """Asked again and again: whether the memory of its devices stands still."""
        settling = Settling(self._resources.devices.read, self._instance.devices)
        return lambda: settling.look(self._rooms.clock())

    def learn_start(self, held: Mapping[int, int] | None, facts: Mapping[str, Any], seconds: float | None,
                    now: float) -> None:
        """`seconds` None: nothing is to be learned of how long a start takes."""
        one = self._instance
        keep = one.grant.keep if one.grant is not None else {}
        self._resources.learn_start(one, held, facts, keep, seconds, now)
        self.recall(facts, now)

    def recall(self, facts: Mapping[str, Any], now: float) -> None:
        """Tell the registry what is known of starts, wakes and sleep of this configuration."""
        one = self._instance
        entry = self._resources.known(one.spec, now)
        planned = one.memory_planned_bytes or 0
        if self._resources.on_gpus:
            asleep = min(planned, ASLEEP_BYTES) if entry is None or entry.asleep_bytes is None else entry.asleep_bytes
            weights = facts.get("weights_gib")
            each = int(weights * GIB) if isinstance(weights, float) else planned
            host_bytes = each * len(one.devices) if one.spec.sleep_level == 1 else 0
        else:               # it sleeps in the very memory that it works in
            asleep = max(planned, *(one.held_on or {}).values(), 0)
            host_bytes = 0
        self._rooms.note_known(one, reload_s=entry.reload_s if entry else None,
                               wake_s=entry.median_wake_s if entry else None,
                               asleep_on=dict.fromkeys(one.devices, asleep), host_bytes=host_bytes)

    # --- asleep, and out ------------------------------------------------------------------------------------------

    def falls_asleep(self, *, adopted: bool) -> None:
        """Before its engine is told.  What it held awake cannot be measured when an earlier daemon told it already."""
        one = self._instance
        planned = dict.fromkeys(one.devices, one.memory_planned_bytes or 0)
        self._held_awake = planned if adopted else one.held_on

    def fell_asleep(self, pids: Collection[int], now: float) -> str | None:
        """Note what it holds now; the problem when that is as much as before."""
        one = self._instance
        held = self._resources.held_on(one.id, pids, now)
        self._rooms.note_memory(one, held)
        if held is None or not self._resources.on_gpus:
            return None
        host_bytes = one.host_bytes if one.asleep_level == 1 else 0
        had, has = sum((self._held_awake or {}).values()), sum(held.values())
        if has > had * (1 - FREED_SHARE):
            return f"it has freed {max(0, had - has) / GIB:.1f} of {had / GIB:.1f} GiB only"
        self._resources.learn_sleep(one, held, host_bytes, now)
        self._rooms.note_known(one, reload_s=one.reload_s, wake_s=one.wake_s, asleep_on=held, host_bytes=host_bytes)
        return None

    def woke(self, seconds: float, now: float) -> None:
        self._resources.learn_wake(self._instance, seconds, now)
        self.recall(self._instance.engine, now)

    def begin_to_leave(self, now: float) -> None:
        """Before its processes end; a second call does nothing."""
        one = self._instance
        if self._leaving is not None:
            return
        held = one.held_on or (dict.fromkeys(one.devices, one.memory_planned_bytes or 0) if one.grant else {})
        used = self._resources.used_on(one.devices, now)
        below = {index: count - math.floor(0.9 * held.get(index, 0)) for index, count in used.items()}
        self._leaving = Settling(self._resources.devices.read, one.devices, below)

    def left(self, now: float) -> bool:
        """Whether what its ended processes held is free."""
        return self._leaving is None or self._leaving.look(now)

    def release(self) -> None:
        """Its processes are gone: port and turns are for others."""
        self._leaving = None
        self._resources.give_back(self._instance.id)
