"""What went wrong with an engine, in words and with a code; what its log tells of a start is in startup_log.  Pure."""

from __future__ import annotations

from errors import DaemonError, NoFreePort, NoRoom
from instances.instance import Problem
from instances.launcher import PASSING, LaunchRefused
from instances.sockets import Listener
from instances.startup_log import StartupLog


def of_launch(model: str, error: DaemonError | OSError) -> Problem:
    """Why no engine was started, and whether another try makes sense."""
    if isinstance(error, DaemonError):
        passing = isinstance(error, NoRoom | NoFreePort | LaunchRefused) and error.code != "not_enough_gpus"
        return Problem(error.code, error.message, status=error.status, permanent=not passing)
    if error.errno in PASSING:
        return Problem(LaunchRefused.code, f"{model} is not started: {error.strerror}; check the service's limits "
                                           "(ulimit -n, ulimit -u) and the machine's memory", status=503)
    return Problem("state_dir", f"{model} is not started: {error.strerror or error}"
                   f"{f' ({error.filename})' if error.filename else ''}; check STATE_DIR and the temporary folder",
                   status=503)


def of_listener(model: str, port: int, found: Listener) -> Problem | None:
    """None: it is the engine that listens there, and to this machine only."""
    if found is Listener.STRANGER:
        return Problem("port_in_use", f"another program listens on port {port} that {model} was given; the next try "
                                      "uses another one", status=503)
    if found is Listener.EXPOSED:
        return Problem("engine_exposed", f"the engine of {model} listens for other machines too, although it was told "
                                         "--host 127.0.0.1; check VLLM_COMMAND", status=500, permanent=True)
    return None


def hung(model: str, what: str, timeout_s: float) -> Problem:
    return Problem("engine_hung", f"the engine of {model} hangs: {what} within {timeout_s:g} s; it is restarted")


def of_death(model: str, what: str, log_tail: str) -> Problem:
    """Of an engine that had been ready."""
    tail = StartupLog()
    tail.feed(log_tail)
    cause = tail.cause(None, model)
    known = "" if cause.code == "exited" else f": {cause.detail or cause.message}"
    return Problem("engine_died", f"the engine of {model} died, {what}{known}", cause.detail)


def no_sleep(model: str, why: str) -> Problem:
    return Problem("sleep_failed", f"{model} was not put to sleep: {why}; it is stopped")


def no_wake(model: str, why: str) -> Problem:
    return Problem("wake_failed", f"{model} did not wake: {why}; it is restarted")
