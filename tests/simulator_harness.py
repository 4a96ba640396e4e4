"""Starts simulators for tests, talks to them, and ends them without leaving a process or shared memory.

`launch` and `server` are fixtures: a test file imports them.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests

from tests.support import wait_until

ROOT = Path(__file__).resolve().parent.parent
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hello there"}]}
FOR_EVER = {**CHAT, "max_tokens": 30000, "stream": True}


class Simulator:
    """One `python simulator.py serve …` in a session of its own, on a port that it chose."""

    def __init__(self, folder: Path, *flags: str, model: str = "tiny", sim: dict[str, Any] | None = None,
                 **environ: str) -> None:
        self.out, self.err = folder / "out", folder / "err"
        argv = [sys.executable, str(ROOT / "simulator.py"), "serve", model, "--host", "127.0.0.1", "--port", "0"]
        argv += flags
        if sim:
            argv += ["--additional-config", json.dumps({"sim": sim})]
        with open(self.out, "wb") as out, open(self.err, "wb") as err:
            self.process = subprocess.Popen(argv, stdout=out, stderr=err, stdin=subprocess.DEVNULL, cwd=folder,
                                            start_new_session=True, env={**os.environ, **environ})
        self.pid = self.process.pid
        self._clients: list[socket.socket] = []

    @property
    def log(self) -> str:
        return self.out.read_text() + self.err.read_text()

    @property
    def port(self) -> int:
        found = re.search(r"Starting vLLM server on http://127.0.0.1:(\d+)", self.log)
        return int(found[1]) if found else 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def ready(self) -> Simulator:
        wait_until(lambda: "Application startup complete." in self.log or self.process.poll() is not None)
        assert self.process.poll() is None, self.log
        return self

    def get(self, path: str, **options: Any) -> requests.Response:
        return requests.get(self.url + path, timeout=120, **options)

    def post(self, path: str, body: Any = None, **options: Any) -> requests.Response:
        return requests.post(self.url + path, json=body, timeout=120, **options)

    def send(self, path: str, body: dict[str, Any], version: str = "HTTP/1.1", *headers: str) -> socket.socket:
        """A request on a socket of its own, whose answer is not read."""
        client = socket.create_connection(("127.0.0.1", self.port), timeout=120)
        self._clients.append(client)
        data = json.dumps(body).encode()
        lines = [f"POST {path} {version}", "host: x", "content-type: application/json", f"content-length: {len(data)}"]
        client.sendall("\r\n".join([*lines, *headers, "", ""]).encode() + data)
        return client

    def gauge(self, name: str) -> float:
        found = re.search(rf"^vllm:{name}{{.*}} (\S+)$", self.get("/metrics").text, re.MULTILINE)
        assert found, name
        return float(found[1])

    def family(self) -> dict[str, psutil.Process]:
        """The live processes of its session by title; the server is `server`, the resource tracker `tracker`."""
        found = {}
        for pid in psutil.pids():
            with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess):
                if os.getsid(pid) != self.pid or (process := psutil.Process(pid)).status() == psutil.STATUS_ZOMBIE:
                    continue
                title = " ".join(process.cmdline()).strip()     # setproctitle pads it
                name = "tracker" if "resource_tracker" in title else "server" if "simulator.py" in title else title
                found[name] = process
        return found

    def shared_memory(self) -> list[Path]:
        engines = [process for title, process in self.family().items() if "EngineCore" in title]
        maps = "".join(Path(f"/proc/{engine.pid}/maps").read_text() for engine in engines)
        return sorted({Path(path) for path in re.findall(r"/dev/shm/psm_\w+", maps)})

    def end(self) -> None:
        """Kills all but the tracker, which then removes the shared memory and goes."""
        for client in self._clients:
            client.close()
        memory = self.shared_memory()
        for name, process in self.family().items():
            if name != "tracker":
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
        self.process.wait()
        wait_until(lambda: not self.family())
        assert not any(block.exists() for block in memory), memory


Launch = Callable[..., Simulator]


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Launch]:
    started: list[Simulator] = []

    def start(*flags: str, **options: Any) -> Simulator:
        folder = tmp_path / str(len(started))
        folder.mkdir()
        started.append(Simulator(folder, *flags, **options))
        return started[-1]

    yield start
    for simulator in started:
        simulator.end()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Simulator]:
    """One server for the tests that leave it as it was."""
    simulator = Simulator(tmp_path_factory.mktemp("server"), "--enable-request-id-headers", "--max-model-len", "32k",
                          "--served-model-name", "tiny", "alias", "--lora-modules", "style=/style",
                          sim={"tokens_per_s": 0}, VLLM_SERVER_DEV_MODE="1")
    yield simulator.ready()
    simulator.end()


def read_until(client: socket.socket, mark: bytes) -> bytes:
    data = b""
    while mark not in data:
        piece = client.recv(65536)
        assert piece, f"closed before {mark!r}: {data!r}"
        data += piece
    return data


def read_all(client: socket.socket) -> bytes:
    with client:
        return b"".join(iter(lambda: client.recv(65536), b""))


def events(text: str) -> list[Any]:
    """The data of each server-sent event; the last of OpenAI's is the word [DONE]."""
    lines = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]
