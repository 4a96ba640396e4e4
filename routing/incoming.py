"""What the data plane looks at of a client's request, whoever made an object of it: Flask, or the short way past it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol, overload


class Headers(Protocol):
    """By name, whatever its case; iterates over the pairs."""

    @overload
    def get(self, key: str) -> str | None: ...

    @overload
    def get(self, key: str, default: str) -> str: ...

    def __contains__(self, key: str, /) -> bool: ...

    def __iter__(self) -> Iterator[tuple[str, str]]: ...


class Incoming(Protocol):
    """As werkzeug's Request.  `environ` is WSGI's (PEP 3333), where the parts of the daemon leave notes for each
    other."""

    environ: dict[str, Any]
    method: str
    path: str                   # decoded

    @property
    def headers(self) -> Headers: ...

    @property
    def remote_addr(self) -> str | None: ...

    @property
    def scheme(self) -> str: ...

    @property
    def mimetype(self) -> str: ...
