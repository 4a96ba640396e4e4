"""Notices that files have changed, by looking: no signal from the system tells it reliably on every file system."""

from __future__ import annotations

from pathlib import Path

Look = tuple[tuple[int, int, int] | None, ...]


class FileWatch:
    """For one thread, but for `note`, which any may call.  A file that is not there is a state like others."""

    def __init__(self, *paths: Path) -> None:
        self._paths = paths
        self.note()

    def note(self) -> None:
        """What is there now counts as known: call it before reading the files."""
        self._known = self._last = self._look()

    def changed(self) -> bool:
        """Whether they differ from what is known and are as they were at the last call: nobody is writing any more.

        True once for each change.
        """
        now = self._look()
        settled = now == self._last
        self._last = now
        if not settled or now == self._known:
            return False
        self._known = now
        return True

    def _look(self) -> Look:
        return tuple(_signature(path) for path in self._paths)


def _signature(path: Path) -> tuple[int, int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino
