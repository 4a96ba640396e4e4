"""Builds shim.c, once for all processes and outside the checkout, and turns its switches."""

from __future__ import annotations

import hashlib
import mmap
import os
import struct
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path

from tests.nvml import COMPILER, NO_COMPILER

SOURCE = Path(__file__).with_name("shim.c")
SWITCHES = {"disk_full": (0, "i"), "logs_full": (4, "i"), "slow_ms": (8, "i"), "no_process": (12, "i"),
            "clock_offset_s": (16, "q"), "refused_writes": (24, "i"), "refused_processes": (28, "i"),
            "slowed": (32, "i")}
BYTES = 40


def library() -> Path:
    """Needs COMPILER."""
    assert COMPILER is not None, NO_COMPILER
    name = hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / f"vllm-server-shim-{os.getuid()}-{name}"
    found = folder / "shim.so"
    if not found.exists():
        folder.mkdir(mode=0o700, exist_ok=True)
        draft = folder / f"{os.getpid()}.so"
        subprocess.run([COMPILER, "-shared", "-fPIC", "-O1", "-Wall", "-Wextra", "-Werror", "-o", draft, SOURCE,
                        "-ldl", "-lpthread"], check=True)
        draft.replace(found)
    return found


class Shim:
    """The switches of all processes that were started with `environment`."""

    def __init__(self, folder: Path, *, disk: Path, logs: list[Path]) -> None:
        path = folder / "shim"
        path.write_bytes(bytes(BYTES))
        with open(path, "r+b") as file:
            self._switches = mmap.mmap(file.fileno(), BYTES)
        self.environment: Mapping[str, str] = {
            "LD_PRELOAD": str(library()), "CHAOS_CONTROL": str(path), "CHAOS_DISK": f"{disk}/",
            "CHAOS_LOGS": ":".join(map(str, logs))}

    def set(self, name: str, value: int) -> None:
        at, kind = SWITCHES[name]
        struct.pack_into(f"={kind}", self._switches, at, value)

    def get(self, name: str) -> int:
        at, kind = SWITCHES[name]
        return int(struct.unpack_from(f"={kind}", self._switches, at)[0])

    def close(self) -> None:
        self._switches.close()
