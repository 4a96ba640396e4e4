"""Finds an engine that hangs or is dead behind a server that still answers.

Health is asked first, then a real request, unless real requests are being answered.  Under load the question may
queue for long: tokens that are made meanwhile tell a busy engine from one that hangs.  An engine that sleeps, or is on
its way there or back, keeps real requests: it is asked for its health alone.  Nothing here waits.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum

from instances import probe
from instances.probe import Answer, Probe

METRICS_TIMEOUT_S = 5.0
REFUSALS = 3            # in a row: a server that takes no connections serves no more


class Verdict(Enum):
    HANGS = "it answered no small request and made no tokens"
    SILENT = "its server answered no GET /health"
    DEAD = "it reports that its engine is dead"
    CLOSED = "it takes no connections any more"


HUNG = frozenset({Verdict.HANGS, Verdict.SILENT})      # within the time limit


class Watchdog:
    """Over one engine, from when it is ready on.  `look` is called often and asks now and then."""

    def __init__(self, port: int, model: str, now: float) -> None:
        self._port = port
        self._model = model
        self._paths = list(probe.INFERENCE)     # the first is asked; one that the runner lacks is taken out
        self._now = self._began_at = self._asked_at = now
        self._timeout_s = self._limit_s = 0.0
        self._question: Probe | None = None
        self._heard: Callable[[Answer | None], Verdict | None] = self._heard_health
        self._refusals = 0
        self._tokens: float | None = None

    def look(self, now: float, *, last_success: float, interval_s: float, timeout_s: float) -> Verdict | None:
        """A verdict, or None as long as all is well.  An interval of 0: it is never asked."""
        self._now, self._timeout_s = now, timeout_s
        if self._question is None:
            if interval_s > 0 and (self._refusals or now - max(self._began_at, last_success) >= interval_s):
                self._began_at = now
                self._ask(probe.health(self._port), self._heard_health, timeout_s)
            return None
        answer = self._question.poll()
        if not self._question.sent:
            self._asked_at = now        # its time has not begun
        if answer is None and now - self._asked_at < self._limit_s:
            return None
        self.close()
        verdict = self._heard(answer)
        return None if verdict in HUNG and last_success > self._began_at else verdict

    def ask_health_alone(self) -> None:
        """From now on, and no real request is open any more."""
        if self._paths:
            self.close()
            self._paths, self._refusals = [], 0

    def close(self) -> None:
        if self._question is not None:
            self._question.close()
            self._question = None

    def _ask(self, question: Probe, heard: Callable[[Answer | None], Verdict | None], limit_s: float) -> None:
        self._question, self._heard, self._asked_at, self._limit_s = question, heard, self._now, limit_s

    def _ask_metrics(self, heard: Callable[[Answer | None], Verdict | None]) -> None:
        self._ask(probe.metrics(self._port), heard, min(METRICS_TIMEOUT_S, self._timeout_s))

    def _ask_inference(self) -> None:
        self._ask(probe.inference(self._port, self._model, self._paths[0]), self._heard_inference, self._timeout_s)

    def _heard_health(self, answer: Answer | None) -> Verdict | None:
        if answer is None:
            return Verdict.SILENT
        if answer.status == 503:
            return Verdict.DEAD
        self._refusals = self._refusals + 1 if answer.status == 0 else 0
        if self._refusals >= REFUSALS:
            return Verdict.CLOSED
        if answer.status == 200 and self._paths:
            self._ask_metrics(self._heard_tokens)
        return None

    def _heard_tokens(self, answer: Answer | None) -> Verdict | None:
        self._tokens = _tokens(answer)
        self._ask_inference()
        return None

    def _heard_inference(self, answer: Answer | None) -> Verdict | None:
        if answer is None:
            self._ask_metrics(self._judge)
        elif answer.status in (400, 404):       # this runner has no such route: ask in the next way
            del self._paths[0]
            if self._paths:
                self._ask_inference()
        return None

    def _judge(self, answer: Answer | None) -> Verdict | None:
        """Nothing came back in time: it hangs, unless tokens were made meanwhile."""
        tokens = _tokens(answer)
        return Verdict.HANGS if tokens is None or tokens == self._tokens else None


def _tokens(answer: Answer | None) -> float | None:
    return probe.tokens_done(answer.body) if answer is not None and answer.status == 200 else None
