"""`make run` and `make demo`: an engine, a demo model, the daemon and its first answer; then it goes on serving.

    python -m scripts.run [--demo]        in the checkout, with .venv's Python

app.py runs as a child in a process group of its own, so that a Ctrl-C reaches it once, from here: the first one stops
it gracefully, the next one hurries.  Exit code: the daemon's if that failed; 1 when there was no first answer; 130
when interrupted before it; else 0.
"""

from __future__ import annotations

import argparse
import ctypes
import errno
import json
import math
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import requests

from config import Settings, load_settings
from errors import ConfigError
from scripts import make_models, setup_engine

ROOT = Path(__file__).parent.parent
SIMULATOR = shlex.join([sys.executable, str(ROOT / "simulator.py")])
MODEL_NAME = "demo"
QUESTION = {"model": MODEL_NAME, "messages": [{"role": "user", "content": "Hello, who are you?"}], "max_tokens": 24,
            "temperature": 0}
DEMO_GPU_BYTES = 4 << 30        # what a tiny model needs of a GPU; the rest stays free for others
POLL_S = 0.25
CALL_TIMEOUT_S = 60.0
ANSWER_TIMEOUT_S = 300.0
INTERRUPTED = 130
PR_SET_PDEATHSIG = 1            # prctl(2)


class Problem(Exception):
    """Why it ends before the daemon serves, in one sentence that says what to do."""


class CallFailed(Exception):
    """The daemon answered with an error, whose message this carries."""


def say(text: str = "") -> None:
    print(f"==> {text}" if text else "", flush=True)


# --- before the daemon -----------------------------------------------------------------------------------------------

def prepare(simulated: bool) -> tuple[Settings, dict[str, str], Path]:
    """Settings, the daemon's environment, and the demo model's folder.  May install the engine, which takes minutes.

    Raises Problem, ConfigError, setup_engine.SetupError and OSError.
    """
    settings = load_settings(os.environ, cwd=Path.cwd())
    check_port(settings, "demo" if simulated else "run")
    environ = dict(os.environ)
    if simulated:
        say("demo: the engine is SIMULATED; no model is loaded and every reply says so")
        environ["VLLM_COMMAND"] = SIMULATOR
        environ["STATE_DIR"] = f"{settings.state_dir}-demo"     # real instances stay with the real daemon
    else:
        environ["VLLM_COMMAND"] = engine_command()
        say(f"engine: {environ['VLLM_COMMAND']}")
        if not setup_engine.has_nvidia_gpu() and "VLLM_CPU_KVCACHE_SPACE" not in {**settings.engine_env, **environ}:
            environ["VLLM_CPU_KVCACHE_SPACE"] = "1"     # GiB; vLLM would take half of the machine's memory
    folder = make_models.default_folder("tiny-llama")
    make_models.make_model("tiny-llama", folder)
    say(f"model: {folder} (made here with random layers; nothing is downloaded)")
    return settings, environ, folder


def check_port(settings: Settings, target: str) -> None:
    """Raises Problem when the daemon could not listen on its port."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    with socket.socket(family) as test:
        test.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            test.bind((settings.host, settings.port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise Problem(f"port {settings.port} is taken: stop what listens there, or take another one: "
                              f"make {target} APP_PORT={settings.port % 65535 + 1}") from None
            raise Problem(f"cannot listen on {settings.host} port {settings.port} ({error.strerror or error}): "
                          "change APP_HOST or APP_PORT") from None


def engine_command() -> str:
    """The engine that is there, else a fresh install."""
    flavour = setup_engine.CUDA if setup_engine.has_nvidia_gpu() else setup_engine.CPU
    found = setup_engine.find_command(os.environ, flavour)
    return found or shlex.join([str(setup_engine.install(setup_engine.cache_folder(os.environ), flavour))])


# --- the daemon ------------------------------------------------------------------------------------------------------

class Daemon:
    """app.py with its log on this terminal.  From the start on, every signal to end goes through to it."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        libc = ctypes.CDLL(None)

        def end_with_parent() -> None:
            libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)    # else a kill -9 of this script would leave it behind

        self.process = subprocess.Popen([sys.executable, str(ROOT / "app.py")], env=environ, stdin=subprocess.DEVNULL,
                                        process_group=0, preexec_fn=end_with_parent)
        self._told: list[int] = []
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):   # HUP: the terminal has gone
            signal.signal(number, self._pass_on)

    @property
    def ending(self) -> bool:
        return bool(self._told) or self.process.poll() is not None

    def wait(self) -> int:
        """Its exit code; 128 + n for signal n."""
        code = self.process.wait()
        return 128 - code if code < 0 else code

    def _pass_on(self, number: int, frame: object) -> None:
        # TERM first: while the daemon is still importing, an INT would end it with a traceback.
        again = number == signal.SIGINT and signal.SIGINT in self._told
        self._told.append(number)
        self.process.send_signal(signal.SIGINT if again else signal.SIGTERM)


class Client:
    """The daemon's API as this script uses it.  Every call raises CallFailed, and requests.ConnectionError once the
    daemon has gone."""

    def __init__(self, url: str, settings: Settings) -> None:
        self.url = url
        self._settings = settings
        self._session = requests.Session()
        self._session.trust_env = False     # no proxy stands between this machine and itself

    def call(self, method: str, path: str, body: Any = None, timeout_s: float = CALL_TIMEOUT_S) -> Any:
        keys = self._keys(path)
        headers = {"Authorization": f"Bearer {keys[0]}"} if keys else {}
        response = self._session.request(method, self.url + path, json=body, headers=headers, timeout=timeout_s)
        answer = response.json()
        if response.status_code >= 400:
            raise CallFailed(answer["error"]["message"])
        return answer

    def curl(self, method: str, path: str, body: Any = None) -> str:
        """The same call as a line for the shell; of a key only its setting's name."""
        words = ["curl", *(["-X", method] if method == "DELETE" else []), self.url + path]
        if body is not None:
            words += ["-H", "Content-Type: application/json", "-d", json.dumps(body)]
        line = shlex.join(words)
        return line + ' -H "Authorization: Bearer $KEY"' if self._keys(path) else line

    def _keys(self, path: str) -> list[str]:
        """Those that open this path and are known in plain text; none: it is open, or only hashes are known."""
        admin, inference = self._settings.admin_api_keys, self._settings.api_keys
        keys = (inference and (admin or inference)) if path.startswith("/v1/") else admin
        return [key.plain for key in keys if key.plain is not None]


def wait_until_it_serves(daemon: Daemon, settings: Settings) -> Client | None:
    """Its client, or None when it ended instead (its log has said why)."""
    host = "localhost" if settings.host in ("0.0.0.0", "::") else settings.host  # nosec B104
    host = f"[{host}]" if ":" in host else host
    while not daemon.ending:
        if (port := listening_port(daemon.process.pid)) is not None:
            return Client(f"http://{host}:{port}", settings)
        time.sleep(POLL_S)
    return None


def listening_port(pid: int) -> int | None:
    """Of this very process: whoever else answers on the port is not our daemon."""
    try:
        sockets = psutil.Process(pid).net_connections(kind="tcp")
    except psutil.Error:
        return None
    return next((one.laddr.port for one in sockets if one.status == psutil.CONN_LISTEN), None)


# --- the first answer ------------------------------------------------------------------------------------------------

def engine_params(devices: list[dict[str, Any]]) -> dict[str, Any]:
    """Flags with which the demo model starts on this machine, be it small, and leaves room for others."""
    params: dict[str, Any] = {"served_model_name": MODEL_NAME, "max_model_len": make_models.MAX_POSITIONS}
    gpus = [device["memory"]["total"] for device in devices if device["kind"] == "cuda"]
    if gpus:
        return params | {"gpu_memory_utilization": min(0.9, math.ceil(100 * DEMO_GPU_BYTES / min(gpus)) / 100)}
    return params | {"dtype": "float32", "enforce_eager": True}


def load(client: Client, folder: Path) -> str | None:
    """The id of the ready instance, the way there told as it goes; None, and why, when it failed."""
    devices = client.call("GET", "/gpus")["data"]
    started = time.monotonic()
    # "replace": one of an earlier run, with other flags, gives way; one with the same flags is taken as it is.
    instance = client.call("POST", "/instances", {"model_name": str(folder), "params": engine_params(devices),
                                                  "timeout": 0, "replace": True})
    path, told = f"/instances/{instance['id']}", ""
    while instance["status"] in ("starting", "backoff"):
        error = instance["last_error"] if instance["status"] == "backoff" else None
        step = error["message"] if error else instance["phase"]
        if step not in (None, "ready", told):
            told = step
            share = "" if error or instance["progress"] is None else f" ({instance['progress']:.0%})"
            say(f"{time.monotonic() - started:5.1f} s  {step}{share}")
        time.sleep(POLL_S)
        instance = client.call("GET", path)
    if instance["status"] == "ready":
        say(f"{time.monotonic() - started:5.1f} s  ready")
        return str(instance["id"])
    if instance["last_error"] is not None:
        say(f"the demo model failed to load ({instance['last_error']['code']}): {instance['last_error']['message']}")
        say(f"its log: {client.curl('GET', path + '/logs')}")
    return None


def ask(client: Client, instance_id: str) -> None:
    """Ask, print the answer, and the lines that do the same and more."""
    answer = client.call("POST", "/v1/chat/completions", QUESTION, ANSWER_TIMEOUT_S)
    question = QUESTION["messages"][0]["content"]  # type: ignore[index]
    say()
    say(f"you:  {question}")
    say(f"{MODEL_NAME}: {answer['choices'][0]['message']['content'].strip()}")
    say()
    say(f"OpenAI-compatible address: {client.url}/v1    model: {MODEL_NAME}")
    lines = {"ask": client.curl("POST", "/v1/chat/completions", QUESTION),
             "list": client.curl("GET", "/instances"),
             "stop the model": client.curl("DELETE", f"/instances/{instance_id}")}
    for what, line in lines.items():
        say(f"{what}:\n{line}")
    if "$KEY" in "".join(lines.values()):
        say("KEY is one of your ADMIN_API_KEYS (for /v1 one of API_KEYS will do)")


def greet(daemon: Daemon, settings: Settings, folder: Path) -> int:
    """The exit code so far: 0 with a first answer, 130 when interrupted before it, else 1.  Blocks until then, or until
    the daemon ends."""
    client = wait_until_it_serves(daemon, settings)
    if client is None:
        return INTERRUPTED
    answered = False
    try:
        if (instance_id := load(client, folder)) is not None:
            ask(client, instance_id)
            answered = True
    except CallFailed as error:
        say(f"no first answer: {error}")
    except (requests.RequestException, KeyError, ValueError) as error:
        if not daemon.ending:
            say(f"no first answer: {error!r}")
    if daemon.ending:       # looked at before it is said, as who reads it may press Ctrl-C at once
        return 0 if answered else INTERRUPTED
    say(f"serving on {client.url}{'' if answered else ' all the same'}; Ctrl-C stops everything, a second one hurries")
    return 0 if answered else 1


def main() -> int:
    parser = argparse.ArgumentParser(description="Start the daemon and show a first answer.")
    parser.add_argument("--demo", action="store_true", help="with the simulated engine")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, setup_engine.interrupted)
    try:
        settings, environ, folder = prepare(arguments.demo)
    except (Problem, ConfigError, setup_engine.SetupError, OSError) as error:
        print(f"vllm-server: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("vllm-server: interrupted; nothing was started", file=sys.stderr)
        return 130
    daemon = Daemon(environ)
    code = greet(daemon, settings, folder)
    return daemon.wait() or code


if __name__ == "__main__":
    sys.exit(main())
