"""One instance's life, as scripted histories: starts, hangs, deaths, backoff, and the order of a stop.

The engine, its answers, the clock and the devices are fakes (instance_world.py); in every step an always-false flag
says whether an engine was ended while it served.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from errors import ManagerError
from instance_manager import InstanceManager
from instances import downloads, keeper
from instances.instance import State
from instances.launcher import LaunchError, LaunchRefused
from instances.rooms import HOPELESS_S
from instances.sockets import Listener
from tests.instance_world import BASE_PORT, GIB, HOST, World, cuda, cut_of


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    world = World(tmp_path, monkeypatch)
    yield world
    assert not world.stopped_while_serving


@pytest.fixture
def probing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    return World(tmp_path, monkeypatch, PROBE_INTERVAL=30, PROBE_TIMEOUT=60)


# --- starting ---------------------------------------------------------------------------------------------------------

def test_the_engine_is_told_what_to_serve_where(world: World) -> None:
    view, engine = world.loading(params={"served_model_name": ["chat", "short"], "max_model_len": 2048})
    assert list(engine.spec.argv) == [
        "vllm", "serve", "org/model", "--host", "127.0.0.1", "--port", str(BASE_PORT), "--served-model-name", "chat",
        "short", "org/model", "--dtype", "auto", "--kv-cache-dtype", "auto", "--max-model-len", "2048",
        "--trust-remote-code"]
    assert engine.spec.log_path == world.state_dir.logs / f"{view.id}.log"
    assert (view.pid, view.port, view.phase, view.progress) == (engine.pid, BASE_PORT, "starting", 0.0)
    assert "CUDA_VISIBLE_DEVICES" not in engine.spec.env


def test_its_pid_is_on_disk_as_soon_as_it_runs(world: World) -> None:
    view, engine = world.loading()
    record = world.record(view)
    assert record is not None
    assert (record["engine"]["pid"], record["port"], record["state"]) == (engine.pid, BASE_PORT, "starting")


def test_the_log_tells_how_far_it_is(world: World) -> None:
    view, engine = world.loading()
    with open(engine.spec.log_path, "a") as file:
        file.write("(EngineCore pid=9) INFO 11-20 12:16:59 [x.py:1] Starting to load model org/model...\n")
    world.step(0.1)
    assert world.view(view).phase == "loading_weights"
    progress = world.view(view).progress
    assert progress is not None and progress > 0


def test_ready_is_the_first_200_of_health(world: World) -> None:
    view, engine = world.loading()
    for status in (0, None, 404, 503):
        engine.health = status
        world.step(1.0, times=3)
        assert world.view(view).state is State.STARTING
    engine.health = 200
    world.step(0.1)
    found = world.view(view)
    assert (found.state, found.phase, found.progress, found.port) == (State.READY, "ready", 1.0, engine.port)
    record = world.record(view)
    assert record is not None and record["state"] == "ready"
    assert world.events_of(view) == ["launched", "watched"]


def test_its_shared_memory_is_on_record_before_it_is_known_as_ready(
        world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else it would stay, were everything killed right then."""
    view, engine = world.loading()
    on_record = []

    def became_ready(*arguments: Any) -> bool:
        record = world.record(view)
        assert record is not None
        on_record.append(record["engine"]["shared_memory"])
        return InstanceManager.became_ready(world.manager, *arguments)

    monkeypatch.setattr(world.manager, "became_ready", became_ready)
    engine.health = 200
    world.step(0.1)
    assert world.view(view).state is State.READY
    assert on_record == [[f"/dev/shm/psm_{engine.pid}"]]


def test_what_it_shares_while_it_loads_is_on_record(world: World) -> None:
    """Else it would stay, were everything killed before it is ready."""
    view, engine = world.loading()
    record = world.record(view)
    assert record is not None and record["engine"]["shared_memory"] == []
    engine.maps = True
    world.step(keeper.MEMORY_STEP_S)
    record = world.record(view)
    assert record is not None and record["state"] == "starting"
    assert record["engine"]["shared_memory"] == [f"/dev/shm/psm_{engine.pid}"]


def test_what_the_log_told_stands_with_the_instance(world: World) -> None:
    view, engine = world.loading()
    engine.spec.log_path.write_text(
        "(EngineCore pid=9) INFO 11-20 12:16:59 [x.py:1] Model loading took 1.50 GiB memory and 2.000000 seconds\n")
    engine.health = 200
    world.step(0.1)
    assert world.view(view).engine["weights_gib"] == 1.5


def test_a_start_that_is_too_long_fails_and_says_where_it_hung(world: World) -> None:
    view, engine = world.loading(start_timeout_s=60.0)
    world.step(59.0)
    assert world.view(view).state is State.STARTING
    world.step(1.5)
    found = world.view(view)
    assert found.last_error is not None and found.state is State.FAILED     # a second try would hang as long
    assert (found.last_error.code, found.last_error.status) == ("start_timeout", 504)
    assert "60 s" in found.last_error.message and "START_TIMEOUT" in found.last_error.message
    world.step(0.1)
    assert not engine.alive


def test_a_start_that_waits_for_its_turn_has_its_whole_time_afterwards(world: World) -> None:
    world.devices.devices = (cuda(0),)
    first, engine = world.loading("org/a", params={"gpu_memory_utilization": 0.4}, start_timeout_s=1000.0)
    second = world.create("org/b", params={"gpu_memory_utilization": 0.4}, start_timeout_s=60.0)
    world.step(500.0)
    assert world.view(second).phase == "waiting_for_device"
    engine.health = 200
    world.step(times=2)
    world.step(59.0)
    assert world.view(second).state is State.STARTING and len(world.engines_of(second)) == 1


def test_the_deadline_stands_still_while_a_download_grows(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    size = [0]
    monkeypatch.setattr(downloads, "size_bytes", lambda folder: size[0])
    view, _ = world.loading(start_timeout_s=60.0)
    for _ in range(100):
        size[0] += GIB
        world.step(10.0)
    assert (world.view(view).state, world.view(view).phase) == (State.STARTING, "downloading")
    world.step(31.0)                        # it stands still: time counts again
    assert world.view(view).phase == "starting"
    world.step(30.0)
    assert world.view(view).state is State.FAILED


@pytest.mark.parametrize("line, code, state", [
    ("vllm: error: unrecognized arguments: --nonsense", "bad_flag", State.FAILED),
    ("Error in memory profiling. Initial free memory 10.0 GiB, current free memory 20.0 GiB",
     "memory_profiling_failed", State.BACKOFF),
    ("something that nobody has seen before", "exited", State.BACKOFF)])
def test_a_start_that_dies_is_explained_by_its_log(world: World, line: str, code: str, state: State) -> None:
    view, engine = world.loading()
    engine.dies(1, line + "\n")
    world.step(0.1)
    found = world.view(view)
    assert found.last_error is not None
    assert (found.last_error.code, found.state) == (code, state)
    world.step(0.1, times=2)
    assert world.events_of(view)[:2] == ["launched", "KILL"]    # orphans of it are ended


def test_the_last_words_are_read_however_long_the_log_is(world: World) -> None:
    view, engine = world.loading()
    chatter = "INFO 11-20 12:16:59 [x.py:1] nothing of note\n" * 80_000
    engine.dies(2, chatter + "vllm: error: unrecognized arguments: --nonsense\n")
    world.step(0.1)
    assert world.view(view).state is State.FAILED


def test_a_long_log_is_kept_within_its_bound_while_it_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(tmp_path, monkeypatch, INSTANCE_LOG_MAX_BYTES=100_000)
    view, engine = world.loading()
    for _ in range(5):
        with open(engine.spec.log_path, "a") as file:
            file.write("INFO 11-20 12:16:59 [x.py:1] nothing of note\n" * 3000)
        world.step(0.1)
        assert engine.spec.log_path.stat().st_size <= 100_000
    engine.dies(2, "vllm: error: unrecognized arguments: --nonsense\n")
    world.step(0.1)
    assert world.view(view).state is State.FAILED


def test_a_stop_while_it_loads_kills_at_once(world: World) -> None:
    view, _ = world.loading()
    world.manager.stop(view.id)
    world.step()
    assert world.events_of(view) == ["launched", "KILL"]
    world.assert_nothing_left()


def test_a_stop_before_it_was_launched_launches_nothing(world: World) -> None:
    view = world.create()
    world.manager.stop(view.id)
    world.step()
    assert world.engines == []
    world.assert_nothing_left()


def test_a_stop_while_readiness_is_being_settled_wins(world: World) -> None:
    view, engine = world.loading()
    engine.health = 200
    engine.watch_core = lambda: world.manager.stop(view.id)  # type: ignore[method-assign, assignment]
    world.step()
    assert world.view(view).state is State.STOPPING
    world.step(times=3)
    assert world.events_of(view) == ["launched", "TERM", "KILL"]
    world.assert_nothing_left()


@pytest.mark.parametrize("error, code, state", [
    (LaunchError("no such program"), "engine_not_found", State.FAILED),
    (LaunchRefused("out of memory"), "engine_not_started", State.BACKOFF),
    (OSError(28, "No space left on device", "/tmp/x"), "state_dir", State.BACKOFF)])
def test_an_engine_that_cannot_be_run(world: World, error: ManagerError, code: str, state: State) -> None:
    world.launcher.broken = error
    view = world.create()
    world.step(0.1)
    found = world.view(view)
    assert found.last_error is not None and (found.last_error.code, found.state) == (code, state)
    world.step(0.1)
    assert world.manager.resources.ports._owners == {}
    if state is State.BACKOFF:
        world.launcher.broken = None
        world.step(1.0, times=2)
        assert len(world.engines_of(view)) == 1


def test_no_port_left_is_tried_again(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(world.manager.resources.ports, "reserve", lambda *arguments: None)
    view = world.create()
    world.step()
    found = world.view(view)
    assert found.last_error is not None and (found.last_error.code, found.state) == ("no_free_port", State.BACKOFF)


# --- whose port is it -------------------------------------------------------------------------------------------------

def test_a_stranger_that_answers_health_is_not_our_engine(world: World) -> None:
    view, engine = world.loading()
    engine.health, engine.listens = 200, Listener.STRANGER
    world.step(0.1)
    found = world.view(view)
    assert found.last_error is not None and (found.last_error.code, found.state) == ("port_in_use", State.BACKOFF)
    world.step(1.1, times=3)
    assert not engine.alive
    assert [one.port for one in world.engines] == [BASE_PORT, BASE_PORT + 1]    # the next try uses another port


def test_a_port_that_turned_out_to_be_taken_is_not_tried_again(world: World) -> None:
    view, engine = world.loading()
    engine.dies(1, "OSError: [Errno 98] Address already in use\n")
    world.step(0.1, times=2)
    world.step(1.1, times=2)
    assert [one.port for one in world.engines] == [BASE_PORT, BASE_PORT + 1]


def test_an_engine_that_other_machines_can_reach_is_refused(world: World) -> None:
    view, engine = world.loading()
    engine.health, engine.listens = 200, Listener.EXPOSED
    world.step(times=2)
    found = world.view(view)
    assert found.last_error is not None and (found.last_error.code, found.state) == ("engine_exposed", State.FAILED)
    assert not engine.alive


def test_where_the_kernel_does_not_tell_the_answer_counts(world: World) -> None:
    view, engine = world.loading()
    engine.health, engine.listens = 200, Listener.UNKNOWN
    world.step()
    assert world.view(view).state is State.READY


# --- devices ----------------------------------------------------------------------------------------------------------

def test_it_gets_the_gpu_with_the_most_free_memory_by_uuid(world: World) -> None:
    world.devices.devices = (cuda(0, 75), cuda(1, 80))
    view, engine = world.loading()
    assert (view.devices, engine.spec.env["CUDA_VISIBLE_DEVICES"]) == ((1,), "GPU-1")
    assert view.memory_planned_bytes is not None and view.memory_planned_bytes > 70 * GIB


def test_starts_on_one_gpu_go_one_at_a_time(world: World) -> None:
    world.devices.devices = (cuda(0),)
    views = [world.create(f"org/{n}", params={"gpu_memory_utilization": 0.2}) for n in range(3)]
    for count in (1, 2, 3):
        world.step(0.1, times=3)
        assert len(world.engines) == count
        world.engines[-1].health = 200
    world.step(times=2)
    assert [world.view(view).state for view in views] == [State.READY] * 3


def test_starts_on_different_gpus_go_at_the_same_time(world: World) -> None:
    world.devices.devices = (cuda(0), cuda(1, 79), cuda(2, 5))
    for name in "abc":
        world.create(f"org/{name}")
    world.step()
    assert [one.spec.env["CUDA_VISIBLE_DEVICES"] for one in world.engines] == ["GPU-1", "GPU-0"]   # the tightest fit


def test_who_waits_for_its_turn_reads_no_device(world: World) -> None:
    world.devices.devices = (cuda(0),)
    first, _ = world.ready("org/a", params={"gpu_memory_utilization": 0.4})
    world.loading("org/b", params={"gpu_memory_utilization": 0.4})
    world.create("org/c", params={"gpu_memory_utilization": 0.4})
    world.step()
    world.manager.stop(first.id)
    world.step()
    reads = world.devices.reads
    for loop in (world.loops[0], world.loops[2]):       # to end, and to start
        loop.tick(world.now)
    assert world.devices.reads == reads


def test_all_gpus_busy_is_no_machine_without_gpus(world: World) -> None:
    world.devices.devices = (cuda(0), cuda(1))
    world.create("org/a", params={"tensor_parallel_size": 2})
    view = world.create("org/b")
    other = world.create("org/c", params={"tensor_parallel_size": 3})
    world.step(times=2)
    assert world.view(view).phase == "waiting_for_room" and len(world.engines) == 1
    assert world.view(other).state is State.FAILED      # however long it waited


@pytest.mark.parametrize("how", ["fails", "backs off", "no room", "cannot be run", "is deleted"])
def test_a_turn_comes_back_however_a_start_ends(world: World, how: str) -> None:
    world.devices.devices = (cuda(0, 1),) if how == "no room" else (cuda(0),)
    if how == "cannot be run":
        world.launcher.broken = LaunchRefused("out of memory")
    first = world.create("org/a")
    world.step(0.1)
    if how in ("fails", "backs off"):
        world.engine(first).dies(1, "vllm: error: unrecognized arguments: --x\n" if how == "fails" else "")
    elif how == "is deleted":
        world.manager.stop(first.id)
    world.step(0.1, times=2)
    if how == "no room":
        world.step(HOPELESS_S)
    assert world.manager.resources.turns._holders == {}
    world.devices.devices, world.launcher.broken = (cuda(0),), None
    second = world.create("org/b")
    world.step(0.1)
    assert len(world.engines_of(second)) == 1       # while the first still waits for its next try


def test_a_stop_waits_for_a_start_on_its_gpu_but_not_for_ever(world: World) -> None:
    world.devices.devices = (cuda(0),)
    first, _ = world.ready("org/a", params={"gpu_memory_utilization": 0.4})
    second, _ = world.loading("org/b", params={"gpu_memory_utilization": 0.4})
    world.manager.stop(first.id)
    world.step(1.0, times=20)
    assert "TERM" not in world.events_of(first)
    world.step(6.0, times=3)
    assert world.events_of(first)[-2:] == ["TERM", "KILL"]
    assert world.view(second).state is State.STARTING


def test_no_room_is_tried_again_and_too_few_gpus_are_not(world: World) -> None:
    world.devices.devices = (cuda(0, 10),)
    view, other = world.create("org/a"), world.create("org/b", params={"tensor_parallel_size": 2})
    world.step(0.1, times=3)
    assert (world.view(view).state, world.view(other).state) == (State.STARTING, State.FAILED)
    world.step(HOPELESS_S)      # a driver may free late what another process had
    assert world.view(view).state is State.BACKOFF
    problem = world.view(other).last_error
    assert problem is not None and problem.code == "not_enough_gpus"
    world.devices.devices = (cuda(0),)
    world.step(1.0, times=2)
    assert len(world.engines_of(view)) == 1


def test_memory_is_measured_while_it_serves_and_none_afterwards(
        world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpu.host_memory", lambda pids: len(list(pids)) * GIB)
    view, engine = world.ready()
    assert world.view(view).memory_measured_bytes == GIB
    engine.pids = lambda: [1, 2]  # type: ignore[method-assign]
    world.step(29.0)
    assert world.view(view).memory_measured_bytes == GIB
    world.step(1.5)
    assert world.view(view).memory_measured_bytes == 2 * GIB
    engine.dies()
    world.step(0.25, times=2)
    found = world.view(view)
    assert (found.memory_measured_bytes, found.pid, found.devices) == (None, None, ())


def test_host_memory_is_no_device_to_take_turns_for(world: World) -> None:
    assert world.devices.devices == (HOST,)
    for name in "abc":
        world.create(f"org/{name}")
    world.step()
    assert len(world.engines) == 3


# --- death ------------------------------------------------------------------------------------------------------------

def test_a_dead_server_is_noticed_cut_off_and_restarted(world: World) -> None:
    view, engine = world.ready()
    codes = cut_of(world.manager.lease(view.id))
    engine.dies(0, "(EngineCore pid=9) ERROR 11-20 12:16:59 [core.py:1] RuntimeError: CUDA error: unspecified\n")
    world.step(0.25)
    found = world.view(view)
    assert found.state is State.BACKOFF and found.retry_in_s == 1.0
    assert found.last_error is not None and found.last_error.code == "engine_died"
    assert "CUDA error: unspecified" in found.last_error.message
    world.step(0.1)
    assert codes == ["engine_died"]
    world.step(1.0, times=2)
    world.engine(view).health = 200
    world.step()
    found = world.view(view)
    assert (found.state, found.restarts, found.port, len(world.engines)) == (State.READY, 1, engine.port, 2)


def test_a_dead_engine_process_is_noticed_and_its_server_may_say_its_last_words(world: World) -> None:
    view, engine = world.ready()
    codes = cut_of(world.manager.lease(view.id))
    engine.dead = 4711
    world.step(0.25)
    found = world.view(view)
    assert found.last_error is not None and "its engine process 4711 ended" in found.last_error.message
    world.step(0.5)
    assert engine.alive and codes == []         # the server tells its clients itself, within 0.1 s
    world.step(0.6)
    assert not engine.alive and codes == ["engine_died"]


def test_last_words_are_for_those_who_listen(world: World) -> None:
    view, engine = world.ready()
    engine.dead = 4711
    world.step(0.25)
    world.step()
    assert not engine.alive


def test_the_old_tree_is_gone_before_the_new_one_starts(world: World) -> None:
    view, engine = world.ready()
    engine.dies()
    world.step(0.25)
    assert world.manager.candidates("org/model")[0].state is State.BACKOFF
    world.step(1.1, times=3)
    assert world.events_of(view) == ["launched", "watched", "KILL", "launched"]


def test_no_new_one_starts_beside_one_that_cannot_be_killed(world: World) -> None:
    view, engine = world.ready()
    engine.dead, engine.immortal = 4711, True
    world.step(0.25)
    world.step(2.0, times=3)
    assert world.view(view).state is State.BACKOFF and len(world.engines) == 1
    engine.immortal = False
    world.step(times=2)
    assert len(world.engines) == 2


def test_it_fails_for_good_after_five_failures_in_ten_minutes(world: World) -> None:
    view = world.create()
    waited = []
    for _ in range(5):
        world.step()
        world.engine(view).dies(1, "no idea\n")
        world.step(0.1)
        waited.append(world.view(view).retry_in_s)
        world.step(0.0)
        world.step(waited[-1] or 0.0)
    assert waited == [1.0, 2.0, 4.0, 8.0, None]
    found = world.view(view)
    assert found.state is State.FAILED and found.why.startswith("failed too often; at last: ")
    assert len(world.engines) == 5
    assert world.record(view) is None


def test_a_restart_waits_as_long_as_it_said(world: World) -> None:
    view, engine = world.ready()
    engine.dies()
    world.step(0.25)
    world.step(0.9)
    assert world.view(view).state is State.BACKOFF
    world.step(0.2)
    assert world.view(view).state is State.STARTING and world.view(view).restarts == 1


# --- hanging ----------------------------------------------------------------------------------------------------------

def test_a_hung_engine_is_found_and_restarted(probing: World) -> None:
    view, engine = probing.ready()
    engine.answers = False
    codes = cut_of(probing.manager.lease(view.id))
    probing.step(29.0, times=2)
    probing.step(times=4)       # health, tokens, the question
    probing.step(58.0)
    assert probing.view(view).state is State.READY
    probing.step(3.0)
    probing.step(times=2)
    found = probing.view(view)
    assert found.last_error is not None and (found.last_error.code, found.state) == ("engine_hung", State.BACKOFF)
    assert "it answered no small request and made no tokens within 60 s" in found.last_error.message
    probing.step(1.5)
    assert codes == ["engine_hung"] and not engine.alive
    probing.step(1.0, times=2)
    assert len(probing.engines) == 2


def test_real_traffic_that_succeeds_spares_the_question(probing: World) -> None:
    view, engine = probing.ready()
    engine.answers = False
    asked = list(engine.asked)
    for _ in range(20):
        probing.step(20.0)
        probing.manager.lease(view.id).release(ok=True)
    assert probing.view(view).state is State.READY
    assert engine.asked == asked


def test_a_dead_engine_behind_a_server_that_lives(probing: World) -> None:
    view, engine = probing.ready()
    engine.health = 503
    probing.step(30.0, times=2)
    found = probing.view(view)
    assert found.last_error is not None and "reports that its engine is dead" in found.last_error.message


def test_a_stop_leaves_no_question_open(probing: World) -> None:
    view, engine = probing.ready()
    engine.answers = False
    probing.step(31.0, times=4)
    assert probing.probe.open
    probing.manager.stop(view.id)
    probing.step(times=3)
    probing.assert_nothing_left()


# --- stopping ---------------------------------------------------------------------------------------------------------

def test_the_order_of_a_stop(world: World) -> None:
    """Drain, cut, TERM, KILL: each only when the one before is over."""
    view, engine = world.ready()
    engine.deaf = True
    patient, stuck = world.manager.lease(view.id), world.manager.lease(view.id)
    codes = cut_of(stuck)
    world.manager.stop(view.id)
    world.step(1.0, times=5)
    patient.release(ok=True)
    world.step(1.0, times=24)
    assert codes == [] and "TERM" not in world.events_of(view)      # 29 s of 30
    world.step(1.5)
    assert codes == ["engine_stopped"]
    world.step(0.4)
    assert "TERM" not in world.events_of(view)      # the engine has to notice that they are gone
    world.step(0.2)
    assert world.events_of(view)[-1] == "TERM"
    world.step(9.9)
    assert engine.alive
    world.step(0.2)
    assert world.events_of(view)[-2:] == ["TERM", "KILL"]
    world.assert_nothing_left()


def test_a_drained_instance_is_ended_at_once(world: World) -> None:
    view, _ = world.ready()
    lease = world.manager.lease(view.id)
    world.manager.stop(view.id)
    world.step(0.1)
    lease.release(ok=True)
    world.step(times=2)
    assert world.events_of(view)[-2:] == ["TERM", "KILL"]       # the latter for what is left behind
    world.assert_nothing_left()


def test_who_does_not_let_go_of_a_cut_connection_holds_it_up_two_seconds(world: World) -> None:
    view, engine = world.ready()
    engine.deaf = True
    world.manager.lease(view.id)        # nobody hears that it is cut
    world.manager.stop(view.id)
    world.step(30.5)
    world.step(1.5)
    assert "TERM" not in world.events_of(view)
    world.step(1.0)
    assert world.events_of(view)[-1] == "TERM"
    world.step(10.1)
    world.assert_nothing_left()


def test_a_client_that_left_a_moment_ago_is_still_in_the_engines_way(world: World) -> None:
    view, _ = world.ready()
    world.manager.lease(view.id).release(ok=False)
    world.manager.stop(view.id)
    world.step(0.4)
    assert "TERM" not in world.events_of(view)
    world.step(0.2)
    assert world.events_of(view)[-1] == "TERM"


def test_force_cuts_and_kills_at_once(world: World) -> None:
    view, _ = world.ready()
    codes = cut_of(world.manager.lease(view.id))
    world.manager.lease(view.id)
    world.manager.stop(view.id, force=True)
    world.step()
    assert codes == ["engine_stopped"]
    assert world.events_of(view)[-1] == "KILL" and "TERM" not in world.events_of(view)
    world.assert_nothing_left()


def test_force_hastens_a_stop_under_way(world: World) -> None:
    view, engine = world.ready()
    engine.deaf = True
    world.manager.stop(view.id)
    world.step(times=2)
    assert engine.alive
    world.manager.stop(view.id, force=True)
    world.step()
    world.assert_nothing_left()


@pytest.mark.parametrize("when", ["draining", "backing off", "last words", "waiting"])
def test_a_stop_ends_in_every_state(world: World, when: str) -> None:
    view, engine = world.ready()
    lease = world.manager.lease(view.id)
    codes = cut_of(lease)
    if when == "draining":
        world.manager.stop(view.id)
        world.step(0.1)
        engine.dies()
    elif when == "backing off":
        engine.dies()
        world.step(0.25, times=2)
    elif when == "last words":
        engine.dead = 4711
        world.step(0.25)
    else:
        world.create(params={"max_model_len": 8}, replace=True)
        for one in world.manager.snapshot():
            world.manager.stop(one.id)
    world.manager.stop(view.id)
    world.step(30.5, times=2)
    world.step(11.0, times=2)
    assert len(codes) == 1
    world.assert_nothing_left()


def test_one_that_survives_everything_is_let_go_in_the_end(world: World) -> None:
    """A process in the kernel's hands cannot be ended; the daemon must not hang with it."""
    view, engine = world.ready()
    engine.deaf = engine.immortal = True
    world.manager.stop(view.id)
    world.step(11.0, times=3)
    assert world.manager.snapshot() == []
