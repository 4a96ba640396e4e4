"""The daemon as a child with its log in a file, and the monitor before it."""

from __future__ import annotations

import asyncio
import ctypes
import os
import re
import signal
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from rich.text import Text

from vllm_server_client.async_client import AsyncVLLMProxyClient
from vllm_server_client.cli.terminal import Terminal

LOG_NAME = "daemon.log"
TAIL_LINES = 10
POLL_S = 0.1
INTERVAL_S = 1.0
PATIENCE_S = 10.0
PR_SET_PDEATHSIG = 1        # prctl(2)


def run(terminal: Terminal, command: Sequence[str], folder: Path) -> int:
    """Until the monitor is left, or the daemon has ended; then its exit code."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    log = folder / LOG_NAME
    with open(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as output:     # the owner's alone
        # In a session of its own: a Ctrl-C in the monitor is the monitor's.
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                                   start_new_session=True, preexec_fn=_end_with_parent)
    try:
        if (url := _address(process, log)) is not None:
            asyncio.run(_watch(url, process))
    except KeyboardInterrupt:
        pass
    finally:
        code = _stop(terminal, process)
    if code != 0:
        terminal.err.print(Text("\n".join(_tail(log))), soft_wrap=True)
    terminal.say(f"the daemon has ended; its log: {log}", "dim")
    return code


def _end_with_parent() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)     # else a kill -9 of the monitor would leave it behind


def _address(process: subprocess.Popen[bytes], log: Path) -> str | None:
    """Where it listens, once it does; None when it ended instead."""
    while process.poll() is None:
        if found := re.search(r"listens on (http://[^ ]+):(\d+)", log.read_text(errors="replace")):
            host = found[1].replace("//0.0.0.0", "//127.0.0.1").replace("//[::]", "//[::1]")
            return f"{host}:{found[2]}"
        time.sleep(POLL_S)
    return None


async def _watch(url: str, process: subprocess.Popen[bytes]) -> None:
    from vllm_server_client.top.app import Monitor

    async with AsyncVLLMProxyClient(url, timeout_s=PATIENCE_S, max_retries=0) as client:
        await Monitor(client, INTERVAL_S, alive=lambda: process.poll() is None).run_async(mouse=False)


def _stop(terminal: Terminal, process: subprocess.Popen[bytes]) -> int:
    """Its exit code; 128 + n for signal n.  A Ctrl-C while it stops hurries it, as on its own terminal."""
    if process.poll() is None:
        terminal.say("stopping; Ctrl-C hurries")
        process.send_signal(signal.SIGTERM)
    while True:
        try:
            code = process.wait()
            return 128 - code if code < 0 else code
        except KeyboardInterrupt:
            with suppress(ProcessLookupError):
                process.send_signal(signal.SIGINT)


def _tail(log: Path) -> list[str]:
    return log.read_text(errors="replace").splitlines()[-TAIL_LINES:]
