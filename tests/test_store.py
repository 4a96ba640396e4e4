"""The state on disk: whole or not there, readable by its owner only, and no surprise when it is broken."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from errors import ConfigError
from instances import store as store_module
from instances.instance import InstanceSpec, State
from instances.launcher import EngineRecord
from instances.store import Found, Record, StateDir

RECORD = Record(
    id="0123abcd", state=State.READY, created_at=1e9, port=9000, devices=(0, 1), restarts=2,
    spec=InstanceSpec(
        model="org/model", names=("chat", "org/model"), flags={"max_model_len": 2048, "x": [1, {"y": None}]},
        params={"max_model_len": 2048}, timeout_s=600.0, start_timeout_s=60.0),
    engine=EngineRecord(pid=4711, started_ticks=99, boot_id="boot", run_dir="/tmp/vllm-server-x",
                        shared_memory=("/dev/shm/psm_1",)))


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StateDir:
    monkeypatch.setattr(store_module, "LOCK_WAIT_S", 0.0)
    return StateDir(tmp_path / "state")


def path_of(state: StateDir, instance_id: str = RECORD.id) -> Path:
    return state.path / "instances" / f"{instance_id}.json"


@pytest.mark.parametrize("record", [
    RECORD, replace(RECORD, engine=None, port=None, devices=(), state=State.BACKOFF),
    replace(RECORD, state=State.SLEEPING, asleep_level=2, memory_planned_bytes=7, because="so", spec=replace(
        RECORD.spec, sleep_level=1, stop_after_s=9.5, env={"A": "b"}, gpus=(0, 3), memory_bytes=1 << 40,
        param_count=0.5, precision="fp16", priority=-3, pinned=True, config_id="chat", hf_token="hf_x")),
    replace(RECORD, spec=replace(RECORD.spec, gpus=2)),
    replace(RECORD, spec=replace(RECORD.spec, model="模型/\ud83d", flags={"prompt": "\u2028 \"quoted\""}))])
def test_what_is_saved_is_found(state: StateDir, record: Record) -> None:
    state.save(record)
    assert StateDir(state.path).load() == Found((record,), ())


def test_the_newest_is_the_one(state: StateDir) -> None:
    state.save(RECORD)
    state.save(replace(RECORD, state=State.STOPPING))
    assert state.load().records == (replace(RECORD, state=State.STOPPING),)


def test_records_come_oldest_first(state: StateDir) -> None:
    for name, at in (("aaaaaaaa", 3.0), ("bbbbbbbb", 1.0), ("cccccccc", 2.0)):
        state.save(replace(RECORD, id=name, created_at=at))
    assert [record.id for record in state.load().records] == ["bbbbbbbb", "cccccccc", "aaaaaaaa"]


def test_a_removed_one_is_gone(state: StateDir) -> None:
    state.save(RECORD)
    state.remove(RECORD.id)
    state.remove(RECORD.id)
    assert state.load() == Found((), ())


def test_all_of_it_is_the_owners_alone(state: StateDir) -> None:
    state.save(RECORD)
    state.lock()
    for path in (state.path, state.logs, path_of(state).parent):
        assert path.stat().st_mode & 0o777 == 0o700
    for path in (path_of(state), state.path / "lock"):
        assert path.stat().st_mode & 0o777 == 0o600
    state.unlock()


@pytest.mark.parametrize("when", ["write", "sync", "rename"])
def test_a_full_disk_leaves_the_old_record(state: StateDir, when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    state.save(RECORD)

    def full(*arguments: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    where, name = {"write": (store_module.json, "dump"), "sync": (os, "fsync"), "rename": (Path, "replace")}[when]
    monkeypatch.setattr(where, name, full)
    with pytest.raises(OSError, match="No space left"):
        state.save(replace(RECORD, state=State.STOPPING))
    monkeypatch.undo()
    assert [path.name for path in path_of(state).parent.iterdir()] == [f"{RECORD.id}.json"]
    assert state.load().records == (RECORD,)


def changed(**fields: Any) -> str:
    record = json.loads(_text())
    for name, value in fields.items():
        *parents, last = name.split("__")
        target = record
        for parent in parents:
            target = target[parent]
        target[last] = value
    return json.dumps(record)


def _text() -> str:
    return json.dumps({
        "id": RECORD.id, "spec": {"model": "org/model", "names": ["org/model"], "flags": {}, "params": {},
                                  "timeout_s": 1, "start_timeout_s": 1},
        "state": "ready", "created_at": 1, "port": 9000, "devices": [0], "restarts": 0,
        "engine": {"pid": 4711, "started_ticks": 1, "boot_id": "b", "run_dir": "/tmp/x",
                   "shared_memory": []}})


@pytest.mark.parametrize("text", [
    "", "{", "null", "[]", "7", '"text"', "\x00" * 100, "{}", "[" * 100_000, changed(id="ffffffff"),
    changed(id="../../etc"), changed(state="running"), changed(state=None), changed(port="9000"), changed(port=True),
    changed(devices="01"), changed(devices=None), changed(restarts=1.5), changed(created_at="yesterday"),
    changed(spec=[]), changed(spec__model=None), changed(spec__names=[1]), changed(spec__flags=[]),
    changed(spec__timeout_s="never"), changed(engine=[]), changed(engine={}), changed(engine__pid="4711"),
    changed(engine__pid=1), changed(engine__pid=0), changed(engine__pid=-1), changed(engine__started_ticks=None),
    changed(engine__run_dir=None), changed(engine__shared_memory=None), changed(engine__shared_memory=[1])])
def test_a_record_that_cannot_be_read_is_set_aside_and_named(state: StateDir, text: str) -> None:
    state.save(replace(RECORD, id="aaaaaaaa"))
    path_of(state).write_text(text)
    found = state.load()
    assert ([record.id for record in found.records], found.unreadable) == (["aaaaaaaa"], (RECORD.id,))
    assert not path_of(state).exists()
    assert path_of(state).with_suffix(".unreadable").read_text() == text
    assert state.load().unreadable == ()


def test_the_text_that_these_are_made_from_is_good(state: StateDir) -> None:
    path_of(state).write_text(_text())
    assert state.load().unreadable == ()


def test_bytes_that_are_no_text(state: StateDir) -> None:
    path_of(state).write_bytes(b"\xff\xfe\xfd")
    assert state.load().unreadable == (RECORD.id,)


def test_a_file_that_is_none_of_ours_names_no_instance(state: StateDir) -> None:
    path_of(state, "notes").write_text("{")
    assert state.load() == Found((), ())


def test_a_folder_that_cannot_be_written_stops_no_start(state: StateDir, monkeypatch: pytest.MonkeyPatch) -> None:
    path_of(state).write_text("{")

    def refuse(*arguments: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "replace", refuse)
    monkeypatch.setattr(Path, "unlink", refuse)
    path_of(state).with_suffix(".tmp").touch()
    assert state.load().unreadable == (RECORD.id,)


def test_what_a_daemon_was_writing_when_it_died_is_swept(state: StateDir) -> None:
    half = path_of(state).with_suffix(".tmp")
    half.write_text('{"id": "0123')
    assert state.load() == Found((), ())
    assert not half.exists()


def test_one_daemon_has_the_folder(state: StateDir) -> None:
    state.lock()
    with pytest.raises(ConfigError, match=rf"in use by another daemon \(pid {os.getpid()}\)"):
        StateDir(state.path).lock()
    state.unlock()
    state.unlock()
    second = StateDir(state.path)
    second.lock()
    second.unlock()


def test_the_folder_is_free_when_its_daemon_is_killed(state: StateDir) -> None:
    script = ("import sys; from pathlib import Path; from instances.store import StateDir\n"
              "StateDir(Path(sys.argv[1])).lock(); print('locked', flush=True); input()")
    with subprocess.Popen([sys.executable, "-c", script, str(state.path)], stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE, cwd=Path(store_module.__file__).parents[1]) as other:
        assert other.stdout is not None
        other.stdout.readline()
        with pytest.raises(ConfigError, match=f"pid {other.pid}"):
            state.lock()
        other.kill()
        other.wait()
    state.lock()
    state.unlock()


def test_a_daemon_that_was_killed_a_moment_ago_is_waited_for(state: StateDir, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last of its processes may take some time to die."""
    monkeypatch.setattr(store_module, "LOCK_WAIT_S", 120.0)
    state.lock()
    taken, later = threading.Event(), StateDir(state.path)
    waiting = threading.Thread(target=lambda: (later.lock(), taken.set()))
    waiting.start()
    assert not taken.is_set()
    state.unlock()
    waiting.join()
    assert taken.is_set()
    later.unlock()
