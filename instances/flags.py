"""Flags of `vllm serve` as values: checked, merged, and turned into an argv.  Pure.

A flag's name is kept in one spelling: long, with underscores (`tp`, `tensor-parallel-size` and
`tensor_parallel_size` are one flag).  A value is a string, a number, a bool, a list, a dict (JSON for the engine),
or None, which takes the flag away from a weaker layer.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any

from errors import BadRequest, ConfigError

_LOOPBACK = "the daemon talks to its instances over plain HTTP on this machine"
RESERVED_FLAGS: Mapping[str, str] = {
    "host": "instances listen on 127.0.0.1 only",
    "port": "the daemon gives out the ports itself, from VLLM_BASE_PORT upward",
    "uds": "the daemon reaches its instances by port",
    "model": "model_name says which model it is",
    "model_tag": "model_name says which model it is",
    "api_key": "the daemon checks keys itself, see API_KEYS",
    "config": "put these flags into params or vllm_config.json",
    "headless": "an instance has to serve HTTP",
    "grpc": "an instance has to serve HTTP",
    "ssl_keyfile": _LOOPBACK, "ssl_certfile": _LOOPBACK, "ssl_ca_certs": _LOOPBACK, "ssl_cert_reqs": _LOOPBACK,
    "ssl_ciphers": _LOOPBACK, "enable_ssl_refresh": _LOOPBACK,
    "help": "the engine would print its help and exit",
    "version": "the engine would print its version and exit",
}
SHARED_RESERVED_FLAGS: Mapping[str, str] = {    # in what all instances share
    **RESERVED_FLAGS,
    "served_model_name": "every instance would claim the same name; give it with one model",
}
_LONG_NAMES = {
    "O": "optimization_level", "o": "optimization_level", "cc": "compilation_config", "sc": "speculative_config",
    "ac": "attention_config", "q": "quantization", "tp": "tensor_parallel_size", "pp": "pipeline_parallel_size",
    "dp": "data_parallel_size", "dpl": "data_parallel_size_local", "dpn": "data_parallel_rank",
    "dpr": "data_parallel_start_rank", "dpa": "data_parallel_address", "dpp": "data_parallel_rpc_port",
    "dpb": "data_parallel_backend", "dph": "data_parallel_hybrid_lb", "dpe": "data_parallel_external_lb",
    "dcp": "decode_context_parallel_size", "pcp": "prefill_context_parallel_size", "ep": "enable_expert_parallel",
    "asc": "api_server_count", "n": "nnodes", "r": "node_rank",
}
_STORE_TRUE_ONLY = frozenset({"disable_log_stats", "headless", "grpc"})    # they have no --no- form
_JSON_LISTS = frozenset({"allowed_origins", "allowed_methods", "allowed_headers"})
_REPEATED = frozenset({"middleware"})
_NAME = re.compile(r"[a-z0-9][a-z0-9_.-]{0,127}")
_NUMBER = re.compile(r"-(\d+|\d*\.\d+)")                   # as argparse tells a negative number from a flag
_LARGEST_VALUE_BYTES = 100_000                            # Linux refuses one argument of more than 128 KiB


class FlagError(ValueError):
    """A flag that cannot be passed on; `name` as the user wrote it."""

    def __init__(self, name: str, message: str) -> None:
        super().__init__(message)
        self.name = name


def check_params(params: Any, *, param: str) -> dict[str, Any]:
    """The flags of a request body in their one spelling; None stays, to take a default away.

    `param` is the field's name.  Raises BadRequest that names the flag.
    """
    if params is None:
        return {}
    if not isinstance(params, Mapping):
        raise BadRequest(f'{param} must be an object of vLLM flags, such as {{"max_model_len": 2048}}', param=param)
    try:
        return checked_flags(params, RESERVED_FLAGS)
    except FlagError as error:
        shown = f"{param}.{error.name[:128]}"
        raise BadRequest(f"{shown}: {error}", param=shown) from None


def checked_flags(flags: Mapping[str, Any], reserved: Mapping[str, str], *,
                  known: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The flags in their one spelling.  Raises FlagError; `known` are flags given beside them (none may come twice)."""
    checked: dict[str, Any] = {}
    for name, value in flags.items():
        _check_name(name, reserved)
        key, kept = _canonical(name, value)
        if key in checked or key in (known or {}):
            raise FlagError(name, f"{key} is given twice, under two spellings")
        _check_value(name, kept)
        checked[key] = kept
    return checked


def flags_from_json(text: str, path: str) -> dict[str, Any]:
    """The flags of vllm_config.json, an object.  Raises ConfigError with the file and the line."""
    def located(pattern: str, which: int = 0) -> str:
        """file:line of a match: the json module tells no lines for what it has parsed."""
        starts = [match.start() for match in re.finditer(pattern, text)]
        return f"{path}:{text.count(chr(10), 0, starts[which]) + 1 if len(starts) > which else 1}"

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        if twice := next((key for key in keys if keys.count(key) > 1), None):
            raise ConfigError(located(_key_pattern(twice), 1), f'"{twice}" is given twice')
        return dict(pairs)

    def refuse(constant: str) -> Any:
        raise ConfigError(located(rf"(?<!\w){constant}(?!\w)"), f"{constant} is not a JSON value")

    try:
        flags = json.loads(text, object_pairs_hook=unique, parse_constant=refuse)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}:{error.lineno}", f"column {error.colno}: {error.msg}") from None
    except (RecursionError, ValueError) as error:
        raise ConfigError(path, f"cannot be parsed: {error}") from None
    if not isinstance(flags, dict):
        raise ConfigError(f"{path}:1", 'expected an object of flags, such as {"max_model_len": 2048}')
    try:
        return checked_flags(flags, SHARED_RESERVED_FLAGS)
    except FlagError as error:
        raise ConfigError(located(_key_pattern(error.name)), f'"{error.name}": {error}') from None


def merge_flags(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """One set of flags: a later layer wins, None takes a flag away."""
    merged: dict[str, Any] = {}
    for layer in layers:
        merged |= dict(_canonical(name, value) for name, value in layer.items())
    return {name: value for name, value in merged.items() if value is not None}


def to_argv(flags: Mapping[str, Any]) -> list[str]:
    """The arguments after `vllm serve MODEL`, sorted by name, so that equal flags give equal command lines."""
    return [argument for name, value in sorted(merge_flags(flags).items()) for argument in _arguments(name, value)]


def _arguments(name: str, value: Any) -> list[str]:
    head, dot, path = name.partition(".")
    flag = "--" + head.replace("_", "-") + dot + path
    if isinstance(value, dict) or (dot and not isinstance(value, str)) or name in _JSON_LISTS:
        return _one(flag, value if isinstance(value, str) else _json(value))
    if isinstance(value, bool):
        if value:
            return [flag]
        return [] if name in _STORE_TRUE_ONLY else ["--no-" + flag.removeprefix("--")]
    if isinstance(value, list | tuple):
        items = [_json(item) if isinstance(item, dict) else str(item) for item in value]
        if name in _REPEATED:
            return [argument for item in items for argument in _one(flag, item)]
        return [flag, *items] if items else []
    return _one(flag, str(value))


def _one(flag: str, value: str) -> list[str]:
    return [f"{flag}={value}"] if value.startswith("-") else [flag, value]


def _json(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), allow_nan=False)


def _canonical(name: str, value: Any) -> tuple[str, Any]:
    """One spelling.  Only the part before the first dot is the flag's name; the rest is a path in its JSON value."""
    head, dot, path = name.partition(".")
    head = _LONG_NAMES.get(head, head).replace("-", "_")
    if head.startswith("no_") and not dot and (value is None or isinstance(value, bool)):
        return head.removeprefix("no_"), None if value is None else not value
    return head + dot + path, value


def _key_pattern(key: str) -> str:
    return rf'"{re.escape(key)}"\s*:'


def _check_name(name: Any, reserved: Mapping[str, str]) -> None:
    if not isinstance(name, str) or not (_NAME.fullmatch(name) or name in _LONG_NAMES):
        raise FlagError(str(name), "is not the name of a flag; write it in lower case, without leading dashes")
    head = _canonical(name.partition(".")[0], None)[0]
    if head in reserved:
        raise FlagError(name, f"cannot be set here: {reserved[head]}")
    # The engine's parser takes any unambiguous beginning of a flag for the flag.
    if meant := next((flag for flag in reserved if flag.startswith(head)), None):
        raise FlagError(name, f"would be read as {meant}, which cannot be set here: {reserved[meant]}")


def _check_value(name: str, value: Any) -> None:
    if isinstance(value, list):
        _check_list(name, value)
    elif isinstance(value, dict):
        _check_text(name, _checked_json(name, value))
    elif isinstance(value, str):
        _check_text(name, value)
    elif isinstance(value, float) and not math.isfinite(value):
        raise FlagError(name, "must be a finite number")
    elif value is not None and not isinstance(value, bool | int | float):
        raise FlagError(name, "must be a string, a number, a boolean, a list, an object or null")


def _check_list(name: str, values: list[Any]) -> None:
    if not values:
        raise FlagError(name, "must not be an empty list; null takes a flag away")
    for item in values:
        if isinstance(item, bool) or not isinstance(item, str | int | float | dict):
            raise FlagError(name, "may list strings, numbers and objects only")
        _check_value(name, item)
        # As an argument of its own it would be taken for another flag.
        if str(item).startswith("-") and not _NUMBER.fullmatch(str(item)):
            raise FlagError(name, "may not list a value that begins with '-'")
    _check_text(name, "".join(map(str, values)))


def _checked_json(name: str, value: dict[str, Any]) -> str:
    try:
        return _json(value)
    except (ValueError, TypeError, RecursionError):
        raise FlagError(name, "must hold JSON values only (finite numbers, not nested without end)") from None


def _check_text(name: str, text: str) -> None:
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        raise FlagError(name, "must be text that can be written as UTF-8") from None
    if "\0" in text:
        raise FlagError(name, "must not hold a NUL character")
    if size > _LARGEST_VALUE_BYTES:
        raise FlagError(name, f"is longer than {_LARGEST_VALUE_BYTES} bytes")
