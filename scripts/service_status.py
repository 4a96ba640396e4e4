"""What scripts/status.sh shows: of the process, and of the daemon over its own API."""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path
from typing import Any

import psutil
import requests

from config import load_settings
from errors import ConfigError
from instances.processes import Process
from scripts.pid_file import Started
from scripts.run import CallFailed, Client, listening_port

SERVES, TROUBLE, NOT_RUNNING = 0, 1, 3      # as LSB has them for init scripts
PATIENCE_S = 10.0


def address(pid: int) -> str | None:
    """Where it listens, as seen from this machine."""
    port = listening_port(pid)
    return None if port is None else f"http://localhost:{port}"


def lock_owner(state_dir: Path) -> str | None:
    """The pid of the daemon that has this folder, however it was started."""
    try:
        with open(state_dir / "lock") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return lock.read().strip() or "unknown"
    except OSError:
        pass
    return None


def show(running: tuple[Started, Process] | None, recorded: Started | None, log: Path, *, verbose: bool) -> int:
    """Prints it; the exit code of status.sh."""
    if running is None:
        return _show_absence(recorded, log)
    started, _ = running
    process = psutil.Process(started.pid)
    print(f"running    pid {started.pid}, for {_duration(time.time() - process.create_time())}")
    url = address(started.pid)
    if url is None:
        print("address    none yet: it starts or stops")
        return TROUBLE
    print(f"address    {url}/v1")
    if started.background:
        print(f"log        {log}")
    try:
        return _show_daemon(Client(url, load_settings(os.environ, cwd=Path.cwd())), verbose=verbose)
    except ConfigError as error:
        print(f"settings   {error}: it keeps those that it started with")
        return TROUBLE
    except (requests.RequestException, ValueError) as error:
        print(f"health     no answer: {error}")
        return TROUBLE


def _show_absence(recorded: Started | None, log: Path) -> int:
    try:
        owner = lock_owner(load_settings(os.environ, cwd=Path.cwd()).state_dir)
    except ConfigError as error:
        print(f"settings   {error}")
        owner = None
    if owner is not None:
        print(f"running    pid {owner}, not started by scripts/start.sh: vllm-server ps shows what it does")
        return SERVES
    if recorded is not None:
        print(f"not running: pid {recorded.pid} ended by itself; its log: {log}")
        return TROUBLE
    print("not running")
    return NOT_RUNNING


def _show_daemon(client: Client, *, verbose: bool) -> int:
    health = client.call("GET", "/health", timeout_s=PATIENCE_S)
    simulated = ", with a SIMULATED engine" if health["simulated"] else ""
    print(f"health     {health['status']}, version {health['version']}{simulated}")
    print(f"instances  {health['instances']}, of which {health['ready']} ready")
    if (problem := health["config"]["error"]) is not None:
        print(f"settings   what is on disk is not used: {problem}")
    if verbose:
        for title, path, line in (("models", "/v1/models", _model), ("instances", "/instances", _instance),
                                  ("devices", "/gpus", _device)):
            print(f"\n{title}")
            try:
                lines = [line(row) for row in client.call("GET", path, timeout_s=PATIENCE_S)["data"]]
            except CallFailed as error:
                lines = [str(error)]
            print("\n".join(f"  {one}" for one in lines) or "  none")
    return SERVES


def _model(model: dict[str, Any]) -> str:
    return f"{model['id']}  {model.get('status', '')}"


def _instance(one: dict[str, Any]) -> str:
    problem = f": {one['last_error']['message']}" if one["last_error"] else ""
    phase = f" ({one['phase']})" if one["status"] == "starting" and one["phase"] else ""
    name = ", ".join(one["aliases"]) or one["model_name"]
    return f"{one['id']}  {name}  {one['status']}{phase}  {one['in_flight']} in flight{problem}"


def _device(device: dict[str, Any]) -> str:
    memory = device["memory"]
    return f"{device['index']}  {device['name']}  {memory['used'] >> 20} of {memory['total'] >> 20} MiB in use"


def _duration(seconds: float) -> str:
    minutes, hours = int(seconds // 60) % 60, int(seconds // 3600)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {int(seconds) % 60} s"
