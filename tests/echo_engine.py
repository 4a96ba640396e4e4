"""An engine that shows what reached it: a request is answered with its own bytes, or with the bytes that it asks for.

`VLLM_COMMAND="python tests/echo_engine.py"`.  A JSON body with `answer` gets exactly that text (latin-1) as the whole
response, after which the connection closes; any other request gets its head and body back as they came.
"""

from __future__ import annotations

import contextlib
import json
import socket
import socketserver
import sys

READY = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"


class Handler(socketserver.BaseRequestHandler):
    request: socket.socket

    def handle(self) -> None:
        received = b""
        while True:
            while b"\r\n\r\n" not in received:
                if not (piece := self.request.recv(1 << 16)):
                    return
                received += piece
            head, _, received = received.partition(b"\r\n\r\n")
            length = next((int(line.split(b":")[1]) for line in head.split(b"\r\n")
                           if line.lower().startswith(b"content-length:")), 0)
            while len(received) < length and (piece := self.request.recv(1 << 16)):
                received += piece
            body, received = received[:length], received[length:]
            asked = None
            with contextlib.suppress(ValueError, AttributeError):
                asked = json.loads(body).get("answer")
            if asked is not None:
                self.request.sendall(asked.encode("latin-1"))
                return
            if head.startswith(b"GET /health "):
                self.request.sendall(READY)
                continue
            whole = head + b"\r\n\r\n" + body
            self.request.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: application/octet-stream\r\n"
                                 b"Content-Length: %d\r\n\r\n" % len(whole) + whole)


class Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True


if __name__ == "__main__":
    Server(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Handler).serve_forever()
