"""What requests and operators want of the catalog's models: loads on demand, queues, and who is not wanted any more.

A load belongs to all requests that wait for its model: the first one causes it, the others find it.
"""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from config import ModelConfig, Settings
from errors import DaemonError, LoadFailed, ManagerError, ModelNotFound, NoRoom, QueueFull, ShuttingDown
from instances import switching
from instances.instance import ACTIVE, Candidate, Haste, Instance, InstanceSpec, InstanceView, State
from instances.rooms import Rooms
from instances.specs import entry_changed, entry_for, spec_of, with_soft

log = logging.getLogger("vllm_server.manager")

GRACE_S = 1.0               # between two looks of a request that waits, nobody seems to wait
FAILED_FOR_S = 60.0         # a load that failed for a reason that may pass is tried again after so long,
NO_ROOM_FOR_S = 5.0         # one that found no room after so long
QUEUE_RETRY_S = 10


@dataclass(frozen=True)
class Loadable:
    """A model that can be loaded and is not."""

    id: str
    model: str
    names: tuple[str, ...]
    status: str = "unloaded"


class Demand(Rooms):
    """Thread-safe, on the registry's lock."""

    @property
    @abstractmethod
    def settings(self) -> Settings: ...

    @abstractmethod
    def _add(self, spec: InstanceSpec, after: frozenset[str]) -> Instance:
        """Caller holds the lock."""

    @abstractmethod
    def _begin(self, instance: Instance) -> None:
        """Write its record and start its keeper; caller does not hold the lock.  Raises ManagerError."""

    # --- requests -------------------------------------------------------------------------------------------------

    def demand(self, name: str) -> list[Candidate]:
        """The instances that answer to this name, as `candidates`; what may be loaded and is not there is started.

        Empty when the name is unknown or may not be loaded.  Raises LoadFailed (NoRoom where it is about memory) with
        the cause of a load that failed not long ago or for good, ShuttingDown, Conflict, ManagerError.
        """
        with self._changed:
            found = self._by_name.get(name, ())
            if any(one.state in ACTIVE and not one.outdated for one in found):
                return _candidates(found)
            entry = entry_for(self.settings, name) if self.settings.auto_load != "off" else None
            if entry is None or self._detaching:
                return _candidates(found)
            self._refuse_failed(entry)
            made = self._make(entry, on_demand=True)
            for one in made:
                one.waiting += 1        # until who asks has entered the queue: a disk may take seconds for the record
        try:
            self._begin_all(made)
        finally:
            with self._changed:
                for one in made:
                    one.waiting -= 1
                    one.last_used = self.clock()
        return self.candidates(name)

    @contextmanager
    def queue(self, name: str) -> Iterator[None]:
        """Held while a request waits for a model.  Raises QueueFull when MAX_QUEUE others do already.

        Those who wait keep the model's load going and its instances from idling, and have others make room for it.
        """
        token = object()
        with self._changed:
            line = self._lines.setdefault(name, {})
            if len(line) >= self.settings.max_queue:
                raise QueueFull(f"{len(line)} requests wait for {name[:256]} already (MAX_QUEUE); try again later",
                                param="model", retry_after_s=QUEUE_RETRY_S)
            line[token] = self.clock()
        try:
            yield
        finally:
            with self._changed:
                del line[token]
                if not line:
                    self._lines.pop(name, None)
                for one in self._by_name.get(name, ()):
                    one.last_used = self.clock()

    # --- operators ------------------------------------------------------------------------------------------------

    def load(self, name: str) -> InstanceView:
        """Begin to load a configured model, or wake it; it stays when nobody waits for it.

        Raises ModelNotFound, Conflict, ShuttingDown, ManagerError.
        """
        with self._changed:
            entry = self._entry(name)
            active = [one for one in self._by_name.get(name, ()) if one.state in ACTIVE and not one.outdated]
            made: list[Instance] = []
            if not active:
                made = active = self._make(entry)
            for one in active:
                one.on_demand, one.modest, one.wake_wanted = False, False, True
                self._begin_wake(one, "told to load")
            first = active[0]
        self._begin_all(made)
        return self.view(first)

    def unload(self, name: str, *, force: bool = False) -> list[InstanceView]:
        """Begin to stop all instances of this name; a request or a load brings them back.  Raises ModelNotFound."""
        with self._changed:
            found = self._by_name.get(name, ())
            if not found:
                self._entry(name)
            for one in found:
                self._begin_stop(one, Haste.KILL if force else Haste.DRAIN, "unloaded")
            views = [self._view(one) for one in found]
        for one in found:
            self._nudge(one.id)
        return views

    def loadable(self) -> list[Loadable]:
        """What a request could load and is not there, in the catalog's order."""
        with self._changed:
            if self.settings.auto_load == "off":
                return []
            return [Loadable(entry.id, entry.model, entry.served_names)
                    for entry in self.settings.catalog.models.values() if not self._is_active(entry.id)]

    def preload(self, ids: Sequence[str]) -> None:
        """Begin to load these models, the most important first; what goes wrong with one is its own matter."""
        entries = sorted((self.settings.catalog.models[id_] for id_ in ids), key=lambda entry: -entry.priority)
        for entry in entries:
            try:
                with self._changed:
                    made = [] if self._is_active(entry.id) else self._make(entry, modest=True)
                self._begin_all(made)
            except DaemonError as error:
                log.error("%s is not preloaded: %s", entry.id, error.message)

    # --- inside; the caller holds the lock ------------------------------------------------------------------------

    def _is_active(self, name: str) -> bool:
        return any(one.state in ACTIVE for one in self._by_name.get(name, ()))

    def _entry(self, name: str) -> ModelConfig:
        entry = entry_for(self.settings, name)
        if entry is None:
            known = ", ".join(list(self.settings.catalog.models)[:20])
            raise ModelNotFound(f"there is no model {name[:256]!r} in the configuration; it has {known or 'none'}",
                                param="model")
        return entry

    def _make(self, entry: ModelConfig, *, on_demand: bool = False, modest: bool = False) -> list[Instance]:
        """New instances of an entry, as many as its least; they take the place of those that are outdated or end."""
        if self._closing:
            raise ShuttingDown("the daemon is shutting down and starts no instances")
        spec = spec_of(self.settings, entry)
        old = [one for one in self._by_name.get(entry.id, ()) if one.state is not State.FAILED]
        for one in old:
            if one.state in ACTIVE:
                self._begin_stop(one, Haste.PATIENT, "its configuration changed")
        self._forget_failed(spec)
        self._check_names(spec)
        made = [self._add(spec, frozenset(one.id for one in old)) for _ in range(max(1, entry.replicas[0]))]
        for one in made:
            one.on_demand, one.modest, one.seated = on_demand, modest, False
        self._counters["loads"] += len(made)
        return made

    def _refuse_failed(self, entry: ModelConfig) -> None:
        """Raises the cause of a load that is not to be tried again yet."""
        now, wanted = self.clock(), spec_of(self.settings, entry)
        for one in self._by_name.get(entry.id, ()):
            problem = one.last_error
            if one.state is not State.FAILED or problem is None or entry_changed(one.spec, wanted):
                continue
            no_room = problem.code == NoRoom.code
            left_s = one.changed_at + (NO_ROOM_FOR_S if no_room else FAILED_FOR_S) - now
            if problem.permanent or left_s > 0:
                raise self._refusal(one, None if problem.permanent else max(1, round(left_s)))

    def _refusal(self, failed: Instance, retry_after_s: int | None) -> DaemonError:
        problem = failed.last_error
        assert problem is not None
        if problem.code in (NoRoom.code, "not_enough_gpus"):
            return NoRoom(problem.message, code=problem.code, param="model", retry_after_s=retry_after_s)
        error = LoadFailed(problem.message, code=problem.code, status=problem.status, param="model")
        error.retry_after_s = retry_after_s
        return error

    def _comes_back(self, instance: Instance) -> bool:
        return (instance.spec.config_id is not None and self.settings.auto_load != "off"
                and self._entry_of(instance) is not None)

    def _give_up_loads(self, now: float) -> None:
        """Loads that requests began, and of which none waits any more, end unless they are far."""
        for one in list(self._instances.values()):
            if one.state is State.WAKING and one.grant is None and not one.wake_wanted and not self._wanted(one):
                if now - one.last_used >= GRACE_S:      # none waits for the room that it seeks
                    one.change_state(State.SLEEPING, now, "nobody waits for it any more")
                continue
            if not one.on_demand or one.state not in (State.STARTING, State.BACKOFF) or self._wanted(one):
                continue
            elapsed_s = 0.0 if one.launched_at is None else now - one.launched_at
            if now - one.last_used >= GRACE_S and switching.give_up(
                    waiting=0, elapsed_s=elapsed_s, expected_s=one.reload_s):
                self._counters["cancelled_loads"] += 1
                self._begin_stop(one, Haste.DRAIN, "nobody waits for it any more")

    def _apply_catalog(self) -> None:
        """Compare what runs with the catalog: times and ranks are taken over, what needs another engine is outdated
        and goes as soon as nobody uses it, what was removed goes when its requests have ended."""
        for one in list(self._instances.values()):
            entry = self._entry_of(one)
            if one.spec.config_id is None or one.state is State.STOPPING:
                continue
            if entry is None:
                self._begin_stop(one, Haste.PATIENT, "it was removed from the configuration")
                continue
            wanted = spec_of(self.settings, entry)
            one.outdated = entry_changed(one.spec, wanted)
            if not one.outdated:
                one.spec = with_soft(one.spec, wanted)

    def _entry_of(self, instance: Instance) -> ModelConfig | None:
        """The entry that it was made from, as it is now."""
        entry = self.settings.catalog.models.get(instance.spec.config_id or "")
        if entry is None and instance.spec.config_id == instance.spec.model:
            return entry_for(self.settings, instance.spec.model)
        return entry

    def _retire_outdated(self) -> list[Instance]:
        """Stop those that nobody uses; the new ones where there is to be one at all times."""
        made: list[Instance] = []
        for one in list(self._instances.values()):
            if not one.outdated or one.state not in ACTIVE or self._wanted(one):
                continue
            entry = self._entry_of(one)
            if entry is not None and entry.preload and not self._closing:
                made += self._make(entry)
            else:
                self._begin_stop(one, Haste.PATIENT, "its configuration changed")
        return made

    # --- inside; takes the lock -----------------------------------------------------------------------------------

    def _begin_all(self, made: Iterable[Instance]) -> None:
        """Raises the last error of those that could not be begun."""
        failed: ManagerError | None = None
        for instance in made:
            try:
                self._begin(instance)
            except ManagerError as error:
                failed = error
        if failed is not None:
            raise failed

    @abstractmethod
    def _check_names(self, spec: InstanceSpec) -> None:
        """Raises Conflict when a name of it belongs to another model.  Caller holds the lock."""


def _candidates(found: Iterable[Instance]) -> list[Candidate]:
    return [Candidate(one.id, one.state, len(one.leases)) for one in found]
