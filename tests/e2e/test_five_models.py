"""Five models and room for two, with the real engine: whoever is asked for is loaded, and the one least recently used
goes for it.  The host's memory is the device; sleep is vLLM's own, in development mode."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import pytest

from instances import processes
from scripts.make_models import SENTENCES
from tests.support import wait_until

from .real_daemon import LOAD_S, Model, RealDaemon, make_llama

NAMES = ("one", "two", "three", "four", "five")
PAIRS = {pair for sentence in SENTENCES for pair in pairwise(sentence.split())}
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
    return {"model_path": str(model.folder), "memory_mb": EACH_MB, "max_model_len": 512, "sleep": 1,
            "idle_timeout_seconds": 0, "start_timeout_seconds": LOAD_S}


@pytest.fixture(scope="module")
def loads() -> dict[str, float]:
    """Seconds until the first answer of each model."""
    return {}


def ask(daemon: RealDaemon, name: str) -> float:
    """After how many seconds it has answered, and it does as it should: each word may follow the one before."""
    began = time.monotonic()
    question = {"model": name, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 12, "temperature": 0}
    with daemon.sent("/v1/chat/completions", question) as connection:
        response = connection.getresponse()
        answer = json.loads(response.read())
    took_s = time.monotonic() - began
    assert response.status == 200, (answer, daemon.log)
    assert answer["model"] == name
    words = answer["choices"][0]["message"]["content"].split()
    assert len(words) == 12 and set(pairwise(words)) <= PAIRS, words
    return took_s


def resident(daemon: RealDaemon) -> dict[str, dict[str, Any]]:
    """By name; those that have a process."""
    return {one["aliases"][0] if one["aliases"] else one["model_name"]: one
            for one in daemon.instances() if one["pid"]}


def test_five_models_answer_in_turn_where_two_have_room(world: RealDaemon, loads: dict[str, float],
                                                         note: Callable[[str], None]) -> None:
    with Watch(world) as watch:
        for number, name in enumerate(NAMES):
            loads[name] = ask(world, name)
            assert set(resident(world)) == set(NAMES[max(0, number - 1):number + 1])     # the eldest went
            found = world.instance(resident(world)[name]["id"])
            if number > 1:
                assert f"{NAMES[number - 2]} (idle for " in found["because"], found
                assert found["because"] in world.log
    assert watch.most == 2
    note("five models, room for two: first answers after " + ", ".join(f"{took_s:.1f} s" for took_s in loads.values()))


def test_a_sleeper_answers_sooner_than_a_cold_start(world: RealDaemon, loads: dict[str, float],
                                                    note: Callable[[str], None]) -> None:
    name = NAMES[-1]
    one = resident(world)[name]
    answer = world.post(f"/instances/{one['id']}/sleep")
    assert answer.status in (200, 202), answer
    wait_until(lambda: world.status_of(one["id"]) == "sleeping", LOAD_S)
    wake_s = ask(world, name)
    assert world.instance(one["id"])["pid"] == one["pid"] and world.status_of(one["id"]) == "ready"
    assert wake_s < min(loads.values()) / 2
    warm_s = ask(world, name)
    note(f"asleep: answered after {wake_s:.2f} s (awake: {warm_s:.2f} s; not loaded: {min(loads.values()):.1f} s at "
         "the best)")
