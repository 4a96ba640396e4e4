"""The state on disk: one file an instance, written whole, and the lock that keeps a second daemon off it.

    STATE_DIR/lock                  flock of the running daemon
    STATE_DIR/instances/<id>.json   what is needed to find, adopt, restart or end it
    STATE_DIR/logs/<id>.log         the engine's output (launcher.py)
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from errors import ConfigError
from instances.instance import InstanceSpec, State
from instances.launcher import EngineRecord

log = logging.getLogger("vllm_server.store")


@dataclass(frozen=True)
class Record:
    """One instance as it stands on disk.  `engine` is None while no process runs for it."""

    id: str
    spec: InstanceSpec
    state: State
    created_at: float
    port: int | None
    devices: tuple[int, ...]
    restarts: int
    log_path: str
    engine: EngineRecord | None


class StateDir:
    """Blocks on the disk; never call it under the manager's lock.  Folders and files are the owner's alone."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.logs = path / "logs"
        self._instances = path / "instances"
        self._lock: int | None = None
        for folder in (path, self.logs, self._instances):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)

    def lock(self) -> None:
        """Take the folder for this daemon, as long as the process or a fork of it lives.

        Raises ConfigError when another daemon has it.
        """
        lock = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.read(lock, 32).decode(errors="replace").strip()
            os.close(lock)
            raise ConfigError("STATE_DIR", f"{self.path} is in use by another daemon (pid {owner or 'unknown'}); "
                                           "stop it or choose another STATE_DIR") from None
        os.truncate(lock, 0)
        os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)
        self._lock = lock

    def unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def save(self, record: Record) -> None:
        """Write, fsync, rename: a reader finds the old file or the new one.  Raises OSError (a full disk, say)."""
        data = asdict(record)
        data["spec"]["flags"], data["spec"]["params"] = dict(record.spec.flags), dict(record.spec.params)
        path = self._file(record.id)
        temporary = path.with_suffix(".tmp")
        try:
            with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
                json.dump(data, file, indent=1)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise

    def remove(self, instance_id: str) -> None:
        self._file(instance_id).unlink(missing_ok=True)

    def load(self) -> list[Record]:
        """Every record, oldest first.  One that cannot be read is set aside as `.unreadable` and reported."""
        found = []
        for path in self._instances.glob("*.json"):
            try:
                found.append(_record(json.loads(path.read_text())))
            except (ValueError, KeyError, TypeError, OSError) as error:
                log.error("the record %s cannot be read (%s); it is set aside", path, error)
                path.replace(path.with_suffix(".unreadable"))
        return sorted(found, key=lambda record: record.created_at)

    def _file(self, instance_id: str) -> Path:
        return self._instances / f"{instance_id}.json"


def _record(data: Mapping[str, Any]) -> Record:
    spec, engine = data["spec"], data["engine"]
    return Record(
        id=str(data["id"]), state=State(data["state"]), created_at=float(data["created_at"]), port=data["port"],
        devices=tuple(data["devices"]), restarts=int(data["restarts"]), log_path=str(data["log_path"]),
        spec=InstanceSpec(model=spec["model"], names=tuple(spec["names"]), flags=spec["flags"], params=spec["params"],
                          timeout_s=float(spec["timeout_s"]), start_timeout_s=float(spec["start_timeout_s"])),
        engine=EngineRecord(**engine) if engine is not None else None)
