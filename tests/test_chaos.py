"""The chaos suite itself: its schedules repeat, and its judge lets nothing wrong pass for good."""

from __future__ import annotations

import json
from itertools import islice
from typing import Any

import pytest

from tests.chaos import load
from tests.chaos.faults import FAULTS, shapes
from tests.chaos.schedule import APART, Step, steps

COUNT = 300


def drawn(seed: int, count: int = COUNT) -> list[Step]:
    return list(islice(steps(seed, shapes()), count))


def test_the_same_seed_draws_the_same_schedule() -> None:
    assert drawn(7) == drawn(7)
    assert drawn(7) != drawn(8)


def test_a_plan_throws_the_same_dice_each_time() -> None:
    plan = drawn(7)[0].faults[0]
    assert plan.random().random() == plan.random().random()


def test_every_kind_comes_once_before_any_comes_again() -> None:
    first = [step.faults[0].kind for step in drawn(3, len(FAULTS))]
    assert sorted(first) == sorted(FAULTS)


def test_what_overlaps_may_overlap() -> None:
    pairs = [step.faults for step in drawn(5) if len(step.faults) == 2]
    assert len(pairs) > COUNT / 10
    for one, other in pairs:
        groups = {FAULTS[one.kind].shape.group, FAULTS[other.kind].shape.group}
        assert len(groups) == 2 and groups not in APART


def answer(text: str, model: str = "alpha") -> bytes:
    return json.dumps({"model": model, "choices": [{"message": {"content": text}}]}).encode()


ERROR = b'{"error": {"message": "no", "type": "t", "param": null, "code": %s}}'
TWO = "simulated token 1 and token"


@pytest.mark.parametrize(("status", "content", "outcome"), [
    (200, answer(TWO), load.GOOD),
    (200, answer("simulated token 1"), load.FALSE_END),
    (200, answer(TWO, model="beta"), load.WRONG),
    (200, answer("I am a stranger"), load.WRONG),
    (200, b"", load.WRONG),
    (200, ERROR % b'"engine_died"', load.WRONG),
    (502, ERROR % b'"engine_died"', "engine_died"),
    (500, ERROR % b"500", "engine 500"),
    (502, b"<html>Bad Gateway</html>", load.WRONG)])
def test_how_answers_are_judged(status: int, content: bytes, outcome: str) -> None:
    assert load.judge(status, content, "alpha", 2)[0] == outcome


def test_nothing_explains_what_must_never_be() -> None:
    codes: set[Any] = set().union(*(one.codes for one in FAULTS.values()))
    assert not codes & load.NEVER
    assert "internal_error" not in codes        # a 500 of the daemon's own is a bug
    assert not codes & {load.GOOD, load.LEFT}


def test_every_fault_says_what_it_does() -> None:
    assert all(one.strike.__doc__ for one in FAULTS.values())
