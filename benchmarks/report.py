"""The run as text and as JSON: machine, tables of medians with ratios, targets."""

from __future__ import annotations

import math
import os
import platform
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import psutil
from scenarios import SCENARIOS, Sample, Scenario
from servers import SELF
from targets import Verdict, judge

HEADINGS = {
    "events_per_s": "events/s", "requests_per_s": "requests/s", "sent_mb_per_s": "MB/s", "gap_p50_ms": "gap p50 ms",
    "gap_p99_ms": "gap p99 ms", "first_p50_ms": "first p50 ms", "first_p99_ms": "first p99 ms",
    "whole_p50_ms": "whole p50 ms", "whole_p99_ms": "whole p99 ms", "cpu_us_per_event": "CPU us/event",
    "cpu_us_per_request": "CPU us/req", "pss_mb": "PSS MB", "errors": "errors", "held": "held", "opened_s": "opened s",
}


@dataclass
class Run:
    """All that one run found.  `samples` has every repetition; nothing is thrown away before the report."""

    quick: bool
    repeat: int
    versions: dict[str, str]                                    # servers that took part
    absent: dict[str, str]                                      # servers that did not, and why
    samples: dict[tuple[str, str], list[Sample]] = field(default_factory=dict)
    load_average: list[float] = field(default_factory=lambda: [os.getloadavg()[0]])
    notes: list[str] = field(default_factory=list)

    def medians(self) -> dict[tuple[str, str], Sample]:
        return {key: _median(samples) for key, samples in self.samples.items()}

    def verdicts(self) -> list[Verdict]:
        worst = {key: max(sample["errors"] for sample in samples) for key, samples in self.samples.items() if samples}
        return judge(self.medians(), worst)


def _median(samples: Sequence[Sample]) -> Sample:
    names = {name for sample in samples for name in sample}
    return {name: statistics.median(sample[name] for sample in samples if name in sample) for name in sorted(names)}


def machine() -> dict[str, str]:
    model = next((line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                  if line.startswith("model name")), platform.machine())
    return {"cores": str(len(os.sched_getaffinity(0))), "cpu": model, "kernel": platform.release(),
            "memory": f"{psutil.virtual_memory().total / 2**30:.0f} GiB", "python": platform.python_version()}


def machine_line(about: Mapping[str, str], run: Run) -> str:
    load = " to ".join(f"{value:.1f}" for value in run.load_average)
    return (f"{about['cores']} cores ({about['cpu']}), {about['memory']}, Linux {about['kernel']}, "
            f"Python {about['python']}; load average {load}; load and upstream run on the same cores")


def as_text(run: Run) -> str:
    medians = run.medians()
    lines = [machine_line(machine(), run),
             f"medians of {run.repeat}, interleaved" + ("; QUICK: for function, not for figures" if run.quick else "")]
    lines += [f"  {name}: {version}" for name, version in run.versions.items()]
    lines += [f"  {name}: {why}" for name, why in run.absent.items()]
    for scenario in SCENARIOS.values():
        if any(key[0] == scenario.name for key in medians):
            lines += ["", f"{scenario.name}: {scenario.title}", *_aligned(rows(scenario, medians, run))]
    lines += ["", "Targets (this daemon)", *_verdict_table(run.verdicts(), run.quick)]
    lines += ["", *(f"note: {note}" for note in run.notes)] if run.notes else []
    return "\n".join(lines)


def rows(scenario: Scenario, medians: Mapping[tuple[str, str], Sample], run: Run) -> list[list[str]]:
    """The heading and a row a server.

    The ratio is this daemon to the row's server by the first column, above 1 when ours is better.
    """
    first = scenario.columns[0]
    ours = medians.get((scenario.name, SELF), {}).get(first)
    found = [["", *(HEADINGS[column] for column in scenario.columns), "spread", "ours is", "runs"]]
    for name in run.versions:
        sample = medians.get((scenario.name, name))
        if sample is None:
            continue
        repetitions = run.samples[scenario.name, name]
        values = [repetition[first] for repetition in repetitions if first in repetition]
        found.append([name, *(_number(sample.get(column)) for column in scenario.columns),
                      f"{_number(min(values))}-{_number(max(values))}" if len(values) > 1 else "",
                      _ratio(ours, sample.get(first), scenario.better), str(len(repetitions))])
    return found


def _ratio(ours: float | None, theirs: float | None, better: str) -> str:
    if not ours or not theirs:
        return ""
    return f"{ours / theirs if better == 'more' else theirs / ours:.3g} x"


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    if value == 0 or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"


def _verdict_table(verdicts: Iterable[Verdict], quick: bool) -> list[str]:
    words = {True: "reached", False: "NOT REACHED", None: ""}
    if quick:
        words |= {True: "(quick: not judged)", False: "(quick: not judged)"}
    return _aligned([[v.name, v.wanted, v.measured, words[v.reached]] for v in verdicts], numbers=False)


def _aligned(rows: Sequence[Sequence[str]], numbers: bool = True) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [cell.rjust(width) if numbers and i else cell.ljust(width)
                 for i, (cell, width) in enumerate(zip(row, widths, strict=True))]
        lines.append("  " + "  ".join(cells).rstrip())
    return lines


def from_json(found: Mapping[str, Any]) -> Run:
    """What `as_json` made of a run."""
    samples = {(scenario, server): repetitions for scenario, servers in found["samples"].items()
               for server, repetitions in servers.items()}
    return Run(found["quick"], found["repeat"], found["versions"], found["absent"], samples, found["load_average"],
               found["notes"])


def as_json(run: Run) -> dict[str, Any]:
    def by_scenario(values: Mapping[tuple[str, str], Any]) -> dict[str, dict[str, Any]]:
        nested: dict[str, dict[str, Any]] = {}
        for (scenario, server), value in values.items():
            nested.setdefault(scenario, {})[server] = value
        return nested

    return {"day": date.today().isoformat(), "machine": machine(), "quick": run.quick,
            "repeat": run.repeat, "load_average": run.load_average,
            "versions": run.versions, "absent": run.absent, "notes": run.notes,
            "scenarios": {name: scenario.title for name, scenario in SCENARIOS.items()},
            "medians": by_scenario(run.medians()), "samples": by_scenario(run.samples),
            "targets": [asdict(verdict) for verdict in run.verdicts()]}
