"""An instance that sleeps: when it does, that nobody disturbs it, and how it wakes, or does not."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from errors import Conflict, NotFound, NotReady
from instances.instance import InstanceView, State
from instances.sleeping import MOVE_LIMIT_S
from tests.instance_world import GIB, HOST, FakeEngine, World, asleep, cuda, sleepy, wanted

TOLD = "/sleep?level=1&mode=wait"


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    world = World(tmp_path, monkeypatch, PROBE_INTERVAL=30, PROBE_TIMEOUT=60)
    world.manager.start()
    yield world
    assert not world.stopped_while_serving


# --- how it is started --------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("device", "level", "flag", "mode"), [
    (cuda(0), 1, True, "1"), (cuda(0), 0, False, None), (HOST, 2, False, "1"), (HOST, 0, False, None)])
def test_only_what_may_sleep_has_the_routes_for_it(world: World, device: object, level: int, flag: bool,
                                                   mode: str | None) -> None:
    world.devices.devices = (device,)  # type: ignore[assignment]
    _, engine = world.loading(sleep_level=level)
    assert ("--enable-sleep-mode" in engine.spec.argv) is flag
    assert engine.spec.env.get("VLLM_SERVER_DEV_MODE") == mode


# --- falling asleep -----------------------------------------------------------------------------------------------

def test_what_idles_sleeps_if_it_may(world: World) -> None:
    view, engine = sleepy(world)
    world.step(99.0)
    assert (world.view(view).state, world.view(view).asleep_level) == (State.READY, 0)
    world.step(2.0)
    world.step(0.1, times=3)
    found = world.view(view)
    assert (found.state, found.asleep_level, found.why, found.pid) == (
        State.SLEEPING, 1, "idle for 100 s", engine.pid)
    assert world.manager.counters == {"sleeps": 1}
    assert world.events_of(view) == ["launched", "watched", TOLD]


def test_what_may_not_sleep_is_stopped(world: World) -> None:
    view, _ = world.ready(timeout_s=100.0)
    world.step(101.0)
    assert world.view(view).state is State.STOPPING
    with pytest.raises(Conflict, match="sleep") as refused:
        world.manager.sleep(world.ready("org/other")[0].id)
    assert refused.value.code == "not_sleepable"


def test_no_request_enters_and_those_in_flight_end_first(world: World) -> None:
    view, engine = sleepy(world)
    lease = world.manager.lease(view.id)
    world.manager.sleep(view.id)
    with pytest.raises(NotReady):
        world.manager.lease(view.id)
    world.step(1000.0, times=20)
    assert (world.view(view).state, world.view(view).phase, engine.asleep) == (State.FALLING_ASLEEP, "draining", 0)
    lease.release(ok=True)
    world.step(0.1, times=3)
    assert engine.asleep == 1 and lease.cut_error is None
    with pytest.raises(NotReady):
        world.manager.lease(view.id)


def test_a_request_that_comes_before_it_was_told_keeps_it_up(world: World) -> None:
    world.devices.devices = (cuda(0),)
    view, engine = sleepy(world, params={"gpu_memory_utilization": 0.4})
    world.create("org/other", params={"gpu_memory_utilization": 0.4})
    world.step()
    world.step(101.0)       # it idles, but the other one starts on its GPU
    assert (world.view(view).state, world.view(view).phase) == (State.FALLING_ASLEEP, "waiting_for_device")
    world.engine(world.manager.snapshot()[1]).health = 200  # type: ignore[arg-type]
    with world.manager._changed, world.manager._waiting_for([world.instance(view)]):
        world.manager._changed.release()
        world.step(0.1, times=2)
        world.manager._changed.acquire()
    assert (world.view(view).state, engine.asleep) == (State.READY, 0)
    world.manager.lease(view.id).release(ok=True)
    assert world.manager.counters.get("sleeps", 0) == 0


def test_one_that_will_not_sleep_is_stopped(world: World) -> None:
    view, engine = sleepy(world)
    engine.sleep_status = 500
    world.manager.sleep(view.id)
    world.step(0.1, times=2)
    found = world.view(view)
    assert found.state is State.STOPPING and found.last_error is not None
    assert found.last_error.code == "sleep_failed" and "sleep was answered with 500" in found.last_error.message
    world.step(0.1, times=4)
    assert world.manager.counters == {"sleep_failures": 1}
    world.assert_nothing_left()


def test_one_that_never_answers_whether_it_sleeps_is_stopped(world: World) -> None:
    view, engine = sleepy(world)
    engine.sleep_status = None
    world.manager.sleep(view.id)
    world.step(0.1, times=2)
    world.step(MOVE_LIMIT_S - 1)
    assert world.view(view).state is State.FALLING_ASLEEP
    world.step(1.0, times=2)
    assert world.view(view).state is State.STOPPING


def test_one_that_only_says_so_does_not_sleep(world: World) -> None:
    view, engine = sleepy(world)
    engine.answer_dev_mode = lambda path: type(engine).answer_dev_mode(engine, path) if "?" not in path else (  # type: ignore[method-assign]
        __import__("instances.probe").probe.Answer(200))
    world.manager.sleep(view.id)
    world.step(0.1, times=3)
    assert world.view(view).state is State.STOPPING


@pytest.mark.parametrize("level", [1, 2])
def test_the_memory_settles_before_it_counts_as_asleep(world: World, level: int,
                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    world.devices.devices = (cuda(0),)
    held = [70]
    monkeypatch.setattr(FakeEngine, "held_on", lambda engine, device: held[0] * GIB)
    view, _ = sleepy(world, level)
    world.manager.sleep(view.id)
    world.step(times=2)
    for held[0] in (50, 30, 10):
        world.step(0.1)
        assert world.view(view).state is State.FALLING_ASLEEP
    world.step(0.1, times=2)
    found = world.view(view)
    assert (found.state, found.memory_measured_bytes) == (State.SLEEPING, 10 * GIB)
    assert world.manager.resources.turns._holders == {}


@pytest.mark.parametrize("measures", ["meanwhile", "before"])
def test_one_whose_memory_does_not_come_free_does_not_sleep(world: World, monkeypatch: pytest.MonkeyPatch,
                                                            measures: str) -> None:
    world.devices.devices = (cuda(0),)
    monkeypatch.setattr(FakeEngine, "held_on", lambda engine, device: 70 * GIB)
    view, _ = sleepy(world)
    world.manager.sleep(view.id)
    world.step(31.0 if measures == "meanwhile" else 0.1, times=3)
    found = world.view(view)
    assert found.state is State.STOPPING and found.last_error is not None
    assert "freed 0.0 of 70.0 GiB" in found.last_error.message


def test_what_is_measured_on_the_way_is_not_what_it_held_awake(world: World) -> None:
    world.devices.devices = (cuda(0),)
    view, _ = sleepy(world)
    world.manager.sleep(view.id)
    world.step(31.0, times=4)
    assert world.view(view).state is State.SLEEPING


# --- asleep -------------------------------------------------------------------------------------------------------

def test_a_sleeper_is_stopped_after_its_time(world: World) -> None:
    view, _ = asleep(world, stop_after_s=50.0)
    world.step(49.0)
    assert world.view(view).expires_in_s is not None and world.view(view).state is State.SLEEPING
    world.step(2.0)
    assert (world.view(view).state, world.view(view).why) == (State.STOPPING, "asleep for 50 s")
    world.step(0.1, times=3)
    world.assert_nothing_left()


def test_without_such_a_time_it_sleeps_on(world: World) -> None:
    view, _ = asleep(world)
    world.step(1e6, times=3)
    assert (world.view(view).state, world.view(view).expires_in_s) == (State.SLEEPING, None)


def test_one_that_dies_asleep_is_started_anew(world: World) -> None:
    view, engine = asleep(world)
    engine.dead = 4711
    world.step(0.1)
    assert world.view(view).state is State.BACKOFF
    world.step(1.1, times=3)
    found = world.view(view)
    assert (found.state, found.asleep_level, found.restarts) == (State.STARTING, 0, 1)


def test_it_can_be_told_only_when_it_can_be_told(world: World) -> None:
    view, _ = world.loading(sleep_level=1)
    for call, code in ((world.manager.sleep, "not_ready"), (world.manager.wake, "not_sleeping")):
        with pytest.raises(Conflict) as refused:
            call(view.id)
        assert refused.value.code == code
        with pytest.raises(NotFound):
            call("00000000")


def test_a_second_sleep_and_a_second_wake_change_nothing(world: World) -> None:
    view, _ = asleep(world)
    assert world.manager.sleep(view.id).state is State.SLEEPING
    assert world.manager.wake(view.id).state is State.WAKING
    assert world.manager.wake(view.id).state is State.WAKING
    world.step(0.1, times=3)
    assert world.manager.wake(view.id).state is State.READY
    assert world.manager.counters == {"sleeps": 1, "wakes": 1}


# --- waking -------------------------------------------------------------------------------------------------------

def test_a_request_wakes_it_and_a_hundred_wake_it_once(world: World) -> None:
    view, engine = asleep(world)
    for _ in range(100):
        wanted(world, view)
    assert world.view(view).state is State.WAKING
    with pytest.raises(NotReady):
        world.manager.lease(view.id)
    engine.asked.clear()
    world.step(0.1, times=3)
    found = world.view(view)
    assert (found.state, found.asleep_level, found.phase) == (State.READY, 0, "ready")
    assert engine.asked == ["/wake_up", "/is_sleeping", "/v1/completions"]      # awake is what answers a request
    assert world.manager.counters == {"sleeps": 1, "wakes": 1}
    world.manager.lease(view.id).release(ok=True)
    world.step(99.0)
    assert world.view(view).state is State.READY     # its idle clock began anew


def test_the_weights_that_level_2_threw_away_are_loaded_again(world: World) -> None:
    view, engine = asleep(world, 2)
    engine.asked.clear()
    wanted(world, view)
    world.step(0.1, times=6)
    assert world.view(view).state is State.READY
    assert engine.asked == ["/wake_up?tags=weights", "/collective_rpc", "/wake_up?tags=kv_cache", "/is_sleeping",
                            "/v1/completions"]


def test_a_death_on_the_way_is_a_restart_too(world: World) -> None:
    view, engine = asleep(world)
    engine.wake_status = None
    wanted(world, view)
    world.step(0.1)
    engine.dead = 4711
    world.step(1.1, times=4)
    assert world.view(view).state is State.STARTING
    assert world.manager.counters == {"sleeps": 1, "wake_fallbacks": 1, "restarts": 1}


def test_a_pooling_model_is_tried_in_its_own_way(world: World) -> None:
    view, engine = asleep(world)
    engine.paths = ("/classify",)
    wanted(world, view)
    world.step(0.1, times=6)
    assert world.view(view).state is State.READY and engine.asked[-1] == "/classify"


@pytest.mark.parametrize("how", ["500", "silent", "stays asleep", "answers nothing"])
def test_a_wake_that_fails_is_a_restart(world: World, how: str) -> None:
    view, engine = asleep(world, start_timeout_s=1e6, timeout_s=0.0)
    if how == "500":
        engine.wake_status = 500
    elif how == "silent":
        engine.wake_status = None
    elif how == "stays asleep":
        engine.stays_asleep = True
    else:
        engine.answers = False
    wanted(world, view)
    world.step(0.1, times=2)
    world.step(MOVE_LIMIT_S, times=4)
    found = world.view(view)
    assert found.last_error is not None and found.last_error.code == "wake_failed"
    assert (found.state, found.restarts, engine.alive) == (State.STARTING, 1, False)
    newest = world.engine(view)
    newest.health = 200
    world.step(0.1, times=3)
    assert (world.view(view).state, newest.asleep, world.view(view).asleep_level) == (State.READY, 0, 0)
    assert world.manager.counters == {"sleeps": 1, "wake_fallbacks": 1, "restarts": 1}


def test_a_request_that_came_too_late_to_keep_it_up_wakes_it(world: World) -> None:
    view, engine = sleepy(world)
    world.manager.sleep(view.id)
    world.step()                            # it has been told
    with world.manager._changed, world.manager._waiting_for([world.instance(view)]):
        world.manager._changed.release()
        world.step(0.1, times=5)
        world.manager._changed.acquire()
    assert world.view(view).state is State.READY
    assert world.manager.counters == {"sleeps": 1, "wakes": 1}


def test_it_is_woken_by_hand_though_it_is_not_asleep_yet(world: World) -> None:
    view, _ = sleepy(world)
    lease = world.manager.lease(view.id)
    world.manager.sleep(view.id)
    assert world.manager.wake(view.id).state is State.FALLING_ASLEEP
    lease.release(ok=True)
    world.step(0.1, times=6)
    assert world.view(view).state is State.READY


def test_a_create_of_the_same_wakes_it(world: World) -> None:
    view, _ = asleep(world)
    again = world.create(timeout_s=100.0, sleep_level=1)
    assert (again.id, again.state) == (view.id, State.WAKING)
    with pytest.raises(Conflict, match="sleep"):
        world.create(sleep_level=0)


@pytest.mark.parametrize("when", ["falling asleep", "asleep", "waking"])
def test_a_stop_ends_it_in_any_state(world: World, when: str) -> None:
    view, engine = sleepy(world)
    engine.sleep_status = None if when == "falling asleep" else 200
    engine.wake_status = None
    world.manager.sleep(view.id)
    world.step(0.1, times=3)
    if when == "waking":
        world.manager.wake(view.id)
        world.step(0.1)
    world.manager.stop(view.id)
    world.step(0.1, times=3)
    world.assert_nothing_left()


# --- what an earlier daemon left ----------------------------------------------------------------------------------

def taken_over(world: World, engine: FakeEngine, view: InstanceView) -> None:
    world.launcher.left = {view.id: engine}
    world.new_manager().start()
    world.step(0.1)


@pytest.mark.parametrize("level", [1, 2])
def test_a_sleeper_is_found_asleep(world: World, level: int) -> None:
    view, engine = asleep(world, level)
    taken_over(world, engine, view)
    found = world.view(view)
    assert (found.state, found.asleep_level, found.pid) == (State.SLEEPING, level, engine.pid)
    with pytest.raises(NotReady):
        world.manager.lease(view.id)
    engine.asked.clear()
    wanted(world, view)
    world.step(0.1, times=6)
    assert world.view(view).state is State.READY
    assert ("/collective_rpc" in engine.asked) is (level == 2)


def test_one_that_was_awake_is_found_awake(world: World) -> None:
    view, engine = sleepy(world)
    taken_over(world, engine, view)
    assert (world.view(view).state, world.view(view).asleep_level) == (State.READY, 0)


@pytest.mark.parametrize("already", [False, True])
def test_one_that_was_told_to_sleep_goes_on_with_it(world: World, already: bool) -> None:
    """The daemon died between its question and the answer: the engine may sleep a moment later, or does so already."""
    world.devices.devices = (cuda(0),)
    view, engine = sleepy(world)
    engine.sleep_status = None
    world.manager.sleep(view.id)
    world.step(0.1)
    record = world.record(view)
    assert record is not None and (record["state"], record["asleep_level"]) == ("falling_asleep", 1)
    engine.sleep_status, engine.asleep = 200, int(already)
    taken_over(world, engine, view)
    world.step(0.1, times=4)
    assert (world.view(view).state, engine.asleep) == (State.SLEEPING, 1)


def test_one_that_was_not_told_yet_does_what_it_did(world: World) -> None:
    """The daemon died while its order waited for a start on the same GPU."""
    world.devices.devices = (cuda(0),)
    view, engine = sleepy(world, params={"gpu_memory_utilization": 0.3})
    sleeper, dozing = asleep(world, model="org/second", params={"gpu_memory_utilization": 0.3})
    _, starting = world.loading("org/other", params={"gpu_memory_utilization": 0.3})
    world.manager.sleep(view.id)
    world.manager.wake(sleeper.id)
    world.step(0.1, times=2)
    assert [world.view(one).state for one in (view, sleeper)] == [State.FALLING_ASLEEP, State.WAKING]
    world.launcher.left = {one.spec.instance_id: one for one in (engine, dozing, starting)}
    world.new_manager().start()
    world.step(0.1, times=4)
    assert [world.view(one).state for one in (view, sleeper)] == [State.READY, State.SLEEPING]
    assert (engine.asleep, dozing.asleep) == (0, 1)


def test_one_that_sleeps_is_found_so_by_the_daemon_after_the_next(world: World) -> None:
    """The next one was killed, too, before it had asked."""
    view, engine = asleep(world)
    engine.health = None
    for _ in range(2):
        taken_over(world, engine, view)
        assert world.view(view).state is State.STARTING
    engine.health = 200
    world.step(0.1)
    assert world.view(view).state is State.SLEEPING


def test_what_a_dead_engine_was_told_is_not_what_the_next_one_does(world: World) -> None:
    world.devices.devices = (cuda(0),)
    view, engine = sleepy(world, params={"gpu_memory_utilization": 0.3})
    engine.sleep_status = None
    world.manager.sleep(view.id)
    world.step(0.1)
    engine.alive = False
    taken_over(world, engine, view)
    world.engine(view).health = 200
    world.step(0.1, times=3)
    assert world.view(view).state is State.READY
    world.loading("org/other", params={"gpu_memory_utilization": 0.3})      # it has the turn
    world.manager.sleep(view.id)
    world.step(0.1, times=3)
    record = world.record(view)
    assert world.view(view).state is State.FALLING_ASLEEP and record is not None and record["state"] == "ready"


def test_one_that_was_told_to_wake_goes_on_with_it(world: World) -> None:
    view, engine = asleep(world)
    engine.wake_status = None
    world.manager.wake(view.id)
    world.step(0.1)
    record = world.record(view)
    assert record is not None and record["state"] == "waking"
    engine.wake_status = 200
    taken_over(world, engine, view)
    world.step(0.1, times=3)
    assert (world.view(view).state, engine.asleep) == (State.READY, 0)


def test_a_sleeper_that_is_gone_is_started_anew(world: World) -> None:
    view, engine = asleep(world)
    engine.alive = False
    taken_over(world, engine, view)
    world.step()
    assert (world.view(view).state, world.view(view).asleep_level) == (State.STARTING, 0)
    assert len(world.engines_of(view)) == 2
