"""Keys with limits, as clients of the daemon meet them."""

from __future__ import annotations

import contextlib
import http.client
import json
from collections.abc import Iterator

import pytest

from tests.daemon import Daemon
from tests.support import wait_until

pytestmark = pytest.mark.whole

CONFIG = """
proxy:
  keys:
    - {name: alice, key: sk-alice, models: ["mine*"], concurrent_requests: 1}
    - {name: bob, key: sk-bob, requests_per_minute: 2}
    - {name: carol, key: sk-carol, tokens_per_minute: 20}
    - {name: dave, key: sk-dave, concurrent_requests: 1, tokens_per_minute: 100000}
    - {name: ops, key: sk-ops, admin: true}
"""
CHAT = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 16}


def key(name: str) -> dict[str, str]:
    return {"X-Api-Key": f"sk-{name}"}


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    folder = tmp_path_factory.mktemp("keys")
    (folder / "config.yaml").write_text(CONFIG)
    with Daemon(folder, {"SIMULATOR_TOKENS_PER_S": "50"}) as running:
        for name in ("mine", "other"):
            wanted = {"model_name": f"org/{name}", "params": {"served_model_name": name}, "wait": True}
            assert running.call("POST", "/instances", wanted, key("ops")).status == 201
        yield running


@contextlib.contextmanager
def stream(daemon: Daemon, name: str, tokens: int) -> Iterator[http.client.HTTPResponse]:
    connection = http.client.HTTPConnection("127.0.0.1", daemon.port, timeout=120)
    body = {**CHAT, "model": "mine", "max_tokens": tokens, "stream": True, "stream_options": {"include_usage": True}}
    try:
        connection.request("POST", "/v1/chat/completions", json.dumps(body),
                           {"Content-Type": "application/json", **key(name)})
        with connection.getresponse() as answer:    # which keeps the socket where the connection ends with it
            yield answer
    finally:
        connection.close()


def test_only_its_models(daemon: Daemon) -> None:
    refused = daemon.call("POST", "/v1/chat/completions", {**CHAT, "model": "other"}, key("alice"))
    assert (refused.status, refused.error["code"], refused.error["param"]) == (403, "model_not_allowed", "model")
    assert daemon.call("POST", "/v1/chat/completions", {**CHAT, "model": "mine"}, key("alice")).status == 200
    by_name = {view["model_name"]: view["id"] for view in daemon.get("/instances", key("ops")).json["data"]}
    assert daemon.get(f"/proxy/{by_name['org/other']}/v1/models", key("alice")).status == 403
    assert daemon.get(f"/proxy/{by_name['org/mine']}/v1/models", key("alice")).status == 200
    assert [one["id"] for one in daemon.get("/v1/models", key("alice")).json["data"]] == ["mine"]
    assert daemon.get("/v1/models/other", key("alice")).status == 404
    assert len(daemon.get("/v1/models", key("bob")).json["data"]) == 4


def test_requests_of_a_minute(daemon: Daemon) -> None:
    answers = [daemon.call("POST", "/v1/chat/completions", {**CHAT, "model": "mine"}, key("bob")) for _ in range(3)]
    assert [answer.status for answer in answers] == [200, 200, 429]
    assert answers[2].error["code"] == "rate_limit_exceeded" and "bob" in answers[2].error["message"]
    assert 0 < int(answers[2].headers["retry-after"]) <= 60
    assert daemon.get("/v1/models", key("bob")).status == 200       # what asks no engine is free
    page = daemon.get("/metrics").body.decode()
    assert 'vllm_server_key_requests_total{key="bob",status="200"} 2.0\n' in page and "sk-bob" not in page
    assert 'vllm_server_key_requests_total{key="bob",status="429"} 1.0\n' in page


def test_tokens_of_a_minute(daemon: Daemon) -> None:
    first = daemon.call("POST", "/v1/chat/completions", {**CHAT, "model": "mine"}, key("carol"))
    assert first.status == 200 and first.json["usage"]["total_tokens"] > 16
    # They count when the answer has ended, a moment after its client has it.
    refused = [first]
    wait_until(lambda: refused.append(daemon.call("POST", "/v1/chat/completions", {**CHAT, "model": "mine"},
                                                  key("carol"))) or refused[-1].status == 429)
    assert "tokens" in refused[-1].error["message"]


@pytest.mark.parametrize("name", ["alice", "dave"])
def test_requests_at_one_time_last_as_long_as_their_streams(daemon: Daemon, name: str) -> None:
    """Alice's streams are carried by a relay, dave's by a request thread, which counts his tokens."""
    with stream(daemon, name, 2000) as answer:
        assert answer.status == 200 and answer.read1(10)
        refused = daemon.call("POST", "/v1/chat/completions", {**CHAT, "model": "mine"}, key(name))
        assert (refused.status, refused.headers["retry-after"]) == (429, "1")
    wait_until(lambda: daemon.call("POST", "/v1/chat/completions", {**CHAT, "model": "mine"}, key(name)).status == 200)
    with stream(daemon, name, 8) as answer:
        assert answer.read().endswith(b"data: [DONE]\n\n")
    wait_until(lambda: daemon.call("POST", "/v1/chat/completions", {**CHAT, "model": "mine"}, key(name)).status == 200)


def test_a_wrong_key_and_a_refused_request_hold_nothing(daemon: Daemon) -> None:
    assert daemon.call("POST", "/v1/chat/completions", {**CHAT, "model": "mine"}, key("eve")).status == 401
    for _ in range(3):
        assert daemon.call("POST", "/v1/chat/completions", {**CHAT, "model": "none"}, key("dave")).status == 404
    assert daemon.call("POST", "/v1/chat/completions", {**CHAT, "model": "mine"}, key("dave")).status == 200


def test_a_reload_adds_and_removes_keys_and_touches_nothing_else(daemon: Daemon) -> None:
    pids = [view["pid"] for view in daemon.get("/instances", key("ops")).json["data"]]
    (daemon.folder / "config.yaml").write_text(CONFIG.replace("bob", "frank"))
    assert daemon.call("POST", "/admin/reload", None, key("ops")).status == 200
    assert daemon.get("/v1/models", key("frank")).status == 200
    assert daemon.get("/v1/models", key("bob")).status == 401
    assert [view["pid"] for view in daemon.get("/instances", key("ops")).json["data"]] == pids
    assert "sk-" not in daemon.log_path.read_text() and "sk-" not in (daemon.state / "audit.log").read_text()
