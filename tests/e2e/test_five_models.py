"""Five models and room for two, with the real engine: whoever is asked for is loaded, and the one least recently used
goes for it.  The host's memory is the device; sleep is vLLM's own, in development mode."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from instances import processes

from .real_daemon import LOAD_S, Model, RealDaemon, make_llama

NAMES = ("one", "two", "three", "four", "five")
EACH_MB, BUDGET_MB = 2500, 5500         # the tree of such an engine takes 1.9 GB


class Watch:
    """How many engines there were at any moment, looked at ten times a second."""

    def __init__(self, daemon: RealDaemon) -> None:
        self.most = 0
        self._daemon = daemon
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch")

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._over.wait(0.1):
            pids = [one["pid"] for one in self._daemon.instances() if one["pid"]]
            self.most = max(self.most, sum(bool(processes.session_members(pid)) for pid in pids))


@pytest.fixture(scope="module")
def world(engine: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealDaemon]:
    folder = tmp_path_factory.mktemp("five")
    models = {name: make_llama(folder / f"llama-{name}", name) for name in NAMES}
    daemon = RealDaemon(folder / "daemon", engine, {"HOST_MEMORY_BUDGET_MB": str(BUDGET_MB)})
    daemon.folder.mkdir()
    (daemon.folder / "config.yaml").write_text(json.dumps({"models": {
        name: entry(model) for name, model in models.items()}}))
    with daemon:
        yield daemon
        daemon.remove()


def entry(model: Model) -> dict[str, Any]:
    """It sleeps when nobody has asked for it for a minute and a half."""
    return {"model_path": str(model.folder), "memory_mb": EACH_MB, "max_model_len": 512, "sleep": 1,
            "idle_timeout_seconds": 0, "start_timeout_seconds": LOAD_S}


def ask(daemon: RealDaemon, name: str) -> tuple[str, float]:
    """What it says, and after how many seconds.  Each model knows the same sentences."""
    began = time.monotonic()
    answer = daemon.post("/v1/chat/completions", {
        "model": name, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 12, "temperature": 0})
    assert answer.status == 200, answer
    assert answer.json["model"] == name
    return answer.json["choices"][0]["message"]["content"], time.monotonic() - began


def resident(daemon: RealDaemon) -> dict[str, dict[str, Any]]:
    """By name; those that have a process."""
    return {one["aliases"][0] if one["aliases"] else one["model_name"]: one
            for one in daemon.instances() if one["pid"]}


def test_five_models_answer_in_turn_where_two_have_room(world: RealDaemon, note: Callable[[str], None]) -> None:
    said, loads = set(), []
    with Watch(world) as watch:
        for number, name in enumerate(NAMES):
            text, took_s = ask(world, name)
            said.add(text)
            loads.append(took_s)
            assert set(resident(world)) == set(NAMES[max(0, number - 1):number + 1])     # the eldest went
            found = world.instance(resident(world)[name]["id"])
            if number > 1:
                assert NAMES[number - 2] in found["because"], found
                assert found["because"] in world.log
    assert len(said) == 1 and all(word in said.pop() for word in ("the",))
    assert watch.most == 2
    note("five models, room for two: first answers after " + ", ".join(f"{took_s:.1f} s" for took_s in loads))


def test_the_one_used_last_stays(world: RealDaemon) -> None:
    assert set(resident(world)) == {"four", "five"}
    ask(world, "four")
    ask(world, "one")
    assert set(resident(world)) == {"four", "one"}
