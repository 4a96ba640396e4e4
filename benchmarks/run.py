"""make bench: the data plane against direct access and against other proxies, in one run on one machine.

    python benchmarks/run.py [--only SCENARIO…] [--against NAME…] [--targets] [--repeat N] [--quick] [--json FILE]
    python benchmarks/document.py FILE      # puts that run's tables into docs/PERFORMANCE.md

Every server is started once, before a null upstream, on loopback; then each repetition goes through the scenarios,
and each scenario through the servers in turn, so that whatever else the machine does falls on all of them.  What is
not installed (benchmarks/install_competitors.sh) is named and left out; nothing is downloaded here.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import scenarios
import targets
from processes import build, free_port, raise_file_limit
from report import Run, as_json, as_text
from scenarios import SCENARIOS, Scenario
from servers import KINDS, SELF, Kind, NotStarted, Place, Server, start, start_upstream

ALIASES = {"memory": ("streams_ramped", "idle_10k"), "cpu_per_event": ("streams_ramped",)}


class Bench:
    """The servers of one run, and what was measured so far."""

    def __init__(self, settings: argparse.Namespace, folder: Path, upstream_port: int, stack: ExitStack) -> None:
        self._settings = settings
        self._folder = folder
        self._upstream_port = upstream_port
        self._stack = stack
        self._servers: dict[str, Server] = {}
        self._given_up: set[tuple[str, str]] = set()
        self._deadline = time.monotonic() + settings.max_minutes * 60
        self.run = Run(settings.quick, settings.repeat, {}, {})

    def start_all(self, names: list[str]) -> None:
        for name in names:
            kind = KINDS[name]
            path = kind.find()
            if path is None:
                self.run.absent[name] = "not installed" if name != SELF else "not there (no app.py)"
                continue
            _say(f"starting {name}")
            try:
                self._start(kind, path)
            except NotStarted as failure:
                self.run.absent[name] = "did not start: " + str(failure).strip().replace("\n", "\n      ")
            else:
                self.run.versions[name] = kind.version(path)

    def _start(self, kind: Kind, path: str) -> None:
        folder = Path(tempfile.mkdtemp(prefix=kind.name.replace(" ", "-") + "-", dir=self._folder))
        folder.chmod(0o755)                                     # nginx's workers are another user
        port = self._upstream_port if kind.name == "direct" else free_port()
        server = start(kind, path, Place(folder, port, self._upstream_port, self._settings.daemon_env))
        self._servers[kind.name] = server
        self._stack.callback(server.end)

    def expected_minutes(self, chosen: list[Scenario]) -> float:
        """About how long measuring will take; what fails takes longer."""
        repeat, quick = int(self._settings.repeat), bool(self._settings.quick)
        return sum((scenario.seconds(quick) + 1.5) * min(repeat, scenario.max_repeats)
                   for scenario in chosen for _ in self._names(scenario)) / 60

    def _names(self, scenario: Scenario) -> list[str]:
        """The servers that are measured in it."""
        needed = targets.needed().get(scenario.name, ()) if self._settings.targets else self._servers
        return [name for name in self._servers if name in needed and name not in scenario.skip]

    def measure_all(self, chosen: list[Scenario]) -> None:
        for repetition in range(self._settings.repeat):
            for scenario in chosen:
                if repetition >= scenario.max_repeats:
                    continue
                names = self._names(scenario)
                turn = repetition % max(len(names), 1)          # none is always the first after a rest
                for name in names[turn:] + names[:turn]:
                    if time.monotonic() > self._deadline:
                        self.run.notes.append(f"stopped after {self._settings.max_minutes:g} minutes")
                        return
                    self._measure(scenario, name, repetition)
        self.run.load_average.append(os.getloadavg()[0])

    def _measure(self, scenario: Scenario, name: str, repetition: int) -> None:
        if (scenario.name, name) in self._given_up:
            return
        if not self._ready(name):
            self._given_up.add((scenario.name, name))
            return
        sample = scenarios.run(scenario, self._servers[name], self._settings.quick)
        self.run.samples.setdefault((scenario.name, name), []).append(sample)
        first = scenario.columns[0]
        _say(f"{repetition + 1}/{self._settings.repeat} {scenario.name} {name}: {sample.get(first, 0.0):,.4g} {first}, "
             f"{sample['errors']:.0f} errors")
        if sample["drained_s"] == float("inf"):
            self._note(f"{name}: 20 s after {scenario.name} its upstream was still in streams that nobody read")
        if scenarios.hopeless(sample):
            self._given_up.add((scenario.name, name))
            self._note(f"{name} failed {scenario.name}: {_errors(sample)}")

    def _ready(self, name: str) -> bool:
        """Whether it answers; one that does not is started anew, once each time."""
        server = self._servers[name]
        if server.answers():
            return True
        self._note(f"{name} did not answer any more and was started anew")
        server.end()
        try:
            self._start(server.kind, server.kind.find() or "")
        except NotStarted:
            return False
        return True

    def _note(self, text: str) -> None:
        if text not in self.run.notes:
            self.run.notes.append(text)
            _say(f"note: {text}")


def _errors(sample: scenarios.Sample) -> str:
    kinds = [f"{name.removeprefix('errors_')} {count:.0f}" for name, count in sample.items()
             if name.startswith("errors_") and count]
    return f"{sample['total_requests']:.0f} answered, " + ", ".join(kinds)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _settings() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="SCENARIO", choices=[*SCENARIOS, *ALIASES],
                        help=", ".join([*SCENARIOS, *ALIASES]))
    parser.add_argument("--against", nargs="+", metavar="NAME", choices=list(KINDS),
                        help="besides direct and this daemon: " + ", ".join(KINDS))
    parser.add_argument("--targets", action="store_true", help="only what a target is judged by: a third of the time")
    parser.add_argument("--repeat", type=int, help="repetitions, of which the median is taken (default 5; quick 1)")
    parser.add_argument("--quick", action="store_true", help="small and short, to see that all of it works")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all samples there")
    parser.add_argument("--max-minutes", type=float, default=120, help="start no measurement after that (default 120)")
    parser.add_argument("--daemon-env", nargs="+", default=[], metavar="NAME=VALUE", help="settings of this daemon")
    parser.add_argument("--keep", action="store_true", help="keep the folder with configurations and logs")
    settings = parser.parse_args()
    settings.repeat = max(1, settings.repeat or (1 if settings.quick else 5))
    settings.daemon_env = dict(pair.partition("=")[::2] for pair in settings.daemon_env)
    return settings


def _chosen(only: list[str] | None) -> list[Scenario]:
    names = {part for name in only or SCENARIOS for part in ALIASES.get(name, (name,))}
    return [scenario for name, scenario in SCENARIOS.items() if name in names]


def main() -> int:
    settings = _settings()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))    # what it started ends with it
    raise_file_limit()
    build()
    wanted = settings.against or (set().union(*targets.needed().values()) if settings.targets else KINDS)
    names = ["direct", SELF, *(name for name in KINDS if name in wanted and name not in ("direct", SELF))]
    folder = Path(tempfile.mkdtemp(prefix="vllm-server-bench-"))
    folder.chmod(0o755)
    with ExitStack() as stack:
        if settings.keep:
            _say(f"folder: {folder}")
        else:
            stack.callback(shutil.rmtree, folder, ignore_errors=True)
        upstream_folder = folder / "upstream"
        upstream_folder.mkdir()
        upstream, port = start_upstream(upstream_folder)
        stack.callback(upstream.end)
        bench = Bench(settings, folder, port, stack)
        bench.start_all(names)
        chosen = _chosen(settings.only)
        _say(f"measuring: about {bench.expected_minutes(chosen):.0f} minutes")
        try:
            bench.measure_all(chosen)
        except KeyboardInterrupt:
            bench.run.notes.append("interrupted")
    print(as_text(bench.run))
    if settings.json:
        settings.json.write_text(json.dumps(as_json(bench.run), indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
