"""The routes for those who watch, with the daemon and a simulated engine."""

from __future__ import annotations

import json
from collections.abc import Iterator
from http.client import HTTPResponse
from pathlib import Path
from typing import Any

import pytest

from tests.daemon import Daemon
from tests.support import wait_until

pytestmark = pytest.mark.whole

ADMIN = {"Authorization": "Bearer admin-key"}
USER = {"Authorization": "Bearer user-key"}
KEYS = {"API_KEYS": "bob:user-key", "ADMIN_API_KEYS": "root:admin-key"}


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    folder = tmp_path_factory.mktemp("live")
    (folder / "config.yaml").write_text("models:\n  cold: {model_path: org/cold}\n"
                                        "  broken: {model_path: org/broken, params: {additional_config: {sim: "
                                        "{fail: unsupported_architecture}}}}\n")
    with Daemon(folder, patch={"web.figures.EVERY_S": 0.2}) as running:
        yield running
        running.remove()


def told(response: HTTPResponse) -> Iterator[dict[str, Any]]:
    for line in iter(response.readline, b""):
        if line.startswith(b"data: "):
            yield json.loads(line[6:])


def chat(daemon: Daemon, model: str, text: str = "hello", headers: dict[str, str] | None = None) -> int:
    return daemon.post("/v1/chat/completions", {"model": model, "messages": [{"role": "user", "content": text}],
                                                "max_tokens": 20}, headers).status


def listed(daemon: Daemon, path: str, headers: dict[str, str] | None = None) -> list[dict[str, Any]]:
    answer = daemon.get(path, headers)
    assert answer.status == 200, answer
    found: list[dict[str, Any]] = answer.json["data"]
    return found


def test_a_load_is_told_from_its_beginning_to_its_figures(daemon: Daemon) -> None:
    with daemon.open("GET", "/admin/events?follow=1") as response:
        assert response.status == 200 and response.getheader("Content-Type", "").startswith("text/event-stream")
        events = told(response)
        assert next(events)["event"] == "hello"
        assert chat(daemon, "cold") == 200
        states: list[str] = []
        for event in events:
            if event["event"] == "state" and event["model"] == "cold":
                states.append(event["to"])
            if event["event"] == "sample" and (event["models"].get("cold", {}).get("tokens_per_s") or 0) > 0:
                break
        assert states == ["starting", "ready"]
    wait_until(lambda: daemon.get("/admin/events?tail=500").json["data"][-1]["to"] == "ready")
    wait_until(lambda: max(daemon.get("/admin/history").json["models"]["cold"]["requests_per_s"]) > 0)
    history = daemon.get("/admin/history").json
    (one,) = [one for one in history["instances"].values() if one["model"] == "cold"]
    assert len(one["tokens_per_s"]) == len(history["at"]) == len(history["total"]["requests_per_s"])
    assert max(value or 0 for value in one["tokens_per_s"]) > 0
    assert daemon.get(f"/admin/history?since={history['at'][-1]}").json["at"] != history["at"]
    (load,) = [one for one in daemon.get("/load-stats").json["servers"] if "cold" in one["models"]]
    assert {"tokens_per_s", "requests_per_s", "ttft_s", "cache_usage", "waiting"} <= load.keys()
    assert daemon.instance(load["id"])["load"].keys() >= {"tokens_per_s", "cache_usage", "waiting"}


def test_requests_are_listed_without_what_they_asked(daemon: Daemon) -> None:
    answer = daemon.post("/v1/chat/completions", {"model": "cold", "messages": [
        {"role": "user", "content": "the secret prompt"}], "max_tokens": 2}, {"X-Request-Id": "mine"})
    assert answer.status == 200
    assert chat(daemon, "nobody") == 404
    wait_until(lambda: all(one["seconds"] is not None for one in listed(daemon, "/admin/requests")))
    good, bad = listed(daemon, "/admin/requests?tail=2")
    assert good["request_id"] == "mine" and good["model"] == "cold" and good["status"] == 200 and good["code"] is None
    assert 0 < good["first_byte_s"] <= good["seconds"] and good["backend"] in [one["id"] for one in daemon.instances()]
    assert bad["status"] == 404 and bad["code"] == "model_not_found" and bad["model"] is None
    assert listed(daemon, "/admin/requests?failed=1")[-1] == bad
    assert b"secret prompt" not in daemon.get("/admin/requests").body


def test_a_load_that_fails_stands_among_the_failed(daemon: Daemon) -> None:
    assert chat(daemon, "broken") >= 400
    last = listed(daemon, "/admin/requests?failed=1")[-1]
    assert last["model"] == "broken" and last["code"] == "unsupported_architecture" and last["backend"] is None
    assert [one["to"] for one in listed(daemon, "/admin/events") if one.get("model") == "broken" and "to" in one][-1] \
        == "failed"


def test_listeners_cost_no_request_threads(tmp_path: Path) -> None:
    with Daemon(tmp_path, {"APP_THREADS": "8"}) as daemon:
        open_ones = [daemon.socket() for _ in range(40)]
        for one in open_ones:
            one.sendall(b"GET /admin/events HTTP/1.1\r\nHost: localhost\r\nAccept: text/event-stream\r\n\r\n")
        for one in open_ones:
            assert one.recv(15) == b"HTTP/1.1 200 OK"
        assert daemon.get("/health").status == 200
        assert daemon.stop() == 0               # with all of them still there
        for one in open_ones:
            while one.recv(1 << 16):
                pass
            one.close()


@pytest.mark.parametrize(("path", "param"), [
    ("/admin/history?since=x", "since"), ("/admin/history?since=nan", "since"), ("/admin/events?tail=-1", "tail"),
    ("/admin/events?follow=yes", "follow"), ("/admin/requests?tail=5000", "tail")])
def test_bad_parameters_are_named(daemon: Daemon, path: str, param: str) -> None:
    answer = daemon.get(path)
    assert answer.status == 400 and answer.error["param"] == param


def test_only_who_may_manage_may_watch(tmp_path: Path) -> None:
    with Daemon(tmp_path, KEYS) as daemon:
        for path in ("/admin/history", "/admin/events?follow=1", "/admin/requests"):
            assert daemon.get(path, USER).status == 401 and daemon.call("HEAD", path, headers=ADMIN).status == 200
        assert chat(daemon, "nobody", headers=USER) == 404
        (one,) = listed(daemon, "/admin/requests", ADMIN)
        assert one["key"] == "bob" and "user-key" not in json.dumps(one)
