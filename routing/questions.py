"""GET requests to servers that may never answer, many at a time on one thread (asyncio), each with one time limit.

Small, because a client library costs ten megabytes and a fifth of a second at the start, and follows redirects and
proxies of the environment unless told not to; the head is read as strictly as that of any other answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
import ssl
from http.client import HTTPException
from typing import NamedTuple, Self

from routing.remote import Origin
from routing.response_head import Head, read_head

MAX_BYTES = 1 << 24             # of one answer; 10,000 models have two megabytes
_BUFFER = 1 << 17               # and the longest head


class Answer(NamedTuple):
    status: int
    body: bytes


class NoAnswer(Exception):
    """What went wrong, in a few words for a person."""


class Conversation:
    """Some questions to one server, on one connection as long as that lasts.  An async context manager."""

    def __init__(self, origin: Origin) -> None:
        self._origin = origin
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self._close()

    async def get(self, path: str, limit_s: float) -> Answer:
        """Raises NoAnswer: no connection, a broken answer, or none within `limit_s` seconds."""
        try:
            async with asyncio.timeout(limit_s):
                return await self._get(path)
        except TimeoutError:
            self._close()
            raise NoAnswer(f"no answer from {path} within {limit_s:g} s") from None
        except (OSError, EOFError, HTTPException, ValueError, asyncio.LimitOverrunError) as error:
            self._close()
            raise NoAnswer(f"{path}: {_said(error)}") from error

    async def _get(self, path: str) -> Answer:
        reused = self._writer is not None
        try:
            return await self._ask(path)
        except (ConnectionError, EOFError):
            if not reused:
                raise
        self._close()       # it had been closed meanwhile
        return await self._ask(path)

    async def _ask(self, path: str) -> Answer:
        if self._reader is None or self._writer is None:
            self._reader, self._writer = await asyncio.open_connection(
                self._origin.host, self._origin.port, limit=_BUFFER, ssl=self._origin.tls)
        base = self._origin.base.split("/", 3)
        prefix = f"/{base[3]}" if len(base) == 4 else ""
        lines = [f"GET {prefix}{path} HTTP/1.1", f"Host: {base[2]}", "Accept-Encoding: identity",
                 *(f"{name}: {value}" for name, value in self._origin.headers.items())]
        self._writer.write("\r\n".join([*lines, "", ""]).encode("latin-1"))
        head = read_head(io.BytesIO(await self._reader.readuntil(b"\r\n\r\n")))
        body = await _body(self._reader, head)
        if head.closes or (head.length is None and not head.chunked):
            self._close()
        return Answer(head.status, body)

    def _close(self) -> None:
        if self._writer is not None:
            with contextlib.suppress(RuntimeError):     # the loop may be closing
                self._writer.transport.abort()
        self._reader = self._writer = None


def _said(error: Exception) -> str:
    """asyncio puts its own words in the place of the system's."""
    if isinstance(error, OSError) and not isinstance(error, ssl.SSLError) and (error.errno or 0) > 0:
        return os.strerror(error.errno or 0)
    return (str(error) or type(error).__name__)[:200]


async def _body(reader: asyncio.StreamReader, head: Head) -> bytes:
    if head.status in (204, 304):
        return b""
    if not head.chunked and head.length is not None:
        if head.length > MAX_BYTES:
            raise ValueError(f"its answer has {head.length} bytes")
        return await reader.readexactly(head.length)
    body = bytearray()
    while True:
        if head.chunked:
            line = await reader.readuntil(b"\n")
            size = int(line.partition(b";")[0].strip(), 16)
            piece = (await reader.readexactly(size + 2))[:-2] if 0 < size <= MAX_BYTES else b""
            if size < 0 or size > MAX_BYTES:
                raise ValueError("a chunk of its answer is too large")
            if size == 0:
                while (await reader.readuntil(b"\n")).strip():      # trailers
                    pass
        else:
            piece = await reader.read(_BUFFER)
        if not piece:
            return bytes(body)
        body += piece
        if len(body) > MAX_BYTES:
            raise ValueError("its answer does not end")
