"""Which of a model's backends gets the next request: this machine's instances and other machines' servers alike.

Only advice: the lease decides.  Nothing here blocks; what is read was written by whom it concerns (the registry, the
fleet), so that a choice among a thousand servers costs no more than one among dozens.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

from instances.instance import ACTIVE, Candidate, State
from routing.circuit import CLOSED, Circuit
from routing.policies import Backend, Headers, Load, Policy, Reading, hash64, projected
from routing.remote import BUSY_LIMIT_S, BUSY_S, Fleet, Outcome, Pool, RemoteLease

LOOK_AT = 16                # of more servers than these, so many from a random (or the key's) place on are compared
LOADING = ACTIVE - {State.READY}
DEFAULT_CAPACITY = 256      # of an instance whose flags do not say (--max-num-seqs)


class Ask(NamedTuple):
    """What choosing needs to know of a request."""

    model: str = ""
    key: int | None = None                  # `hash64` of what the policy goes by
    prefer: str | None = None               # the backend that has what this request refers to
    tried: Collection[str] = ()             # backends that it has been to already


class Choice(NamedTuple):
    """`cold`: a server that would load the model first."""

    id: str
    local: bool
    cold: bool = False


class Track:
    """What is known of one local instance beside the registry's record."""

    def __init__(self, instance_id: str) -> None:
        self.seed = hash64(instance_id)
        self.capacity = DEFAULT_CAPACITY
        self.circuit: Circuit = CLOSED
        self.reading: Reading | None = None
        self.busy_until = 0.0
        self.picked = 0


class Tracks(dict[str, Track]):
    """By instance; whoever is asked for is there from then on."""

    def __missing__(self, instance_id: str) -> Track:
        track = self[instance_id] = Track(instance_id)
        return track


class Balancer:
    """Thread-safe.  `policy` and `prefer_local` may be replaced at any time."""

    def __init__(self, fleet: Fleet, policy: Policy | None = None, *, prefer_local: bool = True,
                 clock: Callable[[], float] = time.monotonic, draw: random.Random | None = None) -> None:
        self.fleet = fleet
        self.policy: Policy = policy or Load()
        self.prefer_local = prefer_local
        self._clock = clock
        self._draw = draw or random.Random()
        self._lock = threading.Lock()
        self._tracks = Tracks()
        self._picks = 0

    # --- choosing -------------------------------------------------------------------------------------------------

    def key(self, headers: Headers, body: Mapping[str, Any] | None) -> int | None:
        found = self.policy.key(headers, body)
        return None if found is None else hash64(found)

    def choose(self, candidates: Sequence[Candidate], ask: Ask) -> Choice | None:
        """A backend that answers now; else a server that would load the model, if no instance here is loading it.

        None when there is neither: what `candidates` load may be waited for, and `retry_after_s` tells whether
        somebody is only busy.
        """
        ready = [one for one in candidates if one.state is State.READY and one.id not in ask.tried]
        pools = self.fleet.pools(ask.model)
        if len(ready) == 1 and not pools.warm:
            return Choice(ready[0].id, local=True)      # the usual case on one machine
        now = self._clock()
        locals_ = self._usable_locals(ready, now)
        if ask.prefer is not None and (preferred := self._preferred(ask, ready)) is not None:
            return preferred
        if not (self.prefer_local and any(one.utilisation < 1.0 for one in locals_)):
            locals_ += self._usable(pools.warm, ask, now)
        if locals_:
            chosen = self.policy.choose(best_tier(locals_, now), ask.key, self._draw)
            return Choice(chosen.id, chosen.local)
        if any(one.state in LOADING for one in candidates) or not pools.cold:
            return None
        cold = self._usable(pools.cold, ask, now)
        if not cold:
            return None
        return Choice(self.policy.choose(best_tier(cold, now), ask.key, self._draw).id, local=False, cold=True)

    def has_room_elsewhere(self, model: str) -> bool:
        """Whether a server has the model ready and room for more: no instance need be started for it."""
        now = self._clock()
        return any(one.utilisation < 1.0 and one.open_until <= now
                   for one in self._usable(self.fleet.pools(model).warm, Ask(model), now))

    def retry_after_s(self, model: str) -> float | None:
        """When the first of those servers wants requests again that are only busy; None when none is."""
        now = self._clock()
        pools = self.fleet.pools(model)
        times = [one.busy[model] - now for pool in pools for one in pool.servers
                 if not one.view.out and one.is_busy(model, now)]
        return max(0.0, min(times)) if times else None

    def _preferred(self, ask: Ask, ready: Sequence[Candidate]) -> Choice | None:
        if any(one.id == ask.prefer for one in ready):
            return Choice(str(ask.prefer), local=True)
        for pool in self.fleet.pools(ask.model):
            for server in pool.servers:
                if server.url == ask.prefer and not server.view.out and server.url not in ask.tried:
                    return Choice(server.url, local=False)
        return None

    def _usable(self, pool: Pool, ask: Ask, now: float) -> list[Backend]:
        """Snapshots of up to LOOK_AT servers that take requests."""
        servers = pool.servers
        if len(servers) > LOOK_AT:
            sticky = ask.key is not None and self.policy.sticky
            found = []
            for server in pool.around(ask.key if sticky and ask.key is not None else self._draw.random()):
                if not server.view.out and server.url not in ask.tried and not server.is_busy(ask.model, now):
                    found.append(server.view)
                    if len(found) == LOOK_AT:
                        break
            return found
        return [server.view for server in servers
                if not server.view.out and not server.is_busy(ask.model, now) and server.view.id not in ask.tried]

    def _usable_locals(self, ready: Sequence[Candidate], now: float) -> list[Backend]:
        """One that is only busy is asked when it is the only one: its answer says more than ours."""
        found = [(one, self._track(one.id)) for one in ready]
        if len(found) > 1:
            found = [(one, track) for one, track in found if track.busy_until <= now] or found
        return [_local(one, track) for one, track in found]

    # --- local instances ------------------------------------------------------------------------------------------

    def _track(self, instance_id: str) -> Track:
        track = self._tracks.get(instance_id)
        if track is None:
            with self._lock:
                track = self._tracks[instance_id]
        return track

    def note_pick(self, instance_id: str) -> bool:
        """A lease on an instance was taken.  True: its outcome decides about the circuit breaker, and must be told."""
        with self._lock:
            self._picks += 1
            track = self._tracks[instance_id]
            track.picked = self._picks
            track.circuit = track.circuit.entered()
            return track.circuit.probing

    def note_outcome(self, backend: str | RemoteLease, outcome: Outcome, retry_after_s: float | None = None) -> None:
        """What a request said about its backend: an instance's id, or the lease on a server."""
        if isinstance(backend, RemoteLease):
            self.fleet.note_outcome(backend, outcome, retry_after_s)
            return
        track = self._track(backend)
        if outcome is Outcome.GOOD and track.circuit is CLOSED and not track.busy_until:
            return      # as nearly always: nothing changes
        now = self._clock()
        with self._lock:
            if outcome in (Outcome.GOOD, Outcome.STALE):
                track.circuit, track.busy_until = CLOSED, 0.0
            elif outcome is Outcome.BUSY:
                track.busy_until = now + min(BUSY_S if retry_after_s is None else retry_after_s, BUSY_LIMIT_S)
            elif outcome is Outcome.FAILED:
                track.circuit = track.circuit.failed(now)
            else:
                track.circuit = track.circuit.left()

    def note_locals(self, capacities: Mapping[str, int]) -> None:
        """The instances that there are; what is known of others is forgotten."""
        with self._lock:
            for gone in self._tracks.keys() - capacities.keys():
                del self._tracks[gone]
            for instance_id, capacity in capacities.items():
                self._tracks[instance_id].capacity = capacity

    def note_reading(self, instance_id: str, reading: Reading) -> None:
        with self._lock:
            if (track := self._tracks.get(instance_id)) is not None:
                track.reading = reading

    def local_view(self, candidate: Candidate) -> tuple[Backend, Reading | None, Circuit]:
        """For readers."""
        track = self._tracks.get(candidate.id) or Track(candidate.id)
        return _local(candidate, track), track.reading, track.circuit


def _local(one: Candidate, track: Track) -> Backend:
    """All requests of an instance are the daemon's: a reading tells which of them wait."""
    reading = track.reading
    if reading is not None:
        reading = reading._replace(own=reading.running + reading.waiting)
    running, waiting = projected(reading, one.in_flight, track.capacity)
    return Backend(id=one.id, capacity=track.capacity, running=running, waiting=waiting, own=one.in_flight,
                   seed=track.seed, picked=track.picked, local=True, open_until=track.circuit.blocked_until)


def best_tier(backends: Sequence[Backend], now: float) -> Sequence[Backend]:
    """Those in good health; else those under suspicion; else those whose circuit breaker is open: an answer of theirs
    says more than none."""
    closed = [one for one in backends if one.open_until <= now]
    return [one for one in closed if not one.suspect] or closed or backends

