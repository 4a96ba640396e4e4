"""The OpenAPI document: valid, true to the routes both ways, and to what the daemon really answers."""

from __future__ import annotations

import json
import re
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from openapi_spec_validator import validate

from tests import contract
from tests.daemon import Daemon
from tests.support import wait_until
from tests.test_docs import routes
from vllm_server_client import types
from web import auth
from web.openapi import document
from web.openapi_routes import INFER, MANAGE, OPEN, ROUTES
from web.openapi_schemas import SCHEMAS


def documented() -> set[str]:
    """As test_docs.routes() writes them."""
    found: dict[str, set[str]] = {}
    for route in ROUTES:
        found.setdefault(re.sub(r"{(\w+)}", r"<\1>", route.path), set()).add(route.method)
    return {f"{method} {path}" for path, methods in found.items()
            for method in (["ANY"] if len(methods) == 5 else methods)}


# --- the document -----------------------------------------------------------------------------------------------------

def test_it_is_valid() -> None:
    validate(document("0.1.0"))


def test_it_has_every_route_and_no_other() -> None:
    assert documented() == routes(), "add the route to web/openapi_routes.py"


def test_every_schema_is_used_and_every_route_says_what_it_is_for() -> None:
    text = json.dumps(document("0.1.0"))
    assert [name for name in SCHEMAS if f'"#/components/schemas/{name}"' not in text] == []
    assert [route.call for route in ROUTES if not route.summary or not route.answers] == []
    ids = re.findall(r'"operationId": "(\w+)"', text)
    assert len(ids) == len(set(ids)) == len(ROUTES)


def test_who_may_call_is_what_the_daemon_checks() -> None:
    for route in ROUTES:
        path = re.sub(r"{\w+}", "x", route.path)
        access = MANAGE if auth.is_management(path) else OPEN if auth.is_open(path) else INFER
        assert route.access == access, route.call


@pytest.mark.parametrize(("name", "shape"), [
    (name, getattr(types, {"Reloaded": "Reload"}.get(name, name))) for name in SCHEMAS
    if hasattr(types, {"Reloaded": "Reload"}.get(name, name))])
def test_the_sdks_types_have_the_same_keys(name: str, shape: Any) -> None:
    assert typing.get_type_hints(shape).keys() == SCHEMAS[name]["properties"].keys()


# --- what is answered -------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """With a model of config.yaml, one by hand, one that failed, and a server that is down."""
    folder = tmp_path_factory.mktemp("openapi")
    (folder / "config.yaml").write_text("models:\n  conf: {model_path: org/conf, aliases: [other], gpus: 1, "
                                        "params: {max_model_len: 512}, env: {A: b}}\n")
    (folder / "servers.toml").write_text(
        '[servers]\nservers = [{ url = "http://127.0.0.1:9", max_concurrent_requests = 2, models = ["far"] }]\n')
    with Daemon(folder) as daemon:
        daemon.create("org/tiny", params={"served_model_name": "demo"}, sleep=1)
        daemon.create("org/bad", sim={"fail": "length_too_large"}, wait=False)
        wait_until(lambda: any(one["status"] == "failed" for one in daemon.instances()))
        yield daemon


def found(daemon: Daemon, status: str) -> str:
    return next(one["id"] for one in daemon.instances() if one["status"] == status)


def test_it_is_served(daemon: Daemon) -> None:
    assert daemon.get("/openapi.json").json == document(daemon.get("/version").json["version"])


def test_every_answer_that_looks_is_as_described(daemon: Daemon) -> None:
    """Each is held against its schema, in which nothing may be that is not described, by Daemon.call."""
    values = {"instance_id": found(daemon, "ready"), "name": "demo", "response_id": "r", "path": "v1/models",
              "file": "app.js"}
    for route in ROUTES:
        if route.method != "GET" or route.path == "/v1/realtime":
            continue
        path = re.sub(r"{(\w+)}", lambda word: values[word[1]], route.path)
        status = 404 if "response_id" in route.path else 200
        assert daemon.get(path).status == status, path
    assert daemon.get("/admin/models/conf").json["status"] == "unloaded"
    assert daemon.get(f"/instances/{found(daemon, 'failed')}").json["last_error"]["code"] == "max_model_len_too_large"
    assert daemon.get("/v1/models/far").json["status"] in ("down", "ready", "unloaded")


def test_every_answer_that_changes_something_is_as_described(daemon: Daemon) -> None:
    ready = found(daemon, "ready")
    statuses = [daemon.post(path, body).status for path, body in (
        (f"/instances/{ready}/sleep", {"wait": True}), (f"/instances/{ready}/wake", {"wait": True}),
        ("/admin/models/conf/load", {"wait": True}), ("/v1/chat/completions", {"model": "other", "messages": []}),
        ("/v1/completions", {"model": "other", "prompt": "x"}), ("/admin/models/conf/unload", {"wait": True}),
        ("/admin/reload", None), ("/instances", {"model_name": "org/two"}), ("/instances", {"model_name": "org/two"}),
        ("/instances", {"model_name": "org/two", "params": {"seed": 1}}), ("/instances", {"model_name": 1}),
        ("/instances", b"{"), ("/admin/models/none/load", {}), ("/v1/chat/completions", {"model": "none"}),
        ("/v1/embeddings", {}))]
    assert statuses == [200, 200, 200, 200, 200, 200, 200, 201, 200, 409, 400, 415, 404, 404, 400]
    for path, body in (("/v1/chat/completions", {"messages": []}), ("/v1/completions", {"prompt": "x"})):
        answer = daemon.post(path, {"model": "demo", **body})
        contract.check("POST", path, answer.status, answer.headers, answer.body, engine=True)
        assert answer.status == 200
    two = next(one["id"] for one in daemon.instances() if one["model_name"] == "org/two")
    assert daemon.delete(f"/instances/{two}?wait=1").status == 200
    assert daemon.get("/admin/audit").json["data"]
    assert daemon.get("/v1/realtime?model=demo").status == 426


def test_an_answer_that_is_not_described_fails() -> None:
    """Else nothing above means anything."""
    kind = {"content-type": "application/json"}
    good = {"version": "1", "simulated": True}
    contract.check("GET", "/version", 200, kind, json.dumps(good).encode())
    for status, body in ((200, {**good, "more": 1}), (200, {"version": "1"}), (200, {**good, "version": 1}),
                         (409, good), (500, {"error": "x"})):
        with pytest.raises(AssertionError):
            contract.check("GET", "/version", status, kind, json.dumps(body).encode())
    with pytest.raises(AssertionError):
        contract.check("GET", "/admin/models/a/b/plan", 200, kind, json.dumps(good).encode())
    with pytest.raises(AssertionError):
        contract.check("GET", "/version", 200, {"content-type": "text/html"}, b"x")
    contract.check("GET", "/nothing", 200, {}, b"")


def test_a_key_is_asked_for_as_described(tmp_path: Path) -> None:
    with Daemon(tmp_path, {"API_KEYS": "user-key", "ADMIN_API_KEYS": "admin-key"}) as daemon:
        for route in ROUTES:
            path = re.sub(r"{\w+}", "x", route.path)
            status = daemon.call(route.method, path, b"" if route.method == "POST" else None).status
            assert (status == 401) == (route.access != OPEN), route.call
            for header in ({"Authorization": "Bearer admin-key"}, {"x-api-key": "admin-key"}):
                assert daemon.call(route.method, path, None, header).status != 401, route.call
