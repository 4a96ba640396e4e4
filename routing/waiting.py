"""How a request gets its lease: at once, or after the model it names has become ready.

A `Waiter` is one request on its way.  It may be asked in pieces (`lease(within_s)`), so that who waits long can be told
something in between.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Protocol

from errors import LoadFailed, ManagerError, NotFound, NotReady, StartTimeout
from instances.instance import ACTIVE, Candidate, InstanceView, Lease, Problem, State
from routing import balancer
from routing.client_watch import Watched
from routing.upstream import ClientLeft

LOOK_S = 0.5                # how often a waiting request looks whether its client is still there


class Manager(Protocol):
    """What waiting needs of the registry."""

    def lease(self, instance_id: str) -> Lease: ...

    def wait_for_change(self, timeout_s: float, wanted: Collection[str] = ()) -> None: ...

    def problem_of(self, instance_id: str) -> tuple[State, Problem | None, str] | None: ...

    def start_deadline_s(self, instance_id: str) -> float: ...

    def get(self, instance_id: str) -> InstanceView: ...


class Waiter:
    """`what` is called so in messages.  `backends` says who could serve it now, or raises: there is no such model.

    `queue` bounds how many wait; it is entered when there is something to wait for, and left in `close`.  `patience_s`
    None: as long as the slowest of the backends may take to start.
    """

    def __init__(self, manager: Manager, what: str, backends: Callable[[], list[Candidate]], watched: Watched, *,
                 queue: Callable[[], AbstractContextManager[object]] = nullcontext, prefer: str | None = None,
                 patience_s: float | None = None) -> None:
        self.what = what
        self._manager = manager
        self._backends = backends
        self._watched = watched
        self._queue = queue
        self._queued = ExitStack()
        self._prefer = prefer
        self._patience_s = patience_s
        self._deadline: float | None = None
        self._candidates: list[Candidate] = []

    def lease(self, within_s: float | None = None) -> Lease | None:
        """A lease on a ready backend; None when `within_s` seconds are over and none is ready.

        Raises what `backends` and `queue` raise, LoadFailed with the cause, StartTimeout, ClientLeft, ShuttingDown.
        """
        until = None if within_s is None else time.monotonic() + within_s
        while True:
            self._candidates = self._backends()
            chosen = balancer.pick(self._candidates, self._prefer)
            if chosen is not None:
                try:
                    return self._manager.lease(chosen)
                except (NotReady, NotFound):
                    continue
            raise_if_failed(self._manager, self._candidates, self.what)
            now = time.monotonic()
            if self._deadline is None:
                self._queued.enter_context(self._queue())
                self._deadline = now + self._patience(self._candidates)
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
        self._queued.close()

    def pause(self) -> None:
        """A moment, after a backend refused a connection: its keeper will notice, and another one may serve."""
        self._manager.wait_for_change(LOOK_S)

    def progress(self) -> tuple[str, float | None]:
        """What the backend that is nearest to serving does now, and how far it is (0 to 1) where that is known."""
        views = []
        for one in self._candidates:
            try:
                views.append(self._manager.get(one.id))
            except NotFound:
                continue
        coming = [view for view in views if view.state in ACTIVE]
        if not coming:
            return "waiting", None
        best = max(coming, key=lambda view: view.progress or 0.0)
        return best.phase or str(best.state), best.progress

    def _patience(self, candidates: Sequence[Candidate]) -> float:
        if self._patience_s is not None:
            return self._patience_s
        deadlines = []
        for one in candidates:
            try:
                deadlines.append(self._manager.start_deadline_s(one.id))
            except NotFound:
                continue
        return max(deadlines, default=LOOK_S)


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
