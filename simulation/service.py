"""What the handlers of a simulated server share: its models, its engine, and how it reads bodies and words errors."""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

import orjson

from simulation.engine import Engine
from simulation.flags import Options
from simulation.http import EventStream, Request, Response
from simulation.memory import Ledger
from simulation.metrics import Metrics
from simulation.processes import EngineProcess

FINGERPRINT = "vllm-0.32.0-simulated"
DEAD_MESSAGE = "EngineCore encountered an issue. See stack trace (above) for the root cause."
BUSY_MESSAGE = ("The engine is currently busy and cannot accept new requests. Please try again later or on a different "
                "instance.")


class ApiError(Exception):
    """An error with vLLM's envelope."""

    def __init__(self, status: int, message: str, type: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.type = type or HTTPStatus(status).phrase
        self.param = param

    def envelope(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.status}}


def invalid(loc: str, kind: str, message: str, value: object) -> ApiError:
    """What a failed validation of the body is answered with."""
    shown = f"<{type(value).__name__} of {len(value)} items>" if isinstance(value, dict | list) else value
    text = f"1 validation error:\n  {{'type': {kind!r}, 'loc': {loc!r}, 'msg': {message!r}, 'input': {shown!r}}}"
    return ApiError(400, text, "Bad Request", loc)


@dataclass
class Service:
    options: Options
    runner: str                         # generate, pooling or transcription
    engine: Engine
    metrics: Metrics
    ledger: Ledger
    processes: list[EngineProcess]
    dev_mode: bool
    loras: dict[str, str] = field(default_factory=dict)
    load: int = 0                       # what /load answers with --enable-server-load-tracking
    responses: dict[str, dict[str, Any]] = field(default_factory=dict)
    background: dict[str, asyncio.Task[None]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The first served name: what responses and metrics carry."""
        return self.options.served_model_names[0]

    def model_of(self, body: dict[str, Any]) -> str:
        """The name to answer with.  Raises ApiError for a model that is not served."""
        model = body.get("model")
        if model is not None and not isinstance(model, str):
            raise invalid("body.model", "string_type", "Input should be a valid string", model)
        if not model or model in self.options.served_model_names:
            return self.name
        if model in self.loras:
            return model
        aliases = ", ".join(self.options.served_model_names)
        raise ApiError(404, f"The model `{model}` does not exist. Valid aliases: {aliases}.", "NotFoundError", "model")

    def token_limit(self, body: dict[str, Any], prompt_tokens: int, *names: str) -> tuple[int, str]:
        """How many tokens the answer gets and why it ends.  Raises ApiError for a limit that is none."""
        longest = self.options.max_model_len
        if prompt_tokens > longest:
            raise ApiError(400, f"Input length ({prompt_tokens}) exceeds model's maximum context length ({longest}).",
                           "BadRequestError")
        for name in names:
            wanted = body.get(name)
            if wanted is None:
                continue
            if not isinstance(wanted, int) or isinstance(wanted, bool):
                raise invalid(f"body.{name}", "int_type", "Input should be a valid integer", wanted)
            if wanted < 1:
                raise ApiError(400, f"{name} must be at least 1, got {wanted}. (parameter={name}, value={wanted})",
                               "BadRequestError", name)
            if wanted > longest:
                raise ApiError(400, f"{name}={wanted} cannot be greater than max_model_len={longest}. Please request "
                                    f"fewer output tokens. (parameter={name}, value={wanted})", "BadRequestError", name)
            return max(1, min(wanted, longest - prompt_tokens)), "length"
        return max(1, min(self.engine.knobs.tokens, longest - prompt_tokens)), "stop"


def read_json(request: Request) -> dict[str, Any]:
    """The body's object.  Raises ApiError as vLLM words it."""
    if request.headers.get("content-type", "").lower().split(";")[0].strip() != "application/json":
        raise ApiError(400, "1 validation error:\n  Unsupported Media Type: Only 'application/json' is allowed",
                       "Bad Request")
    try:
        body = orjson.loads(request.body)
    except orjson.JSONDecodeError:
        body = _read_slowly(request.body)
    if not isinstance(body, dict):
        raise invalid("body", "model_attributes_type",
                      "Input should be a valid dictionary or object to extract fields from", body)
    return body


def _read_slowly(body: bytes) -> Any:
    """By Python's own parser: it takes a little more than orjson, and vLLM's message has its words."""
    try:
        return json.loads(body)
    except UnicodeDecodeError:
        raise ApiError(400, "There was an error parsing the body", "Bad Request") from None
    except json.JSONDecodeError as error:
        loc = f"body.{error.pos}"
        raise ApiError(400, f"1 validation error:\n  {{'type': 'json_invalid', 'loc': '{loc}', 'msg': 'JSON decode "
                            f"error', 'input': '<dict of 0 items>', 'ctx': {{'error': {error.msg!r}}}}}",
                       "Bad Request", loc) from None


def need(body: dict[str, Any], name: str, kind: type | tuple[type, ...], words: str) -> Any:
    """`body[name]`.  Raises ApiError when it is missing or not of that kind."""
    if name not in body:
        raise ApiError(400, f"1 validation error:\n  {{'type': 'missing', 'loc': 'body.{name}', 'msg': 'Field "
                            f"required', 'input': '<dict of {len(body)} items>'}}", "Bad Request", f"body.{name}")
    if not isinstance(body[name], kind):
        raise invalid(f"body.{name}", words.replace(" ", "_") + "_type", f"Input should be a valid {words}", body[name])
    return body[name]


def json_response(content: object, status: int = 200) -> Response:
    return Response(status, orjson.dumps(content), "application/json")


def event(content: object, name: str | None = None) -> bytes:
    """One server-sent event."""
    head = f"event: {name}\n".encode() if name else b""
    return head + b"data: " + orjson.dumps(content) + b"\n\n"


DONE = b"data: [DONE]\n\n"


def dead_error() -> ApiError:
    return ApiError(500, DEAD_MESSAGE, "InternalServerError")


def dead_event() -> bytes:
    """With the spaces of Python's own json: that is how vLLM words it in a stream."""
    return (b'data: {"error": {"message": ' + orjson.dumps(DEAD_MESSAGE)
            + b', "type": "InternalServerError", "param": null, "code": 500}}\n\n')


def stream(events: AsyncGenerator[bytes, None]) -> EventStream:
    return EventStream(events)


def new_id(kind: str) -> str:
    return f"{kind}-{os.urandom(8).hex()}"


def now() -> int:
    return int(time.time())


def count_tokens(text: str) -> int:
    return max(1, len(text.split()))


def text_of(content: Any) -> str:
    """The text of a message's content, or of a list of messages."""
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        return " ".join(text_of(item) for item in content)
    if isinstance(content, dict):
        return text_of(content.get("text") or content.get("content") or "")
    return ""


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, Any]:
    return {"prompt_tokens": prompt_tokens, "total_tokens": prompt_tokens + completion_tokens,
            "completion_tokens": completion_tokens, "prompt_tokens_details": None, "completion_tokens_details": None}
