"""The vLLM servers on other machines: which there are, what they serve, how they are, and leases on them.

The counterpart of the instances' registry for servers that are not ours to start or stop: under one lock, with no I/O.
Checks (routing/checker.py) and requests (router.py) report here; a server's snapshot is made anew whenever something
of it changes, so that choosing among many only reads.
"""

from __future__ import annotations

import logging
import ssl
import threading
import time
from bisect import bisect_left
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from functools import lru_cache
from types import MappingProxyType
from typing import NamedTuple
from urllib.parse import urlsplit

from configuration.servers import ServerConfig, ServersConfig
from errors import NotReady, ServerLost
from instances.instance import Lease
from routing.circuit import CLOSED
from routing.health import Health, Status
from routing.policies import Backend, Reading, hash64, projected
from routing.scrape import Gauges, Offered

log = logging.getLogger("vllm_server.fleet")

BUSY_S = 1.0            # without Retry-After
BUSY_LIMIT_S = 60.0     # no server is left alone for longer than this because of one answer


class Outcome(Enum):
    """What a request says about the backend that got it."""

    GOOD = "good"
    BUSY = "busy"           # 429, 503: it lives and wants less
    STALE = "stale"         # 404: it lives, and may have other models than it last said
    FAILED = "failed"       # no answer, a broken one, or a 5xx
    UNKNOWN = "unknown"     # the client left first, say


@dataclass(frozen=True)
class Origin:
    """Where a backend's requests go, and what they carry.  `tls` None: plain http."""

    base: str
    host: str
    port: int
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    tls: ssl.SSLContext | None = field(default=None, repr=False)

    @staticmethod
    @lru_cache(maxsize=1024)
    def local(port: int) -> Origin:
        return Origin(f"http://127.0.0.1:{port}", "127.0.0.1", port)

    @staticmethod
    def of(config: ServerConfig) -> Origin:
        parts = urlsplit(config.url)
        assert parts.hostname is not None and parts.port is not None
        headers = dict(config.headers)
        if config.api_key is not None:
            headers["Authorization"] = f"Bearer {config.api_key}"
        return Origin(config.url, parts.hostname, parts.port, MappingProxyType(headers), _tls(config))


def _tls(config: ServerConfig) -> ssl.SSLContext | None:
    if not config.url.startswith("https:"):
        return None
    context = ssl.create_default_context(cafile=str(config.ca) if config.ca is not None else None)
    if not config.verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


class RemoteLease(Lease):
    """The right to send one request to a server.  `instance_id` is the server's url.

    `answered`: the head of the answer is there; until then the request may still go elsewhere.  `cold`: the server has
    to load the model first.
    """

    def __init__(self, server: Server, model: str, release: Callable[[Lease, bool], None]) -> None:
        super().__init__(server.url, server.origin.port, release)
        self.server = server
        self.origin = server.origin
        self.model = model
        self.cold = model in server.offered and not server.offered[model].warm
        self.answered = False


class Check(NamedTuple):
    """How a check of a server went.  `offered` None: it was not asked, or its answer was no list."""

    ok: bool
    why: str = ""
    offered: Mapping[str, Offered] | None = None


class Server:
    """One server.  Every field is written under the fleet's lock; `view` may be read without it."""

    def __init__(self, config: ServerConfig) -> None:
        self.seed = hash64(config.url)
        self.health = Health()
        self.circuit = CLOSED
        self.reading: Reading | None = None
        self.offered: Mapping[str, Offered] = {}
        self.busy: dict[str, float] = {}        # model -> until when it wants nothing (monotonic)
        self.leases: set[RemoteLease] = set()
        self.picked = 0
        self.leaving = False                    # no longer in the file; finishes what it has
        self.checked_at: float | None = None    # wall clock
        self.answers = self.failures = 0        # of requests, since it was listed
        self.configure(config)

    def configure(self, config: ServerConfig) -> None:
        self.config = config
        self.origin = Origin.of(config)
        if config.models is not None:
            self.offered = {name: Offered(warm=True) for name in config.models}
        self.refresh()

    @property
    def url(self) -> str:
        return self.config.url

    def refresh(self) -> None:
        """Make the snapshot anew."""
        own = len(self.leases)
        running, waiting = projected(self.reading, own, self.config.max_concurrent_requests)
        out = self.leaving or self.health.status is Status.DOWN
        self.view = Backend(
            id=self.config.url, capacity=self.config.max_concurrent_requests, running=running, waiting=waiting, own=own,
            weight=self.config.weight, seed=self.seed, picked=self.picked, out=out,
            suspect=self.health.status is Status.SUSPECT, open_until=self.circuit.blocked_until)

    def is_busy(self, model: str, now: float) -> bool:
        return bool(self.busy) and self.busy.get(model, 0.0) > now


class Pool:
    """The servers of one model, in the order of their seeds."""

    def __init__(self, servers: Collection[Server] = ()) -> None:
        self.servers = tuple(sorted(servers, key=lambda one: one.seed))
        self._seeds = [one.seed for one in self.servers]

    def __len__(self) -> int:
        return len(self.servers)

    def around(self, place: float) -> Iterator[Server]:
        """All of them, from a place on: a key's 64 bits, or a share (0 to 1) of the way round."""
        count = len(self.servers)
        start = bisect_left(self._seeds, place) if place > 1 else int(place * count)
        for index in range(start, start + count):
            yield self.servers[index % count]


class Pools(NamedTuple):
    """`warm` ones answer at once, `cold` ones load the model first."""

    warm: Pool
    cold: Pool


NOBODY = Pools(Pool(), Pool())


@dataclass(frozen=True)
class ServerView:
    """A server for readers.  Times `*_at` are wall clock seconds."""

    url: str
    name: str
    status: Status
    why: str
    circuit: str
    leaving: bool
    running: float
    waiting: float
    capacity: int
    weight: float
    utilisation: float
    in_flight: int
    cache_usage: float | None
    models: Mapping[str, Offered]
    checked_at: float | None
    answers: int
    failures: int


class Fleet:
    """Thread-safe.  Called outside the lock: `on_change` when servers came, went or were reconfigured, `on_failure`
    when a request failed at one."""

    def __init__(self, config: ServersConfig | None = None, *, name: str = "vllm-server",
                 clock: Callable[[], float] = time.monotonic, wall: Callable[[], float] = time.time) -> None:
        self.name = name                        # among vllm-servers: what they find a loop by
        self.on_change: Callable[[], None] = lambda: None
        self.on_failure: Callable[[str], None] = lambda url: None
        self.config = ServersConfig()
        self._clock = clock
        self._wall = wall
        self._lock = threading.Lock()
        self._servers: dict[str, Server] = {}
        self._leaving: dict[str, Server] = {}
        self._pools: dict[str, Pools] = {}
        self._picks = 0
        if config is not None:
            self.use(config)

    # --- configuration --------------------------------------------------------------------------------------------

    def use(self, config: ServersConfig) -> list[str]:
        """Go over to this list; what did not change is not touched.  One line for each change."""
        changes: list[str] = []
        with self._lock:
            wanted = {server.url: server for server in config.servers}
            for url in self._servers.keys() - wanted.keys():
                changes.append(f"{url} leaves")
                self._remove(self._servers.pop(url))
            for url, server in wanted.items():
                if url not in self._servers:
                    changes.append(f"{url} joins")
                    self._join(server)
                elif self._servers[url].config != server:
                    changes.append(f"{url} has changed")
                    self._reconfigure(self._servers[url], server)
            for name in ("health_check_interval_s", "request_timeout_s", "max_retries"):
                if getattr(config, name) != getattr(self.config, name):
                    changes.append(f"{name.removesuffix('_s')} is {getattr(config, name):g}")
            self.config = config
        self.on_change()
        return changes

    def _join(self, config: ServerConfig) -> None:
        server = self._leaving.pop(config.url, None)
        if server is None:
            server = Server(config)
        else:
            server.leaving = False
            server.configure(config)
        self._servers[config.url] = server
        self._forget_pools(server.offered)

    def _reconfigure(self, server: Server, config: ServerConfig) -> None:
        before = server.offered
        server.configure(config)
        self._forget_pools({*before, *server.offered})

    def _remove(self, server: Server) -> None:
        server.leaving = True
        server.refresh()
        self._forget_pools(server.offered)
        if server.leases:
            self._leaving[server.url] = server

    # --- choosing -------------------------------------------------------------------------------------------------

    def pools(self, model: str) -> Pools:
        """The servers that offer a model."""
        if not self._servers:
            return NOBODY
        found = self._pools.get(model)
        return found if found is not None else self._made_pools(model)

    def _made_pools(self, model: str) -> Pools:
        with self._lock:
            offering = [(one, one.offered[model]) for one in self._servers.values() if model in one.offered]
            if not offering:
                return NOBODY       # not kept: clients may ask for anything
            pools = Pools(Pool([one for one, offer in offering if offer.warm]),
                          Pool([one for one, offer in offering if not offer.warm]))
            self._pools[model] = pools
            return pools

    def _forget_pools(self, models: Collection[str]) -> None:
        for model in models:
            self._pools.pop(model, None)

    def lease(self, url: str, model: str) -> RemoteLease:
        """The right to send a server one request.  Raises NotReady when it takes none now: pick again."""
        with self._lock:
            server = self._servers.get(url)
            if server is None or server.view.out:
                raise NotReady(f"the server {url} takes no requests now")
            lease = RemoteLease(server, model, self._release)
            server.leases.add(lease)
            self._picks += 1
            server.picked = self._picks
            server.circuit = server.circuit.entered()
            server.refresh()
            return lease

    def _release(self, lease: Lease, ok: bool) -> None:
        assert isinstance(lease, RemoteLease)
        server = lease.server
        with self._lock:
            if lease not in server.leases:
                return
            server.leases.discard(lease)
            if ok:
                server.circuit = server.circuit.succeeded()
            else:
                server.circuit = server.circuit.left()
            server.refresh()
            if server.leaving and not server.leases and self._leaving.get(server.url) is server:
                del self._leaving[server.url]

    # --- what requests and checks report --------------------------------------------------------------------------

    def note_outcome(self, lease: RemoteLease, outcome: Outcome, retry_after_s: float | None = None) -> None:
        """How an exchange went, before its lease is released."""
        server = lease.server
        now = self._clock()
        with self._lock:
            if outcome in (Outcome.GOOD, Outcome.STALE):
                server.answers += 1
                server.circuit = server.circuit.succeeded()
                server.busy.pop(lease.model, None)
            elif outcome is Outcome.BUSY:
                server.busy[lease.model] = now + min(BUSY_S if retry_after_s is None else retry_after_s, BUSY_LIMIT_S)
            elif outcome is Outcome.FAILED:
                server.failures += 1
                was_open = server.circuit.is_open
                server.circuit = server.circuit.failed(now, self.config.health_check_interval_s)
                if server.circuit.is_open and not was_open:
                    log.warning("%s: %d requests in a row failed there; it gets one now and then until one succeeds",
                                server.url, server.circuit.failures)
            server.refresh()
        if outcome in (Outcome.FAILED, Outcome.STALE):
            self.on_failure(server.url)

    def in_flight(self, url: str) -> int:
        server = self._servers.get(url)
        return len(server.leases) if server is not None else 0

    def note_check(self, url: str, check: Check) -> None:
        """A check has ended.  When it takes the server down, its requests without an answer go elsewhere."""
        lost: list[RemoteLease] = []
        with self._lock:
            server = self._servers.get(url)
            if server is None:
                return
            before = server.health.status
            server.health = server.health.succeeded() if check.ok else server.health.failed(check.why)
            server.checked_at = self._wall()
            if server.health.status is Status.DOWN:
                server.reading = None
                lost = [lease for lease in server.leases if not lease.answered]
            elif before is Status.DOWN:
                server.circuit = CLOSED
            if check.offered is not None and server.config.models is None:
                self._offer(server, check.offered)
            server.refresh()
            now = server.health
        if now.status is not before:
            level = logging.INFO if now.status is Status.UP else logging.WARNING
            log.log(level, "%s: %s -> %s (%s)", url, before, now.status, now.why)
        for lease in lost:
            lease.cut(ServerLost(f"the server {url} is down: {now.why}"))

    def note_load(self, url: str, found: Gauges, own: float) -> None:
        """A reading of its load, `own` of whose requests were ours."""
        with self._lock:
            server = self._servers.get(url)
            if server is not None and server.health.status is not Status.DOWN:
                server.reading = Reading(self._clock(), found.running, found.waiting, own, found.cache_usage)
                server.refresh()

    def _offer(self, server: Server, offered: Mapping[str, Offered]) -> None:
        if offered != server.offered:
            self._forget_pools([name for name in {*offered, *server.offered}
                                if offered.get(name) != server.offered.get(name)])
            server.offered = offered

    # --- readers --------------------------------------------------------------------------------------------------

    def urls(self) -> list[str]:
        """Of the servers that are in the file."""
        with self._lock:
            return list(self._servers)

    def origin(self, url: str) -> Origin | None:
        server = self._servers.get(url)
        return server.origin if server is not None else None

    def health(self, url: str) -> Health | None:
        server = self._servers.get(url)
        return server.health if server is not None else None

    def views(self) -> list[ServerView]:
        """All in the file's order, then those that leave."""
        with self._lock:
            now = self._clock()
            return [_view(one, now) for one in (*self._servers.values(), *self._leaving.values())]

    def models(self) -> dict[str, Offered]:
        """Every model that some server offers: warm where one is, on the shortest path."""
        with self._lock:
            best: dict[str, Offered] = {}
            for server in self._servers.values():
                for name, offer in server.offered.items():
                    known = best.get(name)
                    if known is None or (not offer.warm, len(offer.path)) < (not known.warm, len(known.path)):
                        best[name] = offer
            return best

    def total_in_flight(self) -> int:
        with self._lock:
            return sum(len(one.leases) for one in (*self._servers.values(), *self._leaving.values()))


def _view(server: Server, now: float) -> ServerView:
    view = server.view
    return ServerView(
        url=server.url, name=server.config.name, status=server.health.status, why=server.health.why,
        circuit=server.circuit.state(now), leaving=server.leaving, running=view.running, waiting=view.waiting,
        capacity=server.config.max_concurrent_requests, weight=server.config.weight, utilisation=view.utilisation,
        in_flight=len(server.leases), cache_usage=server.reading.cache_usage if server.reading else None,
        models=server.offered, checked_at=server.checked_at, answers=server.answers, failures=server.failures)
