"""logs/vllm-server.pid of a checkout: which process is the daemon that scripts/start.sh started here.

Beside the pid it has the process's start time and the boot's id: a reused pid is never taken for the daemon.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from instances import processes
from instances.processes import Process


@dataclass(frozen=True)
class Started:
    """`arguments` of app.py, for a restart; `stops_within_s` by the settings that it was started with."""

    pid: int
    started_ticks: int
    boot_id: str
    arguments: tuple[str, ...]
    state_dir: str
    stops_within_s: float
    background: bool

    @classmethod
    def of(cls, pid: int, arguments: tuple[str, ...], state_dir: Path, stops_within_s: float, *,
           background: bool) -> Started:
        """Of a process that lives, or has ended and was not waited for yet."""
        process = processes.read_process(pid)
        return cls(pid, process.started_ticks if process else 0, processes.boot_id(), arguments, str(state_dir),
                   stops_within_s, background)

    def process(self) -> Process | None:
        """None once it has ended."""
        found = processes.read_process(self.pid)
        if found is None or found.zombie or self.boot_id != processes.boot_id():
            return None
        return found if found.started_ticks == self.started_ticks else None


def read(path: Path) -> Started | None:
    """None where there is none, or something else lies there."""
    try:
        fields = json.loads(path.read_bytes())
        return Started(**{**fields, "arguments": tuple(fields["arguments"]), "pid": int(fields["pid"])})
    except (OSError, ValueError, TypeError, KeyError):
        return None


def write(path: Path, started: Started) -> None:
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps(asdict(started), indent=1) + "\n")
    temporary.replace(path)
