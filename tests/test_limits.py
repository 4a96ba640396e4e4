"""Limits of keys: over any minute, at one time, by model, by reported tokens."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from configuration.keys import Key
from errors import Forbidden, RateLimited
from routing.limits import WINDOW_S, Limits, check_model, reported_tokens
from tests.support import wait_until


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_requests_of_a_minute() -> None:
    clock = Clock()
    limits, key = Limits(clock), Key("a", b"", requests_per_minute=2)
    limits.enter(key).leave()
    clock.now += 20
    limits.enter(key).leave()
    with pytest.raises(RateLimited) as refused:
        limits.enter(key)
    assert (refused.value.status, refused.value.retry_after_s) == (429, WINDOW_S - 20)
    clock.now += refused.value.retry_after_s or 0
    limits.enter(key).leave()
    with pytest.raises(RateLimited):
        limits.enter(key)
    limits.enter(Key("b", b"", requests_per_minute=2)).leave()      # another key's minute is its own
    limits.enter(None).leave()


@given(st.lists(st.floats(0, 30), max_size=60), st.integers(1, 5))
def test_no_minute_has_more_than_the_limit_and_waiting_helps(gaps: list[float], limit: int) -> None:
    clock = Clock()
    limits, key = Limits(clock), Key("a", b"", requests_per_minute=limit)
    entered: list[float] = []
    for gap in gaps:
        clock.now += gap
        try:
            limits.enter(key)
        except RateLimited as refused:
            assert refused.retry_after_s is not None and 0 < refused.retry_after_s <= WINDOW_S
            clock.now += refused.retry_after_s
            limits.enter(key)
        entered.append(clock.now)
    for first, last in zip(entered, entered[limit:], strict=False):
        assert last - first > WINDOW_S - 1 - 1e-6       # in steps of a second


def test_requests_at_one_time() -> None:
    limits, key = Limits(), Key("a", b"", concurrent_requests=2)
    first, second = limits.enter(key), limits.enter(key)
    with pytest.raises(RateLimited, match="2 requests at one time"):
        limits.enter(key)
    first.leave()
    first.leave()       # a second time counts for nothing
    third = limits.enter(key)
    with pytest.raises(RateLimited):
        limits.enter(key)
    second.leave()
    third.leave()
    assert limits._running == {}


def test_who_asks_again_before_its_place_is_back_waits_a_moment_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("routing.limits.JUST_ENDED_S", 120)
    limits, key = Limits(), Key("a", b"", concurrent_requests=1)
    first = limits.enter(key)
    with ThreadPoolExecutor(1) as other:
        second = other.submit(limits.enter, key)
        wait_until(lambda: limits._lock._waiters)
        first.leave()
        second.result().leave()


def test_a_place_comes_back_once_however_many_threads_give_it() -> None:
    limits, key = Limits(), Key("a", b"", concurrent_requests=5)
    held = limits.enter(key)
    admission = limits.enter(key)
    threads = [threading.Thread(target=admission.leave) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert limits._running == {"a": 1}
    held.leave()


def test_tokens_of_a_minute_hold_up_the_next_request() -> None:
    clock = Clock()
    limits, key = Limits(clock), Key("a", b"", tokens_per_minute=100)
    admission = limits.enter(key)
    assert admission.on_tokens is not None
    admission.on_tokens(150)
    with pytest.raises(RateLimited, match="100 tokens"):
        limits.enter(key)
    clock.now += WINDOW_S
    limits.enter(key)


def test_models() -> None:
    check_model(None, ["x"])
    check_model(Key("a", b"", models=("llama*",)), ["x", "llama2"])
    with pytest.raises(Forbidden) as refused:
        check_model(Key("a", b"", models=("llama*", "bert")), ["x"])
    assert refused.value.code == "model_not_allowed" and "llama*, bert" in refused.value.message


@pytest.mark.parametrize(("end", "tokens"), [
    (b'{"choices":[],"usage":{"prompt_tokens":3,"total_tokens":19,"completion_tokens":16}}', 19),
    (b'..."usage" : {"total_tokens": 7, "prompt_tokens_details": {"cached_tokens": 2}}, "x": {}}', 7),
    (b'data: {"choices":[],"usage":{"total_tokens":5}}\n\ndata: [DONE]\n\n', 5),
    (b'data: {"usage":{"total_tokens":4}}\n\ndata: {"usage":{"total_tokens":5}}\n\ndata: [DONE]\n\n', 5),
    (b'data: {"usage":{"total_tokens":4}}\n\ndata: {"choices":[],"usage":null}\n\n', 4),
    (b'{"usage":{"input_tokens":3,"output_tokens":4,"total_tokens":null}}', 7),
    (b'{"usage":{"total_tokens":"many"}}', 0), (b'{"usage":{"total_tokens":-3}}', 0), (b'{"usage":', 0),
    (b'"usage"', 0), (b"", 0), (b'he said "usage" {', 0)])
def test_reported_tokens(end: bytes, tokens: int) -> None:
    assert reported_tokens(end) == tokens


@given(st.binary(max_size=200))
def test_whatever_an_engine_answers_is_no_error(data: bytes) -> None:
    assert reported_tokens(b'{"usage":' + data) >= 0
