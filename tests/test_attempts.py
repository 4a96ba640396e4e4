"""routing/attempts.py: when a request may be tried again, elsewhere."""

from __future__ import annotations

import pytest

from errors import BadRequest, EngineDied, EngineStopped, ServerLost, UpstreamError, UpstreamTimeout
from routing.attempts import Attempts, outcome_of, retry_after_s
from routing.remote import Outcome
from routing.upstream import ConnectionRefused

WHY = UpstreamError("x")


@pytest.mark.parametrize("error", [ConnectionRefused("x"), UpstreamError("reset"), ServerLost("down"),
                                   EngineStopped("drained")])
def test_what_never_reached_the_client_may_be_tried_again(error: UpstreamError) -> None:
    refused = isinstance(error, ConnectionRefused)
    assert Attempts(1).may_follow_error(error, local=False, refused=refused)
    assert Attempts(1).may_follow_error(error, local=True, refused=refused)
    assert not Attempts(0).may_follow_error(error, local=False, refused=refused)


def test_a_timeout_has_used_up_the_time_and_the_clients_mistakes_stay_its_own() -> None:
    assert not Attempts(3).may_follow_error(UpstreamTimeout("x"), local=False, refused=False)
    assert not Attempts(3).may_follow_error(BadRequest("x"), local=False, refused=False)


def test_no_more_than_max_retries() -> None:
    attempts = Attempts(2)
    for name in ("a", "b"):
        assert attempts.may_follow_error(WHY, local=False, refused=False)
        attempts.leave(name, WHY)
    assert not attempts.may_follow_error(WHY, local=False, refused=False)
    assert attempts.tried == {"a", "b"} and attempts.last is WHY


def test_a_request_that_kills_engines_is_not_given_to_a_third() -> None:
    attempts = Attempts(5)
    assert attempts.may_follow_error(EngineDied("x"), local=True, refused=False)
    attempts.leave("a", WHY)
    assert not attempts.may_follow_error(EngineDied("x"), local=True, refused=False)
    refused = Attempts(5)
    for name in ("a", "b", "c"):
        assert refused.may_follow_error(ConnectionRefused("x"), local=True, refused=True)
        refused.leave(name, WHY)


@pytest.mark.parametrize(("status", "local", "times"), [
    (200, False, 0), (400, False, 0), (404, True, 0), (404, False, 1), (500, True, 1), (500, False, 1), (429, False, 3),
    (502, True, 3), (503, False, 3), (504, False, 3), (501, False, 0)])
def test_how_often_an_answer_sends_it_elsewhere(status: int, local: bool, times: int) -> None:
    attempts = Attempts(3)
    found = 0
    while attempts.may_follow_status(status, local=local):
        attempts.leave(str(found), WHY)
        found += 1
    assert found == times


def test_the_time_to_the_first_byte_is_one_for_all_tries() -> None:
    attempts = Attempts(3)
    assert attempts.left_s(10, now=100) == 10
    assert attempts.left_s(10, now=107) == 3
    assert attempts.left_s(2, now=107) == -5


@pytest.mark.parametrize(("status", "outcome"), [
    (200, Outcome.GOOD), (400, Outcome.GOOD), (404, Outcome.STALE), (429, Outcome.BUSY), (500, Outcome.FAILED),
    (502, Outcome.FAILED), (503, Outcome.BUSY), (504, Outcome.FAILED)])
def test_what_an_answer_says_about_who_gave_it(status: int, outcome: Outcome) -> None:
    assert outcome_of(status) is outcome


@pytest.mark.parametrize(("header", "expected"), [
    ("5", 5.0), ("0", 0.0), ("", None), ("soon", None), ("-1", None), ("1e9", None), ("99999999999", None),
    ("Fri, 31 Dec 1999 23:59:59 GMT", None), ("\u0665", None)])
def test_retry_after(header: str, expected: float | None) -> None:
    assert retry_after_s(header) == expected
