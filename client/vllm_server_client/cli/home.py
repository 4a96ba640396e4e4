"""Where the daemon's program is, and what its settings are: for `run` and `doctor`, on the daemon's own machine."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HOME_VARIABLE = "VLLM_SERVER_HOME"
IMAGE_HOME = Path("/app")       # where the container image has it
CHECK_TIMEOUT_S = 60.0


class NoDaemon(Exception):
    """There is no program of the daemon here, or its settings are wrong; the message says what to do."""


@dataclass(frozen=True)
class Home:
    """A checkout, or what the image holds of it."""

    folder: Path
    python: str

    def command(self, *arguments: str) -> list[str]:
        return [self.python, str(self.folder / "app.py"), *arguments]


def find(environ: Mapping[str, str] = os.environ, cwd: Path | None = None) -> Home:
    """VLLM_SERVER_HOME, else the working directory, else the checkout that this file lies in, else /app.

    Raises NoDaemon.
    """
    named = environ.get(HOME_VARIABLE)
    around = Path(__file__).resolve().parents[3]
    places = [Path(named).expanduser()] if named else [cwd or Path.cwd(), around, IMAGE_HOME]
    for folder in places:
        if (folder / "app.py").is_file() and (folder / "instance_manager.py").is_file():
            return Home(folder.resolve(), _python(folder))
    raise NoDaemon(f"the daemon's program (app.py) is not in {', '.join(map(str, places))}: call this in a checkout of "
                   f"vllm-server, or set {HOME_VARIABLE} to one")


def _python(folder: Path) -> str:
    """The interpreter that has the daemon's libraries."""
    own = folder / ".venv" / "bin" / "python"
    return str(own.absolute()) if os.access(own, os.X_OK) else sys.executable


def settings(home: Home, arguments: Sequence[str] = ()) -> dict[str, Any]:
    """What `app.py --check` tells.  Raises NoDaemon with its sentence when the settings are wrong."""
    try:
        done = subprocess.run(home.command(*arguments, "--check"), capture_output=True, text=True,
                              timeout=CHECK_TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NoDaemon(f"{home.command()[0]} cannot run app.py: {error}") from None
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or ["it gave no reason"]
        if "ModuleNotFoundError" in lines[-1]:
            raise NoDaemon(f"the daemon's libraries are missing ({lines[-1].partition(': ')[2]}): run 'make run' in "
                           f"{home.folder} once, or '{home.python} -m pip install -r {home.folder}/requirements.txt'")
        raise NoDaemon(lines[-1].removeprefix("vllm-server: "))
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def engine_elsewhere(home: Home, command: Sequence[str]) -> str | None:
    """The command of an engine that an earlier `make run` installed, if the configured one is not there."""
    if shutil.which(command[0]):
        return None
    try:
        done = subprocess.run([home.python, str(home.folder / "scripts" / "setup_engine.py"), "--print-only"],
                              capture_output=True, text=True, timeout=CHECK_TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired):
        return None
    found = done.stdout.strip()
    return found if done.returncode == 0 and found and shutil.which(shlex.split(found)[0]) else None
