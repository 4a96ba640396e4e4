"""routing/waiting.py: how long a request waits, in which queue, and what ends it."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest

from errors import LoadFailed, ModelNotFound, StartTimeout
from instances.instance import Candidate, Lease, Problem, State
from routing.upstream import ClientLeft
from routing.waiting import Goal, Waiter


class FakeManager:
    """One instance in one state; `steps` are states that it takes at each change that is waited for."""

    def __init__(self, state: State, *, pid: int | None = None, steps: tuple[State, ...] = ()) -> None:
        self.state, self.pid = state, pid
        self.steps = list(steps)
        self.queued = 0
        self.most_queued = 0

    def candidates(self) -> list[Candidate]:
        return [Candidate("i", self.state, 0)]

    def grant(self, candidates: list[Candidate]) -> Lease | None:
        ready = [one.id for one in candidates if one.state is State.READY]
        return Lease(ready[0], 1, lambda lease, ok: None) if ready else None

    def wait_for_change(self, timeout_s: float, wanted: Collection[str] = ()) -> None:
        assert timeout_s <= 0.5
        if self.steps:
            self.state = self.steps.pop(0)

    def problem_of(self, instance_id: str) -> tuple[State, Problem | None, str]:
        return self.state, Problem("no_weights", "it has none", status=404), "failed"

    def get(self, instance_id: str) -> Any:
        return SimpleNamespace(state=self.state, pid=self.pid, phase="loading_weights", progress=0.5,
                               spec=SimpleNamespace(start_timeout_s=0.02))

    @contextmanager
    def queue(self, name: str) -> Iterator[None]:
        assert name == "m"
        self.queued += 1
        self.most_queued = max(self.most_queued, self.queued)
        try:
            yield
        finally:
            self.queued -= 1

    def expected_start_s(self, name: str) -> float | None:
        return 7.0


def waiter(manager: FakeManager, *, gone: bool = False, patience_s: float | None = None) -> Waiter:
    watched: Any = SimpleNamespace(gone=gone)
    return Waiter(manager, Goal("the model m", "m", manager.candidates), manager.grant, watched, patience_s=patience_s)


def test_who_need_not_wait_enters_no_queue() -> None:
    manager = FakeManager(State.READY)
    found = waiter(manager).lease()
    assert found is not None and found.instance_id == "i"
    assert manager.most_queued == 0


def test_the_queue_is_entered_once_and_left_in_close() -> None:
    manager = FakeManager(State.STARTING, pid=1, steps=(State.STARTING, State.STARTING, State.READY))
    one = waiter(manager, patience_s=60)
    assert one.lease() is not None
    assert (manager.most_queued, manager.queued) == (1, 1)
    one.close()
    one.close()
    assert manager.queued == 0


def test_in_pieces() -> None:
    manager = FakeManager(State.STARTING, pid=1)
    one = waiter(manager, patience_s=60)
    assert one.lease(within_s=0) is None
    assert one.lease(within_s=0.01) is None
    assert one.progress() == ("loading_weights", 0.5)
    assert one.expected_s() == 7.0
    manager.state = State.READY
    assert one.lease(within_s=0) is not None
    assert manager.most_queued == 1


def test_a_start_that_takes_too_long() -> None:
    with pytest.raises(StartTimeout, match="the model m is still loading"):
        waiter(FakeManager(State.STARTING, pid=1)).lease()


def test_what_has_not_begun_for_want_of_room_takes_no_time() -> None:
    manager = FakeManager(State.STARTING, pid=None)
    one = waiter(manager)
    assert one.lease(within_s=0.1) is None      # five times the limit of a start
    manager.pid = 1
    with pytest.raises(StartTimeout):
        one.lease()


def test_a_limit_that_was_set_holds_then_too() -> None:
    with pytest.raises(StartTimeout):
        waiter(FakeManager(State.STARTING, pid=None), patience_s=0.02).lease()


def test_a_client_that_left() -> None:
    with pytest.raises(ClientLeft):
        waiter(FakeManager(State.STARTING, pid=1), gone=True, patience_s=60).lease()


def test_a_load_that_fails_meanwhile() -> None:
    with pytest.raises(LoadFailed) as caught:
        waiter(FakeManager(State.STARTING, pid=1, steps=(State.FAILED,)), patience_s=60).lease()
    assert (caught.value.code, caught.value.status) == ("no_weights", 404)


def test_a_model_that_is_gone_meanwhile() -> None:
    manager = FakeManager(State.STARTING, pid=1)
    one = waiter(manager, patience_s=60)
    assert one.lease(within_s=0) is None

    def gone() -> list[Candidate]:
        raise ModelNotFound("no more")

    one._goal = one._goal._replace(backends=gone)
    with pytest.raises(ModelNotFound):
        one.lease()
