"""The client's demos, command and monitor with the real engine."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.command import OnTerminal, vllm_server
from tests.daemon import CHECKOUT

from .conftest import Models
from .real_daemon import LOAD_S, RealDaemon


@pytest.mark.parametrize("name", ["demo_sync", "demo_async", "demo_openai_sdk"])
def test_the_demos_run(daemon: RealDaemon, models: Models, name: str) -> None:
    daemon.ready(models.tiny)
    done = subprocess.run([sys.executable, CHECKOUT / "examples" / f"{name}.py", "tiny"], text=True,
                          capture_output=True, timeout=LOAD_S,
                          env={"PATH": os.environ["PATH"], "VLLM_SERVER_URL": f"http://127.0.0.1:{daemon.port}"})
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert "models: " in done.stdout and "tiny" in done.stdout
    [streamed] = [line for line in done.stdout.splitlines() if line.startswith("stream: ")]
    assert len(streamed.removeprefix("stream: ").split()) > 3


def test_the_command_loads_and_shows_how_far_it_is(daemon: RealDaemon, models: Models) -> None:
    daemon.ready(models.tiny)
    params = [word for name, value in {"served_model_name": models.third.alias, **models.third.params}.items()
              for word in ("-p", f"{name}={value if isinstance(value, str) else json.dumps(value)}")]
    with OnTerminal(daemon, "load", str(models.third.folder), *params) as terminal:
        assert terminal.wait(LOAD_S) == 0
    assert "loading weights" in terminal.text and "ready" in terminal.text, terminal.text


def test_the_command_chats(daemon: RealDaemon, models: Models) -> None:
    daemon.ready(models.tiny)
    done = vllm_server(daemon, "chat", "tiny", "A small model", "-t", "0", "-m", "12", "--stats")
    assert done.code == 0 and "12 tokens" in done.err
    piped = vllm_server(daemon, "chat", "tiny", "-t", "0", "-m", "12", stdin="A small model")
    assert piped.out == done.out and len(done.out.split()) > 4
    assert "Application startup complete" in vllm_server(daemon, "logs", "tiny", "-n", "9999").out
