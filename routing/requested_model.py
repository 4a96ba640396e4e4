"""Finds the model name in a request body, without changing or keeping the body.  Pure."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import orjson
from werkzeug.exceptions import RequestEntityTooLarge
from werkzeug.http import parse_options_header
from werkzeug.sansio.multipart import Data, Epilogue, Field, File, MultipartDecoder, NeedData

from errors import BadRequest, UnsupportedMediaType

MAX_NAME = 1024
MAX_PARTS = 1000
LONG_BYTES = 16 * MAX_NAME      # a longer string is no valid name: a character takes 12 bytes at most, as two escapes
LARGE_BODY_BYTES = 1 << 16      # smaller ones are decoded whole
LOOKS = 64                      # quotes that are looked at before it must have paid,
BYTES_A_LOOK = 4096             # which is when so many bytes were passed over for each
_BACKSLASH = ord("\\")
_STAND_IN = b'"%08x' + b"x" * (MAX_NAME + 1) + b'"'
_STAND_FOR = 256                # bytes at the start of a long string that its stand-in tells from others
_FORM_FIELDS = ("model", "stream")


@dataclass(frozen=True)
class Wanted:
    """What routing needs to know of a body."""

    model: str
    stream: bool = False
    previous_response_id: str | None = None
    fields: Mapping[str, Any] | None = field(default=None, repr=False, compare=False)


def check_coding(content_encoding: str | None) -> None:
    """Raises UnsupportedMediaType: nothing is ever unpacked here, so that no small body becomes a large one."""
    if content_encoding is not None and content_encoding.strip().lower() not in ("", "identity"):
        raise UnsupportedMediaType(f"the body is encoded ({content_encoding[:40]!r}): send it plain",
                                   param="Content-Encoding")


def find(content_type: str, body: bytes | bytearray, *, with_fields: bool = False) -> Wanted:
    """The model that a JSON or multipart body names; `with_fields` all of a JSON body, but for what long strings say.

    Raises BadRequest (no JSON, no object, no model, not a string) or UnsupportedMediaType.
    """
    kind, boundary = _kind(content_type)
    if kind == "multipart/form-data":
        return _in_form(body, boundary)
    if kind in ("", "application/json") or kind.endswith("+json"):
        return _in_json(body, with_fields)
    raise UnsupportedMediaType(f"cannot read a model name from a body of type {kind[:80]!r}: send application/json "
                               "or multipart/form-data", param="Content-Type")


@lru_cache(maxsize=64)
def _kind(content_type: str) -> tuple[str, str]:
    """And the boundary of its parts, if it has some."""
    kind, options = parse_options_header(content_type)
    return kind.lower(), options.get("boundary", "")


def _in_json(body: bytes | bytearray, with_fields: bool) -> Wanted:
    try:
        data = orjson.loads(without_long_strings(body))
    except orjson.JSONDecodeError as error:
        raise BadRequest(f"the body is not valid JSON: {error}", code="invalid_json") from None
    if not isinstance(data, dict):
        raise BadRequest("the body must be a JSON object with a \"model\"", code="invalid_json")
    previous = data.get("previous_response_id")
    return Wanted(model=_checked(data.get("model")), stream=data.get("stream") is True,
                  previous_response_id=previous if isinstance(previous, str) and len(previous) <= MAX_NAME else None,
                  fields=data if with_fields else None)


def without_long_strings(body: bytes | bytearray) -> bytes | bytearray:
    """The same JSON with short strings in the place of long ones, which are most of a body with images.

    Decoding megabytes to find one name takes milliseconds in which no other request moves; looking for the quotes at
    their ends takes a tenth.  What is left says the same of the model, for a long string can neither be "model" nor a
    name.  What stands inside of a long string is not looked at: where that is no JSON, the engine will say so.  What
    is no JSON otherwise is none here either, and what is made of many short strings is left as it is.
    """
    if len(body) < LARGE_BODY_BYTES:
        return body
    kept: list[bytes | bytearray] = []
    kept_to = looks = 0
    start = body.find(b'"')
    while start >= 0:
        end = _string_end(body, start)
        looks += 1
        if end < 0 or looks > LOOKS + end // BYTES_A_LOOK:
            break
        if end - start > LONG_BYTES:
            kept += (body[kept_to:start], _STAND_IN % zlib.crc32(body[start:start + _STAND_FOR]))
            kept_to = end + 1
        start = body.find(b'"', end + 1)
    return b"".join((*kept, body[kept_to:])) if kept else body


def _string_end(body: bytes | bytearray, start: int) -> int:
    """Where the string that begins with the quote at `start` has its other quote; -1 if it has none or many escapes."""
    end = start
    for _ in range(LOOKS):
        end = body.find(b'"', end + 1)
        slashes = 0
        while end >= 0 and slashes < LOOKS and body[end - 1 - slashes] == _BACKSLASH:
            slashes += 1
        if end < 0 or slashes == LOOKS:
            return -1
        if slashes % 2 == 0:
            return end
    return -1


def _in_form(body: bytes | bytearray, boundary: str) -> Wanted:
    if not boundary:
        raise BadRequest("multipart/form-data without a boundary", param="Content-Type", code="invalid_form")
    decoder = MultipartDecoder(boundary.encode("latin-1", "replace"), max_parts=MAX_PARTS)
    fields: dict[str, bytearray] = {}       # of a field that comes twice, the last, as for the engine
    current: bytearray | None = None
    try:
        decoder.receive_data(bytes(body))
        decoder.receive_data(None)
        while not isinstance(event := decoder.next_event(), (Epilogue, NeedData)):
            if isinstance(event, Field):
                current = None
                if event.name in _FORM_FIELDS:
                    current = fields[event.name] = bytearray()
            elif isinstance(event, File):
                current = None
            elif isinstance(event, Data) and current is not None:
                current += event.data
    except RequestEntityTooLarge:
        raise BadRequest(f"the form has more than {MAX_PARTS} parts", code="invalid_form") from None
    except ValueError as error:
        raise BadRequest(f"the multipart body cannot be read: {error}", code="invalid_form") from None
    model = fields.get("model")
    return Wanted(model=_checked(model.decode("utf-8", "replace") if model is not None else None),
                  stream=fields.get("stream", b"").strip().lower() in (b"true", b"1"))


def _checked(model: object) -> str:
    if model is None:
        raise BadRequest("the request names no model: add \"model\" to the body (GET /v1/models lists them)",
                         param="model", code="missing_model")
    if not isinstance(model, str) or not model:
        raise BadRequest("\"model\" must be a string that is not empty", param="model", code="invalid_model")
    if len(model) > MAX_NAME:
        raise BadRequest(f"\"model\" is longer than {MAX_NAME} characters", param="model", code="invalid_model")
    return model
