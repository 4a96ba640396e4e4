"""Reads an engine's log for people: its last lines, and what comes after them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

BLOCK = 1 << 16
POLL_S = 0.2


def last_lines(path: Path, count: int) -> bytes:
    """The last `count` lines, read from the end; empty when there is no log yet."""
    return b"".join(_tail(path, count).lines)


def follow(path: Path, count: int, ended: Callable[[], bool]) -> Iterator[bytes]:
    """The last `count` lines, then every addition until `ended()`.  Starts anew where the file was cut or replaced.

    Blocks between additions; asks `ended` five times a second.
    """
    lines, position, identity = _tail(path, count)
    if lines:
        yield b"".join(lines)
    while True:
        last_round = ended()
        added, position, identity = _read_on(path, position, identity)
        if added:
            yield added
        elif last_round:
            return
        else:
            time.sleep(POLL_S)


class _Tail(NamedTuple):
    lines: list[bytes]
    end: int
    identity: int | None        # inode of the file that was read


def _tail(path: Path, count: int) -> _Tail:
    try:
        with open(path, "rb") as file:
            identity = os.fstat(file.fileno()).st_ino
            end = position = file.seek(0, 2)
            data = b""
            while position > 0 and data.count(b"\n") <= count:
                step = min(BLOCK, position)
                position -= step
                file.seek(position)
                data = file.read(step) + data
    except OSError:
        return _Tail([], 0, None)
    # Not splitlines(): the carriage returns of a progress bar end no line.
    *lines, unfinished = data.split(b"\n")
    whole = [line + b"\n" for line in lines] + ([unfinished] if unfinished else [])
    return _Tail(whole[-count:] if count else [], end, identity)


def _read_on(path: Path, position: int, identity: int | None) -> tuple[bytes, int, int | None]:
    """What stands there now, up to a block, and how to go on.

    What the file is and what stands in it are asked of one descriptor: the path may name another file in between.
    """
    try:
        with open(path, "rb") as file:
            status = os.fstat(file.fileno())
            if status.st_ino != identity or status.st_size < position:
                position = 0
            file.seek(position)
            added = file.read(BLOCK)
            return added, position + len(added), status.st_ino
    except OSError:
        return b"", 0, None
