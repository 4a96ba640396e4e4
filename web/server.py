"""The production server: gunicorn, embedded, with one worker process that holds the registry.

The master only binds, forks and restarts the worker if that ever dies (it then adopts its engines as after any other
crash).  What differs from stock gunicorn is here: Ctrl-C is graceful and a second one hurries, SIGHUP reloads in
place instead of forking anew, an idle keep-alive connection does not hold up a shutdown, a worker never outlives its
master, and even a request that cannot be parsed is answered in the OpenAI envelope.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import selectors
import signal
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import orjson
from gunicorn import glogging, sock
from gunicorn.app.base import BaseApplication
from gunicorn.arbiter import Arbiter
from gunicorn.http import errors as http_errors
from gunicorn.workers.gthread import ThreadWorker

from config import Settings
from errors import BadRequest, DaemonError

log = logging.getLogger("vllm_server.http")

HURRIED_S = 30.0    # what a hurried worker gets to kill its engines
MARGIN_S = 30.0     # what a graceful one gets on top of the sum of its deadlines
BOUND_S = 120     # a worker whose main loop stands still for so long is restarted
CLOSE_TIMEOUT_S = 2.0

Wsgi = Callable[..., Any]


@dataclass(frozen=True)
class Service:
    """What the worker process runs: made in it, after the fork.  `stop` gets `hurry` and `alive` callbacks."""

    wsgi: Wsgi
    start: Callable[[], None]
    stop: Callable[[Callable[[], bool], Callable[[], None]], None]
    reload: Callable[[], None]


class Log(glogging.Logger):
    """gunicorn's messages go where the daemon's go; only the access log keeps its own stream."""

    def setup(self, cfg: Any) -> None:
        super().setup(cfg)
        self.error_log.handlers = []
        self.error_log.propagate = True
        self.error_log.setLevel(logging.WARNING)


class Master(Arbiter):
    def handle_int(self) -> None:
        """Ctrl-C: as graceful as SIGTERM; `stop` looks for the second one."""
        raise StopIteration

    handle_quit = handle_int

    def handle_hup(self) -> None:
        self.kill_workers(signal.SIGHUP)

    def handle_ttin(self) -> None:
        """The registry lives in one process: there is never a second worker."""

    handle_ttou = handle_usr2 = handle_winch = handle_ttin

    def stop(self, graceful: bool = True) -> None:
        """Stop the worker: SIGTERM, then SIGQUIT at a second Ctrl-C, SIGKILL only when it is past every deadline."""
        sock.close_sockets(self.LISTENERS, not self.systemd)
        self.LISTENERS: list[Any] = []
        limit = time.monotonic() + self.cfg.graceful_timeout
        self.kill_workers(signal.SIGTERM)
        hurried = False
        while self.WORKERS and time.monotonic() < limit:
            with contextlib.suppress(queue.Empty):
                pending = self.SIG_QUEUE.get(timeout=0.1)
                if pending in (signal.SIGINT, signal.SIGQUIT) and not hurried:
                    hurried = True
                    log.warning("hurried: instances are killed now")
                    self.kill_workers(signal.SIGQUIT)
                    limit = time.monotonic() + HURRIED_S
            self.reap_workers()
        self.kill_workers(signal.SIGKILL)
        self.reap_workers()


class Worker(ThreadWorker):
    """One process: an event loop that accepts and parks connections, and threads that handle requests."""

    service: Service
    grace_s: float
    hurry = False

    def init_signals(self) -> None:
        super().init_signals()
        signal.signal(signal.SIGINT, signal.SIG_IGN)     # a terminal sends it to the whole group; the master decides
        signal.signal(signal.SIGQUIT, self.handle_quit)
        signal.signal(signal.SIGHUP, self.handle_reload)

    def handle_quit(self, sig: int, frame: Any) -> None:
        self.hurry, self.alive = True, False
        self.method_queue.defer(lambda: None)

    def handle_reload(self, sig: int, frame: Any) -> None:
        threading.Thread(target=self.service.reload, name="reload", daemon=True).start()

    def load_wsgi(self) -> None:
        self.service = self.app.make_service()
        self.wsgi = self.service.wsgi

    def run(self) -> None:
        self.service.start()
        self.poller.register(self.method_queue.fileno(), selectors.EVENT_READ, self.method_queue.run_callbacks)
        self.set_accept_enabled(True)
        while self.alive:
            self.notify()
            can_accept = self.nr_conns < self.worker_connections
            if can_accept != self._accepting:
                self.set_accept_enabled(can_accept)
            self.wait_for_and_dispatch_events(timeout=1.0)
            self.murder_keepalived()
            self.murder_pending()
        self._drain()
        self.service.stop(lambda: self.hurry, self.notify)
        self.tpool.shutdown(wait=False)

    def _drain(self) -> None:
        """Accept nothing more, let requests in flight finish, up to the grace time."""
        self.set_accept_enabled(False)
        for listener in self.sockets:
            listener.close()
        for parked in (self.keepalived_conns, self.pending_conns):
            while parked:
                connection = parked.popleft()
                with contextlib.suppress(OSError, KeyError, ValueError):
                    self.poller.unregister(connection.sock)
                self.nr_conns -= 1
                connection.close()
        deadline = time.monotonic() + self.grace_s
        while self.nr_conns > 0 and time.monotonic() < deadline and not self.hurry:
            self.notify()
            self.wait_for_and_dispatch_events(timeout=0.2)

    def handle_error(self, req: Any, client: socket.socket, addr: Any, exc: BaseException) -> None:
        """A request that could not be parsed, or a bug: one answer in the envelope, then the connection closes."""
        if isinstance(exc, http_errors.ParseException):
            error: DaemonError = BadRequest(f"the request cannot be read: {exc}", code="invalid_request")
            status = {http_errors.LimitRequestHeaders: 431, http_errors.UnsupportedTransferCoding: 501,
                      http_errors.ExpectationFailed: 417}.get(type(exc), 400)
        else:
            log.error("a request failed", exc_info=exc)
            error, status = DaemonError("the daemon failed; its log says how"), 500
        body = orjson.dumps(error.envelope())
        head = (f"HTTP/1.1 {status} Error\r\nConnection: close\r\nContent-Type: application/json\r\n"
                f"Content-Length: {len(body)}\r\n\r\n")
        with contextlib.suppress(OSError):
            client.sendall(head.encode() + body)


class Server(BaseApplication):
    """`run()` blocks until the daemon ends and leaves through SystemExit with its exit status."""

    def __init__(self, settings: Settings, make_service: Callable[[], Service],
                 when_listening: Callable[[str], None]) -> None:
        self._settings = settings
        self.make_service = make_service
        self._when_listening = when_listening
        self._lifeline = os.pipe()
        super().__init__()

    def load_config(self) -> None:
        settings = self._settings
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        worker = type("BoundWorker", (Worker,), {"grace_s": settings.shutdown_grace_s})
        graceful_s = settings.shutdown_grace_s + settings.drain_timeout_s + settings.stop_timeout_s + MARGIN_S
        for name, value in {
            "bind": f"{host}:{settings.port}", "worker_class": worker, "workers": 1, "threads": settings.threads,
            "worker_connections": settings.max_connections, "keepalive": settings.keepalive_s, "timeout": BOUND_S,
            "graceful_timeout": int(graceful_s), "backlog": 4096, "logger_class": Log, "proc_name": "vllm-server",
            "accesslog": "-" if settings.access_log else None, "control_socket_disable": True,
            "post_fork": self._after_fork, "when_ready": self._ready,
        }.items():
            self.cfg.set(name, value)

    def load(self) -> Wsgi:
        raise AssertionError("the worker makes its own service")

    def run(self) -> None:
        Master(self).run()

    def _ready(self, master: Master) -> None:
        address = master.LISTENERS[0].sock.getsockname()
        host = f"[{address[0]}]" if ":" in address[0] else address[0]
        self._when_listening(f"http://{host}:{address[1]}")

    def _after_fork(self, server: Master, worker: Worker) -> None:
        """Only the master holds the pipe's other end: when that closes, the master is gone and so are we.

        Engines stay; the next daemon adopts them.
        """
        read, write = self._lifeline
        os.close(write)

        def watch() -> None:
            os.read(read, 1)
            os._exit(1)

        threading.Thread(target=watch, name="lifeline", daemon=True).start()
