"""Instances and models as JSON, for people and programs.  Times in seconds, wall clock; memory in bytes; no secrets."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from config import ModelConfig
from instances.instance import InstanceView, State
from instances.replicas import ReplicasView

SECRET = re.compile(r"(^|[_.-])(token|key|apikey|password|secret|credentials?)$", re.IGNORECASE)
"""Names of flags, and of entries in them, that hold a secret.  `max_num_batched_tokens` and `tokenizer` hold none."""

UNLOADED = "unloaded"
_NEAREST = (State.READY, State.WAKING, State.STARTING, State.SLEEPING, State.FALLING_ASLEEP, State.BACKOFF,
            State.STOPPING, State.FAILED, State.STOPPED)
"""Of a model's instances, the first of these tells how near it is to an answer."""


def instance_json(view: InstanceView, *, simulated: bool) -> dict[str, Any]:
    problem, spec = view.last_error, view.spec
    return {
        "id": view.id, "object": "instance", "model_name": spec.model,
        "aliases": [name for name in view.names if name != spec.model],
        "status": str(view.state), "why": view.why, "because": view.because or None,
        "phase": view.phase or None, "progress": view.progress,
        "elapsed": round(view.elapsed_s, 1), "expected": view.expected_s,
        "port": view.port, "pid": view.pid, "gpus": list(view.devices),
        "memory": {"planned_bytes": view.memory_planned_bytes, "measured_bytes": view.memory_measured_bytes,
                   "configured_bytes": spec.memory_bytes},
        "params": hide_secrets(spec.params), "flags": hide_secrets(spec.flags), "env": sorted(spec.env),
        "timeout": spec.timeout_s, "expires_in": view.expires_in_s, "in_flight": view.in_flight,
        "sleep": spec.sleep_level, "asleep": view.asleep_level or None, "stop_after": spec.stop_after_s,
        "priority": spec.priority, "pinned": spec.pinned, "configured_as": spec.config_id,
        "added_for_load": view.grown, "made_with_new": view.apart,
        "created": int(view.created_at), "last_used": int(view.last_used_at), "restarts": view.restarts,
        "retry_in": view.retry_in_s, "engine": dict(view.engine),
        "last_error": None if problem is None else {
            "code": problem.code, "message": problem.message, "detail": problem.detail or None,
            "suggestion": dict(problem.suggestion) if problem.suggestion else None},
        "simulated": simulated,
    }


def model_json(model: ModelConfig, views: Sequence[InstanceView], replicas: ReplicasView | None) -> dict[str, Any]:
    """A configured model and its instances.  `replicas` of one whose number follows its load."""
    return {
        "id": model.id, "object": "model", "model_path": model.model, "aliases": list(model.aliases),
        "status": status_of(views), "instances": [brief_json(view) for view in views],
        "params": hide_secrets(model.params), "env": sorted(model.env),
        "gpus": list(model.gpus) if isinstance(model.gpus, tuple) else model.gpus,
        "memory_bytes": model.memory_bytes, "param_count": model.param_count, "precision": model.precision,
        "idle_timeout": model.idle_timeout_s, "start_timeout": model.start_timeout_s, "sleep": model.sleep,
        "stop_after": model.stop_after_s, "preload": model.preload, "pinned": model.pinned, "priority": model.priority,
        "replicas": {"min": model.replicas[0], "max": model.replicas[1]} | ({} if replicas is None else {
            "running": replicas.running, "wanted": replicas.wanted, "because": replicas.because}),
    }


def brief_json(view: InstanceView) -> dict[str, Any]:
    return {"id": view.id, "status": str(view.state), "phase": view.phase or None, "progress": view.progress,
            "gpus": list(view.devices), "in_flight": view.in_flight}


def status_of(views: Sequence[InstanceView]) -> str:
    """How near a model with these instances is to an answer."""
    return str(min((view.state for view in views), key=_NEAREST.index)) if views else UNLOADED


def hide_secrets(flags: Mapping[str, Any]) -> dict[str, Any]:
    """The flags with `***` in place of each secret, however deep it stands."""
    return {name: "***" if SECRET.search(name) and isinstance(value, str | list | dict) else _hidden(value)
            for name, value in flags.items()}


def _hidden(value: Any) -> Any:
    if isinstance(value, Mapping):
        return hide_secrets(value)
    if isinstance(value, list):
        return [_hidden(item) for item in value]
    return value
