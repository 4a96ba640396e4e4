"""What is sent again, and after how long; foreign exceptions become ours.

Sent again: what never reached the server, what the server asks to send again (429 and 503 with Retry-After), and a GET
whose connection broke.  Never what may have been served already.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import tenacity

from vllm_server_client.calls import Call
from vllm_server_client.errors import BadAnswer, ConnectionFailed, ServerError, StreamBroken, TimedOut

LONGEST_WAIT_S = 60.0       # a server that asks for more patience than this is not asked again
BACKOFF_S, BACKOFF_LIMIT_S = 0.25, 4.0

_backoff = tenacity.wait_exponential_jitter(multiplier=BACKOFF_S, max=BACKOFF_LIMIT_S, jitter=BACKOFF_S)


@dataclass(frozen=True)
class SendOptions:
    """Where to, how patiently and how often.  `timeout_s` is the longest silence, unless the call has its own."""

    url: str
    timeout_s: float
    connect_timeout_s: float
    max_retries: int

    def silence_s(self, call: Call) -> float:
        return self.timeout_s if call.timeout_s is None else call.timeout_s

    def request(self, call: Call) -> dict[str, Any]:
        """For httpx's build_request."""
        silence_s = self.silence_s(call)
        timeout = httpx.Timeout(None if math.isinf(silence_s) else silence_s,
                                connect=min(self.connect_timeout_s, silence_s))
        return {"method": call.method, "url": call.path, "json": call.body, "params": dict(call.query) or None,
                "headers": dict(call.headers) or None, "timeout": timeout}

    def retrying(self, call: Call) -> dict[str, Any]:
        """For tenacity.Retrying and AsyncRetrying alike."""
        return {"stop": tenacity.stop_after_attempt(self.max_retries + 1), "wait": _wait_s, "reraise": True,
                "retry": tenacity.retry_if_exception(lambda error: may_be_repeated(error, call))}

    @contextmanager
    def translated(self, call: Call) -> Iterator[None]:
        """Around one request up to the end of its answer's head, or of a plain answer."""
        try:
            yield
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            raise ConnectionFailed(f"no connection to {self.url} ({_reason(error)}): is vllm-server running there?",
                                   sent=False) from error
        except httpx.TimeoutException as error:
            raise TimedOut(f"{self.url} sent nothing for {self.silence_s(call):g} s") from error
        except httpx.DecodingError as error:
            raise BadAnswer(f"the answer of {self.url} cannot be decoded: {error}") from error
        except httpx.TransportError as error:
            raise ConnectionFailed(f"the connection to {self.url} was lost ({_reason(error)})", sent=True) from error

    @contextmanager
    def translated_in_stream(self, call: Call) -> Iterator[None]:
        """Around the reading of a stream: what it brought is with the caller already, so it is never sent again."""
        try:
            yield
        except httpx.TimeoutException as error:
            raise TimedOut(f"the stream from {self.url} brought nothing for {self.silence_s(call):g} s") from error
        except (httpx.TransportError, httpx.DecodingError) as error:
            raise StreamBroken(f"the stream from {self.url} was cut ({_reason(error)})") from error


def may_be_repeated(error: BaseException, call: Call) -> bool:
    if isinstance(error, ServerError):
        return (error.status in (429, 503) and error.retry_after_s is not None
                and error.retry_after_s <= LONGEST_WAIT_S)
    return isinstance(error, ConnectionFailed) and (call.repeatable or not error.sent)


def _wait_s(state: tenacity.RetryCallState) -> float:
    error = state.outcome.exception() if state.outcome is not None else None
    asked_s = error.retry_after_s if isinstance(error, ServerError) else None
    return asked_s if asked_s is not None else float(_backoff(state))


def _reason(error: Exception) -> str:
    return str(error) or type(error).__name__
