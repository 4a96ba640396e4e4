"""Models of the catalog: loaded when a request names them, given up when none waits, replaced when they change."""

from __future__ import annotations

from pathlib import Path

import pytest

from errors import Conflict, LoadFailed, ManagerError, ModelNotFound, NotFound, QueueFull, ShuttingDown
from instances.demand import FAILED_FOR_S, GRACE_S
from instances.instance import State
from instances.store import Record
from tests.instance_world import FakeEngine, World

Patch = pytest.MonkeyPatch
Models = dict[str, dict[str, object]]
TWO: Models = {"chat": {"aliases": ["gpt-4"]}, "code": {}}


def world_of(tmp_path: Path, monkeypatch: Patch, models: Models | None = None, **settings: object) -> World:
    world = World(tmp_path, monkeypatch, TWO if models is None else models, **settings)
    world.manager.start()
    return world


@pytest.fixture
def world(tmp_path: Path, monkeypatch: Patch) -> World:
    return world_of(tmp_path, monkeypatch)


def states(world: World) -> dict[str, State]:
    """By the id of their entry."""
    return {str(view.spec.config_id): view.state for view in world.manager.snapshot()}


# --- loading ------------------------------------------------------------------------------------------------------

def test_a_request_loads_its_model_once(world: World) -> None:
    assert world.manager.snapshot() == []
    for name in ("chat", "gpt-4", "chat"):
        assert len(world.manager.demand(name)) == 1
    view = world.served("gpt-4")
    assert (view.spec.config_id, view.spec.model, view.names) == ("chat", "org/chat", ("chat", "gpt-4"))
    assert len(world.engines) == 1 and world.manager.counters == {"loads": 1}
    argv = list(world.engine(view).spec.argv)
    assert argv[argv.index("--served-model-name") + 1:][:2] == ["chat", "gpt-4"]


def test_what_the_entry_says_is_what_runs(tmp_path: Path, monkeypatch: Patch) -> None:
    world = world_of(tmp_path, monkeypatch, {"chat": {
        "model_path": "org/big", "max_model_len": 2048, "params": {"seed": 7, "max_num_seqs": None},
        "env": {"NCCL_DEBUG": "INFO"}, "idle_timeout_seconds": 5, "start_timeout_seconds": 7, "priority": 3,
        "pinned": True, "sleep": 1, "api_key": "hf_secret", "param_count": 7, "memory_mb": 1024}})
    view = world.served("chat")
    spec, engine = view.spec, world.engine(view)
    assert (spec.model, spec.timeout_s, spec.start_timeout_s, spec.priority, spec.pinned, spec.sleep_level) == (
        "org/big", 5.0, 7.0, 3, True, 1)
    assert (spec.memory_bytes, spec.param_count) == (1 << 30, 7.0)
    argv = " ".join(engine.spec.argv)
    assert "--max-model-len 2048" in argv and "--seed 7" in argv and "hf_secret" not in argv
    assert (engine.spec.env["NCCL_DEBUG"], engine.spec.env["HF_TOKEN"]) == ("INFO", "hf_secret")
    assert "hf_secret" not in repr(view)


def test_an_unknown_name_loads_nothing(world: World) -> None:
    assert world.manager.demand("other") == []
    for call in (world.manager.load, world.manager.unload):
        with pytest.raises(ModelNotFound, match="chat, code"):
            call("other")
    assert world.manager.snapshot() == []


@pytest.mark.parametrize(("mode", "loads"), [("configured", ["chat"]), ("any", ["chat", "org/new"]), ("off", [])])
def test_which_names_load(tmp_path: Path, monkeypatch: Patch, mode: str, loads: list[str]) -> None:
    world = world_of(tmp_path, monkeypatch, {"chat": {}}, AUTO_LOAD=mode)
    for name in ("chat", "org/new", "--port=1", "", " x", "a\nb"):
        world.manager.demand(name)
    assert [view.names[0] for view in world.manager.snapshot()] == loads
    assert [one.id for one in world.manager.loadable()] == []
    if mode == "off":
        assert world.manager.load("chat").state is State.STARTING     # by hand, still


def test_what_can_be_loaded_is_what_is_not_there(world: World) -> None:
    assert [(one.id, one.names, one.status) for one in world.manager.loadable()] == [
        ("chat", ("chat", "gpt-4"), "unloaded"), ("code", ("code",), "unloaded")]
    view = world.served("chat")
    assert [one.id for one in world.manager.loadable()] == ["code"]
    world.manager.unload("gpt-4")
    world.step(0.1, times=3)
    assert [one.id for one in world.manager.loadable()] == ["chat", "code"]
    assert world.engines_of(view)[0].alive is False


def test_replicas_are_loaded_together(tmp_path: Path, monkeypatch: Patch) -> None:
    world = world_of(tmp_path, monkeypatch, {"chat": {"replicas": {"min": 2, "max": 3}}})
    assert len(world.manager.demand("chat")) == 2
    assert len(world.manager.demand("chat")) == 2


def test_one_that_was_posted_serves_its_names(world: World) -> None:
    view, _ = world.ready("chat")
    assert view.spec.config_id == "chat" and world.demand("gpt-4").id == view.id
    own, _ = world.ready("code", params={"max_model_len": 99})
    assert own.spec.config_id is None and own.names == ("code",) and world.demand("code").id == own.id
    with pytest.raises(Conflict, match="max_model_len"):
        world.create("code")


def test_a_load_when_told_stays_and_wakes(tmp_path: Path, monkeypatch: Patch) -> None:
    world = world_of(tmp_path, monkeypatch, {"chat": {"sleep": 1}})
    view = world.manager.load("chat")
    world.step(100.0)
    assert world.view(view).state is State.STARTING and world.manager.load("chat").id == view.id
    world.engine(view).health = 200
    world.step(0.1, times=2)
    world.manager.sleep(view.id)
    world.step(0.1, times=4)
    assert world.manager.load("chat").state is State.WAKING


def test_a_sleeper_serves_the_next_request(tmp_path: Path, monkeypatch: Patch) -> None:
    world = world_of(tmp_path, monkeypatch, {"chat": {"sleep": 1, "idle_timeout_seconds": 10}})
    view = world.served("chat")
    world.step(11.0)
    world.step(0.1, times=4)
    assert states(world) == {"chat": State.SLEEPING}
    assert world.served("chat").id == view.id
    assert len(world.engines) == 1


def test_a_sleeper_that_dies_is_not_started_for_nobody(tmp_path: Path, monkeypatch: Patch) -> None:
    world = world_of(tmp_path, monkeypatch, {"chat": {"sleep": 1}})
    view = world.served("chat")
    world.manager.sleep(view.id)
    world.step(0.1, times=4)
    world.engine(view).alive = False
    world.step(0.1, times=4)
    assert world.manager.snapshot() == []
    assert world.served("chat").id != view.id


# --- what does not load -------------------------------------------------------------------------------------------

def fail(world: World, engine: FakeEngine, text: str) -> None:
    engine.dies(1, text + "\n")
    world.step(0.1, times=2)


def test_a_cause_that_stays_is_told_to_every_request(world: World) -> None:
    view = world.demand("chat")
    world.step()
    fail(world, world.engine(view), "vllm: error: unrecognized arguments: --x")
    world.step(1e6)
    with pytest.raises(LoadFailed) as refused:
        world.manager.demand("gpt-4")
    assert (refused.value.code, refused.value.status, refused.value.retry_after_s) == ("bad_flag", 400, None)
    assert len(world.engines) == 1
    assert world.manager.load("chat").state is State.STARTING       # until someone says so
    assert len(world.manager.snapshot()) == 1


def test_a_cause_that_may_pass_is_tried_again_later(world: World) -> None:
    view = world.demand("chat")
    with world.manager.queue("chat"):
        while world.view(view).state is not State.FAILED:
            world.step(1.0)
            for engine in world.engines:
                engine.dies(1, "something\n")
    with pytest.raises(LoadFailed) as refused:
        world.manager.demand("chat")
    assert refused.value.code == "exited" and refused.value.retry_after_s is not None
    world.step(FAILED_FOR_S)
    assert world.demand("chat").id != view.id


def test_a_record_that_cannot_be_written_is_told_and_leaves_nothing(world: World, monkeypatch: Patch) -> None:
    def full(record: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(world.state_dir, "save", full)
    with pytest.raises(ManagerError, match="No space left"):
        world.manager.demand("chat")
    assert world.manager.snapshot() == []


def test_nothing_loads_while_the_daemon_ends(world: World) -> None:
    world.manager.close_door()
    with pytest.raises(ShuttingDown):
        world.manager.demand("chat")
    with pytest.raises(ShuttingDown):
        world.manager.load("chat")


# --- queues and loads that nobody waits for -----------------------------------------------------------------------

def test_a_queue_is_bounded_for_each_model(tmp_path: Path, monkeypatch: Patch) -> None:
    world = world_of(tmp_path, monkeypatch, MAX_QUEUE=2)
    with world.manager.queue("chat"), world.manager.queue("chat"):
        with pytest.raises(QueueFull) as refused, world.manager.queue("chat"):
            raise AssertionError("let in")
        assert (refused.value.status, refused.value.code) == (503, "queue_full")
        assert refused.value.retry_after_s is not None
        with world.manager.queue("code"):
            pass
    with world.manager.queue("chat"):
        pass
    assert world.manager._lines == {}


def test_a_load_is_not_given_up_while_its_record_is_written(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk takes seconds for it, and who asks for the model cannot wait in the queue before."""
    save = world.state_dir.save

    def slow(record: Record) -> None:
        world.now += 5.0
        world.manager.tick(world.now)
        save(record)

    monkeypatch.setattr(world.state_dir, "save", slow)
    [candidate] = world.manager.demand("chat")
    assert candidate.state is State.STARTING
    world.now += 0.5
    world.manager.tick(world.now)
    assert world.manager.candidates("chat")[0].state is State.STARTING     # a moment to enter the queue


def test_a_load_that_nobody_waits_for_is_given_up(world: World) -> None:
    view = world.demand("chat")
    with world.manager.queue("chat"):
        world.step(1.0, times=20)
        assert states(world) == {"chat": State.STARTING}
    world.step(GRACE_S / 2)
    assert states(world) == {"chat": State.STARTING}
    world.step(GRACE_S, times=2)
    with pytest.raises(NotFound, match="nobody waits for it any more"):
        world.view(view)
    assert world.manager.snapshot() == [] and not world.engines[0].alive
    assert world.manager.counters["cancelled_loads"] == 1


def test_a_load_that_is_far_is_finished(world: World) -> None:
    view = world.demand("chat")
    with world.manager.queue("chat"):
        world.step(1.0, times=40)
    world.step(5.0)
    assert world.view(view).state is State.STARTING
    world.engine(view).health = 200
    world.step(0.1, times=2)
    assert world.view(view).state is State.READY


@pytest.mark.parametrize("how", ["post", "load", "preload"])
def test_a_load_that_somebody_ordered_goes_on(tmp_path: Path, monkeypatch: Patch, how: str) -> None:
    world = world_of(tmp_path, monkeypatch, {"chat": {"preload": how == "preload"}})
    if how == "post":
        world.demand("chat")
        world.create("chat")
    elif how == "load":
        world.demand("chat")
        world.manager.load("chat")
    world.step(1.0, times=20)
    assert states(world) == {"chat": State.STARTING}


def test_one_that_is_wanted_does_not_idle(tmp_path: Path, monkeypatch: Patch) -> None:
    world = world_of(tmp_path, monkeypatch, {"chat": {"idle_timeout_seconds": 10}})
    world.served("chat")
    with world.manager.queue("chat"):
        world.step(100.0)
        assert states(world) == {"chat": State.READY}
    world.step(9.0)
    assert states(world) == {"chat": State.READY}
    world.step(2.0)
    assert states(world) == {"chat": State.STOPPING}


def test_what_idled_away_is_loaded_again(tmp_path: Path, monkeypatch: Patch) -> None:
    world = world_of(tmp_path, monkeypatch, {"chat": {"idle_timeout_seconds": 10}})
    first = world.served("chat")
    world.step(11.0)
    second = world.demand("chat")               # the old one is still on its way out
    assert second.id != first.id
    world.step(0.1, times=3)
    assert [view.id for view in world.manager.snapshot()] == [second.id]


# --- preload, and daemons that come back --------------------------------------------------------------------------

def test_the_most_important_are_loaded_first(tmp_path: Path, monkeypatch: Patch) -> None:
    world = world_of(tmp_path, monkeypatch, {
        "low": {"preload": True, "priority": -1}, "none": {}, "high": {"preload": True, "priority": 9},
        "mid": {"preload": True}})
    assert [view.spec.config_id for view in world.manager.snapshot()] == ["high", "mid", "low"]
    world.step(0.1)
    assert [engine.spec.argv[2] for engine in world.engines] == ["org/high", "org/mid", "org/low"]


def test_a_load_on_demand_ends_with_its_daemon(world: World) -> None:
    """Of what serves, the next daemon takes over the engine; what has none is loaded by the next request."""
    chat = world.served("chat")
    code = world.demand("code")
    world.step()
    world.launcher.left = {chat.id: world.engine(chat)}
    world.engine(code).alive = False
    world.new_manager().start()
    world.step(0.1, times=3)
    assert states(world) == {"chat": State.READY}
    assert f"{code.id} remains ended" in world.events


# --- another configuration ----------------------------------------------------------------------------------------

def test_only_what_changed_is_touched(world: World) -> None:
    chat, code = world.served("chat"), world.served("code")
    world.configure({**TWO, "code": {"max_model_len": 99}, "new": {}})
    world.step(0.1, times=3)
    assert world.view(chat).pid == chat.pid and world.view(chat).state is State.READY
    assert states(world) == {"chat": State.READY}               # it was idle
    again = world.served("code")
    assert again.id != code.id and again.spec.flags["max_model_len"] == 99
    world.served("new")


def test_times_and_ranks_need_no_restart(world: World) -> None:
    chat = world.served("chat")
    world.configure({**TWO, "chat": {
        "aliases": ["gpt-4"], "idle_timeout_seconds": 5, "priority": 7, "pinned": True}})
    found = world.view(chat)
    assert (found.state, found.pid, found.spec.timeout_s, found.spec.priority, found.spec.pinned) == (
        State.READY, chat.pid, 5.0, 7, True)
    world.step(0.1, times=3)
    assert world.view(chat).state is State.READY


def test_a_changed_one_in_use_is_replaced_with_the_next_request(world: World) -> None:
    chat = world.served("chat")
    lease = world.manager.lease(chat.id)
    world.configure({**TWO, "chat": {"max_model_len": 99}})
    world.step(1.0, times=50)
    assert world.view(chat).state is State.READY
    new = world.demand("chat")
    assert new.id != chat.id and world.view(chat).state is State.STOPPING
    with world.manager.queue("chat"):
        world.step(1000.0, times=20)                # however long it takes
        assert lease.cut_error is None and world.view(new).phase == "waiting_for_old_instance"
        lease.release(ok=True)
        world.step(0.1, times=3)
        assert len(world.engines_of(new)) == 1


def test_a_removed_one_ends_with_its_requests(world: World) -> None:
    chat = world.served("chat")
    lease = world.manager.lease(chat.id)
    world.configure({"code": {}})
    assert world.view(chat).state is State.STOPPING
    world.step(1000.0, times=5)
    assert lease.cut_error is None
    lease.release(ok=True)
    world.step(1.0, times=4)
    assert world.manager.snapshot() == [] and world.manager.demand("chat") == []


def test_a_removed_one_that_had_failed_is_unknown(world: World) -> None:
    view = world.demand("chat")
    world.step()
    fail(world, world.engine(view), "vllm: error: unrecognized arguments: --x")
    world.configure({"code": {}})
    assert world.manager.demand("chat") == [] and world.manager.snapshot() == []


def test_an_engine_that_hangs_is_not_waited_for_while_it_drains(tmp_path: Path, monkeypatch: Patch) -> None:
    world = world_of(tmp_path, monkeypatch, PROBE_INTERVAL=30, PROBE_TIMEOUT=60)
    chat = world.served("chat")
    lease = world.manager.lease(chat.id)
    lease.on_cut(lease.release)
    world.engine(chat).answers = False
    world.configure({"code": {}})
    world.step(31.0, times=10)
    assert lease.cut_error is not None and world.manager.snapshot() == []


def test_a_changed_one_that_is_to_be_there_comes_back_by_itself(tmp_path: Path, monkeypatch: Patch) -> None:
    world = world_of(tmp_path, monkeypatch, {"chat": {"preload": True}})
    old = world.served("chat")
    world.configure({"chat": {"preload": True, "max_model_len": 99}})
    world.step(0.6, times=3)
    [new] = world.manager.snapshot()
    assert new.id != old.id and new.spec.flags["max_model_len"] == 99


def test_what_changed_while_no_daemon_ran_is_replaced(world: World) -> None:
    chat = world.served("chat")
    world.launcher.left = {chat.id: world.engine(chat)}
    world.write_models({"chat": {"max_model_len": 99}})
    world.new_manager().start()
    world.step(0.1, times=4)
    assert world.served("chat").spec.flags["max_model_len"] == 99


def test_one_that_was_posted_with_params_of_its_own_is_left_alone(world: World) -> None:
    own, _ = world.ready("code", params={"max_model_len": 77})
    world.configure({"chat": {}})
    world.step(1.0, times=3)
    assert world.view(own).state is State.READY


def test_a_failure_is_forgotten_when_its_entry_changes(world: World) -> None:
    view = world.demand("chat")
    world.step()
    fail(world, world.engine(view), "vllm: error: unrecognized arguments: --x")
    world.configure({**TWO, "chat": {"max_model_len": 99}})
    assert world.demand("chat").state is State.STARTING
