"""The bytes of one exchange's answer, from the engine to the client, as they come.

A `RelayStream` owns what the exchange holds (lease, upstream connection, watch over the client) and gives all of it
back in `close()`, exactly once, however the exchange ends: a generator that never started would skip its `finally`.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import socket
import ssl
from collections.abc import Callable, Iterator
from email.utils import formatdate
from typing import Any, BinaryIO

import orjson
import urllib3

from errors import DaemonError, EngineDied, UpstreamError
from instances.instance import Lease
from routing.client_watch import Watched
from routing.framing import CHUNKED, EOF, LINE_LIMIT
from routing.relay_process import Relays, RelayUnavailable
from routing.relay_wire import RELAY_DIED, UPSTREAM_CUT, Ended
from routing.upstream import BODYLESS, Exchange, response_headers, upstream_errors

log = logging.getLogger("vllm_server.relay")

READ_BYTES = 1 << 16
SSE = "text/event-stream"
CUT = "the engine closed the connection in the middle of its answer"
CUT_MESSAGE = orjson.dumps(EngineDied("the engine died in the middle of its answer").envelope())


class RelayStream:
    """The body as WSGI iterates over it.  `on_bytes` sees the first piece (to learn a response id).

    When the engine dies in the middle, the client sees the cut: the connection closes before the body's end.  An
    event stream gets one last event that says why, if the cut falls between two events.  Before its first byte the
    error itself is raised, and the server answers with that.
    """

    def __init__(self, response: urllib3.HTTPResponse, exchange: Exchange, lease: Lease, watched: Watched,
                 on_first: Callable[[bytes], None] | None = None) -> None:
        self._response = response
        self._exchange = exchange
        self._lease = lease
        self._watched = watched
        self._on_first = on_first
        self._events = response.headers.get("content-type", "").startswith(SSE)
        self._between_events = True
        self._complete = False
        self._closed = False
        self._pieces = self._read()

    def __iter__(self) -> Iterator[bytes]:
        return self._pieces

    def end_without_body(self) -> None:
        """There is none: the connection is good for the next request."""
        with contextlib.suppress(DaemonError), upstream_errors():
            self._response.read(decode_content=False)   # of nothing: http.client wants to be asked
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
            if self._complete:
                self._response.release_conn()
            else:
                self._response.close()  # the engine sees the end and stops generating
        finally:
            self._lease.release(ok=self._complete)

    def _read(self) -> Iterator[bytes]:
        begun = False
        try:
            with upstream_errors():
                for piece in self._upstream_pieces():
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

    def _upstream_pieces(self) -> Iterator[bytes]:
        response = self._response
        if response.chunked:
            yield from read_chunks(response._fp.fp)  # type: ignore[union-attr]
            response._fp.close()  # type: ignore[union-attr]  # http.client then knows that this answer is over
        else:
            while piece := response.read1(READ_BYTES, decode_content=False):
                yield piece
            # urllib3 checks the length in read() and stream(), not in read1().
            if response.length_remaining not in (None, 0):
                raise UpstreamError(CUT)

    def _last_words(self, error: DaemonError) -> Iterator[bytes]:
        log.warning("an answer of instance %s was cut: %s", self._lease.instance_id, error.message)
        if self._events and self._between_events:
            yield error_event(error)


def read_chunks(file: BinaryIO) -> Iterator[bytes]:
    """The data of a chunked body as it comes; the trailers are dropped.  Raises UpstreamError where it is cut.

    Not urllib3's: that takes a size line without its end for a whole one, so that a cut after its first zero is an end.
    """
    while size := _chunk_size(_line(file)):
        while size > 0:
            piece = file.read1(min(size, READ_BYTES))  # type: ignore[attr-defined]
            if not piece:
                raise UpstreamError(CUT)
            size -= len(piece)
            yield piece
        if _line(file).strip():
            raise UpstreamError("a chunk of the engine's answer is longer than it says")
    while _line(file).strip():
        pass


def _line(file: BinaryIO) -> bytes:
    line = file.readline(LINE_LIMIT)
    if not line.endswith(b"\n"):
        raise UpstreamError(CUT)
    return line


def _chunk_size(line: bytes) -> int:
    digits = line.partition(b";")[0].strip()
    try:
        if digits.isalnum():    # neither a sign nor an underscore, which int would take
            return int(digits, 16)
    except ValueError:
        pass
    raise UpstreamError(f"the engine's answer is not chunked as it says: {line[:40]!r}", code="bad_answer")


class TakenOver:
    """What a view returns whose answer a relay carries: the server finds that the socket is no longer its own.

    `lease` comes back when the answer ends.
    """

    def __init__(self, lease: Lease) -> None:
        self.lease = lease

    def __iter__(self) -> Iterator[bytes]:
        raise OSError(errno.ENOTCONN, "the connection was handed to a relay")


def may_be_taken_over(method: str, protocol: str, response: urllib3.HTTPResponse) -> bool:
    """Whether a relay can carry this answer: a stream, whose framing may pass to this client as it is.

    An HTTP/1.0 client must not see chunks; an answer with a length is short or, if it is long, still better off with
    a connection that stays usable.
    """
    return method != "HEAD" and protocol == "HTTP/1.1" and response.status >= 200 \
        and response.status not in BODYLESS and "content-length" not in response.headers


def take_over(relays: Relays, client: socket.socket, response: urllib3.HTTPResponse, exchange: Exchange, lease: Lease,
              watched: Watched, on_first: Callable[[bytes], None] | None = None) -> bool:
    """Hand the rest of an exchange to a relay process.  False, with nothing changed, when none can take it.

    Blocks for the body's first bytes only if somebody wants to see them (`on_first`).  The lease is released when
    the relay reports the end.
    """
    upstream = exchange.socket
    if upstream is None or isinstance(upstream, ssl.SSLSocket):     # a session cannot be handed over
        return False
    read = buffered(response, upstream, wait=on_first is not None)
    if on_first is not None:
        on_first(read)
    head = response_head(response)
    framing = CHUNKED if response.chunked else EOF

    def ended(end: Ended) -> None:
        if end.by in (UPSTREAM_CUT, RELAY_DIED):
            log.warning("a stream of instance %s was cut after %d bytes (%s)", lease.instance_id, end.bytes_to_client,
                        end.by)
        lease.release(ok=end.complete)

    lease.on_cut(None)
    watched.close()
    try:
        taken = relays.hand_over(client, upstream, to_client=head + read, framing=framing, body_at=len(head),
                                 on_end=ended, sse=response.headers.get("content-type", "").startswith(SSE),
                                 cut_message=CUT_MESSAGE)
    except RelayUnavailable as error:
        log.warning("a request thread carries a stream: %s", error)
        return False
    exchange.detach()
    response.close()
    lease.on_cut(lambda: relays.cut(taken, orjson.dumps(lease.cut_error.envelope()) if lease.cut_error else b""))
    return True


def buffered(response: urllib3.HTTPResponse, upstream: socket.socket, *, wait: bool) -> bytes:
    """What was read of the body together with the head; with `wait`, at least its first bytes.  It stays readable."""
    reader: Any = response._fp.fp  # type: ignore[union-attr]  # http.client's buffered reader: the only way to its buffer
    timeout_s = upstream.gettimeout()
    try:
        if not wait:
            upstream.setblocking(False)
        with upstream_errors():
            return bytes(reader.peek())
    finally:
        upstream.settimeout(timeout_s)


def response_head(response: urllib3.HTTPResponse) -> bytes:
    """The engine's head for the client of a stream, whose connection ends with it."""
    lines = [f"HTTP/1.1 {response.status} {response.reason or ''}", f"Date: {formatdate(usegmt=True)}",
             *(f"{name}: {value}" for name, value in response_headers(response))]
    if response.chunked:
        lines.append("Transfer-Encoding: chunked")
    return "\r\n".join([*lines, "Connection: close", "", ""]).encode("latin-1")


def error_event(error: DaemonError) -> bytes:
    """One server-sent event with the OpenAI envelope, as vLLM itself ends a stream that failed."""
    return b"data: " + orjson.dumps(error.envelope()) + b"\n\n"
