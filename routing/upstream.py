"""Sends one request to one engine and reads the head of its answer.

`requests` makes the connections: its HTTPAdapter knows addresses, TLS and certificates.  What goes over a connection
is written and read here: a Session, urllib3 and http.client together take a request more time than everything else
the daemon does with it.  The exchange knows the socket, so that another thread can end it at any time.
"""

from __future__ import annotations

import contextlib
import re
import ssl
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from select import POLLIN, poll
from socket import SHUT_RDWR
from socket import socket as Socket
from typing import Any

import urllib3
from requests.adapters import HTTPAdapter
from urllib3.connection import HTTPConnection
from urllib3.connectionpool import HTTPConnectionPool
from urllib3.exceptions import ConnectTimeoutError, NewConnectionError

from errors import BadRequest, DaemonError, UpstreamError, UpstreamTimeout
from routing.answer import BODYLESS, Answer, Incoming
from routing.response_head import BadHead, read_head

IDLE_LIMIT_S = 4.0      # the engine closes a connection that idles for 5 s (uvicorn); never be the second to know
CONNECT_TIMEOUT_S = 10.0
PREPARE_TIMEOUT_S = 1.0
POOLS = 4096            # one a backend
FIRST_BYTES = 1 << 14   # of a body, which go out together with the head
NO_ANSWER = "the engine closed the connection before it answered"

_UNSAFE_TARGET = re.compile("[\x00-\x20\x7f]")
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")      # but for tabs and the ends of lines

HOP_BY_HOP = frozenset({
    "connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "proxy-connection", "te", "trailer",
    "transfer-encoding", "upgrade"})
"""RFC 9110, 7.6.1, and what common practice adds; each belongs to one connection."""

_NOT_FORWARDED = HOP_BY_HOP | {"host", "content-length", "expect", "authorization", "x-api-key"}
"""Keys are for the daemon; length and host are set anew."""

_NOT_RETURNED = HOP_BY_HOP | {"server", "date"}


class ClientLeft(Exception):
    """The client closed its connection; nobody reads an answer."""


class ConnectionRefused(UpstreamError):
    """Nothing was sent: safe to try elsewhere."""

    code = "engine_unreachable"


class Exchange:
    """One request to one engine, which any thread may `abort`.

    `stale`: the connection may have been closed before the request reached it: it was a used one, and nothing of an
    answer came.  `fresh`: only a new connection will do.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._socket: Socket | None = None
        self.aborted = False
        self.fresh = False
        self.stale = False

    def attach(self, sock: Socket, *, reused: bool) -> None:
        with self._lock:
            self._socket, self.stale = sock, reused
            aborted = self.aborted
        if aborted:
            _shut(sock)

    @property
    def socket(self) -> Socket | None:
        return self._socket

    def detach(self) -> None:
        """The connection is done with (back in its pool, or handed on): an abort must not touch it any more."""
        with self._lock:
            self._socket = None

    def wait_for(self, timeout_s: float) -> None:
        """From now on, how long one piece of the answer may take."""
        with self._lock:
            if self._socket is not None:
                self._socket.settimeout(timeout_s)

    def abort(self) -> None:
        """End it now, whatever its thread waits for: that sees a closed connection."""
        with self._lock:
            self.aborted = True
            if self._socket is not None:
                _shut(self._socket)


def _shut(sock: Socket) -> None:
    with contextlib.suppress(OSError):
        Socket.shutdown(sock, SHUT_RDWR)    # of a TLS socket too: its own takes the session from under its reader


class _Backend:
    """The connections to one address.  Those that idle wait here, and the last one used is taken first."""

    def __init__(self, pool: HTTPConnectionPool, most: int) -> None:
        self._pool = pool
        self._most = most
        self._idle: deque[tuple[HTTPConnection, float]] = deque()      # since when; any thread may take one

    def take(self, exchange: Exchange, timeout_s: float, runs: Callable[[], bool]) -> HTTPConnection:
        """One that was not idle for too long and is still open, or a new one; the exchange knows its socket."""
        while not exchange.fresh and (found := self._pop()) is not None:
            connection, since = found
            if time.monotonic() - since <= IDLE_LIMIT_S and _is_silent(connection.sock):
                exchange.attach(connection.sock, reused=True)
                return connection
            connection.close()
        connection = self._connect(timeout_s, runs)
        exchange.attach(connection.sock, reused=False)
        return connection

    def put(self, connection: HTTPConnection) -> None:
        self._idle.append((connection, time.monotonic()))
        if len(self._idle) > self._most:
            self.close(self._most)

    def prepare(self, runs: Callable[[], bool]) -> None:
        """Have one ready for the next request."""
        if not self._idle:
            with contextlib.suppress(OSError, urllib3.exceptions.HTTPError, ConnectionRefused):
                self.put(self._connect(PREPARE_TIMEOUT_S, runs))

    def close(self, but: int = 0) -> None:
        """All that idle, or the oldest of them."""
        with contextlib.suppress(IndexError):
            while len(self._idle) > but:
                self._idle.popleft()[0].close()

    def _pop(self) -> tuple[HTTPConnection, float] | None:
        try:
            return self._idle.pop()
        except IndexError:
            return None

    def _connect(self, timeout_s: float, runs: Callable[[], bool]) -> HTTPConnection:
        connection: Any = self._pool._new_conn()
        connection.timeout = timeout_s
        try:
            connection.connect()
        except NewConnectionError:
            raise
        except (TimeoutError, ConnectTimeoutError) as error:
            raise ConnectionRefused("the engine does not take the connection") from error
        except ssl.SSLCertVerificationError as error:
            raise ConnectionRefused(f"its certificate is not trusted: {error.verify_message}") from error
        if isinstance(connection.sock, ssl.SSLSocket):      # else a body that was cut may look like a whole one
            connection.sock.suppress_ragged_eofs = False    # type: ignore[attr-defined]
        try:
            if not runs():      # asked after it was made: who had the port lived until then, or it is a stranger's
                raise NewConnectionError(connection, "its process has ended")
        except BaseException:
            connection.close()
            raise
        return connection  # type: ignore[no-any-return]


class Upstream:
    """Thread-safe; keeps idle connections to each engine for up to IDLE_LIMIT_S seconds."""

    def __init__(self, connections: int) -> None:
        self._connections = connections
        self._adapter = HTTPAdapter(pool_connections=POOLS)
        self._backends: dict[tuple[str, ssl.SSLContext | None], _Backend] = {}

    def send(self, exchange: Exchange, method: str, url: str, headers: dict[str, str], body: bytes | bytearray | None,
             timeout_s: float, tls: ssl.SSLContext | None = None, runs: Callable[[], bool] = lambda: True) -> Answer:
        """The answer with its head read, and its body begun if that has a length.  Blocks up to `timeout_s` seconds for
        each.  An https:// address needs `tls`.  A new connection is used only if the engine `runs` when it has been
        made.

        A pooled connection that the engine had closed meanwhile is tried once more on a fresh one, but never once
        an answer has begun.  Raises ConnectionRefused when nothing was sent, else UpstreamError or UpstreamTimeout;
        BadRequest for what cannot stand in a head.
        """
        scheme, _, rest = url.partition("://")
        authority, _, path = rest.partition("/")
        head = request_head(method, f"/{path}", authority, headers)
        backend = self._backend(f"{scheme}://{authority}", tls)
        with upstream_errors():
            try:
                return self._exchange(exchange, backend, method, head, body, timeout_s, runs)
            except ConnectionError:
                if not exchange.stale or exchange.aborted:
                    raise
            exchange.fresh = True
            try:
                return self._exchange(exchange, backend, method, head, body, timeout_s, runs)
            except NewConnectionError as error:
                # It may have been this request that killed the engine: not to be tried on another one.
                raise UpstreamError(NO_ANSWER) from error

    def prepare(self, url: str, runs: Callable[[], bool] = lambda: True) -> None:
        """A stream has taken its connection along: open another one now, when nobody waits for it.  Not for https."""
        scheme, _, rest = url.partition("://")
        self._backend(f"{scheme}://{rest.partition('/')[0]}", None).prepare(runs)

    def _exchange(self, exchange: Exchange, backend: _Backend, method: str, head: bytes,
                  body: bytes | bytearray | None, timeout_s: float, runs: Callable[[], bool]) -> Answer:
        connection = backend.take(exchange, min(CONNECT_TIMEOUT_S, timeout_s), runs)
        try:
            if connection.sock.gettimeout() != timeout_s:
                connection.sock.settimeout(timeout_s)
            whole = _send(connection.sock, head, body)
            incoming = Incoming(connection.sock)
            if incoming.more():
                exchange.stale = False
            read = read_head(incoming)
            answer = Answer(read, incoming, method == "HEAD" or read.status in BODYLESS,
                            lambda reusable: backend.put(connection) if reusable and whole else connection.close())
            answer.begin()
        except BaseException:
            connection.close()
            raise
        return answer

    def _backend(self, base: str, tls: ssl.SSLContext | None) -> _Backend:
        if (backend := self._backends.get((base, tls))) is None:
            # The context's own settings are all that counts: requests would load its authorities each time.
            pool = self._adapter.poolmanager.connection_from_url(base, {"ssl_context": tls} if tls is not None else {})
            backend = self._backends.setdefault((base, tls), _Backend(pool, self._connections))
        return backend

    def close(self) -> None:
        self._adapter.close()
        for backend in list(self._backends.values()):
            backend.close()


def _is_silent(sock: Socket) -> bool:
    """Whether it is open still: what an idle connection can bring is its end, or what nobody asked for."""
    look = poll()
    look.register(sock.fileno(), POLLIN)
    return not look.poll(0)


def _send(sock: Socket, head: bytes, body: bytes | bytearray | None) -> bool:
    """Whether all of it was taken: an engine may answer, and close, before it has read everything."""
    try:
        if not body:
            sock.sendall(head)
        else:
            sock.sendall(head + body[:FIRST_BYTES])
            if len(body) > FIRST_BYTES:
                with memoryview(body) as view:
                    sock.sendall(view[FIRST_BYTES:])
    except (BrokenPipeError, ConnectionResetError):
        return False
    return True


@contextlib.contextmanager
def upstream_errors() -> Iterator[None]:
    """Foreign exceptions of sending, reading and closing become ours, here and nowhere else."""
    try:
        yield
    except DaemonError:
        raise
    except NewConnectionError as error:
        raise ConnectionRefused("the engine takes no connections") from error
    except TimeoutError as error:
        raise UpstreamTimeout("the engine did not answer in time (REQUEST_TIMEOUT, STREAM_IDLE_TIMEOUT)") from error
    except BadHead as error:
        raise UpstreamError(f"the engine's answer is not valid HTTP: {error}", code="bad_answer") from error
    except ConnectionError as error:
        raise UpstreamError(NO_ANSWER) from error
    except (urllib3.exceptions.HTTPError, OSError) as error:
        raise UpstreamError(f"the connection to the engine broke ({type(error).__name__})") from error


def request_head(method: str, target: str, authority: str, headers: Mapping[str, str]) -> bytes:
    """Raises BadRequest for what would be another request to the engine than to us."""
    head = "\r\n".join([f"{method} {target} HTTP/1.1", f"Host: {authority}",
                        *(f"{name}: {value}" for name, value in headers.items()), "", ""])
    if _UNSAFE_TARGET.search(target) or _CONTROL.search(head) \
            or not head.count("\r") == head.count("\n") == len(headers) + 3:
        raise BadRequest("the request's head holds characters that cannot be passed on", code="invalid_request")
    return head.encode("latin-1")


def request_headers(incoming: Iterator[tuple[str, str]] | Any, body: bytes | bytearray | None) -> dict[str, str]:
    """The client's headers for the engine: without hop-by-hop ones, keys, and those that `Connection` names.

    Repeated headers are joined with commas (RFC 9110, 5.3).
    """
    headers: dict[str, str] = {}
    named: set[str] = set()
    for name, value in incoming:
        lower = name.lower()
        if lower == "connection":
            named.update(token.strip().lower() for token in value.split(","))
        if lower not in _NOT_FORWARDED:
            headers[name] = f"{headers[name]}, {value}" if name in headers else value
    for name in [name for name in headers if name.lower() in named]:
        del headers[name]
    if body is not None:
        headers["Content-Length"] = str(len(body))
    return headers


def response_headers(answer: Answer) -> list[tuple[str, str]]:
    """The engine's headers for the client, repeated ones kept apart."""
    return [(name, value) for name, value in answer.head.headers if name.lower() not in _NOT_RETURNED]
