"""Relay loops in processes of their own: starting them, handing sockets over, and hearing how exchanges ended.

A thread beside Flask's shares the GIL with them, and every stream waits for it; a process does not.  It is spawned
by exec, not forked, so that it carries nothing of this process's memory.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import signal
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from instances import cores
from routing.framing import Framing
from routing.relay_wire import (
    MESSAGE_BYTES,
    READY,
    RELAY_DIED,
    Ended,
    Handover,
    cut_message,
    handover_messages,
    unpack_ended,
)

__all__ = ["Ended", "RelayStats", "RelayUnavailable", "Relays"]

log = logging.getLogger(__name__)

OnEnd = Callable[[Ended], None]

CHILD = Path(__file__).with_name("relay_child.py")
CONTROL_FD = 3  # in the relay process
SEND_TIMEOUT_S = 2  # a relay that takes no hand-over for so long is not used for this one
SHORT_LIFE_S = 1.0  # one that died younger is started again after a pause
PAUSE_S = 0.5
EXIT_S = 3.0  # after its control socket was closed; then it is killed
BLOCKED_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)


class RelayUnavailable(Exception):
    """No relay process takes this exchange now.  Both sockets are still the caller's.

    `begun`: the client has got a part of the answer, and nobody else can go on with it.
    """

    def __init__(self, why: str, *, begun: bool = False) -> None:
        super().__init__(why)
        self.begun = begun


@dataclass(frozen=True)
class RelayStats:
    """Of one relay process.  `pid` is None while there is none; `handed_over` counts since `start`."""

    pid: int | None
    open: int
    handed_over: int
    restarts: int


class Relays:
    """`processes` relay loops; an exchange goes to the one with the fewest.

    To be made in the process that hands over, after any fork.  Every method may be called from any thread.  `on_end`
    callbacks are called in a relay's own thread here, exactly once for each exchange handed over, and must be quick;
    one may come before `hand_over` has returned the id.
    """

    def __init__(self, processes: int = 1, *, wait_s: float = 2.0, python: str = sys.executable) -> None:
        self._ids = itertools.count(1)
        self._wait_s = wait_s
        self._changed = threading.Condition()  # a relay came up, or an exchange ended while closing
        self._closing = False
        self._relays = [_Relay(index, python, self._notify) for index in range(processes)]

    def start(self, timeout_s: float = 10.0) -> None:
        """Starts the processes and waits until they take exchanges.  Where they do not come up it logs that, and
        `hand_over` raises until they do."""
        for relay in self._relays:
            relay.start()
        with self._changed:
            if not self._changed.wait_for(lambda: all(relay.is_up() for relay in self._relays), timeout_s):
                log.error("a relay process does not come up; streams are carried by request threads meanwhile")

    def hand_over(self, client: socket.socket, upstream: socket.socket, *, to_client: bytes, framing: Framing,
                  on_end: OnEnd, body_at: int = 0, at_once: int = 0, to_upstream: bytes = b"",
                  idle_timeout_s: float | None = None, sse: bool = False, cut_message: bytes = b"",
                  started_at: float | None = None) -> int:
        """Gives both sockets away: this process's descriptors of them are closed here, whoever else holds the socket
        objects (a `makefile` among them).  The parameters are those of `Handover`; returns its id.

        `at_once`: so many bytes of `to_client` are sent from here as soon as a relay is there to go on with the rest,
        for each way through another process takes its time.

        A process that just died is waited for, `wait_s` at most.  Raises RelayUnavailable.  The caller has taken
        everything that its own buffers had read from either socket, and neither is TLS.
        """
        if started_at is None:
            started_at = time.monotonic()
        exchange_id, sent = next(self._ids), 0
        deadline: float | None = None
        while not self._closing:
            up = [relay for relay in self._relays if relay.is_up()]
            if up:
                relay = up[0] if len(up) == 1 else min(up, key=_Relay.open_count)
                if sent < at_once:
                    sent += _send_at_once(client, to_client[sent:at_once])
                handover = Handover(exchange_id, to_client, framing, body_at, to_upstream, idle_timeout_s, sse,
                                    cut_message, started_at, sent)
                if relay.send(handover, client.fileno(), upstream.fileno(), on_end):
                    os.close(client.detach())
                    os.close(upstream.detach())
                    return exchange_id
            if deadline is None:
                deadline = time.monotonic() + self._wait_s
            with self._changed:
                if not self._changed.wait_for(self._usable, deadline - time.monotonic()):
                    raise RelayUnavailable("no relay process is up", begun=sent > 0)
        raise RelayUnavailable("the relays are closing", begun=sent > 0)

    def cut(self, exchange_id: int, reason: bytes = b"") -> None:
        """Ends one, visibly for its client; its `on_end` tells.  Nothing happens where it has ended already."""
        for relay in self._relays:
            if relay.cut(exchange_id, reason):
                return

    def open_count(self) -> int:
        return sum([len(relay._open) for relay in self._relays])    # asked with each client that comes

    def stats(self) -> list[RelayStats]:
        return [relay.stats() for relay in self._relays]

    def close(self, grace_s: float = 0.0) -> None:
        """Takes no more, waits `grace_s` for what is open, cuts the rest and ends the processes."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: self.open_count() == 0, grace_s)
        for relay in self._relays:
            relay.end()
        for relay in self._relays:
            relay.join()

    def _usable(self) -> bool:
        return self._closing or any(relay.is_up() for relay in self._relays)

    def _notify(self) -> None:
        with self._changed:
            self._changed.notify_all()


class _Relay:
    """One relay process after another, and the thread that spawns, hears and buries them."""

    def __init__(self, index: int, python: str, changed: Callable[[], None]) -> None:
        self._python = python
        self._changed = changed
        self._name = f"relay-{index}"
        self._thread = threading.Thread(target=self._supervise, name=self._name, daemon=True)
        self._lock = threading.Lock()  # of the control socket: nobody sends while it is closed or changed
        self._control: socket.socket | None = None
        self._pid: int | None = None
        self._up = False
        self._open: dict[int, OnEnd] = {}
        self._cutting: set[int] = set()  # and not heard of yet: meanwhile the process goes before others
        self._ending = threading.Event()
        self._handed_over = 0
        self._restarts = 0

    def start(self) -> None:
        self._thread.start()

    def is_up(self) -> bool:
        return self._up

    def open_count(self) -> int:
        return len(self._open)

    def stats(self) -> RelayStats:
        return RelayStats(self._pid, len(self._open), self._handed_over, self._restarts)

    def send(self, handover: Handover, client_fd: int, upstream_fd: int, on_end: OnEnd) -> bool:
        """False: the process is dead, another one comes.  Raises RelayUnavailable where it cannot take this one.
        Either way it does not have it.  Blocks for at most SEND_TIMEOUT_S a message."""
        messages = handover_messages(handover)
        if not self._lock.acquire(timeout=SEND_TIMEOUT_S):
            raise RelayUnavailable(f"{self._name} (pid {self._pid}) takes nothing", begun=handover.sent > 0)
        try:
            if not self._up or self._control is None:
                return False
            self._open[handover.id] = on_end
            try:
                for message in messages[:-1]:
                    self._control.send(message)
                socket.send_fds(self._control, messages[-1:], (client_fd, upstream_fd))
            except ConnectionError:
                del self._open[handover.id]
                self._up = False
                return False
            except OSError as error:
                del self._open[handover.id]
                raise RelayUnavailable(f"{self._name} (pid {self._pid}) did not take it: {error}",
                                       begun=handover.sent > 0) from error
            self._handed_over += 1
            return True
        finally:
            self._lock.release()

    def cut(self, exchange_id: int, reason: bytes) -> bool:
        """Is (or was a moment ago) it this one's?"""
        with self._lock:
            self._cutting.add(exchange_id)  # before the look: who ends in between is taken out by `_tell`
            if exchange_id not in self._open or self._control is None or self._pid is None:
                self._cutting.discard(exchange_id)
                return False
            try:
                self._control.send(cut_message(exchange_id, reason))
            except OSError as error:
                log.warning("%s (pid %s) could not be told to cut a stream: %s", self._name, self._pid, error)
                self._cutting.discard(exchange_id)
            else:
                cores.hurry(self._pid, True)  # an engine that is to be stopped may have all cores, and waits for it
            return True

    def end(self) -> None:
        """The end of its control connection tells the process to cut what is open, report that, and exit."""
        self._ending.set()
        with self._lock:
            if self._control is not None:
                _shut(self._control)
            if self._pid is not None:
                cores.hurry(self._pid, True)

    def join(self) -> None:
        if not self._thread.is_alive():
            return
        self._thread.join(EXIT_S)
        if self._thread.is_alive():
            self._kill()
            self._thread.join()

    # --- the thread --------------------------------------------------------------------------------------------------

    def _supervise(self) -> None:
        while not self._ending.is_set():
            born_at = time.monotonic()
            try:
                control = self._spawn()
            except OSError as error:
                log.error("%s cannot be started: %s", self._name, error)
            else:
                self._hear(control)
                self._bury(control)
            if not self._ending.is_set():
                self._restarts += 1
                if time.monotonic() - born_at < SHORT_LIFE_S:
                    self._ending.wait(PAUSE_S)

    def _spawn(self) -> socket.socket:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            # the kernel's timeout, for sends alone: this socket's reader waits without one
            ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", SEND_TIMEOUT_S, 0))
            with cores.everywhere():
                pid = os.posix_spawn(
                    self._python, [self._python, "-I", "-S", str(CHILD), str(CONTROL_FD)],
                    {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH") if name in os.environ},
                    file_actions=[
                        (os.POSIX_SPAWN_DUP2, theirs.fileno(), CONTROL_FD),
                        (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
                    ],
                    setsigmask=BLOCKED_SIGNALS,
                )
        with self._lock:
            self._pid, self._control = pid, ours
            if self._ending.is_set():  # `end` found no socket to shut
                _shut(ours)
        return ours

    def _hear(self, control: socket.socket) -> None:
        """Until the process has closed its end."""
        while True:
            try:
                message = control.recv(MESSAGE_BYTES)
            except ConnectionResetError:
                continue  # it died with messages unread; what it sent before is still to be read
            if not message:
                return
            if message == READY:
                self._up = True
                log.info("%s: pid %s is up", self._name, self._pid)
            else:
                for end in unpack_ended(message):
                    self._tell(end)
            self._changed()

    def _bury(self, control: socket.socket) -> None:
        with self._lock:
            self._up = False
            self._control = None
            control.close()
            left, self._open = self._open, {}
            self._cutting.clear()
        self._kill()
        pid, self._pid = self._pid, None
        if pid is not None:
            with contextlib.suppress(ChildProcessError):  # somebody else waits for all children of this process
                os.waitpid(pid, 0)
        if not self._ending.is_set():
            log.warning("%s: pid %s died; %d streams are cut; another one starts", self._name, pid, len(left))
        for exchange_id, on_end in left.items():
            self._call(on_end, Ended(exchange_id, 0, 0, None, 0.0, RELAY_DIED, complete=False))
        self._changed()

    def _kill(self) -> None:
        """Also for one that has closed its control socket but hangs.  Its pid is ours until it is waited for."""
        if self._pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._pid, signal.SIGKILL)

    def _tell(self, end: Ended) -> None:
        on_end = self._open.pop(end.id, None)
        if self._cutting:
            with self._lock:
                self._cutting.discard(end.id)
                if not self._cutting and self._pid is not None:
                    cores.hurry(self._pid, False)
        if on_end is not None:
            self._call(on_end, end)

    def _call(self, on_end: OnEnd, end: Ended) -> None:
        try:
            on_end(end)
        except Exception:
            log.exception("the end of exchange %d could not be noted", end.id)


def _send_at_once(client: socket.socket, data: bytes) -> int:
    """How much of it the socket took; nothing of a client that has left, which the relay will notice."""
    timeout_s = client.gettimeout()
    client.setblocking(False)
    try:
        return client.send(data)
    except OSError:
        return 0
    finally:
        client.settimeout(timeout_s)


def _shut(control: socket.socket) -> None:
    with contextlib.suppress(OSError):  # it is dead already
        control.shutdown(socket.SHUT_WR)
