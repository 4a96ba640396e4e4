"""A copy of the checkout as a stranger has it after a clone and scripts/install.sh, and its scripts run in it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import requests

from instances import processes
from instances.launcher import Launcher
from instances.store import StateDir
from scripts import pid_file
from tests.daemon import CHECKOUT, HANG_S
from tests.support import claim_ports

LEFT_OUT = (".git", ".venv", "__pycache__", "*.pyc", ".*_cache", ".hypothesis", ".env", "build", "logs", "state",
            "node_modules", "*.egg-info")


@dataclass(frozen=True)
class Ran:
    code: int
    out: str
    err: str


def copy_tree(folder: Path) -> Path:
    """What git has of the checkout, or would."""
    shutil.copytree(CHECKOUT, folder, ignore=shutil.ignore_patterns(*LEFT_OUT))
    for path in ("config.yaml", "configs", "servers.toml", "vllm_config.json"):     # what its owner wrote
        if (folder / path).is_dir():
            shutil.rmtree(folder / path)
        (folder / path).unlink(missing_ok=True)
    return folder


class Checkout:
    """Installed with this Python's libraries and set up for the simulated engine; whatever it started ends with it."""

    def __init__(self, folder: Path, env: Mapping[str, str] | None = None) -> None:
        self.home = folder
        self.path = copy_tree(folder / "checkout")
        self.state = folder / "state"
        (self.path / ".venv").symlink_to(sys.prefix)
        self._claim, base_port = claim_ports()
        self.env = {"PATH": os.environ["PATH"], "HOME": str(folder), "LANG": "C.UTF-8",
                    "PYTHONDONTWRITEBYTECODE": "1"}
        settings = {"APP_HOST": "127.0.0.1", "APP_PORT": "0", "STATE_DIR": self.state, "VLLM_BASE_PORT": base_port,
                    "VLLM_COMMAND": f"'{sys.executable} {self.path / 'simulator.py'}'",
                    "VLLM_DEFAULT_TRUST_REMOTE_CODE": "false", **(env or {})}
        (self.path / ".env").write_text("".join(f"{name}={value}\n" for name, value in settings.items()))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 traceback: TracebackType | None) -> None:
        self.script("stop", "-f")
        if (self.state / "instances").exists():     # engines that KEEP_INSTANCES has left
            for record in StateDir(self.state).load().records:
                Launcher().end_remains(record.id, record.engine)
        self._claim.close()

    @property
    def pid_file(self) -> Path:
        return self.path / "logs" / "vllm-server.pid"

    @property
    def pid(self) -> int:
        """Of the daemon that is written there, alive or not."""
        started = pid_file.read(self.pid_file)
        assert started is not None
        return started.pid

    def popen(self, name: str, *words: str, cwd: Path | None = None) -> subprocess.Popen[str]:
        return subprocess.Popen([str(self.path / "scripts" / f"{name}.sh"), *words], cwd=cwd or self.home, text=True,
                                env=self.env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                stderr=subprocess.PIPE)

    def python(self, program: Path, *words: str, url: str) -> Ran:
        """A program of the checkout that talks to a daemon."""
        done = subprocess.run([sys.executable, str(program), *words], text=True, capture_output=True, timeout=HANG_S,
                              env={**self.env, "VLLM_SERVER_URL": url})
        return Ran(done.returncode, done.stdout, done.stderr)

    def script(self, name: str, *words: str, cwd: Path | None = None) -> Ran:
        with self.popen(name, *words, cwd=cwd) as process:
            out, err = process.communicate(timeout=HANG_S)
        assert "Traceback" not in err, err
        return Ran(process.returncode, out, err)


def url_of(said: str) -> str:
    return re.search(r"http://[\w.]+:\d+", said)[0]  # type: ignore[index]


def create(url: str) -> dict[str, Any]:
    answer = requests.post(f"{url}/instances", json={"model_name": "m", "wait": True}, timeout=HANG_S)
    assert answer.status_code == 201, answer.text
    made: dict[str, Any] = answer.json()
    return made


def alive(pid: int) -> bool:
    process = processes.read_process(pid)
    return process is not None and not process.zombie
