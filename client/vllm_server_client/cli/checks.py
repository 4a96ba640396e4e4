"""What `doctor` looks at.  Each check is one function from facts to a finding; none of them changes anything."""

from __future__ import annotations

import errno
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import httpx

from vllm_server_client.cli import words
from vllm_server_client.client import VLLMProxyClient
from vllm_server_client.errors import AuthenticationFailed, BadAnswer, PermissionDenied, VLLMProxyError

ENGINE_TIMEOUT_S = 120.0    # `vllm --version` imports torch
DRIVER_TIMEOUT_S = 30.0
HUB_TIMEOUT_S = 8.0
PRIORITY_TIMEOUT_S = 60.0
GO_FIRST = "import os; os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(os.sched_get_priority_min(os.SCHED_RR)))"
GIB = 1 << 30
DISK_FAIL_BYTES, DISK_WARN_BYTES = 2 * GIB, 20 * GIB
STATE_WARN_BYTES = GIB // 2
SHM_WARN_BYTES = GIB
RAM_WARN_BYTES = 4 * GIB
FILES_WARN = 4096


class Verdict(StrEnum):
    OK = "ok"
    WARN = "warn"       # works, or will for some
    FAIL = "fail"
    SKIP = "skip"


@dataclass(frozen=True)
class Finding:
    name: str
    verdict: Verdict
    found: str
    advice: str = ""
    serves: bool = False        # of the server: whether it answers as one


def server(client: VLLMProxyClient) -> Finding:
    try:
        health = client.health()
        if problem := health["config"]["error"]:
            return Finding("server", Verdict.WARN, f"the configuration on disk is not used: {problem}",
                           "correct it: the server reads it again by itself, or with vllm-server reload", serves=True)
        simulated = ", with a SIMULATED engine" if health["simulated"] else ""
        return Finding("server", Verdict.OK, f"version {health['version']} serves at {client.base_url}{simulated}",
                       serves=True)
    except (BadAnswer, KeyError):
        return Finding("server", Verdict.FAIL, f"what answers at {client.base_url} is not vllm-server",
                       "stop that program, or start vllm-server on another port: vllm-server run --port 5001")
    except VLLMProxyError as error:
        return Finding("server", Verdict.WARN, error.message, "start it: vllm-server run; or name another with --url")


def management(client: VLLMProxyClient) -> Finding:
    """Only for a server that serves."""
    try:
        return Finding("management", Verdict.OK, f"allowed; {len(client.instances())} instances")
    except (AuthenticationFailed, PermissionDenied) as error:
        return Finding("management", Verdict.WARN, error.message,
                       "set VLLM_SERVER_API_KEY to one of the server's ADMIN_API_KEYS; for chat and models one of "
                       "API_KEYS will do")
    except VLLMProxyError as error:
        return Finding("management", Verdict.FAIL, error.message)


def settings(found: Mapping[str, Any]) -> Finding:
    models = len(found["models"])
    file = f"{found['config_file']} ({models} names of models)" if found["config_file"] else "no config.yaml"
    servers = f", {len(found['servers'])} other servers" if found["servers"] else ""
    return Finding("settings", Verdict.WARN if found["warnings"] else Verdict.OK,
                   f"read without a mistake; {file}{servers}",
                   " ".join(found["warnings"]))


def access(found: Mapping[str, Any]) -> Finding:
    """What the settings leave open to others (an older daemon does not say)."""
    left_open = found.get("open", [])
    if not left_open:
        return Finding("access", Verdict.OK, "nothing is open to others that keys could guard")
    return Finding("access", Verdict.WARN, left_open[0], " ".join(left_open[1:]))


def engine(command: Sequence[str], elsewhere: str | None) -> Finding:
    name = shlex.join(command)
    if not shutil.which(command[0]):
        if elsewhere is not None:
            return Finding("engine", Verdict.OK, f"{elsewhere} (by vllm-server run and make run)",
                           f"to start app.py by itself: VLLM_COMMAND={shlex.quote(elsewhere)}")
        return Finding("engine", Verdict.FAIL, f"{name} is no program here",
                       "'make run' in the checkout installs vLLM; or set VLLM_COMMAND to the vllm that you have")
    try:
        done = subprocess.run([*command, "--version"], capture_output=True, text=True, timeout=ENGINE_TIMEOUT_S,
                              stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired) as error:
        return Finding("engine", Verdict.FAIL, f"{name} --version: {error}", "reinstall vLLM, or name another one")
    lines = (done.stdout.strip() or done.stderr.strip()).splitlines()
    if done.returncode != 0:
        return Finding("engine", Verdict.FAIL, f"{name} --version failed: {lines[-1] if lines else 'no reason'}",
                       f"run '{name} --version' to see why; a broken install is best made anew")
    return Finding("engine", Verdict.OK, f"{name}, version {lines[-1] if lines else '?'}")


def driver() -> Finding:
    if shutil.which("nvidia-smi") is None:
        if Path("/proc/driver/nvidia/version").exists():
            return Finding("gpu", Verdict.FAIL, "the NVIDIA driver is loaded, but nvidia-smi is missing",
                           "install nvidia-utils; in a container: start it with --gpus all")
        return Finding("gpu", Verdict.WARN, "no NVIDIA GPU or driver",
                       "with a GPU: install its driver, in a container start it with --gpus all; without one, vLLM's "
                       "build for CPUs serves small models")
    fields = "index,name,driver_version,memory.total,memory.used"
    try:
        done = subprocess.run(["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"],
                              capture_output=True, text=True, timeout=DRIVER_TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        return Finding("gpu", Verdict.FAIL, f"nvidia-smi: {error}",
                       "the driver hangs: look at dmesg, restart the machine")
    if done.returncode != 0:
        return Finding("gpu", Verdict.FAIL, (done.stdout + done.stderr).strip()[:300] or "nvidia-smi failed",
                       "after an update of the driver: restart the machine; in a container: update its toolkit")
    return gpus_of(done.stdout)


def gpus_of(listing: str) -> Finding:
    """From nvidia-smi's lines, sizes in MiB."""
    rows = [[cell.strip() for cell in line.split(",")] for line in listing.splitlines() if line.count(",") == 4]
    if not rows:
        return Finding("gpu", Verdict.FAIL, "the driver sees no GPU", "in a container: start it with --gpus all")
    shown = "; ".join(f"{index} {name} {_mebibytes(used)} of {_mebibytes(total)} in use"
                      for index, name, _, total, used in rows)
    return Finding("gpu", Verdict.OK, f"driver {rows[0][2]}: {shown}")


def _mebibytes(text: str) -> str:
    return words.size(int(text) << 20) if text.isdigit() else text


def address(host: str, port: int, *, serves: bool) -> Finding:
    if serves:
        return Finding("port", Verdict.OK, f"{port} is vllm-server's")
    if port == 0:
        return Finding("port", Verdict.OK, "a free one is picked at each start (APP_PORT=0)")
    problem = _cannot_bind(host, port)
    if problem is None:
        return Finding("port", Verdict.OK, f"{port} is free")
    return Finding("port", Verdict.FAIL, f"cannot listen on {host} port {port}: {problem}",
                   "stop what has it, or choose another: APP_PORT, vllm-server run --port")


def instance_ports(base: int, count: int) -> Finding:
    free = sum(_cannot_bind("127.0.0.1", port) is None for port in range(base, min(base + count, 65536)))
    shown = f"{free} of {count} are free from {base} on"
    if free:
        return Finding("instance ports", Verdict.OK, shown)
    return Finding("instance ports", Verdict.FAIL, shown, "set VLLM_BASE_PORT to the start of a free range")


def _cannot_bind(host: str, port: int) -> str | None:
    try:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as test:
            test.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            test.bind((host, port))
            test.listen(1)
    except OSError as error:
        return "it is taken" if error.errno == errno.EADDRINUSE else str(error.strerror or error)
    return None


def model_disk(cache: Path) -> Finding:
    free = shutil.disk_usage(_existing(cache)).free
    verdict = Verdict.FAIL if free < DISK_FAIL_BYTES else Verdict.WARN if free < DISK_WARN_BYTES else Verdict.OK
    advice = "" if verdict is Verdict.OK else ("models take 1 to 150 GiB each: delete some there, or set HF_HOME to a "
                                               "larger disk")
    return Finding("model cache", verdict, f"{words.size(free)} free for {cache}", advice)


def state_disk(folder: Path) -> Finding:
    existing = _existing(folder)
    if not os.access(existing, os.W_OK):
        return Finding("state folder", Verdict.FAIL, f"{existing} cannot be written",
                       "set STATE_DIR to a folder of the user that runs vllm-server, or change its owner")
    free = shutil.disk_usage(existing).free
    low = free < STATE_WARN_BYTES
    return Finding("state folder", Verdict.WARN if low else Verdict.OK, f"{words.size(free)} free for {folder}",
                   "logs and records need room: free some, or set STATE_DIR" if low else "")


def shared_memory(folder: Path = Path("/dev/shm")) -> Finding:  # nosec B108
    total = shutil.disk_usage(folder).total if folder.is_dir() else 0
    if total >= SHM_WARN_BYTES:
        return Finding("shared memory", Verdict.OK, f"{words.size(total)} in {folder}")
    return Finding("shared memory", Verdict.WARN, f"{words.size(total)} in {folder}",
                   "vLLM's processes talk through it: start the container with --shm-size=8g or --ipc=host")


def host_memory(meminfo: Path = Path("/proc/meminfo")) -> Finding:
    figures = dict(re.findall(r"^(\w+): +(\d+) kB", meminfo.read_text(), re.MULTILINE)) if meminfo.exists() else {}
    if "MemAvailable" not in figures:
        return Finding("host memory", Verdict.SKIP, "unknown on this system")
    free = int(figures["MemAvailable"]) << 10
    low = free < RAM_WARN_BYTES
    return Finding("host memory", Verdict.WARN if low else Verdict.OK,
                   f"{words.size(free)} of {words.size(int(figures['MemTotal']) << 10)} available",
                   "an engine takes about 2 GiB beside its model: stop something, or add memory" if low else "")


def open_files() -> Finding:
    import resource
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = hard == resource.RLIM_INFINITY
    low = not unlimited and hard < FILES_WARN
    return Finding("open files", Verdict.WARN if low else Verdict.OK, f"limit {'none' if unlimited else hard}",
                   "one for each connection: raise it (ulimit -n, LimitNOFILE= in the unit)" if low else "")


def priority(wanted: bool) -> Finding:
    """Asked of the system by a process that ends at once: limits and capabilities do not tell all of it."""
    if not wanted:
        return Finding("priority", Verdict.SKIP, "APP_REALTIME is off: the daemon waits for its turn among others")
    tried = subprocess.run([sys.executable, "-I", "-S", "-c", GO_FIRST], capture_output=True, text=True, check=False,
                           timeout=PRIORITY_TIMEOUT_S)
    if tried.returncode == 0:
        return Finding("priority", Verdict.OK, "the daemon may go before other programs")
    return Finding("priority", Verdict.WARN,
                   "real-time priority is refused: what keeps the machine busy slows the daemon down",
                   "allow it (ulimit -r 1, LimitRTPRIO=1 in the unit): docs/OPERATIONS.md")


def hub(endpoint: str, environ: Mapping[str, str]) -> Finding:
    if environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON"):
        return Finding("hub", Verdict.SKIP, "HF_HUB_OFFLINE is set: only what is in the cache can be loaded")
    try:
        answer = httpx.get(f"{endpoint.rstrip('/')}/api/models", params={"limit": 1}, timeout=HUB_TIMEOUT_S,
                           follow_redirects=True)
        answer.raise_for_status()
    except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
        return Finding("hub", Verdict.WARN, f"{endpoint} cannot be reached ({error or type(error).__name__})",
                       "models in the cache and in folders load all the same; for others set HTTPS_PROXY, or "
                       "HF_ENDPOINT to a mirror such as https://hf-mirror.com")
    return Finding("hub", Verdict.OK, f"{endpoint} answers")


def _existing(folder: Path) -> Path:
    """It, or the nearest one above it that exists: there it would be made."""
    return next((path for path in (folder, *folder.parents) if path.exists()), Path("/"))
