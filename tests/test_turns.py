"""Turns on devices."""

from __future__ import annotations

from instances.turns import Turns


def test_all_of_them_or_none() -> None:
    turns = Turns()
    assert turns.take("a", [0, 1])
    assert not turns.take("b", [1, 2])
    assert turns.take("c", [2])         # the refused one took nothing
    assert turns.take("a", [0])         # its own
    assert turns.of_others("b") == {0, 1, 2}
    assert turns.of_others("a") == {2}


def test_they_come_back() -> None:
    turns = Turns()
    turns.take("a", [0, 1])
    turns.give_back("a")
    turns.give_back("a")
    assert turns.take("b", [0, 1])
    assert turns.of_others("a") == {0, 1}


def test_no_device_needs_no_turn() -> None:
    assert Turns().take("a", []) and Turns().take("b", [])
