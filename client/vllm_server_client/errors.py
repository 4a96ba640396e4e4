"""What a call may raise.  `VLLMProxyError` is the root: catch it to catch all of them.

    VLLMProxyError
      ConnectionFailed      no connection, or it was lost before the whole answer was there
      TimedOut              longer silence than the time limit allows
      BadAnswer             an answer that is not what vllm-server sends: is something else listening there?
      StreamBroken          a stream that was cut, or ended before its end
      ServerError           the server's own error, with its message, code and status
        AuthenticationFailed (401), PermissionDenied (403), NotFound (404), Conflict (409), TooManyRequests (429),
        Unavailable (503)
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any


class VLLMProxyError(Exception):
    """The root.  `message` is for people."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class ConnectionFailed(VLLMProxyError):
    """`sent`: whether the server may have received the request."""

    def __init__(self, message: str, *, sent: bool) -> None:
        super().__init__(message)
        self.sent = sent


class TimedOut(VLLMProxyError):
    pass


class BadAnswer(VLLMProxyError):
    pass


class StreamBroken(VLLMProxyError):
    pass


class ServerError(VLLMProxyError):
    """The error that the server answered with.

    `status` is the HTTP status, None for an error that came inside a stream; `code` is for programs
    (`model_not_found`, `no_gpu_memory`, ...), `param` names the field that is wrong, `retry_after_s` is what the
    server asks to wait before the next try.
    """

    def __init__(self, message: str, *, status: int | None = None, code: str | None = None, type: str | None = None,
                 param: str | None = None, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.type = type
        self.param = param
        self.retry_after_s = retry_after_s

    def envelope(self) -> dict[str, Any]:
        """As the server sent it."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}


class AuthenticationFailed(ServerError):
    pass


class PermissionDenied(ServerError):
    pass


class NotFound(ServerError):
    pass


class Conflict(ServerError):
    pass


class TooManyRequests(ServerError):
    """A limit of the key, or all that serve the model ask for fewer; `retry_after_s` says when to come again."""


class Unavailable(ServerError):
    pass


BY_STATUS: Mapping[int, type[ServerError]] = {
    401: AuthenticationFailed, 403: PermissionDenied, 404: NotFound, 409: Conflict, 429: TooManyRequests,
    503: Unavailable}


def from_answer(status: int, headers: Mapping[str, str], body: bytes) -> ServerError:
    """The exception for an answer with an error status, whatever its body is."""
    try:
        answer = json.loads(body)
    except ValueError:
        answer = None
    error = answer.get("error") if isinstance(answer, dict) else None
    if not isinstance(error, dict):
        text = body.decode(errors="replace").strip() if answer is None else json.dumps(answer)
        error = {"message": f"HTTP {status}{f': {text[:500]}' if text else ''}"}
    return _from_envelope(BY_STATUS.get(status, ServerError), error, status, _seconds(headers.get("retry-after")))


def from_event(error: object) -> ServerError:
    """The exception for an error inside a stream, whose HTTP status was 200."""
    found = error if isinstance(error, dict) else {"message": str(error)}
    return _from_envelope(ServerError, found, None, None)


def _from_envelope(kind: type[ServerError], error: Mapping[str, Any], status: int | None,
                   retry_after_s: float | None) -> ServerError:
    def text(name: str) -> str | None:
        value = error.get(name)
        return None if value is None else str(value)

    return kind(text("message") or "the server gave no reason", status=status, code=text("code"), type=text("type"),
                param=text("param"), retry_after_s=retry_after_s)


def _seconds(value: str | None) -> float | None:
    """Of a Retry-After header; its other form, a date, is not what vllm-server sends."""
    return float(value) if value is not None and value.isascii() and value.isdigit() else None
