"""What an instance needs of the machine: devices, a port, processes, a record on disk.

Everything here blocks or does I/O; none of it is called while the registry's lock is held.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import gpu
from config import Settings, child_environment, to_argv
from errors import NoFreePort
from instances import history, model_files, placement
from instances.footprint import Footprint, estimate
from instances.history import Entry, History
from instances.instance import Instance, InstanceSpec, InstanceView, State
from instances.launcher import EngineRecord, Launcher
from instances.ledger import Limits
from instances.placement import Need
from instances.ports import Ports
from instances.store import Record, StateDir
from instances.turns import Turns

log = logging.getLogger("vllm_server.instances")

LOGS_KEPT = 50
GIB = 1 << 30


def is_simulated(command: Sequence[str]) -> bool:
    """Whether the engine is the stand-in: then everything a person sees says so."""
    return any(Path(word).name == "simulator.py" for word in command)


class Resources:
    """One for all keepers; thread-safe.  `settings` may be replaced while they work."""

    def __init__(self, settings: Settings, state_dir: StateDir, *, launcher: Launcher, devices: gpu.GpuReader,
                 environ: Mapping[str, str]) -> None:
        self.state_dir = state_dir
        self.launcher = launcher
        self.devices = devices
        self.ports = Ports(settings.base_port)
        self.turns = Turns()
        self.history = History(state_dir.path / "history.json")
        self._gpus: frozenset[int] | None = None    # as last read: a stop that waits for its turn asks often
        self._first: gpu.Device | None = None
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

    def need(self, instance: Instance, now: float, state: State) -> Need:
        """What it needs of the devices to start, or to wake.  Looks at the model's files."""
        spec = instance.spec
        if state is State.WAKING:      # it wakes where it sleeps
            return Need(spec.names[0], Footprint(instance.memory_planned_bytes, "measured"),
                        count=len(instance.devices), ids=instance.devices, id=instance.id, prefer=instance.devices)
        try:
            count = placement.devices_needed(spec.flags)
        except ValueError:
            count = 0
        return Need(spec.names[0], self.footprint(spec, now), count=count, id=instance.id,
                    ids=spec.gpus if isinstance(spec.gpus, tuple) else None)

    def footprint(self, spec: InstanceSpec, now: float) -> Footprint:
        """Looks at the model's files."""
        kind = "cuda" if self._device(now).kind == "cuda" else "host"
        if kind == "host" and is_simulated(self.settings.command) and self.settings.host_memory_budget_bytes is None:
            return Footprint(because="a simulated engine takes none of the host's memory")
        entry = self.history.get(self.key(spec, now))
        return estimate(
            spec.flags, memory_bytes=spec.memory_bytes, param_count=spec.param_count, precision=spec.precision,
            measured=entry.measured if entry is not None else None, kind=kind,
            facts=model_files.look_up(spec.model, self.environment, download_dir=spec.flags.get("download_dir"),
                                      revision=spec.flags.get("revision")),
            utilization=self.settings.memory_utilization, env={**self.environment, **spec.env})

    def key(self, spec: InstanceSpec, now: float) -> str:
        """The name of this configuration in the history."""
        return history.key(spec.model, spec.flags, device=self._device(now).name, env=spec.env)

    def limits(self, now: float) -> Limits:
        settings = self.settings
        return Limits(
            reserved_bytes=settings.reserved_memory_bytes, gpu_ids=settings.gpu_ids,
            sleep_host_bytes=self.sleep_host_bytes(),
            host_budget_bytes=settings.host_memory_budget_bytes, in_turn=self.turns.of_others(""))

    def sleep_host_bytes(self) -> int:
        """What sleepers may have of the host's RAM together."""
        chosen = self.settings.sleep_host_memory_bytes
        return gpu.host_totals()[0] // 2 if chosen is None else chosen

    def read(self, now: float) -> gpu.Reading:
        """All devices.  Blocks as long as the driver does."""
        reading = self.devices.read(now)
        self._gpus = frozenset(device.index for device in reading.devices if device.kind == "cuda")
        self._first = reading.devices[0] if reading.devices else None
        return reading

    def _device(self, now: float) -> gpu.Device:
        """One of the devices, for its kind: machines have GPUs of one kind, with few exceptions."""
        if self._first is None:
            self.read(now)
        assert self._first is not None
        return self._first

    def take_turn(self, instance_id: str, devices: Collection[int], now: float) -> bool:
        """False: another instance starts or stops on one of these GPUs.

        It is held until `end_turn` or `give_back`.  There is nothing to take turns for in the host's memory.
        """
        if self._gpus is None:
            self.read(now)
        return self.turns.take(instance_id, [index for index in self._gpus or () if index in devices])

    def end_turn(self, instance_id: str) -> None:
        self.turns.give_back(instance_id)

    def reserve_port(self, instance_id: str, preferred: int | None, avoid: Collection[int]) -> int:
        """Its port if that is still free, else the lowest that is.  Raises NoFreePort."""
        port = self.ports.reserve(instance_id, preferred, avoid)
        if port is None:
            raise NoFreePort(f"no free port from {self.settings.base_port} upward (VLLM_BASE_PORT)")
        return port

    def command_line(self, spec: InstanceSpec, port: int, keep: Mapping[str, Any]) -> list[str]:
        """`keep` are the flags that make it keep to its room.  The token is not in it: every user of the machine may
        read a command line."""
        flags = {name: value for name, value in {**spec.flags, **keep}.items()
                 if name != "hf_token" or value is True}
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

    # --- what it learns -------------------------------------------------------------------------------------------

    def known(self, spec: InstanceSpec, now: float) -> Entry | None:
        """What earlier runs of the same configuration tell."""
        return self.history.get(self.key(spec, now))

    def learn_start(self, instance: Instance, held_on: Mapping[int, int] | None, facts: Mapping[str, Any],
                    keep: Mapping[str, Any], seconds: float | None, now: float) -> None:
        """It is ready.  `seconds` None: it had to download, or an earlier daemon began it.  Writes the disk."""
        name, model = self.key(instance.spec, now), instance.spec.model
        if seconds is not None:
            self.history.note_start(name, model, seconds)
        cache = facts.get("kv_cache_gib")
        told = [value for key in ("consumed_gib", "peak_activation_gib", "graph_gib")
                if isinstance(value := (facts.get("actual_usage") or {}).get(key), float)]
        logged = int((sum(told) + cache) * GIB) if told and isinstance(cache, float) else 0
        measured = max(logged, *(held_on or {}).values(), 0)
        self.history.note_ready(
            name, model, measured or None, kv_cache_bytes=int(cache * GIB) if isinstance(cache, float) else None,
            filled="kv_cache_memory_bytes" not in {**instance.spec.flags, **keep})
        self.history.save()

    def learn_sleep(self, instance: Instance, held_on: Mapping[int, int] | None, host_bytes: int, now: float) -> None:
        if held_on is not None:
            self.history.note_sleep(self.key(instance.spec, now), instance.spec.model, max(held_on.values(), default=0),
                                    host_bytes)
            self.history.save()

    def learn_wake(self, instance: Instance, seconds: float, now: float) -> None:
        self.history.note_wake(self.key(instance.spec, now), instance.spec.model, seconds)
        self.history.save()

    def learn_memory(self, instance: Instance, held_on: Mapping[int, int], now: float) -> None:
        if held_on:
            self.history.note_memory(self.key(instance.spec, now), instance.spec.model, max(held_on.values()))

    # --- while it runs --------------------------------------------------------------------------------------------

    def held_on(self, instance_id: str, pids: Collection[int], now: float) -> dict[int, int] | None:
        """What these processes hold now, by device; None where the driver does not tell."""
        reading = self.read(now)
        if self.on_gpus:
            return gpu.memory_by_group(reading, {instance_id: pids}).get(instance_id)
        return {device.index: gpu.host_memory(pids) for device in reading.devices}

    def used_on(self, devices: Collection[int], now: float) -> dict[int, int]:
        """What anybody uses of these GPUs; nothing is told of the host's memory, which never stands still."""
        return {device.index: device.used_bytes for device in self.read(now).devices
                if device.index in devices and device.kind == "cuda" and not device.error}

    def record(self, view: InstanceView, engine: EngineRecord | None, state: State) -> Record:
        """`state`: what its engine does."""
        return Record(id=view.id, spec=view.spec, state=state, created_at=view.created_at, port=view.port,
                      devices=view.devices, restarts=view.restarts, engine=engine,
                      asleep_level=0 if state is State.READY else view.asleep_level,
                      memory_planned_bytes=view.memory_planned_bytes, because=view.because, grown=view.grown,
                      apart=view.apart)

    def forget(self, instance_id: str) -> None:
        """Remove its record: nothing of it is left to find again."""
        try:
            self.state_dir.remove(instance_id)
        except OSError as error:
            log.error("%s: its record cannot be removed, the next daemon would start it again: %s", instance_id, error)

    def log_path(self, instance_id: str) -> Path:
        return self.state_dir.log_path(instance_id)
