"""The SDK, the command and the monitor with models of config.yaml: load, unload, sleep, wake."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.command import ARGV, OnTerminal, environment, vllm_server
from tests.daemon import Daemon
from tests.sdk import CLIENTS
from tests.support import wait_until
from tests.test_on_demand import entry, running
from tests.tmux import Tmux, needs_tmux
from vllm_server_client import Conflict, NotFound, ServerError
from vllm_server_client.cli.exits import Exit

pytestmark = pytest.mark.whole


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    with running(tmp_path_factory.mktemp("models"), {
            "org/one": entry({"start_s": 0.5}, aliases=["uno"]), "sleeper": entry(model_path="org/sleeper", sleep=1),
            "bad": entry({"fail": "no_weights"}, model_path="org/bad")}) as daemon:
        yield daemon


@pytest.fixture
def daemon(server: Daemon) -> Iterator[Daemon]:
    yield server
    server.remove()


@pytest.fixture(params=CLIENTS)
def sdk(daemon: Daemon, request: pytest.FixtureRequest) -> Iterator[Any]:
    with CLIENTS[request.param](f"http://127.0.0.1:{daemon.port}") as client:
        yield client


def test_a_configured_model_is_loaded_and_unloaded(sdk: Any) -> None:
    assert {one["id"]: one["status"] for one in sdk.configured_models()} == {
        "org/one": "unloaded", "sleeper": "unloaded", "bad": "unloaded"}
    loading = sdk.load("uno")
    assert loading["id"] == "org/one" and loading["instances"]
    assert sdk.load("org/one", wait=True)["status"] == "ready"
    assert sdk.configured_model("uno")["aliases"] == ["uno"]
    assert sdk.unload("uno", force=True, wait=True)["status"] == "unloaded"
    with pytest.raises(NotFound):
        sdk.load("nobody")
    with pytest.raises(ServerError) as caught:
        sdk.load("bad", wait=True)
    assert caught.value.code == "no_weights"


def test_a_plan_tells_what_a_load_would_do(sdk: Any, daemon: Daemon) -> None:
    found = sdk.plan("uno")
    assert found["model"] == "org/one" and found["fits"] and found["gpus"] == [0] and found["stop"] == []
    assert daemon.instances() == []
    with pytest.raises(NotFound):
        sdk.plan("nobody")


def test_an_instance_sleeps_and_wakes(sdk: Any) -> None:
    one = sdk.load("sleeper", wait=True)["instances"][0]
    assert sdk.sleep_instance(one["id"], wait=True)["status"] == "sleeping"
    assert sdk.instance(one["id"])["asleep"] == 1
    assert sdk.wake_instance(one["id"], wait=True)["status"] == "ready"
    assert sdk.sleep_instance(one["id"], level=2, wait=True)["asleep"] == 2
    awake = sdk.load("org/one", wait=True)["instances"][0]
    with pytest.raises((Conflict, ServerError)):
        sdk.sleep_instance(awake["id"])
    made = sdk.create_instance("org/other", sleep=1, stop_after=60, wait=True)
    assert (made["sleep"], made["stop_after"]) == (1, 60)


def test_what_was_managed_is_listed(sdk: Any) -> None:
    sdk.unload("uno")
    entry = sdk.audit(tail=1)[0]
    assert (entry["method"], entry["path"]) == ("POST", "/admin/models/uno/unload") and entry["from"] == "127.0.0.1"


def test_the_command_loads_by_configuration_and_unloads(daemon: Daemon) -> None:
    done = vllm_server(daemon, "load", "uno")
    assert done.code == 0 and "ready" in done.out and done.err.startswith("uno: "), done
    assert daemon.instances()[0]["configured_as"] == "org/one"
    assert vllm_server(daemon, "load", "uno", "--json").json["id"] == daemon.instances()[0]["id"]
    assert vllm_server(daemon, "unload", "uno").out == "org/one is unloaded\n"
    assert daemon.instances() == []
    assert "unloaded" in vllm_server(daemon, "models").out
    assert vllm_server(daemon, "unload", "nobody").code == Exit.NOT_FOUND
    failed = vllm_server(daemon, "load", "bad")
    assert failed.code == Exit.LOAD_FAILED and "no weights" in failed.err.lower()
    assert vllm_server(daemon, "load", "org/other").code == 0       # not configured: made from its name
    assert "/admin/models/uno/load" in vllm_server(daemon, "audit", "-n", "9").out


def test_the_command_plans_and_expects_what_it_took_before(daemon: Daemon) -> None:
    vllm_server(daemon, "load", "uno")
    vllm_server(daemon, "unload", "uno")
    done = vllm_server(daemon, "plan", "uno")
    assert done.code == 0 and done.out.startswith("org/one fits: ") and "takes     about" in done.out, done
    assert vllm_server(daemon, "plan", "uno", "--json").json["seconds_expected"] > 0
    with OnTerminal(daemon, "load", "uno") as terminal:
        assert terminal.wait() == 0
    assert " of about " in terminal.text
    assert vllm_server(daemon, "plan", "nobody").code == Exit.NOT_FOUND


def test_a_plan_that_does_not_fit_has_a_code_of_its_own(tmp_path: Path) -> None:
    huge = entry(model_path="org/huge", memory_mb=2000)
    with running(tmp_path, {"huge": huge}, {"HOST_MEMORY_BUDGET_MB": "1000"}) as daemon:
        done = vllm_server(daemon, "plan", "huge")
        assert done.code == Exit.UNAVAILABLE and "does not fit" in done.out, done


def test_the_command_puts_to_sleep_and_wakes(daemon: Daemon) -> None:
    assert vllm_server(daemon, "load", "sleeper").code == 0
    assert vllm_server(daemon, "sleep", "sleeper", "--json").json[0]["status"] == "sleeping"
    assert "sleeping" in vllm_server(daemon, "ps").out
    assert vllm_server(daemon, "wake", "sleeper", "--json").json[0]["status"] == "ready"
    assert vllm_server(daemon, "sleep", "sleeper", "--no-wait").code == 0
    assert vllm_server(daemon, "load", "sleeper").code == 0     # which wakes it
    assert daemon.instances()[0]["status"] == "ready"
    assert vllm_server(daemon, "wake", "nobody").code == Exit.NOT_FOUND
    one = vllm_server(daemon, "load", "org/plain", "--json").json
    assert vllm_server(daemon, "sleep", one["id"]).code == Exit.FAILED


def test_chat_loads_and_wakes_what_it_needs(daemon: Daemon) -> None:
    done = vllm_server(daemon, "chat", "uno", "Hello", "-m", "5")
    assert done.code == 0 and "simulated" in done.out and done.err.startswith("uno: ")
    vllm_server(daemon, "load", "sleeper")
    vllm_server(daemon, "sleep", "sleeper")
    assert "simulated" in vllm_server(daemon, "chat", "sleeper", "Hello", "-m", "5").out


@needs_tmux
def test_the_monitor_loads_what_is_configured_and_puts_it_to_sleep(daemon: Daemon) -> None:
    with Tmux([*ARGV, "top", "--interval", "0.2"], environment(daemon)) as screen:
        screen.wait_for("no instances")
        screen.keys("l")
        screen.wait_for("Load a model", "sleeper", "(unloaded)")
        screen.keys("sleeper", "Enter")
        screen.wait_for("1 of 1 ready")
        assert daemon.instances()[0]["configured_as"] == "sleeper"
        screen.keys("s")
        screen.wait_for("is sleeping", "0 of 1 ready")
        screen.keys("s")
        screen.wait_for("1 of 1 ready")
        wait_until(lambda: daemon.instances()[0]["status"] == "ready")
        screen.keys("q")
        screen.wait_for("exit=0")


@pytest.mark.parametrize("kind", CLIENTS.values(), ids=CLIENTS)
def test_a_stream_waits_for_its_model_past_the_comments(tmp_path: Path, kind: Any) -> None:
    with (Daemon(tmp_path, patch={"routing.commented.AFTER_S": 0.1, "routing.commented.EVERY_S": 0.05}) as daemon,
          kind(f"http://127.0.0.1:{daemon.port}") as sdk):
        daemon.create("org/slow", sim={"start_s": 1}, wait=False)
        messages = [{"role": "user", "content": "Hello"}]
        assert "simulated" in "".join(sdk.chat_completion_stream("org/slow", messages))
        daemon.create("org/bad", sim={"start_s": 5, "fail": "no_weights"}, wait=False)
        with pytest.raises(ServerError) as caught:
            list(sdk.chat_completion_stream("org/bad", messages))
        assert (caught.value.code, caught.value.status) == ("no_weights", None)
