"""The management routes: instances, devices, reload, health."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from flask import Blueprint, Response, current_app, jsonify, request

import gpu
from errors import BadRequest, LoadFailed, NotFound
from instance_manager import InstanceManager
from instances import unsafe_flags
from instances.flags import merge_flags
from instances.instance import InstanceView, State
from instances.log_tail import follow, last_lines
from router import Router
from routing.client_watch import Watched
from web import bodies
from web.audit import LISTED, AuditLog
from web.reloader import Reloader

blueprint = Blueprint("admin", __name__)

TAIL_DEFAULT = 200
TAIL_MOST = 100_000
SECRET = re.compile(r"(^|[_.-])(token|key|apikey|password|secret|credentials?)$", re.IGNORECASE)
"""Names of flags, and of entries in them, that hold a secret.  `max_num_batched_tokens` and `tokenizer` hold none."""
SETTLED = frozenset({State.READY, State.FAILED})


def _manager() -> InstanceManager:
    manager: InstanceManager = current_app.extensions["manager"]
    return manager


def _reloader() -> Reloader:
    reloader: Reloader = current_app.extensions["reloader"]
    return reloader


@blueprint.get("/instances")
def list_instances() -> Response:
    return jsonify(object="list", data=[instance_json(view) for view in _manager().snapshot()])


@blueprint.post("/instances")
def create_instance() -> tuple[Response, int, dict[str, str]]:
    wanted, wait = bodies.create_request(bodies.json_object(request, bodies.CREATE_FIELDS))
    settings = _manager().settings
    if not settings.allow_unsafe_params:
        unsafe_flags.check(wanted.params, merge_flags(settings.flags_default, settings.flags_config,
                                                      settings.flags_env), param="params")
    view, created = _manager().create(wanted)
    if wait:
        view = _await_start(view)
    return jsonify(instance_json(view)), 201 if created else 200, {"Location": f"/instances/{view.id}"}


@blueprint.get("/instances/<instance_id>")
def get_instance(instance_id: str) -> Response:
    return jsonify(instance_json(_manager().get(instance_id)))


@blueprint.delete("/instances/<instance_id>")
def delete_instance(instance_id: str) -> tuple[Response, int]:
    manager = _manager()
    view = manager.stop(instance_id, force=_flag("force"))
    if _flag("wait") and view.state is not State.STOPPED:
        with_watch = _watched()
        try:
            manager.wait(instance_id, lambda one: one.state is State.STOPPED, gone=lambda: with_watch.gone)
        finally:
            with_watch.close()
        return jsonify(instance_json(view) | {"status": str(State.STOPPED)}), 200
    return jsonify(instance_json(view)), 200 if view.state is State.STOPPED else 202


@blueprint.get("/instances/<instance_id>/logs")
def instance_logs(instance_id: str) -> Response:
    """The engine's log as text: the last `tail` lines, and with `follow` all that comes, until the instance ends."""
    manager = _manager()
    path = Path(manager.get(instance_id).log_path)
    lines = _whole_number("tail", TAIL_DEFAULT, TAIL_MOST)
    if not _flag("follow"):
        return Response(last_lines(path, lines), mimetype="text/plain")
    watch, client = _router().watch, request.environ["gunicorn.socket"]

    def body() -> Iterator[bytes]:
        watched = watch.add(client)     # in here: a body that is never read (HEAD) must not hold it

        def ended() -> bool:
            try:
                return watched.gone or manager.get(instance_id).state is State.FAILED
            except NotFound:
                return True

        try:
            yield from follow(path, lines, ended)
        finally:
            watched.close()

    return Response(body(), mimetype="text/plain", headers={"X-Accel-Buffering": "no"})


@blueprint.get("/gpus")
def list_gpus() -> Response:
    reading = _manager().devices.read(time.monotonic())
    holders = {device.index: [view.id for view in _manager().snapshot() if device.index in view.devices]
               for device in reading.devices}
    return jsonify(object="list", driver=reading.driver, cuda=reading.cuda,
                   data=[gpu.device_json(device) | {"instances": holders[device.index]} for device in reading.devices])


@blueprint.post("/admin/reload")
def reload() -> Response:
    reloaded = _reloader().reload()
    models = reloaded.models
    return jsonify(object="reload", changed=list(reloaded.settings),
                   models={"added": models.added, "removed": models.removed, "changed": models.changed})


@blueprint.get("/admin/audit")
def audit() -> Response:
    """Who managed what lately (web/audit.py), oldest first."""
    audit_log: AuditLog = current_app.extensions["audit"]
    return jsonify(object="list", data=audit_log.last(_whole_number("tail", TAIL_DEFAULT, LISTED)))


@blueprint.get("/health")
@blueprint.get("/ping")
def health() -> Response:
    manager = _manager()
    views = manager.snapshot()
    ready = sum(view.state is State.READY for view in views)
    body = {"status": "ok", "instances": len(views), "ready": ready,
            "vllm_processes": sum(view.pid is not None for view in views), "config": _config_state(),
            **current_app.extensions["about"]}
    return jsonify(body)


def _config_state() -> dict[str, str | None]:
    """Which config.yaml is in force, and what is wrong with what is on disk.  Everyone may see it: no folder's name."""
    path, problem = _manager().settings.config_file, _reloader().problem
    if path is None:
        return {"file": None, "error": problem}
    return {"file": path.name, "error": None if problem is None else problem.replace(f"{path.parent}/", "")}


@blueprint.get("/version")
def version() -> Response:
    return jsonify(current_app.extensions["about"])


@blueprint.get("/load")
def load() -> Response:
    """As vLLM's /load, over all instances."""
    return jsonify(server_load=_manager().in_flight())


def instance_json(view: InstanceView) -> dict[str, Any]:
    """What people and programs see of an instance.  Times in seconds, wall clock; memory in bytes."""
    problem = view.last_error
    return {
        "id": view.id, "object": "instance", "model_name": view.spec.model,
        "aliases": [name for name in view.names if name != view.spec.model],
        "status": str(view.state), "because": view.why, "phase": view.phase or None, "progress": view.progress,
        "port": view.port, "pid": view.pid, "gpus": list(view.devices),
        "memory": {"planned_bytes": view.memory_planned_bytes, "measured_bytes": view.memory_measured_bytes},
        "params": hide_secrets(view.spec.params), "flags": hide_secrets(view.spec.flags),
        "timeout": view.spec.timeout_s, "expires_in": view.expires_in_s, "in_flight": view.in_flight,
        "created": int(view.created_at), "last_used": int(view.last_used_at), "restarts": view.restarts,
        "retry_in": view.retry_in_s, "engine": dict(view.engine),
        "last_error": None if problem is None else {
            "code": problem.code, "message": problem.message, "detail": problem.detail or None,
            "suggestion": dict(problem.suggestion) if problem.suggestion else None},
        "simulated": current_app.extensions["about"]["simulated"],
    }


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


def _await_start(view: InstanceView) -> InstanceView:
    """The instance once it is ready.  Raises LoadFailed with the cause; starting goes on if the caller leaves."""
    watched = _watched()
    try:
        settled = _manager().wait(view.id, lambda one: one.state in SETTLED or one.state is State.STOPPING,
                                  gone=lambda: watched.gone)
    finally:
        watched.close()
    if settled is not None and settled.state is State.READY:
        return settled
    problem = settled.last_error if settled is not None else None
    if problem is not None:
        raise LoadFailed(problem.message, code=problem.code, status=problem.status, param="model_name")
    raise LoadFailed(f"instance {view.id} of {view.spec.model} was stopped before it was ready", code="stopped")


def _router() -> Router:
    router: Router = current_app.extensions["router"]
    return router


def _watched() -> Watched:
    return _router().watch.add(request.environ["gunicorn.socket"])


def _flag(name: str) -> bool:
    value = request.args.get(name, "0").lower()
    if value not in ("0", "1", "true", "false", ""):
        raise BadRequest(f"{name}={value[:40]} must be 1 or 0", param=name)
    return value in ("1", "true", "") and name in request.args


def _whole_number(name: str, default: int, most: int) -> int:
    value = request.args.get(name)
    if value is None:
        return default
    if not value.isascii() or not value.isdigit() or len(value) > 9 or int(value) > most:
        raise BadRequest(f"{name}={value[:40]} must be a whole number from 0 to {most}", param=name)
    return int(value)
