"""HTTP/1.1 as uvicorn speaks it: one protocol object for each connection, one task for each request.

A client that goes ends the request at once.  An answer is a `Response`, or an `EventStream` whose every item is sent
as one chunk as soon as it is there.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass, field
from http import HTTPStatus
from urllib.parse import parse_qs, unquote

from simulation.log import err, out

MAX_HEAD_BYTES = 1 << 22                # vLLM's --h11-max-incomplete-event-size
REASONS = {status.value: status.phrase for status in HTTPStatus}


@dataclass(frozen=True)
class Request:
    method: str
    target: str
    version: str
    headers: dict[str, str]             # names in small letters
    body: bytes
    client: str

    @property
    def path(self) -> str:
        return unquote(self.target.partition("?")[0])

    @property
    def query(self) -> dict[str, list[str]]:
        return parse_qs(self.target.partition("?")[2], keep_blank_values=True)


@dataclass(frozen=True)
class Response:
    status: int = 200
    body: bytes = b""
    media_type: str | None = None
    headers: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class EventStream:
    events: AsyncGenerator[bytes, None]
    headers: dict[str, str] = field(default_factory=dict)


class Upgrade(Exception):
    """The handler takes the connection over: `protocol(transport, rest)` makes what serves it from now on."""

    def __init__(self, head: bytes, protocol: Callable[[asyncio.Transport, bytes], asyncio.Protocol]) -> None:
        super().__init__("upgrade")
        self.head = head
        self.protocol = protocol


class BadHttp(Exception):
    """The bytes are no HTTP request."""


@dataclass
class Host:
    """What all connections of one server share."""

    answer: Callable[[Request], Awaitable[Response | EventStream]]
    keep_alive_s: float
    access_log: bool
    access_log_skips: frozenset[str]
    connections: set[Connection] = field(default_factory=set)
    closing: bool = False

    @property
    def in_flight(self) -> list[Connection]:
        return [connection for connection in self.connections if connection.busy]

    def close_idle(self) -> None:
        """From now on no connection is kept; those in flight go on."""
        self.closing = True
        for connection in list(self.connections):
            if not connection.busy:
                connection.close()


class Connection(asyncio.Protocol):
    def __init__(self, host: Host) -> None:
        self._host = host
        self._buffer = bytearray()
        self._head: tuple[str, str, str, dict[str, str], int] | None = None     # parsed, its body still to come
        self._task: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._can_write = asyncio.Event()
        self._can_write.set()
        self._transport: asyncio.Transport
        self._peer = ""

    @property
    def busy(self) -> bool:
        return self._task is not None

    def close(self) -> None:
        self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        peer = transport.get_extra_info("peername")
        self._peer = f"{peer[0]}:{peer[1]}" if isinstance(peer, tuple) else ""
        self._host.connections.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._host.connections.discard(self)
        self._stop_timer()
        self._can_write.set()
        if self._task is not None:
            self._task.cancel()

    def pause_writing(self) -> None:
        self._can_write.clear()

    def resume_writing(self) -> None:
        self._can_write.set()

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        self._stop_timer()
        if self._task is None:
            self._start_next()
        elif len(self._buffer) > MAX_HEAD_BYTES:
            self._transport.pause_reading()

    def _start_next(self) -> None:
        try:
            request = self._take_request()
        except BadHttp:
            err("WARNING:  Invalid HTTP request received.")
            self._transport.write(b"HTTP/1.1 400 Bad Request\r\ncontent-type: text/plain; charset=utf-8\r\n"
                                  b"connection: close\r\n\r\nInvalid HTTP request received.")
            self._transport.close()
            return
        if request is not None:
            self._task = asyncio.get_running_loop().create_task(self._serve(request))

    def _take_request(self) -> Request | None:
        """The next request when all of it is there."""
        if self._head is None:
            end = self._buffer.find(b"\r\n\r\n")
            if end < 0:
                if len(self._buffer) > MAX_HEAD_BYTES:
                    raise BadHttp
                return None
            self._head = parse_head(bytes(self._buffer[:end]))
            del self._buffer[:end + 4]
            if self._head[3].get("expect", "").lower() == "100-continue":
                self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        method, target, version, headers, length = self._head
        if length >= 0:
            if len(self._buffer) < length:
                return None
            body = bytes(self._buffer[:length])
            del self._buffer[:length]
        else:
            unchunked = take_chunked(self._buffer)
            if unchunked is None:
                return None
            body = unchunked
        self._head = None
        return Request(method, target, version, headers, body, self._peer)

    async def _serve(self, request: Request) -> None:
        """Answers, then goes on with the next request of the connection."""
        keep = (request.version == "HTTP/1.1" and "close" not in request.headers.get("connection", "").lower())
        try:
            answer = await self._host.answer(request)
        except Upgrade as upgrade:
            self._hand_over(request, upgrade)
            return
        keep = keep and not self._host.closing
        if isinstance(answer, Response):
            self._log_access(request, answer.status)
            headers = {"content-length": str(len(answer.body))}
            if answer.media_type:
                headers["content-type"] = answer.media_type
            self._transport.write(head_bytes(answer.status, headers | answer.headers, keep) + answer.body)
        else:
            self._log_access(request, 200)
            try:
                await self._send_stream(answer, keep)
            except Exception as error:  # no handler is left after the head: uvicorn logs it and cuts the connection
                err(f"ERROR:    Exception in ASGI application\n{type(error).__name__}: {error}")
                keep = False
        self._after(keep and not self._host.closing)

    async def _send_stream(self, stream: EventStream, keep: bool) -> None:
        headers = {"content-type": "text/event-stream; charset=utf-8", **stream.headers}
        tail = {"transfer-encoding": "chunked"}
        write = self._transport.write
        write(head_bytes(200, headers, keep, tail))
        async with contextlib.aclosing(stream.events) as events:
            async for event in events:
                write(b"%x\r\n%b\r\n" % (len(event), event))
                if not self._can_write.is_set():
                    await self._can_write.wait()
        write(b"0\r\n\r\n")

    def _after(self, keep: bool) -> None:
        self._task = None
        if not keep or self._transport.is_closing():
            self._transport.close()
            return
        self._transport.resume_reading()
        if self._buffer:
            self._start_next()
        if self._task is None:
            self._timer = asyncio.get_running_loop().call_later(self._host.keep_alive_s, self._transport.close)

    def _hand_over(self, request: Request, upgrade: Upgrade) -> None:
        self._log_access(request, 101)
        self._task = None
        self._host.connections.discard(self)
        self._transport.write(upgrade.head)
        self._transport.set_protocol(upgrade.protocol(self._transport, bytes(self._buffer)))

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _log_access(self, request: Request, status: int) -> None:
        if self._host.access_log and request.path not in self._host.access_log_skips:
            out(f'INFO:     {self._peer} - "{request.method} {request.target} {request.version}" '
                f"{status} {REASONS.get(status, '')}")


def parse_head(head: bytes) -> tuple[str, str, str, dict[str, str], int]:
    """Method, target, version, headers and the body's length (-1: chunked).  Raises BadHttp."""
    first, *rest = head.decode("latin-1").split("\r\n")
    words = first.split(" ")
    if len(words) != 3 or not words[2].startswith("HTTP/1."):
        raise BadHttp
    headers: dict[str, str] = {}
    for line in rest:
        name, colon, value = line.partition(":")
        if not colon or not name or name != name.strip():
            raise BadHttp
        headers[name.lower()] = value.strip()
    if "chunked" in headers.get("transfer-encoding", "").lower():
        return words[0], words[1], words[2], headers, -1
    length = headers.get("content-length", "0")
    if not length.isdigit():
        raise BadHttp
    return words[0], words[1], words[2], headers, int(length)


def take_chunked(buffer: bytearray) -> bytes | None:
    """The body of a chunked request, taken from `buffer` when its last chunk is there.  Raises BadHttp."""
    parts: list[bytes] = []
    position = 0
    while True:
        line_end = buffer.find(b"\r\n", position)
        if line_end < 0:
            return None
        try:
            size = int(buffer[position:line_end].partition(b";")[0], 16)
        except ValueError:
            raise BadHttp from None
        start = line_end + 2
        if size == 0:
            end = start if buffer[start:start + 2] == b"\r\n" else buffer.find(b"\r\n\r\n", start)
            if end < 0 or len(buffer) < start + 2:
                return None
            del buffer[:end + (2 if end == start else 4)]
            return b"".join(parts)
        if len(buffer) < start + size + 2:
            return None
        parts.append(bytes(buffer[start:start + size]))
        position = start + size + 2


def head_bytes(status: int, headers: dict[str, str], keep: bool, tail: dict[str, str] | None = None) -> bytes:
    """The head of a response, with uvicorn's headers in uvicorn's order."""
    date = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime())
    all_headers = {"date": date, "server": "uvicorn", **headers, "vary": "Origin"}
    if "x-request-id" in headers:
        all_headers["x-request-id"] = all_headers.pop("x-request-id")
    if not keep:
        all_headers["connection"] = "close"
    lines = [f"{name}: {value}\r\n" for name, value in {**all_headers, **(tail or {})}.items()]
    return f"HTTP/1.1 {status} {REASONS.get(status, '')}\r\n{''.join(lines)}\r\n".encode("latin-1")
