"""States and edges, leases, the idle clock and the failure policy: no I/O, no clock, no lock."""

from __future__ import annotations

import logging
from itertools import product

import pytest

from errors import EngineDied, EngineStopped, NotReady
from instances.instance import ACTIVE, EDGES, Instance, InstanceSpec, Lease, Problem, State

ALLOWED = {
    ("starting", "ready"), ("starting", "backoff"), ("starting", "failed"), ("starting", "stopping"),
    ("starting", "falling_asleep"), ("starting", "sleeping"), ("starting", "waking"),
    ("ready", "backoff"), ("ready", "failed"), ("ready", "stopping"), ("ready", "falling_asleep"),
    ("falling_asleep", "ready"), ("falling_asleep", "sleeping"), ("falling_asleep", "backoff"),
    ("falling_asleep", "failed"), ("falling_asleep", "stopping"),
    ("sleeping", "waking"), ("sleeping", "backoff"), ("sleeping", "failed"), ("sleeping", "stopping"),
    ("waking", "ready"), ("waking", "sleeping"), ("waking", "backoff"), ("waking", "failed"), ("waking", "stopping"),
    ("backoff", "starting"), ("backoff", "failed"), ("backoff", "stopping"),
    ("stopping", "stopped"), ("failed", "stopped"),
}


def spec(**fields: object) -> InstanceSpec:
    return InstanceSpec(**{"model": "org/model", "names": ("short", "org/model"), "flags": {}, "params": {},  # type: ignore[arg-type]
                           "timeout_s": 600.0, "start_timeout_s": 60.0, **fields})


def instance(state: State = State.STARTING, **fields: object) -> Instance:
    return Instance(**{"id": "ab12cd34", "spec": spec(), "created_at": 5000.0, "last_used": 100.0,  # type: ignore[arg-type]
                       "log_path": "/log", "state": state, **fields})


def no_release(lease: Lease, ok: bool) -> None:
    raise AssertionError("not asked for")


@pytest.mark.parametrize(("old", "new"), list(product(State, State)))
def test_every_edge_and_every_non_edge(old: State, new: State, caplog: pytest.LogCaptureFixture) -> None:
    heard: list[State] = []
    one = instance(old, on_change=lambda changed, before: heard.append(before))
    caplog.set_level(logging.INFO)
    if (str(old), str(new)) in ALLOWED:
        one.change_state(new, 7.0, "so")
        assert (one.state, one.changed_at, one.why, heard) == (new, 7.0, "so", [old])
        assert [record.getMessage() for record in caplog.records] == [f"ab12cd34 (org/model): {old} -> {new} (so)"]
    else:
        with pytest.raises(AssertionError, match=f"no edge {old} -> {new}"):
            one.change_state(new, 7.0, "so")
        assert (one.state, heard, caplog.records) == (old, [], [])


def test_the_table_of_edges_is_whole() -> None:
    assert set(EDGES) == set(State)
    assert {(str(old), str(new)) for old, news in EDGES.items() for new in news} == ALLOWED
    assert set(State) - {State.STOPPING, State.STOPPED, State.FAILED} == ACTIVE


@pytest.mark.parametrize("state", State)
def test_only_a_ready_instance_leases(state: State) -> None:
    one = instance(state, port=9000)
    if state is State.READY:
        lease = one.take_lease(no_release)
        assert (lease.instance_id, lease.port, one.leases) == (one.id, 9000, {lease})
    else:
        with pytest.raises(NotReady, match=str(state)):
            one.take_lease(no_release)
        assert one.leases == set()


def test_a_lease_is_given_back_with_what_happened() -> None:
    given: list[tuple[Lease, bool]] = []
    one = instance(State.READY, port=9000)
    first, second = (one.take_lease(lambda lease, ok: given.append((lease, ok))) for _ in range(2))
    first.release(ok=True)
    second.release()
    assert given == [(first, True), (second, False)]


def test_a_cut_lease_calls_back_once_and_keeps_its_first_error() -> None:
    lease, calls = Lease("id", 1, no_release), []
    lease.on_cut(lambda: calls.append("cut"))
    first = EngineDied("dead")
    lease.cut(first)
    lease.cut(EngineStopped("later"))
    assert (lease.cut_error, calls) == (first, ["cut"])


def test_a_callback_that_comes_after_the_cut_runs_at_once() -> None:
    lease, calls = Lease("id", 1, no_release), []
    lease.cut(EngineDied("dead"))
    lease.on_cut(lambda: calls.append("cut"))
    assert calls == ["cut"]


def test_a_callback_that_was_taken_back_is_not_called() -> None:
    lease = Lease("id", 1, no_release)
    lease.on_cut(lambda: pytest.fail("called"))
    lease.on_cut(None)
    lease.cut(EngineDied("dead"))


def test_it_idles_since_its_last_request_ended() -> None:
    one = instance(State.READY, port=9000, last_used=100.0)
    assert (one.idle_for(130.0), one.expires_in(130.0), one.expired(130.0)) == (30.0, 570.0, False)
    assert (one.expires_in(700.0), one.expired(700.0), one.expired(699.9)) == (0.0, True, False)


def test_it_does_not_idle_while_a_request_runs_or_waits() -> None:
    one = instance(State.READY, port=9000)
    one.take_lease(no_release)
    assert (one.idle_for(9e9), one.expired(9e9), one.expires_in(9e9)) == (0.0, False, 600.0)
    other = instance(State.BACKOFF, waiting=1)
    assert not other.expired(9e9)


def test_a_timeout_of_zero_never_expires() -> None:
    one = instance(State.READY, spec=spec(timeout_s=0.0))
    assert (one.expired(9e9), one.expires_in(9e9)) == (False, None)


@pytest.mark.parametrize("state", [state for state in State if state not in ACTIVE])
def test_what_will_not_serve_has_no_time_to_expire(state: State) -> None:
    assert instance(state).expires_in(200.0) is None


def test_the_wait_doubles_and_the_fifth_failure_in_ten_minutes_is_the_last() -> None:
    one = instance()
    assert [one.record_failure(at) for at in (0.0, 10.0, 20.0, 30.0, 599.0)] == [1.0, 2.0, 4.0, 8.0, None]


def test_slow_failures_never_add_up_and_wait_a_minute_at_most() -> None:
    one = instance()
    assert [one.record_failure(200.0 * n) for n in range(9)] == [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0, 60.0]


def test_the_window_slides() -> None:
    one = instance()
    for at in (0.0, 1.0, 2.0, 3.0):
        assert one.record_failure(at) is not None
    assert one.record_failure(602.5) is not None       # three have left the window
    assert one.record_failure(602.6) is not None
    assert one.record_failure(602.7) is not None
    assert one.record_failure(602.8) is None


def test_one_that_served_for_long_begins_anew() -> None:
    one = instance()
    assert [one.record_failure(200.0 * n) for n in range(5)] == [1.0, 2.0, 4.0, 8.0, 16.0]
    one.change_state(State.READY, 1000.0, "up")
    assert one.record_failure(1599.0) == 32.0
    one.changed_at = 1600.0
    assert one.record_failure(2200.0) == 1.0


def test_a_view_is_frozen_and_says_it_in_wall_clock() -> None:
    problem = Problem("engine_died", "it died")
    one = instance(State.BACKOFF, port=9000, pid=77, devices=(1,), last_error=problem, retry_at=140.0, restarts=2,
                   last_used=100.0, waiting=0)
    view = one.view(130.0, 6000.0)
    assert (view.id, view.names, view.port, view.pid, view.devices) == (
        "ab12cd34", ("short", "org/model"), 9000, 77, (1,))
    assert (view.last_used_at, view.created_at, view.expires_in_s, view.retry_in_s) == (5970.0, 5000.0, 570.0, 10.0)
    assert (view.last_error, view.restarts, view.in_flight) == (problem, 2, 0)
    one.port = 1
    assert view.port == 9000
    with pytest.raises(AttributeError):
        view.port = 2  # type: ignore[misc]


def test_only_backoff_has_a_next_start() -> None:
    assert instance(State.READY, retry_at=140.0).view(130.0, 0.0).retry_in_s is None
