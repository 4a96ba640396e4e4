"""An answer on its way to the client."""

from __future__ import annotations

import time
from collections.abc import Iterable
from email.utils import formatdate
from functools import lru_cache
from http.client import responses
from typing import Any


class Reply:
    """A WSGI application: status, the backend's own headers with none added, and the body as it comes.

    `body` may have a `close`, which the server calls when it is done with it.
    """

    __slots__ = ("body", "headers", "status_code")

    def __init__(self, status_code: int, headers: list[tuple[str, str]], body: Iterable[bytes]) -> None:
        self.status_code = status_code
        self.headers = headers
        self.body = body

    @property
    def status(self) -> str:
        """With its name: `200 OK`."""
        return f"{self.status_code} {responses.get(self.status_code, 'Unknown')}"

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        """Gives back what the body holds if the server refuses the head: nobody would iterate or close it then."""
        try:
            start_response(self.status, self.headers)
        except BaseException:
            self.close()
            raise
        return self.body

    def close(self) -> None:
        """Of one that nobody will get."""
        if hasattr(self.body, "close"):
            self.body.close()


def http_date() -> str:
    """Now, as a Date header says it (RFC 9110, 5.6.7); made once a second."""
    return _date(int(time.time()))


@lru_cache(maxsize=2)
def _date(second: int) -> str:
    return formatdate(second, usegmt=True)
