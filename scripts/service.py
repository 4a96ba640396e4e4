"""start, stop, restart and status of the daemon of this checkout: what scripts/start.sh and the others call.

    python -m scripts.service start [-d] [-c FILE] [-- OPTIONS OF app.py]
    python -m scripts.service stop [-f]
    python -m scripts.service restart [-f] [-c FILE]
    python -m scripts.service status [-v]

Settings are those of the checkout's folder, as for `make run`.  Exit codes: 0 it is as was asked for, whether it was
already or is now; 1 it is not, and stderr says why; 2 the command line is wrong; 3 (status) nothing runs; 130
interrupted.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from config import Settings, load_settings
from errors import ConfigError
from instances.launcher import Launcher, wait_until
from instances.log_file import open_log
from instances.processes import Process, send_signal
from instances.store import StateDir
from scripts import pid_file, service_status, setup_engine
from scripts.pid_file import Started

ROOT = Path(__file__).resolve().parent.parent
LOGS = ROOT / "logs"
LOG = LOGS / "vllm-server.log"
PID_FILE = LOGS / "vllm-server.pid"
MARGIN_S = 60.0         # web/server.py allows 30 beyond the sum of the daemon's deadlines
HURRY_S = 30.0          # what a hurried daemon gets to kill its engines, before it is killed itself
TAIL_LINES = 15


class Problem(Exception):
    """Why it was not done, in a sentence that says what to do."""


def say(text: str) -> None:
    print(f"vllm-server: {text}", flush=True)


def running() -> tuple[Started, Process] | None:
    started = pid_file.read(PID_FILE)
    process = None if started is None else started.process()
    return None if started is None or process is None else (started, process)


@contextmanager
def alone() -> Iterator[None]:
    """Two starts at once start one daemon."""
    LOGS.mkdir(exist_ok=True)
    with open(os.open(LOGS / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


# --- start ------------------------------------------------------------------------------------------------------------

def read_settings(arguments: tuple[str, ...]) -> Settings:
    """As app.py will; what only it understands, it tells itself.  Raises ConfigError."""
    parser = argparse.ArgumentParser(add_help=False)
    for name in ("--config", "--servers", "--env"):
        parser.add_argument(name, type=Path)
    files, _ = parser.parse_known_args(arguments)
    return load_settings(os.environ, env_file=files.env, config_file=files.config, servers_file=files.servers,
                         cwd=ROOT)


def prepare(arguments: tuple[str, ...]) -> tuple[Settings, dict[str, str]]:
    """The settings, and the daemon's environment: with the engine that install.sh installed where no other is named."""
    settings = read_settings(arguments)
    environ = dict(os.environ)
    if shutil.which(settings.command[0]) is None:
        flavour = setup_engine.CUDA if setup_engine.has_nvidia_gpu() else setup_engine.CPU
        if (found := setup_engine.installed_engine(setup_engine.cache_folder(os.environ), flavour)) is not None:
            environ["VLLM_COMMAND"] = shlex.quote(str(found))
        else:
            say(f"warning: the engine {settings.command[0]!r} is no program here; scripts/install.sh installs one "
                "(models on other servers need none)")
    return settings, environ


def start(arguments: tuple[str, ...], *, background: bool) -> None:
    """In the foreground it does not return.  Raises Problem, ConfigError, OSError."""
    with alone():
        if (found := running()) is not None:
            say(f"runs already, pid {found[0].pid}{_where(found[0])}")
            return
        settings, environ = prepare(arguments)
        command = [sys.executable, str(ROOT / "app.py"), *arguments]
        stops_within_s = settings.shutdown_grace_s + settings.drain_timeout_s + settings.stop_timeout_s + MARGIN_S
        if background:
            _start_behind(command, environ, lambda pid: Started.of(
                pid, arguments, settings.state_dir, stops_within_s, background=True))
            return
        pid_file.write(PID_FILE, Started.of(os.getpid(), arguments, settings.state_dir, stops_within_s,
                                            background=False))
    os.execve(command[0], command, environ)     # pid and start time stay


def _start_behind(command: list[str], environ: dict[str, str], started_as: Callable[[int], Started]) -> None:
    """Until it says that it serves (web/notify.py).  Raises Problem with the end of its log when it ends instead."""
    folder = Path(tempfile.mkdtemp(prefix="vllm-server-", dir="/tmp"))  # nosec B108  # a socket's path ends at 107
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as told, open_log(LOG) as output:
            told.bind(str(folder / "notify"))
            process = subprocess.Popen(command, cwd=ROOT, env={**environ, "NOTIFY_SOCKET": str(folder / "notify")},
                                       stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True)
            pid_file.write(PID_FILE, started_as(process.pid))
            try:
                status = _wait_until_ready(process, told)
            except BaseException:
                process.terminate()
                process.wait()
                raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if status is None:
        PID_FILE.unlink(missing_ok=True)
        raise Problem(f"it ended at once (exit code {process.returncode}):\n{_tail(LOG)}")
    say(f"{status}, pid {process.pid}; its log: {LOG}")


def _wait_until_ready(process: subprocess.Popen[bytes], told: socket.socket) -> str | None:
    """What it says of itself; None when it has ended."""
    told.settimeout(0.2)
    while process.poll() is None:
        try:
            lines = told.recv(4096).decode().splitlines()
        except TimeoutError:
            continue
        if "READY=1" in lines:
            return next((line.removeprefix("STATUS=") for line in lines if line.startswith("STATUS=")), "serves")
    return None


def _tail(path: Path) -> str:
    return "\n".join(f"  {line}" for line in path.read_text(errors="replace").splitlines()[-TAIL_LINES:])


def _where(started: Started) -> str:
    url = service_status.address(started.pid)
    return f", at {url}" if url else ""


# --- stop -------------------------------------------------------------------------------------------------------------

def stop(*, force: bool) -> None:
    """Blocks until it has ended with its instances (or leaves them, by KEEP_INSTANCES).  Raises Problem."""
    with alone():
        found = running()
        if found is None:
            PID_FILE.unlink(missing_ok=True)
            say(_not_running())
            return
        started, process = found
        say(f"stops pid {started.pid}")
        send_signal(process, signal.SIGTERM)
        if force:
            if not _hurry(process):
                _kill(started, process)
        elif not wait_until(lambda: not process.alive(), started.stops_within_s, step_s=0.05):
            raise Problem(f"still stopping after {started.stops_within_s:.0f} s, its log says at what ({LOG}); "
                          "scripts/stop.sh -f ends it at once")
        PID_FILE.unlink(missing_ok=True)
        say("stopped")


def _hurry(process: Process) -> bool:
    """As a second Ctrl-C does: requests are cut and engines killed.  Whether it has ended."""
    deadline = time.monotonic() + HURRY_S
    while time.monotonic() < deadline:
        if wait_until(lambda: not process.alive(), 0.5, step_s=0.05):
            return True
        send_signal(process, signal.SIGQUIT)
    return False


def _kill(started: Started, process: Process) -> None:
    """One that hangs: SIGKILL, and its engines after it, which would go on without it."""
    say(f"it does not answer: kills pid {started.pid} and its engines")
    send_signal(process, signal.SIGKILL)
    wait_until(lambda: not process.alive(), HURRY_S)
    state_dir = StateDir(Path(started.state_dir))
    state_dir.lock()        # its worker ends a moment after it
    try:
        found, launcher = state_dir.load(), Launcher()
        for record in found.records:
            launcher.end_remains(record.id, record.engine)
            state_dir.remove(record.id)
        for instance_id in found.unreadable:
            launcher.end_remains(instance_id, None)
    finally:
        state_dir.unlock()


def _not_running() -> str:
    """And who else may run on these settings."""
    try:
        owner = service_status.lock_owner(read_settings(()).state_dir)
    except ConfigError:
        owner = None
    if owner is None:
        return "is not running"
    return (f"is not running by scripts/start.sh; pid {owner} was started otherwise (make run, vllm-server run, "
            "systemd) and is ended there")


def restart(arguments: tuple[str, ...] | None, *, force: bool) -> None:
    """With the options of before unless others are given.  Raises as `start`."""
    before = pid_file.read(PID_FILE)
    if arguments is None:
        arguments = before.arguments if before is not None else ()
    read_settings(arguments)        # what would not start again is not stopped
    stop(force=force)
    start(arguments, background=True)


# --- the command line -------------------------------------------------------------------------------------------------

def parse(command: str, argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=f"scripts/{command}.sh")
    if command == "start":
        parser.add_argument("-d", "--daemon", action="store_true", help="in the background, once it serves")
    if command in ("start", "restart"):
        parser.add_argument("-c", "--config", type=Path, metavar="FILE",
                            help="instead of config.yaml or configs/config.yaml")
        parser.add_argument("options", nargs="*", metavar="-- OPTION", help="for app.py, such as -- --port 8080")
    if command in ("stop", "restart"):
        parser.add_argument("-f", "--force", action="store_true", help="at once: requests are cut")
    if command == "status":
        parser.add_argument("-v", "--verbose", action="store_true", help="models, instances and devices too")
    return parser.parse_args(argv)


def app_arguments(asked: argparse.Namespace, caller: Path) -> tuple[str, ...] | None:
    """Of app.py, which runs in the checkout: a file is named as seen from where the script was called."""
    if asked.config is None and not asked.options:
        return None
    return (*(() if asked.config is None else ("--config", str(caller / asked.config))), *asked.options)


def main(command: str, argv: list[str]) -> int:
    asked = parse(command, argv)
    caller = Path(os.environ.get("VLLM_SERVER_CALLED_IN") or Path.cwd())
    os.chdir(ROOT)
    signal.signal(signal.SIGTERM, setup_engine.interrupted)
    try:
        if command == "start":
            start(app_arguments(asked, caller) or (), background=asked.daemon)
        elif command == "stop":
            stop(force=asked.force)
        elif command == "restart":
            restart(app_arguments(asked, caller), force=asked.force)
        else:
            return service_status.show(running(), pid_file.read(PID_FILE), LOG, verbose=asked.verbose)
    except (Problem, ConfigError, OSError) as error:
        print(f"vllm-server: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("vllm-server: interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))      # scripts/service.sh names the command
