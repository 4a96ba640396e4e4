"""How each program that is measured is found, configured and started before a null upstream.

A `Kind` says how; `start()` makes a `Server` of it in a folder of its own.  Every kind proxies the model "bench" to
one upstream; each has its access log off and nothing else changed that costs or saves time, except where said here.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from processes import BUILD, UPSTREAM, Program, free_port, wait_until

ROOT = Path(__file__).resolve().parent.parent
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vllm-server" / "bench"
MODEL = "bench"
START_TIMEOUT_S = 90.0
_no_proxy = urllib.request.build_opener(urllib.request.ProxyHandler({}))    # loopback, whatever HTTP_PROXY says


class NotStarted(Exception):
    """The program did not come to answer through its proxy; the message ends with the tail of its log."""


@dataclass(frozen=True)
class Place:
    """What a kind needs to write its configuration: a folder of its own, its port, and the upstream's."""

    folder: Path
    port: int
    upstream_port: int
    daemon_env: Mapping[str, str]

    @property
    def upstream(self) -> str:
        return f"http://127.0.0.1:{self.upstream_port}"

    def write(self, name: str, text: str) -> Path:
        path = self.folder / name
        path.write_text(text)
        return path


@dataclass(frozen=True)
class Command:
    argv: list[str]
    env: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Kind:
    """`find` gives the program's path or None; `light_path` is a GET that it answers itself or passes on cheaply."""

    name: str
    find: Callable[[], str | None]
    command: Callable[[str, Place], Command]
    version: Callable[[str], str]
    light_path: str = "/health"
    load_model: bool = False            # POST /instances first, as this daemon wants it


@dataclass
class Server:
    kind: Kind
    place: Place
    program: Program | None             # None: there is nothing between load and upstream
    engine_port: int                    # the upstream that it talks to

    @property
    def name(self) -> str:
        return self.kind.name

    def answers(self, timeout_s: float = 30.0) -> bool:
        """Whether a small completion comes back through it, which is what ready means here."""
        if self.program is not None and not self.program.alive():
            return False
        body = {"model": MODEL, "messages": [{"role": "user", "content": "ready?"}], "max_tokens": 1}
        status, answer = request_json(self.place.port, "/v1/chat/completions", body, timeout_s)
        return status == 200 and "choices" in answer

    def streams_running(self) -> int:
        """How many streams its upstream is in; -1 when that cannot be read."""
        try:
            with _no_proxy.open(f"http://127.0.0.1:{self.engine_port}/metrics", timeout=5) as reply:
                lines = reply.read().decode().splitlines()
        except OSError:
            return -1
        return next((int(line.split()[-1]) for line in lines if line.startswith("vllm:num_requests_running")), -1)

    def end(self) -> None:
        if self.program is not None:
            self.program.end()


def request_json(port: int, path: str, body: object, timeout_s: float) -> tuple[int, dict[str, Any]]:
    """(status, object); status 0 when nothing answered, an empty object when it was no JSON object."""
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", json.dumps(body).encode(),
                                     {"Content-Type": "application/json", "Authorization": "Bearer none"})
    try:
        with _no_proxy.open(request, timeout=timeout_s) as reply:
            status, text = reply.status, reply.read()
    except urllib.error.HTTPError as error:
        status, text = error.code, error.read()
    except (OSError, ValueError):
        return 0, {}
    try:
        answer = json.loads(text)
    except ValueError:
        answer = None
    return status, answer if isinstance(answer, dict) else {}


def start(kind: Kind, program_path: str, place: Place) -> Server:
    """Starts it and waits until it answers.  Raises NotStarted, and then has ended what it started."""
    command = kind.command(program_path, place)
    server = Server(kind, place, None, place.upstream_port)
    if command.argv:
        home = {"HOME": str(place.folder), "XDG_CONFIG_HOME": str(place.folder), "XDG_DATA_HOME": str(place.folder)}
        clean = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
        server.program = Program(command.argv, place.folder, clean | home | command.env)
    try:
        if kind.load_model:
            server.engine_port = _create_instance(server)
        if not _becomes_ready(server):
            raise NotStarted(_why(server))
    except BaseException:
        server.end()
        raise
    return server


def _becomes_ready(server: Server) -> bool:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        if server.program is not None and not server.program.alive():
            return False
        if server.answers(timeout_s=5):
            return True
        time.sleep(0.2)
    return False


def _create_instance(server: Server) -> int:
    """Has this daemon start its engine; returns the engine's port."""
    instance: dict[str, Any] = {}

    def created() -> bool:
        nonlocal instance
        if server.program is None or not server.program.alive():
            raise NotStarted(_why(server))
        status, instance = request_json(server.place.port, "/instances",
                                        {"model_name": MODEL, "wait": True, "timeout": 0}, START_TIMEOUT_S)
        if status >= 400:
            raise NotStarted(f"POST /instances: {status} {json.dumps(instance)}\n{_why(server)}")
        return status in (200, 201)

    if not wait_until(created, START_TIMEOUT_S):
        raise NotStarted(_why(server))
    return int(instance.get("port") or server.place.upstream_port)


def _why(server: Server) -> str:
    return server.program.log_tail() if server.program is not None else "the null upstream does not answer"


# --- the kinds ---------------------------------------------------------------------------------------------------

def _direct(_: str, place: Place) -> Command:
    return Command([])


def _this_daemon(program: str, place: Place) -> Command:
    env = {"STATE_DIR": str(place.folder / "state"), "VLLM_COMMAND": str(UPSTREAM), "LOG_LEVEL": "WARNING",
           "VLLM_BASE_PORT": str(free_port())}
    argv = [program, str(ROOT / "app.py"), "--host", "127.0.0.1", "--port", str(place.port)]
    return Command(argv, env | dict(place.daemon_env))


def _floor(program: str, place: Place) -> Command:
    return Command([program, str(ROOT / "benchmarks" / "floor.py"), "--port", str(place.port)])


def _floor_relay(program: str, place: Place) -> Command:
    command = _floor(program, place)
    return Command([*command.argv, "--upstream-port", str(place.upstream_port)])


def _nginx(program: str, place: Place) -> Command:
    # Request buffering is off too: with it, nginx writes megabyte bodies to disk first and is slower.
    config = place.write("nginx.conf", f"""
        daemon off;
        pid {place.folder}/nginx.pid;
        error_log stderr error;
        worker_processes auto;
        worker_rlimit_nofile 65536;
        events {{ worker_connections 32768; }}
        http {{
            access_log off;
            client_max_body_size 0;
            client_body_temp_path {place.folder}/body;
            proxy_temp_path {place.folder}/proxy;
            fastcgi_temp_path {place.folder}/fastcgi;
            uwsgi_temp_path {place.folder}/uwsgi;
            scgi_temp_path {place.folder}/scgi;
            keepalive_timeout 300s;
            keepalive_requests 1000000;
            upstream engine {{ server 127.0.0.1:{place.upstream_port}; keepalive 1024; keepalive_requests 1000000; }}
            server {{
                listen 127.0.0.1:{place.port} backlog=4096;
                location / {{
                    proxy_pass http://engine;
                    proxy_http_version 1.1;
                    proxy_set_header Connection "";
                    proxy_buffering off;
                    proxy_request_buffering off;
                    proxy_read_timeout 300s;
                }}
            }}
        }}
        """)
    return Command([program, "-p", str(place.folder), "-c", str(config)])


def _caddy(program: str, place: Place) -> Command:
    config = place.write("Caddyfile", f"""{{
    admin off
    auto_https off
    log {{
        level ERROR
    }}
}}
http://127.0.0.1:{place.port} {{
    reverse_proxy 127.0.0.1:{place.upstream_port} {{
        flush_interval -1
    }}
}}
""")
    return Command([program, "run", "--config", str(config), "--adapter", "caddyfile"])


def _vllm_router(program: str, place: Place) -> Command:
    return Command([program, "--host", "127.0.0.1", "--port", str(place.port), "--worker-urls", place.upstream,
                    "--policy", "round_robin", "--log-level", "error", "--prometheus-port", str(free_port())])


def _production_stack(program: str, place: Place) -> Command:
    return Command([program, "--host", "127.0.0.1", "--port", str(place.port), "--service-discovery", "static",
                    "--static-backends", place.upstream, "--static-models", MODEL, "--routing-logic", "roundrobin",
                    "--log-level", "error"])


def _litellm(program: str, place: Place) -> Command:
    config = place.write("config.yaml", f"""model_list:
  - model_name: {MODEL}
    litellm_params: {{model: hosted_vllm/{MODEL}, api_base: "{place.upstream}/v1", api_key: none}}
litellm_settings: {{telemetry: false}}
""")
    return Command([program, "--config", str(config), "--host", "127.0.0.1", "--port", str(place.port),
                    "--num_workers", "1"],
                   {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_LOG": "ERROR", "NO_DOCS": "True",
                    "LITELLM_DANGEROUSLY_PERMIT_WEAK_OR_UNSET_MASTER_KEY": "true"})


def _mvllm(program: str, place: Place) -> Command:
    config = place.write("servers.toml", f"""[servers]
servers = [{{ url = "{place.upstream}", max_concurrent_requests = 100000 }}]
[config]
request_timeout = 300
""")
    return Command([program, "run", "--config", str(config), "--host", "127.0.0.1", "--port", str(place.port),
                    "--log-level", "ERROR"])


# --- where they are and what they are ----------------------------------------------------------------------------

def _on_path(name: str) -> Callable[[], str | None]:
    return lambda: shutil.which(name) or shutil.which(name, path="/usr/sbin:/usr/local/sbin")


def _in_cache(folder: str, name: str) -> Callable[[], str | None]:
    def find() -> str | None:
        path = CACHE / folder / "bin" / name
        return str(path) if path.exists() else None
    return find


def _find_daemon() -> str | None:
    return sys.executable if (ROOT / "app.py").exists() else None


def _says(*arguments: str) -> Callable[[str], str]:
    def version(program: str) -> str:
        done = subprocess.run([program, *arguments], capture_output=True, text=True, check=False)
        return (done.stdout + done.stderr).strip().splitlines()[0].strip()
    return version


def _of_package(name: str) -> Callable[[str], str]:
    def version(program: str) -> str:
        folders = Path(program).parent.parent.glob(f"lib/python3*/site-packages/{name}-*.dist-info")
        return next((folder.name.removesuffix(".dist-info") for folder in folders), "unknown")
    return version


def _commit(_: str) -> str:
    done = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True,
                          check=False)
    return done.stdout.strip() or "unknown"


SELF = "this daemon"
KINDS: dict[str, Kind] = {kind.name: kind for kind in (
    Kind("direct", lambda: str(UPSTREAM), _direct, lambda _: "no proxy"),
    Kind(SELF, _find_daemon, _this_daemon, _commit, load_model=True),
    Kind("nginx", _on_path("nginx"), _nginx, _says("-v")),
    Kind("caddy", _on_path("caddy"), _caddy, _says("version")),
    Kind("vllm-router", _in_cache("vllm-router", "vllm-router"), _vllm_router, _of_package("vllm_router")),
    Kind("production-stack", _in_cache("production-stack", "vllm-router"), _production_stack,
         _of_package("vllm_router")),
    Kind("litellm", _in_cache("litellm", "litellm"), _litellm, _of_package("litellm"), "/health/liveliness"),
    Kind("mvllm", _in_cache("mvllm", "mvllm"), _mvllm, _of_package("mvllm"), "/v1/models"),
    Kind("floor", lambda: sys.executable, _floor, lambda _: f"Python {sys.version.split()[0]}"),
    Kind("floor-relay", lambda: sys.executable, _floor_relay, lambda _: f"Python {sys.version.split()[0]}"),
)}


def start_upstream(folder: Path) -> tuple[Program, int]:
    """The null upstream that all but this daemon share (the daemon starts one itself).  Raises NotStarted."""
    port = free_port()
    program = Program([str(BUILD / "upstream"), "--port", str(port), "--model", MODEL], folder)
    place = Place(folder, port, port, {})
    if not wait_until(lambda: Server(KINDS["direct"], place, None, port).answers(5), 10):
        program.end()
        raise NotStarted(f"the null upstream: {program.log_tail()}")
    return program, port
