"""The registry and what it decides: creating, replacing, expiring, leasing, waiting, taking over, shutting down.

Engines, devices and the clock are fakes and no thread runs, but where a race is forced.
"""

from __future__ import annotations

import errno
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from errors import Conflict, ManagerError, NotFound, NotReady, ShuttingDown, TooManyInstances
from instance_manager import CreateRequest
from instances import registry
from instances.instance import Candidate, InstanceView, Problem, State
from instances.loop import Loop
from tests.instance_world import BASE_PORT, World, cuda, cut_of
from tests.support import wait_until


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    world = World(tmp_path, monkeypatch, VLLM_MAX_INSTANCES=4)
    world.manager.start()
    yield world
    assert not world.stopped_while_serving


def fail(world: World, view: InstanceView, *, permanent: bool = True, clean: bool = True) -> None:
    problem = Problem("bad_flag", "a flag is wrong", status=400, permanent=permanent)
    world.manager.record_problem(world.instance(view), problem)
    if clean:
        world.step()


# --- create -----------------------------------------------------------------------------------------------------------

def test_a_new_instance_starts_with_the_settings_defaults(world: World) -> None:
    view, created = world.manager.create(CreateRequest("org/model", {"max_model_len": 2048}))
    assert created
    assert (view.state, view.spec.timeout_s, view.spec.start_timeout_s) == (State.STARTING, 600.0, 600.0)
    assert (dict(view.spec.params), view.names) == ({"max_model_len": 2048}, ("org/model",))
    assert dict(view.spec.flags) == {
        "dtype": "auto", "kv_cache_dtype": "auto", "trust_remote_code": True, "max_model_len": 2048}
    assert len(view.id) == 8 and int(view.id, 16) >= 0
    assert world.engines == []      # its keeper starts it


def test_its_record_is_on_disk_before_an_engine_runs(world: World) -> None:
    view = world.create(timeout_s=5.0)
    record = world.record(view)
    assert record is not None and (record["state"], record["engine"], record["spec"]["timeout_s"]) == (
        "starting", None, 5.0)


def test_the_same_again_is_the_same_instance_and_starts_its_idle_clock_anew(world: World) -> None:
    view, _ = world.ready(timeout_s=60.0)
    world.now += 50
    again, created = world.manager.create(CreateRequest("org/model", {}))
    assert (again.id, created, again.expires_in_s, len(world.engines)) == (view.id, False, 60.0, 1)


def test_the_same_again_may_name_another_timeout(world: World) -> None:
    view, _ = world.ready(timeout_s=60.0)
    assert world.create(timeout_s=0.0).expires_in_s is None
    world.step(0.25)
    record = world.record(view)
    assert record is not None and record["spec"]["timeout_s"] == 0.0     # also for the next daemon


def test_other_params_are_a_conflict_that_names_the_ways_out(world: World) -> None:
    view, _ = world.ready(params={"max_model_len": 1024})
    with pytest.raises(Conflict) as caught:
        world.create(params={"max_model_len": 2048, "dtype": "float16"})
    assert (caught.value.code, caught.value.param) == ("instance_exists", "params")
    for part in (view.id, "dtype, max_model_len", '"replace": true', '"new": true'):
        assert part in caught.value.message
    assert [one.id for one in world.manager.snapshot()] == [view.id]


def test_other_served_names_are_a_conflict_too(world: World) -> None:
    world.ready()
    with pytest.raises(Conflict, match="served_model_name"):
        world.create(params={"served_model_name": "short"})


def test_replace_drains_the_old_one_before_the_new_one_starts(world: World) -> None:
    old, engine = world.ready()
    lease = world.manager.lease(old.id)
    new = world.create(params={"max_model_len": 8}, replace=True)
    assert (world.view(old).state, world.view(new).state) == (State.STOPPING, State.STARTING)
    world.step(0.1, times=5)
    assert world.view(new).phase == "waiting_for_old_instance" and engine.alive
    lease.release(ok=True)
    world.step(times=6)
    assert world.view(new).pid == world.engine(new).pid
    assert world.events.index(f"{old.id} KILL") < world.events.index(f"{new.id} launched")
    with pytest.raises(NotFound, match="replaced"):
        world.manager.get(old.id)


def test_a_request_that_waits_while_its_model_is_replaced_gets_the_new_one(world: World) -> None:
    old, _ = world.loading()
    new = world.create(params={"max_model_len": 8}, replace=True)
    assert [one.id for one in world.manager.candidates("org/model")] == [old.id, new.id]
    world.step(times=3)
    assert [one.id for one in world.manager.candidates("org/model")] == [new.id]


def test_replacing_with_the_same_params_is_the_same_instance(world: World) -> None:
    view, _ = world.ready()
    assert world.create(replace=True).id == view.id


def test_new_makes_one_more_replica(world: World) -> None:
    first, _ = world.ready()
    second, _ = world.ready(new=True)
    assert {one.id for one in world.manager.candidates("org/model")} == {first.id, second.id}
    assert first.port != second.port


def test_replace_replaces_every_replica(world: World) -> None:
    old = [world.ready()[0], world.ready(new=True)[0]]
    new = world.create(params={"max_model_len": 8}, replace=True)
    assert [world.view(one).state for one in old] == [State.STOPPING] * 2
    world.step(times=8)
    assert [one.id for one in world.manager.snapshot()] == [new.id]


def test_no_more_than_the_most_instances(world: World) -> None:
    views = [world.create(f"org/{number}") for number in range(4)]
    with pytest.raises(TooManyInstances, match="VLLM_MAX_INSTANCES is 4"):
        world.create("org/fifth")
    world.create("org/0")                                                       # is there already
    world.create("org/0", params={"max_model_len": 8}, replace=True)            # takes the place of one
    fail(world, views[1])
    world.create("org/fifth")                                                   # a failed one holds nothing


def test_one_that_is_being_stopped_holds_its_place(world: World) -> None:
    views = [world.ready(f"org/{number}")[0] for number in range(4)]
    world.manager.stop(views[0].id)
    with pytest.raises(TooManyInstances, match="1 of them being stopped") as caught:
        world.create("org/fifth")
    assert caught.value.retry_after_s
    world.step(times=3)
    world.create("org/fifth")


def test_an_alias_must_not_take_another_models_name(world: World) -> None:
    world.create("org/a", params={"served_model_name": ["chat", "short"]})
    for params, name in (({"served_model_name": "short"}, "org/b"), ({"served_model_name": "org/a"}, "org/b")):
        with pytest.raises(Conflict) as caught:
            world.create(name, params=params)
        assert (caught.value.code, caught.value.param) == ("name_taken", "params.served_model_name")
    with pytest.raises(Conflict, match="short"):
        world.create("short")


def test_names_are_free_again_when_their_instance_is_on_its_way_out(world: World) -> None:
    view, _ = world.ready("org/a", params={"served_model_name": "chat"})
    world.manager.stop(view.id)
    assert world.create("org/b", params={"served_model_name": "chat"}).names == ("chat", "org/b")


def test_a_full_disk_is_a_clean_refusal_and_nothing_has_happened(
        world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    old, _ = world.ready()
    disk_is_full(world, monkeypatch)
    with pytest.raises(ManagerError, match="No space left on device") as caught:
        world.create(params={"max_model_len": 8}, replace=True)
    assert (caught.value.status, caught.value.code) == (503, "state_dir")
    assert [(one.id, one.state) for one in world.manager.snapshot()] == [(old.id, State.READY)]
    assert len(world.engines) == 1 and list(world.manager._loops) == [old.id]


def test_a_full_disk_later_stops_nothing(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    view = world.create()
    disk_is_full(world, monkeypatch)
    world.step()
    world.engine(view).health = 200
    world.step(times=2)
    assert world.view(view).state is State.READY
    monkeypatch.undo()
    world.step(5.0)
    record = world.record(view)
    assert record is not None and record["state"] == "ready"     # caught up


def disk_is_full(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def save(record: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(world.state_dir, "save", save)


def test_without_a_thread_left_nothing_is_started(world: World) -> None:
    def no_thread(loop: Loop) -> None:
        raise RuntimeError("can't start new thread")
    world.manager._run = no_thread
    with pytest.raises(ManagerError, match="can't start new thread") as caught:
        world.create()
    assert caught.value.code == "engine_not_started"        # and not the disk's fault
    world.assert_nothing_left()


def test_many_creates_at_once_make_one_instance(world: World) -> None:
    together, made = threading.Barrier(16), []

    def create() -> None:
        together.wait()
        made.append(world.manager.create(CreateRequest("org/model", {})))

    threads = [threading.Thread(target=create) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({view.id for view, _ in made}) == 1
    assert [created for _, created in made].count(True) == 1
    world.step()
    assert len(world.engines) == 1


def test_an_id_is_not_given_twice(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = iter(["aaaaaaaa", "aaaaaaaa", "bbbbbbbb", "aaaaaaaa", "cccccccc"])
    monkeypatch.setattr(registry.secrets, "token_hex", lambda count: next(ids))
    first, _ = world.ready("org/a")
    assert (first.id, world.create("org/b").id) == ("aaaaaaaa", "bbbbbbbb")
    world.manager.stop(first.id)
    world.step(times=3)
    assert world.create("org/c").id == "cccccccc"       # not one that ended just now either


# --- failed ones ------------------------------------------------------------------------------------------------------

def test_a_failed_one_stays_listed_with_its_cause_until_the_next_start(world: World) -> None:
    view, _ = world.loading()
    fail(world, view)
    shown = world.view(view)
    assert (shown.state, shown.why, shown.pid) == (State.FAILED, "a flag is wrong", None)
    assert world.record(view) is None       # the next daemon need not know of it
    again = world.create()
    assert [one.id for one in world.manager.snapshot()] == [again.id]


def test_only_the_oldest_failures_beyond_the_limit_go(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "FAILED_KEPT", 3)
    views = [world.create(f"org/{number}") for number in range(4)]
    for view in views:
        fail(world, view)
    world.create("org/new")
    assert [one.spec.model for one in world.manager.snapshot()] == ["org/1", "org/2", "org/3", "org/new"]


def test_a_failed_one_that_is_deleted_is_gone_at_once(world: World) -> None:
    view, _ = world.loading()
    fail(world, view)
    assert world.manager.stop(view.id).state is State.STOPPED
    world.assert_nothing_left()
    with pytest.raises(NotFound):
        world.manager.stop(view.id)


def test_a_failed_one_deleted_before_its_tree_was_ended_is_ended_all_the_same(world: World) -> None:
    view, engine = world.loading()
    fail(world, view, clean=False)
    world.manager.stop(view.id)
    assert engine.alive and world.manager._loops        # a shutdown joins its keeper
    world.step()
    world.assert_nothing_left()


# --- leases and the idle clock ----------------------------------------------------------------------------------------

def test_a_lease_is_for_ready_instances_only(world: World) -> None:
    view, engine = world.loading()
    with pytest.raises(NotReady):
        world.manager.lease(view.id)
    engine.health = 200
    world.step()
    assert world.manager.lease(view.id).port == view.port
    world.manager.stop(view.id)
    with pytest.raises(NotReady):
        world.manager.lease(view.id)
    with pytest.raises(NotFound):
        world.manager.lease("unknown")


def test_a_lease_comes_back_once(world: World) -> None:
    view, _ = world.ready()
    first, second = world.manager.lease(view.id), world.manager.lease(view.id)
    assert world.manager.candidates("org/model") == [Candidate(view.id, State.READY, 2)]
    first.release(ok=True)
    first.release()
    first.release(ok=True)
    assert world.manager.in_flight() == 1
    second.release()
    assert world.manager.in_flight() == 0


def test_only_an_answer_shows_that_the_engine_lives(world: World) -> None:
    view, _ = world.ready()
    world.now += 10
    world.manager.lease(view.id).release()
    assert world.instance(view).last_success == 0.0
    world.manager.lease(view.id).release(ok=True)
    assert world.instance(view).last_success == world.now


def test_a_lease_may_come_back_after_its_instance_has_gone(world: World) -> None:
    view, _ = world.ready()
    lease = world.manager.lease(view.id)
    world.manager.stop(view.id, force=True)
    world.step(times=3)
    lease.release(ok=True)
    world.assert_nothing_left()


def test_it_expires_when_its_last_request_ended_a_timeout_ago(world: World) -> None:
    view, _ = world.ready(timeout_s=60.0)
    lease = world.manager.lease(view.id)
    world.step(1000.0)                      # a long stream is not reaped
    assert world.view(view).state is State.READY
    lease.release(ok=True)
    world.step(59.9)
    assert world.view(view).state is State.READY
    world.step(0.2)
    assert world.view(view).state is State.STOPPING
    assert world.view(view).why == "idle for 60 s"
    world.step(times=3)
    world.assert_nothing_left()


def test_it_idles_since_it_became_ready_and_not_while_it_starts(world: World) -> None:
    view, engine = world.loading(timeout_s=60.0)
    world.step(500.0)
    assert world.view(view).state is State.STARTING
    engine.health = 200
    world.step()
    world.step(59.0)
    assert world.view(view).state is State.READY


def test_a_timeout_of_zero_is_never(world: World) -> None:
    view, _ = world.ready(timeout_s=0.0)
    world.step(1e8)
    assert world.view(view).state is State.READY


def test_one_that_nobody_wants_is_not_started_again(world: World) -> None:
    view, engine = world.ready(timeout_s=0.5)
    engine.dies()
    world.step(0.25)
    assert world.view(view).state is State.BACKOFF
    world.step(0.5)
    world.step(times=2)
    world.assert_nothing_left()
    assert len(world.engines) == 1


def test_a_request_that_waits_keeps_it_wanted(world: World) -> None:
    view, engine = world.ready(timeout_s=0.5)
    engine.dies()
    world.step(0.25)
    thread = threading.Thread(target=world.manager.wait_for_change, args=(120.0, [view.id]))
    thread.start()
    wait_until(lambda: world.instance(view).waiting == 1)
    world.step(0.9)
    assert world.view(view).state is State.BACKOFF      # the reaper has looked
    world.step(0.2)
    assert world.view(view).state is State.STARTING
    thread.join()
    assert world.instance(view).waiting == 0
    assert world.instance(view).last_used == world.now


def test_a_lease_and_a_stop_never_both_win(world: World) -> None:
    """Whoever comes first: a request with a lease is let finish, or it gets no lease."""
    for _ in range(50):
        view, _ = world.ready()
        start, got = threading.Barrier(2), []

        def take(start: threading.Barrier = start, got: list[Any] = got, view: InstanceView = view) -> None:
            start.wait()
            try:
                got.append(world.manager.lease(view.id))
            except (NotReady, NotFound):
                got.append(None)

        thread = threading.Thread(target=take)
        thread.start()
        start.wait()
        world.manager.stop(view.id)
        world.step(times=2)
        thread.join()
        if got[0] is not None:
            assert world.view(view).state is State.STOPPING
            got[0].release()
        world.step(times=3)
        world.assert_nothing_left()


# --- stop -------------------------------------------------------------------------------------------------------------

def test_what_was_stopped_is_not_found_and_says_why(world: World) -> None:
    view, _ = world.ready()
    assert world.manager.stop(view.id, why="deleted").state is State.STOPPING
    assert world.manager.stop(view.id).why == "deleted"     # a second time changes nothing
    world.step(times=3)
    with pytest.raises(NotFound, match=f"instance {view.id} was stopped: deleted") as caught:
        world.manager.get(view.id)
    assert caught.value.code == "instance_not_found"
    with pytest.raises(NotFound, match="there is no instance 'xyz'; GET /instances lists them"):
        world.manager.stop("xyz")


# --- readers ----------------------------------------------------------------------------------------------------------

def test_the_list_is_in_order_of_creation(world: World) -> None:
    views = [world.create(f"org/{name}") for name in "cab"]
    assert [one.id for one in world.manager.snapshot()] == [one.id for one in views]


def test_every_name_leads_to_its_instance(world: World) -> None:
    view, engine = world.loading(params={"served_model_name": ["chat", "short"]})
    engine.names, engine.health = ("chat", "short", "org/model", "an-adapter"), 200
    world.step()
    for name in ("chat", "short", "org/model", "an-adapter"):
        assert [one.id for one in world.manager.candidates(name)] == [view.id]
    assert world.manager.model_names() == ["an-adapter", "chat", "org/model", "short"]
    world.manager.rename(view.id, ("chat", "second-adapter"))
    assert world.manager.candidates("an-adapter") == []
    assert [one.id for one in world.manager.candidates("second-adapter")] == [view.id]
    world.manager.stop(view.id)
    assert world.manager.model_names() == []
    assert [one.state for one in world.manager.candidates("chat")] == [State.STOPPING]
    world.step(times=3)
    assert world.manager.candidates("chat") == []
    with pytest.raises(NotFound):
        world.manager.rename(view.id, ())


def test_the_problem_of_one(world: World) -> None:
    view, _ = world.loading()
    assert world.manager.problem_of(view.id) == (State.STARTING, None, "created")
    fail(world, view)
    state, problem, why = world.manager.problem_of(view.id) or (None, None, "")
    assert (state, problem and problem.code, why) == (State.FAILED, "bad_flag", "a flag is wrong")
    assert world.manager.problem_of("xyz") is None


def test_waiting_for_an_instance(world: World) -> None:
    view, _ = world.loading()
    assert world.manager.wait(view.id, lambda one: one.state is State.READY, timeout_s=0.0) is None
    assert world.manager.wait(view.id, lambda one: one.state is State.READY, gone=lambda: True) is None
    assert world.manager.wait("xyz", lambda one: True) is None
    found: list[InstanceView | None] = []
    thread = threading.Thread(target=lambda: found.append(
        world.manager.wait(view.id, lambda one: one.state is State.READY)))
    thread.start()
    world.engine(view).health = 200
    world.step()
    thread.join()
    assert found[0] is not None and found[0].id == view.id


def test_waiting_ends_when_the_instance_goes(world: World) -> None:
    view, _ = world.ready()
    found: list[InstanceView | None] = []
    thread = threading.Thread(target=lambda: found.append(
        world.manager.wait(view.id, lambda one: one.state is State.STOPPED)))
    thread.start()
    world.manager.stop(view.id)
    world.step(times=3)
    thread.join()
    assert found == [None]


def test_a_request_does_not_wait_for_what_is_ready_already(world: World) -> None:
    view, _ = world.ready()
    world.manager.wait_for_change(1e6, wanted=[view.id, "xyz"])     # became ready between its look and its wait


def test_a_change_wakes_who_waits(world: World) -> None:
    view, engine = world.loading()
    thread = threading.Thread(target=world.manager.wait_for_change, args=(1e6, [view.id]))
    thread.start()
    wait_until(lambda: world.instance(view).waiting == 1)
    engine.health = 200
    world.step()
    thread.join()


# --- reload -----------------------------------------------------------------------------------------------------------

def test_a_reload_changes_what_can_change(world: World) -> None:
    changed = world.manager.reconfigure(world.settings(
        VLLM_DEFAULT_TIMEOUT=5, VLLM_BASE_PORT=BASE_PORT + 100, VLLM_MAX_INSTANCES=9))
    assert sorted(changed) == ["default_timeout_s", "max_instances"]
    assert world.manager.settings.base_port == BASE_PORT
    assert world.create().spec.timeout_s == 5.0


# --- an earlier daemon ------------------------------------------------------------------------------------------------

def restart(world: World) -> None:
    """The daemon dies and another one starts; its engines live on."""
    world.launcher.left = {one.spec.instance_id: one for one in world.engines if one.alive}
    world.new_manager().start()


def test_engines_that_run_are_adopted_with_their_pids_and_ports(world: World) -> None:
    view, engine = world.ready(params={"served_model_name": "chat"}, timeout_s=77.0)
    world.now += 50
    restart(world)
    found = world.view(view)
    assert (found.state, found.why, found.pid, found.port) == (State.STARTING, "found again", engine.pid, view.port)
    world.step()
    found = world.view(view)
    assert (found.state, found.spec, found.created_at, found.expires_in_s) == (
        State.READY, view.spec, view.created_at, 77.0)
    assert len(world.engines) == 1
    assert world.manager.resources.ports.reserve("another") == BASE_PORT + 1
    assert [one.id for one in world.manager.candidates("chat")] == [view.id]


def test_an_engine_that_still_loads_goes_on_loading(world: World) -> None:
    view, engine = world.loading()
    restart(world)
    world.step(500.0)
    assert world.view(view).state is State.STARTING
    engine.health = 200
    world.step()
    assert world.view(view).state is State.READY and len(world.engines) == 1


def test_one_that_served_and_is_silent_now_is_started_anew(world: World) -> None:
    view, engine = world.ready()
    engine.health = None
    restart(world)
    world.step(29.0)
    assert world.view(view).state is State.STARTING
    world.step(2.0)
    world.step()
    assert world.view(view).state is State.BACKOFF and not engine.alive


def test_remains_are_ended_before_a_new_engine_starts(world: World) -> None:
    view, engine = world.ready()
    engine.dies()
    restart(world)
    assert world.view(view).pid is None
    assert world.view(view).why == "no engine of it was running; starting anew"
    assert f"{view.id} remains ended" not in world.events       # the start does not wait for it
    world.step()
    assert world.events_of(view)[-2:] == ["remains ended", "launched"]


def test_one_that_waited_in_backoff_is_started(world: World) -> None:
    view, engine = world.ready()
    engine.dies()
    world.step(0.25, times=2)
    restart(world)
    world.step()
    assert len(world.engines_of(view)) == 2


def test_one_that_was_being_stopped_is_stopped(world: World) -> None:
    view, engine = world.ready()
    world.manager.lease(view.id)
    world.manager.stop(view.id)
    world.step(1.0)
    record = world.record(view)
    assert record is not None and record["state"] == "stopping"
    restart(world)
    assert world.view(view).state is State.STOPPING
    world.step(times=3)
    world.assert_nothing_left()
    assert "TERM" in world.events_of(view)


def test_what_was_being_stopped_and_died_meanwhile_is_cleaned_up(world: World) -> None:
    view, engine = world.ready()
    world.manager.lease(view.id)
    world.manager.stop(view.id)
    world.step(1.0)
    engine.dies()
    restart(world)
    world.step(times=2)
    world.assert_nothing_left()
    assert world.events_of(view)[-1] == "remains ended"


def test_a_failed_one_is_forgotten(world: World) -> None:
    view, _ = world.loading()
    fail(world, view)
    restart(world)
    assert world.manager.snapshot() == []


def test_an_unreadable_record_is_set_aside_and_its_engine_ended(world: World) -> None:
    view, _ = world.ready("org/good")
    bad, _ = world.ready("org/bad")
    folder = world.state_dir.path / "instances"
    (folder / f"{bad.id}.json").write_text("{")
    restart(world)
    assert [one.id for one in world.manager.snapshot()] == [view.id]
    assert world.events_of(bad)[-1] == "remains ended"
    assert sorted(path.name for path in folder.iterdir()) == sorted([f"{view.id}.json", f"{bad.id}.unreadable"])


def test_an_adopted_start_has_its_turn_on_its_gpu(world: World) -> None:
    world.devices.devices = (cuda(0),)
    first, _ = world.loading("org/a", params={"gpu_memory_utilization": 0.4})
    restart(world)
    second = world.create("org/b", params={"gpu_memory_utilization": 0.4})
    world.step(times=3)
    assert world.view(second).phase == "waiting_for_device"
    world.engine(first).health = 200
    world.step(times=2)
    assert len(world.engines_of(second)) == 1


# --- shutdown ---------------------------------------------------------------------------------------------------------

def shut_down(world: World, **arguments: Any) -> threading.Thread:
    thread = threading.Thread(target=lambda: world.manager.shutdown(**{"keep": False, **arguments}))
    thread.start()
    wait_until(lambda: world.manager._closing)
    return thread


def step_until_ended(world: World, thread: threading.Thread) -> None:
    def ended() -> bool:
        world.step(0.1)
        return not thread.is_alive()
    wait_until(ended)
    thread.join()


def test_a_shutdown_stops_all_and_cuts_what_is_in_flight(world: World) -> None:
    ready, engine = world.ready("org/a")
    loading, _ = world.loading("org/b")
    codes = cut_of(world.manager.lease(ready.id))
    thread = shut_down(world)
    wait_until(lambda: world.view(ready).state is State.STOPPING and world.view(loading).state is State.STOPPING)
    world.step()        # requests had their time already: no second drain
    assert codes == ["engine_stopped"]
    step_until_ended(world, thread)
    world.assert_nothing_left()
    assert world.devices.closed
    assert world.events_of(ready)[-2:] == ["TERM", "KILL"]
    assert world.events_of(loading) == ["launched", "KILL"]


def test_a_shutdown_starts_nothing_and_lets_nobody_wait(world: World) -> None:
    view, engine = world.ready()
    engine.deaf = True
    thread = shut_down(world)
    with pytest.raises(ShuttingDown):
        world.create("org/other")
    with pytest.raises(ShuttingDown):
        world.manager.wait_for_change(1e6)
    step_until_ended(world, thread)
    world.assert_nothing_left()


def test_who_waits_for_a_start_hears_of_the_shutdown(world: World) -> None:
    view, _ = world.loading()
    heard: list[type] = []

    def wait() -> None:
        try:
            world.manager.wait_for_change(1e6, [view.id])
        except ShuttingDown:
            heard.append(ShuttingDown)

    waiter = threading.Thread(target=wait)
    waiter.start()
    wait_until(lambda: world.instance(view).waiting == 1)
    thread = shut_down(world)
    waiter.join()
    assert heard == [ShuttingDown]
    step_until_ended(world, thread)


def test_a_hurried_shutdown_kills(world: World) -> None:
    view, engine = world.ready()
    engine.deaf = True
    world.manager.lease(view.id)
    hurry = threading.Event()
    thread = shut_down(world, hurry=hurry.is_set)
    wait_until(lambda: world.view(view).state is State.STOPPING)
    world.step(0.1)
    assert engine.alive
    hurry.set()
    step_until_ended(world, thread)
    assert world.events_of(view)[-1] == "KILL"
    world.assert_nothing_left()


def test_a_shutdown_waits_for_the_tree_of_a_failed_one(world: World) -> None:
    """Its keeper may not be done when it is deleted: with real threads, and a kill that takes its time."""
    view, engine = world.loading()
    begun, go_on = threading.Event(), threading.Event()

    def slow_destroy() -> bool:
        begun.set()
        assert go_on.wait(120)
        engine.alive = False
        return True

    engine.destroy = slow_destroy  # type: ignore[method-assign]
    fail(world, view, clean=False)
    keeper = world.manager._loops[view.id]
    keeper.start()
    assert begun.wait(120)
    ended = threading.Event()
    thread = threading.Thread(target=lambda: (world.manager.shutdown(keep=False), ended.set()))
    thread.start()
    wait_until(lambda: world.manager.snapshot() == [])
    assert engine.alive and not ended.is_set()
    go_on.set()
    thread.join()
    assert not engine.alive
    world.assert_nothing_left()


def test_a_shutdown_says_all_the_while_that_it_goes_on(world: World) -> None:
    view, engine = world.ready()
    engine.deaf = True
    signs: list[int] = []
    thread = shut_down(world, alive=lambda: signs.append(1))
    wait_until(lambda: len(signs) > 2)
    step_until_ended(world, thread)


def test_instances_can_be_left_for_the_next_daemon(world: World) -> None:
    ready, engine = world.ready("org/a")
    loading, other = world.loading("org/b")
    codes = cut_of(world.manager.lease(ready.id))
    world.manager.shutdown(keep=True)
    assert codes == ["engine_stopped"]      # request threads end with the daemon
    assert engine.alive and other.alive
    for refused in (lambda: world.manager.lease(ready.id), lambda: world.manager.wait_for_change(1e6),
                    lambda: world.manager.wait(loading.id, lambda one: one.state is State.READY)):
        with pytest.raises(ShuttingDown):
            refused()
    records = [json.loads(path.read_text()) for path in (world.state_dir.path / "instances").iterdir()]
    assert {(one["id"], one["state"], one["engine"]["pid"]) for one in records} == {
        (ready.id, "ready", engine.pid), (loading.id, "starting", other.pid)}
    restart(world)
    world.step()
    assert world.view(ready).state is State.READY
