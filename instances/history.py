"""What every configuration took and how long it took, kept over restarts: STATE_DIR/history.json.

A configuration is a model with its flags on one kind of device (`key`).  Methods that note something only touch memory
and may be called anywhere; `save` writes the disk and is for a thread that holds no lock.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import statistics
import threading
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from instances.footprint import Measured

log = logging.getLogger("vllm_server.history")

VERSION = 1
MOST_ENTRIES = 1000
MOST_TIMES = 5                  # the median of so many last starts and wakes
MOST_BYTES = 16 << 20           # a larger file is none of ours
NOT_IN_KEY = frozenset({"hf_token", "served_model_name"})   # secrets and names: the engine is the same


@dataclass(frozen=True)
class Entry:
    """One configuration.  Bytes are those of the device that it takes the most of."""

    model: str
    peak_bytes: int | None = None               # the most it ever held
    kv_cache_bytes: int | None = None           # of that: its KV cache, as its log said
    filled: bool = False                        # it took a share, not what it needs (footprint.Measured)
    asleep_bytes: int | None = None             # what it held while it slept
    host_bytes: int | None = None               # and of the host's RAM
    start_s: tuple[float, ...] = ()             # the last cold starts, oldest first
    wake_s: tuple[float, ...] = ()              # the last wakes

    @property
    def reload_s(self) -> float | None:
        """What a cold start takes: the median of the last few."""
        return statistics.median(self.start_s) if self.start_s else None

    @property
    def median_wake_s(self) -> float | None:
        return statistics.median(self.wake_s) if self.wake_s else None

    @property
    def measured(self) -> Measured | None:
        if self.peak_bytes is None:
            return None
        return Measured(self.peak_bytes, self.kv_cache_bytes, self.filled)


def key(model: str, flags: Mapping[str, Any], *, device: str, env: Mapping[str, str] | None = None) -> str:
    """The name of a configuration.  `device` is the device's name (gpu.Device), `env` what is the model's own.

    `flags` are those that the user's layers give, before a plan adds its own.
    """
    own = {name: value for name, value in flags.items() if name not in NOT_IN_KEY}
    around = {name: value for name, value in (env or {}).items() if not name.endswith("TOKEN")}
    text = json.dumps([model, own, device, around], sort_keys=True, default=str)
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:24]


class History:
    """Thread-safe.  Entries that were noted longest ago are dropped beyond MOST_ENTRIES."""

    def __init__(self, path: Path) -> None:
        """Reads the file; one that cannot be read is set aside as `.unreadable`, and there is no history then."""
        self.path = path
        self._lock = threading.Lock()           # of the entries
        self._writing = threading.Lock()        # of the file: two writers would share the temporary one
        self._entries = _load(path)
        self._changed = False

    def get(self, name: str) -> Entry | None:
        with self._lock:
            return self._entries.get(name)

    def note_start(self, name: str, model: str, seconds: float) -> None:
        """A cold start, from the launch until it was ready.  Not for one that had to download."""
        self._note(name, model, lambda entry: replace(entry, start_s=(*entry.start_s, seconds)[-MOST_TIMES:]))

    def note_wake(self, name: str, model: str, seconds: float) -> None:
        self._note(name, model, lambda entry: replace(entry, wake_s=(*entry.wake_s, seconds)[-MOST_TIMES:]))

    def note_ready(self, name: str, model: str, bytes_per_device: int | None, *, kv_cache_bytes: int | None,
                   filled: bool) -> None:
        """What it took, once it was ready: by the devices, or by the sum that its log tells if that is more.

        `filled`: it was not told the size of its KV cache, so that it took all of its share.  With another KV cache
        than before the peak begins anew.  None bytes: nobody can tell, the old figures stay.
        """
        def change(entry: Entry) -> Entry:
            same = (entry.kv_cache_bytes, entry.filled) == (kv_cache_bytes, filled)
            peak = max(entry.peak_bytes or 0, bytes_per_device or 0) if same else bytes_per_device
            return replace(entry, peak_bytes=peak, kv_cache_bytes=kv_cache_bytes, filled=filled)

        if bytes_per_device is not None:
            self._note(name, model, change)

    def note_memory(self, name: str, model: str, bytes_per_device: int) -> None:
        """What it holds now, measured while it serves: the peak counts."""
        self._note(name, model, lambda entry: replace(entry, peak_bytes=max(entry.peak_bytes or 0, bytes_per_device)))

    def note_sleep(self, name: str, model: str, asleep_bytes: int, host_bytes: int | None) -> None:
        """What it holds while it sleeps, of a device and of the host's RAM."""
        self._note(name, model, lambda entry: replace(entry, asleep_bytes=asleep_bytes, host_bytes=host_bytes))

    def _note(self, name: str, model: str, change: Callable[[Entry], Entry]) -> None:
        with self._lock:
            old = self._entries.pop(name, None)
            new = self._entries[name] = change(old or Entry(model))         # the last noted is the last in order
            self._changed = self._changed or new != old
            while len(self._entries) > MOST_ENTRIES:
                del self._entries[next(iter(self._entries))]

    def save(self) -> None:
        """Write, fsync, rename, if something changed.  Blocks on the disk; an error is logged and it is tried again."""
        with self._writing:
            with self._lock:
                if not self._changed:
                    return
                self._changed = False
                entries = dict(self._entries)
            try:
                _write(self.path, entries)
            except OSError as error:
                self._changed = True
                log.error("the history of footprints and times cannot be written to %s: %s", self.path, error)


def _write(path: Path, entries: Mapping[str, Entry]) -> None:
    temporary = path.with_suffix(".tmp")
    text = json.dumps({"version": VERSION, "entries": {name: asdict(entry) for name, entry in entries.items()}})
    try:
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def _load(path: Path) -> dict[str, Entry]:
    try:
        if path.stat().st_size > MOST_BYTES:
            raise ValueError("it is too large")
        data = json.loads(path.read_bytes())
        if data["version"] != VERSION:
            raise ValueError(f"it is of version {data['version']}")
        entries = [(str(name), _entry(value)) for name, value in data["entries"].items()]
        return dict(entries[-MOST_ENTRIES:])
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError) as error:
        log.error("the history %s cannot be read (%r); it is set aside, footprints will be estimated anew", path, error)
        with contextlib.suppress(OSError):
            path.replace(path.with_suffix(".unreadable"))
        return {}


def _entry(data: Mapping[str, Any]) -> Entry:
    """Raises KeyError, TypeError or ValueError for anything but a whole entry."""
    if not isinstance(data["model"], str) or not isinstance(data["filled"], bool):
        raise TypeError("an entry has no model")
    peak, cache, asleep, host = (
        _bytes(data[name]) for name in ("peak_bytes", "kv_cache_bytes", "asleep_bytes", "host_bytes"))
    starts, wakes = (tuple(map(_seconds, data[name]))[-MOST_TIMES:] for name in ("start_s", "wake_s"))
    return Entry(data["model"], peak, cache, data["filled"], asleep, host, starts, wakes)


def _bytes(value: Any) -> int | None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
        raise TypeError(f"{value!r} is no number of bytes")
    return value


def _seconds(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
        raise TypeError(f"{value!r} is no time")
    return float(value)
