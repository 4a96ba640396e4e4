"""The bytes of one exchange's answer, from the engine to the client, as they come.

A `RelayStream` owns what the exchange holds (lease, upstream connection, watch over the client) and gives all of it
back in `close()`, exactly once, however the exchange ends: a generator that never started would skip its `finally`.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable, Iterator

import orjson
import urllib3

from errors import DaemonError, UpstreamError
from instances.instance import Lease
from routing.client_watch import Watched
from routing.upstream import Exchange, upstream_errors

log = logging.getLogger("vllm_server.relay")

READ_BYTES = 1 << 16
SSE = "text/event-stream"


class RelayStream:
    """The body as WSGI iterates over it.  `on_bytes` sees the first piece (to learn a response id).

    When the engine dies in the middle, the client sees the cut: the connection closes before the body's end.  An
    event stream gets one last event that says why, if the cut falls between two events.
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
        try:
            with upstream_errors():
                for piece in self._upstream_pieces():
                    if self._on_first is not None:
                        self._on_first(piece)
                        self._on_first = None
                    self._between_events = piece.endswith(b"\n\n")
                    yield piece
            self._complete = not self._exchange.aborted
        except DaemonError as error:
            if not self._watched.gone:
                yield from self._last_words(self._lease.cut_error or error)
        if not self._complete:
            # Not an end but a cut, and the client must be able to tell: the server closes without a last chunk.
            raise ConnectionResetError(errno.ECONNRESET, "the answer was cut")

    def _upstream_pieces(self) -> Iterator[bytes]:
        response = self._response
        if response.chunked:
            yield from response.read_chunked(decode_content=False)
        else:
            while piece := response.read1(READ_BYTES, decode_content=False):
                yield piece
            # urllib3 checks the length in read() and stream(), not in read1().
            if response.length_remaining not in (None, 0):
                raise UpstreamError("the engine closed the connection in the middle of its answer")

    def _last_words(self, error: DaemonError) -> Iterator[bytes]:
        log.warning("an answer of instance %s was cut: %s", self._lease.instance_id, error.message)
        if self._events and self._between_events:
            yield error_event(error)


def error_event(error: DaemonError) -> bytes:
    """One server-sent event with the OpenAI envelope, as vLLM itself ends a stream that failed."""
    return b"data: " + orjson.dumps(error.envelope()) + b"\n\n"
