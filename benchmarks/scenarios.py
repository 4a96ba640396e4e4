"""What is measured: each scenario is one run of the load program, and what is read off it and off the server."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from processes import LOAD, Program, wait_until
from servers import MODEL, Server

Sample = dict[str, float]               # metric name -> value of one run; a metric that it has not is absent


@dataclass(frozen=True)
class Scenario:
    """`options` are the load program's for a full run, `quick` those that differ in a run that only checks function.

    `columns` are the metrics of the table, the first the one that ratios are made of; `better` says which way.
    `skip` names servers that would only cost time here.
    """

    name: str
    title: str
    options: dict[str, float | bool]
    quick: dict[str, float | bool]
    columns: tuple[str, ...]
    better: str = "more"
    skip: frozenset[str] = frozenset()
    light: bool = False                 # asks the server's light path instead of a completion
    max_repeats: int = 1000

    def arguments(self, server: Server, quick: bool) -> list[str]:
        options = self.options | (self.quick if quick else {})
        words = ["--port", str(server.place.port), "--model", MODEL, "--header", "Authorization: Bearer none"]
        if self.light:
            words += ["--path", server.kind.light_path]
        for name, value in options.items():
            words += [f"--{name}"] if value is True else [f"--{name}", str(value)]
        return words

    def seconds(self, quick: bool) -> float:
        return float((self.options | (self.quick if quick else {}))["seconds"])


SLOW = frozenset({"litellm", "mvllm"})          # a thousand streams are minutes of errors for them
FLOOR = frozenset({"floor", "floor-relay"})
NO_STREAMS = frozenset({"floor"})

SCENARIOS: dict[str, Scenario] = {scenario.name: scenario for scenario in (
    Scenario("streams_ramped", "1,000 streams of 512 events, one each 20 ms, opened over 5 s; 25 s",
             {"connections": 1000, "stream": True, "tokens": 512, "seconds": 25, "ramp-s": 5},
             {"connections": 100, "tokens": 64, "seconds": 4, "ramp-s": 1},
             ("events_per_s", "gap_p50_ms", "gap_p99_ms", "first_p50_ms", "first_p99_ms", "cpu_us_per_event",
              "pss_mb", "errors"), skip=SLOW | NO_STREAMS),
    Scenario("streams_at_once", "1,000 streams of 256 events, one each 20 ms, all opened at once; 15 s",
             {"connections": 1000, "stream": True, "tokens": 256, "seconds": 15},
             {"connections": 100, "tokens": 64, "seconds": 3},
             ("events_per_s", "gap_p99_ms", "first_p50_ms", "first_p99_ms", "errors"), skip=SLOW | NO_STREAMS),
    Scenario("ttfb_arrivals", "64 streams at a time, arriving at 50 a second; 15 s",
             {"connections": 2000, "stream": True, "tokens": 64, "seconds": 15, "arrivals-per-s": 50},
             {"seconds": 3},
             ("first_p50_ms", "first_p99_ms", "gap_p99_ms", "errors"), better="less", skip=NO_STREAMS | {"mvllm"}),
    Scenario("json_1kb", "JSON of 1 kB, 32 connections",
             {"connections": 32, "seconds": 5}, {"seconds": 2},
             ("requests_per_s", "whole_p50_ms", "whole_p99_ms", "cpu_us_per_request", "errors")),
    Scenario("json_one", "JSON of 1 kB, one connection",
             {"connections": 1, "seconds": 3}, {"seconds": 1},
             ("whole_p50_ms", "whole_p99_ms", "requests_per_s", "errors"), better="less"),
    Scenario("body_4mb", "request bodies of 4 MB, 8 connections",
             {"connections": 8, "body-bytes": 4_000_000, "seconds": 5}, {"seconds": 1.5},
             ("sent_mb_per_s", "whole_p50_ms", "whole_p99_ms", "errors"), skip=FLOOR | {"mvllm"}),
    Scenario("idle_10k", "10,000 keep-alive connections, each used once, then idle for 10 s",
             {"connections": 10_000, "idle": True, "seconds": 10, "sample": 200, "ramp-s": 2},
             {"connections": 1000, "seconds": 1, "sample": 50, "ramp-s": 0.5},
             ("held", "opened_s", "pss_mb", "errors"), skip=SLOW | FLOOR | {"production-stack"}, light=True,
             max_repeats=1),
)}


def run(scenario: Scenario, server: Server, quick: bool) -> Sample:
    """One measurement.  Blocks for the scenario's time and the drain after it; raises RuntimeError when load fails."""
    before_s = server.program.cpu_s() if server.program else 0.0
    report, pss_bytes = _load(scenario, server, quick)
    cpu_s = (server.program.cpu_s() if server.program else 0.0) - before_s
    started = time.monotonic()
    drained = wait_until(lambda: server.streams_running() <= 0, 20)
    sample: Sample = {name: float(value) for name, value in report.items()
                      if isinstance(value, int | float) and not isinstance(value, bool)}
    sample |= {f"errors_{kind}": float(count) for kind, count in report["error_kinds"].items()}
    sample["errors"] += sample.get("idle_closed", 0.0)
    sample["sent_mb_per_s"] = sample["sent_bytes_per_s"] / 1e6
    sample["drained_s"] = time.monotonic() - started if drained else float("inf")
    if server.program:
        sample["cpu_s"] = cpu_s
        if pss_bytes:
            sample["pss_mb"] = pss_bytes / 1e6
        if sample["total_events"]:
            sample["cpu_us_per_event"] = cpu_s * 1e6 / sample["total_events"]
        elif sample["total_requests"]:
            sample["cpu_us_per_request"] = cpu_s * 1e6 / sample["total_requests"]
    return sample


def hopeless(sample: Sample) -> bool:
    """More failed than came through: another repetition would only cost time."""
    return sample["errors"] > max(sample["total_requests"], sample["total_events"] / 10)


def _load(scenario: Scenario, server: Server, quick: bool) -> tuple[dict[str, Any], int]:
    """The load program's report, and the server's memory while it ran (0: not read)."""
    seconds = scenario.seconds(quick)
    process = subprocess.Popen([str(LOAD), *scenario.arguments(server, quick)], stdout=subprocess.PIPE, text=True)
    try:
        pss_bytes = 0
        if server.program and "pss_mb" in scenario.columns:
            pss_bytes = _memory_meanwhile(scenario, server.program, process, seconds)
        output, _ = process.communicate(timeout=seconds + 240)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
    if process.returncode:
        raise RuntimeError(f"load ended with {process.returncode}")
    report: dict[str, Any] = json.loads(output)
    return report, pss_bytes


def _memory_meanwhile(scenario: Scenario, program: Program, load: subprocess.Popen[str], seconds: float) -> int:
    """Streams: one reading at 60 % of the time, when all are open (reading memory disturbs, so not more often).

    Idle connections: the largest of a reading a second, since when they are all open depends on the server.
    """
    ended: Callable[[], bool] = lambda: load.poll() is not None     # noqa: E731
    if not scenario.light:
        wait_until(ended, seconds * 0.6)
        return program.pss_bytes()
    largest = 0
    while not wait_until(ended, 1.0):
        largest = max(largest, program.pss_bytes())
    return largest
