"""What the SDK and the command tell of load, events and requests: `stats`, `events`, `requests`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.command import OnTerminal, vllm_server
from tests.daemon import Daemon
from tests.sdk import CLIENTS
from tests.support import wait_until
from vllm_server_client.cli import stats, words
from vllm_server_client.cli.exits import Exit

pytestmark = pytest.mark.whole


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """With a model that has answered, a request that failed, and a server that is down."""
    folder = tmp_path_factory.mktemp("stats")
    (folder / "servers.toml").write_text(
        '[servers]\nservers = [{ url = "http://127.0.0.1:9", max_concurrent_requests = 2, models = ["far"] }]\n')
    with Daemon(folder) as daemon:
        daemon.create("org/tiny", params={"served_model_name": "demo"})
        assert daemon.post("/v1/completions", {"model": "demo", "prompt": "x", "max_tokens": 5}).status == 200
        assert daemon.post("/v1/completions", {"model": "nobody", "prompt": "x"}).status == 404
        wait_until(lambda: sum(value or 0 for value in daemon.get("/admin/history").json["total"]["tokens_per_s"]) > 0)
        yield daemon


@pytest.fixture(params=CLIENTS)
def sdk(daemon: Daemon, request: pytest.FixtureRequest) -> Iterator[Any]:
    with CLIENTS[request.param](f"http://127.0.0.1:{daemon.port}") as client:
        yield client


def test_the_sdk_tells_of_load_events_and_requests(sdk: Any, daemon: Daemon) -> None:
    assert {one["kind"] for one in sdk.load_stats()["servers"]} == {"instance", "server"}
    whole = sdk.history()
    assert len(whole["at"]) == len(whole["total"]["tokens_per_s"]) > 0
    assert sdk.history(since=whole["at"][-1] + 1e6)["at"] == []
    told = sdk.events()
    assert [one["to"] for one in told if one["event"] == "state"] == ["starting", "ready"]
    assert len(sdk.events(tail=1)) == 1
    feed = iter(sdk.follow_events(after=told[0]["id"]))
    assert next(feed)["id"] == told[1]["id"]
    feed.close()
    assert {one["status"] for one in sdk.recent_requests()} == {200, 404}
    [failed] = sdk.recent_requests(failed=True)
    assert (failed["code"], failed["path"]) == ("model_not_found", "/v1/completions")


def test_stats_shows_backends_and_the_hour(daemon: Daemon) -> None:
    shown = vllm_server(daemon, "stats")
    assert shown.code == 0 and shown.err == ""
    [head] = [line for line in shown.out.splitlines() if line.startswith("backend")]
    assert head.split()[:3] == ["backend", "models", "state"] and "first token" in head
    assert "127.0.0.1:9" in shown.out and "demo" in shown.out and "routing: load" in shown.out
    [hour] = [line for line in shown.out.splitlines() if line.startswith("last hour")]
    requests, tokens = hour.split()[2:4]
    assert (int(requests), int(tokens)) == (2, 5)       # the refused one too
    as_json = vllm_server(daemon, "stats", "--json").json
    assert as_json.keys() == {"servers", "summary", "policy"}


def test_who_may_not_manage_sees_the_load_alone(tmp_path: Path) -> None:
    with Daemon(tmp_path, {"ADMIN_API_KEYS": "admin-key"}) as daemon:
        shown = vllm_server(daemon, "stats")
        assert shown.code == 0 and "no instances and no servers" in shown.out and "last hour" not in shown.out
        assert vllm_server(daemon, "events").code == vllm_server(daemon, "requests").code == Exit.REFUSED


def test_events_are_listed_and_followed(daemon: Daemon) -> None:
    shown = vllm_server(daemon, "events").out.splitlines()
    assert "is starting" in shown[0] and any("demo" in line and "is ready" in line for line in shown)
    assert vllm_server(daemon, "events", "-n", "1", "--json").json[0]["event"] in ("state", "phase")
    with OnTerminal(daemon, "events", "-f", "-n", "1") as terminal:
        one = daemon.create("org/two")
        terminal.wait_for(f"org/two {one['id']} is ready")
        daemon.remove(one["id"])
        terminal.wait_for("is stopped")
        terminal.type("\x03")
        assert terminal.wait() == Exit.INTERRUPTED


def test_requests_are_listed(daemon: Daemon) -> None:
    shown = vllm_server(daemon, "requests").out
    assert "/v1/completions" in shown and "200" in shown and "model_not_found" in shown
    failed = vllm_server(daemon, "requests", "--failed", "--json").json
    assert [one["status"] for one in failed] == [404] and json.dumps(failed).count("prompt") == 0


def test_figures_of_a_span() -> None:
    columns = {"requests_per_s": [1.0, 2.0, None], "tokens_per_s": [10.0, 30.0, None], "ttft_s": [None, 0.5, None],
               "in_flight": [3.0, 1.0, 0.0], "waiting": [0.0, 2.0, 0.0]}
    assert stats.figures_of(columns, [0, 1, 2], 5.0) == ["15", "200", "20", "500 ms", "3", "2"]
    assert stats.figures_of(columns, [], 5.0) == ["0", "0", "-", "-", "0", "0"]
    assert [words.rate(value) for value in (None, 0.0, 0.05, 2.5, 130.4)] == ["-", "0", "0.05", "2.5", "130"]
    assert [words.wait(value) for value in (None, 0.035, 1.25)] == ["-", "35 ms", "1.25 s"]
