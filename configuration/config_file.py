"""Reads config.yaml: its models, and its sections `gpu` and `proxy` as one more layer of the settings."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from configuration.keys import Key, checked, key_of_entry
from configuration.layers import Given, Layer
from configuration.models import Catalog, ModelConfig
from configuration.schema import Problem, path_text, problems
from configuration.settings_table import DEFAULT_FLAG, OURS, REFUSED
from configuration.text_file import read_text
from configuration.yaml_file import Document, read_yaml
from errors import ConfigError
from instances.flags import RESERVED_FLAGS, FlagError, checked_flags

FILE_NAMES = ("config.yaml", "configs/config.yaml")
"""Where it is looked for in the working directory, in this order."""

SECTIONS: Mapping[tuple[str, str], str] = {
    ("gpu", "gpu_id"): "GPU_ID", ("gpu", "reserved_memory_mb"): "RESERVED_MEMORY_MB",
    ("gpu", "memory_utilization"): "MEMORY_UTILIZATION", ("proxy", "host"): "APP_HOST", ("proxy", "port"): "APP_PORT",
    ("proxy", "idle_timeout_seconds"): "VLLM_DEFAULT_TIMEOUT", ("proxy", "api_key"): "API_KEYS"}
"""What each key of the sections sets."""

MORE_SHOWN = 5      # problems told beside the first one
MIB = 1 << 20
_DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
_QUANTIZED = frozenset({"fp8", "int8", "fp4", "int4", "awq", "gptq"})
_PARALLEL = ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size")
_RESERVED = {**RESERVED_FLAGS, "served_model_name": "the names are its key and its aliases"}
_ENGINE_ONLY = {**REFUSED, "CUDA_VISIBLE_DEVICES": "is set by the daemon: `gpus` says which",
                **dict.fromkeys(("VLLM_PROCESS_NAME_PREFIX", "VLLM_RPC_BASE_PATH", "PROMETHEUS_MULTIPROC_DIR",
                                 "TMPDIR"), "is set by the daemon")}


@dataclass(frozen=True)
class ConfigFile:
    """What a config.yaml says.  `document` is None when there is none."""

    catalog: Catalog = field(default_factory=Catalog)
    layer: Layer = field(default_factory=dict, repr=False)      # it may hold a key, and so may the document
    document: Document | None = field(default=None, repr=False)
    keys: tuple[Key, ...] = ()          # of `proxy.keys`: for inference
    admin_keys: tuple[Key, ...] = ()    # and for management

    def refuse(self, found: list[Problem]) -> None:
        """Raises ConfigError that tells all of these, unless there are none."""
        if found and self.document is not None:
            raise _config_error(self.document, found)


def config_paths(wanted: Path | None, cwd: Path) -> tuple[Path, ...]:
    """Where the file may be: `wanted` only, or the first of these."""
    return tuple(cwd / name for name in FILE_NAMES) if wanted is None else (cwd / wanted,)


def find_config_file(wanted: Path | None, cwd: Path) -> Path | None:
    """The file to read; None: there is none, and none was asked for."""
    return next((path for path in config_paths(wanted, cwd) if wanted is not None or path.is_file()), None)


def read_config_file(path: Path, home: Path) -> ConfigFile:
    """Raises ConfigError with file, line and key path of everything that is wrong."""
    return parse_config(read_text(path), str(path), home)


def parse_config(text: str, file: str, home: Path) -> ConfigFile:
    document = read_yaml(text, file)
    if found := problems(document):
        raise _config_error(document, found)
    entries = {id_: entry or {} for id_, entry in (document.value.get("models") or {}).items()}
    if found := [*_name_problems(entries), *_entry_problems(entries)]:
        raise _config_error(document, found)
    models = {id_: _model(id_, entry, document, home) for id_, entry in entries.items()}
    keys, admin_keys = _keys(document, home)
    return ConfigFile(Catalog(MappingProxyType(models)), _layer(document), document, keys, admin_keys)


def _config_error(document: Document, found: list[Problem]) -> ConfigError:
    ordered = sorted(found, key=lambda problem: document.line(problem[0]))
    told = [(document.where(path), f"{path_text(path)}: {message}".removeprefix(": ")) for path, message in ordered]
    more = [f"\n{where}: {message}" for where, message in told[1:1 + MORE_SHOWN]]
    rest = len(told) - 1 - len(more)
    return ConfigError(told[0][0], told[0][1] + "".join(more) + (f"\nand {rest} more" if rest else ""))


def _layer(document: Document) -> dict[str, Given]:
    found: dict[str, Given] = {}
    for (section, key), name in SECTIONS.items():
        value = (document.value.get(section) or {}).get(key)
        if value is not None:
            items = value if isinstance(value, list) else [value]
            found[name] = Given(",".join(map(_text, items)), document.where((section, key)))
    return found


def _keys(document: Document, home: Path) -> tuple[tuple[Key, ...], tuple[Key, ...]]:
    """Those for inference and those for management."""
    found: dict[bool, list[Key]] = {False: [], True: []}
    for index, entry in enumerate((document.value.get("proxy") or {}).get("keys") or ()):
        try:
            found[entry.get("admin", False)].append(key_of_entry(entry, home))
            checked([*found[False], *found[True]])
        except ValueError as error:
            raise _config_error(document, [(("proxy", "keys", index), str(error))]) from None
    return tuple(found[False]), tuple(found[True])


def _text(value: object) -> str:
    """A whole number may be written as 2048.0."""
    return str(_number(value)) if isinstance(value, float) else str(value)


def _number(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


# --- what a schema cannot say -----------------------------------------------------------------------------------------

def _name_problems(entries: Mapping[str, Mapping[str, Any]]) -> Iterator[Problem]:
    owner: dict[str, str] = {id_: id_ for id_ in entries}
    for id_, entry in entries.items():
        for index, alias in enumerate(entry.get("aliases", ())):
            if alias in owner:
                whose = "its own name" if owner[alias] == id_ else f"a name of {owner[alias]}"
                yield ("models", id_, "aliases", index), f"{alias} is {whose} already"
            owner.setdefault(alias, id_)


def _entry_problems(entries: Mapping[str, Mapping[str, Any]]) -> Iterator[Problem]:
    for id_, entry in entries.items():
        here = ("models", id_)
        params: dict[str, Any] = {}
        try:
            params = checked_flags(entry.get("params", {}), _RESERVED)
        except FlagError as error:
            yield (*here, "params", error.name), str(error)
        for key, message in (*_contradictions(entry, params), *_senseless(entry)):
            yield (*here, key), message
        for name, value in entry.get("env", {}).items():
            if why := _env_problem(name, str(value)):
                yield (*here, "env", name), why


def _contradictions(entry: Mapping[str, Any], params: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """A key beside the flag that it stands for."""
    for key, flag in (("max_model_len", "max_model_len"), ("precision", "dtype")):
        ours = _flag_of(key, entry)
        if flag in params and ours is not None and params[flag] != ours:
            yield key, f"says {ours}, and params.{flag} says {params[flag]}: leave one out"
    given = [flag for flag in _PARALLEL if flag in params]
    if "gpus" in entry and given:
        count, sizes = _gpu_count(entry["gpus"]), [_number(params[flag]) for flag in given]
        if not all(isinstance(size, int) for size in sizes) or math.prod(sizes) != count:
            product = " x ".join(map(str, sizes))
            yield "gpus", f"says {count}, and {' x '.join(given)} in params {product}: leave one out"


def _senseless(entry: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    if "stop_after_seconds" in entry and _sleep(entry) == 0:
        yield "stop_after_seconds", "it never sleeps: say sleep: 1 (or 2), or idle_timeout_seconds"
    replicas = _replicas(entry)
    if replicas[0] > replicas[1]:
        yield "replicas", f"min {replicas[0]} is more than max {replicas[1]}"


def _env_problem(name: str, value: str) -> str | None:
    if name in _ENGINE_ONLY:
        return _ENGINE_ONLY[name]
    if name in OURS or name.startswith(DEFAULT_FLAG):
        return "is a setting of the daemon and means nothing to an engine"
    try:
        return "holds a NUL character" if b"\0" in value.encode() else None
    except UnicodeEncodeError:
        return "is not text that can be written as UTF-8"


# --- one model ----------------------------------------------------------------------------------------------------

def _model(id_: str, entry: Mapping[str, Any], document: Document, home: Path) -> ModelConfig:
    here = ("models", id_)
    path = str(entry.get("model_path", id_))
    gpus = entry.get("gpus")
    memory_mb = entry.get("memory_mb")
    return ModelConfig(
        id=id_, model=str(home / path[2:]) if path.startswith("~/") else path,
        aliases=tuple(entry.get("aliases", ())), params=MappingProxyType(_params(entry)),
        env=MappingProxyType({name: document.places[(*here, "env", name)].text for name in entry.get("env", {})}),
        gpus=tuple(map(int, gpus)) if isinstance(gpus, list) else _number(gpus),
        memory_bytes=None if memory_mb is None else int(memory_mb * MIB), param_count=_float(entry, "param_count"),
        precision=entry.get("precision"), idle_timeout_s=_float(entry, "idle_timeout_seconds"),
        stop_after_s=_float(entry, "stop_after_seconds"), start_timeout_s=_float(entry, "start_timeout_seconds"),
        preload=entry.get("preload", False), pinned=entry.get("pinned", False),
        priority=int(entry.get("priority", 0)), sleep=_sleep(entry), replicas=_replicas(entry),
        hf_token=entry.get("api_key"))


def _params(entry: Mapping[str, Any]) -> dict[str, Any]:
    params = checked_flags(entry.get("params", {}), _RESERVED)
    for key, flag in (("max_model_len", "max_model_len"), ("precision", "dtype")):
        if (value := _flag_of(key, entry)) is not None:
            params.setdefault(flag, value)
    if "gpus" in entry and not any(flag in params for flag in _PARALLEL):
        params["tensor_parallel_size"] = _gpu_count(entry["gpus"])
    return params


def _flag_of(key: str, entry: Mapping[str, Any]) -> Any:
    """The flag's value that a key stands for, if it stands for one."""
    value = entry.get(key)
    if key == "precision":
        return None if value in _QUANTIZED or value is None else _DTYPES.get(value, value)
    return _number(value)


def _gpu_count(gpus: Any) -> int:
    return len(gpus) if isinstance(gpus, list) else int(gpus)


def _sleep(entry: Mapping[str, Any]) -> int:
    level = entry.get("sleep", "off")
    return 0 if level == "off" else int(level)


def _replicas(entry: Mapping[str, Any]) -> tuple[int, int]:
    wanted = entry.get("replicas", 1)
    if isinstance(wanted, Mapping):
        return int(wanted.get("min", 1)), int(wanted["max"])
    return int(wanted), int(wanted)


def _float(entry: Mapping[str, Any], key: str) -> float | None:
    return float(entry[key]) if key in entry else None


def device_problems(catalog: Catalog, gpu_ids: tuple[int, ...] | None) -> list[Problem]:
    """Models that are bound to devices which the daemon may not use."""
    return [(("models", model.id, "gpus"), f"device {index} is not among GPU_ID {', '.join(map(str, gpu_ids))}")
            for model in catalog.models.values() if gpu_ids is not None and isinstance(model.gpus, tuple)
            for index in model.gpus if index not in gpu_ids]
