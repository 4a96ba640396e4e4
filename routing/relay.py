"""The bytes of one exchange's answer, from the engine to the client, as they come.

A `RelayStream` owns what the exchange holds (lease, upstream connection, watch over the client) and gives all of it
back in `close()`, exactly once, however the exchange ends: a generator that never started would skip its `finally`.
"""

from __future__ import annotations

import errno
import logging
import socket
from collections.abc import Callable, Iterator

import orjson

from errors import DaemonError, EngineDied
from instances.instance import Lease
from routing import request_id
from routing.answer import BODYLESS, Answer
from routing.client_watch import Watched
from routing.framing import CHUNKED, EOF, follow
from routing.relay_process import Relays, RelayUnavailable
from routing.relay_wire import RELAY_DIED, TIMEOUT, UPSTREAM_CUT, Ended
from routing.reply import http_date
from routing.upstream import Exchange, upstream_errors

log = logging.getLogger("vllm_server.relay")

CUT_MESSAGE = orjson.dumps(EngineDied("the engine died in the middle of its answer").envelope())


class RelayStream:
    """The body as WSGI iterates over it.  `on_bytes` sees the first piece (to learn a response id).

    When the engine dies in the middle, the client sees the cut: the connection closes before the body's end.  An
    event stream gets one last event that says why, if the cut falls between two events.  Before its first byte the
    error itself is raised, and the server answers with that.
    """

    def __init__(self, answer: Answer, exchange: Exchange, lease: Lease, watched: Watched,
                 on_first: Callable[[bytes], None] | None = None) -> None:
        self._answer = answer
        self._exchange = exchange
        self._lease = lease
        self._watched = watched
        self._on_first = on_first
        self._between_events = True
        self._complete = False
        self._closed = False
        self._pieces = self._read()

    def __iter__(self) -> Iterator[bytes]:
        return self._pieces

    def end_without_body(self) -> None:
        """There is none: the connection is good for the next request."""
        self._complete = not self._exchange.aborted
        self.close()

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._watched.close()
        self._lease.on_cut(None)
        self._exchange.detach()
        try:
            self._answer.close(self._complete)      # if it is not, the engine sees the end and stops generating
        finally:
            self._lease.release(ok=self._complete)

    def _read(self) -> Iterator[bytes]:
        begun = False
        try:
            with upstream_errors():
                for piece in self._answer.pieces():
                    begun = True
                    if self._on_first is not None:
                        self._on_first(piece)
                        self._on_first = None
                    self._between_events = piece.endswith(b"\n\n")
                    yield piece
            self._complete = not self._exchange.aborted
        except DaemonError as error:
            if not begun and not self._watched.gone:
                raise self._lease.cut_error or error from None
            if not self._watched.gone:
                yield from self._last_words(self._lease.cut_error or error)
        if not self._complete:
            # Not an end but a cut, and the client must be able to tell: the server closes without a last chunk.
            raise ConnectionResetError(errno.ECONNRESET, "the answer was cut")

    def _last_words(self, error: DaemonError) -> Iterator[bytes]:
        log.warning("an answer of %s was cut: %s", self._lease.instance_id, error.message)
        if self._answer.is_event_stream and self._between_events:
            yield error_event(error)


class TakenOver:
    """What a view returns whose answer a relay carries: the server finds that the socket is no longer its own.

    `lease` comes back when the answer ends.
    """

    def __init__(self, lease: Lease) -> None:
        self.lease = lease

    def __iter__(self) -> Iterator[bytes]:
        raise OSError(errno.ENOTCONN, "the connection was handed to a relay")


def may_be_taken_over(method: str, protocol: str, answer: Answer) -> bool:
    """Whether a relay can carry this answer: a stream, whose framing may pass to this client as it is.

    An HTTP/1.0 client must not see chunks; an answer with a length is short or, if it is long, still better off with
    a connection that stays usable.
    """
    return method != "HEAD" and protocol == "HTTP/1.1" and answer.head.status not in BODYLESS \
        and not answer.header("content-length")


def take_over(relays: Relays, client: socket.socket, answer: Answer, exchange: Exchange, lease: Lease,
              watched: Watched, on_first: Callable[[bytes], None] | None = None,
              idle_timeout_s: float | None = None) -> bool:
    """Hand the rest of an exchange to a relay process.  False, with nothing changed, when none can take it.

    Blocks for the body's first bytes only if somebody wants to see them (`on_first`).  The lease is released when
    the relay reports the end.
    """
    upstream = exchange.socket
    if upstream is None:
        return False
    if on_first is not None:
        with upstream_errors():
            if not answer.incoming.peek():
                answer.incoming.more()
        on_first(answer.incoming.peek())
    read = answer.incoming.peek()
    head = response_head(answer)
    framing = CHUNKED if answer.head.chunked else EOF
    # What only its end tells from a cut must not begin before somebody is there to reset it.
    at_once = len(head) + follow(framing).feed(read, len(read)) if answer.head.chunked else 0

    asked = request_id.current()

    def ended(end: Ended) -> None:
        if end.by in (UPSTREAM_CUT, RELAY_DIED, TIMEOUT):
            with request_id.of(asked):
                log.warning("a stream of %s was cut after %d bytes (%s)", lease.instance_id, end.bytes_to_client,
                            end.by)
        lease.release(ok=end.complete)

    lease.on_cut(None)
    watched.close()
    try:
        taken = relays.hand_over(client, upstream, to_client=head + read, body_at=len(head), at_once=at_once,
                                 on_end=ended, framing=framing, sse=answer.is_event_stream, cut_message=CUT_MESSAGE,
                                 idle_timeout_s=idle_timeout_s)
    except RelayUnavailable as error:
        if not error.begun:
            log.warning("a request thread carries a stream: %s", error)
            return False
        # Its client has a part of it, and sees by the missing end that this is all: nobody closes a chunked body now.
        log.warning("a stream of %s was cut: %s", lease.instance_id, error)
        exchange.detach()
        answer.close(complete=False)
        lease.release(ok=False)
        return True
    exchange.detach()
    answer.close(complete=False)
    lease.on_cut(lambda: relays.cut(taken, orjson.dumps(lease.cut_error.envelope()) if lease.cut_error else b""))
    return True


def response_head(answer: Answer) -> bytes:
    """The engine's head for the client of a stream, whose connection ends with it."""
    lines = [f"HTTP/1.1 {answer.head.status} {answer.head.reason}", f"Date: {http_date()}",
             *[f"{name}: {value}" for name, value in answer.head.headers]]
    if answer.head.chunked:
        lines.append("Transfer-Encoding: chunked")
    return "\r\n".join([*lines, "Connection: close", "", ""]).encode("latin-1")


def error_event(error: DaemonError) -> bytes:
    """One server-sent event with the OpenAI envelope, as vLLM itself ends a stream that failed."""
    return b"data: " + orjson.dumps(error.envelope()) + b"\n\n"
