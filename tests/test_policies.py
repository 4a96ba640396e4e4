"""routing/policies.py: choices are functions of snapshots."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from routing.policies import (
    HALF,
    POLICIES,
    Backend,
    LeastRequests,
    Load,
    Policy,
    Prefix,
    Reading,
    RoundRobin,
    Session,
    hash64,
    projected,
    prompt_start,
)


def backend(name: str, running: float = 0.0, waiting: float = 0.0, capacity: float = 10, **more: Any) -> Backend:
    return Backend(id=name, capacity=capacity, running=running, waiting=waiting, seed=hash64(name), **more)


def chosen(policy: Policy, backends: Sequence[Backend], key: str | None = None, times: int = 1) -> Counter[str]:
    draw = random.Random(1)
    number = None if key is None else hash64(key)
    return Counter(policy.choose(backends, number, draw).id for _ in range(times))


# --- the estimate ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("reading", "own", "capacity", "expected"), [
    (None, 0, 4, (0, 0)),
    (None, 3, 4, (3, 0)),
    (None, 6, 4, (4, 2)),                                   # no reading yet: past the capacity they wait
    (Reading(0, running=2, waiting=0, own=0), 0, 4, (2, 0)),     # somebody else's
    (Reading(0, running=2, waiting=0, own=2), 0, 4, (0, 0)),     # they were ours and have ended
    (Reading(0, running=2, waiting=0, own=2), 5, 4, (4, 1)),     # a burst since
    (Reading(0, running=9, waiting=0, own=9), 9, 4, (9, 0)),     # more than the capacity run: they did not wait
    (Reading(0, running=2, waiting=5, own=7), 7, 4, (2, 5)),     # it runs no more than two at once
    (Reading(0, running=2, waiting=5, own=7), 3, 4, (2, 1)),
    (Reading(0, running=1, waiting=0, own=5), 5, 4, (4, 1)),     # it has not seen all of ours yet
])
def test_load_is_the_reading_and_what_was_sent_since(reading: Reading | None, own: int, capacity: float,
                                                     expected: tuple[float, float]) -> None:
    assert projected(reading, own, capacity) == expected


@given(st.floats(0, 1000), st.floats(0, 1000), st.floats(0, 1000), st.integers(0, 1000), st.integers(1, 100))
def test_an_estimate_counts_all_of_ours_and_is_never_negative(running: float, waiting: float, own_then: float, own: int,
                                                              capacity: int) -> None:
    found = projected(Reading(0, running, waiting, own_then), own, capacity)
    assert min(found) >= 0 and sum(found) >= own - 1e-6


def test_the_score_is_the_printed_one() -> None:
    assert backend("a", running=3, waiting=4, capacity=5).utilisation == (3 + 4 * 0.5) / 5


# --- load -----------------------------------------------------------------------------------------------------------

def test_below_half_of_their_capacity_all_are_alike() -> None:
    found = chosen(Load(), [backend("a", 0), backend("b", 4.9), backend("c", 5), backend("d", 9)], times=2000)
    assert set(found) == {"a", "b"} and abs(found["a"] - found["b"]) < 200


def test_from_half_on_the_lowest_score_is_next() -> None:
    assert chosen(Load(), [backend("a", 9), backend("b", 5), backend("c", 2, waiting=20)], times=50) == {"b": 50}
    assert chosen(Load(), [backend("a", 9, capacity=12), backend("b", 8)], times=9) == {"a": 9}


def test_ties_are_at_random() -> None:
    found = chosen(Load(), [backend("a", 7), backend("b", 7), backend("c", 8)], times=1000)
    assert set(found) == {"a", "b"} and min(found.values()) > 400


def test_a_weight_multiplies_the_share() -> None:
    roomy = chosen(Load(), [backend("a", weight=3.0), backend("b")], times=4000)
    assert 2.6 < roomy["a"] / roomy["b"] < 3.4
    assert chosen(Load(), [backend("a", 14, weight=2.0), backend("b", 8)], times=3) == {"a": 3}


def test_a_closed_loop_of_streams_is_shared_by_capacity() -> None:
    """60 streams on capacities 1:2:4:8, all of which are full: each gets its share, within one."""
    capacities = {"a": 1, "b": 2, "c": 4, "d": 8}
    own = dict.fromkeys(capacities, 0)
    draw = random.Random(2)
    for step in range(6000):
        if step >= 60:      # one ends, its client sends the next
            leaving = draw.choices(list(own), [min(own[name], capacities[name]) for name in own])[0]
            own[leaving] -= 1
        views = []
        for name, capacity in capacities.items():
            running, waiting = projected(None, own[name], capacity)
            views.append(backend(name, running, waiting, capacity))
        own[Load().choose(views, None, draw).id] += 1
    assert all(abs(own[name] - 60 * capacity / 15) <= 1 for name, capacity in capacities.items())


# --- round robin, least requests ------------------------------------------------------------------------------------

def test_round_robin_takes_turns_whatever_the_load() -> None:
    views = {name: backend(name, running=load) for name, load in (("a", 0), ("b", 99), ("c", 5))}
    turns = []
    for pick in range(1, 10):
        turn = RoundRobin().choose(list(views.values()), None, random.Random(pick)).id
        views[turn] = views[turn]._replace(picked=pick)
        turns.append(turn)
    assert turns[:3] == turns[3:6] == turns[6:] and set(turns) == {"a", "b", "c"}


def test_least_requests_counts_heads() -> None:
    backends = [backend("a", 3, waiting=1, capacity=100), backend("b", 3, capacity=4), backend("c", 5)]
    assert chosen(LeastRequests(), backends, times=5) == {"b": 5}


# --- session --------------------------------------------------------------------------------------------------------

SIX = [backend(name) for name in "abcdef"]


@pytest.mark.parametrize(("headers", "body", "expected"), [
    ({"X-Session-Id": "s"}, {"user": "u"}, "s"),
    ({}, {"user": "u"}, "u"),
    ({}, {"metadata": {"user_id": "m"}}, "m"),
    ({}, {"user": 3, "metadata": "x"}, None),
    ({}, {}, None),
    ({}, None, None),
])
def test_what_a_session_is(headers: dict[str, str], body: dict[str, Any] | None, expected: str | None) -> None:
    assert Session().key(headers, body) == expected


def test_a_session_stays_where_it_is_whatever_the_load() -> None:
    [home] = chosen(Session(), SIX, "kim", times=20)
    busy = [one._replace(running=50) if one.id == home else one for one in SIX]
    assert chosen(Session(), busy, "kim", times=20) == {home: 20}


def test_sessions_spread_evenly_and_only_those_of_a_lost_backend_move() -> None:
    before = {f"s{n}": Session().choose(SIX, hash64(f"s{n}"), random.Random()).id for n in range(3000)}
    assert all(400 < count < 600 for count in Counter(before.values()).values())
    for session, home in before.items():
        now = Session().choose(SIX[1:], hash64(session), random.Random()).id
        assert now == home if home != "a" else now != "a"


def test_without_a_session_load_decides() -> None:
    assert chosen(Session(), [backend("a", 9), backend("b", 6)], None, times=9) == {"b": 9}


# --- prefix ---------------------------------------------------------------------------------------------------------

SYSTEM = "You are the assistant of a library and answer in one sentence. " * 8


def chat(*contents: str) -> dict[str, Any]:
    return {"model": "m", "messages": [{"role": "user", "content": text} for text in contents]}


def test_requests_that_begin_alike_have_one_key() -> None:
    policy = Prefix(256)
    assert policy.key({}, chat(SYSTEM, "Who?")) == policy.key({}, chat(SYSTEM, "Where?", "There", "Why?"))
    assert policy.key({}, chat(SYSTEM)) != policy.key({}, chat(SYSTEM.upper()))
    assert policy.key({}, chat(SYSTEM)) != policy.key({}, chat(SYSTEM) | {"model": "n"})
    assert policy.key({}, {"model": "m"}) is None and policy.key({}, None) is None


@pytest.mark.parametrize(("body", "start"), [
    ({"prompt": "abc"}, "abc"),
    ({"prompt": ["abc", "def"]}, "abc\ndef"),
    ({"prompt": [1, 2, 3]}, ""),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": "see"},
                                                {"type": "image_url", "image_url": {"url": "data:..."}}]}]}, "see"),
    ({"system": [{"type": "text", "text": "be"}], "messages": [{"content": "kind"}]}, "be\nkind"),
    ({"instructions": "be", "input": "kind"}, "be\nkind"),
    ({"input": [{"role": "user", "content": [{"type": "input_text", "text": "kind"}]}]}, "kind"),
    ({"messages": "no list", "prompt": 7}, "no list"),
    ({"messages": [[[[[[["deep"]]]]]]]}, ""),
])
def test_where_a_prompt_stands(body: dict[str, Any], start: str) -> None:
    assert prompt_start(body, 1000) == start


def test_only_the_start_counts() -> None:
    assert prompt_start({"prompt": "x" * 10_000}, 16) == "x" * 16


def test_a_prefix_goes_to_one_backend_as_long_as_that_has_room() -> None:
    [home] = chosen(Prefix(), SIX, "prefix", times=50)
    roomy = [one._replace(running=4.9) if one.id == home else one for one in SIX]
    assert chosen(Prefix(), roomy, "prefix", times=50) == {home: 50}


def test_a_hot_prefix_flows_over_to_the_next_in_its_order() -> None:
    [home] = chosen(Prefix(), SIX, "prefix")
    full = [one._replace(running=9) if one.id == home else one for one in SIX]
    [second] = chosen(Prefix(), full, "prefix", times=50)
    assert second != home
    assert chosen(Prefix(), [one for one in SIX if one.id != home], "prefix", times=5) == {second: 5}


def test_one_hot_prefix_loads_no_backend_beyond_its_bound() -> None:
    own = dict.fromkeys("abcdef", 0)
    for _ in range(120):        # twice what all of them are meant for
        views = [backend(name, min(count, 10), max(0, count - 10)) for name, count in own.items()]
        own[Prefix().choose(views, hash64("hot"), random.Random(3)).id] += 1
    assert max(own.values()) <= 1.25 * 120 / 6 + 1


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(1, 20)), min_size=1, max_size=12),
       st.integers(0, 2 ** 64 - 1), st.sampled_from(sorted(POLICIES)))
def test_every_policy_answers_with_one_of_those_it_was_given(loads: list[tuple[int, int]], key: int,
                                                             name: str) -> None:
    backends = [backend(str(index), load, capacity=capacity) for index, (load, capacity) in enumerate(loads)]
    policy: Policy = POLICIES[name]()
    for number in (key, None):
        assert policy.choose(backends, number, random.Random(4)) in backends


def test_half_is_where_the_printed_rule_has_it() -> None:
    assert HALF == 0.5
