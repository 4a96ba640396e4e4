"""scripts/start.sh, stop.sh, restart.sh and status.sh in a copy of the checkout: what takes longer."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from tests.checkout import Checkout, alive, create, url_of
from tests.daemon import HANG_S, Daemon
from tests.support import wait_until

SCRIPTS = ("start", "stop", "restart", "status")


@pytest.fixture
def checkout(tmp_path: Path) -> Iterator[Checkout]:
    with Checkout(tmp_path) as made:
        yield made


def test_two_starts_at_once_start_one(checkout: Checkout) -> None:
    said = []
    both = [checkout.popen("start", "-d") for _ in range(2)]
    for one in both:
        said.append(one.communicate(timeout=HANG_S)[0])
        assert one.returncode == 0
    assert sorted("runs already" in out for out in said) == [False, True]


def test_a_daemon_that_ends_at_once_shows_the_end_of_its_log(checkout: Checkout) -> None:
    failed = checkout.script("start", "-d", "--", "--port", "http")
    assert failed.code == 1 and "it ended at once (exit code 1)" in failed.err and "APP_PORT=http" in failed.err
    assert checkout.script("status").code == 3


def test_a_file_is_named_as_seen_from_the_caller(checkout: Checkout) -> None:
    (checkout.home / "mine.yaml").write_text("models:\n  small: {model_path: org/small}\n")
    started = checkout.script("start", "-d", "-c", "mine.yaml", cwd=checkout.home)
    assert started.code == 0, started.err

    def names(said: str) -> list[str]:
        answer = requests.get(f"{url_of(said)}/v1/models", timeout=HANG_S).json()
        return [one["id"] for one in answer["data"]]

    assert names(started.out) == ["small"]
    again = checkout.script("restart")      # with the file of before
    assert (again.code, names(again.out.splitlines()[-1])) == (0, ["small"])
    (checkout.home / "mine.yaml").write_text("models: [\n")
    refused = checkout.script("restart")    # what would not start again is not stopped
    assert refused.code == 1 and "mine.yaml" in refused.err and alive(checkout.pid)
    assert checkout.script("start", "-c", "nowhere.yaml").code == 0     # it runs already


def test_a_restart_keeps_models_loaded_where_that_is_asked_for(tmp_path: Path) -> None:
    with Checkout(tmp_path, {"KEEP_INSTANCES": "true"}) as checkout:
        engine = create(url_of(checkout.script("start", "-d").out))["pid"]
        before = checkout.pid
        again = checkout.script("restart")
        assert again.code == 0 and checkout.pid != before
        url = url_of(again.out.splitlines()[-1])

        def instance() -> dict[str, Any]:
            [one] = requests.get(f"{url}/instances", timeout=HANG_S).json()["data"]
            found: dict[str, Any] = one
            return found

        assert instance()["pid"] == engine
        wait_until(lambda: instance()["status"] == "ready")
        assert instance()["pid"] == engine
        assert checkout.script("stop").code == 0


def test_force_ends_one_that_hangs_and_its_engines(checkout: Checkout) -> None:
    service = checkout.path / "scripts" / "service.py"
    service.write_text(service.read_text().replace("HURRY_S = 30.0 ", "HURRY_S = 1.0 "))
    engine = create(url_of(checkout.script("start", "-d").out))["pid"]
    os.kill(checkout.pid, signal.SIGSTOP)
    done = checkout.script("stop", "-f")
    assert done.code == 0 and "does not answer" in done.out
    assert not alive(engine)
    assert list((checkout.state / "instances").iterdir()) == []
    assert checkout.script("status").code == 3


def test_force_cuts_what_is_in_flight(checkout: Checkout) -> None:
    url = url_of(checkout.script("start", "-d").out)
    engine = create(url)["pid"]
    body = {"model": "m", "prompt": "x", "max_tokens": 60_000, "stream": True}
    with requests.post(f"{url}/v1/completions", json=body, stream=True, timeout=HANG_S) as stream:
        next(stream.iter_content(1))
        assert checkout.script("stop", "-f").out.endswith("stopped\n")
    assert not alive(engine)


def test_in_the_foreground_it_is_the_daemon_itself(checkout: Checkout) -> None:
    with checkout.popen("start") as foreground:
        wait_until(lambda: checkout.script("status").code == 0)
        assert checkout.pid == foreground.pid
        assert checkout.script("stop").code == 0
        _, log = foreground.communicate(timeout=HANG_S)
        assert foreground.returncode == 0 and "listens on" in log and "stopped" in log


def test_a_daemon_that_others_started_is_seen_and_left(checkout: Checkout) -> None:
    with Daemon(checkout.home / "other", {"STATE_DIR": str(checkout.state)}) as other:
        status = checkout.script("status")
        assert status.code == 0 and f"pid {other.pid}, not started by" in status.out
        stop = checkout.script("stop")
        assert stop.code == 0 and str(other.pid) in stop.out
        failed = checkout.script("start", "-d")
        assert failed.code == 1 and "is in use by another daemon" in failed.err
        assert other.get("/health").status == 200
