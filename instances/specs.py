"""What an instance is made from: an entry of the catalog, a plain model name, and what a request adds.  Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from config import ModelConfig, Settings, merge_flags
from instances.instance import InstanceSpec

T = TypeVar("T")

LONGEST_NAME = 512


@dataclass(frozen=True)
class CreateRequest:
    """What POST /instances asks for; None: as the catalog's entry says, else as the settings do."""

    model: str
    params: Mapping[str, Any] = field(default_factory=dict)
    timeout_s: float | None = None
    start_timeout_s: float | None = None
    replace: bool = False
    new: bool = False
    sleep_level: int | None = None
    stop_after_s: float | None = None


def name_problem(name: str) -> str | None:
    """Why this cannot be a model's name: on the engine's command line it stands among flags."""
    if not name:
        return "must be a string that is not empty"
    if len(name) > LONGEST_NAME:
        return f"has {len(name)} characters; at most {LONGEST_NAME}"
    if name != name.strip() or not name.isprintable() or name.startswith("-"):
        return "must not begin with '-', begin or end with a space, or hold control characters"
    return None


def entry_for(settings: Settings, name: str) -> ModelConfig | None:
    """What a request for this name may load: an entry by id or alias, or, with AUTO_LOAD=any, the name itself."""
    entry = settings.catalog.find(name)
    if entry is None and settings.auto_load == "any" and name_problem(name) is None:
        return ModelConfig(id=name, model=name)
    return entry


def spec_of(settings: Settings, entry: ModelConfig) -> InstanceSpec:
    """As the configuration has it."""
    flags = _flags(settings, entry.params)
    given = _names_given(flags)
    return InstanceSpec(
        model=entry.model, names=tuple(dict.fromkeys((*entry.served_names, *given))), flags=flags,
        params=dict(entry.params), timeout_s=_or(entry.idle_timeout_s, settings.default_timeout_s),
        start_timeout_s=_or(entry.start_timeout_s, settings.start_timeout_s), sleep_level=entry.sleep,
        stop_after_s=entry.stop_after_s, env=dict(entry.env), gpus=entry.gpus, memory_bytes=entry.memory_bytes,
        param_count=entry.param_count, precision=entry.precision, priority=entry.priority, pinned=entry.pinned,
        config_id=entry.id, hf_token=entry.hf_token)


def spec_for(settings: Settings, request: CreateRequest) -> InstanceSpec:
    """As a request wants it: the entry of that name where there is one, else the model of that name.

    With an engine of its own (params, sleep) it is the request's, and a change of the entry leaves it alone.
    """
    entry = settings.catalog.find(request.model)
    if entry is not None:
        spec = spec_of(settings, entry)
        if request.params or request.sleep_level is not None:
            params = {**entry.params, **request.params}
            flags = _flags(settings, params)
            spec = replace(spec, flags=flags, params=params, config_id=None,
                           names=tuple(dict.fromkeys((*spec.names, *_names_given(flags)))))
    else:
        flags = _flags(settings, request.params)
        given = _names_given(flags)
        spec = InstanceSpec(
            model=request.model, names=tuple(dict.fromkeys((*given, request.model))), flags=flags,
            params=dict(request.params), timeout_s=settings.default_timeout_s,
            start_timeout_s=settings.start_timeout_s)
    return replace(spec, timeout_s=_or(request.timeout_s, spec.timeout_s),
                   start_timeout_s=_or(request.start_timeout_s, spec.start_timeout_s),
                   stop_after_s=_or(request.stop_after_s, spec.stop_after_s),
                   sleep_level=_or(request.sleep_level, spec.sleep_level))


def with_soft(spec: InstanceSpec, entry_spec: InstanceSpec) -> InstanceSpec:
    """The same engine under the times and the rank of `entry_spec`."""
    return replace(spec, **{name: getattr(entry_spec, name) for name in (
        "timeout_s", "start_timeout_s", "stop_after_s", "priority", "pinned", "param_count", "precision")})


def differences(mine: InstanceSpec, theirs: InstanceSpec) -> list[str]:
    """The names of what would make another engine of it; idle times and the like do not."""
    flags = {name for name in mine.flags.keys() | theirs.flags.keys()
             if mine.flags.get(name) != theirs.flags.get(name)}
    return sorted(flags | _other_fields(mine, theirs))


def entry_changed(mine: InstanceSpec, entry_spec: InstanceSpec) -> bool:
    """Whether the entry that it was made from asks for another engine now.

    By what the entry itself says: an instance keeps the flags that it was started with when the defaults change.
    """
    return mine.params != entry_spec.params or bool(_other_fields(mine, entry_spec))


_ENGINE_FIELDS = {"model": "model", "names": "served_model_name", "sleep_level": "sleep", "env": "env", "gpus": "gpus",
                  "memory_bytes": "memory_mb", "hf_token": "hf_token"}


def _other_fields(mine: InstanceSpec, theirs: InstanceSpec) -> set[str]:
    return {shown for name, shown in _ENGINE_FIELDS.items() if getattr(mine, name) != getattr(theirs, name)}


def _flags(settings: Settings, params: Mapping[str, Any]) -> dict[str, Any]:
    return merge_flags(settings.flags_default, settings.flags_config, settings.flags_env, params)


def _names_given(flags: dict[str, Any]) -> tuple[str, ...]:
    """Takes the names out of the flags: all of them are told to the engine together."""
    given = flags.pop("served_model_name", None) or ()
    return (given,) if isinstance(given, str) else tuple(str(name) for name in given)


def _or(value: T | None, default: T) -> T:
    return default if value is None else value
