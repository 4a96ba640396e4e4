"""Loading on demand on a box with GPUs: hogs that come, what is told about them, and reloads under load."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.gpu_box import GIB, GpuBox, NoMemory, needs_compiler
from tests.support import wait_until
from tests.traffic import Ask, problems, run_clients

pytestmark = [needs_compiler, pytest.mark.whole]

SOON = {"instances.rooms.HOPELESS_S": 0.5, "instances.demand.NO_ROOM_FOR_S": 0.5,
        "instances.tenancy.MEMORY_WAIT_S": 2.0}
"""How long it is waited for what others hold, and how long a refusal is repeated."""

CHAT = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 3}


def model(gib: float, **more: Any) -> dict[str, Any]:
    knobs = {"start_s": 0.2, "tokens_per_s": 0}
    return {"memory_mb": int(gib * 1024), "params": {"additional_config": {"sim": knobs}}, **more}


def models(**entries: Mapping[str, Any]) -> dict[str, Any]:
    return {"models": {name: {"model_path": f"org/{name}", **entry} for name, entry in entries.items()}}


def ask(box: GpuBox, name: str) -> Any:
    return box.daemon.post("/v1/chat/completions", {"model": name, **CHAT})


def gpus_of(box: GpuBox, name: str) -> list[int]:
    (one,) = [one for one in box.daemon.instances() if one["model_name"] == f"org/{name}"]
    found: list[int] = one["gpus"]
    return found


# --- a hog --------------------------------------------------------------------------------------------------------

def test_the_next_load_plans_around_a_process_that_took_a_gpus_memory(tmp_path: Path) -> None:
    with GpuBox(tmp_path, [80.0, 80.0], config=models(a=model(30), b=model(30))) as box:
        box.hold(0, 60.0)
        assert ask(box, "a").status == 200
        assert gpus_of(box, "a") == [1]
        box.hold(0, 10.0)
        assert ask(box, "b").status == 200
        assert gpus_of(box, "b") == [1]
        assert box.refused() == []


def test_who_finds_no_room_is_told_how_much_is_missing_and_who_holds_it(tmp_path: Path) -> None:
    config = models(kept=model(20, pinned=True), wanted=model(50))
    with GpuBox(tmp_path, [80.0], config=config, patch=SOON) as box:
        assert ask(box, "kept").status == 200
        hog = box.hold(0, 40.0)
        answer = ask(box, "wanted")
        assert answer.status in (503, 507), answer
        assert answer.error["code"] == "no_gpu_memory"
        message = answer.error["message"]
        assert "wanted needs 50.0 GiB" in message and "kept holds 20.0 GiB" in message
        assert str(hog.pid) in message and "40.0 GiB" in message
        assert gpus_of(box, "kept") == [0]          # a pinned one stays
        hog.free()
        box.hold(0, 5.0)
        wait_until(lambda: ask(box, "wanted").status == 200)    # a refusal is repeated for some seconds


def test_one_that_can_never_fit_says_so_at_once(tmp_path: Path) -> None:
    with GpuBox(tmp_path, [80.0], config=models(huge=model(100))) as box:
        answer = ask(box, "huge")
        assert answer.error["code"] == "not_enough_gpus"
        assert 400 <= answer.status < 600 and "huge needs 100.0 GiB" in answer.error["message"]


def test_room_that_a_hog_takes_while_it_is_made_is_found_elsewhere(tmp_path: Path) -> None:
    """The hog comes between the decision and the start."""
    config = models(old=model(40), wanted=model(50))
    with GpuBox(tmp_path, [80.0, 80.0], config=config, patch=SOON) as box:
        elsewhere = box.hold(1, 60.0)
        assert ask(box, "old").status == 200
        box.driver(frees_late_ms=1000)
        answers: list[Any] = []
        client = threading.Thread(target=lambda: answers.append(ask(box, "wanted")))
        client.start()
        try:
            wait_until(lambda: "makes room for wanted" in box.daemon.log)
            box.hold(0, 35.0)           # now neither GPU has room, even when `old` is gone
            wait_until(lambda: box.held(0) < 40)
            elsewhere.free()
        finally:
            client.join()
        assert answers[0].status == 200, answers
        assert gpus_of(box, "wanted") == [1]
        assert box.refused() == []


def test_a_hog_that_comes_while_an_engine_loads_costs_that_start_and_no_request(tmp_path: Path) -> None:
    """It finds no room on its GPU any more and is begun anew on the other one, no larger than before."""
    slow = model(30)
    slow["params"] = {"additional_config": {"sim": {"start_s": 4.0, "tokens_per_s": 0, "weights_mb": 20 * 1024}}}
    with GpuBox(tmp_path, [80.0, 80.0], config=models(a=slow), patch=SOON) as box:
        answers: list[Any] = []
        client = threading.Thread(target=lambda: answers.append(ask(box, "a")))
        client.start()
        try:
            wait_until(lambda: "launched, pid" in box.daemon.log)
            wait_until(lambda: takes_all(box, 0))
        finally:
            client.join()
        assert answers[0].status == 200, answers
        (one,) = box.daemon.instances()
        assert one["gpus"] == [1] and one["memory"]["planned_bytes"] == 30 * GIB
        assert "other processes took its room" in box.daemon.log
        assert any(" a pid " in line for line in box.refused())


def takes_all(box: GpuBox, device: int) -> bool:
    """A hog has come and left a GiB.  False: somebody else took some of it at the same moment."""
    try:
        box.hold(device, box.capacity(device) / GIB - box.held(device) - 1)
    except NoMemory:
        return False
    return True


# --- a reload -----------------------------------------------------------------------------------------------------

NAMES = ("a", "b", "c", "d", "e")


RELOADS: dict[str, Callable[[GpuBox], object]] = {
    "call": lambda box: box.daemon.post("/admin/reload"), "signal": lambda box: box.daemon.signal(signal.SIGHUP),
    "file": lambda box: None}       # it is noticed by itself


@pytest.mark.parametrize("way", RELOADS)
def test_a_reload_under_load_touches_only_what_changed(tmp_path: Path, way: str) -> None:
    config = models(**{name: model(12) for name in NAMES})
    with GpuBox(tmp_path, [80.0], config=config) as box:
        for name in NAMES:
            assert ask(box, name).status == 200
        pids = {name: pid_of(box, name) for name in NAMES}
        over = threading.Event()
        found: list[Any] = []
        load = threading.Thread(target=lambda: found.extend(run_clients(
            f"http://127.0.0.1:{box.daemon.port}", 20,
            lambda client, number: None if over.is_set() else Ask(NAMES[(client + number) % 5], 3), 120)))
        load.start()
        try:
            changed = config["models"]["c"]
            config["models"]["c"] = {**changed, "params": {**changed["params"], "max_num_seqs": 7}}
            box.write_config(config)
            RELOADS[way](box)
            wait_until(lambda: pid_of(box, "c") not in (None, pids["c"]))
            assert ask(box, "c").status == 200
        finally:
            over.set()
            load.join()
        assert problems(found) == [] and len(found) > 20
        assert {name: pid_of(box, name) for name in NAMES if name != "c"} == {
            name: pid for name, pid in pids.items() if name != "c"}
        (one,) = [one for one in box.daemon.instances() if one["model_name"] == "org/c"]
        assert one["flags"]["max_num_seqs"] == 7
        box.daemon.remove()


def pid_of(box: GpuBox, name: str) -> int | None:
    """Of its newest instance that runs."""
    found = [one for one in box.daemon.instances() if one["model_name"] == f"org/{name}" and one["status"] == "ready"]
    return max(found, key=lambda one: one["created"])["pid"] if found else None


def test_a_bad_file_changes_nothing(tmp_path: Path) -> None:
    with GpuBox(tmp_path, [80.0], config=models(a=model(12))) as box:
        assert ask(box, "a").status == 200
        pid = pid_of(box, "a")
        for text in ("models: [", "models: {c: {memory_mb: plenty}}", "modles: {}"):
            (box.daemon.folder / "config.yaml").write_text(text)
            answer = box.daemon.post("/admin/reload")
            assert answer.status == 400 and "config.yaml:1" in answer.error["message"]
            assert "config.yaml:1" in str(box.daemon.get("/health").json)
            assert "config.yaml:1" in box.daemon.log
            assert pid_of(box, "a") == pid and ask(box, "a").status == 200
        box.daemon.remove()
