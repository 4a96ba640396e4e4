"""The numbers of a simulated engine and their Prometheus text, with vLLM's names and labels."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Iterator

FINISH_REASONS = ("stop", "length", "abort", "error", "repetition")
FIRST_TOKEN_BUCKETS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
                       20.0, 40.0, 80.0, 160.0, 640.0, 2560.0)
LATENCY_BUCKETS = (0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0,
                   480.0, 960.0, 1920.0, 7680.0)


class Histogram:
    def __init__(self, buckets: tuple[float, ...]) -> None:
        self._bounds = buckets
        self._counts = [0] * (len(buckets) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def lines(self, name: str, labels: str) -> Iterator[str]:
        total = 0
        for bound, count in zip((*self._bounds, float("inf")), self._counts, strict=True):
            total += count
            edge = "+Inf" if bound == float("inf") else str(bound)
            yield f'{name}_bucket{{engine="0",le="{edge}",{labels}}} {float(total)}'
        yield f'{name}_count{{engine="0",{labels}}} {float(total)}'
        yield f'{name}_sum{{engine="0",{labels}}} {self._sum}'


class Metrics:
    def __init__(self, model_name: str) -> None:
        self._label = 'model_name="' + model_name.replace("\\", "\\\\").replace('"', '\\"') + '"'
        self.prompt_tokens = 0
        self.generation_tokens = 0
        self.prefix_hits = 0
        self.rejections = 0
        self.successes = dict.fromkeys(FINISH_REASONS, 0)
        self.first_token = Histogram(FIRST_TOKEN_BUCKETS)
        self.latency = Histogram(LATENCY_BUCKETS)

    def token(self, n: int, since: float | None) -> None:
        """`n` sequences got a token; `since` is the arrival when it was their first."""
        self.generation_tokens += n
        if since is not None:
            self.first_token.observe(time.monotonic() - since)

    def finished(self, reason: str, since: float) -> None:
        self.successes[reason] += 1
        self.latency.observe(time.monotonic() - since)

    def render(self, *, running: int, waiting: int, max_num_seqs: int, sleep_level: int) -> str:
        label = self._label
        states = {"awake": sleep_level == 0, "weights_offloaded": sleep_level == 1, "discard_all": sleep_level == 2}
        lines = [
            *_metric("num_requests_running", "gauge", "Number of requests in model execution batches.",
                     [(label, running)]),
            *_metric("num_requests_waiting", "gauge", "Number of requests waiting to be processed.",
                     [(label, waiting)]),
            *_metric("num_requests_waiting_by_reason", "gauge", "Number of waiting requests by reason.",
                     [(f'{label},reason="capacity"', waiting), (f'{label},reason="deferred"', 0)]),
            *_metric("engine_sleep_state", "gauge", "Engine sleep state.",
                     [(f'{label},sleep_state="{state}"', int(on)) for state, on in states.items()]),
            *_metric("kv_cache_usage_perc", "gauge", "KV-cache usage. 1 means 100 percent usage.",
                     [(label, min(1.0, running / max_num_seqs))]),
            *_metric("prefix_cache_queries_total", "counter", "Prefix cache queries.", [(label, self.prompt_tokens)]),
            *_metric("prefix_cache_hits_total", "counter", "Prefix cache hits.",
                     [(label, self.prefix_hits)]),
            *_metric("num_preemptions_total", "counter", "Cumulative number of preemption from the engine.",
                     [(label, 0)]),
            *_metric("prompt_tokens_total", "counter", "Number of prefill tokens processed.",
                     [(label, self.prompt_tokens)]),
            *_metric("generation_tokens_total", "counter", "Number of generation tokens processed.",
                     [(label, self.generation_tokens)]),
            *_metric("request_success_total", "counter", "Count of successfully processed requests.",
                     [(f'finished_reason="{reason}",{label}', count) for reason, count in self.successes.items()]),
            "# HELP vllm:admission_rejections_total Number of admission attempts rejected by a queue limit, by reason.",
            "# TYPE vllm:admission_rejections_total counter",
            f'vllm:admission_rejections_total{{{label},reason="max_num_queued_reqs"}} {float(self.rejections)}',
        ]
        for name, help_text, histogram in (
                ("time_to_first_token_seconds", "Histogram of time to first token in seconds.", self.first_token),
                ("e2e_request_latency_seconds", "Histogram of e2e request latency in seconds.", self.latency)):
            lines += [f"# HELP vllm:{name} {help_text}", f"# TYPE vllm:{name} histogram",
                      *histogram.lines(f"vllm:{name}", label)]
        return "\n".join(lines) + "\n"


def _metric(name: str, kind: str, help_text: str, samples: list[tuple[str, float]]) -> Iterator[str]:
    yield f"# HELP vllm:{name} {help_text}"
    yield f"# TYPE vllm:{name} {kind}"
    for labels, value in samples:
        yield f'vllm:{name}{{engine="0",{labels}}} {float(value)}'
