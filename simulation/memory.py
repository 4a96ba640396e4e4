"""The device memory that a simulated server claims, as files that a stand-in for NVML reads.

In the folder SIMULATOR_MEMORY_DIR (nothing is written without it) each process that holds memory has a file
`<pid>.json`, `{"pid", "memory_bytes", "devices"}`, with the bytes on each of its devices; a file whose process is
gone counts for nothing.  `devices.json` there, `[{"index", "total_bytes"}]`, gives the devices their sizes.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

from simulation.flags import Options
from simulation.knobs import Knobs

GIB = 1 << 30


class Ledger:
    """What this server's processes hold.  All methods do nothing when no folder is given."""

    def __init__(self, options: Options, knobs: Knobs) -> None:
        folder = os.environ.get("SIMULATOR_MEMORY_DIR")
        self._folder = Path(folder) if folder else None
        self._utilization = options.gpu_memory_utilization
        self._knobs = knobs
        self._ranks = options.tensor_parallel_size * options.pipeline_parallel_size * options.data_parallel_size
        self._paths: list[Path] = []
        self._totals = self._read_totals()

    def devices(self) -> list[int]:
        """The device of each rank, as CUDA_VISIBLE_DEVICES gives them."""
        visible = [int(word) for word in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if word.isdigit()]
        return [visible[rank] if rank < len(visible) else rank for rank in range(self._ranks)]

    def too_full(self) -> str | None:
        """vLLM's sentence when a device has less free memory than it would take, else None."""
        for number, device in enumerate(self.devices()):
            total = self._totals.get(device)
            if total is None:
                continue
            free, wanted = total - self._held(device), math.ceil(total * self._utilization)
            if free < wanted:
                return too_full_text(number, free, total, self._utilization)
        return None

    def claim(self, pids: list[int], share: float = 1.0) -> None:
        """Writes the files: the n-th pid holds `share` of what one rank claims, on the n-th device."""
        if self._folder is None:
            return
        self._paths = []
        for pid, device in zip(pids, self.devices(), strict=False):
            path = self._folder / f"{pid}.json"
            whole = self._claimed_bytes(device)
            text = json.dumps({"pid": pid, "memory_bytes": int(whole * share), "devices": [device]})
            draft = path.with_suffix(".tmp")
            draft.write_text(text)
            draft.replace(path)
            self._paths.append(path)

    def release(self) -> None:
        for path in self._paths:
            path.unlink(missing_ok=True)

    def _claimed_bytes(self, device: int) -> int:
        if self._knobs.memory_mb is not None:
            return int(self._knobs.memory_mb * (1 << 20))
        return math.ceil(self._totals.get(device, 0) * self._utilization)

    def _read_totals(self) -> dict[int, int]:
        if self._folder is None or not (self._folder / "devices.json").exists():
            return {}
        devices = json.loads((self._folder / "devices.json").read_text())
        return {device["index"]: device["total_bytes"] for device in devices}

    def _held(self, device: int) -> int:
        assert self._folder is not None
        held = 0
        for path in self._folder.glob("[0-9]*.json"):
            try:
                entry = json.loads(path.read_text())
            except (OSError, ValueError):
                continue                # it ended meanwhile
            if device in entry["devices"] and Path(f"/proc/{entry['pid']}").exists():
                held += entry["memory_bytes"]
        return held


def too_full_text(device: int, free: float, total: float, utilization: float) -> str:
    return (f"Free memory on device cuda:{device} ({free / GIB:.2f}/{total / GIB:.2f} GiB) on startup is less than "
            f"desired GPU memory utilization ({utilization}, {math.ceil(total * utilization) / GIB:.2f} GiB). Decrease "
            "GPU memory utilization or reduce GPU memory used by other processes.")
