"""The files that engines write their output to: opened, read as they grow, kept within a bound.

The engine writes by itself, through a descriptor that it was started with, so its log goes on when the daemon dies.
"""

from __future__ import annotations

import codecs
import contextlib
import logging
import os
from collections.abc import Collection, Iterator
from pathlib import Path

log = logging.getLogger("vllm_server.launcher")

KEEP_AFTER_TRIM = 4         # a log past its bound is cut down to a quarter of it
PIECE_BYTES = 1 << 20
TAIL_BYTES = 1 << 16


@contextlib.contextmanager
def open_log(path: Path) -> Iterator[int]:
    """The file that an engine writes to, empty; that of the start before is kept beside it as `.1`.

    Opened for appending, so that a trim by the daemon moves the writer's position too.  Raises OSError.
    """
    if path.exists():
        path.replace(previous_log(path))
    output = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC, 0o600)
    try:
        yield output
    finally:
        os.close(output)


def previous_log(path: Path) -> Path:
    return path.with_name(path.name + ".1")


def prune_logs(folder: Path, keep: int, in_use: Collection[Path]) -> None:
    """Delete the oldest logs of instances that are gone, so that the folder stays bounded."""
    spare = {path for log_path in in_use for path in (log_path, previous_log(log_path))}
    dated: list[tuple[float, Path]] = []
    with contextlib.suppress(OSError):
        for path in set(folder.iterdir()) - spare:
            with contextlib.suppress(OSError):      # another keeper prunes too
                dated.append((path.stat().st_mtime, path))
        for _, path in sorted(dated)[:max(0, len(dated) - keep)]:
            path.unlink(missing_ok=True)


def trim_log(path: Path, limit_bytes: int) -> bool:
    """Cut a log that grew past its bound down to its newest quarter.  True when it was cut.

    Copy and truncate, as the writer is another process that goes on; a line written in between may be lost.
    """
    try:
        size = path.stat().st_size
        if size <= limit_bytes:
            return False
        with open(path, "r+b") as file:
            file.seek(size - limit_bytes // KEEP_AFTER_TRIM)
            tail = file.read(limit_bytes)
            tail = tail[tail.find(b"\n") + 1:]
            file.truncate(0)
        with open(path, "ab") as file:
            file.write(tail)
    except OSError as error:
        log.warning("the log %s cannot be trimmed: %s", path, error)
        return False
    return True


def read_tail(path: Path, limit_bytes: int = TAIL_BYTES) -> str:
    """The end of a log; empty when there is none."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - limit_bytes))
            return file.read(limit_bytes).decode("utf-8", "replace")
    except OSError:
        return ""


class LogReader:
    """Reads what was added to a log since the last time.  Trims go through it, so that it never reads a line twice."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._position = 0
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")    # a read may cut a character in two

    def read(self) -> str:
        """At most PIECE_BYTES of what is new."""
        try:
            with open(self._path, "rb") as file:
                if file.seek(0, os.SEEK_END) < self._position:
                    self._position = 0      # cut by someone else: begin anew
                    self._decoder.reset()
                file.seek(self._position)
                data = file.read(PIECE_BYTES)
        except OSError:
            return ""
        self._position += len(data)
        return self._decoder.decode(data)

    def read_rest(self) -> Iterator[str]:
        """All that is new, piece by piece: for a log whose writer has ended."""
        while piece := self.read():
            yield piece

    def trim(self, limit_bytes: int) -> None:
        """Keep the file within its bound; what has not been read and is still there is read next."""
        with contextlib.suppress(OSError):
            unread = self._path.stat().st_size - self._position
            if trim_log(self._path, limit_bytes):
                self._position = max(0, self._path.stat().st_size - max(0, unread))
