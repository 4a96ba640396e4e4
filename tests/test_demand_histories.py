"""Random histories of models that are wanted: two GPUs, more models than fit, clients that wait, ask and leave.

Whatever happens in whatever order: no engine ends under a request, no device is over its memory, no two engines start
at once on a device, and every request is answered, with an answer or with an error.
"""

from __future__ import annotations

import math
import shutil
import tempfile
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from errors import Conflict, DaemonError, NotFound, NotReady
from instance_manager import CreateRequest
from instances.instance import ACTIVE, Haste, Lease, State
from instances.replicas import EngineLoad
from tests.instance_world import GIB, FakeEngine, World, cuda

Models = dict[str, dict[str, object]]
MODELS: Models = {
    "large": {"params": {"gpu_memory_utilization": 0.9}},
    "half": {"params": {"gpu_memory_utilization": 0.45}, "sleep": 1, "idle_timeout_seconds": 50,
             "stop_after_seconds": 90},
    "other": {"memory_mb": 30 << 10, "idle_timeout_seconds": 40},
    "wide": {"params": {"gpu_memory_utilization": 0.4}, "gpus": 2, "sleep": 2},
    "dear": {"memory_mb": 20 << 10, "priority": 5, "preload": True},
    "many": {"params": {"gpu_memory_utilization": 0.2}, "replicas": {"min": 2, "max": 4}, "sleep": 1},
    "grows": {"params": {"gpu_memory_utilization": 0.25}, "replicas": {"min": 1, "max": 3}},
}
NAMES = st.sampled_from(sorted(MODELS))
WHICH = st.integers(0, 9)
LOAD_S = 20.0
HOLD_S = 30.0
DRAIN_S = 30.0
PATIENCE_S = 3600.0         # beyond every bound: who waits longer is forgotten
SAYS = {
    "memory": "torch.OutOfMemoryError: CUDA out of memory.\n", "flag": "vllm: error: unrecognized arguments: --x\n",
    "cache": "ValueError: To serve at least one request with the model's max seq len (8192), (1.00 GiB KV cache is "
             "needed, which is larger than the available KV cache memory (0.50 GiB). Based on the available memory, "
             "the estimated maximum model length is 4096.\n",
    "nothing": "something\n"}


@dataclass(eq=False)
class Client:
    """One request, as the router handles it: it waits in the queue, takes a lease, and gives it back."""

    model: str
    serves_s: float
    since: float
    queue: AbstractContextManager[None] | None = None
    lease: Lease | None = None
    until: float = math.inf
    outcome: str = ""           # answered, cut, left, or the code of an error


class Histories(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.patch = pytest.MonkeyPatch()
        self.folder = Path(tempfile.mkdtemp(prefix="demand"))
        self.world = World(self.folder, self.patch, MODELS, VLLM_MAX_INSTANCES=5, PROBE_INTERVAL=30, PROBE_TIMEOUT=60,
                           DRAIN_TIMEOUT=DRAIN_S, MAX_HOLD_SECONDS=HOLD_S, MAX_QUEUE=6, SLEEP_HOST_MEMORY_MB=60 << 10,
                           REPLICAS_GROW_SECONDS=5, REPLICAS_SHRINK_SECONDS=20)
        self.world.devices.devices = (cuda(0), cuda(1))
        self.world.manager.start()
        self.models: Models = dict(MODELS)
        self.clients: list[Client] = []
        self.fails: dict[str, str] = {}         # how the next engine of a model ends its start
        self.spared: set[FakeEngine] = set()    # those that come up
        self.early_cuts: list[str] = []
        self.load = EngineLoad(0, 0, 4)         # of each replica

    def teardown(self) -> None:
        try:
            self.fails.clear()
            self.world.devices.devices = (cuda(0), cuda(1))
            for engine in self.world.engines:
                engine.answers, engine.immortal, engine.sleep_status, engine.wake_status = True, False, 200, 200
            waited = 0.0
            while any(not client.outcome for client in self.clients):
                self.pass_time(2.0)
                waited += 2.0
                assert waited < PATIENCE_S, f"deadlock: {self.clients} {self.world.manager.snapshot()}"
            for view in self.world.manager.snapshot():
                self.world.manager.stop(view.id)
            for _ in range(30):
                self.world.step(5.0)
            self.world.assert_nothing_left()
        finally:
            self.patch.undo()
            shutil.rmtree(self.folder)

    # --- what people do -------------------------------------------------------------------------------------------

    @rule(model=NAMES, serves_s=st.sampled_from([0.0, 1.0, 8.0, 70.0]), count=st.sampled_from([1, 1, 1, 8]))
    def ask(self, model: str, serves_s: float, count: int) -> None:
        for _ in range(count):
            client = Client(model, serves_s, self.world.now)
            self.clients.append(client)
            self.look(client)

    @rule(load=st.sampled_from([EngineLoad(0, 0, 4), EngineLoad(2, 0, 4), EngineLoad(4, 3, 4)]))
    def load_becomes(self, load: EngineLoad) -> None:
        self.load = load

    @rule(which=WHICH)
    def leave(self, which: int) -> None:
        if client := self.pick(which):
            self.end(client, "left", ok=False)

    @rule(model=NAMES, what=st.sampled_from(["load", "unload", "kill", "sleep", "wake", "create", "plan"]))
    def order(self, model: str, what: str) -> None:
        manager = self.world.manager
        try:
            if what == "load":
                manager.load(model)
            elif what in ("unload", "kill"):
                manager.unload(model, force=what == "kill")
            elif what == "create":
                manager.create(CreateRequest(model, {"gpu_memory_utilization": 0.3}, replace=True))
            elif what == "plan":
                before = manager.snapshot()
                manager.plan_for(model)
                assert [(one.id, one.state) for one in manager.snapshot()] == [(one.id, one.state) for one in before]
            else:
                for one in manager.candidates(model):
                    (manager.sleep if what == "sleep" else manager.wake)(one.id)
        except (Conflict, NotFound, DaemonError) as error:
            assert error.status < 500 or error.code in ("too_many_instances", "no_gpu_memory"), error

    @rule(model=NAMES, how=st.sampled_from(["as it was", "longer", "gone", "dearer", "sleepless"]))
    def reload(self, model: str, how: str) -> None:
        entry = dict(MODELS[model])
        if how == "longer":
            entry["max_model_len"] = 4096 + len(self.world.events)
        elif how == "dearer":
            entry["priority"] = 9
        elif how == "sleepless":
            entry = {name: value for name, value in entry.items() if name not in ("sleep", "stop_after_seconds")}
        self.models = {**self.models, model: entry}
        if how == "gone":
            del self.models[model]
        self.world.configure(self.models)

    # --- what machines do -----------------------------------------------------------------------------------------

    @rule(seconds=st.sampled_from([0.2, 1.0, 5.0, 31.0, 100.0]))
    def pass_time(self, seconds: float) -> None:
        step = min(seconds, 1.0 if seconds <= 5 else 2.5)
        for _ in range(round(seconds / step)):
            self.world.step(step)
            manager = self.world.manager
            before = manager.counters
            manager.scale(self.world.now, dict.fromkeys(manager.scaled(), self.load))
            assert {name: count for name, count in manager.counters.items() if name.startswith("evictions")} == {
                name: count for name, count in before.items() if name.startswith("evictions")}
            for engine in self.world.engines:
                if engine.alive and engine.health == 0 and self.world.now >= engine.launched_at + LOAD_S:
                    self.comes_up(engine)
            for client in list(self.clients):
                self.look(client)
            assert not self.world.stopped_while_serving and self.early_cuts == []

    @rule(model=NAMES, how=st.sampled_from(sorted(SAYS)))
    def next_start_fails(self, model: str, how: str) -> None:
        self.fails[model] = how

    @rule(which=WHICH, how=st.sampled_from(["dies", "core dies", "hangs", "recovers", "cannot sleep", "cannot wake",
                                            "wakes in name only"]))
    def engine_does(self, which: int, how: str) -> None:
        alive = [one for one in self.world.engines if one.alive and one.health == 200]
        if not alive:
            return
        engine = alive[which % len(alive)]
        if how == "dies":
            engine.dies(0)
        elif how == "core dies":
            engine.dead = 4711
        elif how in ("hangs", "recovers"):
            engine.answers = how == "recovers"
        elif how == "cannot sleep":
            engine.sleep_status = 500
        elif how == "cannot wake":
            engine.wake_status = 500
        else:
            engine.stays_asleep = True

    @rule(lag_s=st.sampled_from([0.0, 0.5, 3.0]), tells=st.booleans())
    def driver_is(self, lag_s: float, tells: bool) -> None:
        self.world.devices.lag_s, self.world.devices.tells = lag_s, tells

    @rule(index=st.integers(0, 1), wanted_gib=st.sampled_from([0, 10, 45, 75]))
    def stranger_takes(self, index: int, wanted_gib: int) -> None:
        """What nobody has yet, whoever was promised it; but not from one that was told to wake, which fails then as
        it must."""
        claims = 0
        for one in self.world.manager._instances.values():
            if index in one.devices and one.state is State.WAKING:
                claims += one.memory_planned_bytes or 0
        device = self.world.devices._with_engines(cuda(index))
        most = min(device.free_bytes, device.total_bytes - 2 * GIB - claims)
        taken = min(wanted_gib, max(0, most // GIB))
        devices = list(self.world.devices.devices)
        devices[index] = cuda(index, free_gib=80 - taken)
        self.world.devices.devices = tuple(devices)

    @rule()
    def daemon_is_killed(self) -> None:
        self.world.step()
        self.world.launcher.left = {one.spec.instance_id: one for one in self.world.engines if one.alive}
        for client in self.clients:
            client.outcome = client.outcome or "the daemon was killed"
        self.clients.clear()
        self.world.new_manager().start()

    # --- what must hold -------------------------------------------------------------------------------------------

    @invariant()
    def check(self) -> None:
        manager = self.world.manager
        assert manager.in_flight() == sum(
            client.lease is not None and client.lease.instance_id in manager._instances for client in self.clients
            if not client.outcome)
        for one in manager._instances.values():
            alive = [engine for engine in self.world.engines if engine.alive and engine.spec.instance_id == one.id]
            assert len(alive) <= 1
            if one.state in (State.SLEEPING, State.WAKING):
                assert not one.leases
            if one.state is State.READY:
                assert one.grant is not None and not any(engine.asleep for engine in alive)
        seated = [one for one in manager._instances.values() if one.seated and one.state is not State.FAILED]
        replacing = sum(one.state is State.STOPPING for one in seated)
        assert len(seated) <= 5 + replacing
        assert sum(one.host_bytes for one in manager._instances.values() if one.state is State.SLEEPING) <= 60 * GIB
        assert all(len(line) <= 6 for line in manager._lines.values())

    # --- clients --------------------------------------------------------------------------------------------------

    def look(self, client: Client) -> None:
        """One turn of the router's loop."""
        manager = self.world.manager
        if client.outcome:
            self.clients.remove(client)
        elif client.lease is not None:
            if self.world.now >= client.until:
                self.end(client, "answered", ok=True)
        else:
            try:
                found = manager.demand(client.model)
                if not found:
                    raise NotFound("no such model")
                ready = [one.id for one in found if one.state is State.READY]
                if ready:
                    self.take(client, manager.lease(ready[0]))
                    return
                if all(one.state not in ACTIVE for one in found):
                    raise NotReady("it is being stopped")
                if client.queue is None:
                    queue = manager.queue(client.model)
                    queue.__enter__()
                    client.queue = queue
                manager.wait_for_change(0.0, wanted=[one.id for one in found])
            except DaemonError as error:
                assert error.code != "internal_error"
                self.end(client, error.code, ok=False)

    def take(self, client: Client, lease: Lease) -> None:
        client.lease, client.until = lease, self.world.now + client.serves_s
        self.leave_queue(client)
        lease.on_cut(lambda: self.was_cut(client))

    def was_cut(self, client: Client) -> None:
        assert client.lease is not None
        instance = self.world.manager._instances[client.lease.instance_id]
        engine = next(one for one in reversed(self.world.engines) if one.spec.instance_id == instance.id)
        broken = not engine.alive or engine.dead is not None or not engine.answers
        in_time = instance.haste is Haste.DRAIN and self.world.now - instance.changed_at < DRAIN_S
        if not broken and (instance.state is not State.STOPPING or instance.haste is Haste.PATIENT or in_time):
            self.early_cuts.append(f"{instance.id} while {instance.state}: {instance.why}")
        self.end(client, "cut", ok=False)

    def end(self, client: Client, outcome: str, *, ok: bool) -> None:
        if client.outcome:
            return
        client.outcome = outcome
        self.leave_queue(client)
        if client.lease is not None:
            client.lease.release(ok=ok)

    def leave_queue(self, client: Client) -> None:
        if client.queue is not None:
            client.queue.__exit__(None, None, None)
            client.queue = None

    def pick(self, which: int) -> Client | None:
        return self.clients[which % len(self.clients)] if self.clients else None

    def comes_up(self, engine: FakeEngine) -> None:
        """Or not, if it is its turn to fail."""
        name = engine.flag("--served-model-name")
        if name in self.fails and engine not in self.spared:
            engine.dies(1, SAYS[self.fails.pop(name)])
        else:
            self.spared.add(engine)
            engine.health = 200


TestHistories = Histories.TestCase
TestHistories.settings = settings(      # 2,000 of them under HYPOTHESIS_PROFILE=ci
    max_examples=settings.default.max_examples // (5 if settings.default.max_examples >= 10_000 else 10),
    stateful_step_count=40)
