"""The answer to a streaming request that waits long for its model: comments first, then the engine's own events.

Proxies and clients give up on a connection that says nothing for a minute or so, and a model may take ten to load.  A
line that begins with a colon is a comment to every reader of server-sent events.  Its price: the head is sent before
the engine has said anything, so what goes wrong afterwards can only be told by an event.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable, Iterator

import orjson

from errors import DaemonError, UpstreamError
from instances.instance import Lease
from routing.answer import Answer
from routing.client_watch import Watched
from routing.relay import RelayStream
from routing.upstream import ClientLeft, ConnectionRefused
from routing.waiting import Waiter

log = logging.getLogger("vllm_server.relay")

AFTER_S = 10.0              # a client that has waited so long is told
EVERY_S = 5.0               # and again
REFUSALS = 20               # connections that may be refused before the client is told
LARGEST_ERROR_BYTES = 1 << 16
HEADERS = (("Content-Type", "text/event-stream; charset=utf-8"), ("Cache-Control", "no-cache"),
           ("X-Accel-Buffering", "no"))
STREAMING = frozenset({
    "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages", "/v1/audio/transcriptions",
    "/v1/audio/translations", "/inference/v1/generate", "/cohere/v2/chat"})
"""Paths that answer `"stream": true` with server-sent events."""

_TYPED = frozenset({"/v1/messages", "/v1/responses"})
"""Their events have a type, and their clients look for one that is called error."""

Open = Callable[[Lease], tuple[Answer, RelayStream]]


class CommentedStream:
    """The body as WSGI iterates over it.  It owns the waiter, the watch over the client, and the engine's stream.

    `open_stream` sends the request and reads the head of the answer; it releases the lease if that fails.  `ended` is
    called at the end, however it comes; `failed` is the code of an error that was told in place of an answer.
    """

    def __init__(self, waiter: Waiter, open_stream: Open, watched: Watched, path: str,
                 ended: Callable[[], None] = lambda: None) -> None:
        self.failed: str | None = None
        self._ended = ended
        self._waiter = waiter
        self._open = open_stream
        self._watched = watched
        self._path = path
        self._stream: RelayStream | None = None
        self._pieces = self._tell()

    def __iter__(self) -> Iterator[bytes]:
        return self._pieces

    def close(self) -> None:
        """A second call does nothing."""
        self._watched.close()
        self._waiter.close()
        if self._stream is not None:
            self._stream.close()
        self._ended()

    def _tell(self) -> Iterator[bytes]:
        try:
            expected_s = self._waiter.expected_s()
            yield self._comment("" if expected_s is None else f" (took {expected_s:.0f} s before)")
            yield from self._answer()
        except ClientLeft:
            raise ConnectionResetError(errno.ECONNRESET, "the client has left") from None
        except DaemonError as error:
            log.warning("a stream for %s ends before it began: %s", self._waiter.what, error.message)
            self.failed = error.code
            yield self._last_event(error.envelope())

    def _answer(self) -> Iterator[bytes]:
        for _ in range(REFUSALS):
            while (lease := self._waiter.lease(within_s=EVERY_S)) is None:
                yield self._comment()
            try:
                response, self._stream = self._open(lease)
            except ConnectionRefused:
                self._waiter.pause()
                continue
            self._waiter.close()
            if response.head.status == 200 and response.is_event_stream:
                yield from self._stream
            else:
                yield self._last_event(_told_by_engine(response, self._stream))
            return
        raise UpstreamError(f"{self._waiter.what} takes no connections although it should be ready; try again later")

    def _comment(self, more: str = "") -> bytes:
        phase, progress = self._waiter.progress()
        done = "" if progress is None else f" {progress:.0%}"
        text = f"loading {self._waiter.what} {phase}{done}{more}"
        # A line's end in a name would end the comment.
        return f": {''.join(char if char.isprintable() else '?' for char in text)}\n\n".encode(errors="replace")

    def _last_event(self, envelope: dict[str, object]) -> bytes:
        """The error, as a client of this path finds it, and the end."""
        event = b""
        if self._path in _TYPED:
            event, envelope = b"event: error\n", {"type": "error"} | envelope
        return event + b"data: " + orjson.dumps(envelope) + b"\n\ndata: [DONE]\n\n"


def _told_by_engine(response: Answer, stream: RelayStream) -> dict[str, object]:
    """The envelope of its error; ours around what is none."""
    text = b""
    for piece in stream:
        text += piece
        if len(text) > LARGEST_ERROR_BYTES:
            break
    try:
        told = orjson.loads(text)
    except orjson.JSONDecodeError:
        told = None
    if isinstance(told, dict) and "error" in told:
        return told
    return UpstreamError(f"the engine answered {response.head.status} instead of a stream: "
                         f"{text[:500].decode(errors='replace')}", code="bad_answer").envelope()
