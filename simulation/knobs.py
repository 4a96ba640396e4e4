"""What makes a simulated server slow, broken or big: the knobs, read from the command line and the environment.

A knob `x` is `--additional-config '{"sim": {"x": …}}'` (or `--additional-config.sim.x …`) for one instance, else the
environment variable `SIMULATOR_X` for all, else its default.  With VLLM_SERVER_DEV_MODE=1 `POST /sim {"x": …}`
changes it while the server runs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

FAILURES = frozenset({
    "bad_flag", "port_in_use", "bad_local_path", "offline", "model_not_found", "gated", "unsupported_architecture",
    "bad_config_transformers", "length_too_large", "no_weights", "kv_cache_too_small", "gpu_too_full",
    "out_of_memory", "profiling_memory", "sleep_mode_unsupported", "engine_error"})


class KnobError(ValueError):
    """A knob that does not exist or has a value of the wrong type."""


@dataclass(frozen=True)
class Knobs:
    start_s: float = 0.0                # from the exec to the first 200 of /health, spread over the loading phases
    tokens_per_s: float = 200.0         # of each stream; 0 for as fast as it goes
    first_token_s: float = 0.0          # from the request's admission to its first token
    prefill_tokens_per_s: float = 0.0   # of all prompts together, one after the other; 0: at once
    prefix_cache_tokens: int = 0        # of prompts that need not be computed again; 0: there is no cache
    tokens: int = 16                    # of an answer whose request names no maximum
    device: str = "cuda"                # "cpu": one Worker with -tp 1, and --enable-sleep-mode refused
    memory_mb: float | None = None      # taken of each device, whatever the flags say; None: as vLLM does (memory.py)
    weights_mb: float | None = None     # of the whole model; None: its files' size where its folder is given, else 0
    overhead_mb: float = 1024.0         # on each device besides weights and cache: CUDA, activations, graphs
    kv_bytes_per_token: float | None = None     # of all ranks; None: by config.json where the folder is given, else 0
    profiles: bool = True               # the cache is measured, which fails when others free memory meanwhile
    sleep_keeps_mb: float | None = None     # of each device while it sleeps; None: overhead_mb
    sleep_s: float = 0.0                # that falling asleep takes
    wake_s: float = 0.0                 # that waking takes
    wake_fails: bool = False            # it answers 500 to a wake
    shm_bytes: int = 65536              # of the engine's psm_* block
    fail: str = ""                      # one of FAILURES: the start fails so
    fail_after_s: float | None = None   # when; None: start_s
    fail_times: int | None = None       # only the first n starts fail, counted in the file `fail_counter`
    fail_counter: str = ""
    ignore_term_in_flight: bool = True  # SIGTERM with a request in flight hangs the server for ever, as vLLM's does
    engine_death_exit_s: float | None = None    # from the engine's death to the exit; None: 0.7 in flight, 5 idle
    hang: bool = False                  # inference requests get no answer, /health does
    health_hang: bool = False           # /health gets no answer
    answer_status: int = 0              # inference requests are answered with this status, 500 say
    die_after_chunks: int | None = None         # the API server is killed after n tokens of any one request
    die_engine_after_chunks: int | None = None  # the EngineCore is

    def changed(self, values: Mapping[str, Any]) -> Knobs:
        """These knobs with `values` in place.  Raises KnobError."""
        return dataclasses.replace(self, **{name: _typed(name, value) for name, value in values.items()})


_KINDS: dict[str, str] = {field.name: str(field.type) for field in dataclasses.fields(Knobs)}


def load_knobs(additional_config: Mapping[str, Any], environ: Mapping[str, str]) -> Knobs:
    """Raises KnobError for an unknown or badly typed knob."""
    from_environment = {name: value for name in _KINDS if (value := environ.get(f"SIMULATOR_{name.upper()}"))}
    return Knobs().changed(from_environment).changed(additional_config.get("sim", {}))


def _typed(name: str, value: Any) -> Any:
    kind = _KINDS.get(name)
    if kind is None:
        raise KnobError(f"the simulator has no knob {name!r}; it has {', '.join(_KINDS)}")
    if value is None and "None" in kind:
        return None
    try:
        converted = _CONVERT[kind.split(" ")[0]](value)
    except (KeyError, TypeError, ValueError):
        raise KnobError(f"knob {name!r} wants {kind}, not {value!r}") from None
    if name == "fail" and converted and converted not in FAILURES:
        raise KnobError(f"knob 'fail' knows no {converted!r}; it knows {', '.join(sorted(FAILURES))}")
    return converted


_CONVERT: dict[str, Any] = {
    "str": str, "float": float, "int": int,
    "bool": lambda value: {"true": True, "1": True, "false": False, "0": False}[str(value).lower()]}
