"""Which of several backends gets a request: one class each, a function of snapshots.  Pure but for drawing lots.

A policy is asked only among backends that serve the model and take requests now; health, circuit breakers and what
was tried before are looked at earlier (routing/balancer.py).
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from typing import Any, NamedTuple, Protocol

HALF = 0.5              # below this share of its capacity a backend has room, and any that has is as good
WAITING_WEIGHT = 0.5    # of a request that waits, beside one that runs
SPREAD = 1.25           # how much more than its share a backend may get of the requests that a prefix sends there
MASK = (1 << 64) - 1


class Reading(NamedTuple):
    """What a backend's /metrics said.  `own`: how many of its requests were this daemon's."""

    at: float                       # monotonic
    running: float
    waiting: float
    own: float = 0.0
    cache_usage: float | None = None    # 0 to 1


class Backend(NamedTuple):
    """One backend as it is now.  `id` is an instance's, or a server's url."""

    id: str
    capacity: float
    running: float = 0.0            # the last reading and what the daemon sent since, see `projected`
    waiting: float = 0.0
    own: int = 0                    # requests of this daemon in flight
    weight: float = 1.0
    seed: int = 0                   # `hash64(id)`
    picked: int = 0                 # when it was last picked, counted in picks; 0: never
    local: bool = False
    out: bool = False               # down, or about to go: takes nothing
    suspect: bool = False           # its last check failed
    open_until: float = 0.0         # monotonic: until when its circuit breaker asks to leave it alone

    @property
    def utilisation(self) -> float:
        """Of its capacity; 1.0 is full."""
        return (self.running + self.waiting * WAITING_WEIGHT) / self.capacity

    @property
    def score(self) -> float:
        """Utilisation, as the weight makes it count: the lowest is next."""
        return (self.running + self.waiting * WAITING_WEIGHT) / (self.capacity * self.weight)


def projected(reading: Reading | None, own: int, capacity: float) -> tuple[float, float]:
    """(running, waiting) now, from the last reading and the daemon's own requests in flight now.

    What others had there is taken to be there still.  How many of them all can run: as many as did when some waited,
    else the capacity.
    """
    if reading is None:
        total, room = float(own), capacity
    else:
        others = max(0.0, reading.running + reading.waiting - reading.own)
        total = others + own
        room = max(1.0, reading.running) if reading.waiting > 0 else max(reading.running, capacity)
    running = min(total, room)
    return running, total - running


def hash64(text: str) -> int:
    """The same in every daemon and after every restart."""
    return int.from_bytes(blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest())


def mixed(key: int, seed: int) -> int:
    """How much a backend wants a key: the highest of all has it (rendezvous hashing).

    When a backend comes or goes, only the keys that it takes or had change their place.
    """
    value = ((key ^ seed) * 0x9E3779B97F4A7C15) & MASK
    value = ((value ^ (value >> 29)) * 0xBF58476D1CE4E5B9) & MASK
    return value ^ (value >> 32)


class Headers(Protocol):
    """Of a request, whatever the case of their names."""

    def get(self, name: str, /) -> str | None: ...


class Policy(Protocol):
    """`key` finds what of a request decides where it goes, or None; `choose` takes its `hash64`."""

    sticky: bool        # whether the same key should meet the same backends

    def key(self, headers: Headers, body: Mapping[str, Any] | None) -> str | None: ...

    def choose(self, backends: Sequence[Backend], key: int | None, draw: random.Random) -> Backend:
        """One of `backends`, of which there is at least one."""
        ...


class Keyless:
    sticky = False

    def key(self, headers: Headers, body: Mapping[str, Any] | None) -> str | None:
        return None


class Load(Keyless):
    """At random among those that have room (below half of their capacity), else the least loaded; ties at random."""

    def choose(self, backends: Sequence[Backend], key: int | None, draw: random.Random) -> Backend:
        roomy = [one for one in backends if one.running + one.waiting * WAITING_WEIGHT < HALF * one.capacity]
        if len(roomy) == 1:
            return roomy[0]
        if roomy:
            if all(one.weight == 1.0 for one in roomy):
                return roomy[int(draw.random() * len(roomy))]
            return draw.choices(roomy, [one.weight for one in roomy])[0]
        return lowest(backends, [one.score for one in backends], draw)


class RoundRobin(Keyless):
    """The one that has not been picked for longest, whatever its load."""

    def choose(self, backends: Sequence[Backend], key: int | None, draw: random.Random) -> Backend:
        return lowest(backends, [one.picked for one in backends], draw)


class LeastRequests(Keyless):
    """The one with the fewest requests, running or waiting, whatever its capacity; ties at random."""

    def choose(self, backends: Sequence[Backend], key: int | None, draw: random.Random) -> Backend:
        return lowest(backends, [one.running + one.waiting for one in backends], draw)


class Session(Load):
    """The same backend for the same session, as long as it is there; without a session by load."""

    sticky = True

    def key(self, headers: Headers, body: Mapping[str, Any] | None) -> str | None:
        """The header X-Session-Id; else `user`, or as Anthropic's clients send it `metadata.user_id`."""
        if session := headers.get("X-Session-Id"):
            return session
        if body is None:
            return None
        metadata = body.get("metadata")
        user = body.get("user") or (metadata.get("user_id") if isinstance(metadata, Mapping) else None)
        return user if isinstance(user, str) and user else None

    def choose(self, backends: Sequence[Backend], key: int | None, draw: random.Random) -> Backend:
        if key is None:
            return super().choose(backends, None, draw)
        return max(backends, key=lambda one: mixed(key, one.seed))


class Prefix(Load):
    """Requests that begin alike go to the backend that has their beginning in its cache, bounded by load.

    Consistent hashing with bounded loads: the first in the key's order that is below half of its capacity, or does
    not exceed SPREAD times its share of all that is in flight.  A request without a prompt goes by load.
    """

    sticky = True

    def __init__(self, characters: int = 256) -> None:
        self._characters = characters

    def key(self, headers: Headers, body: Mapping[str, Any] | None) -> str | None:
        """The model and the first characters of the prompt."""
        if body is None:
            return None
        start = prompt_start(body, self._characters)
        return f"{body.get('model')}\n{start}" if start else None

    def choose(self, backends: Sequence[Backend], key: int | None, draw: random.Random) -> Backend:
        if key is None:
            return super().choose(backends, None, draw)
        wants = [mixed(key, one.seed) for one in backends]
        capacity = sum([one.capacity * one.weight for one in backends])
        total = sum([one.running + one.waiting for one in backends]) + 1
        best = backends[wants.index(max(wants))]
        if _has_room(best, total, capacity):
            return best
        order = sorted(range(len(backends)), key=wants.__getitem__, reverse=True)
        return next((backends[index] for index in order if _has_room(backends[index], total, capacity)), None) \
            or lowest(backends, [one.score for one in backends], draw)


def _has_room(one: Backend, total: float, capacity: float) -> bool:
    bound = math.ceil(SPREAD * total * one.capacity * one.weight / capacity)
    return one.utilisation < HALF or one.running + one.waiting + 1 <= bound


POLICIES: Mapping[str, type[Policy]] = {
    "load": Load, "round_robin": RoundRobin, "least_requests": LeastRequests, "prefix": Prefix, "session": Session}


def policy_named(name: str, prefix_characters: int) -> Policy:
    """One of POLICIES."""
    return Prefix(prefix_characters) if name == "prefix" else POLICIES[name]()


def lowest(backends: Sequence[Backend], scores: Sequence[float], draw: random.Random) -> Backend:
    """Ties at random."""
    least = min(scores)
    best = [one for one, score in zip(backends, scores, strict=True) if score == least]
    return best[0] if len(best) == 1 else best[int(draw.random() * len(best))]


def prompt_start(body: Mapping[str, Any], characters: int) -> str:
    """The first characters of what the engine will read, as far as it is text: roles and images do not count."""
    pieces: list[str] = []
    left = characters
    for text in _texts([body.get(name) for name in ("instructions", "system", "messages", "prompt", "input")]):
        pieces.append(text[:left])
        left -= len(text)
        if left <= 0:
            break
    return "\n".join(pieces)


def _texts(value: Any, depth: int = 0) -> Any:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list) and depth < 5:
        for one in value:
            yield from _texts(one, depth + 1)
    elif isinstance(value, Mapping) and depth < 5:
        yield from _texts(value.get("content", value.get("text")), depth + 1)
