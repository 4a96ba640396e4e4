"""Models by name: what requests may ask for, and loading and unloading what is configured.

Ids of models may hold slashes.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from flask import Blueprint, Response, jsonify, request

from config import ModelConfig
from errors import ModelNotFound
from instances.instance import InstanceView, State
from routing import listing
from web import asked, auth, bodies
from web.shown import UNLOADED, model_json, status_of

blueprint = Blueprint("models", __name__)

OWNER = "vllm-server"


@blueprint.get("/v1/models")
def list_models() -> Response:
    return jsonify(object="list", data=_entries())


@blueprint.get("/v1/models/<path:name>")
def get_model(name: str) -> Response:
    entries = _entries()
    for entry in entries:
        if entry["id"] in (name, "/" + name):
            return jsonify(entry)
    raise ModelNotFound(f"there is no model {name[:256]!r} here. There are: "
                        f"{', '.join(entry['id'] for entry in entries[:20]) or 'none'}", param="model")


def _entries() -> list[dict[str, Any]]:
    """Every name that may be asked for with the key of this request, with its status."""
    manager, key = asked.manager(), auth.caller(request)
    views = manager.snapshot()
    found = {name: _entry(name, int(views_of[0].created_at), views_of[0].spec.model, views_of)
             for name, views_of in _by_name(views).items()}
    for one in manager.loadable():
        for name in one.names:
            found.setdefault(name, _entry(name, asked.router().started_at, one.model, []))
    fleet = asked.router().fleet
    listing.add_servers(found, fleet.views(), fleet.name, asked.router().started_at, OWNER)
    return [found[name] for name in sorted(found) if key is None or key.may_use([name])]


def _by_name(views: Iterable[InstanceView]) -> dict[str, list[InstanceView]]:
    found: dict[str, list[InstanceView]] = {}
    for view in views:
        for name in view.names:
            found.setdefault(name, []).append(view)
    return found


def _entry(name: str, created: int, root: str, views: list[InstanceView]) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": created, "owned_by": OWNER, "root": root,
            "status": status_of(views), "instances": [{"id": view.id, "status": str(view.state)} for view in views]}


# --- management -------------------------------------------------------------------------------------------------------

@blueprint.get("/admin/models")
def list_configured() -> Response:
    manager = asked.manager()
    views, replicas = manager.snapshot(), manager.replicas()
    return jsonify(object="list", data=[model_json(model, _of(model, views), replicas.get(model.id))
                                        for model in manager.settings.catalog.models.values()])


@blueprint.get("/admin/models/<path:name>")
def get_configured(name: str) -> Response:
    return _shown(_configured(name))


@blueprint.get("/admin/models/<path:name>/plan")
def plan(name: str) -> Response:
    """What a load would do, without doing it."""
    manager = asked.manager()
    report = manager.plan_for(name)
    models = {view.id: view.names[0] for view in manager.snapshot()}

    def shown(ids: Iterable[str]) -> list[dict[str, str | None]]:
        return [{"id": id_, "model": models.get(id_)} for id_ in ids]

    return jsonify(object="plan", model=_configured(name).id, fits=report.fits, gpus=list(report.devices),
                   bytes_per_gpu=report.bytes_per_device, source=report.source, sleep=shown(report.sleep),
                   stop=shown(report.stop), seconds_expected=report.seconds_expected, because=report.because)


@blueprint.post("/admin/models/<path:name>/load")
def load(name: str) -> tuple[Response, int]:
    """200 when it is ready, 202 while it loads; with `wait` when it is ready, or the cause of its failure."""
    body = bodies.json_object(request, ("wait",))
    wait = bodies.boolean(body, "wait")
    view = asked.manager().load(name)
    if wait:
        view = asked.await_start(view, param="model")
    return _shown(_configured(name)), 200 if view.state is State.READY else 202


@blueprint.post("/admin/models/<path:name>/unload")
def unload(name: str) -> tuple[Response, int]:
    """202 while its requests end; with `wait`, 200 when nothing of it is left."""
    body = bodies.json_object(request, ("wait", "force"))
    wait, force = bodies.boolean(body, "wait"), bodies.boolean(body, "force")
    manager = asked.manager()
    views = manager.unload(name, force=force)
    if wait:
        with asked.client() as watched:
            for view in views:
                manager.wait(view.id, lambda one: one.state is State.STOPPED, gone=lambda: watched.gone)
    shown = _shown(_configured(name))
    return shown, 200 if wait or shown.get_json()["status"] == UNLOADED else 202


def _shown(model: ModelConfig) -> Response:
    manager = asked.manager()
    return jsonify(model_json(model, _of(model, manager.snapshot()), manager.replicas().get(model.id)))


def _configured(name: str) -> ModelConfig:
    """By id or alias; what is not in config.yaml and runs is told as if it were.  Raises ModelNotFound."""
    manager = asked.manager()
    if (model := manager.settings.catalog.find(name)) is not None:
        return model
    for view in manager.snapshot():
        if name in view.names:
            return ModelConfig(id=name, model=view.spec.model)
    listed = ", ".join(list(manager.settings.catalog.models)[:20])
    raise ModelNotFound(f"there is no model {name[:256]!r} in config.yaml; it has {listed or 'none'}", param="model")


def _of(model: ModelConfig, views: Iterable[InstanceView]) -> list[InstanceView]:
    names = set(model.served_names)
    return [view for view in views if names.intersection(view.names)]
