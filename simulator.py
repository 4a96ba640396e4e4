"""A stand-in for `vllm serve` of vLLM 0.32: same command line, HTTP, processes and log, and no model.

    VLLM_COMMAND="python simulator.py"      makes the daemon run it
    python simulator.py serve some/model --port 9101 --additional-config '{"sim": {"start_s": 3}}'

Every text it generates says 'simulated'.  What it can be made to do (slow starts, each failure of a start, hangs,
deaths) is listed in simulation/knobs.py; what its processes do when they are killed in simulation/processes.py.
"""

from __future__ import annotations

import gc
import os
import signal
import socket
import sys
import time
from importlib import import_module


def main(argv: list[str]) -> int:
    """The exit code; every child is dead when it returns."""
    started_at = time.monotonic()
    gc.disable()                                    # nothing to collect while modules are imported
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)       # a signal while it loads is swallowed, as vLLM's
    from simulation.flags import parse
    from simulation.knobs import KnobError, load_knobs
    from simulation.log import err
    from simulation.startup import fails_now
    options = parse(argv)
    try:
        knobs = load_knobs(options.additional_config, os.environ)
    except KnobError as error:
        err(f"usage: vllm serve [model_tag] [options]\nvllm serve: error: argument --additional-config: {error}")
        return 2
    if knobs.fail == "bad_flag" and fails_now(knobs):
        parse([*argv, "--simulated-bad-flag"])
    from simulation.memory import Ledger
    from simulation.startup import StartFailed, load
    try:
        listener, address = bind(options.uds, options.host, options.port,
                                 taken=knobs.fail == "port_in_use" and fails_now(knobs))
    except OSError as error:
        from simulation.failures import SOCKET_FRAMES, traceback_text
        err(traceback_text(SOCKET_FRAMES, f"OSError: {error}"))
        return 1
    ledger = Ledger(options, knobs)
    try:
        # asyncio is slow to import: that is done while the engine starts
        processes = load(options, knobs, ledger, started_at, lambda: import_module("simulation.server"))
    except StartFailed:
        return 1
    from simulation.server import run
    gc.freeze()
    gc.enable()
    run(options, knobs, ledger, processes, listener, address)
    return 0


def bind(uds: str | None, host: str | None, port: int, *, taken: bool) -> tuple[socket.socket, str]:
    """The server's socket, which takes connections only once the server is ready, and its address for the log."""
    if taken:
        raise OSError(98, "Address already in use")
    if uds:
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(uds)
        return listener, f"unix:{uds}"
    listener = socket.socket(socket.AF_INET6 if ":" in (host or "") else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((host or "", port))
    return listener, f"http://{host or '0.0.0.0'}:{listener.getsockname()[1]}"  # nosec B104


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)                                  # at once: nothing is left to wait for
