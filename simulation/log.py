"""Lines as vLLM writes them: its log on stdout, progress bars and uvicorn's on stderr.

A reader that is gone is no error: a server goes on serving when nobody reads its log.
"""

from __future__ import annotations

import contextlib
import os
import time


def log(process: str, message: str, *, where: str, level: str = "INFO", pid: int | None = None) -> None:
    """One record of vLLM's log; each further line of `message` repeats the prefix after a carriage return."""
    prefix = f"({process} pid={pid or os.getpid()}) {level} {time.strftime('%m-%d %H:%M:%S')} [{where}] "
    out(prefix + message.replace("\n", "\r\n" + prefix))


def out(text: str) -> None:
    _write(1, text + "\n")


def err(text: str, end: str = "\n") -> None:
    _write(2, text + end)


def _write(descriptor: int, text: str) -> None:
    data = text.encode()
    with contextlib.suppress(OSError):
        while data:
            data = data[os.write(descriptor, data):]

