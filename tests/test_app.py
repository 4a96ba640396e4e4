"""app.create_app: every error in the envelope, whatever raised it.  The manager behind the routes is a fake."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from flask.testing import FlaskClient
from werkzeug.test import TestResponse

import errors
from app import Deps, create_app
from config import Difference, Settings, load_settings
from configuration.keys import parse_keys
from instances.demand import Loadable
from instances.instance import InstanceSpec, InstanceView, Problem, State
from instances.resources import is_simulated
from routing.remote import Fleet
from routing.upstream import ClientLeft
from web.live import Live
from web.reloader import Reloaded
from web.shown import hide_secrets

SPEC = InstanceSpec("org/m", ("alias", "org/m"), {"dtype": "auto", "hf_token": "hf_secret"}, {"hf_token": "hf_secret"},
                    600.0, 600.0, sleep_level=1, stop_after_s=60.0, env={"DB_PASSWORT": "x"}, memory_bytes=5,
                    priority=3, pinned=True, config_id="alias")
VIEW = InstanceView(
    id="ab12cd34", spec=SPEC, names=("alias", "org/m"), state=State.READY, why="health answered", phase="ready",
    progress=1.0, port=9000, pid=42, devices=(0,), memory_planned_bytes=None, memory_measured_bytes=7, in_flight=1,
    created_at=1000.5, last_used_at=1001.5, expires_in_s=599.0, restarts=2, retry_in_s=None, log_path="/nowhere",
    last_error=Problem("engine_died", "it died", "a line", suggestion={"max_model_len": 8}), engine={},
    because="GPU 0: room")


@dataclass
class FakeManager:
    """Holds one instance; raises `error` whatever it is asked."""

    settings: Settings = field(default_factory=lambda: load_settings({"HOME": "/nowhere"}, cwd=Path("/nowhere")))
    error: Exception | None = None
    views: list[InstanceView] = field(default_factory=lambda: [VIEW])

    def _check(self) -> None:
        if self.error is not None:
            raise self.error

    def snapshot(self) -> list[InstanceView]:
        self._check()
        return self.views

    def get(self, instance_id: str) -> InstanceView:
        self._check()
        return self.views[0]

    def create(self, request: object) -> tuple[InstanceView, bool]:
        self._check()
        return self.views[0], True

    def stop(self, instance_id: str, *, force: bool = False) -> InstanceView:
        self._check()
        return replace(self.views[0], state=State.STOPPING)

    def model_names(self) -> list[str]:
        return [name for view in self.views for name in view.names]

    def loadable(self) -> list[Loadable]:
        return []

    def in_flight(self) -> int:
        return 3


@pytest.fixture
def manager() -> FakeManager:
    return FakeManager()


@pytest.fixture
def client(manager: FakeManager) -> FlaskClient:
    return client_of(manager)


def client_of(manager: FakeManager, reload: Callable[[], Reloaded] | None = None) -> FlaskClient:
    router = cast(Any, SimpleNamespace(manager=manager, watch=None, fleet=Fleet(), started_at=7, view=None))
    audit = cast(Any, SimpleNamespace(note=lambda *_: None))
    reloader = cast(Any, SimpleNamespace(reload=reload, problem=None))
    watched = Live(router, simulated=is_simulated(manager.settings.command))
    return create_app(Deps(cast(Any, manager), router, reloader, audit, watched)).test_client()


def error_of(answer: TestResponse) -> dict[str, Any]:
    assert answer.mimetype == "application/json", answer
    body = answer.get_json()
    assert set(body) == {"error"} and set(body["error"]) == {"message", "type", "param", "code"}, body
    assert body["error"]["message"]
    found: dict[str, Any] = body["error"]
    return found


def test_creating_the_app_starts_nothing(manager: FakeManager) -> None:
    manager.error = AssertionError("asked something")
    client_of(manager)


def subclasses(of: type[errors.DaemonError]) -> list[type[errors.DaemonError]]:
    return [of, *(below for each in of.__subclasses__() for below in subclasses(each))]


@pytest.mark.parametrize("kind", subclasses(errors.DaemonError), ids=lambda kind: kind.__name__)
def test_each_of_our_errors(client: FlaskClient, manager: FakeManager, kind: type[errors.DaemonError]) -> None:
    code: dict[str, Any] = {"code": "some_cause"} if issubclass(kind, errors.LoadFailed) else {}
    manager.error = kind("what happened and what to do", param="field", **code)
    answer = client.get("/instances")
    assert answer.status_code == kind.status
    assert error_of(answer) == {"message": "what happened and what to do", "type": kind.type, "param": "field",
                                "code": code.get("code", kind.code)}
    assert "Retry-After" not in answer.headers


def test_retry_after(client: FlaskClient, manager: FakeManager) -> None:
    manager.error = errors.StartTimeout("still loading", retry_after_s=10)
    answer = client.get("/instances")
    assert (answer.status_code, answer.headers["Retry-After"]) == (504, "10")


def test_a_bug_is_logged_and_not_shown(client: FlaskClient, manager: FakeManager,
                                       caplog: pytest.LogCaptureFixture) -> None:
    manager.error = RuntimeError("a secret of ours")
    with caplog.at_level(logging.ERROR):
        answer = client.get("/instances")
    assert answer.status_code == 500
    assert "secret" not in answer.text and error_of(answer)["code"] == "internal_error"
    assert "a secret of ours" in caplog.text


def test_a_path_cannot_write_lines_into_the_log(client: FlaskClient, manager: FakeManager,
                                                caplog: pytest.LogCaptureFixture) -> None:
    manager.error = RuntimeError("boom")
    with caplog.at_level(logging.ERROR):
        client.get("/instances/x%0aFORGED")
    assert not any(line.startswith("FORGED") for line in caplog.text.splitlines())


def test_a_client_that_left_gets_nothing(client: FlaskClient, manager: FakeManager,
                                         caplog: pytest.LogCaptureFixture) -> None:
    manager.error = ClientLeft()
    answer = client.get("/instances")
    assert (answer.status_code, answer.data, caplog.text) == (499, b"", "")


@pytest.mark.parametrize("path", ["/nothing", "/v1", "/v1/", "/v1/nothing", "/v1//models", "/v1//chat/completions",
                                  "/static/x", "/favicon.ico", "/instancesx", "/%00", "/%ff"])
def test_unknown_routes(client: FlaskClient, path: str) -> None:
    answer = client.open(path)
    assert answer.status_code == 404
    error = error_of(answer)
    assert (error["code"], error["type"]) == ("route_not_found", "not_found_error")
    assert error["message"].startswith("there is no route GET /")


@pytest.mark.parametrize(("method", "path", "allowed"), [
    ("PUT", "/instances", {"GET", "HEAD", "OPTIONS", "POST"}), ("POST", "/health", {"GET", "HEAD", "OPTIONS"}),
    ("GET", "/v1/chat/completions", {"OPTIONS", "POST"}), ("DELETE", "/v1/models", {"GET", "HEAD", "OPTIONS"}),
    ("GET", "/admin/reload", {"OPTIONS", "POST"}), ("PATCH", "/instances/x", {"GET", "HEAD", "OPTIONS", "DELETE"})])
def test_wrong_methods(client: FlaskClient, method: str, path: str, allowed: set[str]) -> None:
    answer = client.open(path, method=method)
    assert answer.status_code == 405
    assert error_of(answer)["code"] == "method_not_allowed"
    assert set(answer.headers["Allow"].split(", ")) == allowed


@pytest.mark.parametrize("path", ["/health", "/instances", "/instances/ab12cd34", "/v1/models", "/v1/models/org/m"])
def test_head_is_get_without_the_body(client: FlaskClient, path: str) -> None:
    get, head = client.get(path), client.head(path)
    assert (head.status_code, head.data) == (200, b"")
    assert head.headers["Content-Length"] == str(len(get.data))


def test_a_missing_slash_behind_an_instance_is_a_redirect_that_keeps_the_method(client: FlaskClient) -> None:
    answer = client.post("/proxy/ab12cd34")
    assert answer.status_code == 308
    assert answer.headers["Location"].endswith("/proxy/ab12cd34/")


def test_unauthorized_says_how(manager: FakeManager) -> None:
    manager.settings = replace(manager.settings, api_keys=parse_keys("k"), admin_api_keys=parse_keys("a"))
    for path in ("/v1/models", "/instances", "/nothing"):
        answer = client_of(manager).get(path)
        assert (answer.status_code, answer.headers["WWW-Authenticate"]) == (401, "Bearer")
        assert "Authorization: Bearer" in error_of(answer)["message"]


def test_refusals_say_what_to_do(client: FlaskClient) -> None:
    forwarded = client.get("/instances", headers={"X-Forwarded-For": "10.0.0.1"})
    assert forwarded.status_code == 403 and "ADMIN_API_KEYS" in error_of(forwarded)["message"]


def test_health(client: FlaskClient, manager: FakeManager) -> None:
    starting = replace(VIEW, state=State.STARTING, pid=None)
    failed = replace(VIEW, state=State.FAILED, pid=None)
    manager.views = [VIEW, starting, failed]
    answer = client.get("/health")
    assert answer.status_code == 200
    assert answer.get_json() == {"status": "ok", "instances": 3, "ready": 1, "vllm_processes": 1, "version": "0.1.0",
                                 "config": {"file": None, "error": None}, "simulated": False}


@pytest.mark.parametrize(("command", "simulated"), [
    (("vllm",), False), (("/opt/python", "/x/simulator.py"), True), (("simulator.py",), True),
    (("/x/simulator.py/vllm",), False)])
def test_what_is_simulated_says_so(manager: FakeManager, command: tuple[str, ...], simulated: bool) -> None:
    manager.settings = replace(manager.settings, command=command)
    client = client_of(manager)
    assert is_simulated(command) is simulated
    assert client.get("/health").get_json()["simulated"] is simulated
    assert client.get("/version").get_json()["simulated"] is simulated
    assert client.get("/instances/ab12cd34").get_json()["simulated"] is simulated


def test_load_is_vllms(client: FlaskClient) -> None:
    assert client.get("/load").get_json() == {"server_load": 3}


def test_an_instance_as_people_see_it(client: FlaskClient) -> None:
    assert client.get("/instances/ab12cd34").get_json() == {
        "id": "ab12cd34", "object": "instance", "model_name": "org/m", "aliases": ["alias"], "status": "ready",
        "why": "health answered", "because": "GPU 0: room", "phase": "ready", "progress": 1.0, "port": 9000, "pid": 42,
        "gpus": [0], "memory": {"planned_bytes": None, "measured_bytes": 7, "configured_bytes": 5},
        "params": {"hf_token": "***"}, "flags": {"dtype": "auto", "hf_token": "***"}, "env": ["DB_PASSWORT"],
        "sleep": 1, "asleep": None, "stop_after": 60.0, "priority": 3, "pinned": True, "configured_as": "alias",
        "added_for_load": False, "made_with_new": False, "elapsed": 0.0, "expected": None,
        "timeout": 600.0, "expires_in": 599.0, "in_flight": 1,
        "load": {"tokens_per_s": 0.0, "prompt_tokens_per_s": 0.0, "requests_per_s": 0.0, "ttft_s": None, "in_flight": 0,
                 "waiting": 0.0, "cache_usage": None},
        "created": 1000, "last_used": 1001, "restarts": 2, "retry_in": None, "engine": {}, "simulated": False,
        "last_error": {"code": "engine_died", "message": "it died", "detail": "a line",
                       "suggestion": {"max_model_len": 8}}}
    assert client.get("/instances").get_json()["object"] == "list"


def test_one_model_of_the_list(client: FlaskClient) -> None:
    listed = client.get("/v1/models").get_json()
    assert listed["object"] == "list"
    assert [entry["id"] for entry in listed["data"]] == ["alias", "org/m"]
    assert {entry["object"] for entry in listed["data"]} == {"model"}
    assert {entry["status"] for entry in listed["data"]} == {"ready"}
    assert client.get("/v1/models/org/m").get_json() == listed["data"][1]
    answer = client.get("/v1/models/other")
    assert answer.status_code == 404
    error = error_of(answer)
    assert (error["code"], error["param"], error["type"]) == ("model_not_found", "model", "NotFoundError")
    assert "alias, org/m" in error["message"]


@pytest.mark.parametrize(("query", "param"), [
    ("tail=-1", "tail"), ("tail=x", "tail"), ("tail=", "tail"), ("tail=100001", "tail"), ("tail=1e3", "tail"),
    ("tail=٣", "tail"), ("follow=yes", "follow"), ("follow=2", "follow")])
def test_bad_queries_of_the_log(client: FlaskClient, query: str, param: str) -> None:
    answer = client.get(f"/instances/ab12cd34/logs?{query}")
    assert answer.status_code == 400
    assert error_of(answer)["param"] == param


def test_a_bad_force(client: FlaskClient) -> None:
    answer = client.delete("/instances/ab12cd34?force=maybe")
    assert answer.status_code == 400 and error_of(answer)["param"] == "force"


def test_reload_answers_with_what_changed(manager: FakeManager) -> None:
    reloaded = Reloaded(("max_queue", "catalog"), Difference(added=("a",), changed=("o/b", "c"), restart=("c",)))
    assert client_of(manager, lambda: reloaded).post("/admin/reload").get_json() == {
        "object": "reload", "changed": ["max_queue", "catalog"],
        "models": {"added": ["a"], "removed": [], "changed": ["o/b", "c"]}}
    assert str(reloaded) == "changed: max_queue; models added: a; models changed: o/b, c"

    def bad() -> Reloaded:
        raise errors.BadRequest("not reloaded: .env:3: no", code="bad_config")

    answer = client_of(manager, bad).post("/admin/reload")
    assert answer.status_code == 400 and error_of(answer)["code"] == "bad_config"


@pytest.mark.parametrize(("flags", "shown"), [
    ({"hf_token": "s"}, {"hf_token": "***"}), ({"hf_token": True}, {"hf_token": True}),
    ({"api-key": ["a", "b"]}, {"api-key": "***"}), ({"HF_TOKEN": "s"}, {"HF_TOKEN": "***"}),
    ({"a": {"b": [{"password": "s", "c": 1}]}}, {"a": {"b": [{"password": "***", "c": 1}]}}),
    ({"kv_transfer_config.secret": "s"}, {"kv_transfer_config.secret": "***"}),
    ({"max_num_batched_tokens": 8192, "tokenizer": "t", "tokens_only": True, "tokenizer_mode": "auto"},
     {"max_num_batched_tokens": 8192, "tokenizer": "t", "tokens_only": True, "tokenizer_mode": "auto"})])
def test_secrets_are_hidden_and_nothing_else(flags: dict[str, Any], shown: dict[str, Any]) -> None:
    assert hide_secrets(flags) == shown
