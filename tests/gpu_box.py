"""A box with GPUs: the daemon under the stand-in for NVML, simulated engines that take memory, and foreign holders."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pytest

from simulation.devices import DeviceFolder, Holding, NoMemory
from tests.daemon import Daemon
from tests.nvml import COMPILER, NO_COMPILER, library_folder
from tests.support import wait_until

GIB, MIB = 1 << 30, 1 << 20
RESERVED_BYTES = 512 * MIB          # what the driver of each of these GPUs keeps for itself

needs_compiler = pytest.mark.skipif(COMPILER is None, reason=NO_COMPILER)

__all__ = ["GIB", "MIB", "Foreign", "GpuBox", "NoMemory", "needs_compiler"]


class Foreign:
    """A process that is none of the daemon's and holds memory of a GPU, until `free`."""

    def __init__(self, folder: DeviceFolder, pid: int, devices: Sequence[int], gib: float, label: str) -> None:
        self._folder, self.pid = folder, pid
        self._devices, self._label = tuple(devices), label
        self.take(gib)

    def take(self, gib: float) -> None:
        """From now on it holds so much.  Raises NoMemory when that is not free."""
        self._folder.claim(Holding(self.pid, int(gib * GIB), self._devices, label=self._label, always=True))

    def free(self) -> None:
        self._folder.release([self.pid])


class GpuBox:
    """As a context manager it runs a daemon on GPUs of these sizes, in GiB as the driver tells them.

    At the end nothing may be left of the daemon (tests/daemon.py), and no device may ever have been over its memory.
    `config` becomes its config.yaml.  A GPU's memory without the driver's own part is `capacity_bytes`.
    """

    def __init__(self, folder: Path, gib: Sequence[float], env: Mapping[str, str] | None = None, *,
                 config: Mapping[str, Any] | None = None, patch: Mapping[str, object] | None = None) -> None:
        self.memory = DeviceFolder(folder / "memory")
        self.memory.path.mkdir(parents=True)
        self.uuids = [f"GPU-{os.urandom(4).hex()}-0000-0000-0000-{index:012d}" for index in range(len(gib))]
        self._sizes = [int(each * GIB) for each in gib]
        self._write("devices.json", json.dumps([
            {"index": index, "total_bytes": size, "reserved_bytes": RESERVED_BYTES, "uuid": self.uuids[index],
             "name": f"NVIDIA Simulated {size >> 30}GB"} for index, size in enumerate(self._sizes)]))
        self._pids = itertools.count(5_000_000)     # above any that the kernel gives out
        self.daemon = Daemon(folder / "daemon", {
            "SIMULATOR_MEMORY_DIR": str(self.memory.path), "LD_LIBRARY_PATH": str(library_folder()), **(env or {})},
            patch=patch)
        self._config = config

    def __enter__(self) -> Self:
        self.daemon.folder.mkdir(parents=True)
        if self._config is not None:
            self.write_config(self._config)
        self.daemon.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 traceback: TracebackType | None) -> None:
        self.daemon.__exit__(kind, error, traceback)
        if error is None:
            self.assert_never_over()
            wait_until(lambda: all(one.always for one in self.memory.holdings()), 30)      # it may be freed late

    # --- what happens to it ---------------------------------------------------------------------------------------

    def hold(self, device: int | Sequence[int], gib: float, label: str = "foreign") -> Foreign:
        """Somebody else takes memory there.  Raises NoMemory."""
        devices = [device] if isinstance(device, int) else device
        return Foreign(self.memory, next(self._pids), devices, gib, label)

    def driver(self, **settings: object) -> None:
        """How the driver behaves from now on (tests/nvml/nvml.c); without settings as it should."""
        self._write("driver", "".join(f"{name} {value}\n" for name, value in settings.items()))

    def write_config(self, config: Mapping[str, Any]) -> None:
        """config.yaml in the daemon's folder, whole at once; JSON is YAML."""
        path = self.daemon.folder / "config.yaml"
        draft = path.with_suffix(".draft")
        draft.write_text(json.dumps(config, indent=1))
        draft.replace(path)

    def _write(self, name: str, text: str) -> None:
        draft = self.memory.path / f"{name}.draft"
        draft.write_text(text)
        draft.replace(self.memory.path / name)

    # --- what is there --------------------------------------------------------------------------------------------

    def held(self, device: int) -> float:
        """GiB of that GPU that all processes together hold."""
        return self.memory.held().get(device, 0) / GIB

    def capacity(self, device: int) -> int:
        """Bytes that CUDA calls its total."""
        return self._sizes[device] - RESERVED_BYTES

    def gpus(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.daemon.get("/gpus").json["data"]
        return found

    def refused(self) -> list[str]:
        """Claims of engines and foreigners that found no room."""
        return self._lines("refused")

    def assert_never_over(self) -> None:
        assert self._lines("overcommitted") == []

    def _lines(self, name: str) -> list[str]:
        path = self.memory.path / name
        return path.read_text().splitlines() if path.exists() else []
