"""The WebSocket route: a handshake (RFC 6455), and each text frame answered with the simulated echo of it."""

from __future__ import annotations

import asyncio
import base64
import hashlib

import orjson

from simulation.http import EventStream, Request, Response, Upgrade
from simulation.service import Service, json_response

MAGIC = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
TEXT, CLOSE, PING, PONG = 0x1, 0x8, 0x9, 0xA


async def accept(service: Service, request: Request) -> Response | EventStream:
    """Raises Upgrade for a WebSocket's handshake; any other request finds no such route."""
    key = request.headers.get("sec-websocket-key")
    if request.headers.get("upgrade", "").lower() != "websocket" or not key:
        return json_response({"detail": "Not Found"}, 404)
    answer = base64.b64encode(hashlib.sha1(key.encode() + MAGIC, usedforsecurity=False).digest()).decode()
    head = ("HTTP/1.1 101 Switching Protocols\r\nupgrade: websocket\r\nconnection: Upgrade\r\n"
            f"sec-websocket-accept: {answer}\r\nserver: uvicorn\r\n\r\n")
    raise Upgrade(head.encode(), lambda transport, rest: EchoSocket(transport, rest))


class EchoSocket(asyncio.Protocol):
    def __init__(self, transport: asyncio.Transport, rest: bytes) -> None:
        self._transport = transport
        self._buffer = bytearray()
        self._tell({"type": "session.created", "session": {"simulated": True}})
        self.data_received(rest)

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        while (frame := self._take_frame()) is not None:
            kind, payload = frame
            if kind == TEXT:
                self._tell({"type": "simulated.echo", "received": payload.decode(errors="replace")})
            elif kind == PING:
                self._send(PONG, payload)
            elif kind == CLOSE:
                self._send(CLOSE, payload)
                self._transport.close()

    def _take_frame(self) -> tuple[int, bytes] | None:
        """The next whole frame of the client, unmasked."""
        buffer = self._buffer
        if len(buffer) < 2:
            return None
        length, start = buffer[1] & 0x7F, 2
        if length >= 126:
            start = 4 if length == 126 else 10
            length = int.from_bytes(buffer[2:start], "big")
        end = start + 4 + length
        if not buffer[1] & 0x80 or len(buffer) < end:
            return None
        mask = buffer[start:start + 4]
        payload = bytes(byte ^ mask[index % 4] for index, byte in enumerate(buffer[start + 4:end]))
        kind = buffer[0] & 0x0F
        del buffer[:end]
        return kind, payload

    def _tell(self, message: dict[str, object]) -> None:
        self._send(TEXT, orjson.dumps(message))

    def _send(self, kind: int, payload: bytes) -> None:
        size = len(payload)
        length = bytes([size]) if size < 126 else b"\x7e" + size.to_bytes(2, "big")
        self._transport.write(bytes([0x80 | kind]) + length + payload)
