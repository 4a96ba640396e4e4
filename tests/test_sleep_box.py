"""Sleepers and turns on a stand-in GPU: the whole daemon, engines that take memory and give it back."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.daemon import Answer, events
from tests.gpu_box import GIB, GpuBox, needs_compiler
from tests.support import wait_until

pytestmark = [needs_compiler, pytest.mark.whole]

LARGE: Mapping[str, Any] = {"params": {"gpu_memory_utilization": 0.9}}
FAST = {"instances.settling.STILL_S": 0.2}


def ask(box: GpuBox, model: str) -> Answer:
    return box.daemon.post("/v1/completions", {"model": model, "prompt": "x"})


def served(box: GpuBox, model: str) -> dict[str, Any]:
    """Its one instance, after it has answered."""
    answer = ask(box, model)
    assert answer.status == 200, answer
    (one,) = [one for one in box.daemon.instances() if one["configured_as"] == model and one["status"] == "ready"]
    return one


def entry(model: str, **fields: Any) -> dict[str, Any]:
    return {"model_path": f"org/{model}", **LARGE, **fields}


def put_to_sleep(box: GpuBox, instance_id: str) -> None:
    assert box.daemon.post(f"/instances/{instance_id}/sleep", {"wait": True}).json["status"] == "sleeping"


def test_two_that_sleep_share_a_gpu_without_a_restart(tmp_path: Path) -> None:
    """Its load took longer than its wake, so it sleeps to make room."""
    models = {"a": entry("a", sleep=1, env={"SIMULATOR_START_S": "4"}), "b": entry("b", sleep=1)}
    with GpuBox(tmp_path, [80], {"SLEEP_HOST_MEMORY_MB": "1000000"}, config={"models": models}, patch=FAST) as box:
        first = served(box, "a")
        put_to_sleep(box, first["id"])
        assert served(box, "a")["pid"] == first["pid"]      # how long a wake takes is known now
        second = served(box, "b")
        assert "a (idle" in second["because"] and "goes to sleep" in second["because"]
        asleep = box.daemon.instance(first["id"])
        assert (asleep["status"], asleep["asleep"], asleep["pid"]) == ("sleeping", 1, first["pid"])
        assert asleep["memory"]["measured_bytes"] < 0.1 * first["memory"]["measured_bytes"]
        again = served(box, "a")
        assert (again["id"], again["pid"]) == (first["id"], first["pid"])
        assert box.gpus()[0]["memory"]["used"] < 80 * GIB


def test_a_sleeper_is_found_asleep_after_the_daemon_was_killed(tmp_path: Path) -> None:
    with GpuBox(tmp_path, [80], config={"models": {"a": entry("a", sleep=2)}}, patch=FAST) as box:
        one = served(box, "a")
        put_to_sleep(box, one["id"])
        held = box.gpus()[0]["memory"]["used"]
        box.daemon.kill()
        box.daemon.start()
        wait_until(lambda: box.daemon.status_of(one["id"]) not in ("starting", "falling_asleep"))
        found = box.daemon.instance(one["id"])
        assert (found["status"], found["asleep"], found["pid"]) == ("sleeping", 2, one["pid"])
        assert box.gpus()[0]["memory"]["used"] == held
        assert served(box, "a")["pid"] == one["pid"]


def test_a_stream_ends_before_its_model_makes_room(tmp_path: Path) -> None:
    """It lasts several times as long as its model may keep the GPU while another one is wanted."""
    tokens, hold_s = 40, 0.3
    models = {"a": entry("a", env={"SIMULATOR_TOKENS": str(tokens), "SIMULATOR_TOKENS_PER_S": "20"}), "b": entry("b")}
    with GpuBox(tmp_path, [80], {"MAX_HOLD_SECONDS": str(hold_s)}, config={"models": models}, patch=FAST) as box:
        body = {"model": "a", "prompt": "x", "stream": True}
        with box.daemon.open("POST", "/v1/completions", body) as stream, ThreadPoolExecutor(3) as pool:
            read = events(stream)
            first = next(read)
            other = pool.submit(ask, box, "b")
            wait_until(lambda: [one["status"] for one in box.daemon.instances()
                                if one["configured_as"] == "a"] == ["stopping"])
            late = pool.submit(ask, box, "a")       # it waits for its model's next turn
            rest = list(read)
            assert first.startswith(b"data:") and rest[-1] == b"data: [DONE]\n\n" and len(rest) >= tokens
            assert other.result().status == 200 and late.result().status == 200
        assert box.refused() == []
