"""The command `vllm-server` as a process: with pipes as scripts use it, or on a terminal of its own as people do."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.daemon import CHECKOUT, HANG_S, Daemon

ARGV = (sys.executable, "-W", "error", "-m", "vllm_server_client")


def environment(daemon: Daemon | None, **more: str) -> dict[str, str]:
    """What the command sees: little, and the daemon's address."""
    address = {} if daemon is None else {"VLLM_SERVER_URL": f"http://127.0.0.1:{daemon.port}"}
    return {"PATH": os.environ["PATH"], "PYTHONPATH": str(CHECKOUT / "client"), "TERM": "xterm-256color",
            "LANG": "C.UTF-8", **address, **more}


@dataclass(frozen=True)
class Done:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    @property
    def error(self) -> dict[str, Any]:
        """The envelope on stderr."""
        found: dict[str, Any] = json.loads(self.err)["error"]
        return found


def vllm_server(daemon: Daemon | None, *words: str, stdin: str = "", env: Mapping[str, str] | None = None,
                cwd: Path | None = None) -> Done:
    done = subprocess.run([*ARGV, *words], env=environment(daemon, **(env or {})), input=stdin, text=True, cwd=cwd,
                          capture_output=True, timeout=HANG_S)
    assert "Traceback" not in done.stderr, done.stderr
    return Done(done.returncode, done.stdout, done.stderr)


class OnTerminal:
    """The command on a pseudo terminal; `screen` is all that it has written there."""

    def __init__(self, daemon: Daemon | None, *words: str, columns: int = 80, rows: int = 24, **env: str) -> None:
        self._master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        self._process = subprocess.Popen([*ARGV, *words], stdin=slave, stdout=slave, stderr=slave, close_fds=True,
                                         env=environment(daemon, **env), start_new_session=True,
                                         preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0))
        os.close(slave)
        self.screen = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 traceback: TracebackType | None) -> None:
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGKILL)
        self._process.wait(HANG_S)
        os.close(self._master)

    @property
    def text(self) -> str:
        """The screen's words, without colours and movements."""
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|\r", "", self.screen)

    def type(self, keys: str) -> None:
        os.write(self._master, keys.encode())

    def wait_for(self, words: str) -> None:
        """Until they have been written since the last call's words."""
        start = getattr(self, "_seen", 0)
        deadline = time.monotonic() + HANG_S
        while words not in self.text[start:]:
            assert self._read(deadline), f"{words!r} never came:\n{self.text}"
        self._seen = self.text.index(words, start) + len(words)

    def wait(self, guard_s: float = HANG_S) -> int:
        """Its exit code, everything being read."""
        deadline = time.monotonic() + guard_s
        while self._read(deadline):
            pass
        return self._process.wait(HANG_S)

    def _read(self, deadline: float) -> bool:
        """Whether something came; False at the end."""
        readable, _, _ = select.select([self._master], [], [], max(0.0, deadline - time.monotonic()))
        if not readable:
            return False
        with contextlib.suppress(OSError):      # the other side is closed
            if piece := os.read(self._master, 1 << 16):
                self.screen += piece.decode(errors="replace")
                return True
        return False
