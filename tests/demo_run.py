"""`make run` and `make demo` as a real process, with the simulated engine."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from tests.daemon import CHECKOUT, HANG_S, Daemon
from tests.support import wait_until


class DemoRun(Daemon):
    """`scripts.run` in a session of its own, with a cache folder of its own; the daemon is its child."""

    def __init__(self, folder: Path, *arguments: str, env: Mapping[str, str] | None = None) -> None:
        super().__init__(folder, {"PYTHONPATH": str(CHECKOUT), "APP_HOST": "127.0.0.1", "APP_PORT": "0",
                                  "VLLM_SERVER_CACHE": str(folder / "cache"), **(env or {})})
        self._argv = [sys.executable, "-m", "scripts.run", *arguments]
        if "--demo" in arguments:
            self.state = folder / "state-demo"

    def wait_for(self, words: str) -> None:
        """Until it has said so.  Raises AssertionError with its output when it ends before."""
        wait_until(lambda: words in self.log or self.exited())
        assert words in self.log, self.log

    @property
    def lines(self) -> dict[str, str]:
        """What it shows for the shell, by its title."""
        return dict(re.findall(r"^==> ([\w ]+):\n(curl .*)$", self.log, re.MULTILINE))

    def ctrl_c(self) -> None:
        """As a terminal does it: to the whole process group in the foreground."""
        os.killpg(self.pid, signal.SIGINT)


def shell(script: str, env: Mapping[str, str] | None = None, cwd: Path | None = None) -> str:
    """What a script prints in bash.  Raises AssertionError when one of its commands fails."""
    done = subprocess.run(["bash", "-eo", "pipefail", "-c", script], env=env, cwd=cwd, text=True, capture_output=True,
                          timeout=HANG_S)
    assert done.returncode == 0, f"{script}\n{done.stdout}\n{done.stderr}"
    return done.stdout
