"""routing/remote.py: the servers there are, what they serve, and leases on them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from configuration.servers import ServerConfig, ServersConfig
from errors import NotReady, ServerLost
from routing.circuit import FAILURES
from routing.health import Status
from routing.remote import NOBODY, Check, Fleet, Outcome, Pool, RemoteLease, Server
from routing.scrape import Gauges, Offered

A, B, C = "http://a:1", "http://b:1", "http://c:1"


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def server(url: str, capacity: int = 4, **more: Any) -> ServerConfig:
    return ServerConfig(url, capacity, **more)


def fleet_of(*servers: ServerConfig, clock: Clock | None = None, **config: Any) -> Fleet:
    return Fleet(ServersConfig(servers, **config), name="me", clock=clock or Clock(), wall=lambda: 5.0)


def serving(fleet: Fleet, models: Mapping[str, Offered] | None = None) -> Fleet:
    """All of them up, with model m unless told."""
    for url in fleet.urls():
        fleet.note_check(url, Check(True, offered={"m": Offered(True)} if models is None else models))
    return fleet


def urls(pool: Pool) -> set[str]:
    return {one.url for one in pool.servers}


def view(fleet: Fleet, url: str) -> Any:
    [found] = [one for one in fleet.views() if one.url == url]
    return found


# --- what they serve --------------------------------------------------------------------------------------------------

def test_servers_are_found_by_what_they_list() -> None:
    fleet = fleet_of(server(A), server(B))
    assert fleet.pools("m") is NOBODY
    fleet.note_check(A, Check(True, offered={"m": Offered(True), "n": Offered(False)}))
    fleet.note_check(B, Check(True, offered={"m": Offered(True)}))
    assert urls(fleet.pools("m").warm) == {A, B} and not len(fleet.pools("m").cold)
    assert urls(fleet.pools("n").cold) == {A} and not len(fleet.pools("n").warm)


def test_a_list_is_kept_fresh() -> None:
    fleet = serving(fleet_of(server(A), server(B)))
    assert urls(fleet.pools("m").warm) == {A, B}
    fleet.note_check(A, Check(True, offered={"m": Offered(False)}))
    assert (urls(fleet.pools("m").warm), urls(fleet.pools("m").cold)) == ({B}, {A})
    fleet.note_check(B, Check(True, offered={}))
    assert not len(fleet.pools("m").warm)
    fleet.note_check(A, Check(True))            # was not asked this time
    assert urls(fleet.pools("m").cold) == {A}


def test_models_that_the_file_names_are_served_from_the_start_and_for_good() -> None:
    fleet = fleet_of(server(A, models=("x", "y")))
    assert urls(fleet.pools("x").warm) == {A}
    fleet.note_check(A, Check(True, offered={"z": Offered(True)}))
    assert urls(fleet.pools("y").warm) == {A} and fleet.pools("z") is NOBODY


def test_all_models_with_the_warmest_and_shortest_way() -> None:
    fleet = fleet_of(server(A), server(B))
    fleet.note_check(A, Check(True, offered={"m": Offered(False), "n": Offered(True, ("s1", "s2"))}))
    fleet.note_check(B, Check(True, offered={"m": Offered(True, ("s3",)), "n": Offered(True, ("s3",))}))
    assert fleet.models() == {"m": Offered(True, ("s3",)), "n": Offered(True, ("s3",))}


# --- leases -----------------------------------------------------------------------------------------------------------

def test_a_lease_counts_until_it_is_released_once() -> None:
    fleet = serving(fleet_of(server(A)))
    first, second = fleet.lease(A, "m"), fleet.lease(A, "m")
    assert view(fleet, A).in_flight == 2 and view(fleet, A).utilisation == 0.5
    first.release(ok=True)
    first.release()
    assert view(fleet, A).in_flight == 1
    second.release()
    assert view(fleet, A).in_flight == 0 and fleet.total_in_flight() == 0


def test_its_origin_carries_what_the_file_says() -> None:
    fleet = fleet_of(server("https://a:443/vllm", api_key="k", headers={"X-Team": "blue"}, verify=False))
    origin = fleet.lease("https://a:443/vllm", "m").origin
    assert origin.base == "https://a:443/vllm" and origin.tls is not None and not origin.tls.check_hostname
    assert dict(origin.headers) == {"X-Team": "blue", "Authorization": "Bearer k"}
    assert "Bearer" not in repr(origin)


def test_an_estimate_of_the_load_follows_every_lease() -> None:
    fleet = serving(fleet_of(server(A, capacity=4)))
    mine = [fleet.lease(A, "m") for _ in range(2)]
    fleet.note_load(A, Gauges(running=3, waiting=0, cache_usage=0.5), own=2)
    assert view(fleet, A).running == 3          # two of ours, one of somebody else
    mine.append(fleet.lease(A, "m"))
    assert view(fleet, A).running == 4
    for lease in mine:
        lease.release()
    assert view(fleet, A).running == 1 and view(fleet, A).cache_usage == 0.5


# --- health -----------------------------------------------------------------------------------------------------------

def test_a_server_that_goes_down_takes_nothing_and_its_unanswered_requests_go_elsewhere() -> None:
    fleet = serving(fleet_of(server(A), server(B)))
    waiting, streaming = fleet.lease(A, "m"), fleet.lease(A, "m")
    cut: list[RemoteLease] = []
    for lease in (waiting, streaming):
        lease.on_cut(lambda lease=lease: cut.append(lease))     # type: ignore[misc]
    streaming.answered = True
    fleet.note_check(A, Check(False, "refused"))
    assert view(fleet, A).status is Status.SUSPECT and cut == []
    fleet.note_check(A, Check(False, "refused"))
    assert view(fleet, A).status is Status.DOWN and view(fleet, A).why == "refused"
    assert cut == [waiting] and isinstance(waiting.cut_error, ServerLost)
    with pytest.raises(NotReady):
        fleet.lease(A, "m")
    fleet.note_check(A, Check(True))
    with pytest.raises(NotReady):
        fleet.lease(A, "m")
    fleet.note_check(A, Check(True))
    assert fleet.lease(A, "m").instance_id == A


def test_an_unreachable_server_at_the_start_is_a_state() -> None:
    fleet = fleet_of(server(A))
    fleet.note_check(A, Check(False, "Connection refused"))
    assert (view(fleet, A).status, view(fleet, A).why) == (Status.DOWN, "Connection refused")


def test_failures_in_a_row_open_the_circuit_and_a_good_check_after_a_fall_closes_it() -> None:
    clock = Clock()
    fleet = serving(fleet_of(server(A), clock=clock))
    for _ in range(FAILURES):
        lease = fleet.lease(A, "m")
        fleet.note_outcome(lease, Outcome.FAILED)
        lease.release()
    assert view(fleet, A).circuit == "open" and view(fleet, A).failures == FAILURES
    clock.now += 100
    assert view(fleet, A).circuit == "half_open"
    probe = fleet.lease(A, "m")
    fleet.note_outcome(probe, Outcome.GOOD)
    probe.release(ok=True)
    assert view(fleet, A).circuit == "closed" and view(fleet, A).answers == 1


def test_it_stays_open_no_longer_than_one_health_interval() -> None:
    clock = Clock()
    fleet = serving(fleet_of(server(A), clock=clock, health_check_interval_s=0.5))
    for _ in range(FAILURES):
        lease = fleet.lease(A, "m")
        fleet.note_outcome(lease, Outcome.FAILED)
        lease.release()
    clock.now += 0.5
    assert view(fleet, A).circuit == "half_open"


def test_who_asks_for_less_is_left_alone_for_that_model_as_long_as_it_says() -> None:
    clock = Clock()
    fleet = serving(fleet_of(server(A), clock=clock))
    lease = fleet.lease(A, "m")
    fleet.note_outcome(lease, Outcome.BUSY, 7)
    [found] = fleet.pools("m").warm.servers
    assert found.is_busy("m", clock.now + 6.9) and not found.is_busy("m", clock.now + 7)
    assert not found.is_busy("n", clock.now)
    fleet.note_outcome(lease, Outcome.BUSY, 1e9)
    assert not found.is_busy("m", clock.now + 61)
    fleet.note_outcome(lease, Outcome.GOOD)
    assert not found.is_busy("m", clock.now)


# --- another file -----------------------------------------------------------------------------------------------------

def test_a_new_file_touches_only_what_it_changes() -> None:
    fleet = serving(fleet_of(server(A), server(B)))
    before = {one.url: one for one in fleet.pools("m").warm.servers}
    on_a, on_b = fleet.lease(A, "m"), fleet.lease(B, "m")
    changes = fleet.use(ServersConfig((server(A), server(C)), max_retries=1))
    assert changes == [f"{B} leaves", f"{C} joins", "max_retries is 1"]
    [left] = fleet.pools("m").warm.servers
    assert left is before[A] and left.view.own == 1
    assert (view(fleet, B).leaving, view(fleet, B).in_flight) == (True, 1)
    with pytest.raises(NotReady):
        fleet.lease(B, "m")
    on_b.release(ok=True)
    assert [one.url for one in fleet.views()] == [A, C]
    on_a.release(ok=True)


def test_a_changed_entry_keeps_what_is_known_of_its_server() -> None:
    fleet = serving(fleet_of(server(A)))
    lease = fleet.lease(A, "m")
    assert fleet.use(ServersConfig((server(A, capacity=2, api_key="k"),))) == [f"{A} has changed"]
    assert (view(fleet, A).status, view(fleet, A).in_flight, view(fleet, A).utilisation) == (Status.UP, 1, 0.5)
    assert fleet.lease(A, "m").origin.headers["Authorization"] == "Bearer k"
    assert "Authorization" not in lease.origin.headers


def test_one_that_comes_back_before_it_has_gone_is_the_same() -> None:
    fleet = serving(fleet_of(server(A)))
    lease = fleet.lease(A, "m")
    fleet.use(ServersConfig())
    fleet.use(ServersConfig((server(A),)))
    assert [(one.url, one.leaving, one.in_flight) for one in fleet.views()] == [(A, False, 1)]
    lease.release()
    assert [(one.url, one.leaving, one.in_flight) for one in fleet.views()] == [(A, False, 0)]


def test_models_that_the_file_no_longer_names_are_asked_for_again() -> None:
    fleet = fleet_of(server(A, models=("x",)))
    assert urls(fleet.pools("x").warm) == {A}
    fleet.use(ServersConfig((server(A),)))
    fleet.note_check(A, Check(True, offered={"y": Offered(True)}))
    assert fleet.pools("x") is NOBODY and urls(fleet.pools("y").warm) == {A}


def test_the_same_file_changes_nothing() -> None:
    fleet = fleet_of(server(A, headers={"X": "y"}))
    assert fleet.use(ServersConfig((server(A, headers={"X": "y"}),))) == []


# --- many -------------------------------------------------------------------------------------------------------------

def test_a_pool_can_be_walked_from_anywhere() -> None:
    pool = Pool([Server(server(f"http://s{n}:1")) for n in range(10)])
    everyone = list(pool.servers)
    assert list(pool.around(0.0)) == everyone
    assert list(pool.around(0.35)) == everyone[3:] + everyone[:3]
    assert next(pool.around(everyone[7].seed)) is everyone[7]
    assert next(pool.around(everyone[9].seed + 1)) is everyone[0]
    assert list(Pool().around(0.5)) == []
