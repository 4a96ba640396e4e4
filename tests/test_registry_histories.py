"""Random histories of the registry: whatever happens in whatever order, what design promises holds at every step."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from errors import Conflict, NotFound, NotReady, TooManyInstances
from instance_manager import CreateRequest
from instances.instance import ACTIVE, Haste, InstanceView, Lease, State
from instances.sockets import Listener
from tests.instance_world import FakeEngine, World, cuda

MODELS = ("org/a", "org/b", "org/c")
MOST = 4
DRAIN_S = 30.0
WHICH = st.integers(0, 7)           # the n-th of those there are, modulo their number


class Histories(RuleBasedStateMachine):
    """Two GPUs, three models, four places."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = pytest.MonkeyPatch()
        self.folder = Path(tempfile.mkdtemp(prefix="histories"))
        self.world = World(self.folder, self.patch, VLLM_MAX_INSTANCES=MOST, PROBE_INTERVAL=30, PROBE_TIMEOUT=60,
                           DRAIN_TIMEOUT=DRAIN_S, VLLM_DEFAULT_TIMEOUT=100)
        self.world.devices.devices = (cuda(0), cuda(1))
        self.world.manager.start()
        self.leases: list[Lease] = []
        self.ids: set[str] = set()
        self.early_cuts: list[str] = []

    def teardown(self) -> None:
        try:
            for lease in list(self.leases):
                self.give_back(lease, ok=True)
            for view in self.world.manager.snapshot():
                self.world.manager.stop(view.id)
            for _ in range(40):
                self.world.step(10.0)
            self.check()
            for engine in self.world.engines:
                engine.alive = engine.alive and not engine.immortal
            self.world.assert_nothing_left()
        finally:
            self.patch.undo()
            shutil.rmtree(self.folder)

    # --- what people do -------------------------------------------------------------------------------------------

    @rule(model=st.sampled_from(MODELS), length=st.sampled_from([1024, 2048]),
          how=st.sampled_from(["", "replace", "new"]),
          timeout_s=st.sampled_from([None, 0.0, 5.0]), size=st.sampled_from([0.3, 0.9]))
    def create(self, model: str, length: int, how: str, timeout_s: float | None, size: float) -> None:
        request = CreateRequest(model, {"max_model_len": length, "gpu_memory_utilization": size}, timeout_s=timeout_s,
                                replace=how == "replace", new=how == "new")
        before = {view.id: view for view in self.world.manager.snapshot()}
        same = [view for view in before.values()
                if view.spec.model == model and view.state in ACTIVE and view.spec.params == request.params]
        try:
            view, created = self.world.manager.create(request)
        except (Conflict, TooManyInstances):
            assert {view.id: view.state for view in self.world.manager.snapshot()} == {
                name: view.state for name, view in before.items()}
            return
        assert created == (view.id not in before)
        if same and how != "new":
            assert not created and view.id in {one.id for one in same}
        if created:
            assert view.id not in self.ids
            self.ids.add(view.id)

    @rule(which=WHICH, force=st.booleans())
    def stop(self, which: int, force: bool) -> None:
        if view := self.pick(which):
            self.world.manager.stop(view.id, force=force)

    @rule(which=WHICH, leaves_when_cut=st.booleans())
    def request(self, which: int, leaves_when_cut: bool) -> None:
        view = self.pick(which, lambda one: one.state is State.READY)
        if view is None:
            return
        lease = self.world.manager.lease(view.id)
        self.leases.append(lease)
        lease.on_cut(lambda: self.was_cut(lease, leaves_when_cut))

    @rule(which=WHICH)
    def request_too_early_or_late(self, which: int) -> None:
        if view := self.pick(which, lambda one: one.state is not State.READY):
            with pytest.raises((NotReady, NotFound)):
                self.world.manager.lease(view.id)

    @precondition(lambda self: self.leases)
    @rule(which=WHICH, ok=st.booleans())
    def request_ends(self, which: int, ok: bool) -> None:
        self.give_back(self.leases[which % len(self.leases)], ok)

    # --- what engines do ------------------------------------------------------------------------------------------

    @rule(which=WHICH)
    def engine_is_up(self, which: int) -> None:
        if engine := self.engine(which):
            engine.health = 200
            self.world.step(0.1, times=2)

    @rule(which=WHICH, what=st.sampled_from(["dies", "core dies", "hangs", "recovers", "is deaf", "cannot be killed"]))
    def engine_does(self, which: int, what: str) -> None:
        engine = self.engine(which)
        if engine is None:
            return
        if what == "dies":
            engine.dies(0)
        elif what == "core dies":
            engine.dead = 4711
        elif what in ("hangs", "recovers"):
            engine.answers = what == "recovers"
        elif what == "is deaf":
            engine.deaf = True
        else:
            engine.immortal = True

    @rule(which=WHICH, permanent=st.booleans())
    def engine_fails_to_start(self, which: int, permanent: bool) -> None:
        engine = self.engine(which)
        if engine is not None and engine.health == 0:
            engine.dies(1, "vllm: error: unrecognized arguments: --x\n" if permanent else "")

    @rule(which=WHICH)
    def stranger_takes_the_port(self, which: int) -> None:
        engine = self.engine(which)
        if engine is not None and engine.health == 0:
            engine.listens = Listener.STRANGER

    # --- time, and the daemon's own death -------------------------------------------------------------------------

    @rule(seconds=st.sampled_from([0.0, 0.1, 1.0, 5.0, 31.0, 101.0]), times=st.integers(1, 3))
    def time_passes(self, seconds: float, times: int) -> None:
        self.world.step(seconds, times)

    @rule()
    def daemon_is_killed(self) -> None:
        """Once its keepers, whom every change wakes, have written down what was decided."""
        self.world.step()
        self.world.launcher.left = {one.spec.instance_id: one for one in self.world.engines if one.alive}
        listed = {view.id for view in self.world.manager.snapshot() if view.state is not State.FAILED}
        on_disk = {path.stem for path in (self.world.state_dir.path / "instances").iterdir()}
        assert listed <= on_disk
        self.leases.clear()         # its clients' connections died with it
        self.world.new_manager().start()
        assert {view.id for view in self.world.manager.snapshot()} == on_disk

    # --- what must hold -------------------------------------------------------------------------------------------

    @invariant()
    def check(self) -> None:
        world, manager = self.world, self.world.manager
        views = manager.snapshot()
        assert not world.stopped_while_serving and self.early_cuts == []
        assert manager.in_flight() == len([lease for lease in self.leases if lease.instance_id in manager._instances])
        held = sum(view.state is not State.FAILED for view in views)
        replacing = sum(view.state is State.STOPPING for view in views)
        assert held <= MOST + replacing
        for view in views:
            alive = [one for one in world.engines_of(view) if one.alive]
            assert len(alive) <= 1 or any(one.immortal for one in alive)
            if view.state is State.STARTING:        # of an engine before, by who does not let go
                assert all(lease.cut_error is not None for lease in manager._instances[view.id].leases)
            assert set(view.names) <= {name for name, found in manager._by_name.items()
                                       if any(one.id == view.id for one in found)}
        ids = {view.id for view in views}
        assert all(one.id in ids for found in manager._by_name.values() for one in found)
        for engine in world.engines:
            if engine.alive and not engine.immortal:        # no engine outlives its record
                assert engine.spec.instance_id in {path.stem for path in (
                    world.state_dir.path / "instances").glob("*.json")}
        ports = list(manager.resources.ports._owners)
        assert len(ports) == len(set(ports))

    # --- helpers --------------------------------------------------------------------------------------------------

    def pick(self, which: int, accept: Callable[[InstanceView], Any] = lambda view: True) -> InstanceView | None:
        views = [view for view in self.world.manager.snapshot() if accept(view)]
        return views[which % len(views)] if views else None

    def engine(self, which: int) -> FakeEngine | None:
        alive = [one for one in self.world.engines if one.alive]
        return alive[which % len(alive)] if alive else None

    def was_cut(self, lease: Lease, leaves: bool) -> None:
        """Only a dead engine, a stop in haste or the end of the drain cuts a request off."""
        instance = self.world.manager._instances[lease.instance_id]
        stopping = instance.state is State.STOPPING
        if instance.state in (State.STARTING, State.READY) or (
                stopping and instance.haste is Haste.DRAIN and self.world.now - instance.changed_at < DRAIN_S):
            self.early_cuts.append(f"{lease.instance_id} while {instance.state}")
        if leaves:
            self.give_back(lease, ok=False)

    def give_back(self, lease: Lease, ok: bool) -> None:
        if lease in self.leases:
            self.leases.remove(lease)
        lease.release(ok=ok)


TestHistories = Histories.TestCase
TestHistories.settings = settings(max_examples=settings.default.max_examples // 3, stateful_step_count=40)
