"""Replicas that come and go with the load, in a world of fakes: room, failures, reloads, sleepers, other people's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from instance_manager import CreateRequest
from instances.demand import FAILED_FOR_S
from instances.instance import InstanceView, State
from instances.replicas import EngineLoad
from tests.instance_world import World, cuda

Patch = pytest.MonkeyPatch
GROW_S, SHRINK_S = 5.0, 20.0
WAITS = EngineLoad(running=4, waiting=6, capacity=4)
IDLES = EngineLoad(running=0, waiting=0, capacity=4)


def world_of(tmp_path: Path, monkeypatch: Patch, gpus: int = 2, chat: dict[str, Any] | None = None,
             **others: dict[str, object]) -> World:
    """GPUs with room for two, `chat` with up to three replicas."""
    models: dict[str, dict[str, object]] = {
        "chat": {"replicas": {"min": 1, "max": 3}, "params": {"gpu_memory_utilization": 0.45},
                 "idle_timeout_seconds": 0, **(chat or {})}, **others}
    world = World(tmp_path, monkeypatch, models, REPLICAS_GROW_SECONDS=GROW_S, REPLICAS_SHRINK_SECONDS=SHRINK_S)
    world.devices.devices = tuple(map(cuda, range(gpus)))
    world.manager.start()
    return world


@pytest.fixture
def world(tmp_path: Path, monkeypatch: Patch) -> World:
    made = world_of(tmp_path, monkeypatch)
    made.served("chat")
    return made


def under(world: World, load: EngineLoad, seconds: float) -> None:
    """So much is to do in each replica for so long; what is launched comes up."""
    for _ in range(int(seconds)):
        world.step(1.0)
        for engine in world.engines:
            engine.health = 200 if engine.alive else engine.health
        world.step()
        world.manager.scale(world.now, dict.fromkeys(world.manager.scaled(), load))


def states(world: World) -> list[State]:
    return [view.state for view in world.manager.snapshot()]


def because(world: World) -> str:
    return world.manager.replicas()["chat"].because


def idle_one(world: World, which: int = 0) -> InstanceView:
    return world.manager.snapshot()[which]


def test_it_grows_one_by_one_to_its_most_and_shrinks_to_its_least(world: World) -> None:
    under(world, WAITS, GROW_S + 1)
    assert len(states(world)) == 2
    assert (world.manager.replicas()["chat"].wanted, world.manager.replicas()["chat"].running) == (2, 2)
    under(world, WAITS, 60)
    assert states(world) == [State.READY] * 3 and because(world).endswith("; 3 is its most")
    assert [view.grown for view in world.manager.snapshot()] == [False, True, True]
    first = idle_one(world)
    under(world, IDLES, SHRINK_S + 2)
    assert len(states(world)) == 2
    under(world, IDLES, 200)
    assert [view.id for view in world.manager.snapshot()] == [first.id]      # the youngest have gone
    counters = world.manager.counters
    assert (counters["replicas_added"], counters["replicas_removed"]) == (2, 2)
    assert world.manager.replicas()["chat"].wanted == 1


def test_who_serves_finishes_before_it_goes(world: World) -> None:
    under(world, WAITS, GROW_S + 3)
    leases = [world.manager.lease(view.id) for view in world.manager.snapshot()]
    for _ in range(5):
        under(world, IDLES, SHRINK_S + 2)
    assert sorted(states(world)) == [State.READY, State.STOPPING] and not world.stopped_while_serving
    for lease in leases:
        lease.release(ok=True)
    under(world, IDLES, 2)
    assert states(world) == [State.READY]


def test_what_waits_here_counts_too(world: World) -> None:
    with world.manager.queue("chat"), world.manager.queue("chat"):
        under(world, IDLES, GROW_S + 1)
    assert len(states(world)) == 2


def test_nobody_goes_for_growth(tmp_path: Path, monkeypatch: Patch) -> None:
    world = world_of(tmp_path, monkeypatch, 1, other={"params": {"gpu_memory_utilization": 0.4}})
    world.served("chat")
    other = world.served("other")
    under(world, WAITS, 60)
    assert states(world) == [State.READY] * 2 and world.view(other).state is State.READY
    assert "GPU 0" in because(world) and world.manager.counters.keys() == {"loads"}
    world.manager.unload("other")
    under(world, WAITS, 20)
    assert [view.names[0] for view in world.manager.snapshot()] == ["chat", "chat"]     # now there is room


def test_nobody_goes_for_growth_even_if_the_room_is_taken_meanwhile(tmp_path: Path, monkeypatch: Patch) -> None:
    world = world_of(tmp_path, monkeypatch, 1, other={"params": {"gpu_memory_utilization": 0.4}})
    world.served("chat")
    other = world.served("other")
    monkeypatch.setattr(world.manager, "why_no_room", lambda instance: None)
    with world.manager.queue("chat"), world.manager.queue("chat"):      # though requests wait for it here
        under(world, WAITS, 30)
    assert world.view(other).state is State.READY and world.manager.counters["replicas_added"] >= 1
    assert states(world).count(State.READY) == 2 and "evictions_idle" not in world.manager.counters


def test_who_waits_for_room_comes_first(tmp_path: Path, monkeypatch: Patch) -> None:
    world = world_of(tmp_path, monkeypatch, 2, wide={"gpus": 2, "params": {"gpu_memory_utilization": 0.9}})
    world.manager.lease(world.served("chat").id)
    world.demand("wide")
    with world.waiting("wide"):
        under(world, WAITS, GROW_S + 3)
        assert because(world).endswith("; others wait for room")
    assert sum(view.names[0] == "chat" for view in world.manager.snapshot()) == 1


def test_a_start_that_fails_is_not_tried_at_once_again(world: World) -> None:
    under(world, WAITS, GROW_S + 1)
    world.step()
    assert len(world.engines) == 2
    world.engines[-1].dies(1, "vllm: error: unrecognized arguments: --x\n")
    world.step(times=3)
    assert states(world) == [State.READY, State.FAILED]
    under(world, WAITS, 10 * FAILED_FOR_S)
    assert len(world.engines) == 2 and "the last start failed" in because(world)      # it would fail again
    world.manager.stop(world.manager.snapshot()[1].id)
    under(world, WAITS, GROW_S + 2)
    assert len(world.engines) == 3


def test_those_made_with_new_are_left_alone_and_not_counted(world: World) -> None:
    made, _ = world.manager.create(CreateRequest("chat", {}, new=True))
    under(world, IDLES, 2)
    assert world.view(made).apart and world.manager.replicas()["chat"].running == 1
    under(world, WAITS, 100)
    assert len(states(world)) == 4
    under(world, IDLES, 200)
    assert len(states(world)) == 2 and world.view(made).state is State.READY


def test_one_that_sleeps_is_woken_first(tmp_path: Path, monkeypatch: Patch) -> None:
    world = world_of(tmp_path, monkeypatch, chat={"sleep": 1, "replicas": {"min": 2, "max": 2}})
    world.manager.load("chat")
    under(world, IDLES, 5)
    sleeper = idle_one(world, 1)
    world.manager.sleep(sleeper.id)
    under(world, IDLES, 3)
    assert states(world) == [State.READY, State.SLEEPING]
    under(world, WAITS, GROW_S + 8)
    assert states(world) == [State.READY] * 2 and len(world.engines) == 2
    assert world.manager.counters["wakes"] == 1


def test_a_reload_with_a_lower_most_ends_the_rest_and_with_a_higher_least_adds_some(world: World) -> None:
    under(world, WAITS, 60)
    entry: dict[str, object] = {"params": {"gpu_memory_utilization": 0.45}}
    world.configure({"chat": {**entry, "replicas": {"min": 1, "max": 2}}})
    under(world, WAITS, 4)
    assert states(world) == [State.READY] * 2 and len(world.engines) == 3
    world.configure({"chat": {**entry, "replicas": 3}})
    under(world, EngineLoad(1, 0, 4), 6)
    assert states(world) == [State.READY] * 3 and len(world.engines) == 4
    world.configure({"chat": {**entry, "replicas": 1}})
    assert world.manager.replicas() == {} and world.manager.scaled() == frozenset()


def test_unloaded_stays_unloaded(world: World) -> None:
    under(world, WAITS, GROW_S + 1)
    world.manager.unload("chat")
    under(world, WAITS, 60)
    assert states(world) == [] and because(world) == "it is not loaded"


def test_all_idle_away_although_each_has_its_own_clock(tmp_path: Path, monkeypatch: Patch) -> None:
    world = world_of(tmp_path, monkeypatch, chat={"replicas": {"min": 2, "max": 3}, "idle_timeout_seconds": 30})
    world.manager.load("chat")
    under(world, IDLES, 5)
    world.manager.lease(idle_one(world).id).release(ok=True)        # the clock of one begins anew
    under(world, IDLES, 100)
    assert states(world) == [] and len(world.engines) == 2


def test_an_extra_one_stops_where_others_sleep(tmp_path: Path, monkeypatch: Patch) -> None:
    world = world_of(tmp_path, monkeypatch, chat={"sleep": 1, "idle_timeout_seconds": 10})
    world.served("chat")
    under(world, WAITS, GROW_S + 2)
    under(world, IDLES, 15)
    assert states(world) == [State.SLEEPING]


def test_the_next_daemon_knows_which_are_which(world: World) -> None:
    made, _ = world.manager.create(CreateRequest("chat", {}, new=True))
    under(world, WAITS, GROW_S + 4)
    before = {view.id: (view.grown, view.apart) for view in world.manager.snapshot()}
    assert sorted(before.values()) == [(False, False), (False, True), (True, False)]
    world.launcher.left = {engine.spec.instance_id: engine for engine in world.engines}
    world.new_manager().start()
    assert {view.id: (view.grown, view.apart) for view in world.manager.snapshot()} == before
    assert made.id in before


def test_nothing_grows_while_the_daemon_ends(world: World) -> None:
    world.manager.close_door()
    under(world, WAITS, 30)
    assert len(states(world)) == 1
