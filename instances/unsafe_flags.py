"""Flags of `vllm serve` that name files of this machine or code to run: from configuration only.  Pure.

Whoever may create instances may not, by that alone, read and write files as the daemon's user or run code of their
choice.  This is the one list, from vLLM 0.32's command line.  What a model itself brings along is another matter:
`model_name`, `tokenizer` and the like may name any model, and `trust_remote_code` says whether its code may run.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from errors import Forbidden
from instances.flags import merge_flags

_MODULE = r"[^\W\d]\w*(\.[^\W\d]\w*)+"        # package.Class, as opposed to the name or folder of a model
_CODE = "it names Python code that the engine imports"
_READS = "it names a file that the engine reads"
_WRITES = "it names a place where the engine writes"
_SENDS = "it names an address that the engine sends data to"

UNSAFE_FLAGS: Mapping[str, str] = {
    "allowed_local_media_path": "requests could then read every file below that folder",
    "chat_template": _READS + ", whose text requests get to see",
    "collect_detailed_traces": _SENDS,
    "download_dir": _WRITES,
    "ec_manager_config": _CODE, "ec_transfer_config": _CODE,
    "io_processor_plugin": _CODE,
    "kv_events_config": _SENDS, "kv_transfer_config": _CODE,
    "log_config_file": _WRITES, "logging_config": _WRITES,
    "logits_processors": _CODE,
    "lora_modules": _READS,
    "middleware": _CODE,
    "mm_encoder_fp8_scale_path": _READS, "mm_encoder_fp8_scale_save_path": _WRITES,
    "model_class_overrides": _CODE,
    "otlp_traces_endpoint": _SENDS,
    "profiler_config": _WRITES,
    "reasoning_parser_plugin": _CODE,
    "scheduler_cls": _CODE,
    "tool_parser_plugin": _CODE,
    "trust_remote_code": "it lets a model run Python code that it brings along, and is turned off here",
    "trust_request_chat_template": "requests could then bring templates of their own",
    "weight_transfer_config": _SENDS,
    "worker_cls": _CODE, "worker_extension_cls": _CODE,
}
UNSAFE_KEYS: Mapping[str, Mapping[str, str]] = {
    "speculative_config": {"method": r"custom_class", "model": _MODULE},
    "structured_outputs_config": {"reasoning_parser_plugin": r".+"},
}
"""Keys in a flag's JSON value that name code, with the values that do so."""
UNSAFE_VALUES: Mapping[str, str] = {"spec_method": r"custom_class", "spec_model": _MODULE}
"""Flags of which only some values name code."""


def check(params: Mapping[str, Any], configured: Mapping[str, Any], *, param: str) -> None:
    """Raises Forbidden for a param of a request that is unsafe and not what the configuration says anyway.

    `configured` are the flags that an instance would have without them.
    """
    already = merge_flags(configured)
    for name, value in merge_flags(params).items():
        if value is False or already.get(name) == value:
            continue
        if (found := next(_reasons(name, value), None)) is not None:
            raise Forbidden(
                f"{param}.{name} may not be set by a request: {found}. Set it in config.yaml or vllm_config.json, or "
                "allow such params with ALLOW_UNSAFE_PARAMS=true", param=f"{param}.{name}"[:128], code="unsafe_param")


def _reasons(name: str, value: Any) -> Iterator[str]:
    """Why this flag is unsafe.  The engine's parser takes any unambiguous beginning of a flag for the flag."""
    head, _, path = name.partition(".")
    yield from (why for flag, why in UNSAFE_FLAGS.items() if flag.startswith(head))
    yield from (_CODE for flag, pattern in UNSAFE_VALUES.items() if flag.startswith(head) and _is(value, pattern))
    for flag, keys in UNSAFE_KEYS.items():
        if not flag.startswith(head):
            continue
        if isinstance(value, str) and not path:
            yield "its JSON is given as text, which is not looked into; give it as an object"
        inner = {path.partition(".")[0]: value} if path else value if isinstance(value, Mapping) else {}
        yield from (_CODE for key, pattern in keys.items() if _is(inner.get(key), pattern))


def _is(value: Any, pattern: str) -> bool:
    return isinstance(value, str) and re.fullmatch(pattern, value.strip(), re.DOTALL) is not None
