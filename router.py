"""The data plane: model name -> backend -> lease -> relay.

A request's body is read once, its model name found, a backend picked from a snapshot, a lease taken, and the bytes
passed on unchanged in both directions.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable, Iterator
from functools import partial, wraps
from typing import Any

import orjson
from flask import Blueprint, Response, current_app, request

from config import Key, Settings
from errors import BadRequest, Forbidden, ModelNotFound, NotFound, TooLarge, UpgradeRequired, UpstreamError
from instance_manager import InstanceManager
from instances.instance import ACTIVE, Candidate, Lease, State
from instances.replicas import EngineLoad
from routing import commented, limits, paths, requested_model
from routing.answer import Answer
from routing.balancer import Balancer
from routing.checker import Checker, LocalTarget
from routing.client_watch import ClientWatch, Watched
from routing.forwarding import Forwarder, Outgoing, origin_of, outgoing, target
from routing.health import Status
from routing.incoming import Incoming
from routing.observed import ABOUT, About, Observed
from routing.policies import policy_named
from routing.relay import RelayStream, TakenOver
from routing.relay_process import Relays
from routing.remote import Fleet, RemoteLease
from routing.reply import Reply
from routing.response_owners import ResponseOwners
from routing.tunnel import handshake, open_tunnel, wants_upgrade
from routing.upstream import ConnectionRefused, Upstream, request_headers
from routing.waiting import Waiter
from routing.ways import Way, Ways

log = logging.getLogger("vllm_server.router")

PICKS = 20                  # connections that may be refused before the client is told
ASKED_FOR_RESPONSE = 16     # servers that are asked for a response whose maker is not remembered
DEFAULT_CAPACITY = 256      # of an instance whose flags do not say (--max-num-seqs)


class Router:
    """Everything the data routes share.  `start` and `close` bound the life of its threads and connections."""

    def __init__(self, manager: InstanceManager) -> None:
        settings = manager.settings
        self.manager = manager
        self.watch = ClientWatch()
        self.relays = Relays(settings.relays) if settings.relays else None
        self.fleet = Fleet(settings.servers, name=f"vllm-server-{secrets.token_hex(4)}")
        self.balancer = Balancer(self.fleet, policy_named(settings.routing_policy, settings.prefix_characters),
                                 prefer_local=settings.prefer_local)
        self.checker = Checker(self.balancer, self._targets)
        self.limits = limits.Limits()
        self.started_at = int(time.time())
        self._upstream = Upstream(settings.threads)
        self._forwarder = Forwarder(manager, self.balancer, self._upstream, self.relays, self.fleet.name)
        self.ways = Ways(manager, self.balancer)
        self._owners = ResponseOwners()
        self.observed = Observed()

    def use(self, settings: Settings) -> None:
        """Go over to other settings: the servers, and how they are chosen."""
        for change in self.fleet.use(settings.servers):
            log.info("servers: %s", change)
        self.balancer.policy = policy_named(settings.routing_policy, settings.prefix_characters)
        self.balancer.prefer_local = settings.prefer_local

    def start(self) -> None:
        self.watch.start()
        self.checker.start()
        if self.relays is not None:
            self.relays.start()

    def streams(self) -> int:
        """Connections that relays carry."""
        return self.relays.open_count() if self.relays is not None else 0

    def close(self) -> None:
        if self.relays is not None:
            self.relays.close()
        self.checker.close()
        self.watch.close()
        self._upstream.close()

    def engine_loads(self) -> dict[str, EngineLoad]:
        """Of the instances whose load decides how many there are."""
        scaled = self.manager.scaled()
        if not scaled:
            return {}
        found = {view.id: self.balancer.local_view(Candidate(view.id, view.state, view.in_flight))[0]
                 for view in self.manager.snapshot() if view.id in scaled}
        return {id_: EngineLoad(one.running, one.waiting, one.capacity) for id_, one in found.items()}

    def _targets(self) -> Iterator[LocalTarget]:
        """The instances that serve; the load of one decides something only where there is a choice, or where it decides
        how many there are."""
        scaled = self.manager.scaled()
        ready = [view for view in self.manager.snapshot() if view.state is State.READY and view.port is not None]
        for view in ready:
            name = view.names[0]
            alone = sum(name in other.names for other in ready) == 1 and not any(map(len, self.fleet.pools(name)))
            capacity = view.spec.flags.get("max_num_seqs")
            yield LocalTarget(view.id, view.port or 0, capacity if isinstance(capacity, int) else DEFAULT_CAPACITY,
                              watched=not alone or view.id in scaled)

    # --- the ways in ----------------------------------------------------------------------------------------------

    def by_model(self, incoming: Incoming, path: str) -> Reply:
        """Forward to a backend of the model that the body names; waits while that loads."""
        requested_model.check_coding(incoming.headers.get("Content-Encoding"))
        body = self.read_body(incoming)
        wanted = requested_model.find(incoming.headers.get("Content-Type", ""), body,
                                      with_fields=self.balancer.policy.sticky)
        limits.check_model(caller(incoming), [wanted.model])
        key = self.balancer.key(incoming.headers, wanted.fields)
        owner = self._owners.find(wanted.previous_response_id)
        with_id = self._owners.learn if path == "/v1/responses" else None
        comments = wanted.stream and path in commented.STREAMING and self.manager.settings.loading_comments
        way = self.ways.to_model(wanted.model, key, owner, incoming.headers.get("Via", ""))
        return self._forward(incoming, path, body, way, with_id=with_id, comments=comments)

    def view(self, incoming: Incoming) -> Reply:
        """A request to a path of `paths.BY_MODEL`."""
        return self.within_limits(incoming, lambda: self.by_model(incoming, incoming.path))

    def within_limits(self, incoming: Incoming, answer: Callable[[], Reply]) -> Reply:
        """Its answer, within the limits of the key that came with it, until that has ended."""
        admission = self.limits.enter(caller(incoming))
        try:
            return limits.until_its_end(answer(), admission)
        except BaseException:
            admission.leave()
            raise

    def to_instance(self, incoming: Incoming, instance_id: str, path: str) -> Reply:
        """Forward to this instance, whatever the body says; waits while it loads."""
        _check_path(path)
        way = self.ways.to_one(instance_id)
        limits.check_model(caller(incoming), self.manager.get(instance_id).names)
        if wants_upgrade(incoming.headers.get("Connection", ""), incoming.headers.get("Upgrade", "")):
            return self._upgrade(incoming, path, way)
        return self._forward(incoming, path, self.read_body(incoming), way)

    def to_response_owner(self, incoming: Incoming, response_id: str, path: str) -> Reply:
        """Forward to the backend that made this response; one that is not remembered is asked for everywhere."""
        _check_path(path)
        body = self.read_body(incoming)
        owner = self._owners.find(response_id)
        key = caller(incoming)
        known = [view.id for view in self.manager.snapshot()
                 if view.state is State.READY and (key is None or key.may_use(view.names))]
        known += [view.url for view in self.fleet.views()
                  if view.status is Status.UP and not view.leaving and (key is None or key.may_use(view.models))]
        for backend in [owner] if owner in known else known[:ASKED_FOR_RESPONSE]:
            answer = self._forward(incoming, path, body, self.ways.to_one(backend))
            if answer.status_code != 404:
                self._owners.note(response_id, backend)
                return answer
            if owner in known:
                return answer
            answer.close()
        raise NotFound(f"no running instance knows the response {response_id[:64]!r}", code="response_not_found",
                       param="response_id")

    def read_body(self, incoming: Incoming) -> bytes | bytearray:
        """The whole body, which the server has collected and refused where it is none (web/intake.py).

        Raises TooLarge: the settings may have been read anew since.
        """
        body: bytes | bytearray = incoming.environ["wsgi.input"].take()
        if len(body) > (limit := self.manager.settings.max_request_bytes):
            raise TooLarge(f"the body has {len(body)} bytes; MAX_REQUEST_BYTES allows {limit}")
        return body

    def realtime(self, incoming: Incoming, model: str | None) -> Reply:
        """A WebSocket to the model of `?model=`, or to the only one that is active."""
        if model is None:
            running = [view for view in self.manager.snapshot() if view.state in ACTIVE]
            if len(running) != 1:
                raise BadRequest("name the model in the query: /v1/realtime?model=NAME", param="model",
                                 code="missing_model")
            model = running[0].names[0]
        limits.check_model(caller(incoming), [model])
        return self._upgrade(incoming, paths.REALTIME, self.ways.to_model(model, via=incoming.headers.get("Via", "")))

    def adapter(self, incoming: Incoming, path: str) -> Reply:
        """Load or unload a LoRA adapter in the engine of the model that the body names; its name then routes there."""
        requested_model.check_coding(incoming.headers.get("Content-Encoding"))
        body = self.read_body(incoming)
        wanted = requested_model.find(incoming.headers.get("Content-Type", ""), body)
        name = str(orjson.loads(body).get("lora_name", ""))
        owners: list[str] = []
        answer = self._forward(incoming, path, body, self.ways.to_instance_of(wanted.model), with_owner=owners.append)
        if answer.status_code == 200 and owners:
            view = self.manager.get(owners[0])
            others = tuple(known for known in view.names if known != name)
            self.manager.rename(view.id, (*others, name) if path == paths.ADAPTERS[0] else others)
        return answer

    # --- one request ----------------------------------------------------------------------------------------------

    def _forward(self, incoming: Incoming, path: str, body: bytes | bytearray, way: Way, *,
                 with_id: Callable[[bytes, str], None] | None = None,
                 with_owner: Callable[[str], None] | None = None, comments: bool = False) -> Reply:
        """`comments`: an event stream is asked for, whose client may be told of a long wait."""
        about: About = incoming.environ.get(ABOUT) or About(time.monotonic())
        sent = outgoing(incoming, path, body, relayed=not limits.counts_tokens(caller(incoming)))
        watched = self.watch.add(sent.client)
        waiter = self._waiter(way, watched)
        try:
            for _ in range(PICKS + way.attempts.max_retries):
                lease = waiter.lease(within_s=commented.AFTER_S if comments else None)
                about.model = way.ask.model
                if lease is None:
                    return self._commented(sent, path, way, waiter, watched, with_id, about)
                waiter.close()
                if with_owner is not None:
                    with_owner(lease.instance_id)
                try:
                    answer = self._exchange(sent, lease, watched, way, with_id)
                except UpstreamError as error:
                    self._go_on(error, lease, way, waiter)
                else:
                    if answer is not None:
                        about.backend = _name_of(lease)
                        lease.when_released(self.observed.end_of(about, time.monotonic, partial(_cut_by, lease)))
                        return answer
            raise UpstreamError(f"{way.goal.what} takes no connections although it should be ready; try again later")
        except BaseException as error:
            waiter.close()
            watched.close()
            if not isinstance(error, ModelNotFound):
                about.model = way.ask.model
            raise

    def _go_on(self, error: UpstreamError, lease: Lease, way: Way, waiter: Waiter) -> None:
        """After a failed try.  Raises the error when no other one follows."""
        local, refused = not isinstance(lease, RemoteLease), isinstance(error, ConnectionRefused)
        if way.attempts.may_follow_error(error, local=local, refused=refused) and self.ways.another(way, lease):
            self._leave(way, lease, error)
        elif refused and local:
            waiter.pause()      # nothing was sent, and its keeper will notice
        else:
            raise error

    def _leave(self, way: Way, lease: Lease, error: UpstreamError) -> None:
        log.info("a request for %s goes elsewhere after %s: %s", way.goal.what, lease.instance_id, error.message)
        way.attempts.leave(lease.instance_id, error)
        self.observed.retried(error.code)

    def _waiter(self, way: Way, watched: Watched) -> Waiter:
        return Waiter(self.manager, way.goal, lambda candidates: self.ways.grant(way, candidates), watched,
                      patience_s=self.manager.settings.request_queue_timeout_s)

    def _commented(self, sent: Outgoing, path: str, way: Way, waiter: Waiter, watched: Watched,
                   with_id: Callable[[bytes, str], None] | None, about: About) -> Reply:
        """200 now, and comments until the engine's own events can follow."""
        # Its head will not reach the client, who must not be sent what only that explains.
        plain = sent._replace(headers={name: value for name, value in sent.headers.items()
                                       if name.lower() != "accept-encoding"} | {"Accept-Encoding": "identity"})

        leases: list[Lease] = []
        ended = self.observed.end_of(about, time.monotonic, lambda: _cut_by(leases[0]) if leases else stream.failed)

        def open_stream(lease: Lease) -> tuple[Answer, RelayStream]:
            exchange, upstream = self._forwarder.send(plain, lease, watched, max(0.05, self.ways.left_s(way, lease)))
            about.backend = _name_of(lease)
            leases.append(lease)
            lease.when_released(ended)
            return upstream, RelayStream(upstream, exchange, lease, watched, _first_piece(with_id, lease))

        stream = commented.CommentedStream(waiter, open_stream, watched, path, ended)
        return Reply(200, [*commented.HEADERS, *sent.ours], stream)

    def _upgrade(self, incoming: Incoming, path: str, way: Way) -> Reply:
        upgrade = incoming.headers.get("Upgrade", "")
        if not wants_upgrade(incoming.headers.get("Connection", ""), upgrade) or incoming.method != "GET":
            raise UpgradeRequired(f"{path[:80]} is a WebSocket: send GET with Connection: Upgrade")
        client = incoming.environ["gunicorn.socket"]
        watched = self.watch.add(client)
        waiter = self._waiter(way, watched)
        try:
            lease = waiter.lease()
        finally:
            waiter.close()
            watched.close()
        assert lease is not None
        try:
            headers = self._forwarder.headers(lease, request_headers(incoming.headers, None))
            open_tunnel(self.relays, client, lease, origin_of(lease),
                        handshake(target(incoming, path), origin_of(lease), headers, upgrade))
        except BaseException:
            lease.release()
            raise
        return Reply(200, [], TakenOver(lease))

    def _exchange(self, sent: Outgoing, lease: Lease, watched: Watched, way: Way,
                  with_id: Callable[[bytes, str], None] | None) -> Reply | None:
        """Send, read the head, and hand what is held to a RelayStream; None: its answer sends it elsewhere.

        Releases the lease if that fails.
        """
        limit_s = max(0.05, self.ways.left_s(way, lease))
        exchange, upstream = self._forwarder.send(sent, lease, watched, limit_s)
        local = not isinstance(lease, RemoteLease)
        if way.attempts.may_follow_status(upstream.head.status, local=local) and self.ways.another(way, lease):
            self._forwarder.drop(upstream, exchange, lease, watched)
            self._leave(way, lease, UpstreamError(f"it answered {upstream.head.status}",
                                                code=str(upstream.head.status)))
            return None
        idle_s = self.manager.settings.stream_idle_timeout_s
        on_first = _first_piece(with_id, lease)
        if self._forwarder.relayed(sent, upstream, exchange, lease, watched, on_first, idle_s):
            return Reply(upstream.head.status, [], TakenOver(lease))
        exchange.wait_for(idle_s)
        stream = RelayStream(upstream, exchange, lease, watched, on_first)
        if upstream.is_bodyless:
            stream.end_without_body()
        return Reply(upstream.head.status, upstream.head.headers, () if upstream.is_bodyless else stream)


def _check_path(path: str) -> None:
    """Raises Forbidden or BadRequest for what no engine and no other server is to read in any way of its own."""
    if paths.is_dev_mode(path):
        raise Forbidden(f"{path[:80]!r} is a development route of the engine and is never reachable through the "
                        "daemon; see the management routes instead", code="dev_mode_path")
    if paths.is_confusing(path):
        raise BadRequest("the path holds dot segments, empty segments or control characters", param="path",
                         code="invalid_path")


def _name_of(lease: Lease) -> str:
    """Of its backend, for people and labels."""
    return lease.server.config.name if isinstance(lease, RemoteLease) else lease.instance_id


def _cut_by(lease: Lease) -> str | None:
    """The code of the error that cut its request."""
    return None if lease.cut_error is None else lease.cut_error.code


def _first_piece(with_id: Callable[[bytes, str], None] | None, lease: Lease) -> Callable[[bytes], None] | None:
    return None if with_id is None else lambda piece: with_id(piece, lease.instance_id)


ANY = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]

blueprint = Blueprint("router", __name__)


def _router() -> Router:
    router: Router = current_app.extensions["router"]
    return router


def caller(incoming: Incoming) -> Key | None:
    """The key that came with a request, if it is one of those with limits."""
    return incoming.environ.get(limits.CALLER)


class EngineResponse(Response):
    """A reply as Flask passes it on: nothing is added to the engine's own headers."""

    default_mimetype = None
    automatically_set_content_length = False    # of an empty body: the engine's answer to HEAD may have another one

    def __init__(self, reply: Reply) -> None:
        super().__init__(reply.body, reply.status_code, reply.headers, direct_passthrough=True)

    def __call__(self, environ: Any, start_response: Any) -> Any:
        """Gives back what the body holds if the server refuses the head: nobody would iterate or close it then."""
        try:
            return super().__call__(environ, start_response)
        except BaseException:
            self.close()
            raise


def limited(view: Callable[..., Reply]) -> Callable[..., Response]:
    @wraps(view)
    def within_limits(**arguments: str) -> Response:
        return EngineResponse(_router().within_limits(request, lambda: view(**arguments)))
    return within_limits


def _by_model() -> Response:
    return EngineResponse(_router().view(request))


for _path in paths.BY_MODEL:
    blueprint.add_url_rule(_path, endpoint=_path.strip("/").replace("/", "_"), view_func=_by_model, methods=["POST"])


def _adapter() -> Response:
    return EngineResponse(_router().adapter(request, request.path))


for _path in paths.ADAPTERS:
    blueprint.add_url_rule(_path, endpoint=_path.strip("/").replace("/", "_"), view_func=_adapter, methods=["POST"])


# werkzeug keeps WebSocket requests apart from others: a path for both has two rules.
@blueprint.get(paths.REALTIME)
@blueprint.get(paths.REALTIME, websocket=True)
@limited
def realtime() -> Reply:
    return _router().realtime(request, request.args.get("model"))


@blueprint.get("/v1/responses/<response_id>")
@limited
def get_response(response_id: str) -> Reply:
    return _router().to_response_owner(request, response_id, request.path)


@blueprint.post("/v1/responses/<response_id>/cancel")
@limited
def cancel_response(response_id: str) -> Reply:
    return _router().to_response_owner(request, response_id, request.path)


@blueprint.route("/proxy/<instance_id>/", defaults={"path": ""}, methods=ANY)
@blueprint.route("/proxy/<instance_id>/<path:path>", methods=ANY)
@blueprint.get("/proxy/<instance_id>/<path:path>", websocket=True)
@limited
def proxy(instance_id: str, path: str) -> Reply:
    return _router().to_instance(request, instance_id, "/" + path)
