"""What an instance needs of the machine: devices, a port, processes, a record on disk.

Everything here blocks or does I/O; none of it is called while the registry's lock is held.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path

import gpu
from config import Settings, child_environment, to_argv
from errors import NoFreePort, NoRoom
from instances import placement
from instances.instance import InstanceSpec, InstanceView
from instances.launcher import EngineRecord, Launcher
from instances.ports import Ports
from instances.store import Record, StateDir
from instances.turns import Turns

log = logging.getLogger("vllm_server.instances")

LOGS_KEPT = 50


class Resources:
    """One for all keepers; thread-safe.  `settings` may be replaced while they work."""

    def __init__(self, settings: Settings, state_dir: StateDir, *, launcher: Launcher, devices: gpu.GpuReader,
                 environ: Mapping[str, str]) -> None:
        self.state_dir = state_dir
        self.launcher = launcher
        self.devices = devices
        self.ports = Ports(settings.base_port)
        self.turns = Turns()
        self._gpus: frozenset[int] | None = None    # as last read: a stop that waits for its turn asks often
        self._environ = environ
        self.use(settings)

    def use(self, settings: Settings) -> None:
        """From the next start on."""
        self.settings = settings
        self.environment: Mapping[str, str] = child_environment(settings, self._environ)

    @property
    def on_gpus(self) -> bool:
        """Whether the devices, as last read, are GPUs."""
        return bool(self._gpus)

    # --- a start --------------------------------------------------------------------------------------------------

    def place(self, instance_id: str, spec: InstanceSpec, now: float) -> placement.Plan | None:
        """Choose devices and take their turns.  Raises NoRoom.

        None: there may be room when another instance, which starts or stops on a GPU now, is done.
        """
        busy = self.turns.of_others(instance_id)
        devices = [replace(device, free_bytes=0) if device.index in busy else device for device in self._read(now)]
        try:
            plan = placement.plan_alone(spec.model, spec.flags, devices)
        except NoRoom as error:
            if busy and error.code == NoRoom.code:
                return None
            raise
        if not self.take_turn(instance_id, plan.devices, now):
            return None
        log.info("%s (%s): devices %s (%s)", instance_id, spec.model, list(plan.devices), plan.because)
        return plan

    def take_turn(self, instance_id: str, devices: Collection[int], now: float) -> bool:
        """False: another instance starts or stops on one of these GPUs.

        It is held until `end_turn` or `give_back`.  There is nothing to take turns for in the host's memory.
        """
        if self._gpus is None:
            self._read(now)
        return self.turns.take(instance_id, [index for index in self._gpus or () if index in devices])

    def _read(self, now: float) -> tuple[gpu.Device, ...]:
        devices = self.devices.read(now).devices
        self._gpus = frozenset(device.index for device in devices if device.kind == "cuda")
        return devices

    def end_turn(self, instance_id: str) -> None:
        self.turns.give_back(instance_id)

    def reserve_port(self, instance_id: str, preferred: int | None, avoid: Collection[int]) -> int:
        """Its port if that is still free, else the lowest that is.  Raises NoFreePort."""
        port = self.ports.reserve(instance_id, preferred, avoid)
        if port is None:
            raise NoFreePort(f"no free port from {self.settings.base_port} upward (VLLM_BASE_PORT)")
        return port

    def command_line(self, spec: InstanceSpec, port: int) -> list[str]:
        """The token is not in it: every user of the machine may read a command line."""
        flags = {name: value for name, value in spec.flags.items() if name != "hf_token" or value is True}
        if spec.sleep_level and self.on_gpus:     # vLLM for CPUs refuses it, and pauses all the same when told to sleep
            flags["enable_sleep_mode"] = True
        return [*self.settings.command, "serve", spec.model, "--host", "127.0.0.1", "--port", str(port),
                "--served-model-name", *spec.names, *to_argv(flags)]

    def engine_environment(self, spec: InstanceSpec, visible_devices: str | None) -> dict[str, str]:
        """For the engine: its own variables, which devices it sees, its Hugging Face token, and, if it may be put to
        sleep, vLLM's development mode: only that has the routes for it.  They listen on loopback and no path of the
        daemon leads there (routing/paths.py)."""
        token = spec.flags.get("hf_token") or spec.hf_token
        return {**self.environment, **spec.env,
                **({"CUDA_VISIBLE_DEVICES": visible_devices} if visible_devices else {}),
                **({"HF_TOKEN": token} if isinstance(token, str) else {}),
                **({"VLLM_SERVER_DEV_MODE": "1"} if spec.sleep_level else {})}

    def give_back(self, instance_id: str) -> None:
        """Its processes are gone: port and devices are free."""
        self.ports.release(instance_id)
        self.turns.give_back(instance_id)

    # --- while it runs --------------------------------------------------------------------------------------------

    def memory_bytes(self, instance_id: str, pids: Collection[int], now: float) -> int | None:
        """What these processes hold now, on GPUs or in the host's memory; None where the driver does not tell."""
        reading = self.devices.read(now)
        if any(device.kind == "cuda" for device in reading.devices):
            found = gpu.memory_by_group(reading, {instance_id: pids}).get(instance_id)
            return None if found is None else sum(found.values())
        return gpu.host_memory(pids)

    def record(self, view: InstanceView, engine: EngineRecord | None) -> Record:
        return Record(id=view.id, spec=view.spec, state=view.state, created_at=view.created_at, port=view.port,
                      devices=view.devices, restarts=view.restarts, engine=engine, asleep_level=view.asleep_level)

    def forget(self, instance_id: str) -> None:
        """Remove its record: nothing of it is left to find again."""
        try:
            self.state_dir.remove(instance_id)
        except OSError as error:
            log.error("%s: its record cannot be removed, the next daemon would start it again: %s", instance_id, error)

    def log_path(self, instance_id: str) -> Path:
        return self.state_dir.log_path(instance_id)
