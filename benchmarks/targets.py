"""What this daemon is to reach, judged on the medians of one run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from servers import SELF

Medians = Mapping[tuple[str, str], Mapping[str, float]]      # (scenario, server) -> metric -> median


@dataclass(frozen=True)
class Verdict:
    """`reached` is None when one of the two was not measured."""

    name: str
    wanted: str
    measured: str
    reached: bool | None


def judge(medians: Medians, worst_errors: Mapping[tuple[str, str], float]) -> list[Verdict]:
    """`worst_errors` is the largest number of errors of any repetition, by (scenario, server)."""
    return [*_against_others(medians), *_ttfb(medians), *_absolute(medians), *_without_error(worst_errors, medians)]


@dataclass(frozen=True)
class _Ratio:
    """ours / theirs, which is to be at least (or at most) `factor`; no factor: reported as it is."""

    scenario: str
    metric: str
    title: str
    other: str
    factor: float | None
    at_least: bool = True


_RATIOS = (
    _Ratio("streams_ramped", "events_per_s", "1,000 streams over 5 s: events/s", "nginx", 0.99),
    _Ratio("streams_ramped", "gap_p99_ms", "1,000 streams over 5 s: p99 gap", "nginx", 2, at_least=False),
    _Ratio("streams_ramped", "gap_p99_ms", "1,000 streams over 5 s: p99 gap", "vllm-router", 1, at_least=False),
    _Ratio("streams_ramped", "first_p99_ms", "1,000 streams over 5 s: p99 first byte", "vllm-router", 1,
           at_least=False),
    _Ratio("streams_at_once", "events_per_s", "1,000 streams at once: events/s", "vllm-router", 1),
    _Ratio("json_1kb", "requests_per_s", "JSON of 1 kB, 32 connections: requests/s", "production-stack", 1.5),
    _Ratio("json_1kb", "requests_per_s", "JSON of 1 kB, 32 connections: requests/s", "litellm", 10),
    _Ratio("json_1kb", "requests_per_s", "JSON of 1 kB, 32 connections: requests/s", "mvllm", 50),
    _Ratio("json_1kb", "requests_per_s", "JSON of 1 kB, 32 connections: requests/s", "caddy", None),
    _Ratio("json_1kb", "requests_per_s", "JSON of 1 kB, 32 connections: requests/s", "vllm-router", None),
    _Ratio("body_4mb", "sent_mb_per_s", "4 MB bodies, 8 connections: bytes/s", "nginx", 0.5),
)


def needed() -> dict[str, set[str]]:
    """Which servers must be measured in which scenario, for every target to be judged."""
    servers: dict[str, set[str]] = {"ttfb_arrivals": {"direct", SELF}, "idle_10k": {SELF}}
    for ratio in _RATIOS:
        servers.setdefault(ratio.scenario, {SELF}).add(ratio.other)
    return servers


def _value(medians: Medians, scenario: str, server: str, metric: str) -> float | None:
    return medians.get((scenario, server), {}).get(metric)


def _against_others(medians: Medians) -> Iterator[Verdict]:
    for ratio in _RATIOS:
        ours = _value(medians, ratio.scenario, SELF, ratio.metric)
        theirs = _value(medians, ratio.scenario, ratio.other, ratio.metric)
        word = "at least" if ratio.at_least else "at most"
        wanted = "reported" if ratio.factor is None else f"{word} {ratio.factor:g} x {ratio.other}"
        name = f"{ratio.title} against {ratio.other}"
        if ours is None or not theirs:
            yield Verdict(name, wanted, "not measured", None)
            continue
        quotient = ours / theirs
        reached = None
        if ratio.factor is not None:
            reached = quotient >= ratio.factor if ratio.at_least else quotient <= ratio.factor
        yield Verdict(name, wanted, f"{quotient:.3g} x ({ours:,.5g} to {theirs:,.5g})", reached)


def _ttfb(medians: Medians) -> Iterator[Verdict]:
    for metric, label, limit_ms in (("first_p50_ms", "p50", 1.0), ("first_p99_ms", "p99", 5.0)):
        ours = _value(medians, "ttfb_arrivals", SELF, metric)
        direct = _value(medians, "ttfb_arrivals", "direct", metric)
        name, wanted = f"time to first byte over direct, {label}", f"at most +{limit_ms:g} ms"
        if ours is None or direct is None:
            yield Verdict(name, wanted, "not measured", None)
        else:
            yield Verdict(name, wanted, f"{ours - direct:+.2f} ms", ours - direct <= limit_ms)


def _absolute(medians: Medians) -> Iterator[Verdict]:
    below: Callable[[float, float], bool] = lambda value, limit: value < limit      # noqa: E731
    at_most: Callable[[float, float], bool] = lambda value, limit: value <= limit   # noqa: E731
    for metric, name, wanted, limit, unit, holds in (
            ("pss_mb", "memory with 1,000 streams open (PSS)", "at most 120 MB", 120.0, "MB", at_most),
            ("cpu_us_per_event", "CPU per event", "under 15 us", 15.0, "us", below)):
        ours = _value(medians, "streams_ramped", SELF, metric)
        if ours is None:
            yield Verdict(name, wanted, "not measured", None)
        else:
            yield Verdict(name, wanted, f"{ours:.1f} {unit}", holds(ours, limit))


def _without_error(worst: Mapping[tuple[str, str], float], medians: Medians) -> Iterator[Verdict]:
    for scenario, name in (("streams_at_once", "1,000 streams at once: errors"),
                           ("idle_10k", "10,000 idle keep-alive connections: refused, closed or failed")):
        errors = worst.get((scenario, SELF))
        if errors is None:
            yield Verdict(name, "none", "not measured", None)
            continue
        held = _value(medians, scenario, SELF, "held")
        yield Verdict(name, "none", f"{errors:.0f}" + (f" ({held:,.0f} held)" if held is not None else ""), not errors)
