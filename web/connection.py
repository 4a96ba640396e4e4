"""One client's connection: what it is sending, how it waits without a thread, how its answer is written.

Used by web/worker.py alone.
"""

from __future__ import annotations

import contextlib
import errno
import socket
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from gunicorn.http import wsgi
from gunicorn.http.errors import InvalidHeader

from routing.reply import http_date
from routing.upstream import NOT_RETURNED, has_lines
from web.intake import Intake

CLIENT_GONE = frozenset({errno.EPIPE, errno.ECONNRESET, errno.ENOTCONN, errno.EBADF})


class Connection:
    """A client's connection, with the request it is sending.  `client` and `server` are the addresses of its ends."""

    __slots__ = ("client", "intake", "server", "sock", "spare")

    def __init__(self, sock: socket.socket, client: Any, server: Any, intake: Intake) -> None:
        sock.setblocking(False)
        self.sock = sock
        self.client = client
        self.server = server
        self.intake = intake
        self.spare = False      # past the bound: for those who watch and manage

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.sock.close()


@dataclass(eq=False)
class Parked:
    """A connection without a thread: what to do when it is readable, and until when to wait."""

    connection: Connection
    deadline: float                                     # monotonic
    on_readable: Callable[[Connection, Parked], None]
    has_begun: bool = False                             # a part of a request is here
    discarded_bytes: int = 0


class OneWrite(wsgi.Response):
    """Writes the head together with the body's first piece, and looks at the head once and not at each of its parts."""

    headers_sent: bool
    headers: list[tuple[str, str]]
    _head = b""

    def process_headers(self, headers: Iterable[tuple[str, str]]) -> None:
        for name, value in headers:
            lower = name.lower()
            if lower == "content-length":
                self.response_length = int(value)
            if lower not in NOT_RETURNED:   # these are the server's to say
                self.headers.append((name, value))

    def send_headers(self) -> None:
        """Raises InvalidHeader for one that would be another line, or none."""
        if not self.headers_sent:
            close = self.should_close()
            lines = [f"HTTP/{self.req.version[0]}.{self.req.version[1]} {self.status}", f"Server: {self.version}",
                     f"Date: {http_date()}", "Connection: close" if close else "Connection: keep-alive"]
            if self.chunked:
                lines.append("Transfer-Encoding: chunked")
            lines += [f"{name}: {value}" for name, value in self.headers]
            head = "\r\n".join(lines)
            if not has_lines(head, len(lines)):
                raise InvalidHeader("the answer's head holds control characters")
            self._head = f"{head}\r\n\r\n".encode("latin-1")
            self.headers_sent = True

    def _emit_body(self, data: bytes) -> None:
        self._write(b"%x\r\n%b\r\n" % (len(data), data) if self.chunked else data)

    def close(self) -> None:
        self.send_headers()
        self._write(b"0\r\n\r\n" if self.chunked else b"")

    def _write(self, data: bytes) -> None:
        head, self._head = self._head, b""
        if head or data:
            self.sock.sendall(head + data if head else data)


def has_left(client: socket.socket) -> bool:
    """Whether the client has ended its side; what it has sent beyond its request stays."""
    try:
        return client.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True


def reset(client: socket.socket) -> None:
    """Close so that it shows: to HTTP/1.0 the plain end of a connection is the good end of a body."""
    with contextlib.suppress(OSError):
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.close()


