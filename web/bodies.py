"""Reads the JSON bodies of management calls: a wrong one is named by its field, and nothing has happened yet."""

from __future__ import annotations

import difflib
import json
from collections.abc import Collection
from typing import Any

import orjson
from flask import Request

from config import check_params
from errors import BadRequest, TooLarge, UnsupportedMediaType
from instance_manager import CreateRequest
from routing.requested_model import check_coding
from routing.upstream import ClientLeft

MAX_BODY_BYTES = 1 << 20
MAX_MODEL_NAME = 512
LONGEST_S = 1e9
CREATE_FIELDS = ("model_name", "timeout", "start_timeout", "params", "wait", "replace", "new", "sleep", "stop_after")


def json_object(request: Request, known: Collection[str]) -> dict[str, Any]:
    """The body as an object with known keys only; an empty body is an empty object."""
    check_coding(request.headers.get("Content-Encoding"))
    length = request.content_length
    if length is not None and length > MAX_BODY_BYTES:
        raise TooLarge(f"the body has {length} bytes; a management call has at most {MAX_BODY_BYTES}")
    try:
        data = request.environ["wsgi.input"].read(length if length is not None else MAX_BODY_BYTES + 1)
    except OSError as error:
        raise ClientLeft from error
    if length is not None and len(data) < length:
        raise BadRequest(f"the body ended after {len(data)} bytes; its Content-Length says {length}",
                         code="incomplete_body")
    if len(data) > MAX_BODY_BYTES:
        raise TooLarge(f"a management call has at most {MAX_BODY_BYTES} bytes")
    if not data:
        return {}
    if request.mimetype != "application/json":
        raise UnsupportedMediaType("send the body as application/json", param="Content-Type")
    body = _parsed(data)
    if not isinstance(body, dict):
        raise BadRequest("the body must be a JSON object", code="invalid_json")
    for key in body:
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            raise BadRequest(f"unknown field {key[:80]!r}" + (f"; did you mean {near[0]!r}?" if near else
                             f"; known are {', '.join(known)}"), param=key[:80], code="unknown_field")
    return body


def _parsed(data: bytes) -> Any:
    """Strict JSON: UTF-8, no NaN, and no field given twice, of which one would win in silence."""
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise BadRequest(f"the field {key[:80]!r} is given twice", param=key[:80], code="duplicate_field")
            found[key] = value
        return found

    try:
        orjson.loads(data)                                  # the strict one; json knows the pairs
        return json.loads(data, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"the body is not valid JSON: {error}", code="invalid_json") from None


def create_request(body: dict[str, Any]) -> tuple[CreateRequest, bool]:
    """The request of POST /instances, and whether its caller waits for the outcome."""
    params = body.get("params")
    request = CreateRequest(
        model=model_name(body), params=check_params({} if params is None else params, param="params"),
        timeout_s=seconds(body, "timeout", zero=True), start_timeout_s=seconds(body, "start_timeout", zero=False),
        replace=boolean(body, "replace"), new=boolean(body, "new"), sleep_level=sleep_level(body, "sleep", off=True),
        stop_after_s=seconds(body, "stop_after", zero=False))
    if request.replace and request.new:
        raise BadRequest("\"replace\" and \"new\" exclude each other", param="new")
    return request, boolean(body, "wait")


def model_name(body: dict[str, Any]) -> str:
    name = body.get("model_name")
    if name is None:
        raise BadRequest("\"model_name\" is missing: a Hugging Face id such as facebook/opt-125m, or a local path",
                         param="model_name", code="missing_field")
    if not isinstance(name, str) or not name:
        raise BadRequest("\"model_name\" must be a string that is not empty", param="model_name")
    if len(name) > MAX_MODEL_NAME:
        raise BadRequest(f"\"model_name\" has {len(name)} characters; at most {MAX_MODEL_NAME}", param="model_name")
    if name != name.strip() or not name.isprintable() or name.startswith("-"):
        raise BadRequest("\"model_name\" must not begin with '-', begin or end with a space, or hold control "
                         "characters", param="model_name")
    return name


def seconds(body: dict[str, Any], field: str, *, zero: bool) -> float | None:
    value = body.get(field)
    if value is None:
        return None
    # The comparison refuses what is not finite too, and an int may be too large for a float.
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= LONGEST_S \
            or (value == 0 and not zero):
        raise BadRequest(f"\"{field}\" must be a number of seconds, {'0 (never) or more' if zero else 'more than 0'}",
                         param=field)
    return float(value)


def boolean(body: dict[str, Any], field: str) -> bool:
    value = body.get(field, False)
    if not isinstance(value, bool):
        raise BadRequest(f"\"{field}\" must be true or false", param=field)
    return value


def sleep_level(body: dict[str, Any], field: str, *, off: bool) -> int | None:
    """1 or 2, and 0 for "off" where that has a meaning; None: nothing is said."""
    value = body.get(field)
    if value is None:
        return None
    if off and (value == "off" or value is False):
        return 0
    if isinstance(value, bool) or not isinstance(value, int) or value not in ((0, 1, 2) if off else (1, 2)):
        raise BadRequest(f"\"{field}\" must be 1 or 2" + (", or 0 or \"off\" for never" if off else ""), param=field)
    return value
