"""The worker process: an event loop that accepts connections and holds those without a request, and request threads.

What differs from gunicorn's threaded worker: a connection costs a thread only while its request is whole and not yet
answered, its thread parks it again without waking the loop, and even what cannot be parsed is answered in the OpenAI
envelope.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import itertools
import logging
import os
import selectors
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from gunicorn.arbiter import Arbiter
from gunicorn.http import errors as http_errors
from gunicorn.workers.gthread import ThreadWorker

from config import Settings
from errors import DaemonError
from instances.cores import Cores
from routing import request_id
from web import refusals
from web.connection import CLIENT_GONE, Connection, OneWrite, Parked, has_left, reset
from web.environ import environ_of
from web.intake import CONTINUE, Buffers, Collected, Intake, Taken
from web.lanes import Lanes, is_reserved
from web.leaving import MemoryWatch, leave_without_memory, to_be_tried_again
from web.malloc import return_large_blocks
from web.request_head import parse
from web.threads import LOOK_S

log = logging.getLogger("vllm_server.http")

Wsgi = Callable[..., Any]

ACCEPTS_A_ROUND = 64
READS_A_ROUND = 8           # of one connection, before the others have their turn
RECEIVE_BYTES = 1 << 16
REQUEST_IDLE_S = 60.0       # for a request's head, and between two pieces of its body
SEND_TIMEOUT_S = 60.0       # a client that takes nothing for so long is gone
LINGER_S = 2.0
SWITCH_S = 0.0005           # after every system call a request waits for the interpreter; 5 ms each time are too many
REFUSED_S = 1.0             # without a free descriptor, clients wait in the backlog for so long before the next look
LINGER_BYTES = 1 << 20
OUT_OF_DESCRIPTORS = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
SPARE = 256                 # connections past the bound, for those who watch and manage; others are told 503 there
SPARE_IDLE_S = 5.0          # what a client has for its head on one of these
LOOKED_AT = 32              # parked connections, to find one that idles and can go for a new one


@dataclass(frozen=True)
class Service:
    """What the worker process runs: made in it, after the fork.

    `close_door` turns away who waits for a model, `stop` ends it all; it gets `hurry` and
    `alive` callbacks.  `streams` counts connections that relays carry, `waiting` requests that wait for a model.
    """

    wsgi: Wsgi
    start: Callable[[], None]
    close_door: Callable[[], None]
    stop: Callable[[Callable[[], bool], Callable[[], None]], None]
    reload: Callable[[], None]
    streams: Callable[[], int]
    waiting: Callable[[], int]


class Worker(ThreadWorker):
    """One process: an event loop that accepts and parks connections, and threads that handle requests.

    A connection is parked here, costing no thread, while its client is idle, sends its request (web/intake.py), or
    has got its last answer and is given a moment to read it (gunicorn would wait for that on this very thread).  A
    request thread parks its connection itself, and does not wake the loop for it: two threads' turns less a request.
    So only the loop takes connections out of `_parked` and the poller, but any thread puts them in.
    """

    service: Service
    settings: Settings
    hurry = False
    _reload_wanted = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._parked: dict[socket.socket, Parked] = {}
        self._buffers = Buffers(self.settings.body_memory_bytes)
        self._accept_after = 0.0    # monotonic
        self._count_lock = threading.Lock()     # of `nr_conns`
        self._lanes: Lanes[Connection] = Lanes(self.cfg.threads, self.settings.backlog, self._serve,
                                               lambda connection: connection.intake.path)
        self._addresses: dict[Any, Any] = {}    # of listeners
        self._rounds = 0            # of the event loop
        self._accepted_in = 0       # the last one in which clients were accepted
        self._at_once = 1           # how many then
        self._refused = 0           # requests since the last word of them in the log
        self.max_keepalived = self.worker_connections

    def get_thread_pool(self) -> None:
        """None of gunicorn's: web/threads.py."""

    def init_process(self) -> None:
        # Each of the thirty settings that a request reads would be two calls, a tenth of what the request costs.
        self.cfg.__dict__.update({name: setting.get() for name, setting in self.cfg.settings.items()})
        sys.unraisablehook = leave_without_memory
        return_large_blocks()
        super().init_process()

    def init_signals(self) -> None:
        super().init_signals()
        signal.signal(signal.SIGINT, signal.SIG_IGN)     # a terminal sends it to the whole group; the master decides
        signal.signal(signal.SIGQUIT, self.handle_quit)
        signal.signal(signal.SIGHUP, self.handle_reload)

    def handle_quit(self, sig: int, frame: Any) -> None:
        self.hurry, self.alive = True, False
        self.method_queue.defer(lambda: None)

    def handle_reload(self, sig: int, frame: Any) -> None:
        """The loop does it: a signal may come in the middle of a log line, and many may come at once."""
        self._reload_wanted = True
        self.method_queue.defer(self._begin_reload)

    def _begin_reload(self) -> None:
        if not self._reload_wanted:
            return
        self._reload_wanted = False
        try:
            threading.Thread(target=self._reload, name="reload", daemon=True).start()
        except RuntimeError as error:
            log.error("not reloaded, the old settings stay: %s; try again", error)
            self._tell_master()

    def _reload(self) -> None:
        try:
            self.service.reload()
        finally:
            self._tell_master()

    def _tell_master(self) -> None:
        """That it serves, with the settings as they are now (web/notify.py)."""
        os.kill(self.ppid, signal.SIGUSR2)

    def load_wsgi(self) -> None:
        self.service = self.app.make_service()
        self.wsgi = self.service.wsgi
        self._lanes.common.waiting = self.service.waiting

    def run(self) -> None:
        try:
            with to_be_tried_again():
                MemoryWatch().start()
                self.service.start()
        except Exception:
            log.critical("the daemon cannot start", exc_info=True)
            sys.exit(Arbiter.WORKER_BOOT_ERROR)     # the master ends too, instead of trying for ever
        sys.setswitchinterval(SWITCH_S)
        # A full collection would walk through all that the program is made of: 30 ms in which no request moves.
        gc.freeze()
        self.poller.register(self.method_queue.fileno(), selectors.EVENT_READ, self.method_queue.run_callbacks)
        self.set_accept_enabled(True)
        self._tell_master()
        cores = Cores() if self.settings.one_core else None
        looked_at = 0.0
        while self.alive:
            can_accept = self._free() > -SPARE and time.monotonic() >= self._accept_after
            if can_accept != self._accepting:
                self.set_accept_enabled(can_accept)
            self._round(1.0)
            if (now := time.monotonic()) - looked_at >= 1.0:
                looked_at = now
                self.notify()       # a system call: not for every event
                self._close_expired(now)
                self._buffers.tick(now)
                self._tell_refused()
                if cores is not None:
                    cores.look(now)
        self._drain()
        self.service.stop(lambda: self.hurry, self.notify)
        self._lanes.shut_down()

    def _round(self, timeout_s: float) -> None:
        self._rounds += 1
        backlog = self._lanes.backlog()
        self.wait_for_and_dispatch_events(timeout=LOOK_S if backlog else timeout_s)
        if backlog:
            self._lanes.grow(time.monotonic())

    def _free(self) -> int:
        """How many connections more there may be; below zero, so many of the spare ones are taken."""
        free: int = self.worker_connections - self.nr_conns - self.service.streams()
        return free

    # --- connections ------------------------------------------------------------------------------------------------

    def accept(self, listener: Any) -> None:
        """Take the connections that wait, in a storm many at once."""
        for _ in range(self._how_many()):
            try:
                descriptor, address = listener.sock._accept()   # socket.accept makes enums of what is known
            except OSError as error:
                if error.errno in OUT_OF_DESCRIPTORS:
                    log.error("no descriptor is free for another client (ulimit -n)")
                    self._accept_after = time.monotonic() + REFUSED_S
                    self.set_accept_enabled(False)
                elif error.errno not in (errno.EAGAIN, errno.ECONNABORTED):
                    raise
                return
            client = socket.socket(listener.FAMILY, socket.SOCK_STREAM, 0, descriptor)
            connection = Connection(client, address, self._address_of(listener),
                                    Intake(self.settings.max_request_bytes, self._buffers))
            free = self._free()
            connection.spare = free <= 0 and not self._close_idle()
            self._count(1)
            self._receive(connection, parked=None)
            if free <= 1 - SPARE:
                return

    def _how_many(self) -> int:
        """To ask for one more than there is costs as much as one.  So as long as clients come now and then it is one at
        a time, and twice as many as the last time where they come in each round."""
        now_and_then = self._rounds - self._accepted_in > 1
        self._accepted_in = self._rounds
        self._at_once = 1 if now_and_then else min(2 * self._at_once, ACCEPTS_A_ROUND)
        return self._at_once

    def _address_of(self, listener: Any) -> Any:
        if (address := self._addresses.get(listener)) is None:
            address = self._addresses[listener] = listener.getsockname()
        return address

    def _close_idle(self) -> bool:
        """Make room for a new client: the one that has asked nothing for longest goes, if one is found at once."""
        for parked in list(itertools.islice(self._parked.values(), LOOKED_AT)):
            if parked.on_readable == self._receive and not parked.has_begun:
                self._unpark(parked.connection)
                self._close(parked.connection)
                return True
        return False

    def _receive(self, connection: Connection, parked: Parked | None) -> None:
        """Read what is there; hand the request to a thread once it is whole, else go on waiting for the client."""
        intake = connection.intake
        ready, ended = self._read(connection.sock, intake)
        if not ended and intake.in_body and connection.spare and not is_reserved(intake.path):
            connection.spare = self._free() < 0     # others may have gone meanwhile
            if connection.spare:
                if parked is not None:
                    self._unpark(connection)
                self._refuse(connection, "connections")
                return
        if ended:
            if parked is not None:
                self._unpark(connection)
            if intake.in_body:
                intake.end()
                self.enqueue_req(connection)
            else:
                self._close(connection)
        elif ready:
            if parked is not None:
                self._unpark(connection)
            self.enqueue_req(connection)
        else:
            self._wait_for_client(connection, parked)

    @staticmethod
    def _read(sock: socket.socket, intake: Intake) -> tuple[bool, bool]:
        """Read what is there, a bounded share: whether the request is complete, whether the client has ended."""
        for _ in range(READS_A_ROUND):
            try:
                if (room := intake.room()) is not None:
                    with room:
                        count = sock.recv_into(room)
                    ready = intake.filled(count)
                elif intake.refused:
                    return True, False
                else:
                    data = sock.recv(RECEIVE_BYTES)
                    count, ready = len(data), bool(data) and intake.feed(data)
            except BlockingIOError:
                return False, False
            except OSError:
                return False, True
            if ready or count == 0:
                return ready, not ready
            if not intake.has_room:
                return False, False     # a small request that is not whole: more comes with the next event
        return False, False

    def _wait_for_client(self, connection: Connection, parked: Parked | None) -> None:
        intake = connection.intake
        if intake.wants_continue:
            intake.wants_continue = False
            with contextlib.suppress(OSError):
                connection.sock.send(CONTINUE)
        now = time.monotonic()
        if parked is None:
            idle_s = SPARE_IDLE_S if connection.spare else REQUEST_IDLE_S if intake.begun else self.cfg.keepalive
            self._park(connection, Parked(connection, now + idle_s, self._receive, intake.begun))
            return
        if intake.in_body or not (parked.has_begun or connection.spare):
            parked.deadline = now + REQUEST_IDLE_S     # a head has one deadline for all of it, a body one a piece
        parked.has_begun = intake.begun

    def _park(self, connection: Connection, parked: Parked) -> None:
        """The connection is the loop's from here on."""
        connection.sock.setblocking(False)
        # In this order: the loop takes what it finds in `_parked` out of the poller, at the next moment if it drains.
        self.poller.register(connection.sock, selectors.EVENT_READ, self._wake_parked)
        self._parked[connection.sock] = parked

    def _wake_parked(self, sock: socket.socket) -> None:
        # None: one before it in this round closed it for room, or its thread is about to say what it waits for.
        if (parked := self._parked.get(sock)) is not None:
            parked.on_readable(parked.connection, parked)

    def _unpark(self, connection: Connection) -> None:
        self.poller.unregister(connection.sock)
        del self._parked[connection.sock]

    def _close_expired(self, now: float) -> None:
        for parked in list(self._parked.values()):
            if parked.deadline <= now:
                self._unpark(parked.connection)
                self._close(parked.connection)

    def _close(self, connection: Connection) -> None:
        self._count(-1)
        connection.intake.abandon()
        connection.close()

    def _refuse(self, connection: Connection, what: str) -> None:
        """Tell the client at once that there is too much of it all.  Any thread may call it."""
        self._refused += 1
        request_id.begin()
        self._buffers.done(connection.intake.take())
        with contextlib.suppress(OSError):
            connection.sock.send(refusals.answer(refusals.too_many(what)))
        self._linger(connection)

    def _tell_refused(self) -> None:
        if (count := self._refused) > 0:
            self._refused -= count
            log.warning("overloaded: %d requests were refused with 503 (APP_MAX_CONNECTIONS, APP_BACKLOG)", count)

    def _count(self, change: int) -> None:
        with self._count_lock:
            self.nr_conns += change
        if change < 0 and not self._accepting:
            self.method_queue.defer(lambda: None)       # the loop waits for room

    def _linger(self, connection: Connection) -> None:
        """Half-close, and close when the client has: closing with unread input would reset away the answer's end."""
        try:
            connection.sock.setblocking(False)
            connection.sock.shutdown(socket.SHUT_WR)
        except OSError:
            self._close(connection)
            return
        self._park(connection, Parked(connection, time.monotonic() + LINGER_S, self._discard))

    def _discard(self, connection: Connection, parked: Parked) -> None:
        try:
            data = connection.sock.recv(RECEIVE_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        parked.discarded_bytes += len(data)
        if not data or parked.discarded_bytes > LINGER_BYTES:
            self._unpark(connection)
            self._close(connection)

    def enqueue_req(self, conn: Connection) -> None:
        if not self._lanes.submit(conn):
            self._refuse(conn, "requests")

    # --- one request, on a thread of its own ------------------------------------------------------------------------

    def _serve(self, conn: Connection) -> None:
        request_id.begin()
        taken = conn.intake.take()
        if self._lanes.backlog() and has_left(conn.sock):      # it has waited for a thread, and others do
            self._buffers.done(taken)
            self._close(conn)
            return
        keep = self._answer(conn, taken)
        self._buffers.done(taken)
        try:
            self._finish(conn, keep)
        except Exception:
            log.exception("a connection could not be kept")
            self._close(conn)

    def _finish(self, conn: Connection, keep: bool) -> None:
        """The request is done with: wait for the next one, or close."""
        if conn.sock.fileno() < 0:      # it was handed to a relay, which closes it
            self._count(-1)
        elif not keep or not self.alive:
            self._linger(conn)
        elif conn.intake.begun and conn.intake.ready():     # pipelined: the next request is here already
            self.enqueue_req(conn)
        else:
            self._wait_for_client(conn, None)

    def _answer(self, conn: Connection, taken: Taken) -> bool:
        """Whether the connection may be used again."""
        request = None
        try:
            conn.sock.settimeout(SEND_TIMEOUT_S)
            request = parse(self.cfg, taken.head, conn.sock, conn.client)
            if taken.refusal is not None:   # not raised: its traceback would keep the body until a garbage collection
                self.handle_error(request, conn.sock, conn.client, taken.refusal)
                return False
            request.body = Collected(taken.body)
            keep: bool = self.handle_request(request, conn)
            return keep and taken.whole
        except (http_errors.NoMoreData, StopIteration):
            return False
        except OSError as error:
            if error.errno not in CLIENT_GONE and not isinstance(error, TimeoutError):
                log.exception("a connection failed")
            if request is not None and request.version < (1, 1):
                reset(conn.sock)
            return False
        except Exception as error:
            self.handle_error(request, conn.sock, conn.client, error)
            return False

    def handle_request(self, req: Any, conn: Connection) -> bool:
        """Whether the connection may be used again.  Raises OSError of a client that left, and what the application
        raises before its answer has begun."""
        started = datetime.now()
        response, environ = OneWrite(req, conn.sock, self.cfg), environ_of(req, conn.sock, conn.client, conn.server)
        if not self.alive or not self.cfg.keepalive or (conn.spare and self._free() < 0):
            response.force_close()
        try:
            pieces = self.wsgi(environ, response.start_response)
            try:
                for piece in pieces:
                    response.write(piece)
                response.close()
            finally:
                self.log.access(response, req, environ, datetime.now() - started)
                if hasattr(pieces, "close"):
                    pieces.close()
        except Exception as error:
            if isinstance(error, OSError) or not response.headers_sent:
                raise
            log.exception("an answer broke")
            return False
        return not response.should_close()

    def handle_error(self, req: Any, client: socket.socket, addr: Any, exc: BaseException) -> None:
        """A request that could not be parsed, or a bug: one answer in the envelope, then the connection closes."""
        if isinstance(exc, DaemonError):
            data = refusals.answer(exc)
        elif isinstance(exc, http_errors.ParseException):
            data = refusals.unreadable(exc)
        else:
            log.error("a request failed", exc_info=exc)
            data = refusals.answer(DaemonError("the daemon failed; its log says how"))
        with contextlib.suppress(OSError):
            client.sendall(data)

    # --- the end --------------------------------------------------------------------------------------------------

    def _drain(self) -> None:
        """Accept nothing more, let requests in flight finish, up to the grace time."""
        self.service.close_door()
        self.set_accept_enabled(False)
        for listener in self.sockets:
            listener.close()
        for parked in list(self._parked.values()):
            self._unpark(parked.connection)
            self._close(parked.connection)
        deadline = time.monotonic() + self.settings.shutdown_grace_s
        while self.nr_conns + self.service.streams() > 0 and (now := time.monotonic()) < deadline and not self.hurry:
            self.notify()
            self._round(0.2)
            self._close_expired(now)
            for parked in list(self._parked.values()):
                if parked.on_readable == self._receive:     # its thread did not know yet
                    self._unpark(parked.connection)
                    self._close(parked.connection)
