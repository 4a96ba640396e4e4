"""The device memory that a simulated server takes and gives back, when and as vLLM does.

In the folder SIMULATOR_MEMORY_DIR (nothing happens without it; devices.py tells its files).  Each rank of the engine
takes its share of its own device: what CUDA itself wants (`overhead_mb`), then its part of the weights, then the KV
cache, which fills up what --gpu-memory-utilization allows, or is as big as --kv-cache-memory-bytes says.  A claim
that finds no room fails as vLLM's would.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from simulation.devices import DeviceFolder, Holding, NoMemory, visible_devices
from simulation.flags import Options
from simulation.knobs import Knobs

GIB, MIB = 1 << 30, 1 << 20


class MemoryFailure(Exception):
    """What the engine dies of: `error` is the exception's name in its log."""

    def __init__(self, error: str, message: str, also_logged: str = "") -> None:
        super().__init__(message)
        self.error, self.message, self.also_logged = error, message, also_logged


@dataclass(frozen=True)
class Share:
    """What one rank of the model wants of its device, in bytes; `whole` where all of it is given by a knob."""

    overhead: int
    weights: int
    kv_per_token: float
    whole: int | None


@dataclass
class Rank:
    """One process of the engine on its device, and what it holds there."""

    pid: int
    device: int
    number: int                     # what CUDA calls the device, in this process
    overhead: int = 0
    weights: int = 0
    cache: int = 0
    host: int = 0                   # weights that are kept in the host's memory while it sleeps
    free_at_start: int | None = None
    cache_bytes: int = 0            # what it takes when it is awake

    @property
    def held(self) -> int:
        return self.overhead + self.weights + self.cache


class Ledger:
    """What this server's processes hold.  All methods do nothing when no folder is given."""

    def __init__(self, options: Options, knobs: Knobs) -> None:
        path = os.environ.get("SIMULATOR_MEMORY_DIR")
        self._folder = DeviceFolder(Path(path)) if path else None
        self._options, self._knobs = options, knobs
        self._devices = self._folder.devices() if self._folder else {}
        self._parts = options.tensor_parallel_size * options.pipeline_parallel_size
        self._label = (os.environ.get("VLLM_PROCESS_NAME_PREFIX", "") + " " + options.served_model_names[0]).strip()
        self.share = share_of(options, knobs, self._parts)
        self.ranks: list[Rank] = []

    def devices(self) -> list[int]:
        """The device of each rank, as CUDA_VISIBLE_DEVICES gives them."""
        count = self._parts * self._options.data_parallel_size
        visible = visible_devices(os.environ.get("CUDA_VISIBLE_DEVICES", ""), self._devices)
        return [visible[rank] if rank < len(visible) else rank for rank in range(count)]

    # --- the start ------------------------------------------------------------------------------------------------

    def begin(self, pids: Sequence[int]) -> None:
        """The n-th pid is the n-th rank's; looks whether there is room, and takes what CUDA itself wants.

        Raises MemoryFailure when less than the utilization's share of a device is free, whatever else the flags say.
        """
        if self._folder is None:
            return
        self.ranks = [Rank(pid, device, number) for number, (pid, device) in
                      enumerate(zip(pids, self.devices(), strict=False))]
        free = self._folder.free()
        for rank in self.ranks:
            if rank.device not in self._devices:
                continue
            rank.free_at_start, total = free[rank.device], self._devices[rank.device].capacity_bytes
            if rank.free_at_start < (wanted := self._requested(rank)):
                text = too_full_text(rank.number, rank.free_at_start, total, self._options.gpu_memory_utilization)
                self._folder.note("refused", f"{self._label} pid {rank.pid}: {wanted} bytes of device {rank.device} on "
                                             f"startup, {rank.free_at_start} free")
                raise MemoryFailure("ValueError", text)

        def take(rank: Rank) -> None:
            rank.overhead = self.share.overhead if self.share.whole is None else 0
        self._change(take)

    def take_weights(self, part: float) -> None:
        """That part of the weights is loaded.  Raises MemoryFailure."""
        def take(rank: Rank) -> None:
            rank.weights = int(self.share.weights * part)
        self._change(take)

    def profile(self) -> None:
        """Finds out how big the KV cache gets.  Raises MemoryFailure when it got confused, or too little is left."""
        free = self._folder.free() if self._folder is not None and self._devices else {}
        for rank in self.ranks:
            rank.cache_bytes = self._cache_bytes(rank, free.get(rank.device))
        if self._devices and self.share.whole is None and self.ranks:
            self._check_length(min(rank.cache_bytes for rank in self.ranks))

    def take_cache(self) -> None:
        """Raises MemoryFailure."""
        def take(rank: Rank) -> None:
            rank.cache = rank.cache_bytes
        self._change(take)

    def start_figures(self) -> tuple[float, float, float]:
        """Free and total bytes of the first device at the start, made up where none is simulated; the utilization."""
        utilization = self._options.gpu_memory_utilization
        if self.ranks and self.ranks[0].free_at_start is not None:
            return self.ranks[0].free_at_start, self._devices[self.ranks[0].device].capacity_bytes, utilization
        return 78.5 * GIB, 79.11 * GIB, utilization

    def _requested(self, rank: Rank) -> int:
        return math.ceil(self._devices[rank.device].capacity_bytes * self._options.gpu_memory_utilization)

    def _cache_bytes(self, rank: Rank, free: int | None) -> int:
        if self.share.whole is not None:
            return self.share.whole - self.share.weights
        if self._options.kv_cache_memory_bytes:         # then vLLM measures nothing
            return self._options.kv_cache_memory_bytes
        if free is None or rank.free_at_start is None:  # a device of unknown size
            return 0
        consumed = rank.held
        if self._knobs.profiles:        # by the difference of what is free: others' changes are taken for its own
            consumed = rank.free_at_start - free
            if consumed < 0 and self._folder is not None:
                self._folder.note("refused", f"{self._label} pid {rank.pid}: {-consumed} bytes of device "
                                             f"{rank.device} were freed while it profiled")
                raise MemoryFailure("AssertionError", profiling_text(rank.free_at_start, free))
        return self._requested(rank) - consumed

    def _check_length(self, cache: int) -> None:
        per_token, length = self.share.kv_per_token, self._options.max_model_len
        if cache <= 0:
            self._refuse(f"{cache} bytes are left for the KV cache")
            raise MemoryFailure("ValueError", NO_CACHE_TEXT)
        if per_token and not self._options.fits_length and cache < per_token * length:
            self._refuse(f"{cache} bytes for the KV cache, {per_token * length:.0f} wanted")
            raise MemoryFailure("ValueError", too_long_text(length, per_token * length, cache, int(cache / per_token)))

    def _refuse(self, why: str) -> None:
        if self._folder is not None:
            self._folder.note("refused", f"{self._label}: {why}")

    # --- its life -------------------------------------------------------------------------------------------------

    def sleep(self, level: int, keeps_mb: float | None) -> None:
        """Gives back weights (level 1: into the host's memory) and cache; `keeps_mb` stays on each device.

        None: what CUDA itself wants.
        """
        def give(rank: Rank) -> None:
            rest = rank.overhead if keeps_mb is None else int(keeps_mb * MIB)
            if keeps_mb is None and self.share.whole is not None:
                rest = rank.held // 20
            rank.overhead, rank.weights, rank.cache = rest, 0, 0
            rank.host = self.share.weights if level == 1 else 0
        self._change(give)

    def wake(self, tags: Sequence[str] | None) -> None:
        """Takes it all again, or what `tags` name.  Raises MemoryFailure, and then holds what it held asleep."""
        def take(rank: Rank) -> None:
            if tags is None or "weights" in tags:
                rank.weights, rank.host = self.share.weights, 0
            if tags is None or "kv_cache" in tags:
                rank.cache = rank.cache_bytes
                rank.overhead = self.share.overhead if self.share.whole is None else 0
        self._change(take)

    def release(self) -> None:
        """All of its processes have ended."""
        if self._folder is not None:
            self._folder.release([rank.pid for rank in self.ranks])

    def _change(self, change: Callable[[Rank], None]) -> None:
        """All ranks, or none of them when one finds no room.  Raises MemoryFailure."""
        if self._folder is None:
            return
        before = [dict(vars(rank)) for rank in self.ranks]
        for rank in self.ranks:
            change(rank)
        try:
            self._folder.claim(*(Holding(rank.pid, rank.held, (rank.device,), rank.host, self._label)
                                 for rank in self.ranks))
        except NoMemory as error:
            for rank, values in zip(self.ranks, before, strict=True):
                vars(rank).update(values)
            number = next(rank.number for rank in self.ranks if rank.device == error.device)
            total = self._devices[error.device].capacity_bytes
            raise MemoryFailure(*out_of_memory(number, error.wanted_bytes, error.free_bytes, total)) from error


# --- what a model wants -------------------------------------------------------------------------------------------

def share_of(options: Options, knobs: Knobs, parts: int) -> Share:
    """By the knobs, else by the files of the model where its folder is given."""
    overhead = int(knobs.overhead_mb * MIB)
    weights = knobs.weights_mb * MIB if knobs.weights_mb is not None else _weights_on_disk(Path(options.model))
    per_token = knobs.kv_bytes_per_token
    if per_token is None:
        per_token = _kv_bytes_per_token(Path(options.model), options)
    if knobs.memory_mb is None:
        return Share(overhead, int(weights / parts), per_token / parts, None)
    whole = int(knobs.memory_mb * MIB)
    return Share(overhead, min(whole, int(weights / parts) or whole // 2), per_token / parts, whole)


def _weights_on_disk(model: Path) -> int:
    return sum(path.stat().st_size for path in model.glob("*.safetensors"))


def _kv_bytes_per_token(model: Path, options: Options) -> float:
    """Of all layers together: a key and a value for each head."""
    try:
        config = json.loads((model / "config.json").read_text())
        heads = config["num_attention_heads"]
        size = config.get("head_dim") or config["hidden_size"] // heads
        values = 2 * config["num_hidden_layers"] * config.get("num_key_value_heads", heads) * size
    except (OSError, ValueError, KeyError):
        return 0.0
    if str(options.given.get("kv_cache_dtype", "auto")).startswith("fp8"):
        return float(values)
    wide = options.given.get("dtype", config.get("torch_dtype") or config.get("dtype")) in ("float32", "float")
    return float(values) * (4 if wide else 2)


# --- its words ----------------------------------------------------------------------------------------------------

NO_CACHE_TEXT = ("No available memory for the cache blocks. Try increasing `gpu_memory_utilization` when initializing "
                 "the engine (this flag also controls CPU memory reservation on the CPU backend, despite its name). "
                 "See https://docs.vllm.ai/en/latest/configuration/conserving_memory/ for more details.")


def too_full_text(device: int, free: float, total: float, utilization: float) -> str:
    return (f"Free memory on device cuda:{device} ({free / GIB:.2f}/{total / GIB:.2f} GiB) on startup is less than "
            f"desired GPU memory utilization ({utilization}, {math.ceil(total * utilization) / GIB:.2f} GiB). Decrease "
            "GPU memory utilization or reduce GPU memory used by other processes.")


def profiling_text(before: float, after: float) -> str:
    return (f"Error in memory profiling. Initial free memory {before / GIB:.2f} GiB, current free memory "
            f"{after / GIB:.2f} GiB. This happens when other processes sharing the same container release GPU memory "
            "while vLLM is profiling during initialization. To fix this, ensure consistent GPU memory allocation or "
            "isolate vLLM in its own container.")


def too_long_text(length: int, needed: float, available: float, fits: int) -> str:
    return (f"To serve at least one request with the model's max seq len ({length}), ({needed / GIB:.2f} GiB KV cache "
            f"is needed, which is larger than the available KV cache memory ({available / GIB:.2f} GiB). Based on the "
            f"available memory, the estimated maximum model length is {fits}. Try increasing "
            "`gpu_memory_utilization` (which also controls CPU memory on the CPU backend) or decreasing "
            "`max_model_len` when initializing the engine. See "
            "https://docs.vllm.ai/en/latest/configuration/conserving_memory/ for more details.")


def out_of_memory(device: int, wanted: float, free: float, total: float) -> tuple[str, str, str]:
    """The exception's name, its message, and the ERROR record before it."""
    tried = f"CUDA out of memory. Tried to allocate {wanted / GIB:.2f} GiB."
    return ("torch.OutOfMemoryError",
            f"{tried} GPU {device} has a total capacity of {total / GIB:.2f} GiB of which {free / GIB:.2f} GiB is "
            f"free. Other processes have {(total - free) / GIB:.2f} GiB memory in use.",
            "Failed to load model - not enough GPU memory. Try lowering --gpu-memory-utilization to free memory for "
            "weights, increasing --tensor-parallel-size, or using --quantization. See "
            "https://docs.vllm.ai/en/latest/configuration/conserving_memory/ for more tips. (original error: "
            f"{tried})")
