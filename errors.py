"""Every error the daemon answers with, and the one envelope that renders it.

The envelope is OpenAI's: ``{"error": {"message", "type", "param", "code"}}``.  A class fixes status, type and
code; an instance adds the message, which says what happened and what to do.  An upstream's own errors never pass
through here: their bytes go to the client unchanged.
"""

from __future__ import annotations

from typing import Any


class DaemonError(Exception):
    """The root.  `status` is the HTTP status, `type` and `code` stand in the envelope, `param` names the field."""

    status = 500
    type = "internal_error"
    code = "internal_error"

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None,
                 retry_after_s: int | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        if code is not None:
            self.code = code
        self.retry_after_s = retry_after_s

    def envelope(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}


LONGEST_MESSAGE = 2000      # characters of a ConfigError


class ConfigError(Exception):
    """A setting or file that cannot be used.  Stops the start; never reaches a client.

    `where` is the file with its line (``.env:3``) or the name of the environment variable.
    """

    def __init__(self, where: str, message: str) -> None:
        if len(message) > LONGEST_MESSAGE:      # it quotes a value that is no value
            message = f"{message[:LONGEST_MESSAGE - 200]} ... {message[-200:]}"
        super().__init__(f"{where}: {message}")
        self.where = where


# --- the client's mistakes -------------------------------------------------------------------------------------

class BadRequest(DaemonError):
    status, type, code = 400, "invalid_request_error", "bad_request"


class Unauthorized(DaemonError):
    status, type, code = 401, "authentication_error", "invalid_api_key"


class Forbidden(DaemonError):
    status, type, code = 403, "permission_error", "forbidden"


class NotFound(DaemonError):
    status, type, code = 404, "not_found_error", "not_found"


class ModelNotFound(NotFound):
    type, code = "NotFoundError", "model_not_found"


class MethodNotAllowed(DaemonError):
    status, type, code = 405, "invalid_request_error", "method_not_allowed"


class RequestTimeout(DaemonError):
    status, type, code = 408, "invalid_request_error", "request_timeout"


class Conflict(DaemonError):
    status, type, code = 409, "conflict_error", "conflict"


class TooLarge(DaemonError):
    status, type, code = 413, "invalid_request_error", "request_too_large"


class UnsupportedMediaType(DaemonError):
    status, type, code = 415, "invalid_request_error", "unsupported_media_type"


class RateLimited(DaemonError):
    status, type, code = 429, "rate_limit_error", "rate_limit_exceeded"


class UpgradeRequired(DaemonError):
    status, type, code = 426, "invalid_request_error", "upgrade_required"


class LoopDetected(DaemonError):
    status, type, code = 508, "invalid_request_error", "loop_detected"


# --- what the manager cannot do now -----------------------------------------------------------------------------

class ManagerError(DaemonError):
    status, type, code = 503, "service_unavailable", "unavailable"


class TooManyInstances(ManagerError):
    code = "too_many_instances"


class QueueFull(ManagerError):
    code = "queue_full"


class Overloaded(ManagerError):
    """Of connections, requests or their bodies there are as many as there may be."""

    code = "overloaded"


class NoFreePort(ManagerError):
    code = "no_free_port"


class NoRoom(ManagerError):
    code = "no_gpu_memory"


class ShuttingDown(ManagerError):
    code = "shutting_down"


class NotReady(ManagerError):
    """The instance takes no requests now: pick again."""

    code = "not_ready"


class NoServer(ManagerError):
    """The servers that have the model are all down."""

    code = "no_server_up"


class BackendsBusy(ManagerError):
    """All that serve the model have asked for fewer requests."""

    status, type, code = 429, "rate_limit_error", "backends_busy"


class StartTimeout(ManagerError):
    status, code = 504, "queue_timeout"


class LoadFailed(ManagerError):
    """A model that failed to load; `code` is the cause's (instances/startup_log.py)."""

    code = "load_failed"

    def __init__(self, message: str, *, code: str, status: int = 503, param: str | None = None) -> None:
        super().__init__(message, code=code, param=param)
        self.status = status
        if 400 <= status < 500:     # the caller's mistake: no such model, a wrong flag
            self.type = {403: Forbidden.type, 404: NotFound.type}.get(status, BadRequest.type)


# --- what happened to an exchange with an engine -----------------------------------------------------------------

class UpstreamError(DaemonError):
    status, type, code = 502, "upstream_error", "upstream_error"


class EngineDied(UpstreamError):
    code = "engine_died"


class EngineStopped(UpstreamError):
    status, code = 503, "engine_stopped"


class ServerLost(UpstreamError):
    """Another machine's server went down before it answered."""

    status, code = 503, "server_lost"


class UpstreamTimeout(UpstreamError):
    status, code = 504, "upstream_timeout"
