"""Whether an answer is one that the OpenAPI document promises.  Every answer that `Daemon.call` gets is asked."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping
from functools import cache
from typing import Any

from jsonschema import Draft202012Validator

from web.openapi import document
from web.openapi_schemas import OF_THE_ENGINE

BEFORE_ANY_ROUTE = frozenset({413, 417, 431, 501, 505})
"""What is refused as HTTP."""
LONG = frozenset({"name", "path"})
"""What may hold slashes in a path."""


def check(method: str, target: str, status: int, headers: Mapping[str, str], body: bytes, *,
          engine: bool = False) -> None:
    """Raises AssertionError when a route of the document answers what it does not promise.  Names of `headers` are in
    lower case.  What is no route, or another method of one, is not looked at, nor what an engine answers, which may be
    anything, unless `engine` says that it is vLLM or the simulator."""
    path = target.partition("?")[0]
    route = _route(method, path)
    if route is None or status in BEFORE_ANY_ROUTE:
        return
    where = f"{method} {path} answered {status}, and web/openapi_routes.py"
    answers = operation(*route)["responses"]
    if str(status) not in answers:
        assert "default" in answers, f"{where} does not have that: {body[:500]!r}"
        return
    content = _resolved(answers[str(status)]).get("content")
    if content is None or method == "HEAD":
        return
    ours = "default" not in answers or (status >= 400 and _is_envelope(headers, body))
    if not (ours or engine):
        return
    if status >= 400:
        content = {"application/json": {}}          # nothing else is ours
    kind = headers.get("content-type", "").partition(";")[0]
    assert kind in content, f"{where} has {', '.join(content)} there, not {kind}"
    if kind == "application/json":
        wrong = next(_validator(*route, status).iter_errors(json.loads(body)), None)
        assert wrong is None, (f"{where} does not describe that ({wrong.json_path}: {wrong.message[:500]}); shapes are "
                               "in web/openapi_schemas.py")


def _is_envelope(headers: Mapping[str, str], body: bytes) -> bool:
    """The daemon's own; an engine's error may have any shape."""
    if headers.get("content-type") != "application/json":
        return False
    error = json.loads(body).get("error")
    return isinstance(error, dict) and set(error) == {"message", "type", "param", "code"} \
        and isinstance(error["code"], str)


@cache
def whole() -> dict[str, Any]:
    return document("0.1.0")


def operation(template: str, method: str) -> dict[str, Any]:
    found: dict[str, Any] = whole()["paths"][template][method]
    return found


def _resolved(response: Mapping[str, Any]) -> Mapping[str, Any]:
    name = response.get("$ref", "").rpartition("/")[2]
    return whole()["components"]["responses"][name] if name else response


@cache
def _patterns() -> list[tuple[re.Pattern[str], str]]:
    """The most literal first: /admin/models/{name}/plan goes before /admin/models/{name}."""
    templates = sorted(whole()["paths"], key=lambda path: -len(re.sub(r"{\w+}", "", path)))
    return [(re.compile(re.sub(r"{(\w+)}", lambda found: ".+" if found[1] in LONG else "[^/]+", path)), path)
            for path in templates]


def _route(method: str, path: str) -> tuple[str, str] | None:
    """Its template, and the method of the document."""
    found = next((template for pattern, template in _patterns() if pattern.fullmatch(path)), None)
    name = "get" if method == "HEAD" else method.lower()
    return None if found is None or name not in whole()["paths"][found] else (found, name)


@cache
def closed_components() -> dict[str, Any]:
    """What is not described may not be there, except in what engines write."""
    components = copy.deepcopy(whole()["components"])
    for name, schema in components["schemas"].items():
        if name not in OF_THE_ENGINE:
            close(schema)
    return {"schemas": components["schemas"]}


def close(schema: Any) -> None:
    if isinstance(schema, dict):
        if "properties" in schema:
            schema.setdefault("additionalProperties", False)
        for each in schema.values():
            close(each)
    elif isinstance(schema, list):
        for each in schema:
            close(each)


@cache
def _validator(template: str, method: str, status: int) -> Draft202012Validator:
    content = _resolved(operation(template, method)["responses"][str(status)])["content"]["application/json"]
    schema = copy.deepcopy(content["schema"]) if status < 400 else {"$ref": "#/components/schemas/Error"}
    close(schema)
    return Draft202012Validator({**schema, "components": closed_components()})
