"""Sends one request to one engine and reads the head of its answer.

`requests` makes the connections to other machines: its HTTPAdapter knows names, TLS and certificates.  One to an
engine here is a socket to a port of 127.0.0.1 and nothing more: there is no name to look up.  What goes over a
connection is written and read here: a Session, urllib3 and http.client together take a request more time than
everything else the daemon does with it.  The exchange knows the socket, so that another thread can end it at any time.
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
from socket import AF_INET, IPPROTO_TCP, SHUT_RDWR, TCP_NODELAY
from socket import socket as Socket
from typing import Any

import urllib3
from requests.adapters import HTTPAdapter
from urllib3.connectionpool import HTTPConnectionPool
from urllib3.exceptions import ConnectTimeoutError, NewConnectionError

from errors import BadRequest, UpstreamError, UpstreamTimeout
from routing.answer import BODYLESS, Answer, Incoming
from routing.response_head import BadHead, read_head

IDLE_LIMIT_S = 4.0      # the engine closes a connection that idles for 5 s (uvicorn); never be the second to know
CONNECT_TIMEOUT_S = 10.0
PREPARE_TIMEOUT_S = 1.0
PREPARED = 2            # connections that wait for the next streams
POOLS = 4096            # one a backend
LOOPBACK = "127.0.0.1"
FIRST_BYTES = 1 << 14   # of a body, which go out together with the head
NO_ANSWER = "the engine closed the connection before it answered"
REFUSED = "the engine takes no connections"
NOT_TAKEN = "the engine does not take the connection"

_UNSAFE_TARGET = re.compile("[\x00-\x20\x7f]")
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")      # but for tabs and the ends of lines

HOP_BY_HOP = frozenset({
    "connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "proxy-connection", "te", "trailer",
    "transfer-encoding", "upgrade"})
"""RFC 9110, 7.6.1, and what common practice adds; each belongs to one connection."""

_NOT_FORWARDED = HOP_BY_HOP | {"host", "content-length", "expect", "authorization", "x-api-key"}
"""Keys are for the daemon; length and host are set anew."""

NOT_RETURNED = HOP_BY_HOP | {"server", "date"}
"""What an answer says of its connection, and of who made it: this server says that itself."""


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
        self._is_here = pool.scheme == "http" and pool.host == LOOPBACK
        self._idle: deque[tuple[Socket, float]] = deque()      # since when; any thread may take one

    def take(self, exchange: Exchange, timeout_s: float, runs: Callable[[], bool]) -> Socket:
        """One that was not idle for too long and is still open, or a new one; the exchange knows it.  Raises
        ConnectionRefused."""
        while not exchange.fresh and (found := self._pop()) is not None:
            sock, since = found
            if time.monotonic() - since <= IDLE_LIMIT_S and _is_silent(sock):
                exchange.attach(sock, reused=True)
                return sock
            sock.close()
        sock = self._connect(timeout_s, runs)
        exchange.attach(sock, reused=False)
        return sock

    def put(self, sock: Socket) -> None:
        self._idle.append((sock, time.monotonic()))
        if len(self._idle) > self._most:
            self.close(self._most)

    def prepare(self, runs: Callable[[], bool]) -> None:
        """Have PREPARED of them ready: a stream may come while another one's thread is still about to replace its own.
        """
        now = time.monotonic()
        ready = sum([now - since <= IDLE_LIMIT_S for _, since in list(self._idle)[-PREPARED:]])
        with contextlib.suppress(OSError, urllib3.exceptions.HTTPError, ConnectionRefused):
            for _ in range(PREPARED - ready):
                self.put(self._connect(PREPARE_TIMEOUT_S, runs))

    def close(self, but: int = 0) -> None:
        """All that idle, or the oldest of them."""
        with contextlib.suppress(IndexError):
            while len(self._idle) > but:
                self._idle.popleft()[0].close()

    def _pop(self) -> tuple[Socket, float] | None:
        try:
            return self._idle.pop()
        except IndexError:
            return None

    def _connect(self, timeout_s: float, runs: Callable[[], bool]) -> Socket:
        sock = self._connect_here(timeout_s) if self._is_here else self._connect_there(timeout_s)
        try:
            if not runs():      # asked after it was made: who had the port lived until then, or it is a stranger's
                raise ConnectionRefused("the engine takes no connections: its process has ended")
        except BaseException:
            sock.close()
            raise
        return sock

    def _connect_here(self, timeout_s: float) -> Socket:
        sock = None
        try:
            sock = Socket(AF_INET)
            sock.settimeout(timeout_s)
            sock.connect((LOOPBACK, self._pool.port))
            sock.setsockopt(IPPROTO_TCP, TCP_NODELAY, 1)
        except OSError as error:
            if sock is not None:
                sock.close()
            raise ConnectionRefused(NOT_TAKEN if isinstance(error, TimeoutError) else REFUSED) from error
        return sock

    def _connect_there(self, timeout_s: float) -> Socket:
        connection: Any = self._pool._new_conn()
        connection.timeout = timeout_s
        try:
            connection.connect()
        except NewConnectionError as error:
            raise ConnectionRefused(REFUSED) from error
        except (TimeoutError, ConnectTimeoutError) as error:
            raise ConnectionRefused(NOT_TAKEN) from error
        except ssl.SSLCertVerificationError as error:
            raise ConnectionRefused(f"its certificate is not trusted: {error.verify_message}") from error
        sock: Socket = connection.sock
        if isinstance(sock, ssl.SSLSocket):     # else a body that was cut may look like a whole one
            sock.suppress_ragged_eofs = False   # type: ignore[attr-defined]
        return sock


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
            except ConnectionRefused as error:
                # It may have been this request that killed the engine: not to be tried on another one.
                raise UpstreamError(NO_ANSWER) from error

    def prepare(self, url: str, runs: Callable[[], bool] = lambda: True) -> None:
        """A stream has taken its connection along: open another one now, when nobody waits for it.  Not for https."""
        scheme, _, rest = url.partition("://")
        self._backend(f"{scheme}://{rest.partition('/')[0]}", None).prepare(runs)

    def _exchange(self, exchange: Exchange, backend: _Backend, method: str, head: bytes,
                  body: bytes | bytearray | None, timeout_s: float, runs: Callable[[], bool]) -> Answer:
        sock = backend.take(exchange, min(CONNECT_TIMEOUT_S, timeout_s), runs)
        try:
            if sock.gettimeout() != timeout_s:
                sock.settimeout(timeout_s)
            whole = _send(sock, head, body)
            incoming = Incoming(sock)
            if incoming.more():
                exchange.stale = False
            read = read_head(incoming)
            answer = Answer(read, incoming, method == "HEAD" or read.status in BODYLESS,
                            lambda reusable: backend.put(sock) if reusable and whole else sock.close())
            answer.begin()
        except BaseException:
            sock.close()
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


class _UpstreamErrors:
    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if error is not None and (ours := _as_ours(error)) is not None:
            raise ours from error


_UPSTREAM_ERRORS = _UpstreamErrors()


def upstream_errors() -> _UpstreamErrors:
    """Inside it foreign exceptions of sending, reading and closing become ours, here and nowhere else."""
    return _UPSTREAM_ERRORS


def _as_ours(error: BaseException) -> UpstreamError | None:
    """None for one that stays what it is."""
    if isinstance(error, TimeoutError):
        return UpstreamTimeout("the engine did not answer in time (REQUEST_TIMEOUT, STREAM_IDLE_TIMEOUT)")
    if isinstance(error, BadHead):
        return UpstreamError(f"the engine's answer is not valid HTTP: {error}", code="bad_answer")
    if isinstance(error, ConnectionError):
        return UpstreamError(NO_ANSWER)
    if isinstance(error, urllib3.exceptions.HTTPError | OSError):
        return UpstreamError(f"the connection to the engine broke ({type(error).__name__})")
    return None


def has_lines(head: str, count: int) -> bool:
    """Whether a head is so many lines, as it was put together: no name and no value in it makes another one, or holds a
    control character."""
    return _CONTROL.search(head) is None and head.count("\r") == head.count("\n") == count - 1


def request_head(method: str, target: str, authority: str, headers: Mapping[str, str]) -> bytes:
    """Raises BadRequest for what would be another request to the engine than to us."""
    head = "\r\n".join([f"{method} {target} HTTP/1.1", f"Host: {authority}",
                        *[f"{name}: {value}" for name, value in headers.items()], "", ""])
    if _UNSAFE_TARGET.search(target) or not has_lines(head, len(headers) + 4):
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
