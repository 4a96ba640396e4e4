"""An instance that hangs asleep, or on its way there or back: it is asked for its health alone, and found by it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from instances.instance import State
from tests.instance_world import World, asleep, sleepy, wanted


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    world = World(tmp_path, monkeypatch, PROBE_INTERVAL=30, PROBE_TIMEOUT=60)
    world.manager.start()
    yield world
    assert not world.stopped_while_serving


def test_an_engine_that_hangs_while_it_drains_is_found_out(world: World) -> None:
    view, engine = sleepy(world)
    lease = world.manager.lease(view.id)
    lease.on_cut(lease.release)
    engine.answers = False
    world.manager.sleep(view.id)
    world.step(31.0, times=8)
    assert world.view(view).restarts == 1 and "KILL" in world.events_of(view)


def test_a_sleeper_is_asked_for_its_health_alone(world: World) -> None:
    """Of what real vLLM parks nothing is ever seen again."""
    view, engine = asleep(world)
    engine.asked.clear()
    world.step(31.0, times=50)
    assert set(engine.asked) == {"/health"} and world.view(view).state is State.SLEEPING
    assert world.probe.open == set()


def test_a_question_is_taken_back_before_it_is_told_to_sleep(world: World) -> None:
    """It would be in the engine's queue, which `mode=wait` waits for."""
    view, engine = sleepy(world)
    engine.answers = False
    world.step(31.0)
    world.step(0.25, times=4)
    assert engine.asked[-1] == "/v1/completions" and world.probe.open
    world.manager.sleep(view.id)
    world.step(0.1, times=3)
    assert world.view(view).state is State.SLEEPING and world.probe.open == set()


@pytest.mark.parametrize("when", ["falling asleep", "asleep", "waking"])
def test_one_that_hangs_is_found_before_its_time_to_move_is_over(world: World, when: str) -> None:
    """All of it, as after SIGSTOP: hundreds of seconds may pass over a sleep or a wake, but not over its health."""
    view, engine = sleepy(world) if when == "falling asleep" else asleep(world)
    engine.health = engine.sleep_status = engine.wake_status = None
    if when == "falling asleep":
        world.manager.sleep(view.id)
    elif when == "waking":
        wanted(world, view)
    world.step(0.1)
    world.step(31.0)
    assert world.view(view).last_error is None
    world.step(61.0)
    found = world.view(view)
    assert found.last_error is not None and found.last_error.code == "engine_hung"
    assert "its server answered no GET /health within 60 s" in found.last_error.message
    assert found.state is State.BACKOFF
    world.step(1.1, times=3)
    assert (world.view(view).state, world.view(view).restarts, engine.alive) == (State.STARTING, 1, False)
    assert world.probe.open == set()
