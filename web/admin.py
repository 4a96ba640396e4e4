"""The management routes: instances, devices, reload, health."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from flask import Blueprint, Response, current_app, jsonify, request

import gpu
from errors import Conflict, NotFound
from instances import unsafe_flags
from instances.flags import merge_flags
from instances.instance import InstanceView, State
from instances.log_tail import follow, last_lines
from web import asked, bodies
from web.asked import manager
from web.audit import LISTED, AuditLog
from web.live import live
from web.reloader import Reloader

blueprint = Blueprint("admin", __name__)

TAIL_DEFAULT = 200
TAIL_MOST = 100_000


def instance_json(view: InstanceView) -> dict[str, Any]:
    return live().instance_json(view)


@blueprint.get("/instances")
def list_instances() -> Response:
    return jsonify(object="list", data=[instance_json(view) for view in manager().snapshot()])


@blueprint.post("/instances")
def create_instance() -> tuple[Response, int, dict[str, str]]:
    wanted, wait = bodies.create_request(bodies.json_object(request, bodies.CREATE_FIELDS))
    settings = manager().settings
    if not settings.allow_unsafe_params:
        unsafe_flags.check(wanted.params, merge_flags(settings.flags_default, settings.flags_config,
                                                      settings.flags_env), param="params")
    view, created = manager().create(wanted)
    if wait:
        view = asked.await_start(view, param="model_name")
    return jsonify(instance_json(view)), 201 if created else 200, {"Location": f"/instances/{view.id}"}


@blueprint.get("/instances/<instance_id>")
def get_instance(instance_id: str) -> Response:
    return jsonify(instance_json(manager().get(instance_id)))


@blueprint.delete("/instances/<instance_id>")
def delete_instance(instance_id: str) -> tuple[Response, int]:
    view = manager().stop(instance_id, force=asked.flag("force"))
    if asked.flag("wait") and view.state is not State.STOPPED:
        with asked.client() as watched:
            manager().wait(instance_id, lambda one: one.state is State.STOPPED, gone=lambda: watched.gone)
        return jsonify(instance_json(view) | {"status": str(State.STOPPED)}), 200
    return jsonify(instance_json(view)), 200 if view.state is State.STOPPED else 202


@blueprint.post("/instances/<instance_id>/sleep")
def sleep(instance_id: str) -> tuple[Response, int]:
    """202 while it falls asleep; with `wait`, 200 when it sleeps, or 409 when a request woke it at once."""
    body = bodies.json_object(request, ("level", "wait"))
    level, wait = bodies.sleep_level(body, "level", off=False), bodies.boolean(body, "wait")
    return _settled(manager().sleep(instance_id, level), State.SLEEPING, frozenset({State.FALLING_ASLEEP}), wait)


@blueprint.post("/instances/<instance_id>/wake")
def wake(instance_id: str) -> tuple[Response, int]:
    """202 while it wakes; with `wait`, 200 when it serves."""
    wait = bodies.boolean(bodies.json_object(request, ("wait",)), "wait")
    return _settled(manager().wake(instance_id), State.READY,
                    frozenset({State.FALLING_ASLEEP, State.SLEEPING, State.WAKING, State.STARTING, State.BACKOFF}),
                    wait)


def _settled(view: InstanceView, wanted: State, on_the_way: Collection[State], wait: bool) -> tuple[Response, int]:
    """The instance, once it has got there or elsewhere, if its caller waits for that.  Raises Conflict if elsewhere."""
    if wait:
        with asked.client() as watched:
            found = manager().wait(view.id, lambda one: one.state not in on_the_way, gone=lambda: watched.gone)
        if found is None or found.state is not wanted:
            now = "gone" if found is None else f"{found.state} ({found.why})"
            raise Conflict(f"instance {view.id} is {now}", code=f"not_{wanted}", param="instance_id")
        view = found
    return jsonify(instance_json(view)), 200 if view.state is wanted else 202


@blueprint.get("/instances/<instance_id>/logs")
def instance_logs(instance_id: str) -> Response:
    """The engine's log as text: the last `tail` lines, and with `follow` all that comes, until the instance ends."""
    registry = manager()
    path = Path(registry.get(instance_id).log_path)
    lines = asked.whole_number("tail", TAIL_DEFAULT, TAIL_MOST)
    if not asked.flag("follow"):
        return Response(last_lines(path, lines), mimetype="text/plain")
    watch, client = asked.router().watch, request.environ["gunicorn.socket"]

    def body() -> Iterator[bytes]:
        watched = watch.add(client)     # in here: a body that is never read (HEAD) must not hold it

        def ended() -> bool:
            try:
                return watched.gone or registry.get(instance_id).state is State.FAILED
            except NotFound:
                return True

        try:
            yield from follow(path, lines, ended)
        finally:
            watched.close()

    return Response(body(), mimetype="text/plain", headers={"X-Accel-Buffering": "no"})


@blueprint.get("/gpus")
def list_gpus() -> Response:
    reading = manager().devices.read(time.monotonic())
    holders = {device.index: [view.id for view in manager().snapshot() if device.index in view.devices]
               for device in reading.devices}
    return jsonify(object="list", driver=reading.driver, cuda=reading.cuda,
                   data=[gpu.device_json(device) | {"instances": holders[device.index]} for device in reading.devices])


@blueprint.post("/admin/reload")
def reload() -> Response:
    reloader: Reloader = current_app.extensions["reloader"]
    reloaded = reloader.reload()
    models = reloaded.models
    return jsonify(object="reload", changed=list(reloaded.settings),
                   models={"added": models.added, "removed": models.removed, "changed": models.changed})


@blueprint.get("/admin/audit")
def audit() -> Response:
    """Who managed what lately (web/audit.py), oldest first."""
    audit_log: AuditLog = current_app.extensions["audit"]
    return jsonify(object="list", data=audit_log.last(asked.whole_number("tail", TAIL_DEFAULT, LISTED)))


@blueprint.get("/health")
@blueprint.get("/ping")
def health() -> Response:
    views = manager().snapshot()
    ready = sum(view.state is State.READY for view in views)
    body = {"status": "ok", "instances": len(views), "ready": ready,
            "vllm_processes": sum(view.pid is not None for view in views), "config": _config_state(),
            **current_app.extensions["about"]}
    return jsonify(body)


def _config_state() -> dict[str, str | None]:
    """Which config.yaml is in force, and what is wrong with what is on disk.  Everyone may see it: no folder's name."""
    reloader: Reloader = current_app.extensions["reloader"]
    path, problem = manager().settings.config_file, reloader.problem
    if path is None:
        return {"file": None, "error": problem}
    return {"file": path.name, "error": None if problem is None else problem.replace(f"{path.parent}/", "")}


@blueprint.get("/version")
def version() -> Response:
    return jsonify(current_app.extensions["about"])


@blueprint.get("/load")
def load() -> Response:
    """As vLLM's /load, over all instances."""
    return jsonify(server_load=manager().in_flight())
