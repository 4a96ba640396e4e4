"""A connection to a server behind https for those who cannot speak TLS: relays, who copy bytes of plain sockets.

`plain_end` gives the plain end of it.  A thread of its own encrypts and decrypts between the two, in 16 KiB at a time,
and ends when either side has: a half-close is not passed on, for TLS knows none that both sides would understand.
"""

from __future__ import annotations

import contextlib
import select
import socket
import ssl
import threading

from routing.remote import Origin
from routing.upstream import CONNECT_TIMEOUT_S, ConnectionRefused

PIECE = 16 * 1024       # what one TLS record holds


def plain_end(origin: Origin) -> socket.socket:
    """Connects, with TLS; blocks for up to twice CONNECT_TIMEOUT_S.  Raises ConnectionRefused."""
    assert origin.tls is not None
    with contextlib.ExitStack() as opened:
        try:
            secure = opened.enter_context(origin.tls.wrap_socket(
                opened.enter_context(socket.create_connection((origin.host, origin.port), CONNECT_TIMEOUT_S)),
                server_hostname=origin.host))
            ours, theirs = socket.socketpair()
            opened.enter_context(ours)
            opened.enter_context(theirs)
            threading.Thread(target=_Bridge(ours, secure).run, name="tls-bridge", daemon=True).start()
        except ssl.SSLCertVerificationError as error:
            raise ConnectionRefused(f"its certificate is not trusted: {error.verify_message}") from error
        except (OSError, RuntimeError) as error:        # no connection; no thread left
            raise ConnectionRefused("the server takes no connections") from error
        opened.pop_all()
    return theirs


class _Bridge:
    """One thread's; both sockets are its own."""

    def __init__(self, plain: socket.socket, secure: ssl.SSLSocket) -> None:
        self._plain, self._secure = plain, secure
        self._up, self._down = b"", b""         # read from one side and not yet written to the other
        self._send_waits, self._receive_waits = select.POLLOUT, select.POLLIN     # TLS may have to do the other first
        for sock in (plain, secure):
            sock.setblocking(False)

    def run(self) -> None:
        with self._plain, self._secure, contextlib.suppress(OSError):     # ssl.SSLError is one
            while self._move() and self._wait():
                pass
            self._flush()

    def _move(self) -> bool:
        """What can be moved now.  False: one side has ended."""
        if self._up:
            self._send_secure()
        if self._down:
            with contextlib.suppress(BlockingIOError):
                self._down = self._down[self._plain.send(self._down):]
        if not self._up:
            with contextlib.suppress(BlockingIOError):
                self._up = self._plain.recv(PIECE)
                if not self._up:
                    return False
        return bool(self._down) or self._receive_secure()

    def _send_secure(self) -> None:
        self._send_waits = select.POLLOUT
        try:
            self._up = self._up[self._secure.send(self._up):]
        except ssl.SSLWantReadError:
            self._send_waits = select.POLLIN
        except ssl.SSLWantWriteError:
            pass

    def _receive_secure(self) -> bool:
        """False at the end."""
        self._receive_waits = select.POLLIN
        try:
            self._down = self._secure.recv(PIECE)
            return bool(self._down)
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLWantWriteError:
            self._receive_waits = select.POLLOUT
        return True

    def _wait(self) -> bool:
        """Until there is something to move.  False: nobody is there to move it to."""
        if not self._down and self._secure.pending():
            return True
        plain = (0 if self._up else select.POLLIN) | (select.POLLOUT if self._down else 0)
        secure = (self._send_waits if self._up else 0) | (0 if self._down else self._receive_waits)
        waiting = select.poll()
        waiting.register(self._plain, plain)
        if secure:
            waiting.register(self._secure, secure)
        gone = any(fd == self._plain.fileno() and what & (select.POLLHUP | select.POLLERR)
                   for fd, what in waiting.poll())
        return plain != 0 or not gone       # else nothing is read or written there, which would tell

    def _flush(self) -> None:
        """One side has ended: what it said before goes to the other."""
        for sock, left in ((self._plain, self._down), (self._secure, self._up)):
            with contextlib.suppress(OSError):
                if left:
                    sock.settimeout(CONNECT_TIMEOUT_S)
                    sock.sendall(left)
