"""routing/ways.py: who a request may go to, and what it is told when there is nobody."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from configuration.servers import ServerConfig, ServersConfig
from errors import (
    BackendsBusy,
    LoadFailed,
    LoopDetected,
    ModelNotFound,
    NoServer,
    NotFound,
    NotReady,
    ServerLost,
    ShuttingDown,
    UpstreamError,
)
from instances.instance import Candidate, Lease, State
from routing.balancer import Balancer
from routing.circuit import FAILURES
from routing.remote import Check, Outcome, RemoteLease
from routing.ways import Ways
from tests.test_remote import A, B, Clock, fleet_of, server, serving


class Manager:
    """A registry with these instances of every model."""

    def __init__(self, *candidates: Candidate, error: Exception | None = None) -> None:
        self.there = list(candidates)
        self.error = error
        self.demanded = 0
        self.settings = SimpleNamespace(request_timeout_s=1000.0, catalog=SimpleNamespace(find=lambda name: None))

    def candidates(self, name: str) -> list[Candidate]:
        return self.there

    def demand(self, name: str) -> list[Candidate]:
        self.demanded += 1
        if self.error is not None:
            raise self.error
        return self.there

    def model_names(self) -> list[str]:
        return ["here"]

    def loadable(self) -> list[Any]:
        return [SimpleNamespace(names=("loadable", "alias"))]

    def lease(self, instance_id: str) -> Lease:
        return Lease(instance_id, 1, lambda lease, ok: None)


def ways(manager: Manager, *servers: ServerConfig, clock: Clock | None = None, **options: Any) -> tuple[Ways, Balancer]:
    clock = clock or Clock()
    balancer = Balancer(serving(fleet_of(*servers, clock=clock)), clock=clock, **options)
    return Ways(cast(Any, manager), balancer), balancer


def ready(name: str = "x") -> Candidate:
    return Candidate(name, State.READY, 0)


def granted(way_of: Ways, model: str = "m") -> Lease | None:
    way = way_of.to_model(model)
    return way_of.grant(way, way.goal.backends())


def test_an_instance_or_a_server() -> None:
    lease = granted(ways(Manager(ready()))[0])
    assert lease is not None and lease.instance_id == "x"
    lease = granted(ways(Manager(), server(A))[0])
    assert isinstance(lease, RemoteLease) and lease.instance_id == A


def test_nobody_has_it() -> None:
    way_of, _ = ways(Manager(), server(A))
    with pytest.raises(ModelNotFound, match="here, loadable, alias, m"):
        granted(way_of, "other")


def test_it_is_loaded_here_although_a_server_has_it_unless_that_is_as_good() -> None:
    manager = Manager()
    granted(ways(manager, server(A))[0])
    assert manager.demanded == 1
    manager = Manager()
    way_of, balancer = ways(manager, server(A, capacity=1), prefer_local=False)
    granted(way_of)
    assert manager.demanded == 0
    granted(way_of)         # the server is full now
    assert manager.demanded == 1


def test_a_failure_to_load_it_here_is_told_only_if_no_server_can_help() -> None:
    manager = Manager(error=LoadFailed("no memory", code="no_gpu_memory"))
    way_of, balancer = ways(manager, server(A))
    assert isinstance(granted(way_of), RemoteLease)
    for _ in range(2):
        balancer.fleet.note_check(A, Check(False, "gone"))
    with pytest.raises(LoadFailed, match="no memory"):
        granted(way_of)
    with pytest.raises(ShuttingDown):
        granted(ways(Manager(error=ShuttingDown("the daemon ends")), server(A))[0])


def test_all_servers_are_down_or_busy() -> None:
    clock = Clock()
    way_of, balancer = ways(Manager(), server(A), server(B), clock=clock)
    balancer.note_outcome(balancer.fleet.lease(A, "m"), Outcome.BUSY, 9)
    balancer.note_outcome(balancer.fleet.lease(B, "m"), Outcome.BUSY, 5)
    with pytest.raises(BackendsBusy) as busy:
        granted(way_of)
    assert (busy.value.status, busy.value.retry_after_s) == (429, 5)
    for url in (A, B, A, B):
        balancer.fleet.note_check(url, Check(False, "switched off"))
    clock.now += 10
    with pytest.raises(NoServer, match="a:1: switched off") as down:
        granted(way_of)
    assert down.value.status == 503 and down.value.retry_after_s == 10


def test_what_loads_here_is_waited_for_even_if_all_servers_are_down() -> None:
    way_of, balancer = ways(Manager(Candidate("x", State.STARTING, 0)), server(A))
    for _ in range(2):
        balancer.fleet.note_check(A, Check(False, "gone"))
    assert granted(way_of) is None


def test_a_request_that_has_been_everywhere_is_told_what_happened_last() -> None:
    way_of, _ = ways(Manager(), server(A))
    way = way_of.to_model("m")
    lease = way_of.grant(way, way.goal.backends())
    assert lease is not None and not way_of.another(way, lease)
    way.attempts.leave(A, UpstreamError("it broke"))
    with pytest.raises(UpstreamError, match="it broke"):
        way_of.grant(way, way.goal.backends())


def test_another_one_needs_time_too() -> None:
    clock = Clock()
    manager = Manager()
    balancer = Balancer(serving(fleet_of(server(A), server(B), clock=clock, request_timeout_s=1e-9)), clock=clock)
    way_of = Ways(cast(Any, manager), balancer)
    way = way_of.to_model("m")
    lease = way_of.grant(way, [])
    assert lease is not None
    way_of.left_s(way, lease)
    assert not way_of.another(way, lease)


def test_one_backend_and_no_other() -> None:
    way_of, balancer = ways(Manager(), server(A))
    way = way_of.to_one(A)
    lease = way_of.grant(way, way.goal.backends())
    assert lease is not None and lease.instance_id == A and not way_of.another(way, lease)
    balancer.fleet.use(ServersConfig())
    with pytest.raises(ServerLost):
        way_of.grant(way, [])


def test_a_loop_is_found() -> None:
    way_of, _ = ways(Manager(), server(A))
    with pytest.raises(LoopDetected):
        way_of.to_model("m", via="1.1 other, 1.1 me")


def test_a_probe_of_an_instance_that_ends_without_a_word_frees_the_way() -> None:
    clock = Clock()
    way_of, balancer = ways(Manager(ready("x")), clock=clock)
    for _ in range(FAILURES):
        balancer.note_pick("x")
        balancer.note_outcome("x", Outcome.FAILED)
    clock.now += 60
    way = way_of.to_model("m")
    lease = way_of.grant(way, [ready("x"), ready("y")])
    while lease is not None and lease.instance_id != "x":
        lease = way_of.grant(way, [ready("x"), ready("y")])
    assert lease is not None
    assert balancer.local_view(ready("x"))[2].probing
    lease.release()         # a WebSocket's, say
    assert not balancer.local_view(ready("x"))[2].probing


def test_a_server_that_has_just_gone_is_chosen_no_more() -> None:
    way_of, balancer = ways(Manager(), server(A))
    balancer.fleet.use(ServersConfig())
    with pytest.raises((NotFound, NotReady)):
        granted(way_of)
