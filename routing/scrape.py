"""What a vLLM server's /metrics and /v1/models say, as far as it is needed to choose.  Pure.

A page has 50 kB, of which five numbers are wanted: they are searched for, not parsed with the rest.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import orjson

MAX_MODELS = 20_000
MAX_NAME = 1024
WARM = frozenset({"ready", ""})
"""Of the states that another vllm-server gives its models, the one in which it answers at once; vLLM has none."""
FAILED = "failed"

_GAUGES = re.compile(rb"^vllm:(num_requests_running|num_requests_waiting|kv_cache_usage_perc|gpu_cache_usage_perc)"
                     rb"(?:\{[^\n]*\})? ([^\s]+)", re.MULTILINE)


class Gauges(NamedTuple):
    """Summed over the engines and models of one server; the cache's usage is that of the fullest."""

    running: float
    waiting: float
    cache_usage: float | None


def gauges(page: bytes) -> Gauges | None:
    """None when it is no vLLM server's page."""
    sums: dict[bytes, float] = {}
    usage: float | None = None
    for name, text in _GAUGES.findall(page):
        try:
            value = float(text)
        except ValueError:
            return None
        if not math.isfinite(value) or value < 0:
            continue
        if name.endswith(b"_perc"):
            usage = value if usage is None else max(usage, value)
        else:
            sums[name] = sums.get(name, 0.0) + value
    if b"num_requests_running" not in sums:
        return None
    return Gauges(sums[b"num_requests_running"], sums.get(b"num_requests_waiting", 0.0), usage)


_COUNTERS = re.compile(rb"^vllm:(generation_tokens_total|prompt_tokens_total|time_to_first_token_seconds_sum|"
                       rb"time_to_first_token_seconds_count)(?:\{[^\n]*\})? ([^\s]+)", re.MULTILINE)


class Totals(NamedTuple):
    """Since the engine began, summed over the engines and models of one server."""

    generated_tokens: float
    prompt_tokens: float
    first_tokens: float         # of how many requests
    first_tokens_s: float       # how long they took, all together


def totals(page: bytes) -> Totals | None:
    """None when it is no vLLM server's page."""
    sums: dict[bytes, float] = {}
    for name, text in _COUNTERS.findall(page):
        try:
            value = float(text)
        except ValueError:
            return None
        if math.isfinite(value) and value >= 0:
            sums[name] = sums.get(name, 0.0) + value
    if b"generation_tokens_total" not in sums and b"prompt_tokens_total" not in sums:
        return None
    return Totals(sums.get(b"generation_tokens_total", 0.0), sums.get(b"prompt_tokens_total", 0.0),
                  sums.get(b"time_to_first_token_seconds_count", 0.0),
                  sums.get(b"time_to_first_token_seconds_sum", 0.0))


class Offered(NamedTuple):
    """A model that a server lists.  `path`: the vllm-servers between here and the engine, the nearest first."""

    warm: bool
    path: tuple[str, ...] = ()


def offered(body: bytes, own_name: str) -> Mapping[str, Offered] | None:
    """What a /v1/models answer offers, without what would come back to the server that asks (`own_name`).

    None when it is no such answer.
    """
    try:
        entries = orjson.loads(body)["data"]
        found: dict[str, Offered] = {}
        for entry in entries[:MAX_MODELS]:
            one, name = _offered(entry), entry["id"]
            if isinstance(name, str) and 0 < len(name) <= MAX_NAME and own_name not in one.path \
                    and entry.get("status") != FAILED:
                found[name] = one
    except (orjson.JSONDecodeError, KeyError, TypeError, AttributeError):
        return None
    return found


def _offered(entry: Mapping[str, Any]) -> Offered:
    status, path = entry.get("status", ""), entry.get("via", ())
    return Offered(status in WARM, tuple(str(hop)[:200] for hop in path[:50]) if isinstance(path, list) else ())
