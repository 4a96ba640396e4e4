"""One client's connection: what it is sending, how it waits without a thread, how its answer is written.

Used by web/worker.py alone.
"""

from __future__ import annotations

import contextlib
import errno
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from gunicorn.http import wsgi
from gunicorn.workers.gthread import TConn

from web.intake import Intake

CLIENT_GONE = frozenset({errno.EPIPE, errno.ECONNRESET, errno.ENOTCONN, errno.EBADF})


class Connection(TConn):
    """A client's connection, with the request it is sending."""

    def __init__(self, cfg: Any, sock: socket.socket, client: Any, server: Any, intake: Intake) -> None:
        super().__init__(cfg, sock, client, server)
        self.intake = intake
        self.spare = False      # past the bound: for those who watch and manage


@dataclass(eq=False)
class Parked:
    """A connection without a thread: what to do when it is readable, and until when to wait."""

    connection: Connection
    deadline: float                                     # monotonic
    on_readable: Callable[[Connection, Parked], None]
    has_begun: bool = False                             # a part of a request is here
    discarded_bytes: int = 0


class OneWrite(wsgi.Response):
    """Writes the head together with the body's first piece."""

    headers_sent: bool
    _head = b""

    def send_headers(self) -> None:
        if not self.headers_sent:
            lines = [*self.default_headers(), *(f"{name}: {value}\r\n" for name, value in self.headers), "\r\n"]
            self._head = "".join(lines).encode("latin-1")
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


