"""Puts the tables of a run into docs/PERFORMANCE.md, between its two marks.

    python benchmarks/document.py RESULT.json       # as benchmarks/run.py --json wrote it
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from report import from_json, machine_line, rows
from scenarios import SCENARIOS

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "PERFORMANCE.md"
BEGIN, END = "<!-- the latest run: benchmarks/document.py -->", "<!-- end of the latest run -->"
WORDS = {True: "reached", False: "**not reached**", None: ""}


def as_markdown(found: Mapping[str, Any]) -> str:
    """Of what `report.as_json` made.  Raises ValueError for a run that was only for function."""
    if found["quick"]:
        raise ValueError("a quick run has no figures to quote")
    run = from_json(found)
    medians = run.medians()
    parts = [f"{found['day']}, medians of up to {run.repeat}, interleaved. {machine_line(found['machine'], run)}.\n"]
    measured = {server for _, server in medians}
    parts += [f"- {name}: {version}" for name, version in run.versions.items() if name in measured]
    parts += [f"- {name}: {why.splitlines()[0]}" for name, why in run.absent.items()]
    for scenario in SCENARIOS.values():
        if any(key[0] == scenario.name for key in medians):
            parts += [f"\n`{scenario.name}`: {scenario.title}\n", *_table(rows(scenario, medians, run))]
    parts += ["\nTargets\n", *_table([["target", "wanted", "found", ""], *(
        [verdict.name, verdict.wanted, verdict.measured, WORDS[verdict.reached]] for verdict in run.verdicts())])]
    parts += ["", *(f"- note: {note}" for note in run.notes)] if run.notes else []
    return "\n".join(parts)


def _table(lines: Sequence[Sequence[str]]) -> Iterator[str]:
    yield "| " + " | ".join(lines[0]) + " |"
    yield "| " + " | ".join("---" for _ in lines[0]) + " |"
    for line in lines[1:]:
        yield "| " + " | ".join(line) + " |"


def with_tables(document: str, tables: str) -> str:
    """Raises ValueError where the marks are not there, once each and in order."""
    before, begin, rest = document.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or BEGIN in rest:
        raise ValueError(f"{BEGIN} and {END} must stand in it once")
    return f"{before}{begin}\n\n{tables}\n\n{end}{after}"


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    tables = as_markdown(json.loads(Path(sys.argv[1]).read_text()))
    DOCUMENT.write_text(with_tables(DOCUMENT.read_text(), tables))


if __name__ == "__main__":
    main()
