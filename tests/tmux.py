"""A program on a real terminal: tmux with a server of its own, its screen read and keys sent as a person would."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import pytest

from tests.daemon import HANG_S
from tests.support import wait_until

needs_tmux = pytest.mark.skipif(shutil.which("tmux") is None, reason="tmux is not installed (apt install tmux)")


class Tmux:
    """Ends with everything in it.  The program's exit code stands on the screen as `exit=N` once it has ended."""

    def __init__(self, argv: Sequence[str], env: Mapping[str, str], *, columns: int = 80, rows: int = 24,
                 cwd: Path | None = None) -> None:
        self._socket = f"vllm-server-test-{os.getpid()}-{id(self)}"
        self._env = dict(env)
        # The trap keeps the shell alive through a Ctrl-C that is meant for the program.
        command = f"trap : INT; {shlex.join(argv)}; echo exit=$?; exec cat"
        self._tmux("new-session", "-d", "-x", str(columns), "-y", str(rows),
                   "-c", str(cwd or Path.cwd()), "sh", "-c", command)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 traceback: TracebackType | None) -> None:
        self._tmux("kill-server")

    def _tmux(self, *words: str) -> str:
        done = subprocess.run(["tmux", "-f", "/dev/null", "-L", self._socket, *words], text=True, capture_output=True,
                              env=self._env, timeout=HANG_S)
        assert done.returncode == 0, done.stderr
        return done.stdout

    @property
    def screen(self) -> str:
        return self._tmux("capture-pane", "-p")

    def keys(self, *names: str) -> None:
        """`Enter`, `Escape`, `Down`, or text."""
        self._tmux("send-keys", *names)

    def wait_for(self, *texts: str) -> None:
        try:
            wait_until(lambda: all(text in self.screen for text in texts))
        except AssertionError:
            raise AssertionError(f"{texts} did not all appear:\n{self.screen}") from None

    def wait_without(self, text: str) -> None:
        wait_until(lambda: text not in self.screen)
