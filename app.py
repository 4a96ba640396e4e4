"""The composition root: `create_app(deps)` wires the routes, `main()` reads the settings and runs the server."""

from __future__ import annotations

import argparse
import json
import logging
import os
import resource
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

from flask import Flask, Response, request
from werkzeug.exceptions import HTTPException
from werkzeug.routing import RequestRedirect

import config
import router as data_plane
from configuration.described import described
from configuration.file_watch import FileWatch
from configuration.openness import left_open
from errors import BadRequest, ConfigError, DaemonError, MethodNotAllowed, NotFound, Unauthorized
from instance_manager import InstanceManager
from instances.cores import go_first
from instances.launcher import wait_until
from instances.loop import Loop
from instances.resources import is_simulated
from instances.store import StateDir
from router import Router
from routing import paths, request_id
from routing.incoming import Incoming
from routing.observed import ABOUT
from routing.reply import Reply
from routing.upstream import ClientLeft
from web import admin, auth, cors, live, metrics, models, openapi, page
from web.audit import AuditLog
from web.notify import Notifier
from web.reloader import EVERY_S, Reloader
from web.server import Server
from web.shortcut import Shortcut, Steps
from web.worker import Service

VERSION = "0.1.0"
ADDRESS_WAIT_S = 2.0
SCALE_S = 1.0                   # between two looks at how many replicas there should be
CLIENT_CLOSED_REQUEST = 499     # nginx's status for a client that left; nobody reads it

log = logging.getLogger("vllm_server")


@dataclass(frozen=True)
class Deps:
    """What the routes use."""

    manager: InstanceManager
    router: Router
    reloader: Reloader
    audit: AuditLog
    live: live.Live


def create_app(deps: Deps) -> Flask:
    """The WSGI application.  Starts nothing."""
    app = Flask("vllm_server", static_folder=None)
    app.url_map.merge_slashes = False
    app.json.sort_keys = False  # type: ignore[attr-defined]
    about = {"version": VERSION, "simulated": is_simulated(deps.manager.settings.command)}
    app.extensions.update(manager=deps.manager, router=deps.router, reloader=deps.reloader,
                          audit=deps.audit, live=deps.live,
                          about=about, metrics=metrics.registry_of(deps.manager, deps.router, about))
    steps = _steps(deps, app)
    app.before_request(lambda: steps.before(request))

    @app.after_request
    def after(response: Response) -> Response:
        steps.after(request, response)
        return response

    app.register_blueprint(admin.blueprint)
    app.register_blueprint(models.blueprint)
    app.register_blueprint(live.blueprint)
    app.register_blueprint(page.blueprint)
    app.register_blueprint(metrics.blueprint)
    app.register_blueprint(openapi.blueprint)
    app.register_blueprint(data_plane.blueprint)
    app.register_error_handler(Exception, lambda error: steps.error(request, error))
    app.wsgi_app = Shortcut(app.wsgi_app, paths.BY_MODEL, deps.router.view, steps)  # type: ignore[method-assign]
    return app


def _steps(deps: Deps, app: Flask) -> Steps:
    """What happens to every request, whoever answers it."""

    def before(incoming: Incoming) -> Response | None:
        metrics.begin(incoming)
        request_id.adopt(incoming.headers.get(request_id.HEADER))
        preflight = cors.begin(incoming, deps.manager.settings)
        if preflight is None:
            auth.check(incoming, deps.manager.settings)
        return preflight

    def after(incoming: Incoming, response: Response | Reply) -> None:
        if not isinstance(response, Reply):     # which has these from routing/forwarding.py
            response.headers[request_id.HEADER] = request_id.current()
            cors.end(incoming, response)
        metrics.count(deps.router, incoming, response)
        deps.audit.note(incoming, response)

    return Steps(before, lambda incoming, error: _answer_error(app, incoming, error), after)


def _answer_error(app: Flask, incoming: Incoming, error: Exception) -> Response:
    """The one way from an exception to an answer."""
    if isinstance(error, ClientLeft):
        if (about := incoming.environ.get(ABOUT)) is not None:
            about.code = "client_left"
        return Response(status=CLIENT_CLOSED_REQUEST)
    if isinstance(error, RequestRedirect):      # a slash is missing at the end
        return Response(status=error.code, headers={"Location": error.new_url})
    ours = _translated(incoming, error)
    if (about := incoming.environ.get(ABOUT)) is not None:
        about.code = ours.code
    response: Response = app.json.response(ours.envelope())  # type: ignore[assignment]
    response.status_code = ours.status
    if ours.retry_after_s is not None:
        response.headers["Retry-After"] = str(ours.retry_after_s)
    if isinstance(ours, Unauthorized):
        response.headers["WWW-Authenticate"] = "Bearer"
    if isinstance(error, HTTPException) and isinstance(ours, MethodNotAllowed):
        response.headers.extend(header for header in error.get_headers() if header[0] == "Allow")
    return response


def _translated(incoming: Incoming, error: Exception) -> DaemonError:
    if isinstance(error, DaemonError):
        return error
    if isinstance(error, HTTPException):
        if error.code == 404:
            return NotFound(f"there is no route {incoming.method} {incoming.path[:200]}", code="route_not_found")
        if error.code == 405:
            return MethodNotAllowed(f"{incoming.path[:200]} does not take {incoming.method}")
        return BadRequest(error.description or "bad request")
    log.error("%s %r failed", incoming.method, incoming.path, exc_info=error)
    return DaemonError("the daemon failed on this request; its log says how")


class Daemon:
    """Settings, as they are now, and what runs on them.  Made in the worker process."""

    def __init__(self, settings: config.Settings, state_dir: StateDir, arguments: argparse.Namespace,
                 watch: FileWatch) -> None:
        self.manager = InstanceManager(settings, state_dir)
        self.router = Router(self.manager)
        self.reloader = Reloader(lambda: read_settings(arguments), self.manager, watch, self.router.use)
        self._scaler = Loop(name="scaler", interval_s=SCALE_S,
                            tick=lambda now: self.manager.scale(now, self.router.engine_loads()))
        self._config_watch = Loop(name="config-watch", tick=self.reloader.tick, interval_s=EVERY_S)
        self.audit = AuditLog(state_dir.path / "audit.log")
        self.live = live.Live(self.router, simulated=is_simulated(settings.command))

    def service(self) -> Service:
        app = create_app(Deps(self.manager, self.router, self.reloader, self.audit, self.live))
        return Service(wsgi=app, start=self.start, stop=self.stop, reload=self.reloader.try_reload,
                       streams=lambda: self.router.streams() + self.live.feed.count(), waiting=self.manager.waiting,
                       close_door=self.close_door)

    def start(self) -> None:
        self.router.start()
        self.live.start()
        self.manager.start()
        self._config_watch.start()
        self._scaler.start()

    def close_door(self) -> None:
        self.manager.close_door()
        self.live.close()

    def stop(self, hurry: Any, alive: Any) -> None:
        self._config_watch.stop()
        self._scaler.stop()
        self.manager.shutdown(keep=self.manager.settings.keep_instances, hurry=hurry, alive=alive)
        self.router.close()
        self.audit.close()
        log.info("stopped")


def read_settings(arguments: argparse.Namespace) -> config.Settings:
    overrides = {name: value for name, value in (("APP_HOST", arguments.host), ("APP_PORT", arguments.port))
                 if value is not None}
    return config.load_settings(os.environ, env_file=arguments.env, config_file=arguments.config,
                                servers_file=arguments.servers, cwd=Path.cwd(), overrides=overrides)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="app.py", description="Runs vLLM instances behind one address.")
    parser.add_argument("--host", help="address to listen on (APP_HOST)")
    parser.add_argument("--port", help="port to listen on (APP_PORT)")
    parser.add_argument("--config", type=Path, metavar="FILE", help="models file instead of ./config.yaml")
    parser.add_argument("--servers", type=Path, metavar="FILE", help="list of other servers instead of ./servers.toml")
    parser.add_argument("--env", type=Path, metavar="FILE", help="settings file instead of ./.env")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--console", action="store_true", help="log on this terminal, which is what happens anyway")
    where.add_argument("--monitor", action="store_true", help="show the monitor on this terminal, log into a file")
    parser.add_argument("--check", action="store_true",
                        help="read the settings, say what is wrong with them or print them as JSON, and end")
    parser.add_argument("--version", action="version", version=f"vllm-server {VERSION}")
    return parser.parse_args(argv)


def set_up_logging(level: str) -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(request_id.Formatter("%(asctime)s %(levelname)s %(name)s: %(request)s%(message)s"))
    logging.basicConfig(level=level, handlers=[handler])
    logging.getLogger("urllib3").setLevel(logging.ERROR)     # a broken upstream is our own message


def raise_file_limit() -> None:
    """A descriptor for each client and each engine connection: take what the system grants."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def check_address(host: str, port: int) -> None:
    """Leave with one clear sentence when the address is taken, waiting a little for a daemon that just ended."""
    def problem() -> str | None:
        try:
            family, kind, number, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            with socket.socket(family, kind, number) as test:
                test.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                test.bind(address)
                test.listen(1)
        except OSError as error:
            return str(error.strerror or error)
        return None

    if not wait_until(lambda: problem() is None, ADDRESS_WAIT_S, step_s=0.2):
        sys.exit(f"vllm-server: cannot listen on {host} port {port}: {problem()}; choose another with --host and "
                 "--port, or APP_HOST and APP_PORT")


def banner(settings: config.Settings, address: str) -> None:
    simulated = " with a SIMULATED engine: no model is loaded" if is_simulated(settings.command) else ""
    log.info("vllm-server %s listens on %s%s", VERSION, address, simulated)
    for warning in (*left_open(vars(settings)), *settings.warnings):
        log.warning("%s", warning)


def become_monitored(argv: Sequence[str]) -> NoReturn:
    """Go on as the client's `run --monitor`, which starts this program as its child."""
    if find_spec("textual") is None:
        sys.exit("vllm-server: --monitor needs the client's libraries: pip install ./client")
    here = Path(__file__).resolve().parent
    os.environ["VLLM_SERVER_HOME"] = str(here)
    os.execv(sys.executable, [sys.executable, str(here / "client"), "run", *argv])    # whose options have these names


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    if arguments.monitor:
        become_monitored(sys.argv[1:] if argv is None else argv)
    try:
        watch = FileWatch(*config.watched_paths(    # before they are read
            os.environ, env_file=arguments.env, config_file=arguments.config, servers_file=arguments.servers,
            cwd=Path.cwd()))
        settings = read_settings(arguments)
        if arguments.check:
            sys.stdout.write(json.dumps(described(vars(settings)), indent=2) + "\n")
            return
        set_up_logging(settings.log_level)
        notifier = Notifier.taken_from(os.environ)
        state_dir = StateDir(settings.state_dir)
        state_dir.lock()
    except ConfigError as error:
        sys.exit(f"vllm-server: {error}")
    except OSError as error:
        sys.exit(f"vllm-server: STATE_DIR {settings.state_dir} cannot be used: {error.strerror or error}")
    check_address(settings.host, settings.port)
    raise_file_limit()
    if settings.realtime:
        go_first()
    Server(settings, lambda: Daemon(settings, state_dir, arguments, watch).service(),
           lambda address: banner(settings, address), notifier).run()


if __name__ == "__main__":
    main()
