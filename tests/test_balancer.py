"""routing/balancer.py: instances and servers of one model, and who of them gets a request."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest

from configuration.servers import ServerConfig, ServersConfig
from instances.instance import Candidate, State
from routing.balancer import LOOK_AT, Ask, Balancer, Choice
from routing.circuit import FAILURES
from routing.policies import POLICIES, Reading, hash64
from routing.remote import Check, Fleet, Outcome
from routing.scrape import Offered
from tests.test_remote import A, B, C, Clock, fleet_of, server, serving


def balancer_of(*servers: ServerConfig, clock: Clock | None = None, policy: str = "load", **more: Any) -> Balancer:
    clock = clock or Clock()
    return Balancer(serving(fleet_of(*servers, clock=clock)), POLICIES[policy](), clock=clock, draw=random.Random(5),
                    **more)


def ready(name: str, in_flight: int = 0) -> Candidate:
    return Candidate(name, State.READY, in_flight)


def starting(name: str) -> Candidate:
    return Candidate(name, State.STARTING, 0)


def picks(balancer: Balancer, candidates: list[Candidate], ask: Ask = Ask("m"), times: int = 200) -> Counter[Any]:  # noqa: B008
    return Counter(choice and choice.id for choice in (balancer.choose(candidates, ask) for _ in range(times)))


# --- this machine's instances alone -----------------------------------------------------------------------------------

def test_one_that_is_ready_is_taken_and_none_that_is_not() -> None:
    balancer = Balancer(Fleet())
    assert balancer.choose([starting("x"), ready("y")], Ask("m")) == Choice("y", local=True)
    assert balancer.choose([starting("x")], Ask("m")) is None
    assert balancer.choose([], Ask("m")) is None


def test_replicas_share_by_load() -> None:
    balancer = Balancer(Fleet(), draw=random.Random(1))
    balancer.note_locals({"x": 4, "y": 4})
    assert set(picks(balancer, [ready("x", 1), ready("y", 0)])) == {"x", "y"}      # both have room
    assert set(picks(balancer, [ready("x", 3), ready("y", 2)])) == {"y"}
    balancer.note_reading("y", Reading(0, running=1, waiting=3))
    assert set(picks(balancer, [ready("x", 3), ready("y", 4)])) == {"y"}           # (1 + 3/2) of 4 against 3 of 4


def test_what_was_tried_is_not_tried_again() -> None:
    balancer = balancer_of(server(A))
    assert set(picks(balancer, [ready("x")], Ask("m", tried={"x"}))) == {A}
    assert set(picks(balancer, [ready("x")], Ask("m", tried={"x", A}))) == {None}


def test_a_replica_whose_requests_fail_is_left_alone_and_one_alone_is_not() -> None:
    clock = Clock()
    balancer = Balancer(Fleet(clock=clock), clock=clock, draw=random.Random(1))
    for _ in range(FAILURES):
        balancer.note_pick("x")
        balancer.note_outcome("x", Outcome.FAILED)
    assert set(picks(balancer, [ready("x"), ready("y")])) == {"y"}
    assert set(picks(balancer, [ready("x")])) == {"x"}
    clock.now += 60
    assert set(picks(balancer, [ready("x"), ready("y")])) == {"x", "y"}
    balancer.note_pick("x")                     # its one request is under way
    assert set(picks(balancer, [ready("x"), ready("y")])) == {"y"}
    balancer.note_outcome("x", Outcome.GOOD)
    assert set(picks(balancer, [ready("x"), ready("y")])) == {"x", "y"}


def test_what_is_known_of_instances_that_have_gone_is_forgotten() -> None:
    balancer = Balancer(Fleet())
    balancer.note_locals({"x": 7})
    assert balancer.local_view(ready("x"))[0].capacity == 7
    balancer.note_locals({"y": 7})
    assert balancer.local_view(ready("x"))[0].capacity == 256


# --- and servers ------------------------------------------------------------------------------------------------------

def test_local_comes_first_as_long_as_it_has_room() -> None:
    balancer = balancer_of(server(A))
    balancer.note_locals({"x": 4})
    assert set(picks(balancer, [ready("x", 3)])) == {"x"}
    assert set(picks(balancer, [ready("x", 4)])) == {A}
    balancer.prefer_local = False
    assert set(picks(balancer, [ready("x", 1)])) == {"x", A}


def test_a_server_helps_out_while_the_model_loads_here() -> None:
    balancer = balancer_of(server(A))
    assert picks(balancer, [starting("x")]) == {A: 200}
    assert balancer.has_room_elsewhere("m")
    leases = [balancer.fleet.lease(A, "m") for _ in range(4)]
    assert not balancer.has_room_elsewhere("m")
    assert [lease.release() for lease in leases]


def test_a_server_that_would_load_it_is_asked_only_if_nothing_here_does() -> None:
    fleet = serving(fleet_of(server(A)), {"m": Offered(warm=False)})
    balancer = Balancer(fleet, clock=Clock())
    assert balancer.choose([starting("x")], Ask("m")) is None
    assert balancer.choose([], Ask("m")) == Choice(A, local=False, cold=True)
    assert balancer.choose([Candidate("x", State.FAILED, 0)], Ask("m")) == Choice(A, local=False, cold=True)


def test_a_warm_server_goes_before_a_cold_one() -> None:
    fleet = serving(fleet_of(server(A)), {"m": Offered(warm=False)})
    fleet.use(ServersConfig((server(A), server(B))))
    fleet.note_check(B, Check(True, offered={"m": Offered(True)}))
    assert set(picks(Balancer(fleet, clock=Clock()), [])) == {B}


def test_suspects_only_when_there_is_nobody_better_and_what_is_down_never() -> None:
    balancer = balancer_of(server(A), server(B))
    balancer.fleet.note_check(A, Check(False, "no answer"))
    assert set(picks(balancer, [])) == {B}
    assert set(picks(balancer, [], Ask("m", tried={B}))) == {A}
    balancer.fleet.note_check(A, Check(False, "no answer"))
    assert set(picks(balancer, [], Ask("m", tried={B}))) == {None}


def test_who_is_busy_is_left_alone_and_it_is_known_until_when() -> None:
    clock = Clock()
    balancer = balancer_of(server(A), server(B), clock=clock)
    balancer.note_outcome(balancer.fleet.lease(A, "m"), Outcome.BUSY, 5)
    assert set(picks(balancer, [])) == {B} and balancer.retry_after_s("m") == 5
    balancer.note_outcome(balancer.fleet.lease(B, "m"), Outcome.BUSY, 3)
    assert set(picks(balancer, [])) == {None} and balancer.retry_after_s("m") == 3
    clock.now += 3
    assert set(picks(balancer, [])) == {B}
    clock.now += 3
    assert balancer.retry_after_s("m") is None


def test_an_open_circuit_is_passed_by_unless_it_is_the_last_way() -> None:
    balancer = balancer_of(server(A), server(B))
    for _ in range(FAILURES):
        lease = balancer.fleet.lease(A, "m")
        balancer.note_outcome(lease, Outcome.FAILED)
        lease.release()
    assert set(picks(balancer, [])) == {B}
    assert set(picks(balancer, [], Ask("m", tried={B}))) == {A}


@pytest.mark.parametrize("prefer", ["x", A])
def test_who_made_a_response_gets_what_refers_to_it(prefer: str) -> None:
    balancer = balancer_of(server(A), server(B))
    assert set(picks(balancer, [ready("x", 9), ready("y")], Ask("m", prefer=prefer))) == {prefer}
    assert prefer not in picks(balancer, [ready("x", 9), ready("y")], Ask("m", prefer=prefer, tried={prefer}))


def test_who_made_it_but_is_down_does_not() -> None:
    balancer = balancer_of(server(A), server(B))
    for _ in range(2):
        balancer.fleet.note_check(A, Check(False, "gone"))
    assert set(picks(balancer, [], Ask("m", prefer=A))) == {B}


def test_a_burst_between_two_readings_spreads() -> None:
    balancer = balancer_of(server(A, 2), server(B, 4), server(C, 8))
    own: Counter[str] = Counter()
    for _ in range(56):
        choice = balancer.choose([], Ask("m"))
        assert choice is not None
        balancer.fleet.lease(choice.id, "m")
        own[choice.id] += 1
    assert all(abs(own[url] - 56 * share / 14) <= 1 for url, share in ((A, 2), (B, 4), (C, 8)))


# --- many servers -----------------------------------------------------------------------------------------------------

def many(count: int, policy: str = "load") -> Balancer:
    return balancer_of(*(server(f"http://s{n}:1") for n in range(count)), policy=policy)


def test_among_many_all_get_their_turn() -> None:
    found = picks(many(4 * LOOK_AT), [], times=20_000)
    assert len(found) == 4 * LOOK_AT and max(found.values()) < 3 * 20_000 / (4 * LOOK_AT)


def test_among_many_a_prefix_has_one_place() -> None:
    balancer = many(4 * LOOK_AT, "prefix")
    homes = {key: picks(balancer, [], Ask("m", key=hash64(key)), times=20) for key in ("a", "b", "c", "d")}
    assert all(len(found) == 1 for found in homes.values())


def test_among_many_those_that_are_down_are_skipped() -> None:
    balancer = many(4 * LOOK_AT)
    left = {f"http://s{n}:1" for n in (3, 37, 4 * LOOK_AT - 1)}
    for url in set(balancer.fleet.urls()) - left:
        for _ in range(2):
            balancer.fleet.note_check(url, Check(False, "gone"))
    assert set(picks(balancer, [])) == left
