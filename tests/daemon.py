"""The daemon as a real process with the simulated engine, and the plain HTTP that tests speak with it."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from instances import launcher, processes
from tests import contract
from tests.support import claim_ports, wait_until

CHECKOUT = Path(__file__).resolve().parent.parent
SIMULATOR = f"{sys.executable} {CHECKOUT / 'simulator.py'}"
HANG_S = 120.0          # a guard: nothing that works takes nearly so long
JSON = {"Content-Type": "application/json"}


@dataclass(frozen=True)
class Answer:
    status: int
    headers: Mapping[str, str]      # names in lower case
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        """The error of the envelope, whose shape is checked."""
        assert self.headers["content-type"].startswith("application/json"), self
        assert set(self.json) == {"error"}, self
        error: dict[str, Any] = self.json["error"]
        assert set(error) == {"message", "type", "param", "code"}, error
        assert isinstance(error["message"], str) and error["message"] and "Traceback" not in error["message"], error
        assert isinstance(error["type"], str) and isinstance(error["code"], str), error
        assert error["param"] is None or isinstance(error["param"], str), error
        return error


class Daemon:
    """`app.py` in a folder of its own, with a state folder, temporary folder and range of ports of its own.

    As a context manager it is started, and at the end stopped by SIGTERM; then nothing may be left of it: no
    process, no run folder, no record, no traceback in its log.  `start`, `stop` and `kill` serve tests of restarts.
    `patch` sets constants of its modules (such as a backoff) before it runs.
    """

    def __init__(self, folder: Path, env: Mapping[str, str] | None = None, *,
                 patch: Mapping[str, object] | None = None, command: str = SIMULATOR,
                 arguments: Sequence[str] = ()) -> None:
        self.folder = folder
        self.state = folder / "state"
        self.log_path = folder / "daemon.log"
        self.port = 0
        self.process: subprocess.Popen[bytes] | None = None
        self.may_log_tracebacks = False
        self._sessions: list[int] = []
        self._log_from = 0
        # Short, as paths of sockets end at 107 bytes; every process of an engine has it in its environment.
        self.temporary = Path(tempfile.mkdtemp(prefix="vsd", dir="/tmp"))
        self._claim, base_port = claim_ports()
        self._argv = [sys.executable, *_entry(patch or {}), "--host", "127.0.0.1", "--port", "0", *arguments]
        self.env = {
            "PATH": os.environ["PATH"], "HOME": str(folder), "LANG": "C.UTF-8", "TMPDIR": str(self.temporary),
            "PYTHONDONTWRITEBYTECODE": os.environ.get("PYTHONDONTWRITEBYTECODE", ""),
            "STATE_DIR": str(self.state), "VLLM_COMMAND": command, "VLLM_BASE_PORT": str(base_port),
            "VLLM_DEFAULT_TRUST_REMOTE_CODE": "false", **(env or {})}

    # --- its life -------------------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            return self.start()
        except BaseException:
            self._end_everything()
            raise

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 traceback: TracebackType | None) -> None:
        try:
            if self.process is not None:
                self.stop()
            if error is None:
                self.assert_nothing_left()
        finally:
            self._end_everything()

    def start(self) -> Self:
        """Run it until it listens.  Raises AssertionError with its output when it does not."""
        with open(self.log_path, "ab") as output:
            self._log_from = output.tell()
            self.process = subprocess.Popen(self._argv, cwd=self.folder, env=self.env, stdout=output, stderr=output,
                                            stdin=subprocess.DEVNULL, start_new_session=True)
        self._sessions.append(self.process.pid)
        wait_until(lambda: self._address() or self.exited())
        address = self._address()
        assert address is not None, f"the daemon did not start:\n{self.log}"
        self.port = int(address)
        return self

    def _address(self) -> str | None:
        found = re.search(r"listens on http://[^ ]+:(\d+)", self.log)
        return found[1] if found else None

    @property
    def log(self) -> str:
        """What it has logged since its last start."""
        with open(self.log_path, "rb") as file:
            file.seek(self._log_from)
            return file.read().decode(errors="replace")

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    @property
    def worker_pid(self) -> int:
        """The process that holds the registry.  Waits until the master has forked it."""
        def children() -> list[int]:
            return [one.pid for one in processes.all_processes() if one.parent == self.pid and not one.zombie]

        wait_until(children)
        pid, = children()
        return pid

    def exited(self) -> bool:
        return self.process is None or self.process.poll() is not None

    def signal(self, number: signal.Signals, pid: int | None = None) -> None:
        os.kill(self.pid if pid is None else pid, number)

    def wait_for_exit(self) -> int:
        """Its exit code; afterwards `start` may be called again."""
        assert self.process is not None
        code = self.process.wait(HANG_S)
        self.process = None
        return code

    def stop(self) -> int:
        """SIGTERM, and its exit code."""
        self.signal(signal.SIGTERM)
        return self.wait_for_exit()

    def kill(self) -> None:
        """SIGKILL to the whole daemon, as a machine out of memory might; its engines live on."""
        session = self.pid
        os.killpg(session, signal.SIGKILL)
        self.wait_for_exit()
        wait_until(lambda: not processes.session_members(session))

    # --- what it leaves -------------------------------------------------------------------------------------------

    def instance_ids(self) -> set[str]:
        """Of every instance that it or a daemon before it on its state folder has had."""
        logs = self.state / "logs"
        kept = {path.name[:8] for path in logs.iterdir()} if logs.exists() else set()
        return kept | set(re.findall(r"\b([0-9a-f]{8}) \(", self.log_path.read_text(errors="replace")))

    def engine_sessions(self) -> dict[int, str]:
        """Session -> instance id, of every live process of an engine of this daemon, with a record or without."""
        ids = self.instance_ids()
        found: dict[int, str] = {}
        for one in processes.all_processes():
            if not one.zombie and (owner := self._owner(one.pid, ids)) is not None:
                found[one.session] = owner
        return found

    def _owner(self, pid: int, ids: set[str]) -> str | None:
        """By the title of EngineCore and Worker, which have overwritten their environment, or by that of the rest:
        each engine has a temporary folder of its own in the daemon's."""
        title = processes.command_line(pid).partition("::")[0]
        if title in ids:
            return title
        environment = processes.environment(pid)
        if Path(environment.get("TMPDIR", "/")).is_relative_to(self.temporary):
            return environment.get("VLLM_PROCESS_NAME_PREFIX")
        return None

    def engine_processes(self) -> list[int]:
        """Every live process of its engines, orphans included."""
        sessions = self.engine_sessions()
        return [one.pid for one in processes.all_processes() if one.session in sessions and not one.zombie]

    def engine_memory(self) -> list[Path]:
        """The files in /dev/shm of its simulated engines, whose names tell the instance."""
        ids = self.instance_ids()
        return [path for path in Path("/dev/shm").glob("psm_*_*") if path.name.split("_")[1] in ids]

    def records(self) -> list[str]:
        folder = self.state / "instances"
        return sorted(path.name for path in folder.iterdir()) if folder.exists() else []

    def assert_nothing_left(self) -> None:
        """Of its engines, at once; its own helpers may end a moment after it."""
        assert self.engine_processes() == []
        assert self.engine_memory() == []
        assert list(self.temporary.iterdir()) == []
        assert self.records() == []
        wait_until(lambda: not any(processes.session_members(session) for session in self._sessions))
        if not self.may_log_tracebacks:
            log = self.log_path.read_text(errors="replace")
            assert "Traceback" not in log, log

    def _end_everything(self) -> None:
        """Whatever a test that failed has left."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait(HANG_S)
            self.process = None
        if self.log_path.exists():
            for session in [*self.engine_sessions(), *self._sessions]:
                processes.kill_session(session, wait=launcher.wait_until)
            for path in self.engine_memory():
                path.unlink(missing_ok=True)
        self._claim.close()
        shutil.rmtree(self.temporary, ignore_errors=True)

    # --- speaking with it -----------------------------------------------------------------------------------------

    def call(self, method: str, path: str, body: object = None, headers: Mapping[str, str] | None = None, *,
             port: int | None = None) -> Answer:
        """One request on a connection of its own; a body that is not bytes is sent as JSON.

        What the daemon answers is held against its OpenAPI document.
        """
        with self.open(method, path, body, headers, port=port) as response:
            answer = Answer(response.status, {name.lower(): value for name, value in response.getheaders()},
                            response.read())
        if port is None:
            contract.check(method, path, answer.status, answer.headers, answer.body)
        return answer

    @contextlib.contextmanager
    def open(self, method: str, path: str, body: object = None, headers: Mapping[str, str] | None = None, *,
             port: int | None = None) -> Iterator[http.client.HTTPResponse]:
        """The same with the answer's head read and its body not; leaving closes the connection."""
        connection = http.client.HTTPConnection("127.0.0.1", port or self.port, timeout=HANG_S)
        sent = dict(headers or {})
        if body is not None and not isinstance(body, bytes):
            sent = JSON | sent
            body = json.dumps(body).encode()
        try:
            connection.request(method, path, body, sent)
            response = connection.getresponse()
            try:
                yield response
            finally:
                response.close()
        finally:
            connection.close()

    def get(self, path: str, headers: Mapping[str, str] | None = None) -> Answer:
        return self.call("GET", path, headers=headers)

    def post(self, path: str, body: object = None, headers: Mapping[str, str] | None = None) -> Answer:
        return self.call("POST", path, body, headers)

    def delete(self, path: str, headers: Mapping[str, str] | None = None) -> Answer:
        return self.call("DELETE", path, headers=headers)

    def raw(self, data: bytes, *, then_close_sending: bool = False) -> bytes:
        """Exactly these bytes, and all that comes back until the daemon closes."""
        with self.socket() as client:
            with contextlib.suppress(OSError):      # it may answer and close before it has everything
                client.sendall(data)
                if then_close_sending:
                    client.shutdown(socket.SHUT_WR)
            received = b""
            with contextlib.suppress(ConnectionResetError):
                while piece := client.recv(1 << 16):
                    received += piece
            return received

    def socket(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), HANG_S)

    # --- instances ------------------------------------------------------------------------------------------------

    def create(self, model: str, *, sim: Mapping[str, object] | None = None, params: Mapping[str, Any] | None = None,
               wait: bool = True, **fields: object) -> dict[str, Any]:
        """A new instance, ready unless `wait` is False; `sim` are the simulator's knobs."""
        answer = self.post("/instances", {"model_name": model, "params": with_knobs(params, sim), "wait": wait,
                                          **fields})
        assert answer.status == 201, answer
        found: dict[str, Any] = answer.json
        assert not wait or found["status"] == "ready"
        return found

    def instance(self, instance_id: str) -> dict[str, Any]:
        found: dict[str, Any] = self.get(f"/instances/{instance_id}").json
        return found

    def instances(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.get("/instances").json["data"]
        return found

    def status_of(self, instance_id: str) -> str:
        """Its status; `gone` when there is no such instance."""
        answer = self.get(f"/instances/{instance_id}")
        return "gone" if answer.status == 404 else str(answer.json["status"])

    def turn_knobs(self, instance: Mapping[str, Any], **knobs: object) -> None:
        """Change how a simulated engine behaves, past the daemon; it has to run with VLLM_SERVER_DEV_MODE."""
        assert self.call("POST", "/sim", knobs, port=instance["port"]).status == 200

    def remove(self, *instance_ids: str) -> None:
        """Kill these, or all, and wait until they are gone."""
        doomed = instance_ids or [one["id"] for one in self.instances()]
        for instance_id in doomed:
            self.delete(f"/instances/{instance_id}?force=1")
        for instance_id in doomed:
            self.delete(f"/instances/{instance_id}?force=1&wait=1")

    def gauge(self, instance: Mapping[str, Any], name: str = "vllm:num_requests_running") -> float:
        """A figure of the engine's own /metrics, asked past the daemon."""
        assert instance["port"] is not None
        text = self.call("GET", "/metrics", port=instance["port"]).body.decode()
        return sum(float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line.startswith(name + "{"))


def with_knobs(params: Mapping[str, Any] | None, sim: Mapping[str, object] | None) -> dict[str, Any]:
    return {**(params or {}), **({"additional_config": {"sim": dict(sim)}} if sim else {})}


def _entry(patch: Mapping[str, object]) -> Sequence[str]:
    if not patch:
        return [str(CHECKOUT / "app.py")]
    modules = sorted({name.rpartition(".")[0] for name in patch})
    lines = [f"import sys; sys.path.insert(0, {str(CHECKOUT)!r})", f"import app, {', '.join(modules)}",
             *(f"{name}; {name} = {value!r}" for name, value in patch.items()),     # the first fails if it is unknown
             "app.main()"]
    return ["-c", "\n".join(lines)]


def events(response: IO[bytes] | http.client.HTTPResponse) -> Iterator[bytes]:
    """The server-sent events of a stream, as they come."""
    event = b""
    while line := response.readline():
        event += line
        if line == b"\n":
            yield event
            event = b""
