"""A client's head, parsed: by gunicorn, whose parser refuses whatever servers on the way could read in two ways.

It also makes half a dozen objects of each head, by way of a file.  Most heads have nothing in them that its rules are
about, and of these only its C parser is asked.
"""

from __future__ import annotations

import socket
from functools import lru_cache
from typing import Any, Final

import gunicorn_h1c
from gunicorn.http.message import Request

RECEIVE_BYTES = 8192
ONCE: Final = frozenset({"HOST", "CONTENT-TYPE", "CONTENT-LENGTH"})
"""Two of these are refused."""
RULED: Final = frozenset({
    "EXPECT", "TRANSFER-ENCODING", "X-FORWARDED-PROTO", "X-FORWARDED-PROTOCOL", "X-FORWARDED-SSL"})
"""What gunicorn acts on, beside names with an underscore, which it drops."""


class PlainRequest:
    """As gunicorn's request, as far as its response and this server look at one.  The names of `headers` are in upper
    case."""

    __slots__ = ("body", "headers", "method", "path", "query", "scheme", "uri", "version")

    def __init__(self, method: str, uri: str, version: tuple[int, int], headers: list[tuple[str, str]]) -> None:
        self.method = method
        self.uri = uri
        self.path, _, self.query = uri.partition("?")
        self.version = version
        self.scheme = "http"
        self.headers = headers
        self.body: Any = None

    def should_close(self) -> bool:
        """What its client wants of the connection (RFC 9112, 9.3).  Of several such headers the first counts, as with
        gunicorn."""
        option = next((value for name, value in self.headers if name == "CONNECTION"), "").lower().strip(" \t")
        return option == "close" if option in ("close", "keep-alive") else self.version <= (1, 0)


def parse(cfg: Any, head: bytes, sock: socket.socket, client: tuple[Any, ...]) -> Any:
    """A PlainRequest, or gunicorn's.  What the head lacks is read from the socket.  Raises what gunicorn does:
    StopIteration where there is nothing, ParseException, OSError."""
    return _plain(cfg, head) or Request(cfg, _Source(head, sock), client)


def _plain(cfg: Any, head: bytes) -> PlainRequest | None:
    """None where there is anything that gunicorn has a rule for, or a mistake for it to name."""
    try:
        read = gunicorn_h1c.parse_request(
            head, last_len=0, limit_request_line=cfg.limit_request_line, limit_request_fields=cfg.limit_request_fields,
            limit_request_field_size=cfg.limit_request_field_size)
    except (ValueError, gunicorn_h1c.IncompleteError):
        return None
    headers: list[tuple[str, str]] = []
    once = 0
    for name, value in read["headers"]:
        upper, kind = _kind(name)
        if kind is RULED or (upper == "CONTENT-LENGTH" and not value.isdigit()):
            return None
        once += kind is ONCE
        headers.append((upper, value.decode("latin-1")))
    if once > 1 and once != len({name for name, _ in headers if name in ONCE}):
        return None
    uri: bytes = read["path"]
    if not uri.startswith(b"/") or uri.startswith(b"//") or b"#" in uri:
        return None
    return PlainRequest(read["method"].decode(), uri.decode("latin-1"), (1, read["minor_version"]), headers)


@lru_cache(maxsize=256)
def _kind(name: bytes) -> tuple[str, frozenset[str] | None]:
    """In upper case, and which of the two sets it is in."""
    upper = name.decode("latin-1").upper()
    if upper in RULED or "_" in upper:
        return upper, RULED
    return upper, ONCE if upper in ONCE else None


class _Source:
    """What gunicorn's parser reads from."""

    def __init__(self, head: bytes, sock: socket.socket) -> None:
        self._kept = head
        self._sock = sock

    def read(self, size: int | None = None) -> bytes:
        kept, self._kept = self._kept, b""
        return kept or self._sock.recv(RECEIVE_BYTES)

    def unread(self, data: bytes) -> None:
        self._kept = bytes(data)
