"""Follows one start of one engine: its log, its download, and the time that it may still take."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from instances import downloads
from instances.instance import InstanceSpec, Problem
from instances.log_file import LogReader
from instances.startup_log import StartupLog

DOWNLOAD_LOOK_S = 2.0


class StartWatch:
    """`limit_s` seconds are granted from `now` on; while a download grows, the deadline moves on."""

    def __init__(self, spec: InstanceSpec, log_path: Path, environment: Mapping[str, str], now: float,
                 limit_s: float) -> None:
        self.reader = LogReader(log_path)
        self.phase = "starting"
        self._spec = spec
        self._log = StartupLog()
        self._download = downloads.DownloadWatch(
            downloads.cache_folder(spec.model, environment, spec.flags.get("download_dir")), now)
        self._looked_at, self._limit_s, self._deadline = now, limit_s, now + limit_s

    @property
    def progress(self) -> float | None:
        return self._log.progress

    @property
    def downloaded(self) -> bool:
        return self._download.downloaded_bytes > 0

    def look(self, now: float, log_bytes: int) -> None:
        """Read on; the log is kept within `log_bytes`."""
        self._log.feed(self.reader.read())
        self.reader.trim(log_bytes)
        if now - self._looked_at >= DOWNLOAD_LOOK_S:
            self._looked_at = now
            self._deadline += self._download.look(now)
        self.phase = "downloading" if self._download.growing(now) else self._log.phase

    def late(self, now: float) -> bool:
        return now >= self._deadline

    def lateness(self, *, permanent: bool) -> Problem:
        return Problem(
            "start_timeout", f"{self._spec.model} was not ready within {self._limit_s:g} s (it hung in phase "
            f"{self.phase}); its log tells more, and start_timeout in the request or START_TIMEOUT gives it longer",
            status=504, permanent=permanent)

    def cause(self, exit_code: int | None) -> Problem:
        """Why it died.  Reads the log to its end."""
        for piece in self.reader.read_rest():
            self._log.feed(piece)
        cause = self._log.cause(exit_code, self._spec.model)
        return Problem(cause.code, cause.message, cause.detail, cause.status, cause.permanent, cause.suggestion)

    def facts(self) -> dict[str, object]:
        """The figures that the log has told."""
        return {name: value for name, value in asdict(self._log.facts).items() if value is not None}
