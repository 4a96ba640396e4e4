"""An engine that does exactly what a request asks of it, byte by byte, on raw sockets.

`VLLM_COMMAND="python tests/scripted_engine.py"`.  The header `X-Script` holds base64 of a JSON list of steps:

    ["send", TEXT]          these bytes (latin-1), in one write
    ["repeat", TEXT, N]     the same N times
    ["gap"]                 a moment, so that what follows comes in a segment of its own
    ["wait", NAME]          until `GET /release/NAME` was asked, or the peer has left
    ["echo"]                what is received goes back, until the peer ends its direction
    ["mirror"]              a good answer, which is the request as it came
    ["close"] ["reset"] ["exit"]

A first step `["once", NAME]` means: on the first connection that comes with this name close without an answer.
Without `close` or `reset` at its end a script leaves the connection for the next request.  `GET /stats` tells how many
connections were made, how many are open, and how many requests each of the last ones had.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import re
import select
import socket
import socketserver
import struct
import sys
import threading
import time

WAIT_S = 120.0
GAP_S = 0.001
_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
_SCRIPT = re.compile(rb"\r\nx-script: *([^\r]*)", re.IGNORECASE)


class Engine:
    """What all connections share."""

    def __init__(self, model: str) -> None:
        self.model = model
        self.lock = threading.Lock()
        self.released: dict[str, threading.Event] = {}
        self.seen: set[str] = set()
        self.made = self.open = self.requests = self.first_uses = 0

    def event(self, name: str) -> threading.Event:
        with self.lock:
            return self.released.setdefault(name, threading.Event())

    def first(self, name: str) -> bool:
        with self.lock:
            known = name in self.seen
            self.seen.add(name)
            return not known

    def stats(self) -> dict[str, int]:
        with self.lock:
            return {"made": self.made, "open": self.open, "requests": self.requests, "first_uses": self.first_uses}


class Handler(socketserver.BaseRequestHandler):
    request: socket.socket
    engine: Engine

    def handle(self) -> None:
        engine = self.engine
        self.request.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with engine.lock:
            engine.made += 1
            engine.open += 1
        try:
            with contextlib.suppress(OSError):
                self._serve()
        finally:
            with engine.lock:
                engine.open -= 1

    def _serve(self) -> None:
        received, uses = b"", 0
        while True:
            while b"\r\n\r\n" not in received:
                if not (piece := self.request.recv(1 << 16)):
                    return
                received += piece
            head, _, received = received.partition(b"\r\n\r\n")
            length = int(found[1]) if (found := _LENGTH.search(head)) else 0
            while len(received) < length:
                if not (piece := self.request.recv(1 << 16)):
                    return
                received += piece
            body, received = received[:length], received[length:]
            uses += 1
            if script := _SCRIPT.search(head):
                with self.engine.lock:
                    self.engine.requests += 1
                    self.engine.first_uses += uses == 1
                if not self._play(json.loads(base64.b64decode(script[1])), head + b"\r\n\r\n" + body, received):
                    return
                received = b""
            else:
                self._own(head.split(b" ")[1].decode())

    def _own(self, path: str) -> None:
        answer: object = {}
        if path == "/v1/models":
            answer = {"object": "list", "data": [{"id": self.engine.model, "object": "model"}]}
        elif path == "/stats":
            answer = self.engine.stats()
        elif path.startswith("/release/"):
            self.engine.event(path.rpartition("/")[2]).set()
        data = json.dumps(answer).encode()
        self.request.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s"
                             % (len(data), data))

    def _play(self, steps: list[list[str]], asked: bytes, received: bytes) -> bool:
        """Whether the connection stays."""
        sock = self.request
        for step, *values in steps:
            match step:
                case "send":
                    sock.sendall(values[0].encode("latin-1"))
                case "repeat":
                    for _ in range(int(values[1])):
                        sock.sendall(values[0].encode("latin-1"))
                case "gap":
                    time.sleep(GAP_S)
                case "wait":
                    if not self._wait(values[0]):
                        return False
                case "echo":
                    sock.sendall(received)
                    while piece := sock.recv(1 << 16):
                        sock.sendall(piece)
                    sock.shutdown(socket.SHUT_WR)
                case "mirror":
                    sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(asked), asked))
                case "once":
                    if self.engine.first(values[0]):
                        return False
                case "close":
                    return False
                case "reset":
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    sock.close()
                    return False
                case "exit":
                    os._exit(0)
                case _:
                    raise ValueError(step)
        return True

    def _wait(self, name: str) -> bool:
        """False when the peer has left."""
        event = self.engine.event(name)
        poller = select.poll()
        poller.register(self.request, select.POLLRDHUP)
        deadline = time.monotonic() + WAIT_S
        while not event.is_set():
            if poller.poll(10) or time.monotonic() > deadline:
                return False
        return True


class Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 4096

    def shutdown_request(self, request: socket.socket | tuple[bytes, socket.socket]) -> None:
        """Close, without the half-close that would make a reset an ordinary end."""
        assert isinstance(request, socket.socket)
        request.close()


def main() -> None:
    arguments = sys.argv[1:]
    threading.stack_size(1 << 18)
    handler = type("BoundHandler", (Handler,), {"engine": Engine(arguments[arguments.index("serve") + 1])})
    Server(("127.0.0.1", int(arguments[arguments.index("--port") + 1])), handler).serve_forever()


if __name__ == "__main__":
    main()
