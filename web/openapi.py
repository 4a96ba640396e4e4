"""GET /openapi.json: the table of openapi_routes.py and the shapes of openapi_schemas.py as one OpenAPI document."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import cache
from typing import Any

from flask import Blueprint, Response, current_app

from web.openapi_routes import EVENTS, INFER, MANAGE, OPEN, ROUTES, Answer, Route, merged
from web.openapi_schemas import SCHEMAS, named, text, whole

blueprint = Blueprint("openapi", __name__)

ABOUT = """One daemon that starts, watches, sleeps and stops `vllm serve` processes on GPUs that have room, on demand,
and passes every call of vLLM's and OpenAI's API to the right one, on this machine and on others.

Every error of the daemon has the envelope `Error`; what an engine answers passes through as it is. Every answer has an
`X-Request-Id`, the client's own or a new one. Names of models may hold slashes, written as they are or as `%2F`. What
is not valid HTTP is refused before any route sees it (400, 413, 417, 431, 501), an unknown path is a 404
(`route_not_found`), another method a 405 with `Allow`."""
TAGS = {
    "inference": "By the model that a request names. Needs one of API_KEYS (or ADMIN_API_KEYS) when any is set.",
    "instances": "The `vllm serve` processes. Management needs one of ADMIN_API_KEYS; as long as none is set, it is "
                 "for clients on the daemon's machine only.",
    "models": "The models of config.yaml, and LoRA adapters. Management.",
    "daemon": "The daemon and the machine it is on."}
BAD_KEY = {401: "`invalid_api_key`: no key, or a wrong one"}
ERRORS: Mapping[str, Mapping[int, str]] = {
    OPEN: {}, INFER: BAD_KEY,
    MANAGE: BAD_KEY | {403: "`management_is_local`, `host_not_allowed`, `cross_origin`: not from there"}}
EVERYWHERE = {400: "`bad_request`: not as it should be",
              500: "`internal_error`: the daemon failed, its log says how",
              503: "`overloaded`: all threads, connections or room for bodies are taken"}
OTHER = {"description": "The engine's own"}
PARAMETERS = {
    "file": "One of those that the page names",
    "instance_id": "As `GET /instances` lists it", "name": "Of a model, or an alias of it; it may hold slashes",
    "response_id": "As the engine gave it", "path": "Of the engine, which may hold slashes"}


@blueprint.get("/openapi.json")
def openapi() -> Response:
    return Response(_written(current_app.extensions["about"]["version"]), mimetype="application/json")


@cache
def _written(version: str) -> str:
    return json.dumps(document(version), ensure_ascii=False)


def document(version: str) -> dict[str, Any]:
    found: dict[str, dict[str, Any]] = {}
    errors = Errors()
    for route in ROUTES:
        found.setdefault(route.path, {})[route.method.lower()] = _operation(route, errors)
    return {
        "openapi": "3.1.0",
        "info": {"title": "vllm-server", "version": version, "description": ABOUT,
                 "license": {"name": "MIT", "identifier": "MIT"}},
        "servers": [{"url": "/"}],
        "tags": [{"name": name, "description": what} for name, what in TAGS.items()],
        "paths": found,
        "components": {
            "schemas": SCHEMAS,
            "responses": errors.responses(),
            "headers": {
                "X-Request-Id": {"description": "Stands in the log lines about it", "schema": text()},
                "Retry-After": {"description": "Seconds after which to ask again, where that may help",
                                "schema": whole()}},
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer", "description": "Authorization: Bearer KEY"},
                "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key",
                              "description": "As Anthropic's SDK sends it"}}}}


class Errors:
    """Each error answer once, however many routes have it."""

    def __init__(self) -> None:
        self._names: dict[tuple[int, str, bool], str] = {}

    def ref(self, status: int, what: str, *, engine: bool) -> dict[str, Any]:
        """`engine`: it may also be the engine's own error of this status."""
        alike = sum(one == status for one, _, _ in self._names)
        name = self._names.setdefault((status, what, engine), f"{status}-{alike + 1}")
        return {"$ref": f"#/components/responses/{name}"}

    def responses(self) -> dict[str, Any]:
        return {name: {"description": what or "See the message",
                       "headers": _headers("X-Request-Id", *(("Retry-After",) if status in (429, 503) else ())),
                       "content": {"application/json": {"schema": {"anyOf": [named("Error"), OTHER]} if engine
                                                        else named("Error")}, **({"*/*": {}} if engine else {})}}
                for (status, what, engine), name in self._names.items()}


def _operation(route: Route, shared: Errors) -> dict[str, Any]:
    errors = {**EVERYWHERE, **merged(ERRORS[route.access], route.errors)}
    if 503 in route.errors:
        errors[503] += ", `overloaded`"
    found: dict[str, Any] = {
        "operationId": _id(route), "tags": [route.tag], "summary": route.summary,
        **({"description": route.what} if route.what else {}),
        # The empty one: which keys there are is a setting.
        "security": [] if route.access == OPEN else [{"bearer": []}, {"x-api-key": []}, {}]}
    if parameters := [*_in_path(route), *_in_query(route)]:
        found["parameters"] = parameters
    if route.body is not None:
        found["requestBody"] = {"required": route.body_required,
                                "content": {kind: {"schema": route.body} for kind in route.body_kinds}}
    answers = {status: _answer(one, route) for status, one in route.answers.items()}
    answers |= {status: shared.ref(status, what, engine=route.engine) for status, what in sorted(errors.items())}
    found["responses"] = {str(status): one for status, one in answers.items()}
    if route.engine:
        found["responses"]["default"] = {"description": "An error of the engine, as it wrote it"}
    return found


def _id(route: Route) -> str:
    return "_".join([route.method.lower(), *re.findall(r"\w+", route.path.replace("{", "by_"))])


def _in_path(route: Route) -> list[dict[str, Any]]:
    return [{"name": name, "in": "path", "required": True, "description": PARAMETERS[name],
             "schema": text(minLength=1)} for name in re.findall(r"{(\w+)}", route.path)]


def _in_query(route: Route) -> list[dict[str, Any]]:
    return [{"name": name, "in": "query", "required": False, "schema": schema,
             "description": schema.get("description", "")} for name, schema in route.query.items()]


def _answer(one: Answer, route: Route) -> dict[str, Any]:
    kinds: dict[str, Any] = {}
    if one.schema is not None:
        kinds[one.kind] = {"schema": one.schema}
        if route.stream:
            kinds[EVENTS] = {"schema": text("Server-sent events, where a stream is asked for")}
    headers = {name: {"description": what, "schema": text()} for name, what in one.headers.items()}
    return {"description": one.what, "headers": {**headers, **_headers("X-Request-Id")},
            **({"content": kinds} if kinds else {})}


def _headers(*names: str) -> dict[str, Any]:
    return {name: {"$ref": f"#/components/headers/{name}"} for name in names}
