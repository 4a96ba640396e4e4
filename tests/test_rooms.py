"""Room for whom: who goes for a start, who waits for whose end, and that nobody is promised what another one has."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from errors import Conflict, NoRoom, TooManyInstances
from instance_manager import CreateRequest
from instances.instance import InstanceView, State
from instances.rooms import HOPELESS_S, ROBBED_ALLOWED
from instances.tenancy import MEMORY_WAIT_S, STILL_LACKS_S
from tests.instance_world import GIB, FakeEngine, World, cuda

Patch = pytest.MonkeyPatch
LARGE = {"params": {"gpu_memory_utilization": 0.9}}
HALF = {"params": {"gpu_memory_utilization": 0.45}}
HOLD_S = 30.0


def world_of(tmp_path: Path, monkeypatch: Patch, models: dict[str, dict[str, object]], gpus: int = 1,
             **settings: object) -> World:
    world = World(tmp_path, monkeypatch, models, MAX_HOLD_SECONDS=HOLD_S, **settings)
    world.devices.devices = tuple(cuda(index) for index in range(gpus))
    world.load_s = 20.0
    world.manager.start()
    return world


@pytest.fixture
def world(tmp_path: Path, monkeypatch: Patch) -> World:
    """One GPU, and three models of which only one fits."""
    return world_of(tmp_path, monkeypatch, {name: dict(LARGE) for name in "abc"})


def state(world: World, name: str) -> State | None:
    """Of the newest instance of this model; None: there is none."""
    found = [view for view in world.manager.snapshot() if view.spec.config_id == name]
    return found[-1].state if found else None


def idle(world: World, seconds: float = HOLD_S) -> None:
    world.step(seconds)


def up(engine: FakeEngine, world: World) -> None:
    engine.health = 200
    world.step(0.1, times=2)


# --- eviction -----------------------------------------------------------------------------------------------------

def test_an_idle_one_goes_for_one_that_is_wanted(world: World) -> None:
    a = world.served("a")
    idle(world)
    b = world.served("b")
    assert state(world, "a") is None and b.devices == (0,)
    assert world.events_of(a)[-2:] == ["TERM", "KILL"]
    assert b.because.startswith("GPU 0: a (idle for ") and "is stopped" in b.because
    assert world.manager.counters["evictions_idle"] == 1


def test_the_one_used_longest_ago_goes(tmp_path: Path, monkeypatch: Patch) -> None:
    world = world_of(tmp_path, monkeypatch, {name: dict(HALF) for name in "abc"})
    for name in ("a", "b", "a"):
        world.served(name)
        idle(world)
    world.served("c")
    assert (state(world, "a"), state(world, "b")) == (State.READY, None)


def test_nobody_goes_while_there_is_room(tmp_path: Path, monkeypatch: Patch) -> None:
    world = world_of(tmp_path, monkeypatch, {name: dict(LARGE) for name in "abc"}, gpus=3)
    for name in "abc":
        world.served(name)
        idle(world)
    assert sorted(view.devices for view in world.manager.snapshot()) == [(0,), (1,), (2,)]
    assert "evictions_idle" not in world.manager.counters


@pytest.mark.parametrize("how", ["pinned", "leased"])
def test_who_may_not_go_does_not(tmp_path: Path, monkeypatch: Patch, how: str) -> None:
    world = world_of(tmp_path, monkeypatch, {"a": {**LARGE, "pinned": how == "pinned"}, "b": dict(LARGE)})
    a = world.served("a")
    lease = world.manager.lease(a.id) if how == "leased" else None
    b = world.demand("b")
    with world.waiting("b"):
        world.step(1.0, times=4)
        assert (state(world, "a"), world.view(b).phase) == (State.READY, "waiting_for_room")
        assert ("a holds 72.0 GiB and is pinned" if how == "pinned" else "in use") in world.view(b).because
    assert lease is None or lease.cut_error is None


def test_a_sleeper_makes_room_and_comes_back(tmp_path: Path, monkeypatch: Patch) -> None:
    world = world_of(tmp_path, monkeypatch, {name: {**LARGE, "sleep": 1} for name in "ab"})
    a = world.served("a")
    idle(world)
    b = world.served("b")
    assert state(world, "a") is State.SLEEPING and "a (idle" in b.because and "goes to sleep" in b.because
    idle(world)
    assert world.served("a").id == a.id and state(world, "b") is State.SLEEPING
    assert len(world.engines) == 2 and world.manager.counters["wakes"] == 1
    world.devices.assert_not_over()


def test_the_memory_is_awaited_before_the_start(world: World) -> None:
    a = world.served("a")
    idle(world)
    world.devices.lag_s = 5.0
    b = world.demand("b")
    with world.waiting("b"):
        for _ in range(40):
            world.step(0.1)
            assert not world.engines_of(b)
        assert not world.engine(a).alive and world.view(b).phase == "waiting_for_memory"
        world.step(0.5, times=6)
    assert len(world.engines_of(b)) == 1


@pytest.mark.parametrize("tells", [True, False])
def test_memory_that_does_not_come_free_is_told(world: World, tells: bool) -> None:
    world.devices.tells = tells
    world.served("a")
    idle(world)
    b = world.demand("b")
    world.devices.lag_s = 1e6
    with world.waiting("b"):
        world.step(0.1, times=30)
        assert world.view(b).phase == "waiting_for_memory"
        while world.view(b).state is State.STARTING:
            world.step(1.0)
            assert not world.engines_of(b)
        found = world.view(b)
        assert found.last_error is not None and found.last_error.code == "no_gpu_memory"
    assert world.now < 1000 + HOLD_S + 3 * MEMORY_WAIT_S


def test_a_stranger_on_the_device_is_planned_around(tmp_path: Path, monkeypatch: Patch) -> None:
    world = world_of(tmp_path, monkeypatch, {"a": dict(LARGE)}, gpus=2)
    world.devices.devices = (cuda(0, free_gib=50), cuda(1))
    assert world.served("a").devices == (1,)


def test_a_stranger_that_has_it_all_is_named(world: World) -> None:
    world.devices.devices = (cuda(0, free_gib=10),)
    world.demand("a")
    with world.manager.queue("a"):
        world.step(1.0, times=int(HOPELESS_S) + 3)
        with pytest.raises(NoRoom) as refused:
            world.manager.demand("a")
    assert (refused.value.status, refused.value.code) == (503, "no_gpu_memory")
    assert "72.0 GiB" in refused.value.message and "other processes hold 70.0 GiB" in refused.value.message
    assert refused.value.retry_after_s is not None
    world.devices.devices = (cuda(0),)
    world.step(HOPELESS_S)
    world.served("a")


def test_what_can_never_fit_is_refused_at_once(tmp_path: Path, monkeypatch: Patch) -> None:
    world = world_of(tmp_path, monkeypatch, {"a": {"memory_mb": 100 << 10}, "b": {"gpus": 2}})
    for name in "ab":
        world.demand(name)
    world.step(0.1, times=2)
    for name in "ab":
        with pytest.raises(NoRoom) as refused:
            world.manager.demand(name)
        assert refused.value.code == "not_enough_gpus" and refused.value.retry_after_s is None


def test_two_that_come_at_once_are_not_promised_the_same_room(tmp_path: Path, monkeypatch: Patch) -> None:
    world = world_of(tmp_path, monkeypatch, {name: dict(HALF) for name in "abc"})
    views = [world.demand(name) for name in "abc"]
    with world.waiting("a"), world.waiting("b"), world.waiting("c"):
        for _ in range(10):
            world.step(0.1)
            for engine in world.engines:
                engine.health = 200
        assert [world.view(view).state for view in views] == [State.READY, State.READY, State.STARTING]
        assert world.view(views[2]).phase == "waiting_for_room"


def test_memory_that_a_start_has_not_taken_yet_is_not_free(tmp_path: Path, monkeypatch: Patch) -> None:
    """The engine of the first holds nothing yet, and the driver says that all is free."""
    world = world_of(tmp_path, monkeypatch, {"a": dict(HALF), "b": dict(LARGE)})
    monkeypatch.setattr(FakeEngine, "held_on", lambda engine, device: 0)
    world.demand("a")
    b = world.demand("b")
    with world.waiting("a"), world.waiting("b"):
        world.step(0.1, times=5)
        assert len(world.engines) == 1 and world.view(b).phase == "waiting_for_room"


def test_a_tensor_parallel_one_gets_all_its_gpus_or_none(tmp_path: Path, monkeypatch: Patch) -> None:
    world = world_of(tmp_path, monkeypatch, {"a": dict(LARGE), "b": {**LARGE, "gpus": 2}}, gpus=2)
    world.served("a")
    idle(world)
    b = world.served("b")
    assert b.devices == (0, 1) and state(world, "a") is None
    assert world.engine(b).spec.env["CUDA_VISIBLE_DEVICES"] == "GPU-0,GPU-1"


# --- turns of models that are wanted at the same time -------------------------------------------------------------

def test_one_in_use_goes_after_its_time_and_never_in_the_middle_of_a_request(world: World) -> None:
    a = world.served("a")
    lease = world.manager.lease(a.id)
    b = world.demand("b")
    with world.waiting("b"):
        world.step(HOLD_S - 1)
        assert state(world, "a") is State.READY
        world.step(1.5)
        assert state(world, "a") is State.STOPPING      # it takes no more requests, and ends this one
        again = world.demand("a")
        assert again.id != a.id
        world.step(1000.0, times=3)
        assert lease.cut_error is None and not world.engines_of(b)
        lease.release(ok=True)
        world.step(0.1, times=12)
        up(world.engine(b), world)
        assert world.view(b).state is State.READY
    assert world.manager.counters["evictions_in_use"] == 1
    assert "in use for long while others wait" in world.view(b).because


def test_turns_go_around(world: World) -> None:
    """Requests for all three wait all the time: each is served in turn, none starves and none is cut."""
    turns: list[str] = []
    lease = None
    with world.manager.queue("a"), world.manager.queue("b"), world.manager.queue("c"):
        for _ in range(1500):
            world.step(0.25)
            views = {name: world.demand(name) for name in "abc"}
            for engine in world.engines:
                engine.health = 200
            ready = [name for name, view in views.items() if world.view(view).state is State.READY]
            if lease is not None:
                assert lease.cut_error is None
                lease.release(ok=True)
            lease = world.manager.lease(views[ready[0]].id) if ready else None
            if ready and turns[-1:] != ready:
                turns += ready
    assert len(turns) >= 9 and all(turns[n:n + 3] == turns[:3] for n in range(0, len(turns) - 3, 3))
    assert sorted(turns[:3]) == ["a", "b", "c"]


def test_one_that_nobody_could_bring_back_keeps_its_place_while_it_is_used(world: World) -> None:
    """It was posted with params of its own: after a stop, its next request would find no such model."""
    own, _ = world.ready("org/own", params={"gpu_memory_utilization": 0.9})
    lease = world.manager.lease(own.id)
    world.demand("a")
    with world.waiting("a"):
        world.step(10.0, times=20)
        assert world.view(own).state is State.READY
        lease.release(ok=True)
        world.step(HOLD_S)
        assert world.view(own).state is State.STOPPING


def test_who_waits_longest_is_next(world: World) -> None:
    a = world.served("a")
    lease = world.manager.lease(a.id)
    c = world.demand("c")
    with world.waiting("c"):
        world.step(1.0)
        b = world.demand("b")
        with world.waiting("b"):
            world.step(HOLD_S, times=2)
            lease.release(ok=True)
            world.step(0.2, times=12)
            assert len(world.engines_of(c)) == 1 and not world.engines_of(b)


def test_a_sleeper_is_woken_when_its_turn_comes(tmp_path: Path, monkeypatch: Patch) -> None:
    world = world_of(tmp_path, monkeypatch, {"a": {**LARGE, "sleep": 1}, "b": dict(LARGE)})
    a = world.served("a")
    idle(world)
    b = world.served("b")
    lease = world.manager.lease(b.id)
    with world.waiting("a"):
        world.step(1.0, times=3)
        assert (world.view(a).state, world.view(a).phase) == (State.WAKING, "waiting_for_room")
        world.step(HOLD_S)
        assert state(world, "b") is State.STOPPING
        lease.release(ok=True)
        world.step(0.2, times=12)
        assert world.view(a).state is State.READY


def test_a_sleeper_that_nobody_waits_for_any_more_sleeps_on(tmp_path: Path, monkeypatch: Patch) -> None:
    world = world_of(tmp_path, monkeypatch, {"a": {**LARGE, "sleep": 1}, "b": dict(LARGE)})
    a = world.served("a")
    idle(world)
    lease = world.manager.lease(world.served("b").id)
    with world.waiting("a"):
        world.step(1.0)
    world.step(2.0)
    assert world.view(a).state is State.SLEEPING
    lease.release(ok=True)


def test_a_sleeper_whose_gpu_a_stranger_has_is_started_elsewhere(tmp_path: Path, monkeypatch: Patch) -> None:
    world = world_of(tmp_path, monkeypatch, {"a": {**LARGE, "sleep": 1}}, gpus=2)
    a = world.served("a")
    world.manager.sleep(a.id)
    world.step(0.2, times=4)
    there = world.view(a).devices[0]
    world.devices.devices = tuple(cuda(index, free_gib=20 if index == there else 80) for index in range(2))
    with world.waiting("a"):
        world.step(1.0, times=int(HOPELESS_S) + 4)
        up(world.engine(a), world)
    assert world.view(a).state is State.READY and world.view(a).devices == (1 - there,)
    assert world.manager.counters["wake_fallbacks"] == 1


# --- the host's RAM for sleepers, and the places for instances ----------------------------------------------------

def test_the_hosts_ram_for_sleepers_is_bounded(tmp_path: Path, monkeypatch: Patch) -> None:
    small = {"params": {"gpu_memory_utilization": 0.2}, "sleep": 1, "idle_timeout_seconds": 10}
    world = world_of(tmp_path, monkeypatch, {name: dict(small) for name in "abc"}, SLEEP_HOST_MEMORY_MB=2 * 16384 + 1)
    for name in "abc":
        world.served(name)
        world.step(5.0)
    world.step(20.0)
    world.step(0.2, times=10)
    assert (state(world, "a"), state(world, "b"), state(world, "c")) == (None, State.SLEEPING, State.SLEEPING)
    assert world.manager.counters["evictions_host_memory"] == 1


def test_one_too_large_for_the_hosts_ram_is_stopped(tmp_path: Path, monkeypatch: Patch) -> None:
    world = world_of(tmp_path, monkeypatch, {"a": {**LARGE, "sleep": 1, "idle_timeout_seconds": 10}},
                     SLEEP_HOST_MEMORY_MB=1024)
    world.served("a")
    world.step(11.0)
    assert state(world, "a") is State.STOPPING


def test_a_sleep_by_hand_keeps_to_it_too(tmp_path: Path, monkeypatch: Patch) -> None:
    world = world_of(tmp_path, monkeypatch, {"a": {**LARGE, "sleep": 1}}, SLEEP_HOST_MEMORY_MB=1024)
    a = world.served("a")
    with pytest.raises(Conflict) as refused:
        world.manager.sleep(a.id)
    assert refused.value.code == "no_host_memory" and "SLEEP_HOST_MEMORY_MB" in refused.value.message
    assert world.manager.sleep(a.id, level=2).state is State.FALLING_ASLEEP


def test_the_places_for_instances_are_given_in_turn_too(tmp_path: Path, monkeypatch: Patch) -> None:
    world = world_of(tmp_path, monkeypatch, {name: dict(HALF) for name in "abc"}, gpus=4, VLLM_MAX_INSTANCES=2)
    for name in "ab":
        world.served(name)
        idle(world)
    c = world.served("c")
    assert (state(world, "a"), state(world, "b")) == (None, State.READY)
    assert "VLLM_MAX_INSTANCES" in c.because


def test_what_has_no_place_yet_leaves_none_to_who_replaces_it(tmp_path: Path, monkeypatch: Patch) -> None:
    """A load on demand takes its place of VLLM_MAX_INSTANCES when it has room, and not before."""
    world = world_of(tmp_path, monkeypatch, {"a": dict(LARGE)}, VLLM_MAX_INSTANCES=1)
    world.manager.load("a")
    world.manager.create(CreateRequest("other", {}))
    with pytest.raises(TooManyInstances):
        world.manager.create(CreateRequest("a", {"gpu_memory_utilization": 0.3}, replace=True))
    assert len(world.manager.snapshot()) == 2


def test_a_place_is_waited_for_while_all_are_in_use(tmp_path: Path, monkeypatch: Patch) -> None:
    world = world_of(tmp_path, monkeypatch, {name: dict(HALF) for name in "ab"}, gpus=4, VLLM_MAX_INSTANCES=1)
    lease = world.manager.lease(world.served("a").id)
    b = world.demand("b")
    with world.waiting("b"):
        world.step(1.0, times=5)
        assert world.view(b).phase == "waiting_for_room" and "VLLM_MAX_INSTANCES" in world.view(b).because
        world.step(HOLD_S)
        lease.release(ok=True)
        world.step(0.2, times=12)
        assert len(world.engines_of(b)) == 1


# --- running out of memory ----------------------------------------------------------------------------------------

OOM = "torch.OutOfMemoryError: CUDA out of memory.\n"
TOO_SMALL = ("ValueError: To serve at least one request with the model's max seq len (8192), (1.00 GiB KV cache is "
             "needed, which is larger than the available KV cache memory (0.50 GiB). Based on the available memory, "
             "the estimated maximum model length is 4096.\n")
NOTHING_LEFT = "ValueError: No available memory for the cache blocks. Try increasing `gpu_memory_utilization`.\n"
IN_USE = ("ValueError: Free memory on device cuda:0 (40.0/80.0 GiB) on startup is less than desired GPU memory "
          "utilization (0.9, 72.0 GiB).\n")


def test_one_that_ran_out_of_memory_gets_more(tmp_path: Path, monkeypatch: Patch) -> None:
    world = world_of(tmp_path, monkeypatch, {"a": {"memory_mb": 10 << 10}, "b": dict(HALF)})
    world.served("b")
    idle(world)
    a = world.demand("a")
    with world.waiting("a"):
        world.step(0.1)
        world.engine(a).dies(1, OOM)
        world.step(0.1, times=30)
        assert state(world, "b") is None and len(world.engines_of(a)) == 2
        assert float(world.engine(a).flag("--gpu-memory-utilization")) > 0.9
        assert world.manager.counters["memory_retries"] == 1
        world.engine(a).dies(1, OOM)            # and that is that
        world.step(0.1)
        assert world.view(a).state is State.BACKOFF


def test_one_without_room_for_more_keeps_to_what_fits(tmp_path: Path, monkeypatch: Patch) -> None:
    world = world_of(tmp_path, monkeypatch, {"a": {"memory_mb": 10 << 10}, "b": {**HALF, "pinned": True}})
    world.served("b")
    a = world.demand("a")
    with world.waiting("a"):
        world.step(0.1)
        world.engine(a).dies(1, TOO_SMALL)
        world.step(0.1, times=10)
        assert world.engine(a).flag("--max-model-len") == "4096"
        assert world.view(a).spec.flags.get("max_model_len") is None
        world.engine(a).dies(1, TOO_SMALL)
        world.step(0.1)
        assert world.view(a).state is State.FAILED


@pytest.mark.parametrize(("params", "starts"), [({}, 2), ({"gpu_memory_utilization": 0.5}, 1)])
def test_weights_that_leave_nothing_get_more_once_unless_the_user_has_said_how_much(
        tmp_path: Path, monkeypatch: Patch, params: dict[str, float], starts: int) -> None:
    world = world_of(tmp_path, monkeypatch, {"a": {"memory_mb": 10 << 10, "params": params}})
    a = world.demand("a")
    with world.waiting("a"):
        world.step(0.1)
        world.engine(a).dies(1, NOTHING_LEFT)
        world.step(0.1, times=10)
        assert len(world.engines_of(a)) == starts
        if starts == 2:
            assert float(world.engine(a).flag("--gpu-memory-utilization")) > 0.9
            world.engine(a).dies(1, NOTHING_LEFT)
            world.step(0.1)
        assert world.view(a).state is State.FAILED


def test_what_the_user_has_fixed_is_not_made_smaller(tmp_path: Path, monkeypatch: Patch) -> None:
    world = world_of(tmp_path, monkeypatch, {"a": {"memory_mb": 10 << 10, "max_model_len": 8192}})
    a = world.demand("a")
    with world.waiting("a"):
        world.step(0.1)
        world.engine(a).dies(1, TOO_SMALL)
        world.step(0.1, times=10)
    assert world.view(a).state is State.FAILED and len(world.engines_of(a)) == 1


def test_idle_ones_go_for_the_second_try(tmp_path: Path, monkeypatch: Patch) -> None:
    world = world_of(tmp_path, monkeypatch, {"a": dict(HALF), "b": dict(HALF)})
    world.served("b")
    idle(world)
    a = world.demand("a")
    with world.waiting("a"):
        world.step(0.1)
        world.engine(a).dies(1, IN_USE)
        world.step(0.1, times=30)
    assert state(world, "b") is None and len(world.engines_of(a)) == 2
    assert world.engine(a).flag("--gpu-memory-utilization") == "0.45"      # the user's own
    assert "second try" in world.view(a).because


# --- strangers that are quicker -----------------------------------------------------------------------------------

def test_room_that_a_stranger_takes_before_the_start_is_sought_elsewhere(tmp_path: Path, monkeypatch: Patch) -> None:
    world = world_of(tmp_path, monkeypatch, {"a": dict(HALF), "b": dict(LARGE)}, gpus=2)
    world.devices.devices = (cuda(0), cuda(1, free_gib=30))
    world.served("a")
    idle(world)
    world.devices.lag_s = 2.0
    b = world.demand("b")
    with world.waiting("b"):
        world.step(0.1, times=5)
        assert world.view(b).devices == (0,)
        world.devices.devices = (cuda(0, free_gib=60), cuda(1))
        began = world.now
        while not world.engines_of(b):
            world.step(0.1)
            assert world.view(b).state is State.STARTING
        assert world.view(b).devices == (1,) and world.now - began < 2 * STILL_LACKS_S
        up(world.engine(b), world)
    found = world.view(b)
    assert (found.state, found.restarts, found.last_error) == (State.READY, 0, None)
    world.devices.assert_not_over()


@pytest.mark.parametrize("lag_s", [0.0, 0.5])
def test_a_start_that_a_stranger_spoils_is_not_too_large(tmp_path: Path, monkeypatch: Patch, lag_s: float) -> None:
    world = world_of(tmp_path, monkeypatch, {"a": {"memory_mb": 20 << 10}, "b": dict(HALF)}, gpus=2)
    world.devices.devices = (cuda(0), cuda(1, free_gib=50))
    assert world.served("b").devices == (1,)
    idle(world)
    world.devices.lag_s = lag_s
    a = world.demand("a")
    with world.waiting("a"):
        world.step(0.1)
        assert world.view(a).devices == (0,)
        share = world.engine(a).flag("--gpu-memory-utilization")
        world.engine(a).dies(1, OOM)
        world.devices.devices = (cuda(0, free_gib=5), cuda(1))
        world.step(0.1, times=20)
        assert world.view(a).devices == (1,) and world.engine(a).flag("--gpu-memory-utilization") == share
        assert state(world, "b") is State.READY and world.instance(a).squeeze is None
        up(world.engine(a), world)
    assert world.view(a).state is State.READY and world.manager.counters["memory_retries"] == 1


def test_one_whose_room_is_taken_again_and_again_waits_as_others_do(tmp_path: Path, monkeypatch: Patch) -> None:
    world = world_of(tmp_path, monkeypatch, {"a": {"memory_mb": 20 << 10}})
    a = world.demand("a")
    with world.waiting("a"):
        for number in range(ROBBED_ALLOWED + 2):
            world.devices.devices = (cuda(0),)
            world.step(0.1, times=5)
            assert len(world.engines_of(a)) == number + 1
            assert world.view(a).state is State.STARTING
            world.devices.devices = (cuda(0, free_gib=10),)
            world.engine(a).dies(1, IN_USE)
            world.step(0.1, times=14 if number <= ROBBED_ALLOWED else 1)
        assert world.view(a).state is State.BACKOFF and "failures" not in world.manager.counters


def test_one_that_was_disturbed_while_it_measured_begins_anew_at_once(tmp_path: Path, monkeypatch: Patch) -> None:
    world = world_of(tmp_path, monkeypatch, {"a": {"memory_mb": 20 << 10}})
    a = world.demand("a")
    with world.waiting("a"):
        for number in range(ROBBED_ALLOWED + 1):
            world.step(0.1, times=5)
            assert len(world.engines_of(a)) == number + 1
            world.engine(a).dies(1, "AssertionError: Error in memory profiling. Initial free memory 10.0 GiB, current "
                                    "free memory 20.0 GiB.\n")
        world.step(0.1)
        assert world.view(a).state is State.BACKOFF


# --- what is learned, and what a load would do --------------------------------------------------------------------

def test_what_it_took_is_known_the_next_time(tmp_path: Path, monkeypatch: Patch) -> None:
    world = world_of(tmp_path, monkeypatch, {"a": {"memory_mb": 20 << 10}})
    assert world.manager.expected_start_s("a") is None and world.manager.expected_start_s("x") is None
    a = world.demand("a")
    with world.waiting("a"):
        world.step(0.1)
        world.step(12.0)
        up(world.engine(a), world)
    found = world.view(a)
    assert found.memory_planned_bytes == 20 * GIB and found.memory_measured_bytes is not None
    assert 12.0 <= (world.manager.expected_start_s("a") or 0) < 13.0
    world.manager.unload("a")
    world.step(0.2, times=12)
    assert state(world, "a") is None and 12.0 <= (world.manager.expected_start_s("a") or 0) < 13.0
    world.new_manager()
    assert 12.0 <= (world.manager.expected_start_s("a") or 0) < 13.0       # over a restart of the daemon


def test_without_figures_of_processes_it_is_what_came_in_use(tmp_path: Path, monkeypatch: Patch) -> None:
    world = world_of(tmp_path, monkeypatch, {"a": {"memory_mb": 20 << 10}})
    world.devices.tells = False
    world.devices.devices = (cuda(0, free_gib=50),)
    measured = world.served("a").memory_measured_bytes
    assert measured is not None and abs(measured - 20 * GIB) < GIB


def test_a_stranger_that_came_meanwhile_is_not_learned_as_its_own(tmp_path: Path, monkeypatch: Patch) -> None:
    world = world_of(tmp_path, monkeypatch, {"a": {"memory_mb": 20 << 10}})
    world.devices.tells = False
    a = world.demand("a")
    with world.waiting("a"):
        world.step(0.1)
        world.devices.devices = (cuda(0, free_gib=50),)
        up(world.engine(a), world)
    assert world.view(a).memory_measured_bytes == 20 * GIB


def test_a_plan_says_what_would_happen_and_nothing_happens(world: World) -> None:
    a = world.served("a")
    idle(world)
    report = world.manager.plan_for("b")
    assert (report.fits, report.devices, report.stop, report.source) == (True, (0,), (a.id,), "utilization")
    assert "a (idle" in report.because and report.seconds_expected is None
    assert state(world, "a") is State.READY and state(world, "b") is None
    there = world.manager.plan_for("a")
    assert (there.fits, there.source, there.stop, there.seconds_expected) == (True, "running", (), 0.0)
    lease = world.manager.lease(a.id)
    refused = world.manager.plan_for("b")
    assert not refused.fits and "in use" in refused.because and refused.devices == ()
    lease.release()


def test_where_it_stands_and_why_is_known_to_the_next_daemon(world: World) -> None:
    a = world.served("a")
    world.launcher.left = {a.id: world.engine(a)}
    world.new_manager().start()
    world.step(0.1, times=3)
    found: InstanceView = world.view(a)
    assert (found.devices, found.because, found.memory_planned_bytes) == (a.devices, a.because, a.memory_planned_bytes)
    idle(world)
    world.served("b")                           # what it holds was counted
    world.devices.assert_not_over()


def test_what_is_preloaded_evicts_nobody(tmp_path: Path, monkeypatch: Patch, caplog: pytest.LogCaptureFixture) -> None:
    models = {name: {**HALF, "preload": True, "priority": priority} for priority, name in enumerate("abc")}
    world = world_of(tmp_path, monkeypatch, models)
    for _ in range(10):
        world.step(1.0)
        for engine in world.engines:
            engine.health = 200
    assert (state(world, "a"), state(world, "b"), state(world, "c")) == (None, State.READY, State.READY)
    assert "a is not loaded ahead of requests: a needs 36.0 GiB" in caplog.text
    assert replace(world.served("a")).state is State.READY       # a request does


@pytest.mark.parametrize(("command", "budget", "together"), [
    ("vllm", None, False), ("python simulator.py", None, True), ("python simulator.py", 40 << 10, False)])
def test_a_simulated_engine_takes_none_of_the_hosts_memory_unless_that_is_played(
        tmp_path: Path, monkeypatch: Patch, command: str, budget: int | None, together: bool) -> None:
    """So that a demo on a small machine does not stop what it has just shown."""
    settings = {"HOST_MEMORY_BUDGET_MB": budget} if budget else {}
    world = World(tmp_path, monkeypatch, {name: dict(HALF) for name in "abc"}, VLLM_COMMAND=command, **settings)
    for name in "abc":
        world.demand(name)
    world.step(0.1, times=3)
    assert (len(world.engines) == 3) is together and world.engines
