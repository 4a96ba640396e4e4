"""What management views ask of their request and of the app: its parts, flags, and whether its client is there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from flask import current_app, request

from errors import BadRequest, LoadFailed
from instance_manager import InstanceManager
from instances.instance import InstanceView, State
from router import Router
from routing.client_watch import Watched

SETTLED = frozenset({State.READY, State.FAILED, State.STOPPING})
"""Of a start: it has ended, one way or another."""


def manager() -> InstanceManager:
    found: InstanceManager = current_app.extensions["manager"]
    return found


def router() -> Router:
    found: Router = current_app.extensions["router"]
    return found


@contextmanager
def client() -> Iterator[Watched]:
    """A watch over who sent this request, for views that wait."""
    watched = router().watch.add(request.environ["gunicorn.socket"])
    try:
        yield watched
    finally:
        watched.close()


def flag(name: str) -> bool:
    """`?name`, `?name=1` or `?name=true`.  Raises BadRequest."""
    value = request.args.get(name, "0").lower()
    if value not in ("0", "1", "true", "false", ""):
        raise BadRequest(f"{name}={value[:40]} must be 1 or 0", param=name)
    return value in ("1", "true", "") and name in request.args


def whole_number(name: str, default: int, most: int) -> int:
    """`?name=5`.  Raises BadRequest."""
    value = request.args.get(name)
    if value is None:
        return default
    if not value.isascii() or not value.isdigit() or len(value) > 9 or int(value) > most:
        raise BadRequest(f"{name}={value[:40]} must be a whole number from 0 to {most}", param=name)
    return int(value)


def await_start(view: InstanceView, *, param: str) -> InstanceView:
    """The instance once it is ready.  Raises LoadFailed with the cause; starting goes on if the caller leaves."""
    with client() as watched:
        settled = manager().wait(view.id, lambda one: one.state in SETTLED, gone=lambda: watched.gone)
    if settled is not None and settled.state is State.READY:
        return settled
    problem = settled.last_error if settled is not None else None
    if problem is not None:
        raise LoadFailed(problem.message, code=problem.code, status=problem.status, param=param)
    raise LoadFailed(f"instance {view.id} of {view.spec.model} was stopped before it was ready", code="stopped")
