"""The state on disk: one file an instance, written whole, and the lock that keeps a second daemon off it.

    STATE_DIR/lock                  flock of the running daemon
    STATE_DIR/instances/<id>.json   what is needed to find, adopt, restart or end it
    STATE_DIR/logs/<id>.log         the engine's output (log_file.py)
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from errors import ConfigError
from instances.instance import InstanceSpec, State
from instances.launcher import EngineRecord, wait_until

log = logging.getLogger("vllm_server.store")

T = TypeVar("T")
_ID = re.compile(r"[0-9a-f]{8,32}")


LOCK_WAIT_S = 2.0


def _try_lock(lock: int) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


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
    engine: EngineRecord | None
    asleep_level: int = 0
    memory_planned_bytes: int | None = None     # of each device
    because: str = ""
    grown: bool = False
    apart: bool = False


@dataclass(frozen=True)
class Found:
    """What an earlier daemon left: its records, oldest first, and the ids of those that cannot be read."""

    records: tuple[Record, ...]
    unreadable: tuple[str, ...]


class StateDir:
    """Blocks on the disk; never call it under the registry's lock.  Folders and files are the owner's alone."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.logs = path / "logs"
        self._instances = path / "instances"
        self._lock: int | None = None
        for folder in (path, self.logs, self._instances):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            with contextlib.suppress(OSError):      # one that somebody made for us: ours it is, but for us alone
                if folder.stat().st_mode & 0o077:
                    folder.chmod(0o700)

    def log_path(self, instance_id: str) -> Path:
        return self.logs / f"{instance_id}.log"

    def lock(self) -> None:
        """Take the folder for this daemon, as long as the process or a fork of it lives.

        Waits LOCK_WAIT_S seconds for one that was killed a moment ago; then raises ConfigError: another daemon has it.
        """
        lock = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        if not wait_until(lambda: _try_lock(lock), LOCK_WAIT_S):
            owner = os.read(lock, 32).decode(errors="replace").strip()
            os.close(lock)
            raise ConfigError("STATE_DIR", f"{self.path} is in use by another daemon (pid {owner or 'unknown'}); "
                                           "stop it or choose another STATE_DIR")
        self._lock = lock
        os.truncate(lock, 0)
        try:
            os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)
        except OSError as error:    # for people to read, no more: engines run, and somebody has to look after them
            log.warning("the pid cannot be written into %s: %s", self.path / "lock", error.strerror or error)

    def unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def save(self, record: Record) -> None:
        """Write, fsync, rename: a reader finds the old file or the new one.  Raises OSError (a full disk, say)."""
        path = self._file(record.id)
        temporary = path.with_suffix(".tmp")
        try:
            with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
                json.dump(asdict(record), file, indent=1)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except OSError:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise

    def remove(self, instance_id: str) -> None:
        """Raises OSError."""
        self._file(instance_id).unlink(missing_ok=True)

    def load(self) -> Found:
        """Every record.  One that cannot be read is set aside as `.unreadable` and reported."""
        records, unreadable = [], []
        for path in sorted(self._instances.glob("*.json")):
            try:
                record = _record(json.loads(path.read_bytes()))
                if record.id != path.stem:
                    raise ValueError(f"it is a record of {record.id}")
                records.append(record)
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError) as error:
                log.error("the record %s cannot be read (%r); it is set aside, and its engine ended", path, error)
                unreadable.append(path.stem)
                with contextlib.suppress(OSError):
                    path.replace(path.with_suffix(".unreadable"))
        for path in self._instances.glob("*.tmp"):      # of a daemon that died while it wrote
            with contextlib.suppress(OSError):
                path.unlink()
        return Found(tuple(sorted(records, key=lambda record: record.created_at)),
                     tuple(name for name in unreadable if _ID.fullmatch(name)))

    def _file(self, instance_id: str) -> Path:
        return self._instances / f"{instance_id}.json"


def _record(data: Mapping[str, Any]) -> Record:
    """Raises ValueError, KeyError, TypeError or AttributeError for anything but a whole record."""
    spec, engine = data["spec"], data["engine"]
    return Record(
        id=_text(data["id"], _ID), state=State(data["state"]), created_at=float(data["created_at"]),
        port=None if data["port"] is None else _whole(data["port"]), devices=tuple(map(_whole, data["devices"])),
        restarts=_whole(data["restarts"]),
        asleep_level=_whole(data.get("asleep_level", 0)), because=_text(data.get("because", "")), spec=_spec(spec),
        memory_planned_bytes=_optional(_whole, data.get("memory_planned_bytes")),
        grown=data.get("grown", False) is True, apart=data.get("apart", False) is True,
        engine=None if engine is None else EngineRecord(
            pid=_pid(engine["pid"]), started_ticks=_whole(engine["started_ticks"]),
            boot_id=_text(engine["boot_id"]), run_dir=_text(engine["run_dir"]),
            shared_memory=tuple(map(_text, engine["shared_memory"]))))


def _spec(data: Mapping[str, Any]) -> InstanceSpec:
    """What earlier versions did not write has its default."""
    gpus = data.get("gpus")
    return InstanceSpec(
        model=_text(data["model"]), names=tuple(map(_text, data["names"])), flags=dict(data["flags"].items()),
        params=dict(data["params"].items()), timeout_s=float(data["timeout_s"]),
        start_timeout_s=float(data["start_timeout_s"]), sleep_level=_whole(data.get("sleep_level", 0)),
        stop_after_s=_optional(float, data.get("stop_after_s")),
        env={_text(name): _text(value) for name, value in data.get("env", {}).items()},
        gpus=tuple(map(_whole, gpus)) if isinstance(gpus, list) else _optional(_whole, gpus),
        memory_bytes=_optional(_whole, data.get("memory_bytes")),
        param_count=_optional(float, data.get("param_count")), precision=_optional(_text, data.get("precision")),
        priority=_whole(data.get("priority", 0)), pinned=data.get("pinned", False) is True,
        config_id=_optional(_text, data.get("config_id")), hf_token=_optional(_text, data.get("hf_token")))


def _optional(read: Callable[[Any], T], value: Any) -> T | None:
    return None if value is None else read(value)


def _whole(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{value!r} is not a whole number")
    return value


def _pid(value: Any) -> int:
    if _whole(value) <= 1:
        raise ValueError(f"{value} is no engine's pid")
    return _whole(value)


def _text(value: Any, pattern: re.Pattern[str] | None = None) -> str:
    if not isinstance(value, str) or (pattern is not None and not pattern.fullmatch(value)):
        raise TypeError(f"{value!r} is not what stands there")
    return value
