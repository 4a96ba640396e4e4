"""The daemon's own life, and what its engines live through: idling, signals, kills, restarts, reloads."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

from instances import processes
from tests.daemon import Answer, Daemon, events
from tests.support import wait_until

pytestmark = pytest.mark.whole

STREAM = {"prompt": "x", "stream": True}


def ask(daemon: Daemon, model: str, **fields: object) -> Answer:
    return daemon.post("/v1/completions", {"model": model, "prompt": "x", **fields})


@contextlib.contextmanager
def endless_stream(daemon: Daemon, model: str) -> Iterator[http.client.HTTPResponse]:
    """One whose first token is here, and whose second comes after an hour from a SLOWEST engine."""
    with daemon.open("POST", "/v1/completions", {"model": model, **STREAM}) as stream:
        assert b"simulated" in next(events(stream))
        yield stream


SLOWEST = {"tokens_per_s": 1 / 3600}
DEV_MODE = {"VLLM_SERVER_DEV_MODE": "1"}        # an engine's knobs can be turned


# --- idling -------------------------------------------------------------------------------------------------------

def test_the_idle_clock_runs_from_the_end_of_the_last_request(tmp_path: Path) -> None:
    with Daemon(tmp_path / "daemon", DEV_MODE, patch={"instance_manager.REAPER_STEP_S": 0.05}) as daemon:
        idle_s = 0.5
        # Nor does one idle away that a request waits for, though it starts for longer than its timeout.
        made = daemon.create("m", timeout=idle_s, sim=SLOWEST | {"start_s": 0.7}, wait=False)
        with endless_stream(daemon, "m") as stream:
            begun = time.monotonic()
            wait_until(lambda: time.monotonic() > begun + 2 * idle_s)
            during = daemon.instance(made["id"])
            assert (during["status"], during["in_flight"]) == ("ready", 1)
            before_the_end = time.monotonic()
            daemon.turn_knobs(during, tokens_per_s=0)
            assert list(events(stream))[-1] == b"data: [DONE]\n\n"        # it was not reaped meanwhile
        wait_until(lambda: daemon.status_of(made["id"]) != "ready")
        assert time.monotonic() - before_the_end >= idle_s, "it went before its time"
        wait_until(lambda: daemon.status_of(made["id"]) == "gone")
        gone = daemon.get(f"/instances/{made['id']}")
        assert gone.error["message"] == f"instance {made['id']} was stopped: idle for {idle_s:g} s"
        missing = ask(daemon, "m")
        assert (missing.status, missing.error["code"]) == (404, "model_not_found")
        assert daemon.engine_processes() == []


# --- signals ------------------------------------------------------------------------------------------------------

def test_sigterm_lets_requests_in_flight_finish(tmp_path: Path) -> None:
    with Daemon(tmp_path / "daemon", DEV_MODE) as daemon:
        made = daemon.create("m", sim=SLOWEST)
        with ThreadPoolExecutor(1) as pool, endless_stream(daemon, "m") as stream:
            plain: Future[Answer] = pool.submit(ask, daemon, "m")
            wait_until(lambda: daemon.instances()[0]["in_flight"] == 2)
            daemon.signal(signal.SIGTERM)
            wait_until(lambda: refuses(daemon))
            daemon.turn_knobs(made, tokens_per_s=0)
            assert list(events(stream))[-1] == b"data: [DONE]\n\n"
            assert plain.result().status == 200
        assert daemon.wait_for_exit() == 0
        assert daemon.engine_processes() == []


def refuses(daemon: Daemon) -> bool:
    try:
        daemon.socket().close()
    except ConnectionRefusedError:
        return True
    except ConnectionResetError:        # it stood in the queue of the listener as that was closed
        return False
    return False


def test_sigterm_ends_what_does_not_finish(tmp_path: Path) -> None:
    """An engine that would hang for ever on its SIGTERM with that stream open ends too."""
    with Daemon(tmp_path / "daemon", {"SHUTDOWN_GRACE": "0.3", "DRAIN_TIMEOUT": "0.2", "STOP_TIMEOUT": "90"}) as daemon:
        daemon.create("m", sim=SLOWEST)
        daemon.create("loading", sim={"start_s": 3600}, wait=False)
        with endless_stream(daemon, "m") as stream:
            assert daemon.stop() == 0
            with pytest.raises((http.client.IncompleteRead, ConnectionResetError)):
                stream.read()
        assert daemon.engine_processes() == [] and daemon.records() == []
        assert "SIGTERM; killing it" not in daemon.log


def test_a_second_ctrl_c_hurries(tmp_path: Path) -> None:
    """A terminal sends it to the daemon's whole process group; the engines are in sessions of their own."""
    long = {"SHUTDOWN_GRACE": "3600", "DRAIN_TIMEOUT": "3600", "STOP_TIMEOUT": "3600"}
    with Daemon(tmp_path / "daemon", long) as daemon:
        made = daemon.create("m", sim=SLOWEST)
        with endless_stream(daemon, "m"):
            os.killpg(daemon.pid, signal.SIGINT)
            wait_until(lambda: refuses(daemon))
            assert not daemon.exited() and made["pid"] in daemon.engine_processes()
            os.killpg(daemon.pid, signal.SIGINT)
            assert daemon.wait_for_exit() == 0
        assert daemon.engine_processes() == [] and "hurried" in daemon.log


# --- restarts -----------------------------------------------------------------------------------------------------

def test_keep_instances_hands_them_to_the_next_daemon(tmp_path: Path) -> None:
    with Daemon(tmp_path / "daemon", {"KEEP_INSTANCES": "true"}) as daemon:
        made = daemon.create("org/m", timeout=500, params={"served_model_name": ["m"], "seed": 3})
        record = daemon.state / "instances" / f"{made['id']}.json"
        wait_until(lambda: json.loads(record.read_text())["state"] == "ready")     # it is whole at any time
        assert record.stat().st_mode & 0o077 == daemon.state.stat().st_mode & 0o077 == 0, "others may read it"
        assert daemon.stop() == 0
        assert made["pid"] in daemon.engine_processes() and daemon.records() == [f"{made['id']}.json"]
        daemon.start()
        wait_until(lambda: daemon.status_of(made["id"]) == "ready")
        adopted = daemon.instance(made["id"])
        for name in ("id", "pid", "port", "params", "timeout", "aliases", "model_name", "created", "restarts"):
            assert adopted[name] == made[name], name
        assert ask(daemon, "m").status == 200
        same = daemon.post("/instances", {"model_name": "org/m", "params": made["params"]})
        assert (same.status, same.json["id"]) == (200, made["id"])
        daemon.remove()                                     # an engine that is not its child is ended all the same
        assert daemon.engine_processes() == []


def test_kill_9_of_the_daemon_loses_nothing(tmp_path: Path) -> None:
    """Of its worker, of its master, and of both; with instances that are ready and one that is loading."""
    with Daemon(tmp_path / "daemon") as daemon:
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(daemon.create, ["a", "b"]))
        for victim in ("worker", "master", "both"):
            loading = daemon.create(victim, sim={"start_s": 1}, wait=False)
            # An engine whose pid is not on record yet would be ended and started anew.
            wait_until(partial(pid_on_record, daemon, loading["id"]))
            pids = {one["id"]: one["pid"] for one in daemon.instances()}
            kill(daemon, victim)
            wait_until(lambda: answers(daemon) and {one["status"] for one in daemon.instances()} == {"ready"})
            assert {one["id"]: one["pid"] for one in daemon.instances()} == pids
            for model in ("a", "b", victim):
                assert ask(daemon, model).status == 200
            assert {one["restarts"] for one in daemon.instances()} == {0}


def pid_on_record(daemon: Daemon, instance_id: str) -> bool:
    path = daemon.state / "instances" / f"{instance_id}.json"
    return path.exists() and json.loads(path.read_text())["engine"] is not None


def kill(daemon: Daemon, victim: str) -> None:
    if victim == "worker":          # the master makes another one, on the same port
        old = daemon.worker_pid
        daemon.signal(signal.SIGKILL, old)
        wait_until(lambda: (now := processes.read_process(old)) is None or now.zombie)
        return
    if victim == "master":
        session = daemon.pid
        daemon.signal(signal.SIGKILL)
        daemon.wait_for_exit()
        wait_until(lambda: not processes.session_members(session))     # a worker never outlives its master
    else:
        daemon.kill()
    daemon.start()


def answers(daemon: Daemon) -> bool:
    try:
        return daemon.get("/health").status == 200
    except (OSError, http.client.HTTPException):
        return False


def test_what_died_while_no_daemon_looked(tmp_path: Path) -> None:
    """One engine is dead, of one only orphans are left, one record is no JSON: nothing stays behind."""
    with Daemon(tmp_path / "daemon") as daemon:
        with ThreadPoolExecutor(2) as pool:
            dead, orphaned = pool.map(daemon.create, ["dead", "orphaned"])
        daemon.kill()
        for member in processes.session_members(dead["pid"]):
            os.kill(member.pid, signal.SIGKILL)
        os.kill(orphaned["pid"], signal.SIGKILL)
        old = set(daemon.engine_processes())
        (daemon.state / "instances" / "deadbeef.json").write_text("{half of")
        daemon.start()
        wait_until(lambda: [one["status"] for one in daemon.instances()] == ["ready"] * 2)
        after = {one["id"]: one["pid"] for one in daemon.instances()}
        assert after.keys() == {dead["id"], orphaned["id"]}
        assert not set(after.values()) & {dead["pid"], orphaned["pid"]}
        assert not old & set(daemon.engine_processes()), "orphans live on"
        assert "cannot be read" in daemon.log
        (daemon.state / "instances" / "deadbeef.unreadable").unlink()


def test_a_second_daemon_on_one_state_folder_refuses(tmp_path: Path) -> None:
    with Daemon(tmp_path / "daemon") as first:
        second = Daemon(tmp_path / "second", {"STATE_DIR": str(first.state)})
        with pytest.raises(AssertionError, match=f"is in use by another daemon \\(pid {first.pid}\\)"), second:
            pass
        assert "Traceback" not in second.log and "choose another STATE_DIR" in second.log
        assert first.get("/health").status == 200


# --- settings -----------------------------------------------------------------------------------------------------

def test_reload(tmp_path: Path) -> None:
    folder = tmp_path / "daemon"
    folder.mkdir()
    env_file = folder / ".env"
    env_file.write_text("VLLM_MAX_INSTANCES=1\n")
    with Daemon(folder) as daemon:
        daemon.create("a", wait=False)
        assert daemon.post("/instances", {"model_name": "b"}).error["code"] == "too_many_instances"

        env_file.write_text("VLLM_MAX_INSTANCES=2\nVLLM_DEFAULT_MAX_MODEL_LEN=512\nAPP_THREADS=7\n")
        answer = daemon.post("/admin/reload")
        assert answer.status == 200 and set(answer.json["changed"]) == {"max_instances", "flags_env"}
        assert "threads" in daemon.log          # which only a restart changes
        assert daemon.create("b", wait=False)["flags"]["max_model_len"] == "512"

        for text, where in (("VLLM_MAX_INSTANCES=3\nVLLM_MAX_INSTANCES=many\n", ".env:2"),
                            ("\n\nUNKNOWN_SETTING=1\n", ".env:3")):
            env_file.write_text(text)
            bad = daemon.post("/admin/reload")
            assert (bad.status, bad.error["code"]) == (400, "bad_config")
            assert where in bad.error["message"] and "the old settings stay" in bad.error["message"]
        assert daemon.post("/instances", {"model_name": "c"}).error["code"] == "too_many_instances"
        hang_up(daemon, ".env:3: unknown setting UNKNOWN_SETTING")
        env_file.write_text("VLLM_MAX_INSTANCES=3\n")
        hang_up(daemon, "settings reloaded; changed: max_instances, flags_env")
        daemon.create("c", wait=False)
        assert len(daemon.instances()) == 3


def hang_up(daemon: Daemon, says: str) -> None:
    """SIGHUP, and what it says to that; it may have said so before."""
    before = daemon.log.count(says)
    daemon.signal(signal.SIGHUP)
    wait_until(lambda: daemon.log.count(says) > before)


@pytest.mark.parametrize(("name", "text", "said"), [
    (".env", "APP_THREADS=12\n\nVLLM_MAX_INSTANCES=-1\n", ".env:3: VLLM_MAX_INSTANCES=-1"),
    ("vllm_config.json", '{\n "seed": 1,\n "port": 5\n}', 'vllm_config.json:3: "port"')])
def test_bad_settings_stop_the_start(tmp_path: Path, name: str, text: str, said: str) -> None:
    daemon = Daemon(tmp_path)
    (tmp_path / name).write_text(text)
    with pytest.raises(AssertionError, match="the daemon did not start"), daemon:
        pass
    assert said in daemon.log and "Traceback" not in daemon.log
    assert not daemon.state.exists()


# --- faults -------------------------------------------------------------------------------------------------------

def test_a_hung_engine_is_found_and_restarted(tmp_path: Path) -> None:
    """Its health is good all the time; a request that waits for it hears what happened."""
    folder = tmp_path / "daemon"
    folder.mkdir()
    with Daemon(folder, DEV_MODE, patch={"instances.instance.BACKOFF_LIMIT_S": 0.05}) as daemon:
        made = daemon.create("m")
        daemon.turn_knobs(made, hang=True)
        # No sooner, and no longer than it is needed: on a busy machine one that is well would be found hung too.
        (folder / ".env").write_text("PROBE_INTERVAL=0.2\nPROBE_TIMEOUT=0.5\n")
        assert daemon.post("/admin/reload").status == 200
        told = ask(daemon, "m")
        assert (told.status, told.error["code"]) == (502, "engine_hung")
        assert "the engine of m hangs" in told.error["message"]
        (folder / ".env").unlink()
        assert daemon.post("/admin/reload").status == 200
        wait_until(lambda: daemon.instance(made["id"])["restarts"] == 1)
        wait_until(lambda: daemon.status_of(made["id"]) == "ready")
        after = daemon.instance(made["id"])
        assert after["pid"] != made["pid"] and after["last_error"]["code"] == "engine_hung"
        assert ask(daemon, "m").status == 200
