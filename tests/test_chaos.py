"""The chaos suite itself: its schedules repeat, and its judge lets nothing wrong pass for good."""

from __future__ import annotations

import json
import re
from itertools import islice
from typing import Any

import pytest

from tests.chaos import load
from tests.chaos.faults import CODES, FAULTS, shapes
from tests.chaos.schedule import APART, Step, steps
from tests.daemon import CHECKOUT

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


# --- docs/RELIABILITY.md ----------------------------------------------------------------------------------------------

DOCS = [(CHECKOUT / "docs" / name).read_text() for name in ("RELIABILITY.md", "RELIABILITY_zh.md")]


def rows(text: str) -> list[list[str]]:
    """Of the tables whose rows begin with a kind of fault."""
    lines = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("| `")]
    cells = [[cell.strip() for cell in line] for line in lines]
    return [row for row in cells if row[0].strip("`") in FAULTS]


@pytest.mark.parametrize("text", DOCS, ids=["en", "zh"])
def test_every_fault_stands_there_with_what_clients_may_be_told(text: str) -> None:
    told = {row[0].strip("`"): row[2] for row in rows(text) if len(row) == 3}
    assert {kind: tuple(re.findall(r"[a-z_]+", cell.replace("nothing", ""))) for kind, cell in told.items()} == {
        kind: one.told for kind, one in FAULTS.items()}
    for name, codes in CODES.items():
        [meaning] = re.findall(rf"\*\*{name}\*\*\s*[:：](.*?)[;；.]", text, re.DOTALL)
        plain = {code for code in codes if code.isidentifier()} - {load.CUT, load.REFUSED, load.RESET}
        assert plain == set(re.findall(r"`([a-z_]+)`", meaning))


def test_both_languages_have_the_same_figures() -> None:
    english, chinese = ([row for row in rows(text) if len(row) > 3] for text in DOCS)
    assert english == chinese and {row[0].strip("`") for row in english} == set(FAULTS)
