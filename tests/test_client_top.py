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
from vllm_server_client.top.snapshot import Figures, Snapshot

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
            "last_error": None, **fields}


def look(*instances: Any, at: float = 0.0, **fields: Any) -> Snapshot:
    devices: Any = {"object": "list", "driver": None, "cuda": None, "data": [device()]}
    return Snapshot(at, HEALTH, devices, instances, **fields)


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
    now = look(worst, at=1.0, figures={"abcd1234": Figures(1e6, 1.0, 1e9)})
    row = drawing.instance_row(0, look(worst, figures={"abcd1234": Figures()}), now, columns)
    assert [len(cell.plain) <= width for cell, width in zip(row, columns, strict=True)] == [True] * len(columns)


def test_a_row_at_80_columns_says_it_all() -> None:
    one = instance(held=int(1.9 * GIB), status="starting", progress=0.4, model_name="Qwen/Qwen3-0.6B", in_flight=3)
    before, now = look(one, figures={one["id"]: Figures(2, 0.5, 100)}), look(
        one, at=2.0, figures={one["id"]: Figures(2, 0.5, 500)})
    row = [cell.plain for cell in drawing.instance_row(0, before, now, drawing.widths(80))]
    assert row == ["a", "abcd1234", "Qwen3-0.6B", "starting 40%", "0", "1.9 G", "3", "2", "200", "50%", "10m 5s"]
    row = [cell.plain for cell in drawing.instance_row(0, None, look(one), drawing.widths(120))]
    assert row[2] == "Qwen/Qwen3-0.6B" and row[7:10] == ["-", "-", "-"]


def test_the_line_below_tells_of_the_chosen_one() -> None:
    error = {"code": "c", "message": "no room", "detail": None, "suggestion": None}
    assert drawing.detail(instance(status="failed", last_error=error)).plain == "no room"
    loading = instance(status="starting", phase="loading_weights", why="created", restarts=2,
                       because="GPU 0 has most room")
    assert drawing.detail(loading).plain == "org/model: loading weights; created; GPU 0 has most room; restarts: 2"
    assert "SIMULATED" in drawing.headline(Snapshot(0, HEALTH | {"simulated": True}, look().devices, ()), "u").plain


# --- figures and events -----------------------------------------------------------------------------------------------

def test_engines_figures_are_read_from_the_metrics() -> None:
    text = """# HELP vllm:num_requests_waiting Number
vllm:num_requests_waiting{engine="0",instance="abc",model_name="m"} 2.0
vllm:num_requests_waiting{engine="1",instance="abc",model_name="m"} 1.0
vllm:kv_cache_usage_perc{engine="0",model_name="m",instance="def"} 0.25
vllm:generation_tokens_total{instance="abc"} 1.5e3
vllm:num_requests_waiting{engine="0"} 9.0
vllm:other{instance="abc"} 9.0
"""
    assert snapshot.figures_of(text) == {"abc": Figures(3, 0, 1500), "def": Figures(0, 0.25, 0)}


def test_a_rate_needs_two_readings_of_one_engine() -> None:
    first, second = look(figures={"a": Figures(tokens=10)}), look(at=2.0, figures={"a": Figures(tokens=110)})
    assert snapshot.tokens_per_s(first, second, "a") == 50
    assert snapshot.tokens_per_s(None, second, "a") is None
    assert snapshot.tokens_per_s(second, look(at=3.0, figures={"a": Figures()}), "a") is None      # it began anew
    assert snapshot.tokens_per_s(first, second, "b") is None


def test_what_changes_is_told_once() -> None:
    error = {"code": "c", "message": "out of memory", "detail": None, "suggestion": None}
    steps = [look(), look(instance(status="starting", why="created")), look(instance()),
             look(instance(progress=0.5)), look(instance(status="backoff", last_error=error)), look()]
    told = [event.text for old, new in zip([None, *steps], steps, strict=False) for event in snapshot.changes(old, new)]
    assert told == ["org/model abcd1234 is starting: created", "org/model abcd1234 is ready: health answered",
                    "org/model abcd1234 is backoff: out of memory", "org/model abcd1234 is gone"]
    up, down = [{"url": "http://a", "status": "up"}], [{"url": "http://a", "status": "down"}]
    assert [event.text for event in snapshot.changes(look(servers=up), look(servers=down))] == [
        "server http://a is down"]
    assert snapshot.changes(look(), look(servers=up)) == []
    wrong: Any = HEALTH | {"config": {"file": "config.yaml", "error": "config.yaml:3: bad"}}
    [event] = snapshot.changes(look(), Snapshot(1, wrong, look().devices, ()))
    assert "config.yaml:3" in event.text


# --- the whole --------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    with Daemon(tmp_path_factory.mktemp("top")) as daemon:
        yield daemon


@pytest.fixture
def daemon(server: Daemon) -> Iterator[Daemon]:
    yield server
    server.remove()


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
        screen.wait_for("is gone", "1 of 1 ready")
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
