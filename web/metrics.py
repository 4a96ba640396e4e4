"""What is to be seen from outside of how it goes: GET /load-stats, GET /metrics, GET /prometheus/targets."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from typing import Any

from flask import Blueprint, Response, current_app, jsonify, request
from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
    SummaryMetricFamily,
)
from prometheus_client.registry import Collector

from instance_manager import InstanceManager
from instances.instance import Candidate, InstanceView, State
from router import Router
from routing import request_id
from routing.health import Status
from routing.incoming import Incoming
from routing.observed import ABOUT, About, Histogram
from routing.paths import BY_MODEL
from routing.remote import Origin, ServerView
from routing.reply import Reply
from web import asked, auth
from web.exposition import merged
from web.figures import Figures, shown
from web.live import live

blueprint = Blueprint("metrics", __name__)

PREFIX = "vllm_server_"
PATH_SHOWN = 200        # characters, in the list of requests
TEXT = "text/plain; version=0.0.4; charset=utf-8"
ENGINES_S = 5.0         # for all engines' pages together; who takes longer is not on the page
COUNTED = {
    "loads": "Instances begun to load", "restarts": "Instances started again after they failed",
    "failures": "Failures of instances, at the start or later",
    "cancelled_loads": "Loads that nobody waited for any more",
    "idle_stops": "Instances stopped because they idled", "sleeps": "Instances that fell asleep",
    "sleep_failures": "Sleeps that failed", "wakes": "Instances that woke",
    "wake_fallbacks": "Wakes that failed and became restarts",
    "memory_retries": "Starts that ran out of memory and were tried once more",
    "replicas_added": "Replicas made or woken because of load",
    "replicas_removed": "Replicas that fewer requests had no need of any more"}
"""Counters of the registry by name; those called evictions_... are one series with their reason."""


# --- routes -----------------------------------------------------------------------------------------------------------

@blueprint.get("/load-stats")
def load_stats() -> Response:
    router = asked.router()
    router.checker.refresh()
    ring = live().ring
    servers = [_instance_load(router, view) | _rates(ring.latest(view.id)) for view in router.manager.snapshot()
               if view.state is not State.STOPPED]
    servers += [_server_load(view) | _rates(None) for view in router.fleet.views()]
    return jsonify(servers=servers, summary=summary(servers), policy=router.manager.settings.routing_policy)


@blueprint.get("/metrics")
def metrics() -> Response:
    router = asked.router()
    router.checker.refresh()
    page = generate_latest(current_app.extensions["metrics"]).decode()
    if asked.flag("instances"):
        page = merged([({}, page), *_engine_pages(router)])
    return Response(page, content_type=TEXT)


@blueprint.get("/prometheus/targets")
def targets() -> Response:
    """For Prometheus' http_sd: this daemon, its instances behind it, and the servers."""
    router, host = asked.router(), request.host
    found = [_target(host, "/metrics", kind="daemon", instance=host)]
    for view in router.manager.snapshot():
        if view.state is State.READY:
            found.append(_target(host, f"/proxy/{view.id}/metrics", kind="instance", instance=view.id,
                                 model=view.names[0]))
    for server in router.fleet.views():
        if not server.leaving:
            scheme, _, rest = server.url.partition("://")
            address, _, prefix = rest.partition("/")
            path = f"/{prefix}/metrics" if prefix else "/metrics"
            found.append(_target(address, path, __scheme__=scheme, kind="server", instance=server.name))
    return jsonify(found)


def _target(address: str, path: str, **labels: str) -> dict[str, Any]:
    return {"targets": [address], "labels": {"__metrics_path__": path, **labels}}


def _engine_pages(router: Router) -> Iterator[tuple[Mapping[str, str], str]]:
    ready = {view.id: view for view in router.manager.snapshot() if view.state is State.READY and view.port}
    answers = router.checker.ask_all({view.id: Origin.local(view.port or 0) for view in ready.values()}, "/metrics",
                                     ENGINES_S)
    for instance_id, answer in answers.items():
        if answer.status == 200:
            yield {"instance": instance_id, "model": ready[instance_id].names[0]}, answer.body.decode(errors="replace")


# --- load -------------------------------------------------------------------------------------------------------------

def _instance_load(router: Router, view: InstanceView) -> dict[str, Any]:
    backend, reading, circuit = router.balancer.local_view(Candidate(view.id, view.state, view.in_flight))
    return _load(
        id=view.id, kind="instance", url=None, health=str(view.state), why=view.why, serving=view.state is State.READY,
        running=backend.running, waiting=backend.waiting, in_flight=view.in_flight, capacity=int(backend.capacity),
        weight=1.0, cache_usage=reading.cache_usage if reading else None, circuit=circuit.state(time.monotonic()),
        models=sorted(view.names),
        updated_at=time.time() - (time.monotonic() - reading.at) if reading else None)


def _rates(figures: Figures | None) -> dict[str, Any]:
    """None: of a server on another machine, which nobody samples."""
    found = shown(figures) if figures is not None else {}
    return {name: found.get(name) for name in ("tokens_per_s", "prompt_tokens_per_s", "requests_per_s", "ttft_s")}


def _server_load(view: ServerView) -> dict[str, Any]:
    return _load(
        id=view.name, kind="server", url=view.url, health="leaving" if view.leaving else str(view.status), why=view.why,
        serving=view.status is not Status.DOWN and not view.leaving, running=view.running, waiting=view.waiting,
        in_flight=view.in_flight, capacity=view.capacity, weight=view.weight, cache_usage=view.cache_usage,
        circuit=view.circuit, models=sorted(view.models), updated_at=view.checked_at)


def _load(*, running: float, waiting: float, capacity: int, serving: bool, updated_at: float | None,
          **more: Any) -> dict[str, Any]:
    """Also under the names that mvllm has for some of it."""
    utilization = (running + waiting * 0.5) / capacity
    return more | {
        "status": serving, "running": running, "waiting": waiting, "capacity": capacity,
        "utilization": round(utilization, 4), "current_load": running + waiting, "max_capacity": capacity,
        "available_capacity": max(0, capacity - running - waiting),
        "utilization_percent": round(100 * utilization, 1),
        "last_updated": None if updated_at is None else datetime.fromtimestamp(updated_at, UTC).isoformat()}


def summary(servers: list[dict[str, Any]]) -> dict[str, Any]:
    """Of the entries of `servers`; capacity and load are those of the ones that serve."""
    serving = [one for one in servers if one["status"]]
    capacity = sum(one["capacity"] for one in serving)
    load = sum(one["running"] + one["waiting"] * 0.5 for one in serving)
    return {
        "total_servers": len(servers), "healthy_servers": len(serving),
        "total_running": sum(one["running"] for one in serving),
        "total_waiting": sum(one["waiting"] for one in serving),
        "total_active_load": sum(one["current_load"] for one in serving), "total_capacity": capacity,
        "overall_utilization_percent": round(100 * load / capacity, 1) if capacity else 0.0}


# --- requests, as they are answered -----------------------------------------------------------------------------------

def begin(incoming: Incoming) -> None:
    incoming.environ[ABOUT] = About(time.monotonic())


def count(router: Router, incoming: Incoming, response: Response | Reply) -> None:
    """The answer to a data request; its head goes out now."""
    about: About | None = incoming.environ.get(ABOUT)
    by_model = incoming.method == "POST" and incoming.path in BY_MODEL     # it may not have come through Flask's map
    if about is not None and (by_model or getattr(incoming, "blueprint", None) == "router"):
        key = auth.caller(incoming)
        about.key = None if key is None else key.name
        about.path, about.request_id = incoming.path[:PATH_SHOWN], request_id.current()
        router.observed.answered(about, about.status or response.status_code, time.monotonic())


# --- series -----------------------------------------------------------------------------------------------------------

def registry_of(manager: InstanceManager, router: Router, about: Mapping[str, Any]) -> CollectorRegistry:
    """One of its own: nothing else in the process can add to it."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(DaemonCollector(manager, router, about))
    ProcessCollector(registry=registry)
    return registry


class DaemonCollector(Collector):
    """Asked for each page; what it yields is listed in docs/METRICS.md."""

    def __init__(self, manager: InstanceManager, router: Router, about: Mapping[str, Any]) -> None:
        self._manager = manager
        self._router = router
        self._about = about

    def collect(self) -> Iterator[Metric]:
        views, servers = self._manager.snapshot(), self._router.fleet.views()
        yield InfoMetricFamily(PREFIX.rstrip("_"), "The daemon", value={
            "version": str(self._about["version"]), "simulated": str(self._about["simulated"]).lower()})
        yield from self._requests(views, servers)
        yield from self._backends(views, servers)
        yield from self._events(views)
        yield from self._devices(views)

    def _requests(self, views: list[InstanceView], servers: list[ServerView]) -> Iterator[Metric]:
        seen = self._router.observed.seen({*(view.id for view in views), *(one.name for one in servers)})
        answers = CounterMetricFamily(PREFIX + "requests", "Requests for a model, as they were answered",
                                      labels=("model", "backend", "status"))
        for key, number in seen.answers.items():
            answers.add_metric(key, number)
        yield answers
        yield _counter("key_requests", "Requests that came with a key, as they were answered",
                       {(key, status): number for (key, status), number in seen.by_key.items()}, ("key", "status"))
        yield _counter("retries", "Requests that went to another backend, by why they left the first",
                       {(why,): number for why, number in seen.retries.items()}, ("reason",))
        yield _histogram("time_to_first_byte_seconds", "From a request to the first byte of its answer",
                         seen.first_byte)
        yield _histogram("request_seconds", "From a request to the end of its answer", seen.whole)
        yield _gauge("requests_in_flight", "Requests that a backend is answering", {
            **{(view.id,): view.in_flight for view in views}, **{(one.name,): one.in_flight for one in servers}},
            ("backend",))
        yield _gauge("requests_waiting", "Requests that wait for their model to be ready", {
            (name,): number for name, number in self._manager.queues().items()}, ("model",))
        yield _gauge("streams", "Connections that relays carry", {(): self._router.streams()})

    def _backends(self, views: list[InstanceView], servers: list[ServerView]) -> Iterator[Metric]:
        loads = [_instance_load(self._router, view) for view in views] + [_server_load(one) for one in servers]
        for name, what, key in (
                ("up", "Whether a backend takes requests", "status"),
                ("running", "Requests that it runs: what it said last, and what it was sent since", "running"),
                ("waiting", "Requests that wait there", "waiting"),
                ("capacity", "Requests at once that it is meant for", "capacity"),
                ("utilization_ratio", "(running + waiting / 2) / capacity", "utilization"),
                ("cache_usage_ratio", "Use of its KV cache", "cache_usage")):
            yield _gauge(f"backend_{name}", what, {(one["id"], one["kind"]): float(one[key]) for one in loads
                                                   if one[key] is not None}, ("backend", "kind"))
        yield _gauge("backend_circuit_open", "Whether its circuit breaker is open or half open", {
            (one["id"], one["kind"]): float(one["circuit"] != "closed") for one in loads}, ("backend", "kind"))
        yield _counter("server_answers", "Answers of a server that were no failures",
                       {(one.name,): one.answers for one in servers}, ("backend",))
        yield _counter("server_failures", "Requests that failed at a server, whether they were tried elsewhere or not",
                       {(one.name,): one.failures for one in servers}, ("backend",))

    def _events(self, views: list[InstanceView]) -> Iterator[Metric]:
        counters = self._manager.counters
        for name, what in COUNTED.items():
            yield _counter(name, what, {(): counters.get(name, 0)})
        reasons = {name.removeprefix("evictions_"): number for name, number in counters.items()
                   if name.startswith("evictions_")}
        yield _counter("evictions", "Instances that made room for others: idle, in use, or for sleepers' host memory",
                       {(reason,): number for reason, number in reasons.items()}, ("reason",))
        for name, what in (("load", "From the beginning of a start until it was ready"),
                           ("wake", "From the beginning of a wake until it was ready"),
                           ("swap", "From when a model sought room that others had to leave until it was ready")):
            number, total_s = self._manager.seconds.get(name, (0, 0.0))
            yield SummaryMetricFamily(f"{PREFIX}{name}_seconds", what, count_value=number, sum_value=total_s)
        yield _gauge("replicas", "Replicas of a model whose number follows its load", {
            (model, what): number for model, one in self._manager.replicas().items()
            for what, number in (("running", one.running), ("wanted", one.wanted))}, ("model", "which"))
        states = Counter(str(view.state) for view in views)
        yield _gauge("instances", "Instances by status", {(str(state),): states[str(state)] for state in State
                                                          if state is not State.STOPPED}, ("status",))

    def _devices(self, views: list[InstanceView]) -> Iterator[Metric]:
        devices = self._manager.devices.read(time.monotonic()).devices
        yield _gauge("device_memory_bytes", "Memory of a device", {
            (str(one.index), one.kind, what): number for one in devices if one.error is None
            for what, number in (("total", one.total_bytes), ("used", one.used_bytes), ("free", one.free_bytes))},
            ("device", "kind", "memory"))
        yield _gauge("device_utilization_ratio", "How busy a device is", {
            (str(one.index), one.kind): one.utilization for one in devices if one.utilization is not None},
            ("device", "kind"))
        yield _gauge("instance_memory_bytes", "Memory of an instance on each of its devices", {
            (view.id, view.names[0], what): number for view in views
            for what, number in (("planned", view.memory_planned_bytes), ("measured", view.memory_measured_bytes))
            if number is not None}, ("backend", "model", "memory"))


def _gauge(name: str, what: str, values: Mapping[tuple[str, ...], float], labels: tuple[str, ...] = ()) -> Metric:
    family = GaugeMetricFamily(PREFIX + name, what, labels=labels)
    for key, value in values.items():
        family.add_metric(key, value)
    return family


def _counter(name: str, what: str, values: Mapping[tuple[str, ...], float], labels: tuple[str, ...] = ()) -> Metric:
    family = CounterMetricFamily(PREFIX + name, what, labels=labels)
    for key, value in values.items():
        family.add_metric(key, value)
    return family


def _histogram(name: str, what: str, by_model: Mapping[str, Histogram]) -> Metric:
    family = HistogramMetricFamily(PREFIX + name, what, labels=("model",))
    for model, one in by_model.items():
        total, buckets = 0, []
        for bound, number in zip((*map(str, one.bounds), "+Inf"), one.counts, strict=True):
            total += number
            buckets.append((bound, total))
        family.add_metric((model,), buckets, one.total[0])
    return family
