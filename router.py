"""The data plane: model name -> backend -> lease -> relay.

A request's body is read once, its model name found, a backend picked from a snapshot, a lease taken, and the bytes
passed on unchanged in both directions.
"""

from __future__ import annotations

import re
import socket
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from functools import wraps
from typing import Any, NamedTuple
from urllib.parse import quote

import orjson
from flask import Blueprint, Request, Response, current_app, request
from werkzeug.exceptions import ClientDisconnected

from config import Key
from errors import (
    BadRequest,
    Forbidden,
    ModelNotFound,
    NotFound,
    TooLarge,
    UpgradeRequired,
    UpstreamError,
)
from instance_manager import InstanceManager
from instances.instance import ACTIVE, Candidate, Lease, State
from routing import commented, limits, paths, requested_model
from routing.answer import Answer
from routing.client_watch import ClientWatch, Watched
from routing.relay import RelayStream, TakenOver, may_be_taken_over, take_over
from routing.relay_process import Relays
from routing.tunnel import handshake, open_tunnel, wants_upgrade
from routing.upstream import (
    ClientLeft,
    ConnectionRefused,
    Exchange,
    Upstream,
    request_headers,
    response_headers,
)
from routing.waiting import Goal, Waiter

PICKS = 20                  # picks that may end in NotReady or a refused connection before the client is told
VERDICT_S = 1.0             # how long a broken request waits for the keeper to say why
RESPONSES_REMEMBERED = 10_000
_RESPONSE_ID = re.compile(rb'"id"\s*:\s*"(resp_[\w-]{1,128})"')


class EngineResponse(Response):
    """The engine's own headers, with none added."""

    default_mimetype = None
    automatically_set_content_length = False    # of an empty body: the engine's answer to HEAD may have another one

    def __call__(self, environ: Any, start_response: Any) -> Any:
        """Gives back what the body holds if the server refuses the head: nobody would iterate or close it then."""
        try:
            return super().__call__(environ, start_response)
        except BaseException:
            self.close()
            raise


class Outgoing(NamedTuple):
    """A request as an engine gets it, and whose it is: Flask's own is gone while a body is still being written."""

    method: str
    target: str
    headers: dict[str, str]
    payload: bytes | bytearray | None
    client: socket.socket
    protocol: str
    relayed: bool       # whether a relay may carry its answer, unseen


class Router:
    """Everything the data routes share.  `start` and `close` bound the life of its thread and connections."""

    def __init__(self, manager: InstanceManager) -> None:
        self.manager = manager
        self.watch = ClientWatch()
        self.relays = Relays(manager.settings.relays) if manager.settings.relays else None
        self.limits = limits.Limits()
        self._upstream = Upstream(manager.settings.threads)
        self.started_at = int(time.time())
        self._lock = threading.Lock()
        self._response_owner: OrderedDict[str, str] = OrderedDict()

    def start(self) -> None:
        self.watch.start()
        if self.relays is not None:
            self.relays.start()

    def streams(self) -> int:
        """Connections that relays carry."""
        return self.relays.open_count() if self.relays is not None else 0

    def close(self) -> None:
        if self.relays is not None:
            self.relays.close()
        self.watch.close()
        self._upstream.close()

    # --- the ways in ----------------------------------------------------------------------------------------------

    def by_model(self, incoming: Request, path: str) -> Response:
        """Forward to a backend of the model that the body names; waits while that loads."""
        body = self.read_body(incoming)
        wanted = requested_model.find(incoming.headers.get("Content-Type", ""), body)
        limits.check_model(_key(incoming), [wanted.model])
        owner = self._owner(wanted.previous_response_id) if wanted.previous_response_id else None
        with_id = self._remember if path == "/v1/responses" else None
        comments = wanted.stream and path in commented.STREAMING and self.manager.settings.loading_comments
        return self._forward(incoming, path, body, self._model(wanted.model), prefer=owner, with_id=with_id,
                             comments=comments)

    def to_instance(self, incoming: Request, instance_id: str, path: str) -> Response:
        """Forward to this instance, whatever the body says; waits while it loads."""
        if paths.is_dev_mode(path):
            raise Forbidden(f"{path[:80]} is a development route of the engine and is never reachable through the "
                            "daemon; see the management routes instead", code="dev_mode_path")
        if paths.is_confusing(path):
            raise BadRequest("the path holds dot segments, empty segments or control characters", param="path",
                             code="invalid_path")
        goal = self._instance(instance_id)
        limits.check_model(_key(incoming), self.manager.get(instance_id).names)
        if wants_upgrade(incoming.headers.get("Connection", ""), incoming.headers.get("Upgrade", "")):
            return self._upgrade(incoming, path, goal)
        return self._forward(incoming, path, self.read_body(incoming), goal)

    def to_response_owner(self, incoming: Request, response_id: str, path: str) -> Response:
        """Forward to the instance that made this response; one that is not remembered is asked for everywhere."""
        body = self.read_body(incoming)
        owner = self._owner(response_id)
        key = _key(incoming)
        ready = [view.id for view in self.manager.snapshot()
                 if view.state is State.READY and (key is None or key.may_use(view.names))]
        for instance_id in [owner] if owner in ready else ready:
            answer = self._forward(incoming, path, body, self._instance(instance_id))
            if answer.status_code != 404:
                self._note_owner(response_id, instance_id)
                return answer
            if owner in ready:
                return answer
            answer.close()
        raise NotFound(f"no running instance knows the response {response_id[:64]!r}", code="response_not_found",
                       param="response_id")

    def read_body(self, incoming: Request) -> bytes | bytearray:
        """The whole body; the server has collected it already (web/intake.py).

        Raises TooLarge, or BadRequest when it is shorter than its Content-Length.
        """
        length = incoming.content_length
        limit = self.manager.settings.max_request_bytes
        if length is not None and length > limit:
            raise TooLarge(f"the body has {length} bytes; MAX_REQUEST_BYTES allows {limit}")
        try:
            source = incoming.environ["wsgi.input"]
            body: bytes | bytearray = source.take() if hasattr(source, "take") else source.read(
                length if length is not None else limit + 1)
        except (OSError, ClientDisconnected) as error:
            raise ClientLeft from error
        if length is not None and len(body) < length:
            raise BadRequest(f"the body ended after {len(body)} bytes; its Content-Length says {length}",
                             code="incomplete_body")
        if len(body) > limit:
            raise TooLarge(f"the body has more than {limit} bytes; MAX_REQUEST_BYTES allows no more")
        return body

    def realtime(self, incoming: Request) -> Response:
        """A WebSocket to the model of `?model=`, or to the only one that is active."""
        model = incoming.args.get("model")
        if model is None:
            running = [view for view in self.manager.snapshot() if view.state in ACTIVE]
            if len(running) != 1:
                raise BadRequest("name the model in the query: /v1/realtime?model=NAME", param="model",
                                 code="missing_model")
            model = running[0].names[0]
        limits.check_model(_key(incoming), [model])
        return self._upgrade(incoming, paths.REALTIME, self._model(model))

    def adapter(self, incoming: Request, path: str) -> Response:
        """Load or unload a LoRA adapter in the engine of the model that the body names; its name then routes there."""
        body = self.read_body(incoming)
        wanted = requested_model.find(incoming.headers.get("Content-Type", ""), body)
        name = str(orjson.loads(body).get("lora_name", ""))
        owners: list[str] = []
        answer = self._forward(incoming, path, body, self._model(wanted.model), with_owner=owners.append)
        if answer.status_code == 200 and owners:
            view = self.manager.get(owners[0])
            others = tuple(known for known in view.names if known != name)
            self.manager.rename(view.id, (*others, name) if path == paths.ADAPTERS[0] else others)
        return answer

    # --- one exchange ---------------------------------------------------------------------------------------------

    def _forward(self, incoming: Request, path: str, body: bytes | bytearray, goal: Goal, *,
                 prefer: str | None = None, with_id: Callable[[bytes, str], None] | None = None,
                 with_owner: Callable[[str], None] | None = None, comments: bool = False) -> Response:
        """`comments`: an event stream is asked for, whose client may be told of a long wait."""
        outgoing = _outgoing(incoming, path, body)
        watched = self.watch.add(outgoing.client)
        waiter = self._waiter(goal, watched, prefer)
        try:
            for _ in range(PICKS):
                lease = waiter.lease(within_s=commented.AFTER_S if comments else None)
                if lease is None:
                    return self._commented(outgoing, path, waiter, watched, with_id)
                waiter.close()
                if with_owner is not None:
                    with_owner(lease.instance_id)
                try:
                    return self._exchange(outgoing, lease, watched, with_id)
                except ConnectionRefused:   # nothing was sent
                    waiter.pause()
            raise UpstreamError(f"{goal.what} takes no connections although it should be ready; try again later")
        except BaseException:
            waiter.close()
            watched.close()
            raise

    def _waiter(self, goal: Goal, watched: Watched, prefer: str | None = None) -> Waiter:
        return Waiter(self.manager, goal, watched, prefer=prefer,
                      patience_s=self.manager.settings.request_queue_timeout_s)

    def _commented(self, outgoing: Outgoing, path: str, waiter: Waiter, watched: Watched,
                   with_id: Callable[[bytes, str], None] | None) -> Response:
        """200 now, and comments until the engine's own events can follow."""
        # Its head will not reach the client, who must not be sent what only that explains.
        plain = outgoing._replace(headers={name: value for name, value in outgoing.headers.items()
                                           if name.lower() != "accept-encoding"} | {"Accept-Encoding": "identity"})

        def open_stream(lease: Lease) -> tuple[Answer, RelayStream]:
            exchange, upstream = self._send(plain, lease, watched)
            return upstream, RelayStream(upstream, exchange, lease, watched, _first_piece(with_id, lease))

        stream = commented.CommentedStream(waiter, open_stream, watched, path)
        return EngineResponse(stream, status=200, headers=commented.HEADERS, direct_passthrough=True)

    def _upgrade(self, incoming: Request, path: str, goal: Goal) -> Response:
        upgrade = incoming.headers.get("Upgrade", "")
        if not wants_upgrade(incoming.headers.get("Connection", ""), upgrade) or incoming.method != "GET":
            raise UpgradeRequired(f"{path[:80]} is a WebSocket: send GET with Connection: Upgrade")
        client = incoming.environ["gunicorn.socket"]
        watched = self.watch.add(client)
        waiter = self._waiter(goal, watched)
        try:
            lease = waiter.lease()
        finally:
            waiter.close()
            watched.close()
        assert lease is not None
        try:
            open_tunnel(self.relays, client, lease,
                        handshake(_target(incoming, path), lease.port, incoming.headers, upgrade))
        except BaseException:
            lease.release()
            raise
        return Response(TakenOver(lease), direct_passthrough=True)

    def _exchange(self, outgoing: Outgoing, lease: Lease, watched: Watched,
                  with_id: Callable[[bytes, str], None] | None) -> Response:
        """Send, read the head, and hand what is held to a RelayStream.  Releases the lease if that fails."""
        exchange, upstream = self._send(outgoing, lease, watched)
        on_first = _first_piece(with_id, lease)
        if self._relayed(outgoing, upstream, exchange, lease, watched, on_first):
            return Response(TakenOver(lease), direct_passthrough=True)
        stream = RelayStream(upstream, exchange, lease, watched, on_first)
        response = EngineResponse(stream, status=upstream.head.status, headers=response_headers(upstream),
                                  direct_passthrough=True)
        if upstream.is_bodyless:
            response.response = []
            stream.end_without_body()
        return response

    def _send(self, outgoing: Outgoing, lease: Lease, watched: Watched) -> tuple[Exchange, Answer]:
        """Send and read the head.  Releases the lease if that fails."""
        exchange = Exchange()
        try:
            lease.on_cut(exchange.abort)
            watched.on_gone(exchange.abort)
            return exchange, self._upstream.send(
                exchange, outgoing.method, f"http://127.0.0.1:{lease.port}{outgoing.target}", outgoing.headers,
                outgoing.payload, self.manager.settings.request_timeout_s)
        except BaseException as error:
            watched.on_gone(None)
            exchange.detach()
            try:
                raise self._verdict(error, lease, watched) from error
            finally:
                lease.release()

    def _relayed(self, outgoing: Outgoing, upstream: Answer, exchange: Exchange, lease: Lease,
                 watched: Watched, on_first: Callable[[bytes], None] | None) -> bool:
        """Whether a relay process has taken the stream over.  Releases what is held if that fails."""
        if self.relays is None or not outgoing.relayed:
            return False
        if not may_be_taken_over(outgoing.method, outgoing.protocol, upstream):
            return False
        try:
            if take_over(self.relays, outgoing.client, upstream, exchange, lease, watched, on_first):
                return True
        except BaseException:
            upstream.close(complete=False)
            lease.release()
            raise
        lease.on_cut(exchange.abort)
        watched.watch_again(exchange.abort)
        return False

    def _verdict(self, error: BaseException, lease: Lease, watched: Watched) -> BaseException:
        """What broke an exchange, as its client should hear it: its own leaving, the keeper's finding, the error."""
        if watched.gone:
            return ClientLeft()
        if isinstance(error, ConnectionRefused) or not isinstance(error, UpstreamError):
            return error
        deadline = time.monotonic() + VERDICT_S
        while lease.cut_error is None and time.monotonic() < deadline:
            found = self.manager.problem_of(lease.instance_id)
            if found is None or found[0] is not State.READY:
                problem = found[1] if found is not None else None
                return UpstreamError(problem.message, code=problem.code) if problem is not None else error
            self.manager.wait_for_change(0.05)
        return lease.cut_error or error

    def _model(self, name: str) -> Goal:
        """What is configured and not there is loaded for it."""
        def backends() -> list[Candidate]:
            candidates = self.manager.demand(name)
            if not candidates:
                raise ModelNotFound(self._not_here(name), param="model")
            return candidates

        return Goal(name, name, backends)

    def _instance(self, instance_id: str) -> Goal:
        """Raises NotFound."""
        def backends() -> list[Candidate]:
            view = self.manager.get(instance_id)
            return [Candidate(view.id, view.state, view.in_flight)]

        return Goal(f"instance {instance_id}", self.manager.get(instance_id).names[0], backends)

    def _not_here(self, name: str) -> str:
        entry = self.manager.settings.catalog.find(name)
        if entry is not None:
            return (f"the model {name[:256]!r} is not loaded, and AUTO_LOAD is off: POST /admin/models/{entry.id}/load "
                    "loads it")
        names = self.manager.model_names()
        names += [known for one in self.manager.loadable() for known in one.names if known not in names]
        listed = ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")
        return (f"there is no model {name[:256]!r} here. There are: {listed or 'none'}. Add it to config.yaml, or "
                "start it with POST /instances")

    # --- which instance made a response ---------------------------------------------------------------------------

    def _remember(self, first_piece: bytes, instance_id: str) -> None:
        if found := _RESPONSE_ID.search(first_piece):
            self._note_owner(found[1].decode(), instance_id)

    def _note_owner(self, response_id: str, instance_id: str) -> None:
        with self._lock:
            self._response_owner[response_id] = instance_id
            self._response_owner.move_to_end(response_id)
            while len(self._response_owner) > RESPONSES_REMEMBERED:
                self._response_owner.popitem(last=False)

    def _owner(self, response_id: str) -> str | None:
        with self._lock:
            return self._response_owner.get(response_id)


def _outgoing(incoming: Request, path: str, body: bytes | bytearray) -> Outgoing:
    payload = body if body or incoming.method in ("POST", "PUT", "PATCH") else None
    return Outgoing(incoming.method, _target(incoming, path), request_headers(incoming.headers, payload), payload,
                    incoming.environ["gunicorn.socket"], incoming.environ["SERVER_PROTOCOL"],
                    not limits.counts_tokens(_key(incoming)))


def _first_piece(with_id: Callable[[bytes, str], None] | None, lease: Lease) -> Callable[[bytes], None] | None:
    return None if with_id is None else lambda piece: with_id(piece, lease.instance_id)


def _target(incoming: Request, path: str) -> str:
    """Path and query as they go to the engine: the path in its one canonical spelling."""
    query = incoming.environ.get("QUERY_STRING", "")
    return quote(path, safe=_PATH_SAFE) + (f"?{query}" if query else "")


_PATH_SAFE = "/:@!$&'()*+,;=-._~"
ANY = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]

blueprint = Blueprint("router", __name__)


def _router() -> Router:
    router: Router = current_app.extensions["router"]
    return router


def limited(view: Callable[..., Response]) -> Callable[..., Response]:
    """Within the limits of the key that came with the request, until its answer has ended."""
    @wraps(view)
    def within_limits(**arguments: str) -> Response:
        admission = _router().limits.enter(_key(request))
        try:
            return limits.until_its_end(view(**arguments), admission)
        except BaseException:
            admission.leave()
            raise
    return within_limits


def _key(incoming: Request) -> Key | None:
    return incoming.environ.get(limits.CALLER)


@limited
def _by_model() -> Response:
    return _router().by_model(request, request.path)


for _path in paths.BY_MODEL:
    blueprint.add_url_rule(_path, endpoint=_path.strip("/").replace("/", "_"), view_func=_by_model, methods=["POST"])


def _adapter() -> Response:
    return _router().adapter(request, request.path)


for _path in paths.ADAPTERS:
    blueprint.add_url_rule(_path, endpoint=_path.strip("/").replace("/", "_"), view_func=_adapter, methods=["POST"])


# werkzeug keeps WebSocket requests apart from others: a path for both has two rules.
@blueprint.get(paths.REALTIME)
@blueprint.get(paths.REALTIME, websocket=True)
@limited
def realtime() -> Response:
    return _router().realtime(request)


@blueprint.get("/v1/responses/<response_id>")
@limited
def get_response(response_id: str) -> Response:
    return _router().to_response_owner(request, response_id, request.path)


@blueprint.post("/v1/responses/<response_id>/cancel")
@limited
def cancel_response(response_id: str) -> Response:
    return _router().to_response_owner(request, response_id, request.path)


@blueprint.route("/proxy/<instance_id>/", defaults={"path": ""}, methods=ANY)
@blueprint.route("/proxy/<instance_id>/<path:path>", methods=ANY)
@blueprint.get("/proxy/<instance_id>/<path:path>", websocket=True)
@limited
def proxy(instance_id: str, path: str) -> Response:
    return _router().to_instance(request, instance_id, "/" + path)
