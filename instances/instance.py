"""One model instance: its states, the edges between them, and its frozen snapshot.  No I/O, no clock, no lock.

What each state means:

============== ================================ ======================================
state          memory of the device             requests
============== ================================ ======================================
starting       being taken                      wait
ready          held                             enter, each with a lease
falling_asleep held, then given back            those with a lease finish, others wait
sleeping       the weights are in the host's    wait, and it wakes for them
               RAM (level 1) or gone (level 2),
               the KV cache is gone
waking         being taken again                wait
backoff        being freed, then free           wait for the next start
stopping       held until the drain ends        those with a lease finish, none enters
stopped        free                             none; the record is gone
failed         free                             are told the cause
============== ================================ ======================================

An engine that an earlier daemon left is `starting` until its state is known, and may be found in any of the four
states of one that serves.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import IntEnum, StrEnum
from typing import Any, NamedTuple

from errors import DaemonError, NotReady
from instances.placement import Plan

log = logging.getLogger("vllm_server.instances")

FAILURE_WINDOW_S = 600.0
FAILURES_ALLOWED = 5
BACKOFF_LIMIT_S = 60.0


class State(StrEnum):
    STARTING = "starting"
    READY = "ready"
    FALLING_ASLEEP = "falling_asleep"
    SLEEPING = "sleeping"
    WAKING = "waking"
    BACKOFF = "backoff"
    STOPPING = "stopping"
    STOPPED = "stopped"
    FAILED = "failed"


EDGES: Mapping[State, frozenset[State]] = {
    State.STARTING: frozenset({State.READY, State.FALLING_ASLEEP, State.SLEEPING, State.WAKING, State.BACKOFF,
                               State.FAILED, State.STOPPING}),
    State.READY: frozenset({State.FALLING_ASLEEP, State.BACKOFF, State.FAILED, State.STOPPING}),
    State.FALLING_ASLEEP: frozenset({State.READY, State.SLEEPING, State.BACKOFF, State.FAILED, State.STOPPING}),
    State.SLEEPING: frozenset({State.WAKING, State.BACKOFF, State.FAILED, State.STOPPING}),
    State.WAKING: frozenset({State.READY, State.SLEEPING, State.BACKOFF, State.FAILED, State.STOPPING}),
    State.BACKOFF: frozenset({State.STARTING, State.FAILED, State.STOPPING}),
    State.STOPPING: frozenset({State.STOPPED}),
    State.FAILED: frozenset({State.STOPPED}),
    State.STOPPED: frozenset(),
}

ACTIVE = frozenset({State.STARTING, State.READY, State.FALLING_ASLEEP, State.SLEEPING, State.WAKING, State.BACKOFF})
"""Will serve, now or soon: what a create finds and what a request may wait for."""

SERVED = frozenset({State.READY, State.FALLING_ASLEEP, State.SLEEPING, State.WAKING, State.STOPPING})
"""An engine that was in one of these had answered to its name before."""

UNTOLD = {State.FALLING_ASLEEP: State.READY, State.WAKING: State.SLEEPING}
"""What an engine does until it is told to do what its state says."""


class Haste(IntEnum):
    """How a stop goes about it; it may grow while the stop is under way, never shrink."""

    PATIENT = 0     # requests in flight end by themselves, however long they take; then as DRAIN
    DRAIN = 1       # requests in flight get DRAIN_TIMEOUT, then SIGTERM, then SIGKILL
    TERMINATE = 2   # they had their time: cut them, then SIGTERM, then SIGKILL
    KILL = 3        # cut them and SIGKILL


@dataclass(frozen=True)
class InstanceSpec:
    """What the user asked for.  Two specs with equal `flags` run the same engine."""

    model: str
    names: tuple[str, ...]              # --served-model-name, the first stands in every response
    flags: Mapping[str, Any]            # merged from all layers, without the daemon's own
    params: Mapping[str, Any]           # the request's share of the flags, as it was sent
    timeout_s: float                    # idle time after which it sleeps, or is stopped if it may not; 0: never
    start_timeout_s: float
    sleep_level: int = 0                # 0: it is never put to sleep; 1 or 2: what it does when it idles
    stop_after_s: float | None = None   # a sleeper is stopped after so long asleep; None: when its place is wanted
    env: Mapping[str, str] = field(default_factory=dict)    # for its engine alone
    gpus: int | tuple[int, ...] | None = None               # how many, or which ones; None: as its flags say
    memory_bytes: int | None = None     # the whole of what it takes, if the user knows it, over all its devices
    param_count: float | None = None    # billions
    precision: str | None = None
    priority: int = 0                   # higher stays longer
    pinned: bool = False                # never evicted
    config_id: str | None = None        # the entry of the catalog that it was made from
    hf_token: str | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Problem:
    """Why an engine failed: a code for programs, a sentence for people, the decisive log line, a status for HTTP."""

    code: str
    message: str
    detail: str = ""
    status: int = 502
    permanent: bool = False
    suggestion: Mapping[str, object] | None = None


class Lease:
    """The right to send one request to one instance.  Made and ended by the manager, under its lock.

    `cut` tells the holder that the instance will not let it finish: the callback closes the connection, the
    error says why.  A callback that is registered after the cut runs at once; in a race it may run twice, and never
    not at all.  It must not raise.

    `runs()` after a connection was made says whether it is to the engine: one that died has given up its port, and a
    stranger may have taken it before anybody noticed.
    """

    def __init__(self, instance_id: str, port: int, release: Callable[[Lease, bool], None],
                 runs: Callable[[], bool] = lambda: True) -> None:
        self.instance_id = instance_id
        self.port = port
        self.runs = runs
        self.cut_error: DaemonError | None = None
        self._on_cut: Callable[[], None] | None = None
        self._on_release: list[Callable[[], None]] = []
        self._released = False
        self._release = release

    def on_cut(self, callback: Callable[[], None] | None) -> None:
        self._on_cut = callback
        if callback is not None and self.cut_error is not None:
            callback()

    def cut(self, error: DaemonError) -> None:
        if self.cut_error is None:
            self.cut_error = error
            callback = self._on_cut
            if callback is not None:
                callback()

    def when_released(self, callback: Callable[[], None]) -> None:
        """Called once it has come back, at once if it has already; it may be called again."""
        self._on_release.append(callback)
        if self._released:
            callback()

    def release(self, *, ok: bool = False) -> None:
        """Give it back; a second call does nothing.  `ok`: the engine answered, which shows that it is not hung."""
        self._release(self, ok)
        self._released = True
        for callback in self._on_release:
            callback()


@dataclass(frozen=True)
class InstanceView:
    """A snapshot for readers outside the lock.  Times `*_at` are wall clock seconds, for people."""

    id: str
    spec: InstanceSpec
    names: tuple[str, ...]
    state: State
    why: str
    phase: str
    progress: float | None
    port: int | None
    pid: int | None
    devices: tuple[int, ...]
    memory_planned_bytes: int | None
    memory_measured_bytes: int | None
    in_flight: int
    created_at: float
    last_used_at: float
    expires_in_s: float | None
    restarts: int
    retry_in_s: float | None
    last_error: Problem | None
    log_path: str
    engine: Mapping[str, Any]
    asleep_level: int = 0               # how deep it sleeps, 0 while it is awake
    because: str = ""                   # why it stands on these devices, and who went for it
    grown: bool = False                 # added for load
    apart: bool = False                 # made with `new`, beside its model's replicas
    elapsed_s: float = 0.0              # in this state
    expected_s: float | None = None     # of a start or wake that goes on: what it took before


class Candidate(NamedTuple):
    """What the balancer sees of a backend."""

    id: str
    state: State
    in_flight: int


@dataclass(frozen=True)
class Squeeze:
    """A second try for one that ran out of memory: with more than `bytes_per_device` if that can be had, else with
    `flags` that its log suggests, as far as the user has not fixed them."""

    bytes_per_device: int | None
    flags: Mapping[str, object]


@dataclass(eq=False)
class Instance:
    """The mutable record in the registry.  Every field is read and written under the manager's lock."""

    id: str
    spec: InstanceSpec
    created_at: float                   # wall clock
    last_used: float                    # monotonic: when the last request ended, or when it became ready
    log_path: str
    state: State = State.STARTING
    why: str = "created"
    changed_at: float = 0.0             # monotonic
    phase: str = "starting"
    progress: float | None = None
    names: tuple[str, ...] = ()         # all that the engine answers to, adapters included
    port: int | None = None
    pid: int | None = None
    runs: Callable[[], bool] = lambda: True     # whether the process with that pid, which listens on the port, lives
    devices: tuple[int, ...] = ()
    grant: Plan | None = None           # the room that it has or was promised, awake; None: it has none
    evicts: frozenset[str] = frozenset()    # who has to be gone, or asleep, before it may take that room
    memory_planned_bytes: int | None = None         # of each device, when it is awake
    held_on: Mapping[int, int] | None = None        # by device, as last measured; None: nobody can tell
    used_before: Mapping[int, int] = field(default_factory=dict)    # of its devices, by all, before it took its room
    asleep_on: Mapping[int, int] = field(default_factory=dict)      # by device, what it holds asleep or would
    host_bytes: int = 0                 # of the host's RAM, what it holds asleep or would
    seated: bool = True                 # it counts for VLLM_MAX_INSTANCES; a load on demand only once it has room
    modest: bool = False                # it is loaded ahead of requests: nobody goes for it
    grown: bool = False                 # one more for load: nobody ever goes for it, and it does not sleep but stops
    apart: bool = False                 # made with `new`: its model's replicas are counted without it
    wanted_at: float = 0.0              # monotonic: since when it wants room
    ready_at: float = 0.0               # monotonic: since when it holds what it has
    no_hope_since: float | None = None  # monotonic: since when nobody could make that room
    squeeze: Squeeze | None = None      # it ran out of memory and tries once more
    robbed: int = 0                     # how often others took its room since it last was ready: no fault of its own
    leases: set[Lease] = field(default_factory=set)
    waiting: int = 0                    # requests that wait for it to become ready
    last_success: float = 0.0           # monotonic: when the engine last answered a request
    last_broken: float | None = None    # monotonic: when a request was last broken off, by whomever
    failures: deque[float] = field(default_factory=deque)   # those within FAILURE_WINDOW_S
    failures_in_a_row: int = 0          # since it last served for as long as that
    restarts: int = 0
    retry_at: float | None = None       # monotonic, in backoff
    last_error: Problem | None = None
    haste: Haste = Haste.PATIENT
    after: frozenset[str] = frozenset() # ids that must be gone before this one starts (a replacement)
    asleep_level: int = 0               # as the engine was last told: 0 awake, else how deep it sleeps
    drowsy: bool = False                # it falls asleep for want of requests alone: the next one keeps it up
    wake_wanted: bool = False           # as soon as it sleeps
    because: str = ""                   # why it stands where it does
    launched_at: float | None = None    # monotonic: when its engine was started
    reload_s: float | None = None       # what a start of it took before,
    wake_s: float | None = None         # and a wake
    on_demand: bool = False             # requests alone made it: its load is given up when none of them waits any more
    outdated: bool = False              # its entry of the catalog has changed: another one takes its place
    engine: Mapping[str, Any] = field(default_factory=dict)  # facts of its start-up log
    on_change: Callable[[Instance, State], None] | None = None

    def __post_init__(self) -> None:
        self.names = self.names or self.spec.names

    def change_state(self, new: State, now: float, why: str) -> None:
        """The one writer of `state`: checks the edge, logs it, tells the listener.  Caller holds the lock."""
        old = self.state
        if new not in EDGES[old]:
            raise AssertionError(f"{self.id}: no edge {old} -> {new} ({why})")
        self.state, self.why, self.changed_at = new, why, now
        log.info("%s (%s): %s -> %s (%s)", self.id, self.spec.model, old, new, why)
        if self.on_change is not None:
            self.on_change(self, old)

    def take_lease(self, release: Callable[[Lease, bool], None]) -> Lease:
        """Caller holds the lock.  Raises NotReady in every state but ready."""
        if self.state is not State.READY or self.port is None:
            raise NotReady(f"instance {self.id} of {self.spec.model} is {self.state}")
        lease = Lease(self.id, self.port, release, self.runs)
        self.leases.add(lease)
        return lease

    def record_failure(self, now: float) -> float | None:
        """Count a failure; the seconds to wait before the next start, or None when it failed too often.

        The wait doubles with each failure in a row, slow ones too, of which few fit into the window.
        """
        if self.state is State.READY and now - self.changed_at >= FAILURE_WINDOW_S:
            self.failures_in_a_row = 0
        self.failures_in_a_row += 1
        self.failures.append(now)
        while now - self.failures[0] > FAILURE_WINDOW_S:
            self.failures.popleft()
        if len(self.failures) >= FAILURES_ALLOWED:
            return None
        return min(2.0 ** min(self.failures_in_a_row - 1, 10), BACKOFF_LIMIT_S)

    def idle_for(self, now: float) -> float:
        """Seconds since its last request ended; 0 while one is running or waits."""
        return 0.0 if self.leases or self.waiting else max(0.0, now - self.last_used)

    def expired(self, now: float) -> bool:
        """Whether nobody wants it any more, by its own clocks: awake the idle one, asleep the time since then."""
        left_s = self.expires_in(now)
        return left_s is not None and left_s <= 0 and not self.leases and not self.waiting

    def expires_in(self, now: float) -> float | None:
        """Seconds until it sleeps or, if it may not or does so already, is stopped; None: no time is set."""
        if self.state is State.SLEEPING:
            limit_s = self.spec.stop_after_s
            return None if limit_s is None else max(0.0, limit_s - (now - self.changed_at))
        if self.spec.timeout_s <= 0 or self.state not in ACTIVE:
            return None
        return max(0.0, self.spec.timeout_s - self.idle_for(now))

    def view(self, now: float, wall: float) -> InstanceView:
        return InstanceView(
            id=self.id, spec=self.spec, names=self.names, state=self.state, why=self.why, phase=self.phase,
            progress=self.progress, port=self.port, pid=self.pid, devices=self.devices,
            memory_planned_bytes=self.memory_planned_bytes,
            memory_measured_bytes=None if self.held_on is None else sum(self.held_on.values()),
            in_flight=len(self.leases), created_at=self.created_at, last_used_at=wall - (now - self.last_used),
            expires_in_s=self.expires_in(now), restarts=self.restarts,
            retry_in_s=max(0.0, self.retry_at - now) if self.state is State.BACKOFF and self.retry_at else None,
            last_error=self.last_error, log_path=self.log_path, engine=dict(self.engine),
            asleep_level=self.asleep_level, because=self.because, grown=self.grown, apart=self.apart,
            elapsed_s=max(0.0, now - self.changed_at),
            expected_s={State.STARTING: self.reload_s, State.WAKING: self.wake_s}.get(self.state))
