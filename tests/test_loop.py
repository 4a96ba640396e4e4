"""The thread loop: wakes at once, ends when told, survives a tick that raises."""

from __future__ import annotations

import errno
import logging
import threading

import pytest

from instances import loop as loop_module
from instances.loop import Loop
from tests.support import wait_until

LONG_S = 1000.0


def test_it_ticks_with_the_clocks_time_until_a_tick_says_no_more() -> None:
    times: list[float] = []

    def tick(now: float) -> bool | None:
        times.append(now)
        return False if len(times) == 3 else None

    loop = Loop(name="test", tick=tick, interval_s=0.0, clock=lambda: 7.0)
    loop.start()
    loop.join()
    assert times == [7.0] * 3


def test_a_wake_does_not_wait_for_the_interval() -> None:
    ticks: list[float] = []
    loop = Loop(name="test", tick=ticks.append, interval_s=LONG_S)
    loop.start()
    for count in (1, 2, 3):
        wait_until(lambda count=count: len(ticks) == count)  # type: ignore[misc]
        loop.wake()
    wait_until(lambda: len(ticks) == 4)
    loop.stop()
    assert loop.join(120)


def test_a_wake_during_a_tick_is_not_lost() -> None:
    entered, go_on, ticks = threading.Event(), threading.Event(), []

    def tick(now: float) -> None:
        ticks.append(now)
        entered.set()
        go_on.wait(120)

    loop = Loop(name="test", tick=tick, interval_s=LONG_S)
    loop.start()
    entered.wait(120)
    loop.wake()
    go_on.set()
    wait_until(lambda: len(ticks) == 2)
    loop.stop()
    assert loop.join(120)


def test_a_tick_may_say_when_the_next_one_is_due() -> None:
    waits = iter([0.0, 0.0, LONG_S])
    ticks: list[float] = []

    def tick(now: float) -> float:
        ticks.append(now)
        return next(waits)

    loop = Loop(name="test", tick=tick, interval_s=LONG_S)
    loop.start()
    wait_until(lambda: len(ticks) == 3)
    loop.stop()
    assert loop.join(120)
    assert len(ticks) == 3


def test_a_tick_that_raises_is_logged_and_tried_again(
        monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(loop_module, "AFTER_ERROR_S", 0.0)
    ticks: list[float] = []

    def tick(now: float) -> bool:
        ticks.append(now)
        if len(ticks) < 3:
            raise RuntimeError("a bug")
        return False

    loop = Loop(name="test", tick=tick, interval_s=0.0)
    loop.start()
    assert loop.join(120)
    assert len(ticks) == 3
    errors = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert len(errors) == 2 and "a tick of test failed" in errors[0].getMessage()


def test_after_an_error_it_takes_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """One traceback a second, not ten; but a stop is heard."""
    monkeypatch.setattr(loop_module, "AFTER_ERROR_S", LONG_S)
    ticks: list[float] = []

    def tick(now: float) -> None:
        ticks.append(now)
        raise RuntimeError("a bug")

    loop = Loop(name="test", tick=tick, interval_s=0.0)
    loop.start()
    wait_until(lambda: ticks)
    loop.stop()
    assert loop.join(120)
    assert len(ticks) == 1


def test_one_that_was_never_started_has_ended() -> None:
    loop = Loop(name="test", tick=lambda now: None, interval_s=0.0)
    assert loop.join(0.0)


def test_it_does_not_wait_for_itself() -> None:
    answers: list[bool] = []
    loop = Loop(name="test", tick=lambda now: answers.append(loop.join()) or False, interval_s=0.0)  # type: ignore[func-returns-value]
    loop.start()
    assert loop.join(120)
    assert answers == [False]


def test_a_tick_that_hangs_can_be_waited_for_in_vain() -> None:
    go_on = threading.Event()
    loop = Loop(name="test", tick=lambda now: go_on.wait(120) and False, interval_s=0.0)
    loop.start()
    assert not loop.join(0.01)
    go_on.set()
    assert loop.join(120)


def test_what_the_system_has_no_more_of_is_told_in_a_line(caplog: pytest.LogCaptureFixture) -> None:
    """Not with a traceback each second."""
    def tick(now: float) -> bool:
        if len(caplog.records) == 0:
            raise OSError(errno.EMFILE, "Too many open files")
        return False

    loop = Loop(name="test", tick=tick, interval_s=0.0)
    loop.start()
    assert loop.join(120)
    (said,) = caplog.records
    assert said.exc_info is None and "Too many open files; it is tried again" in said.getMessage()
