"""One try of one request at one backend: send it, read the head of the answer, hand a stream to a relay.

Whoever fails here gives the lease back; whoever succeeds passes it on with what it returns.
"""

from __future__ import annotations

import socket
import ssl
import time
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple, Protocol
from urllib.parse import quote

from errors import EngineStopped, ServerLost, UpstreamError
from instances.instance import Lease, Problem, State
from routing import request_id
from routing.answer import Answer
from routing.attempts import outcome_of, retry_after_s
from routing.balancer import Balancer
from routing.client_watch import Watched
from routing.incoming import Incoming
from routing.relay import may_be_taken_over, take_over
from routing.relay_process import Relays
from routing.remote import Origin, Outcome, RemoteLease
from routing.upstream import NOT_RETURNED, ClientLeft, ConnectionRefused, Exchange, Upstream, request_headers

CORS = "vllm_server.cors"   # in a request's environ: headers for the page that sent it
VERDICT_S = 1.0             # how long a broken request waits for the keeper to say why
_PATH_SAFE = "/:@!$&'()*+,;=-._~"

OnFirst = Callable[[bytes], None]


class Manager(Protocol):
    """What a try needs of the registry."""

    def problem_of(self, instance_id: str) -> tuple[State, Problem | None, str] | None: ...

    def wait_for_change(self, timeout_s: float) -> None: ...


class Outgoing(NamedTuple):
    """A request as a backend gets it, and whose it is: Flask's own is gone while a body is still being written."""

    method: str
    target: str
    headers: dict[str, str]
    payload: bytes | bytearray | None
    client: socket.socket
    protocol: str
    relayed: bool       # whether a relay may carry its answer, unseen
    ours: Sequence[tuple[str, str]] = ()        # headers of its answer that are the daemon's own


def outgoing(incoming: Incoming, path: str, body: bytes | bytearray, *, relayed: bool = True) -> Outgoing:
    payload = body if body or incoming.method in ("POST", "PUT", "PATCH") else None
    headers = request_headers(incoming.headers, payload)
    headers[request_id.HEADER] = asked = request_id.current()
    environ = incoming.environ
    return Outgoing(incoming.method, target(incoming, path), headers, payload, environ["gunicorn.socket"],
                    environ["SERVER_PROTOCOL"], relayed, ((request_id.HEADER, asked), *environ.get(CORS, ())))


def target(incoming: Incoming, path: str) -> str:
    """Path and query as they go to the engine: the path in its one canonical spelling."""
    query = incoming.environ.get("QUERY_STRING", "")
    return f"{_spelled(path)}?{query}" if query else _spelled(path)


@lru_cache(maxsize=256)
def _spelled(path: str) -> str:
    return quote(path, safe=_PATH_SAFE)


def origin_of(lease: Lease) -> Origin:
    return lease.origin if isinstance(lease, RemoteLease) else Origin.local(lease.port)


def headers_for(origin: Origin, headers: dict[str, str], via: str) -> dict[str, str]:
    """What a server on another machine gets beside the client's headers: its own, and who passed the request on."""
    ours = {name.lower() for name in origin.headers}
    sent = {name: value for name, value in headers.items() if name.lower() not in ours}
    sent["Via"] = f"{sent['Via']}, 1.1 {via}" if "Via" in sent else f"1.1 {via}"
    return sent | dict(origin.headers)


class Forwarder:
    """`name`: this daemon's among vllm-servers."""

    def __init__(self, manager: Manager, balancer: Balancer, upstream: Upstream, relays: Relays | None,
                 name: str) -> None:
        self._manager = manager
        self._balancer = balancer
        self._upstream = upstream
        self._relays = relays
        self._name = name

    def send(self, sent: Outgoing, lease: Lease, watched: Watched,
             limit_s: float) -> tuple[Exchange, Answer]:
        """Send and read the head; the balancer is told how that went.

        Releases the lease if it fails: with ConnectionRefused, another UpstreamError, or ClientLeft.
        """
        exchange, origin = Exchange(), origin_of(lease)
        headers = self.headers(lease, sent.headers)
        try:
            lease.on_cut(exchange.abort)
            watched.on_gone(exchange.abort)
            response = self._upstream.send(exchange, sent.method, origin.base + sent.target, headers, sent.payload,
                                           limit_s, origin.tls, lease.runs)
        except BaseException as error:
            watched.on_gone(None)
            exchange.detach()
            try:
                verdict = self._verdict(error, lease, watched)
                self._balancer.note_outcome(told_as(lease), _blame(verdict))
                raise verdict from error
            finally:
                lease.release()
        if isinstance(lease, RemoteLease):
            lease.answered = True
        head = response.head
        outcome = outcome_of(head.status)
        self._balancer.note_outcome(told_as(lease), outcome, retry_after_s(response.header("retry-after"))
                                    if outcome is Outcome.BUSY else None)
        head.headers[:] = [*(pair for pair in head.headers if is_passed_on(pair[0])), *sent.ours]
        return exchange, response

    def headers(self, lease: Lease, headers: dict[str, str]) -> dict[str, str]:
        """What its backend gets of a client's headers."""
        return headers_for(lease.origin, headers, self._name) if isinstance(lease, RemoteLease) else headers

    def drop(self, response: Answer, exchange: Exchange, lease: Lease, watched: Watched) -> None:
        """An answer that nobody will get."""
        watched.on_gone(None)
        lease.on_cut(None)
        exchange.detach()
        response.close(complete=False)
        lease.release()

    def relayed(self, sent: Outgoing, response: Answer, exchange: Exchange, lease: Lease,
                watched: Watched, on_first: OnFirst | None, idle_timeout_s: float | None) -> bool:
        """Whether a relay process has taken the stream over.  Releases what is held if that fails."""
        if self._relays is None or not sent.relayed or isinstance(exchange.socket, ssl.SSLSocket) \
                or not may_be_taken_over(sent.method, sent.protocol, response):
            return False        # a TLS session cannot be handed over
        try:
            if take_over(self._relays, sent.client, response, exchange, lease, watched, on_first, idle_timeout_s):
                self._upstream.prepare(origin_of(lease).base, lease.runs)
                return True
        except BaseException:
            response.close(complete=False)
            lease.release()
            raise
        lease.on_cut(exchange.abort)
        watched.watch_again(exchange.abort)
        return False

    def _verdict(self, error: BaseException, lease: Lease, watched: Watched) -> BaseException:
        """What broke a try, as its client should hear it: its own leaving, the keeper's finding, the error."""
        if watched.gone:
            return ClientLeft()
        if not isinstance(error, UpstreamError):
            return error
        if isinstance(lease, RemoteLease):
            return lease.cut_error or _of_server(error, lease)
        if isinstance(error, ConnectionRefused):
            return error
        deadline = time.monotonic() + VERDICT_S
        while lease.cut_error is None and time.monotonic() < deadline:
            found = self._manager.problem_of(lease.instance_id)
            if found is None or found[0] is not State.READY:
                problem = found[1] if found is not None else None
                return UpstreamError(problem.message, code=problem.code) if problem is not None else error
            self._manager.wait_for_change(0.05)
        return lease.cut_error or error


@lru_cache(maxsize=1024)
def is_passed_on(name: str) -> bool:
    """Whether this header of an engine's answer is for the client.  Some belong to the connection, and some the daemon
    sets itself: whose pages may read an answer is not the engine's to say."""
    lower = name.lower()
    return lower not in NOT_RETURNED and lower != request_id.HEADER.lower() and not lower.startswith("access-control-")


def told_as(lease: Lease) -> str | RemoteLease:
    """What the balancer knows a lease by."""
    return lease if isinstance(lease, RemoteLease) else lease.instance_id


def _blame(error: BaseException) -> Outcome:
    """Whether a try that failed so speaks against its backend."""
    if isinstance(error, UpstreamError) and not isinstance(error, EngineStopped | ServerLost):
        return Outcome.FAILED
    return Outcome.UNKNOWN


def _of_server(error: UpstreamError, lease: RemoteLease) -> UpstreamError:
    """The same with the server's name in the place of the engine."""
    if not isinstance(error, ServerLost):
        error.message = error.message.replace("the engine", f"the server {lease.server.config.name}", 1)
    return error
