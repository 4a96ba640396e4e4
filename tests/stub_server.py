"""A vLLM server on another machine, as far as the fleet sees it, in this process and told what to do by the test."""

from __future__ import annotations

import contextlib
import json
import socket
import socketserver
import ssl
import struct
import threading
from collections import Counter
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler
from types import TracebackType
from typing import Any, Self

METRICS = """vllm:num_requests_running{{engine="0",model_name="m"}} {running}
vllm:num_requests_waiting{{engine="0",model_name="m"}} {waiting}
vllm:kv_cache_usage_perc{{engine="0",model_name="m"}} 0.5
"""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: StubServer

    def do_GET(self) -> None:
        self._answer(b"")

    def do_POST(self) -> None:
        self._answer(self.rfile.read(int(self.headers.get("Content-Length", 0))))

    def _answer(self, body: bytes) -> None:
        server = self.server
        with server.lock:
            server.asked[self.path] += 1
            server.headers.append(dict(self.headers))
        if server.hangs.get(self.path, server.hangs.get("*")):
            server.released.wait(120)
            if not server.answers_after_hang:
                self.close_connection = True
                return
        if server.resets and self.command == "POST":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
            self.close_connection = True
            return
        status, headers, answer = server.answer(self.path, body)
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if server.streams and self.command == "POST":
            self.send_header("Transfer-Encoding", "chunked")
            self.send_header("Content-Type", "text/event-stream")
            answer = b"%x\r\n%b\r\n0\r\n\r\n" % (len(answer), answer)
        else:
            self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        if server.cut_after is not None and self.command == "POST":
            self.wfile.write(answer[:server.cut_after])
            self.close_connection = True
            return
        self.wfile.write(answer)

    def log_message(self, *_: object) -> None:
        pass


class StubServer(socketserver.ThreadingTCPServer):
    """Answers /health, /metrics, /v1/models, and everything else with its own name.  A context manager.

    `status` is for all paths but those that have one of their own in `statuses`; `hangs` likewise ("*": all).  `stop`
    closes its port and connections, `start` opens the same port again.
    """

    allow_reuse_address = True
    daemon_threads = True
    block_on_close = False
    request_queue_size = 1000

    def __init__(self, name: str = "stub", models: tuple[str, ...] = ("m",), port: int = 0,
                 tls: ssl.SSLContext | None = None) -> None:
        self.name = name
        self.entries: list[dict[str, Any]] = [{"id": model, "object": "model"} for model in models]
        self.lock = threading.Lock()
        self.asked: Counter[str] = Counter()
        self.headers: list[dict[str, str]] = []
        self.released = threading.Event()
        self.hangs: dict[str, bool] = {}
        self.statuses: dict[str, int] = {}
        self.bodies: dict[str, bytes] = {}
        self.extra: dict[str, str] = {}         # headers of every answer
        self.answers_after_hang = False         # once it is released; else it closes the connection
        self.streams = False                    # answers of POST requests are event streams
        self.resets = False                     # connections of POST requests
        self.cut_after: int | None = None       # bytes of a POST's answer
        self.running = self.waiting = 0
        self._open: set[socket.socket] = set()
        self._tls = tls
        super().__init__(("127.0.0.1", port), Handler)
        self.port = self.server_address[1]
        self._thread: threading.Thread | None = None

    @property
    def url(self) -> str:
        return f"{'https' if self._tls else 'http'}://127.0.0.1:{self.port}"

    def answer(self, path: str, body: bytes) -> tuple[int, Mapping[str, str], bytes]:
        status = self.statuses.get(path, self.statuses.get("*", 200))
        if path == "/metrics":
            return status, self.extra, METRICS.format(running=self.running, waiting=self.waiting).encode()
        if path == "/v1/models":
            return status, self.extra, json.dumps({"object": "list", "data": self.entries}).encode()
        if path == "/health":
            return status, self.extra, b""
        if status != 200:
            return status, self.extra, json.dumps({"error": {"message": f"{self.name} fails", "code": status}}).encode()
        if path in self.bodies:
            return 200, self.extra, self.bodies[path]
        return 200, self.extra, json.dumps({"server": self.name, "got": len(body)}).encode()

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 traceback: TracebackType | None) -> None:
        self.stop()

    def stop(self) -> None:
        """As a machine that is switched off: nothing listens, all connections are cut."""
        if self._thread is None:
            return
        self.released.set()
        self.shutdown()
        self._thread.join()
        self._thread = None
        self.server_close()
        with self.lock:
            still_open = list(self._open)
        for one in still_open:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def start(self) -> None:
        """After a `stop`: the same port again."""
        self.released = threading.Event()
        self.socket = socket.socket()
        self.server_address = ("127.0.0.1", self.port)
        self.server_bind()
        self.server_activate()
        self.__enter__()

    def get_request(self) -> tuple[socket.socket, Any]:
        request, address = super().get_request()
        if self._tls is not None:
            request = self._tls.wrap_socket(request, server_side=True, do_handshake_on_connect=False)
        with self.lock:
            self._open.add(request)
        return request, address

    def shutdown_request(self, request: Any) -> None:
        with self.lock:
            self._open.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that left is no event."""
