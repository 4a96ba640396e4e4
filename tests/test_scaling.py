"""When a model gets one more replica, and one fewer: decisions on windows of looks."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from instances.scaling import Change, Decision, Look, Rule, decide, places_in_use, remembered

RULE = Rule(least=1, most=3, grow_waiting=1, grow_s=10.0, shrink_s=60.0)


def looks(count: int, seconds: int, begin: float = 0.0, **seen: float) -> list[Look]:
    """One a second, the same all the time; 4 places each."""
    look = Look(at=0.0, replicas=count, serving=count, places=4.0 * count)
    return [replace(look, at=begin + second, **seen) for second in range(seconds + 1)]  # type: ignore[arg-type]


def decided(window: list[Look], rule: Rule = RULE, full_at: float | None = None,
            hindered: str | None = None) -> Decision:
    kept: tuple[Look, ...] = ()
    for look in window:
        kept = remembered(kept, look, rule)
    return decide(kept, window[-1], rule, full_at=full_at, hindered=hindered)


def test_requests_that_wait_all_the_time_bring_one_more() -> None:
    found = decided(looks(1, 10, waiting=2.0, running=4.0))
    assert (found.change, found.wanted) == (Change.GROW, 2)
    assert found.because == "2.0 requests waited for each of 1 replicas, on average over 10 s"


@pytest.mark.parametrize("window", [
    looks(1, 9, waiting=50.0),                                              # not long enough
    looks(1, 60, waiting=1.0),                                              # as many as may wait
    looks(2, 60, waiting=2.0, running=8.0),                                              # for each of two
    looks(1, 60) + looks(1, 3, 61.0, waiting=2.0),                          # a burst: 8 in 10 seconds
    looks(1, 60, waiting=9.0, coming=1, replicas=2),                        # it comes already
    looks(1, 60, waiting=9.0, serving=0),                                   # they wait for the first one
    looks(1, 8, waiting=9.0) + looks(2, 3, 9.0, waiting=9.0),               # another number than before
    [one for one in looks(1, 60, waiting=9.0) if one.at % 30 == 0]])        # too few looks
def test_what_brings_no_more(window: list[Look]) -> None:
    assert decided(window).change is Change.STAY


def test_it_is_the_average_that_counts() -> None:
    window = looks(1, 30)
    busy = [replace(one, waiting=6.0 if one.at % 3 == 0 else 0.0) for one in window]
    assert decided(busy).change is Change.GROW
    assert decided([replace(one, waiting=one.waiting / 3) for one in busy]).change is Change.STAY


def test_no_more_than_the_most_and_not_against_a_hindrance() -> None:
    full = decided(looks(3, 10, waiting=30.0))
    assert (full.change, full.wanted) == (Change.STAY, 3) and full.because.endswith("; 3 is its most")
    held = decided(looks(1, 10, waiting=30.0), hindered="others wait for room")
    assert (held.change, held.wanted) == (Change.STAY, 1) and held.because.endswith("; others wait for room")


def test_what_is_missing_to_the_least_comes_when_it_is_used() -> None:
    rule = replace(RULE, least=2)
    assert decided(looks(1, 0, running=1.0), rule).change is Change.GROW
    assert decided(looks(1, 500), rule).change is Change.STAY           # it idles: its time will end it
    assert decided(looks(1, 0, running=1.0, asleep=1), rule).change is Change.STAY      # it is woken for a load
    assert decided(looks(1, 0, running=1.0, coming=1), rule).change is Change.STAY
    assert decided(looks(0, 500, serving=0), rule) == Decision(Change.STAY, 0, "it is not loaded")


@pytest.mark.parametrize(("running", "count", "changes"), [
    (0.0, 2, True), (2.0, 2, True), (2.5, 2, False), (0.0, 1, False), (4.0, 3, True), (4.5, 3, False)])
def test_one_fewer_when_half_of_the_others_places_are_enough(running: float, count: int, changes: bool) -> None:
    found = decided(looks(count, 60, running=running))
    assert (found.change is Change.SHRINK, found.wanted) == (changes, count - changes)


@pytest.mark.parametrize("window", [
    looks(2, 59), looks(2, 30) + looks(2, 0, 31.0, running=5.0) + looks(2, 30, 32.0),
    looks(2, 30) + looks(2, 0, 31.0, waiting=9.0) + looks(2, 30, 32.0), looks(3, 40) + looks(2, 40, 41.0)])
def test_not_before_it_was_quiet_for_long(window: list[Look]) -> None:
    assert decided(window).change is Change.STAY


def test_places_are_those_that_were_in_use_when_requests_waited() -> None:
    """Its cache was full at 4 requests, though it is meant for 256: of 6, one alone could not have run 3."""
    window = [replace(one, places=256.0) for one in looks(1, 10, waiting=3.0, running=4.0)]
    assert places_in_use(window) == 4.0
    quiet = [replace(one, places=512.0) for one in looks(2, 60, running=6.0)]
    assert decided(quiet).change is Change.SHRINK
    assert decided(quiet, full_at=4.0).change is Change.STAY
    assert decided([replace(one, running=2.0) for one in quiet], full_at=4.0).change is Change.SHRINK
    assert places_in_use(quiet) is None


def test_one_place_is_enough_for_one_request() -> None:
    assert decided(looks(2, 60, running=1.0), full_at=1.0).change is Change.SHRINK


def test_a_most_that_is_lower_now_ends_what_is_too_much_at_once() -> None:
    found = decided(looks(3, 0, running=12.0, waiting=9.0), replace(RULE, most=2))
    assert (found.change, found.wanted, found.because) == (Change.SHRINK, 2, "3 run, and its most is 2")


def test_a_window_is_bounded() -> None:
    kept: tuple[Look, ...] = ()
    for look in looks(1, 5000):
        kept = remembered(kept, look, RULE)
    assert len(kept) == 61


@settings(max_examples=30)
@given(st.floats(0, 40), st.integers(1, 40), st.integers(1, 5))
def test_a_steady_load_never_flaps(offered: float, places: int, most: int) -> None:
    """Whatever the load and the size of one: the number goes up or down until it suits, and stays."""
    rule, count, full_at, window, changes = replace(RULE, most=most), 1, None, (), []
    for second in range(250):
        running = min(offered, float(count * places))
        look = Look(at=float(second), replicas=count, serving=count, waiting=offered - running, running=running,
                    places=256.0 * count)
        window = remembered(window, look, rule)
        found = decide(window, look, rule, full_at=full_at)
        if found.change is Change.GROW:
            full_at = places_in_use(window)
        if found.change is not Change.STAY:
            changes.append(found.change)
            count, window = found.wanted, ()
    assert Change.SHRINK not in changes and len(changes) < most
