"""What the command's exit code says.  Scripts rely on it: a code keeps its meaning."""

from __future__ import annotations

from enum import IntEnum

from vllm_server_client import errors


class Exit(IntEnum):
    OK = 0
    FAILED = 1          # another error of the server, or a check of `doctor` that failed
    USAGE = 2           # the command line
    UNREACHABLE = 3     # no connection, or something else answers there
    REFUSED = 4         # no key, a wrong one, or a key for inference where an admin's is needed
    NOT_FOUND = 5       # no such model or instance
    UNAVAILABLE = 6     # not now: no room, too many waiting, shutting down
    LOAD_FAILED = 7     # the model did not load; the message has the cause
    TIMED_OUT = 8
    INTERRUPTED = 130   # Ctrl-C


MEANINGS = {
    Exit.OK: "it worked",
    Exit.FAILED: "another error of the server; a check of doctor failed",
    Exit.USAGE: "the command line is wrong",
    Exit.UNREACHABLE: "no connection to the server, or it was lost",
    Exit.REFUSED: "a key is missing or may not do this",
    Exit.NOT_FOUND: "no such model or instance",
    Exit.UNAVAILABLE: "not now: no room, or too many requests",
    Exit.LOAD_FAILED: "the model did not load",
    Exit.TIMED_OUT: "it took too long",
    Exit.INTERRUPTED: "interrupted by Ctrl-C",
}


class LoadFailed(errors.ServerError):
    """A model that did not load, as its instance tells."""


def exit_code(error: errors.VLLMProxyError) -> Exit:
    for kind, code in _BY_ERROR:
        if isinstance(error, kind):
            return code
    late = isinstance(error, errors.ServerError) and error.status in (408, 504)
    return Exit.TIMED_OUT if late else Exit.FAILED


_BY_ERROR: tuple[tuple[type[errors.VLLMProxyError], Exit], ...] = (
    (LoadFailed, Exit.LOAD_FAILED), (errors.AuthenticationFailed, Exit.REFUSED),
    (errors.PermissionDenied, Exit.REFUSED), (errors.NotFound, Exit.NOT_FOUND),
    (errors.TooManyRequests, Exit.UNAVAILABLE), (errors.Unavailable, Exit.UNAVAILABLE),
    (errors.TimedOut, Exit.TIMED_OUT), (errors.ConnectionFailed, Exit.UNREACHABLE),
    (errors.StreamBroken, Exit.UNREACHABLE), (errors.BadAnswer, Exit.UNREACHABLE))
