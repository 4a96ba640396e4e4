"""`vllm-server top`: its parts as values, and the whole in tmux at 80 by 24 against the daemon."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.command import ARGV, environment, vllm_server
from tests.daemon import Daemon
from tests.support import wait_until
from tests.tmux import Tmux, needs_tmux
from vllm_server_client.cli.exits import Exit
from vllm_server_client.top import drawing, snapshot
from vllm_server_client.top.snapshot import Snapshot

pytestmark = pytest.mark.whole

GIB = 1 << 30
HEALTH: Any = {"status": "ok", "instances": 1, "ready": 1, "vllm_processes": 1, "version": "0.1.0",
               "simulated": False, "config": {"file": None, "error": None}}


def device(index: int = 0, *, total: int = 80 * GIB, used: int = 0, **fields: object) -> Any:
    return {"index": index, "uuid": "u", "name": "NVIDIA H100 80GB HBM3", "kind": "cuda", "utilization": 0.93,
            "temperature_c": 64, "processes": [], "error": None, "instances": [],
            "memory": {"total": total, "used": used, "free": total - used}, **fields}


def instance(identity: str = "abcd1234", *, held: int | None = None, gpus: tuple[int, ...] = (0,),
             status: str = "ready", **fields: object) -> Any:
    return {"id": identity, "model_name": "org/model", "aliases": [], "status": status, "why": "health answered",
            "because": None,
            "phase": None, "progress": None, "gpus": list(gpus), "in_flight": 0, "created": 1, "expires_in": 605.0,
            "memory": {"planned_bytes": None, "measured_bytes": held}, "restarts": 0, "retry_in": None,
            "last_error": None, "elapsed": 12.0, "expected": None, "load": load(), **fields}


def load(**fields: object) -> Any:
    return {"tokens_per_s": 0.0, "waiting": 0.0, "cache_usage": None, **fields}


def server(**fields: object) -> Any:
    return {"id": "gpu-server-1:8081", "health": "up", "status": True, "circuit": "closed", "running": 2, "waiting": 1,
            "capacity": 8, "cache_usage": 0.5, "models": ["m"], "why": "it answers", **fields}


def state(number: int, to: str, why: str = "") -> Any:
    return {"id": number, "at": 0.0, "event": "state", "instance": "abcd1234", "model": "org/model", "to": to,
            "why": why}


def look(*instances: Any, **fields: Any) -> Snapshot:
    devices: Any = {"object": "list", "driver": None, "cuda": None, "data": [device()]}
    return Snapshot(HEALTH, devices, instances, **fields)


# --- bars -------------------------------------------------------------------------------------------------------------

def test_a_bar_shows_who_has_the_memory() -> None:
    gpu = device(used=60 * GIB)
    both, other = instance("b", held=40 * GIB, gpus=(0, 1)), instance("c", held=GIB, gpus=(1,))
    there = [instance("a", held=20 * GIB), both, other]
    assert drawing.bar(gpu, there, 8).plain == "aabb▒▒··"


@given(st.lists(st.integers(0, 40 * GIB), max_size=70), st.integers(0, 100 * GIB), st.integers(8, 200))
def test_a_bar_has_its_width_and_shows_everyone_it_has_room_for(held: list[int], used: int, width: int) -> None:
    there = [instance(str(index), held=size) for index, size in enumerate(held)]
    text = drawing.bar(device(used=used), there, width).plain
    assert len(text) == width
    if sum(held) < 40 * GIB and len(held) < width // 2:
        assert {drawing.letter(index) for index, size in enumerate(held) if size} <= set(text)
    assert text.lstrip(drawing.LETTERS).lstrip(drawing.FOREIGN).strip(drawing.FREE) == ""


@pytest.mark.parametrize("width", [60, 80, 132, 200])
def test_a_devices_line_fits(width: int) -> None:
    there = [instance(held=70 * GIB)]
    line = drawing.device_line(device(7, used=70 * GIB), there, width)
    assert len(line.plain) <= width and "70 GiB of 80 GiB" in line.plain and "93%" in line.plain and "64" in line.plain
    assert "lost" in drawing.device_line(device(error="GPU is lost"), there, width).plain


# --- rows -------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("terminal", [80, 100, 160])
def test_a_row_fits_its_columns_whatever_it_holds(terminal: int) -> None:
    columns = drawing.widths(terminal)
    assert sum(columns) + len(columns) + drawing.SCROLLBAR <= terminal
    worst = instance("abcd1234", held=999 << 20, gpus=tuple(range(0, 64, 2)), status="falling_asleep", in_flight=123456,
                     model_name="organisation/" + "model" * 40, expires_in=2e9)
    row = drawing.instance_row(0, {**worst, "load": load(tokens_per_s=1e9, waiting=1e6, cache_usage=1.0)}, columns)
    assert [len(cell.plain) <= width for cell, width in zip(row, columns, strict=True)] == [True] * len(columns)


def test_a_row_at_80_columns_says_it_all() -> None:
    one = instance(held=int(1.9 * GIB), model_name="Qwen/Qwen3-0.6B", in_flight=3,
                   load=load(tokens_per_s=200.4, waiting=2.0, cache_usage=0.5))
    row = [cell.plain for cell in drawing.instance_row(0, one, drawing.widths(80))]
    assert row == ["a", "abcd1234", "Qwen3-0.6B", "ready", "0", "1.9 G", "3", "2", "200", "50%", "10m 5s"]
    loading = {**one, "status": "starting", "progress": 0.4, "load": load()}
    row = [cell.plain for cell in drawing.instance_row(0, loading, drawing.widths(120))]
    assert row[2:4] == ["Qwen/Qwen3-0.6B", "starting 40%"] and row[7:10] == ["-", "-", "-"]


@pytest.mark.parametrize("width", [60, 80, 132])
def test_a_servers_line_fits_and_tells_its_load(width: int) -> None:
    line = drawing.server_line(server(models=["model"] * 40), width).plain
    assert len(line) <= width and line.startswith("@ gpu-server-1:8081") and "2 running" in line
    down = drawing.server_line(server(health="down", status=False, circuit="open"), 132).plain
    assert "down, breaker open" in down


def test_the_line_below_tells_of_the_chosen_one() -> None:
    error = {"code": "c", "message": "no room", "detail": None, "suggestion": None}
    assert drawing.detail(instance(status="failed", last_error=error)).plain == "no room"
    loading = instance(status="starting", phase="loading_weights", why="created", restarts=2,
                       because="GPU 0 has most room")
    assert drawing.detail(loading).plain == (
        "org/model: loading weights, 12 s; created; GPU 0 has most room; restarts: 2")
    assert "loading weights, 12 s of about 40 s;" in drawing.detail({**loading, "expected": 40.0}).plain
    assert "SIMULATED" in drawing.headline(Snapshot(HEALTH | {"simulated": True}, look().devices, ()), "u").plain


# --- events -----------------------------------------------------------------------------------------------------------

def told(old: Snapshot | None, new: Snapshot) -> list[str]:
    return [event.text for event in snapshot.changes(old, new)]


def test_what_changes_is_told_once() -> None:
    first, second = state(1, "starting", "created"), state(2, "ready", "health answered")
    before, after = look(events=[first]), look(events=[first, {**second, "event": "phase"}, {**second, "id": 3}])
    assert told(None, before) == ["org/model abcd1234 is starting: created"]
    assert told(before, after) == ["org/model abcd1234 is ready: health answered"]
    assert told(after, after) == []
    assert told(after, look(events=[state(1, "failed")])) == ["org/model abcd1234 is failed"]      # another daemon
    down = server(health="down", status=False, why="no answer")
    assert told(look(servers=[server()]), look(servers=[down])) == ["server gpu-server-1:8081 is down: no answer"]
    assert told(look(), look(servers=[server()])) == []
    wrong: Any = HEALTH | {"config": {"file": "config.yaml", "error": "config.yaml:3: bad"}}
    [event] = snapshot.changes(look(), Snapshot(wrong, look().devices, ()))
    assert "config.yaml:3" in event.text


# --- the whole --------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    with Daemon(tmp_path_factory.mktemp("top")) as daemon:
        yield daemon


@pytest.fixture
def daemon(shared: Daemon) -> Iterator[Daemon]:
    yield shared
    shared.remove()


def monitor(daemon: Daemon, **size: int) -> Tmux:
    return Tmux([*ARGV, "top", "--interval", "0.2"], environment(daemon), **size)


@needs_tmux
def test_the_monitor_shows_loads_follows_and_stops(daemon: Daemon) -> None:
    one = daemon.create("org/tiny", params={"served_model_name": "demo"})
    with monitor(daemon) as screen:
        screen.wait_for("SIMULATED", "1 of 1 ready", one["id"], "demo", "ready", "host memory", "q Quit")
        assert len(screen.screen.splitlines()) <= 24
        screen.keys("l")
        screen.wait_for("Load a model")
        screen.keys("org/quick", "Enter")           # holds a q, which must not quit
        screen.wait_for("org/quick", "2 of 2 ready", "is ready")
        screen.keys("f")
        screen.wait_for("log of demo", "Application startup complete")
        daemon.post("/v1/chat/completions", {"model": "demo", "messages": [], "max_tokens": 1})
        screen.wait_for("POST /v1/chat/completions")
        screen.keys("Escape")
        screen.wait_for("2 of 2 ready")
        screen.keys("Down", "x")
        screen.wait_for("Stop org/quick")
        screen.keys("n")
        screen.wait_without("Stop org/quick")
        screen.keys("x")
        screen.wait_for("Stop org/quick")
        screen.keys("y")
        wait_until(lambda: [each["id"] for each in daemon.instances()] == [one["id"]])
        screen.wait_for("org/quick", "is stopped", "1 of 1 ready")
        screen.keys("q")
        screen.wait_for("exit=0")
        assert "host memory" not in screen.screen       # the terminal is as it was


@needs_tmux
def test_a_load_that_is_refused_and_a_start_that_fails_are_told(daemon: Daemon) -> None:
    with monitor(daemon, columns=100, rows=30) as screen:
        screen.wait_for("no instances: l loads a model")
        daemon.create("org/tiny", params={"max_model_len": 1024})
        screen.keys("l")
        screen.wait_for("Load a model")
        screen.keys("org/tiny", "Enter")            # with other params than those it has
        screen.wait_for("load org/tiny: org/tiny is active")
        daemon.create("org/bad", sim={"fail": "out_of_memory"}, wait=False)
        screen.wait_for("org/bad", "backoff")
        screen.keys("C-c")
        screen.wait_for("exit=0")


@needs_tmux
def test_servers_what_happened_before_and_the_figures_are_shown(tmp_path: Path) -> None:
    (tmp_path / "servers.toml").write_text(
        '[servers]\nservers = [{ url = "http://127.0.0.1:9", max_concurrent_requests = 2, models = ["far"] }]\n')
    with Daemon(tmp_path) as daemon:
        one = daemon.create("org/tiny", sim={"tokens_per_s": 50})
        daemon.post("/v1/completions", {"model": "org/tiny", "prompt": "x", "max_tokens": 100})
        wait_until(lambda: daemon.instance(one["id"])["load"]["cache_usage"] is not None)
        with monitor(daemon) as screen:
            screen.wait_for("@ 127.0.0.1:9", "down", "far", "is ready: ", "0%")
            slow = daemon.create("org/slow", sim={"start_s": 600}, wait=False)
            screen.wait_for(slow["id"], "starting")
            screen.keys("Down")
            screen.wait_for("org/slow: ")
            screen.keys("q")
            screen.wait_for("exit=0")


@needs_tmux
def test_it_stays_when_the_server_goes(tmp_path: Path) -> None:
    with Daemon(tmp_path) as daemon:
        one = daemon.create("org/tiny")
        with monitor(daemon) as screen:
            screen.wait_for(one["id"])
            daemon.stop()
            screen.wait_for("no connection to", one["id"])
            screen.keys("q")
            screen.wait_for("exit=0")
        daemon.start()


@needs_tmux
def test_who_may_not_look_is_told_so(tmp_path: Path) -> None:
    with Daemon(tmp_path, {"ADMIN_API_KEYS": "admin-key"}) as daemon, monitor(daemon) as screen:
        screen.wait_for("admin key", f"exit={int(Exit.REFUSED)}")


def test_one_look_as_json_and_none_without_a_terminal(daemon: Daemon) -> None:
    one = daemon.create("org/tiny")
    found = vllm_server(daemon, "top", "--json").json
    assert [each["id"] for each in found["instances"]] == [one["id"]] and found["devices"]["data"]
    done = vllm_server(daemon, "top")
    assert done.code == Exit.USAGE and "needs a terminal" in done.err
    assert vllm_server(None, "top", "--json", "--url", "http://127.0.0.1:1").code == Exit.UNREACHABLE
