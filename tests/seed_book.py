"""A document of one of the three systems, read from its first command to its last: nothing is skipped unseen."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.daemon import CHECKOUT, HANG_S
from tests.demo_run import shell

FOLDER = CHECKOUT / "tests" / "data" / "seeds"


@dataclass(frozen=True)
class Printed:
    """One command of a bash block, or another block as a whole."""

    where: str      # document and heading
    language: str
    text: str


def commands(text: str) -> list[str]:
    """Those of a bash block: a command may go over several lines, by backslashes and inside quotes."""
    found, pending = [], ""
    for line in text.splitlines():
        pending += line + "\n"
        try:
            words = shlex.split(pending, comments=True)
        except ValueError:      # a quote is open
            continue
        if not pending.endswith("\\\n"):
            found += [pending.strip()] if words else []
            pending = ""
    assert not pending, pending
    return found


def without_comments(command: str) -> str:
    return "\n".join(line for line in command.splitlines() if not line.startswith("#"))


class Book:
    """Its steps are taken in their order; what a test does not name is missed at the end."""

    def __init__(self, name: str, env: Mapping[str, str]) -> None:
        self.name, self._env = name, env
        self.text = (FOLDER / name).read_text()
        self.values: dict[str, str] = {}       # what is put in place of a printed placeholder or address
        self._left = self._steps()

    def _steps(self) -> list[Printed]:
        steps, heading = [], self.name
        for part in re.split(r"(^#+ [^\n]*$|^```\w*\n.*?^```$)", self.text, flags=re.MULTILINE | re.DOTALL):
            if part.startswith("#"):
                heading = f"{self.name}: {part.lstrip('# ')}"
            elif part.startswith("```"):
                language, _, code = part[3:-3].partition("\n")
                each = commands(code) if language == "bash" else [code]
                steps += [Printed(heading, language, without_comments(one) if language == "bash" else one)
                          for one in each]
        return steps

    def take(self, start: str, language: str = "bash") -> str:
        """The next step as printed, which must be this one."""
        assert self._left, f"{self.name} has no further step; {start!r} was expected"
        step = self._left.pop(0)
        assert step.language == language and step.text.strip().startswith(start), f"{step}, not {start!r}"
        return step.text

    def here(self, text: str) -> str:
        for printed, value in self.values.items():
            text = text.replace(printed, value)
        return text

    def run(self, start: str, cwd: Path | None = None) -> str:
        """The next step in bash as printed, but for `values` and that an HTTP error is a failure.  Its output."""
        return shell(self.here(self.take(start)).replace("curl ", "curl -fsS "), self._env, cwd)

    def python(self, start: str, cwd: Path | None = None) -> str:
        """The next step as a program."""
        done = subprocess.run([sys.executable, "-c", self.here(self.take(start, "python"))], text=True, cwd=cwd,
                              env=self._env, capture_output=True, timeout=HANG_S)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def table(self) -> dict[str, str]:
        """Variable -> default, of the tables of variables."""
        rows = [[cell.strip(" `") for cell in line.split("|")[1:-1]] for line in self.text.splitlines()
                if line.startswith("|")]
        return {row[0]: row[-1] for row in rows}

    def routes(self) -> set[tuple[str, str]]:
        """(method, path) of the lists of routes; placeholders are written as `<>`."""
        found = re.findall(r"^- `([A-Z]+) ([^`]+)`", self.text, re.MULTILINE)
        return {(method, re.sub(r"[<{]\w+[}>]", "<>", path)) for method, path in found}

    def end(self) -> None:
        assert self._left == [], f"steps that no test takes: {self._left}"
