"""Answers of the server itself, before any view has seen the request: one error in the envelope, then it closes.  Pure.
"""

from __future__ import annotations

import orjson
from gunicorn.http import errors as http_errors

from errors import BadRequest, DaemonError, Overloaded
from routing import request_id

STATUS_NAMES = {400: "Bad Request", 413: "Content Too Large", 417: "Expectation Failed",
                431: "Request Header Fields Too Large", 500: "Internal Server Error", 501: "Not Implemented",
                502: "Bad Gateway", 503: "Service Unavailable", 504: "Gateway Timeout"}
_PARSE_STATUS = {http_errors.LimitRequestHeaders: 431, http_errors.UnsupportedTransferCoding: 501,
                 http_errors.ExpectationFailed: 417}


def answer(error: DaemonError, status: int | None = None) -> bytes:
    """Head and body; `status` where it is another one than the error's own."""
    status = error.status if status is None else status
    body = orjson.dumps(error.envelope())
    retry = f"Retry-After: {error.retry_after_s}\r\n" if error.retry_after_s is not None else ""
    head = (f"HTTP/1.1 {status} {STATUS_NAMES.get(status, 'Error')}\r\nConnection: close\r\n{retry}"
            f"{request_id.HEADER}: {request_id.current()}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n")
    return head.encode() + body


def unreadable(error: http_errors.ParseException) -> bytes:
    """For what gunicorn's parser refuses."""
    return answer(BadRequest(f"the request cannot be read: {error}", code="invalid_request"),
                  _PARSE_STATUS.get(type(error), 400))


def too_many(what: str) -> Overloaded:
    return Overloaded(f"the server has all the {what} that it may have; ask again in a moment", retry_after_s=1)
