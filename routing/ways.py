"""Where one request may go, and the lease that it gets there.

What may be asked of the registry, the fleet and the balancer about one request stands here; sending it is
routing/forwarding.py.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Protocol

from config import Settings
from errors import (
    BackendsBusy,
    DaemonError,
    LoopDetected,
    ModelNotFound,
    NoServer,
    NotReady,
    ServerLost,
    ShuttingDown,
)
from instances.demand import Loadable
from instances.instance import Candidate, InstanceView, Lease, State
from routing.attempts import Attempts
from routing.balancer import LOADING, Ask, Balancer
from routing.remote import Outcome, RemoteLease
from routing.waiting import Goal

NAMES_TOLD = 20     # models that a message names


class Manager(Protocol):
    """What a way needs of the registry."""

    @property
    def settings(self) -> Settings: ...

    def candidates(self, name: str) -> list[Candidate]: ...

    def demand(self, name: str) -> list[Candidate]: ...

    def loadable(self) -> list[Loadable]: ...

    def model_names(self) -> list[str]: ...

    def get(self, instance_id: str) -> InstanceView: ...

    def lease(self, instance_id: str) -> Lease: ...


@dataclass(frozen=True)
class Way:
    """`only`: to the server with this url and no other."""

    goal: Goal
    ask: Ask
    attempts: Attempts = field(default_factory=lambda: Attempts(0))
    only: str | None = None


class Ways:
    """Thread-safe."""

    def __init__(self, manager: Manager, balancer: Balancer) -> None:
        self._manager = manager
        self._balancer = balancer
        self._fleet = balancer.fleet

    # --- ways -----------------------------------------------------------------------------------------------------

    def to_model(self, model: str, key: int | None = None, prefer: str | None = None, via: str = "") -> Way:
        """To whoever serves it.  `via`: through which proxies it came.  Raises LoopDetected."""
        if self._fleet.name in via:
            raise LoopDetected(f"a request for {model[:256]!r} has been here before: two vllm-servers list each other "
                               "for it in their servers.toml", param="model")
        attempts = Attempts(self._fleet.config.max_retries)
        goal = Goal(model, model, lambda: self._backends(model))
        return Way(goal, Ask(model, key, prefer, attempts.tried), attempts)

    def to_instance_of(self, model: str) -> Way:
        """To an instance of this machine, tried once."""
        return Way(Goal(model, model, lambda: self._instances(model)), Ask())

    def to_one(self, backend: str) -> Way:
        """To this instance, or the server with this url.  Raises NotFound."""
        if "://" in backend:
            return Way(Goal(f"the server {backend}", backend, list), Ask(), only=backend)
        name = self._manager.get(backend).names[0]
        return Way(Goal(f"instance {backend}", name, lambda: self._one(backend)), Ask())

    # --- who is there ---------------------------------------------------------------------------------------------

    def _backends(self, model: str) -> list[Candidate]:
        """The instances of a model; none if only servers have it.

        What is configured here and not there is loaded, unless servers have room and need not wait for this machine;
        what speaks against that is told only if no server can help.  Raises ModelNotFound, and what `demand` does.
        """
        if not self.has_servers(model):
            return self._instances(model)
        if not self._balancer.prefer_local and self._balancer.has_room_elsewhere(model):
            return self._manager.candidates(model)
        try:
            return self._manager.demand(model)
        except ShuttingDown:
            raise
        except DaemonError:
            candidates = self._manager.candidates(model)
            if self._balancer.choose(candidates, Ask(model)) is None:
                raise
            return candidates

    def has_servers(self, model: str) -> bool:
        warm, cold = self._fleet.pools(model)
        return bool(warm.servers or cold.servers)

    def _instances(self, model: str) -> list[Candidate]:
        candidates = self._manager.demand(model)
        if not candidates:
            raise ModelNotFound(self._not_here(model), param="model")
        return candidates

    def _not_here(self, name: str) -> str:
        entry = self._manager.settings.catalog.find(name)
        if entry is not None:
            return (f"the model {name[:256]!r} is not loaded, and AUTO_LOAD is off: POST /admin/models/{entry.id}/load "
                    "loads it")
        names = self._manager.model_names()
        names += [known for one in self._manager.loadable() for known in one.names if known not in names]
        names += [known for known in sorted(self._fleet.models()) if known not in names]
        more = f" and {len(names) - NAMES_TOLD} more" if len(names) > NAMES_TOLD else ""
        return (f"there is no model {name[:256]!r} here. There are: {', '.join(names[:NAMES_TOLD]) or 'none'}{more}. "
                "Add it to config.yaml, or start it with POST /instances")

    def _one(self, instance_id: str) -> list[Candidate]:
        view = self._manager.get(instance_id)
        return [Candidate(view.id, view.state, view.in_flight)]

    # --- leases ---------------------------------------------------------------------------------------------------

    def grant(self, way: Way, candidates: list[Candidate]) -> Lease | None:
        """A lease on the backend that is chosen now; None when there is something to wait for.

        Raises NotReady or NotFound when it must be chosen again, else what the client is to be told.
        """
        if way.only is not None:
            try:
                return self._fleet.lease(way.only, "")
            except NotReady as error:
                raise ServerLost(error.message) from None
        choice = self._balancer.choose(candidates, way.ask)
        if choice is None:
            self._raise_if_hopeless(way, candidates)
            return None
        if not choice.local:
            return self._fleet.lease(choice.id, way.ask.model)
        lease = self._manager.lease(choice.id)
        if self._balancer.note_pick(choice.id):
            lease.when_released(lambda: self._balancer.note_outcome(choice.id, Outcome.UNKNOWN))
        return lease

    def another(self, way: Way, lease: Lease) -> bool:
        """Whether some other backend can take the request now, with time left for it."""
        if not way.ask.model or self.left_s(way, lease) <= 0:
            return False
        ask = way.ask._replace(tried={*way.attempts.tried, lease.instance_id})
        return self._balancer.choose(self._manager.candidates(way.ask.model), ask) is not None

    def left_s(self, way: Way, lease: Lease) -> float:
        """What is left of the time to the first byte; a server that need not load the model has a limit of its own."""
        warm_server = isinstance(lease, RemoteLease) and not lease.cold
        limit_s = self._fleet.config.request_timeout_s if warm_server else self._manager.settings.request_timeout_s
        return way.attempts.left_s(limit_s, time.monotonic())

    def _raise_if_hopeless(self, way: Way, candidates: list[Candidate]) -> None:
        """Nobody can take the request now.  Raises unless an instance will, or its own failure says more."""
        if way.attempts.last is not None:
            raise way.attempts.last
        if any(one.state in LOADING or one.state is State.FAILED for one in candidates) \
                or not self.has_servers(way.ask.model):
            return
        if (wait_s := self._balancer.retry_after_s(way.ask.model)) is not None:
            raise BackendsBusy(f"all that serve {way.goal.what} ask for fewer requests; try again in {wait_s:.0f} s",
                               param="model", retry_after_s=max(1, round(wait_s)))
        down = [f"{view.name}: {view.why}" for view in self._fleet.views() if way.ask.model in view.models]
        raise NoServer(f"no server of {way.goal.what} is up ({'; '.join(down[:5])}); GET /load-stats shows them all",
                       param="model", retry_after_s=max(1, round(self._fleet.config.health_check_interval_s)))
