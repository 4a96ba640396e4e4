"""What the daemon remembers of the last hour: a bounded ring of samples, and how one follows from two readings.  Pure.

A sample holds what can be seen between two moments: rates over the time since the sample before, and counts as they
are.  None is what nobody knows: the time to a first token where there was none.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from routing.scrape import Totals

EVERY_S = 5.0
KEPT_S = 3600.0


class Figures(NamedTuple):
    """Of one instance, of one model, or of all together."""

    tokens_per_s: float | None = 0.0            # generated; None: its engine did not say
    prompt_tokens_per_s: float | None = 0.0
    requests_per_s: float = 0.0                 # answered
    ttft_s: float | None = None                 # to the first token, the mean of those that got theirs
    in_flight: int = 0
    waiting: float = 0.0                        # in the engine's queue; of a model and of all, also for a load
    cache_usage: float | None = None            # of the KV cache, 0 to 1; of several the fullest


class Sample(NamedTuple):
    at: float                                   # wall clock
    total: Figures
    instances: Mapping[str, Figures]            # by id
    models: Mapping[str, Figures]               # by name, those that something happened to
    names: Mapping[str, str]                    # the model of each of these instances


NOTHING = Figures()
NO_TOTALS = Totals(0.0, 0.0, 0.0, 0.0)


def rates(before: Totals, now: Totals, seconds: float) -> tuple[float, float, float | None]:
    """Generated tokens and prompt tokens a second, and the mean time to a first token in between.

    An engine that began anew counts from nothing, and so does this.
    """
    if now.generated_tokens < before.generated_tokens or now.prompt_tokens < before.prompt_tokens:
        before = NO_TOTALS
    firsts = now.first_tokens - before.first_tokens
    ttft_s = max(0.0, now.first_tokens_s - before.first_tokens_s) / firsts if firsts > 0 else None
    return ((now.generated_tokens - before.generated_tokens) / seconds,
            (now.prompt_tokens - before.prompt_tokens) / seconds, ttft_s)


def together(parts: Iterable[tuple[Figures, float]]) -> Figures:
    """The sum of parts, each with the requests that its time to a first token is the mean of."""
    tokens = prompts = requests = waiting = weighed = weight = 0.0
    in_flight = 0
    usages = []
    for one, firsts in parts:
        tokens += one.tokens_per_s or 0.0
        prompts += one.prompt_tokens_per_s or 0.0
        requests += one.requests_per_s
        waiting += one.waiting
        in_flight += one.in_flight
        if one.ttft_s is not None:
            weighed, weight = weighed + one.ttft_s * firsts, weight + firsts
        if one.cache_usage is not None:
            usages.append(one.cache_usage)
    return Figures(tokens, prompts, requests, weighed / weight if weight else None, in_flight, waiting,
                   max(usages, default=None))


def shown(figures: Figures) -> dict[str, float | None]:
    return {name: None if value is None else round(value, 4) for name, value in figures._asdict().items()}


class Ring:
    """The samples of the last hour.  Thread-safe."""

    def __init__(self, *, every_s: float = EVERY_S, kept_s: float = KEPT_S) -> None:
        self.every_s, self.kept_s = every_s, kept_s
        self._samples: deque[Sample] = deque(maxlen=int(kept_s / every_s))
        self._lock = threading.Lock()

    def add(self, sample: Sample) -> None:
        with self._lock:
            self._samples.append(sample)

    def latest(self, instance_id: str) -> Figures:
        """Of an instance; nothing yet of one that came since the last sample."""
        with self._lock:
            return self._samples[-1].instances.get(instance_id, NOTHING) if self._samples else NOTHING

    def since(self, at: float = 0.0) -> list[Sample]:
        """Those later than `at`, oldest first."""
        with self._lock:
            return [one for one in self._samples if one.at > at]

    def history(self, at: float = 0.0) -> dict[str, Any]:
        """Column by column, each as long as `at`, with None where something was not there."""
        samples = self.since(at)
        names: dict[str, str] = {}
        models: dict[str, None] = {}
        for sample in samples:
            names.update(sample.names)
            models.update(dict.fromkeys(sample.models))
        return {
            "object": "history", "every_s": self.every_s, "kept_s": self.kept_s,
            "at": [round(sample.at, 3) for sample in samples],
            "total": _columns([sample.total for sample in samples]),
            "instances": {id_: {"model": name} | _columns([sample.instances.get(id_) for sample in samples])
                          for id_, name in names.items()},
            "models": {name: _columns([sample.models.get(name, NOTHING) for sample in samples]) for name in models}}


def _columns(rows: list[Figures | None]) -> dict[str, list[float | None]]:
    return {name: [None if row is None or (value := row[place]) is None else round(value, 4) for row in rows]
            for place, name in enumerate(Figures._fields)}
