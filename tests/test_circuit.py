"""routing/circuit.py and routing/health.py: what failures and checks add up to."""

from __future__ import annotations

import math
import random

from hypothesis import given
from hypothesis import strategies as st

from routing.circuit import CLOSED, FAILURES, FIRST_S, LONGEST_S, Circuit
from routing.health import HURRY, JITTER, Health, Status, check_limit_s


def opened(now: float = 100.0) -> Circuit:
    circuit = CLOSED
    for _ in range(FAILURES):
        circuit = circuit.entered().failed(now)
    return circuit


def test_a_few_failures_in_a_row_open_it_and_a_success_between_them_does_not() -> None:
    assert CLOSED.failed(1).failed(1).succeeded().failed(1).failed(1).state(1) == "closed"
    assert opened(1).state(1) == "open" and opened(1).blocked_until == 1 + FIRST_S


def test_then_one_request_goes_through_and_decides() -> None:
    half = opened(100)
    assert half.state(100 + FIRST_S) == "half_open" and half.blocked_until <= 100 + FIRST_S
    probing = half.entered()
    assert probing.blocked_until == math.inf
    assert probing.succeeded() == CLOSED
    again = probing.failed(102)
    assert again.state(102) == "open" and again.blocked_until == 102 + 2 * FIRST_S


def test_a_probe_that_says_nothing_leaves_the_way_free_for_the_next() -> None:
    assert opened(100).entered().left().blocked_until == 100 + FIRST_S


def test_it_never_stays_open_for_longer_than_its_limit() -> None:
    circuit, now = opened(), 100.0
    for _ in range(30):
        now = circuit.open_until
        circuit = circuit.entered().failed(now)
    assert circuit.open_until - now == LONGEST_S
    assert opened().entered().failed(0, longest_s=0.5).open_until == 0.5


def test_requests_that_were_under_way_when_it_opened_do_not_prolong_it() -> None:
    circuit = opened(100)
    assert circuit.failed(100.5).failed(100.6).open_until == circuit.open_until


# --- checks ---------------------------------------------------------------------------------------------------------

def test_a_server_that_never_answered_is_down_and_one_that_did_is_up() -> None:
    assert Health().failed("refused").status is Status.DOWN
    assert Health().succeeded().status is Status.UP


def test_one_lost_answer_takes_nobody_out() -> None:
    up = Health().succeeded()
    suspect = up.failed("no answer")
    assert suspect.status is Status.SUSPECT and suspect.succeeded().status is Status.UP
    down = suspect.failed("no answer")
    assert (down.status, down.why) == (Status.DOWN, "no answer")


def test_one_good_answer_brings_nobody_back() -> None:
    down = Health().failed("refused")
    assert down.succeeded().status is Status.DOWN
    assert down.succeeded().failed("refused").succeeded().status is Status.DOWN
    assert down.succeeded().succeeded().status is Status.UP


@given(st.integers())
def test_it_is_asked_sooner_between_two_states_and_never_later_than_the_interval(seed: int) -> None:
    draw = random.Random(seed)
    up, down = Health().succeeded(), Health().failed("refused")
    for settled in (up, down):
        assert 10 * (1 - JITTER) <= settled.next_check_s(10, draw) <= 10
    for between in (up.failed("x"), down.succeeded()):
        assert between.next_check_s(10, draw) <= 10 * HURRY
    # so a server is back within two intervals of its return, checks included
    assert down.next_check_s(10, draw) + down.succeeded().next_check_s(10, draw) + 2 * 0.5 < 20


def test_a_check_takes_no_longer_than_its_share_of_the_interval() -> None:
    assert check_limit_s(10) == 5 and check_limit_s(60) == 5 and check_limit_s(2) == 1 and check_limit_s(0.1) == 0.5
