"""The management routes for those who watch: the last hour, what happens, the last requests.  Never what they asked."""

from __future__ import annotations

import errno
import math
from collections.abc import Iterator
from typing import Any

from flask import Blueprint, Response, current_app, jsonify, request

from errors import BadRequest
from instances.instance import InstanceView
from instances.loop import Loop
from router import Router
from routing import request_id
from routing.observed import About
from web import asked, figures, shown
from web.events import KEPT, Feed
from web.figures import Ring
from web.sampler import Lookout, Sampler

blueprint = Blueprint("live", __name__)

EVENT_STREAM = "text/event-stream"
LOOK_S = 1.0
TAIL_DEFAULT = 100
TAIL_MOST = 1000


class Live:
    """What watches, and what it has seen.  `start` and `close` bound the life of its threads."""

    def __init__(self, router: Router, *, simulated: bool) -> None:
        self._router = router
        self._simulated = simulated
        self.ring = Ring(every_s=figures.EVERY_S)
        self.feed = Feed()
        sampler, self._lookout = Sampler(router, self.ring, self.feed), Lookout(router, self.feed, self.instance_json)
        self._loops = (Loop(name="sampler", tick=sampler.tick, interval_s=self.ring.every_s),
                       Loop(name="lookout", tick=self._lookout.tick, interval_s=LOOK_S))

    def start(self) -> None:
        self.feed.start()
        self._router.manager.on_state = self._lookout.changed
        for loop in self._loops:
            loop.start()

    def close(self) -> None:
        """Nobody is told anything any more; connections of those who listen are closed.  Twice is once."""
        for loop in self._loops:
            loop.stop()
        self.feed.close()

    def instance_json(self, view: InstanceView) -> dict[str, Any]:
        return shown.instance_json(view, simulated=self._simulated) | {
            "load": figures.shown(self.ring.latest(view.id))}


def live() -> Live:
    found: Live = current_app.extensions["live"]
    return found


@blueprint.get("/admin/history")
def history() -> Response:
    return jsonify(live().ring.history(_moment("since")))


@blueprint.get("/admin/events")
def events() -> Response:
    """The last ones as a list; with `follow`, or for who accepts nothing but an event stream, as they come."""
    if not asked.flag("follow") and request.headers.get("Accept") != EVENT_STREAM:
        tail = asked.whole_number("tail", TAIL_DEFAULT, KEPT)
        return jsonify(object="list", data=[one.shown() for one in live().feed.last(tail)])
    if request.method == "HEAD":
        return Response(mimetype=EVENT_STREAM)
    last = request.headers.get("Last-Event-ID", "")
    after = int(last) if last.isascii() and last.isdigit() and len(last) < 19 else None
    live().feed.join(request.environ["gunicorn.socket"], request_id.current(), after)
    return Response(_HandedOver(), mimetype=EVENT_STREAM, direct_passthrough=True)


class _HandedOver:
    """The server finds that the socket is no longer its own."""

    def __iter__(self) -> Iterator[bytes]:
        raise OSError(errno.ENOTCONN, "the connection was handed to the thread that tells of events")


@blueprint.get("/admin/requests")
def requests() -> Response:
    """The last requests for models, oldest first; with `failed` those that failed."""
    tail = asked.whole_number("tail", TAIL_DEFAULT, TAIL_MOST)
    found = asked.router().observed.recent(failed=asked.flag("failed"))
    return jsonify(object="list", data=[_request_json(one) for one in found[-tail:]] if tail else [])


def _request_json(about: About) -> dict[str, Any]:
    return {"at": round(about.at, 3), "model": about.model or None, "backend": about.backend or None,
            "path": about.path, "status": about.status, "code": about.code, "key": about.key,
            "first_byte_s": _rounded(about.first_byte_s), "seconds": _rounded(about.seconds),
            "request_id": about.request_id}


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 4)


def _moment(name: str) -> float:
    """`?since=1700000000.5`.  Raises BadRequest."""
    text = request.args.get(name, "0")
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise BadRequest(f"{name}={text[:40]} must be a time in seconds", param=name)
    return value
