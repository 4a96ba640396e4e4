"""The production server: gunicorn, embedded, with one worker process that holds the registry (web/worker.py).

The master only binds, forks and restarts the worker if that ever dies (it then adopts its engines as after any other
crash).  What differs from stock gunicorn is here: Ctrl-C is graceful and a second one hurries, SIGHUP reloads in
place instead of forking anew, and a worker never outlives its master.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import signal
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

from gunicorn import glogging, sock
from gunicorn.app.base import BaseApplication
from gunicorn.arbiter import Arbiter

from config import Settings
from routing import request_id
from web.leaving import to_be_tried_again
from web.notify import Notifier
from web.worker import Service, Worker, Wsgi

log = logging.getLogger("vllm_server.http")

HURRIED_S = 30.0    # what a hurried worker gets to kill its engines
MARGIN_S = 30.0     # what a graceful one gets on top of the sum of its deadlines
TELL_AGAIN_S = 1.0  # a worker that was just forked has its parent's handlers for a moment: what it is told then is lost
BOUND_S = 120     # a worker whose main loop stands still for so long is restarted
VANISHED_S = 60     # of silence before a client's host is asked whether it is still there
ACCESS_LINE = f'%(h)s %(l)s %(u)s %(t)s "%(r)s" %(s)s %(b)s "%(f)s" "%(a)s" %({{{request_id.HEADER.lower()}}}o)s'


class Log(glogging.Logger):
    """gunicorn's messages go where the daemon's go; only the access log keeps its own stream."""

    def setup(self, cfg: Any) -> None:
        super().setup(cfg)
        self.error_log.handlers = []
        self.error_log.propagate = True
        self.error_log.setLevel(logging.WARNING)

    def atoms(self, resp: Any, req: Any, environ: Any, request_time: Any) -> dict[str, Any]:
        """Of the access log: what a client sent makes no line of its own there."""
        atoms: dict[str, Any] = super().atoms(resp, req, environ, request_time)
        return {name: request_id.printable(value) if isinstance(value, str) else value for name, value in atoms.items()}


class Master(Arbiter):
    def __init__(self, app: Server) -> None:
        super().__init__(app)
        self._notifier = app.notifier

    def handle_usr2(self) -> None:
        """From the worker: it serves, or has read its settings anew."""
        self._notifier.ready(f"serves on {_address(self)}")

    def spawn_worker(self) -> int | None:
        """Where the system grants no process now, the master's loop tries again in a second, and clients wait."""
        master = os.getpid()
        try:
            return super().spawn_worker()  # type: ignore[no-any-return]
        except OSError as error:
            if os.getpid() != master:
                raise
            log.error("no worker process can be had now: %s; trying again", error.strerror or error)
            return None

    def murder_workers(self) -> None:
        """Once a second."""
        super().murder_workers()
        self._notifier.alive(time.monotonic())

    def handle_int(self) -> None:
        """Ctrl-C: as graceful as SIGTERM; `stop` looks for the second one."""
        raise StopIteration

    handle_quit = handle_int

    def handle_hup(self) -> None:
        self._notifier.reloading()
        self.kill_workers(signal.SIGHUP)

    def handle_ttin(self) -> None:
        """The registry lives in one process: there is never a second worker."""

    handle_ttou = handle_winch = handle_ttin

    def stop(self, graceful: bool = True) -> None:
        """Stop the worker: SIGTERM, then SIGQUIT at a second Ctrl-C, SIGKILL only when it is past every deadline."""
        self._notifier.stopping(self.cfg.graceful_timeout + HURRIED_S)
        sock.close_sockets(self.LISTENERS, not self.systemd)
        self.LISTENERS: list[Any] = []
        order, tell_at, limit = signal.SIGTERM, 0.0, time.monotonic() + self.cfg.graceful_timeout
        while self.WORKERS and (now := time.monotonic()) < limit:
            if now >= tell_at:
                tell_at = now + TELL_AGAIN_S
                self.kill_workers(order)
            with contextlib.suppress(queue.Empty):
                pending = self.SIG_QUEUE.get(timeout=0.1)
                if pending in (signal.SIGINT, signal.SIGQUIT) and order is signal.SIGTERM:
                    log.warning("hurried: instances are killed now")
                    order, tell_at, limit = signal.SIGQUIT, 0.0, time.monotonic() + HURRIED_S
            self.reap_workers()
        self.kill_workers(signal.SIGKILL)
        self.reap_workers()


class Server(BaseApplication):
    """`run()` blocks until the daemon ends and leaves through SystemExit with its exit status."""

    def __init__(self, settings: Settings, make_service: Callable[[], Service],
                 when_listening: Callable[[str], None], notifier: Notifier) -> None:
        self._settings = settings
        self.notifier = notifier
        self.make_service = make_service
        self._when_listening = when_listening
        self._lifeline = os.pipe()
        super().__init__()

    def load_config(self) -> None:
        settings = self._settings
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        worker = type("BoundWorker", (Worker,), {"settings": settings})
        graceful_s = settings.shutdown_grace_s + settings.drain_timeout_s + settings.stop_timeout_s + MARGIN_S
        for name, value in {
            "bind": f"{host}:{settings.port}", "worker_class": worker, "workers": 1, "threads": settings.threads,
            "worker_connections": settings.max_connections, "keepalive": settings.keepalive_s, "timeout": BOUND_S,
            "graceful_timeout": int(graceful_s), "backlog": 4096, "logger_class": Log, "proc_name": "vllm-server",
            "accesslog": "-" if settings.access_log else None, "access_log_format": ACCESS_LINE,
            "control_socket_disable": True, "post_fork": self._after_fork, "when_ready": self._ready,
        }.items():
            self.cfg.set(name, value)

    def load(self) -> Wsgi:
        raise AssertionError("the worker makes its own service")

    def run(self) -> None:
        Master(self).run()

    def _ready(self, master: Master) -> None:
        for listener in master.LISTENERS:   # every connection inherits it: a client that vanished is found in minutes
            listener.sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            listener.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, VANISHED_S)
            listener.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, VANISHED_S // 4)
            listener.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 4)
        self._when_listening(_address(master))

    def _after_fork(self, server: Master, worker: Worker) -> None:
        """Only the master holds the pipe's other end: when that closes, the master is gone and so are we.

        Engines stay; the next daemon adopts them.
        """
        read, write = self._lifeline
        os.close(write)

        def watch() -> None:
            os.read(read, 1)
            os._exit(1)

        with to_be_tried_again():
            threading.Thread(target=watch, name="lifeline", daemon=True).start()


def _address(master: Master) -> str:
    host, port = master.LISTENERS[0].sock.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
