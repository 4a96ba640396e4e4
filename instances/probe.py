"""Questions to an engine that may never answer: sent at once, answered when polled, closed when given up."""

from __future__ import annotations

import http.client
import json
import re
import select
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from instances.processes import BLIND

CONNECT_TIMEOUT_S = 1.0
READ_TIMEOUT_S = 5.0  # for the rest of an answer whose first byte is there
LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class Answer:
    """`status` is 0 when the connection was refused or broke."""

    status: int
    body: bytes = b""


class Probe:
    """One HTTP request.  Neither the constructor nor `poll` waits for the engine to think.

    Where this process has no descriptor for it, that says nothing of the engine: it is not `sent`, and `poll` tries
    again.
    """

    def __init__(self, port: int, method: str, path: str, body: dict[str, Any] | None = None) -> None:
        self._connection = http.client.HTTPConnection(LOOPBACK, port, timeout=CONNECT_TIMEOUT_S)
        self._answer: Answer | None = None
        payload = json.dumps(body).encode() if body is not None else None
        headers = {"Connection": "close"} | ({"Content-Type": "application/json"} if payload else {})
        self._request = method, path, payload, headers
        self.sent = False
        self._send()

    def _send(self) -> None:
        try:
            self._connection.request(*self._request)
            self.sent = True
        except OSError as error:
            self.close()
            if error.errno not in BLIND:
                self._answer = Answer(0)

    def poll(self) -> Answer | None:
        """The answer, or None as long as its first byte is not there."""
        if self._answer is None and not self.sent:
            self._send()
        if self._answer is None and self.sent and _readable(self._connection.sock):
            try:
                self._connection.sock.settimeout(READ_TIMEOUT_S)
                response = self._connection.getresponse()
                self._answer = Answer(response.status, response.read())
            except (OSError, http.client.HTTPException):
                self._answer = Answer(0)
            self.close()
        return self._answer

    def close(self) -> None:
        self._connection.close()


def _readable(sock: socket.socket) -> bool:
    """Now, or broken.  Not by select(), which knows no descriptor above 1023."""
    poller = select.poll()
    poller.register(sock, select.POLLIN)
    return bool(poller.poll(0))


def wait(probe: Probe, timeout_s: float = READ_TIMEOUT_S) -> Answer | None:
    """Block for the answer to a question that a live server answers at once; None when it does not."""
    deadline = time.monotonic() + timeout_s
    while (answer := probe.poll()) is None and time.monotonic() < deadline:
        time.sleep(0.01)
    probe.close()
    return answer


def health(port: int) -> Probe:
    """200 when it serves, 503 when its engine died; a hung engine answers 200 too."""
    return Probe(port, "GET", "/health")


def models(port: int) -> Probe:
    return Probe(port, "GET", "/v1/models")


def metrics(port: int) -> Probe:
    return Probe(port, "GET", "/metrics")


def sleep(port: int, level: int) -> Probe:
    """Answered when it sleeps; `wait`: what is in flight ends first (vLLM's own default would break it off)."""
    return Probe(port, "POST", f"/sleep?level={level}&mode=wait")


def wake_up(port: int, tags: str | None = None) -> Probe:
    """All of it, or one part of its memory: `weights` or `kv_cache`."""
    return Probe(port, "POST", f"/wake_up?tags={tags}" if tags else "/wake_up")


def reload_weights(port: int) -> Probe:
    """What level 2 has thrown away is read again from the files."""
    return Probe(port, "POST", "/collective_rpc", {"method": "reload_weights"})


def is_sleeping(port: int) -> Probe:
    """In any depth, and on the way there too."""
    return Probe(port, "GET", "/is_sleeping")


def says_it_sleeps(answer: Answer | None) -> bool:
    try:
        return answer is not None and answer.status == 200 and json.loads(answer.body)["is_sleeping"] is True
    except (ValueError, KeyError, TypeError):
        return False


def inference(port: int, model: str, path: str) -> Probe:
    """The smallest request of one kind that must pass through the engine."""
    return Probe(port, "POST", path, {"model": model, **INFERENCE[path]})


INFERENCE: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "a", "max_tokens": 1},
    "/v1/embeddings": {"input": "a"},
    "/classify": {"input": "a"},
    "/pooling": {"input": "a"},
    "/score": {"text_1": "a", "text_2": "a"},
}
"""Tried in this order; the first that the engine answers with 200 is the one it is asked from then on."""

_PROGRESS = re.compile(rb"^vllm:(?:generation|prompt)_tokens_total\{[^}]*\} (\S+)$", re.MULTILINE)


def tokens_done(metrics_text: bytes) -> float:
    """Tokens processed since the start, of a /metrics page: moves as long as the engine works."""
    return sum(float(value) for value in _PROGRESS.findall(metrics_text))


def model_names(body: bytes) -> Sequence[str]:
    """The ids of a /v1/models answer: served names first, then adapters.  Empty when it is none."""
    try:
        return [str(entry["id"]) for entry in json.loads(body)["data"]]
    except (ValueError, KeyError, TypeError):
        return []
