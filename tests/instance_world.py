"""A world of fakes around the instance manager: a clock that only the test moves, devices, engines that do as told.

No thread runs: `World.step` moves the clock and calls the tick of every keeper and of the reaper once.
"""

from __future__ import annotations

import contextlib
import json
import math
import random
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

import config
import gpu
from errors import ManagerError
from instance_manager import CreateRequest, InstanceManager
from instances import probe
from instances.instance import Instance, InstanceView, Lease, State
from instances.launcher import EngineRecord, LaunchSpec
from instances.loop import Loop
from instances.sockets import Listener
from instances.store import StateDir
from tests.support import claim_ports

GIB = 1 << 30
_CLAIM, BASE_PORT = claim_ports()        # this process's own: they are bound to see whether they are free
HOST = gpu.Device(0, "", "CPU host memory", "host", 64 * GIB, 0, 64 * GIB)


def cuda(index: int, free_gib: float = 80) -> gpu.Device:
    return gpu.Device(index, f"GPU-{index}", "H200", "cuda", 80 * GIB, int((80 - free_gib) * GIB), int(free_gib * GIB))


@dataclass
class FakeDevices:
    """What `devices` says is used is used by strangers; what the world's engines hold of GPUs comes on top."""

    world: World
    devices: tuple[gpu.Device, ...] = (HOST,)
    tells: bool = True          # which process holds what
    lag_s: float = 0.0          # what ended processes held is free so much later
    reads: int = 0
    closed: bool = False

    def read(self, now: float) -> gpu.Reading:
        self.reads += 1
        return gpu.Reading(now, tuple(map(self._with_engines, self.devices)))

    def _with_engines(self, device: gpu.Device) -> gpu.Device:
        if device.kind != "cuda" or device.error is not None:
            return device
        held = {one.pid: one.held_on(device) for one in self.world.engines}
        ours = sum(held.values())
        processes = tuple(gpu.DeviceProcess(pid, count) for pid, count in held.items() if count and self.tells)
        return replace(device, used_bytes=device.used_bytes + ours, free_bytes=max(0, device.free_bytes - ours),
                       processes=(*device.processes, *processes))

    def assert_not_over(self) -> None:
        for device in self.devices:
            ours = sum(one.held_on(device) for one in self.world.engines if not one.immortal)
            assert device.used_bytes + ours <= device.total_bytes, f"GPU {device.index} is over its memory"

    def close(self) -> None:
        self.closed = True


@dataclass(eq=False)
class FakeEngine:
    """A tree of processes that does what the test sets."""

    spec: LaunchSpec
    world: World
    pid: int
    port: int
    alive: bool = True
    health: int | None = 0              # status; 0: refused, None: no answer
    answers: bool = True                # inference requests
    paths: tuple[str, ...] = ("/v1/completions",)
    tokens: float = 0.0
    names: tuple[str, ...] = ()
    code: int | None = None
    dead: int | None = None             # pid of an engine process that died
    deaf: bool = False                  # to SIGTERM
    immortal: bool = False              # survives SIGKILL
    listens: Listener = Listener.OURS
    shared: tuple[str, ...] = ()        # memory on record, known once it is looked for
    maps: bool = False                  # such memory, while it loads
    asked: list[str] = field(default_factory=list)
    asleep: int = 0                     # its level
    sleep_status: int | None = 200      # what /sleep is answered with; None: nothing, and it does not sleep
    wake_status: int | None = 200
    stays_asleep: bool = False          # though it says that it woke

    free_at: float = 0.0                # what it held is free, once it is dead
    launched_at: float = 0.0

    def held_on(self, device: gpu.Device) -> int:
        """What it has of this GPU: the share that it was told, and little of that while it sleeps."""
        visible = self.spec.env.get("CUDA_VISIBLE_DEVICES", "").split(",")
        if device.kind != "cuda" or device.uuid not in visible or not (self.alive or self.world.now < self.free_at):
            return 0
        share = self.flag("--gpu-memory-utilization", "0.92")
        return GIB if self.asleep else math.ceil(device.total_bytes * float(share))

    def flag(self, name: str, default: str = "") -> str:
        argv = self.spec.argv
        return argv[argv.index(name) + 1] if name in argv else default

    @property
    def record(self) -> EngineRecord:
        return EngineRecord(pid=self.pid, started_ticks=1, boot_id="boot", run_dir="/nowhere",
                            shared_memory=self.shared)

    def running(self) -> bool:
        return self.alive

    def lives(self) -> bool:
        return self.alive

    def exit_code(self) -> int | None:
        return self.code

    def pids(self) -> list[int]:
        return [self.pid]

    def listener(self, port: int) -> Listener:
        assert port == self.port
        return self.listens

    def note_memory(self) -> None:
        self.shared = (f"/dev/shm/psm_{self.pid}",) if self.maps else ()

    def watch_core(self) -> None:
        self.world.note(self, "watched")
        self.shared = (f"/dev/shm/psm_{self.pid}",)

    def dead_core(self) -> int | None:
        return self.dead

    def terminate(self) -> None:
        self.world.note(self, "TERM")
        self.world.check_not_serving(self)
        self._ends(self.alive and self.deaf)

    def destroy(self) -> bool:
        self.world.note(self, "KILL")
        self.world.check_not_serving(self)
        self._ends(self.immortal)
        return not self.immortal

    def _ends(self, alive: bool) -> None:
        if self.alive and not alive:
            self.free_at = self.world.now + self.world.devices.lag_s
        self.alive = alive

    def dies(self, code: int = 1, says: str = "") -> None:
        self._ends(False)
        self.code = code
        with open(self.spec.log_path, "a") as file:
            file.write(says)

    def answer(self, method: str, path: str) -> probe.Answer | None:
        self.asked.append(path)
        if path == "/health":
            return None if self.health is None else probe.Answer(self.health)
        if path == "/v1/models":
            data = [{"id": name} for name in self.names]
            return probe.Answer(200, json.dumps({"object": "list", "data": data}).encode())
        if path == "/metrics":
            return probe.Answer(200, b'vllm:generation_tokens_total{model_name="m"} %f\n' % self.tokens)
        if path in ("/is_sleeping", "/collective_rpc") or path.startswith(("/sleep?", "/wake_up")):
            return self.answer_dev_mode(path)
        if path not in self.paths:
            return probe.Answer(404)
        assert not self.asleep, "a question to a sleeper"
        return probe.Answer(200) if self.answers else None

    def answer_dev_mode(self, path: str) -> probe.Answer | None:
        """As vLLM does: pausing for the level, and awake only with both parts of its memory."""
        assert self.spec.env.get("VLLM_SERVER_DEV_MODE") == "1"
        if path == "/is_sleeping":
            return probe.Answer(200, json.dumps({"is_sleeping": self.asleep > 0}).encode())
        self.world.note(self, path)
        if path.startswith(("/sleep?", "/wake_up")):
            self.world.check_turns(self)
        if path.startswith("/sleep?"):
            self.world.check_not_serving(self)
            assert path.endswith("&mode=wait")
            if self.sleep_status == 200:
                self.asleep = int(path.split("level=")[1][0])
            return None if self.sleep_status is None else probe.Answer(self.sleep_status)
        if self.wake_status == 200 and not self.stays_asleep and path in ("/wake_up", "/wake_up?tags=kv_cache"):
            self.asleep = 0
            self.world.devices.assert_not_over()
        return None if self.wake_status is None else probe.Answer(self.wake_status)


class FakeProbe:
    """Stands in for probe.Probe: the engine that has the port answers."""

    world: World
    open: set[FakeProbe]
    sent = True

    def __init__(self, port: int, method: str, path: str, body: dict[str, Any] | None = None) -> None:
        self._engine = next((one for one in self.world.engines if one.alive and one.port == port), None)
        self._question = method, path
        if path.startswith("/sleep?"):      # with mode=wait: it would wait for our own question
            assert not any(one._engine is self._engine and one._question[1] in probe.INFERENCE for one in self.open)
        self.open.add(self)

    def poll(self) -> probe.Answer | None:
        answer = self._engine.answer(*self._question) if self._engine is not None else probe.Answer(0)
        if answer is not None:
            self.close()
        return answer

    def close(self) -> None:
        self.open.discard(self)


@dataclass
class FakeLauncher:
    world: World
    broken: Exception | None = None             # raised by the next launch
    left: dict[str, FakeEngine] = field(default_factory=dict)   # by an earlier daemon, by instance id

    def launch(self, spec: LaunchSpec) -> FakeEngine:
        if self.broken is not None:
            raise self.broken
        spec.log_path.write_text("")
        port = int(spec.argv[spec.argv.index("--port") + 1])
        # One that cannot be killed is let go in the end; in the world outside, its port shows that it is taken.
        others = [one for one in self.world.engines if one.alive and not one.immortal]
        assert port not in [one.port for one in others], "two engines on one port"
        engine = FakeEngine(spec, self.world, pid=1000 + len(self.world.engines), port=port,
                            launched_at=self.world.now)
        self.world.check_turns(engine)
        self.world.engines.append(engine)
        self.world.note(engine, "launched")
        self.world.devices.assert_not_over()
        return engine

    def find(self, instance_id: str, record: EngineRecord, log_path: Path) -> FakeEngine | None:
        engine = self.left.get(instance_id)
        return engine if engine is not None and engine.alive and engine.pid == record.pid else None

    def end_remains(self, instance_id: str, record: EngineRecord | None) -> None:
        self.world.events.append(f"{instance_id} remains ended")


class World:
    """One manager and what it believes to be a machine."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch,
                 models: Mapping[str, Mapping[str, object]] | None = None, **settings: object) -> None:
        self.now = 1000.0
        self.load_s = 0.0           # what `served` lets a start take
        self.events: list[str] = []
        self.engines: list[FakeEngine] = []
        self.loops: list[Loop] = []
        self.stopped_while_serving = False
        self.devices = FakeDevices(self)
        self.launcher = FakeLauncher(self)
        self.folder = folder
        self.overrides = {"VLLM_BASE_PORT": str(BASE_PORT), "PROBE_INTERVAL": "0",
                          "SLEEP_HOST_MEMORY_MB": "1000000", **settings}
        self.write_models(models or {})
        self.state_dir = StateDir(folder / "state")
        self.probe: type[FakeProbe] = type("WorldProbe", (FakeProbe,), {"world": self, "open": set()})
        monkeypatch.setattr(probe, "Probe", self.probe)
        monkeypatch.setattr("os.fsync", lambda descriptor: None)     # nothing here outlives the machine
        ids = random.Random(4)      # the same in every run, as the order of some things follows them
        monkeypatch.setattr("instances.registry.secrets.token_hex", lambda size: ids.randbytes(size).hex())
        for blocking in ("save", "remove", "load"):
            self._never_under_the_lock(monkeypatch, self.state_dir, blocking)
        self._never_under_the_lock(monkeypatch, self.devices, "read")
        for blocking in ("launch", "find", "end_remains"):
            self._never_under_the_lock(monkeypatch, self.launcher, blocking)
        self.manager = self.new_manager()

    def settings(self, **overrides: object) -> config.Settings:
        chosen = {name: str(value) for name, value in {**self.overrides, **overrides}.items()}
        return config.load_settings({"HOME": str(self.folder)}, cwd=self.folder, overrides=chosen)

    def write_models(self, models: Mapping[str, Mapping[str, object]]) -> None:
        """As the `models` of config.yaml; a `model_path` is added where there is none."""
        entries = {id_: {"model_path": f"org/{id_}", **entry} for id_, entry in models.items()}
        (self.folder / "config.yaml").write_text(json.dumps({"models": entries}))

    def configure(self, models: Mapping[str, Mapping[str, object]]) -> list[str]:
        self.write_models(models)
        return self.manager.reconfigure(self.settings())

    def new_manager(self) -> InstanceManager:
        """As a daemon that starts on this state folder; the one before is gone."""
        self.loops.clear()
        self.probe.open.clear()
        self.manager = InstanceManager(
            self.settings(), self.state_dir, launcher=self.launcher,  # type: ignore[arg-type]
            devices=self.devices, environ={}, clock=lambda: self.now,  # type: ignore[arg-type]
            wall=lambda: self.now + 1e9, run=self.loops.append)
        return self.manager

    def _never_under_the_lock(self, monkeypatch: pytest.MonkeyPatch, part: object, name: str) -> None:
        """Whatever the daemon's lock guards must not wait for this.  Told where one thread runs only."""
        method = getattr(part, name)

        def checked(*arguments: Any) -> Any:
            assert threading.active_count() > 1 or not self.manager._changed._is_owned(), f"{name} under the lock"
            return method(*arguments)

        monkeypatch.setattr(part, name, checked)

    # --- what happens ---------------------------------------------------------------------------------------------

    def step(self, seconds: float = 0.0, times: int = 1) -> None:
        """Move the clock, then call every tick once, and that again."""
        for _ in range(times):
            self.now += seconds
            for loop in list(self.loops):
                if loop.tick(self.now) is False:
                    self.loops.remove(loop)
        assert not self.stopped_while_serving

    def create(self, model: str = "org/model", **fields: Any) -> InstanceView:
        return self.manager.create(CreateRequest(model, fields.pop("params", {}), **fields))[0]

    def loading(self, model: str = "org/model", **fields: Any) -> tuple[InstanceView, FakeEngine]:
        """An instance whose engine was launched."""
        view = self.create(model, **fields)
        self.step()
        return self.view(view), self.engine(view)

    def ready(self, model: str = "org/model", **fields: Any) -> tuple[InstanceView, FakeEngine]:
        view, engine = self.loading(model, **fields)
        engine.health = 200
        self.step(times=2)
        assert self.view(view).state is State.READY
        return self.view(view), engine

    def demand(self, name: str) -> InstanceView:
        """One request for a model, that looks once and waits for nothing; the newest instance that answers to it."""
        return self.manager.get(self.manager.demand(name)[-1].id)

    def served(self, name: str) -> InstanceView:
        """A request for a model, which is loaded for it and answers."""
        view = self.demand(name)
        for _ in range(20):
            with self.waiting(name):
                self.step(0.1)
            view = self.view(view)
            if view.state is State.STARTING and view.pid is not None:
                with self.waiting(name):
                    self.step(self.load_s)
                self.engine(view).health = 200
            if view.state is State.READY:
                self.manager.lease(view.id).release(ok=True)
                return self.view(view)
        raise AssertionError(f"{name} is not served: {view}")

    @contextlib.contextmanager
    def waiting(self, name: str) -> Iterator[None]:
        """A request waits for this model, in its queue and for a change."""
        with self.manager.queue(name):
            self.manager.wait_for_change(0.0, wanted=[one.id for one in self.manager.candidates(name)])
            yield

    # --- what can be seen -----------------------------------------------------------------------------------------

    def view(self, view: InstanceView) -> InstanceView:
        return self.manager.get(view.id)

    def instance(self, view: InstanceView) -> Instance:
        return self.manager._instances[view.id]

    def engine(self, view: InstanceView) -> FakeEngine:
        """The newest of this instance."""
        return [one for one in self.engines if one.spec.instance_id == view.id][-1]

    def engines_of(self, view: InstanceView) -> list[FakeEngine]:
        return [one for one in self.engines if one.spec.instance_id == view.id]

    def record(self, view: InstanceView) -> Mapping[str, Any] | None:
        """What stands on disk."""
        path = self.state_dir.path / "instances" / f"{view.id}.json"
        found: dict[str, Any] | None = json.loads(path.read_text()) if path.exists() else None
        return found

    def note(self, engine: FakeEngine, what: str) -> None:
        self.events.append(f"{engine.spec.instance_id} {what}")

    def events_of(self, view: InstanceView) -> list[str]:
        return [event.removeprefix(f"{view.id} ") for event in self.events if event.startswith(view.id)]

    def check_not_serving(self, engine: FakeEngine) -> None:
        instance = self.manager._instances.get(engine.spec.instance_id)
        if instance is not None and any(lease.cut_error is None for lease in instance.leases):
            self.stopped_while_serving = True

    def check_turns(self, engine: FakeEngine) -> None:
        """No engine starts, falls asleep or wakes on a GPU while another one starts there."""
        mine = set(filter(None, engine.spec.env.get("CUDA_VISIBLE_DEVICES", "").split(",")))
        for other in self.engines:
            instance = self.manager._instances.get(other.spec.instance_id)
            if (other is not engine and other.alive and not other.immortal and instance is not None
                    and instance.state is State.STARTING and other.health != 200):      # not up already
                assert mine.isdisjoint(other.spec.env.get("CUDA_VISIBLE_DEVICES", "").split(",")), "two starts at once"

    def assert_nothing_left(self) -> None:
        assert not any(one.alive for one in self.engines)
        assert self.manager.snapshot() == []
        assert list((self.state_dir.path / "instances").iterdir()) == []
        assert self.manager.resources.ports._owners == {}
        assert self.manager.resources.turns._holders == {}
        assert self.manager._loops == {}
        assert self.probe.open == set()


def cut_of(lease: Lease, on_cut: Callable[[], None] | None = None) -> list[str]:
    """Release the lease when it is cut, as a request thread does; the list then holds the code of the error."""
    codes: list[str] = []

    def release() -> None:
        assert lease.cut_error is not None
        codes.append(lease.cut_error.code)
        lease.release()

    lease.on_cut(on_cut or release)
    return codes


class Refused(ManagerError):
    code = "refused"


def sleepy(world: World, level: int = 1, **fields: object) -> tuple[InstanceView, FakeEngine]:
    return world.ready(**{"timeout_s": 100.0, "sleep_level": level, **fields})


def asleep(world: World, level: int = 1, **fields: object) -> tuple[InstanceView, FakeEngine]:
    view, engine = sleepy(world, level, **fields)
    world.manager.sleep(view.id)
    world.step(0.1, times=3)
    assert (world.view(view).state, engine.asleep) == (State.SLEEPING, level)
    return view, engine


def wanted(world: World, view: InstanceView) -> None:
    """A request waits for it, for no time."""
    world.manager.wait_for_change(0.0, wanted=[view.id])
