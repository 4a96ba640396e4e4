"""How a request gets its lease: at once, or after the model it names has become ready.

A `Waiter` is one request on its way.  It may be asked in pieces (`lease(within_s)`), so that who waits long can be told
something in between.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, suppress
from typing import NamedTuple, Protocol

from errors import LoadFailed, ManagerError, NotFound, NotReady, StartTimeout
from instances.instance import ACTIVE, Candidate, InstanceView, Lease, Problem, State
from routing.client_watch import Watched
from routing.upstream import ClientLeft

LOOK_S = 0.5                # how often a waiting request looks whether its client is still there


class Manager(Protocol):
    """What waiting needs of the registry."""

    def wait_for_change(self, timeout_s: float, wanted: Collection[str] = ()) -> None: ...

    def problem_of(self, instance_id: str) -> tuple[State, Problem | None, str] | None: ...

    def get(self, instance_id: str) -> InstanceView: ...

    def queue(self, name: str) -> AbstractContextManager[None]: ...

    def expected_start_s(self, name: str) -> float | None: ...


class Goal(NamedTuple):
    """What a request is for: a model, or one instance."""

    what: str                                   # as messages call it
    name: str                                   # the model's, whose queue it waits in
    backends: Callable[[], list[Candidate]]     # who could serve it now; raises where nobody ever will


class Waiter:
    """`grant` takes a lease on one of the backends that are ready, or on another machine's server; None: there is
    something to wait for.  It may raise NotReady and NotFound, and is asked again then.

    It enters the queue when there is something to wait for, and leaves it in `close`.

    `patience_s` None: as long as the slowest of the backends may take to start, from when its start begins.
    """

    def __init__(self, manager: Manager, goal: Goal, grant: Callable[[list[Candidate]], Lease | None],
                 watched: Watched, *, patience_s: float | None = None) -> None:
        self.what = goal.what
        self._manager = manager
        self._goal = goal
        self._grant = grant
        self._watched = watched
        self._queued: AbstractContextManager[None] | None = None
        self._patience_s = patience_s
        self._deadline: float | None = None
        self._candidates: list[Candidate] = []

    def lease(self, within_s: float | None = None) -> Lease | None:
        """A lease on a ready backend; None when `within_s` seconds are over and none is ready.

        Raises what `grant` and the goal's `backends` raise, QueueFull, LoadFailed with the cause, StartTimeout,
        ClientLeft, ShuttingDown.
        """
        until = None if within_s is None else time.monotonic() + within_s
        while True:
            self._candidates = self._goal.backends()
            try:
                if (lease := self._grant(self._candidates)) is not None:
                    return lease
            except (NotReady, NotFound):
                continue
            raise_if_failed(self._manager, self._candidates, self.what)
            now = time.monotonic()
            if self._deadline is None:
                self._enter_queue()
                self._deadline = now + self._patience()
            elif self._patience_s is None and self._not_begun():
                self._deadline = now + self._patience()
            if now >= self._deadline:
                raise StartTimeout(f"{self.what} is still loading; GET /instances shows how far it is",
                                   retry_after_s=10)
            if self._watched.gone:
                raise ClientLeft
            if until is not None and now >= until:
                return None
            wait_s = min(LOOK_S, self._deadline - now, LOOK_S if until is None else until - now)
            self._manager.wait_for_change(wait_s, wanted=[one.id for one in self._candidates])

    def close(self) -> None:
        """It waits no longer.  A second call does nothing."""
        if (queued := self._queued) is not None:
            self._queued = None
            queued.__exit__(None, None, None)

    def _enter_queue(self) -> None:
        queued = self._manager.queue(self._goal.name)
        queued.__enter__()      # raises where the queue is full
        self._queued = queued

    def pause(self) -> None:
        """A moment, after a backend refused a connection: its keeper will notice, and another one may serve."""
        self._manager.wait_for_change(LOOK_S)

    def progress(self) -> tuple[str, float | None]:
        """What the backend that is nearest to serving does now, and how far it is (0 to 1) where that is known."""
        coming = [view for view in self._views() if view.state in ACTIVE]
        if not coming:
            return "waiting", None
        best = max(coming, key=lambda view: view.progress or 0.0)
        return best.phase or str(best.state), best.progress

    def expected_s(self) -> float | None:
        """How long such a wait took before."""
        return self._manager.expected_start_s(self._goal.name)

    def _patience(self) -> float:
        if self._patience_s is not None:
            return self._patience_s
        return max((view.spec.start_timeout_s for view in self._views()), default=LOOK_S)

    def _not_begun(self) -> bool:
        """Whether all that could serve it are still waiting for their place: others have their turn."""
        coming = [view for view in self._views() if view.state in ACTIVE]
        return bool(coming) and all(view.state is State.STARTING and view.pid is None for view in coming)

    def _views(self) -> list[InstanceView]:
        views = []
        for one in self._candidates:
            with suppress(NotFound):
                views.append(self._manager.get(one.id))
        return views


def raise_if_failed(manager: Manager, candidates: Sequence[Candidate], what: str) -> None:
    """Raises what a client is told when none of these will serve: LoadFailed with the cause, or that they end."""
    if any(candidate.state in ACTIVE for candidate in candidates):
        return
    failed = next((one for one in candidates if one.state is State.FAILED), None)
    found = manager.problem_of(failed.id) if failed is not None else None
    if found is not None and found[1] is not None:
        raise LoadFailed(found[1].message, code=found[1].code, status=found[1].status, param="model")
    raise ManagerError(f"{what} is being stopped; create it again with POST /instances", code="stopping",
                       retry_after_s=5)
