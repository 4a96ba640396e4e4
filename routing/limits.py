"""What each key may do: which models, how many requests and tokens in a minute, how many at one time.

Counted in this process alone, which sees every request.  A minute is the last 60 s, in steps of one: a limit holds over
any 60 s, with no boundary at which twice as much would pass.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from functools import partial

import orjson

from config import Key
from errors import Forbidden, RateLimited
from routing.relay import TakenOver
from routing.reply import Reply

CALLER = "vllm_server.caller"      # in a request's environ: its Key, or None
WINDOW_S = 60
USAGE_BYTES = 4096      # of the end of an answer, where its usage stands
JUST_ENDED_S = 0.1      # a client may have its answer's end, and ask again, before its place has been given back here
_USAGE = b'"usage"'


class Window:
    """An amount over the last minute.  Pure: the caller brings the time (monotonic seconds) and the lock."""

    def __init__(self) -> None:
        self._seconds: deque[tuple[int, int]] = deque()     # second, amount; at most one entry a second
        self._total = 0

    def add(self, now: float, amount: int) -> None:
        second = math.floor(now)
        if self._seconds and self._seconds[-1][0] == second:
            amount_before = self._seconds.pop()[1]
            self._seconds.append((second, amount_before + amount))
        else:
            self._seconds.append((second, amount))
        self._total += amount

    def wait_s(self, now: float, limit: int) -> int:
        """Seconds until less than `limit` is in the window; 0: it is less now."""
        while self._seconds and self._seconds[0][0] <= now - WINDOW_S:
            self._total -= self._seconds.popleft()[1]
        left = self._total
        for second, amount in self._seconds:
            if left < limit:
                break
            left -= amount
            wait_s = second + WINDOW_S - now
        return 0 if left == self._total else max(1, math.ceil(wait_s))


class Admission:
    """One request that was let in.  `leave` gives its place back, once; it may be called from any thread.

    `on_tokens`, where the key has a limit of them, is told what the answer took.
    """

    def __init__(self, leave: Callable[[], None], on_tokens: Callable[[int], None] | None = None) -> None:
        self.on_tokens = on_tokens
        self._leave = [leave]

    def leave(self) -> None:
        if self._leave:
            try:
                leave = self._leave.pop()
            except IndexError:      # another thread was first
                return
            leave()


FREE = Admission(lambda: None)
"""Of a request that nothing limits: it holds no place."""


class Limits:
    """Thread-safe.  Nothing is kept for a key without limits."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Condition()      # of everything below; told of each place that is given back
        self._requests: dict[str, Window] = {}
        self._tokens: dict[str, Window] = {}
        self._running: dict[str, int] = {}

    def enter(self, key: Key | None) -> Admission:
        """Raises RateLimited, with the seconds after which it makes sense to ask again.

        Blocks for up to JUST_ENDED_S where the key has as many requests as it may: one of them may have ended.
        """
        if key is None or key.requests_per_minute is key.tokens_per_minute is key.concurrent_requests is None:
            return FREE
        with self._lock:
            self._lock.wait_for(lambda: not self._is_full(key), JUST_ENDED_S)
            now = self._clock()
            self._check(key, now)
            if key.requests_per_minute is not None:
                self._requests.setdefault(key.name, Window()).add(now, 1)
            self._running[key.name] = self._running.get(key.name, 0) + 1
        on_tokens = partial(self._note_tokens, key) if counts_tokens(key) else None
        return Admission(lambda: self._leave(key), on_tokens)

    def _note_tokens(self, key: Key, tokens: int) -> None:
        """They count against the key's next requests."""
        with self._lock:
            self._tokens.setdefault(key.name, Window()).add(self._clock(), tokens)

    def _check(self, key: Key, now: float) -> None:
        for what, limit, windows in (("requests", key.requests_per_minute, self._requests),
                                     ("tokens", key.tokens_per_minute, self._tokens)):
            window = windows.get(key.name)
            if limit is not None and window is not None and (wait_s := window.wait_s(now, limit)):
                raise RateLimited(f"the key {key.name} has used its {limit} {what} of this minute; ask again in "
                                  f"{wait_s} s", retry_after_s=wait_s)
        if self._is_full(key):
            raise RateLimited(f"the key {key.name} may have {key.concurrent_requests} requests at one time, and has; "
                              "wait for one to end", retry_after_s=1)

    def _is_full(self, key: Key) -> bool:
        return key.concurrent_requests is not None and self._running.get(key.name, 0) >= key.concurrent_requests

    def _leave(self, key: Key) -> None:
        with self._lock:
            self._lock.notify_all()
            left = self._running.get(key.name, 0) - 1
            if left > 0:
                self._running[key.name] = left
            else:
                self._running.pop(key.name, None)


class AdmittedBody:
    """An answer's body as it passes: gives the admission back when it is closed, with an eye on its end, where the
    engine says how many tokens it took."""

    def __init__(self, body: Iterable[bytes], admission: Admission) -> None:
        self._body = body
        self._admission = admission
        self._end = b""

    def __iter__(self) -> Iterator[bytes]:
        if self._admission.on_tokens is None:
            yield from self._body
        for piece in self._body:
            self._end = (self._end + piece)[-USAGE_BYTES:]
            yield piece

    def close(self) -> None:
        """Also of an answer that was broken off: it counts as far as it is known."""
        end, self._end = self._end, b""
        try:
            if self._admission.on_tokens is not None and (tokens := reported_tokens(end)):
                self._admission.on_tokens(tokens)
            if hasattr(self._body, "close"):
                self._body.close()
        finally:
            self._admission.leave()


def until_its_end(reply: Reply, admission: Admission) -> Reply:
    """The answer, which gives the admission back when it has ended: in this process, or in a relay."""
    body = reply.body
    if admission is FREE:
        pass
    elif isinstance(body, TakenOver):
        body.lease.when_released(admission.leave)
    elif body == ():
        admission.leave()
    else:
        reply.body = AdmittedBody(body, admission)
    return reply


def counts_tokens(key: Key | None) -> bool:
    return key is not None and key.tokens_per_minute is not None


def check_model(key: Key | None, names: Collection[str]) -> None:
    """Raises Forbidden when the key may use none of these names of a model."""
    if key is not None and not key.may_use(names):
        raise Forbidden(f"the key {key.name} may not use this model; it may use {', '.join(key.models or ())}",
                        param="model", code="model_not_allowed")


def reported_tokens(end: bytes) -> int:
    """All tokens of the last `usage` in the end of an answer, plain or a stream of events; 0 where none stands.

    OpenAI: `total_tokens`; Anthropic and /v1/responses: `input_tokens` and `output_tokens`.
    """
    at = end.rfind(_USAGE)
    while at >= 0:
        usage = _object_after(end, at + len(_USAGE))
        if usage is not None:
            counts = [usage.get(name) for name in ("total_tokens", "input_tokens", "output_tokens")]
            total, *parts = [count if isinstance(count, int) and count >= 0 else 0 for count in counts]
            return total or sum(parts)
        at = end.rfind(_USAGE, 0, at)
    return 0


def _object_after(data: bytes, at: int) -> dict[str, object] | None:
    """The JSON object that follows a key's closing quote."""
    begin = data.find(b"{", at)
    if begin < 0 or data[at:begin].strip() != b":":
        return None
    for end in _closings(data, begin):
        try:
            found = orjson.loads(data[begin:end + 1])
        except orjson.JSONDecodeError:
            continue
        return found if isinstance(found, dict) else None
    return None


def _closings(data: bytes, begin: int) -> Iterable[int]:
    """Where the object may end: it holds few objects of its own (details of the counts)."""
    end = begin
    for _ in range(8):
        end = data.find(b"}", end + 1)
        if end < 0:
            return
        yield end
