"""The daemon as a real process with the real engine: vLLM on this machine, and demo models made on the spot."""

from __future__ import annotations

import contextlib
import http.client
import json
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from instances import processes
from tests.daemon import CHECKOUT, JSON, Daemon
from tests.support import wait_until

LOAD_S = 600            # a guard: a start takes 20 to 60 s, on a busy machine minutes
ENDLESS = 60_000        # tokens of a stream that lasts a minute even where a token takes 1 ms

ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_DEFAULT_DTYPE": "float32", "VLLM_DEFAULT_ENFORCE_EAGER": "true",
    "VLLM_ENABLE_RESPONSES_API_STORE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", "DRAIN_TIMEOUT": "3"}
"""float32 and eager: fast to start on any CPU.  The hub is never asked."""


@dataclass(frozen=True)
class Model:
    """A demo model, and the flags that it is started with."""

    alias: str
    folder: Path
    params: Mapping[str, Any] = field(default_factory=dict)

    def request(self, **fields: object) -> dict[str, object]:
        """The body of POST /instances."""
        return {"model_name": str(self.folder), "params": {"served_model_name": self.alias, **self.params}, **fields}


def find_engine() -> str:
    """The engine's command, installed first where there is none.  A machine without it is an error, no skip."""
    return _script("setup_engine.py")


def make_llama(folder: Path, alias: str) -> Model:
    """One whose streams may run for minutes."""
    _script("make_models.py", "tiny-llama", str(folder))
    return Model(alias, folder, {"max_model_len": 65536, "hf_overrides": {"max_position_embeddings": 65536}})


def make_bert(folder: Path, alias: str) -> Model:
    _script("make_models.py", "tiny-bert", str(folder))
    return Model(alias, folder, {"runner": "pooling", "max_model_len": 256})


def _script(name: str, *arguments: str) -> str:
    done = subprocess.run([sys.executable, str(CHECKOUT / "scripts" / name), *arguments], capture_output=True,
                          text=True, timeout=1800)
    assert done.returncode == 0, f"{name}: {done.stderr}"
    return done.stdout.strip()


class RealDaemon(Daemon):
    """Its engine takes half a minute to start, so tests share one and leave it running, whatever they did to it."""

    def __init__(self, folder: Path, engine: str, env: Mapping[str, str] | None = None, *,
                 patch: Mapping[str, object] | None = None) -> None:
        compiled = {"TORCHINDUCTOR_CACHE_DIR": str(folder / "compiled")}   # kept, and so no leftover of an instance
        super().__init__(folder, {**ENVIRONMENT, **compiled, **(env or {})}, patch=patch, command=engine)

    # --- instances ------------------------------------------------------------------------------------------------

    def begin(self, model: Model, **fields: object) -> dict[str, Any]:
        """The active instance of a model, started if there is none."""
        answer = self.post("/instances", model.request(**fields))
        assert answer.status in (200, 201), answer
        found: dict[str, Any] = answer.json
        return found

    def ready(self, *models: Model, **fields: object) -> list[dict[str, Any]]:
        """An instance of each model, ready; those that are missing load side by side."""
        begun = [self.begin(model, **fields) for model in models]
        return [self.wait_ready(one["id"]) for one in begun]

    def wait_ready(self, instance_id: str) -> dict[str, Any]:
        """Also where a test before killed it, and the daemon has not noticed yet."""
        def settled() -> dict[str, Any] | None:
            found: dict[str, Any] = self.instance(instance_id)
            process = processes.read_process(found["pid"]) if found["status"] == "ready" else None
            return found if found["status"] == "failed" or (process is not None and not process.zombie) else None

        wait_until(settled, LOAD_S)
        found = self.instance(instance_id)
        assert found["status"] == "ready", found["last_error"]
        return found

    def wait_loading(self, instance_id: str, processes_there: int) -> dict[str, Any]:
        """The instance while it loads, once its tree has so many processes: server, resource tracker, EngineCore,
        Worker, in this order."""
        def has_them() -> bool:
            pid = self.instance(instance_id)["pid"]
            return pid is not None and len(self.session(pid)) >= processes_there

        wait_until(has_them, LOAD_S)
        found = self.instance(instance_id)
        assert found["status"] == "starting", found
        return found

    def wait_gone(self, instance_id: str) -> None:
        wait_until(lambda: self.status_of(instance_id) == "gone")

    # --- requests that stay open ----------------------------------------------------------------------------------

    @contextlib.contextmanager
    def sent(self, path: str, body: Mapping[str, object]) -> Iterator[http.client.HTTPConnection]:
        """A request on its way: `getresponse` of what this gives waits for the answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=LOAD_S)
        try:
            connection.request("POST", path, json.dumps(body).encode(), JSON)
            yield connection
        finally:
            connection.close()

    # --- what runs for it -----------------------------------------------------------------------------------------

    def session(self, leader: int) -> list[int]:
        return [member.pid for member in processes.session_members(leader)]

    def process_named(self, instance: Mapping[str, Any], name: str) -> int:
        """The pid of `EngineCore` or `Worker` of an instance."""
        found = [pid for pid in self.session(instance["pid"])
                 if processes.command_line(pid).startswith(f"{instance['id']}::{name}")]
        assert len(found) == 1, [processes.command_line(pid) for pid in self.session(instance["pid"])]
        return found[0]

    def recorded_pids(self) -> set[int]:
        """The leaders that the records on disk name."""
        records = [json.loads((self.state / "instances" / name).read_text()) for name in self.records()]
        return {record["engine"]["pid"] for record in records if record["engine"] is not None}


def shared_memory(pid: int) -> set[str]:
    """The files under /dev/shm that a process has mapped; one that has ended, such as what vLLM runs to look at the
    machine, has none."""
    try:
        lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return set()
    return {line[line.index("/dev/shm/"):] for line in lines if "/dev/shm/" in line and not line.endswith("(deleted)")}


@dataclass(frozen=True)
class Footprint:
    """What a running instance holds on this machine."""

    session: int
    port: int
    run_dir: Path
    shared_memory: frozenset[str]

    @classmethod
    def of(cls, daemon: RealDaemon, instance: Mapping[str, Any]) -> Footprint:
        wait_until(lambda: instance["pid"] in daemon.recorded_pids())
        record = json.loads((daemon.state / "instances" / f"{instance['id']}.json").read_text())
        return cls(session=instance["pid"], port=instance["port"], run_dir=Path(record["engine"]["run_dir"]),
                   shared_memory=frozenset().union(*map(shared_memory, daemon.session(instance["pid"]))))

    def left(self) -> list[str]:
        """What of it is still there, in words."""
        found = [f"process {one.pid} {processes.command_line(one.pid)}" for one in
                 processes.session_members(self.session)]
        found += [f"folder {self.run_dir}"] if self.run_dir.exists() else []
        found += [f"shared memory {name}" for name in self.shared_memory if Path(name).exists()]
        with socket.socket() as client:
            if client.connect_ex(("127.0.0.1", self.port)) == 0:
                found.append(f"a listener on port {self.port}")
        return found


def read_to_end(response: http.client.HTTPResponse) -> tuple[bytes, bool]:
    """The rest of a body, and whether it was cut before its end."""
    received = bytearray()
    try:
        while piece := response.read1(1 << 16):
            received += piece
    except (http.client.IncompleteRead, ConnectionResetError):
        return bytes(received), True
    return bytes(received), False


def last_error(stream: bytes) -> dict[str, Any] | None:
    """The error that the last event of a stream tells, `[DONE]` aside."""
    events = [line.removeprefix(b"data: ") for line in stream.split(b"\n") if line.startswith(b"data: {")]
    try:
        error = json.loads(events[-1]).get("error") if events else None
    except ValueError:      # cut in the middle of an event
        return None
    return error if isinstance(error, dict) else None


def kill(pid: int, number: signal.Signals = signal.SIGKILL) -> None:
    process = processes.read_process(pid)
    assert process is not None and processes.send_signal(process, number), f"{pid} is gone already"
