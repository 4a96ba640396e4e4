"""Sends one request to one engine and reads the head of its answer.

`requests` does it, without the part of a Session that costs a request half a millisecond (netrc, proxies of the
environment, cookies): a PreparedRequest made by hand goes to an HTTPAdapter, which answers with urllib3's response.
The adapter's pool tells the exchange which socket it uses, so that another thread can end it at any time.
"""

from __future__ import annotations

import contextlib
import http.client
import ssl
import threading
import time
from collections.abc import Iterator
from socket import SHUT_RDWR
from socket import socket as Socket
from typing import Any, TypeVar

import requests
import urllib3
from requests.adapters import HTTPAdapter
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.util import SKIP_HEADER

from errors import DaemonError, UpstreamError, UpstreamTimeout
from routing.response_head import BadHead, read_head

IDLE_LIMIT_S = 4.0      # the engine closes a connection that idles for 5 s (uvicorn); never be the second to know
CONNECT_TIMEOUT_S = 10.0
POOLS = 4096            # one a backend
BODYLESS = frozenset({204, 304})

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

    def abort(self) -> None:
        """End it now, whatever its thread waits for: that sees a closed connection."""
        with self._lock:
            self.aborted = True
            if self._socket is not None:
                _shut(self._socket)


def _shut(sock: Socket) -> None:
    with contextlib.suppress(OSError):
        Socket.shutdown(sock, SHUT_RDWR)    # of a TLS socket too: its own takes the session from under its reader


class _Current(threading.local):
    exchange: Exchange | None = None
    tls: ssl.SSLContext | None = None


_current = _Current()


class _Answer(http.client.HTTPResponse):
    """What http.client makes of a head, but for the reading of it."""

    fp: Any
    _method: str

    def begin(self) -> None:
        if self.headers is not None:
            return
        if self.fp.peek(1) and _current.exchange is not None:
            _current.exchange.stale = False
        head = read_head(self.fp)
        self.code = self.status = head.status
        self.reason, self.version = head.reason, 10 + head.minor
        message = http.client.HTTPMessage()
        for name, value in head.headers:
            message.set_raw(name, value)
        self.headers = self.msg = message
        bodyless = head.status in BODYLESS or self._method == "HEAD"
        self.chunked, self.chunk_left = head.chunked and not bodyless, None
        self.length = 0 if bodyless else head.length
        self.will_close = head.closes or (self.length is None and not head.chunked)


class _Attached(HTTPConnection):
    idle_since = 0.0
    response_class = _Answer

    def connect(self) -> None:
        super().connect()
        if _current.exchange is not None and self.sock is not None:
            _current.exchange.attach(self.sock, reused=False)


class _TlsConnection(_Attached, HTTPSConnection):
    pass


class _Pool(HTTPConnectionPool):
    ConnectionCls = _Attached

    def _get_conn(self, timeout: float | None = None) -> Any:
        connection = super()._get_conn(timeout)
        if isinstance(connection, _Attached) and connection.sock is not None:
            exchange = _current.exchange
            if time.monotonic() - connection.idle_since > IDLE_LIMIT_S or (exchange is not None and exchange.fresh):
                connection.close()
            elif exchange is not None:
                exchange.attach(connection.sock, reused=True)
        return connection

    def _put_conn(self, conn: Any) -> None:
        if isinstance(conn, _Attached):
            conn.idle_since = time.monotonic()
        super()._put_conn(conn)


class _TlsPool(_Pool, HTTPSConnectionPool):
    ConnectionCls = _TlsConnection

    def _validate_conn(self, conn: Any) -> None:
        """Without urllib3's warning where the user has turned verification off, who knows it."""
        if conn.is_closed:
            conn.connect()


class _Adapter(HTTPAdapter):
    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        super().init_poolmanager(*args, **kwargs)
        self.poolmanager.pool_classes_by_scheme = {"http": _Pool, "https": _TlsPool}

    def build_connection_pool_key_attributes(self, *args: Any, **kwargs: Any) -> Any:
        """The exchange's own TLS settings are all that counts: requests would load its authorities each time."""
        host, _ = super().build_connection_pool_key_attributes(*args, **kwargs)
        return host, {"ssl_context": _current.tls} if _current.tls is not None else {}

    def cert_verify(self, *args: Any, **kwargs: Any) -> None:
        """The context does."""

    def build_response(self, req: requests.PreparedRequest, resp: Any) -> Any:
        """urllib3's response as it is: its bytes pass on unread."""
        return resp


class Upstream:
    """Thread-safe; keeps idle connections to each engine for up to IDLE_LIMIT_S seconds."""

    def __init__(self, connections: int) -> None:
        self._adapter = _Adapter(pool_connections=POOLS, pool_maxsize=connections, max_retries=0)

    def send(self, exchange: Exchange, method: str, url: str, headers: dict[str, str], body: bytes | bytearray | None,
             timeout_s: float, tls: ssl.SSLContext | None = None) -> urllib3.HTTPResponse:
        """The answer with its head read and its body not.  Blocks up to `timeout_s` seconds for the head.  An
        https:// address needs `tls`.

        A pooled connection that the engine had closed meanwhile is tried once more on a fresh one, but never once
        an answer has begun.  Raises ConnectionRefused when nothing was sent, else UpstreamError or UpstreamTimeout.
        """
        request = requests.PreparedRequest()
        request.method, request.url = method, url
        request.body = body  # type: ignore[assignment]  # urllib3 sends any buffer
        request.headers = headers  # type: ignore[assignment]
        _current.exchange, _current.tls = exchange, tls
        try:
            with upstream_errors():
                try:
                    return self._send(request, timeout_s)
                except requests.ConnectionError as error:
                    if not exchange.stale or exchange.aborted or _cause(error, BadHead):
                        raise
                return self._send_again(exchange, request, timeout_s)
        finally:
            _current.exchange = _current.tls = None

    def _send(self, request: requests.PreparedRequest, timeout_s: float) -> urllib3.HTTPResponse:
        response: Any = self._adapter.send(request, stream=True, timeout=(min(CONNECT_TIMEOUT_S, timeout_s), timeout_s),
                                            proxies={})
        return response  # type: ignore[no-any-return]

    def _send_again(self, exchange: Exchange, request: requests.PreparedRequest,
                    timeout_s: float) -> urllib3.HTTPResponse:
        exchange.fresh = True
        try:
            return self._send(request, timeout_s)
        except requests.ConnectionError as error:
            if _cause(error, urllib3.exceptions.NewConnectionError):
                # It may have been this request that killed the engine: not to be tried on another one.
                raise UpstreamError("the engine closed the connection before it answered") from error
            raise

    def close(self) -> None:
        self._adapter.close()


Cause = TypeVar("Cause", bound=BaseException)


def _cause(error: BaseException, kind: type[Cause]) -> Cause | None:
    """The exception of this kind that requests and urllib3 have wrapped, in `reason` or in `args`."""
    inner = [getattr(error, "reason", None), *error.args]
    for one in inner:
        if isinstance(one, kind):
            return one
        if isinstance(one, BaseException) and (found := _cause(one, kind)) is not None:
            return found
    return None


@contextlib.contextmanager
def upstream_errors() -> Iterator[None]:
    """Foreign exceptions of sending, reading and closing become ours, here and nowhere else."""
    try:
        yield
    except DaemonError:
        raise
    except requests.ConnectTimeout as error:
        raise ConnectionRefused("the engine does not take the connection") from error
    except (requests.ReadTimeout, urllib3.exceptions.ReadTimeoutError) as error:
        raise UpstreamTimeout("the engine did not answer in time (REQUEST_TIMEOUT)") from error
    except requests.ConnectionError as error:
        if _cause(error, urllib3.exceptions.NewConnectionError) is not None:
            raise ConnectionRefused("the engine takes no connections") from error
        if (untrusted := _cause(error, ssl.SSLCertVerificationError)) is not None:
            raise ConnectionRefused(f"its certificate is not trusted: {untrusted.verify_message}") from error
        if (bad := _cause(error, BadHead)) is not None:
            raise UpstreamError(f"the engine's answer is not valid HTTP: {bad}", code="bad_answer") from error
        raise UpstreamError("the engine closed the connection before it answered") from error
    except (requests.RequestException, urllib3.exceptions.HTTPError, http.client.HTTPException, OSError) as error:
        raise UpstreamError(f"the connection to the engine broke ({type(error).__name__})") from error


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
    present = {name.lower() for name in headers}
    for name in ("User-Agent", "Accept-Encoding"):
        if name.lower() not in present:
            headers[name] = SKIP_HEADER
    if body is not None:
        headers["Content-Length"] = str(len(body))
    return headers


def response_headers(response: urllib3.HTTPResponse) -> list[tuple[str, str]]:
    """The engine's headers for the client, repeated ones kept apart."""
    return [(name, value) for name, value in response.headers.iteritems() if name.lower() not in _NOT_RETURNED]
