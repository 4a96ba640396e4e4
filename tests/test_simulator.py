"""The simulator as a process manager and a proxy see it: its command line, its processes, its bytes."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests

from simulation.flags import parse
from simulation.knobs import FAILURES, KnobError, Knobs, load_knobs
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
        for name, process in self.family().items():
            if name != "tracker":
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
        self.process.wait()
        wait_until(lambda: not self.family())


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


# --- the command line ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("words", "name", "value"), [
    ("--max-model-len 32k", "max_model_len", 32000),
    ("--max-model-len 32K", "max_model_len", 32768),
    ("--max_model_len=1.5k", "max_model_len", 1500),
    ("--max-model-len auto", "max_model_len", 32768),
    ("-tp 2 -dp 3 -pp 4", "tensor_parallel_size", 2),
    ("--served-model-name a b c --port 9", "served_model_names", ("a", "b", "c")),
    ("--enforce-eager", "enforce_eager", True),
    ("--no-enforce-eager", "enforce_eager", False),
    ("--no_enforce_eager", "enforce_eager", False),
    ("--gpu-memory-utilization 0.5", "gpu_memory_utilization", 0.5),
    ("--max-num-queued-reqs None", "max_num_queued_reqs", None),
    ("--api-key a b", "api_keys", ("a", "b")),
    ("--lora-modules a=/a", "lora_modules", (("a", "/a"),)),
    ("--disable-log-stats --dtype float16 --kv-cache-memory-bytes 2G -q awq -O2", "runner", "auto"),
    ('--additional-config {"sim":{"tokens":3}}', "additional_config", {"sim": {"tokens": 3}}),
    ("--additional-config.sim.start_s 2 --additional-config.sim.fail=gated", "additional_config",
     {"sim": {"start_s": 2, "fail": "gated"}}),
    ("--compilation-config.cudagraph_capture_sizes+ 1,2 --hf-overrides {}", "model", "tiny"),
])
def test_a_flag_is_read_as_vllm_reads_it(words: str, name: str, value: object) -> None:
    assert getattr(parse(["serve", "tiny", *words.split()]), name) == value


@pytest.mark.parametrize(("words", "text"), [
    ("--frobnicate 1", "vllm: error: unrecognized arguments: --frobnicate 1"),
    ("--enforce-eager true", "vllm: error: unrecognized arguments: true"),
    ("--disable-log-stats --no-disable-log-stats", "vllm: error: unrecognized arguments: --no-disable-log-stats"),
    ("--task embed", "vllm: error: unrecognized arguments: --task embed\n\nHint: --task is not a vllm serve option"),
    ("--disable-log-requests", "vllm: error: unrecognized arguments: --disable-log-requests"),
    ("--swap-space 4", "vllm: error: unrecognized arguments: --swap-space 4"),
    ("--dtype floaty", "vllm serve: error: argument --dtype: invalid choice: 'floaty'"),
    ("--port http", "vllm serve: error: argument --port: invalid int value: 'http'"),
    ("--kv-cache-memory-bytes 1.5K", "vllm serve: error: argument --kv-cache-memory-bytes: Decimals are not allowed"),
    ("--compilation-config {", "vllm serve: error: argument --compilation-config/-cc: Value { cannot be converted"),
    ("--tensor-parallel-size", "vllm serve: error: argument --tensor-parallel-size/-tp: expected one argument"),
])
def test_a_wrong_flag_exits_with_2_and_vllms_words(words: str, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        parse(["serve", "tiny", *words.split()])
    assert exit_info.value.code == 2
    assert text in capsys.readouterr().err


def test_knobs_of_the_instance_win_over_the_environment() -> None:
    environ = {"SIMULATOR_TOKENS": "5", "SIMULATOR_HANG": "true", "SIMULATOR_START_S": "9"}
    knobs = load_knobs({"sim": {"start_s": 1}}, environ)
    assert (knobs.tokens, knobs.hang, knobs.start_s) == (5, True, 1.0)
    assert load_knobs({}, {}) == Knobs()


@pytest.mark.parametrize("sim", [{"speed": 1}, {"start_s": "soon"}, {"hang": 7}, {"fail": "somehow"}])
def test_a_wrong_knob_is_refused(sim: dict[str, Any]) -> None:
    with pytest.raises(KnobError, match=next(iter(sim))):
        load_knobs({"sim": sim}, {})


# --- failures of the start ----------------------------------------------------------------------------------------

API_FAILURES = {
    "port_in_use": "OSError: [Errno 98] Address already in use",
    "bad_local_path": "Repo id must be in the form 'repo_name' or 'namespace/repo_name'",
    "offline": "We couldn't connect to 'https://huggingface.co'",
    "model_not_found": "is not a valid model identifier listed on",
    "gated": "You are trying to access a gated repo.",
    "unsupported_architecture": "Model architectures ['SimulatedForNothing'] are not supported for now",
    "bad_config_transformers": "Transformers does not recognize this architecture",
    "length_too_large": "User-specified max_model_len (32768) is greater than the derived max_model_len",
    "sleep_mode_unsupported": "Sleep mode is not supported"}
ENGINE_FAILURES = {
    "no_weights": "RuntimeError: Cannot find any model weights with `tiny`",
    "kv_cache_too_small": "ValueError: To serve at least one request with the model's max seq len (32768), (4.00 GiB "
                          "KV cache is needed, which is larger than the available KV cache memory (1.25 GiB).",
    "gpu_too_full": "ValueError: Free memory on device cuda:0 (6.10/79.11 GiB) on startup is less than desired GPU "
                    "memory utilization (0.92, 72.78 GiB).",
    "out_of_memory": "torch.OutOfMemoryError: CUDA out of memory",
    "profiling_memory": "AssertionError: Error in memory profiling.",
    "engine_error": "RuntimeError: simulated failure of the engine"}


def test_each_failure_is_tested() -> None:
    assert {*API_FAILURES, *ENGINE_FAILURES, "bad_flag"} == FAILURES


def fail(launch: Launch, code: str, *flags: str, **knobs: Any) -> Simulator:
    simulator = launch(*flags, sim={"fail": code, **knobs})
    simulator.process.wait(120)
    wait_until(lambda: not simulator.family())
    return simulator


def test_a_bad_flag_exits_with_2(launch: Launch) -> None:
    simulator = fail(launch, "bad_flag")
    assert simulator.process.returncode == 2
    assert "vllm: error: unrecognized arguments: --simulated-bad-flag" in simulator.err.read_text()


@pytest.mark.parametrize("code", API_FAILURES)
def test_a_failure_of_the_api_server_is_a_traceback_on_stderr(launch: Launch, code: str) -> None:
    simulator = fail(launch, code)
    assert simulator.process.returncode == 1
    text = simulator.err.read_text()
    assert "Traceback (most recent call last):" in text
    assert API_FAILURES[code] in text
    assert "EngineCore" not in simulator.log


@pytest.mark.parametrize("flags", [(), ("-tp", "2")], ids=["one", "workers"])
@pytest.mark.parametrize("code", ENGINE_FAILURES)
def test_a_failure_of_the_engine_names_its_cause_in_an_earlier_line(
        launch: Launch, code: str, flags: tuple[str, ...]) -> None:
    simulator = fail(launch, code, *flags)
    assert simulator.process.returncode == 1
    who = "Worker_TP0" if flags else "EngineCore"
    cause = rf"\({who} pid=\d+\) ERROR \d\d-\d\d \d\d:\d\d:\d\d \[\w+\.py:\d+\] {re.escape(ENGINE_FAILURES[code])}"
    assert re.search(cause, simulator.out.read_text())
    last = simulator.err.read_text().strip().splitlines()[-1]
    assert last.startswith("RuntimeError: Engine core initialization failed. See root cause above.")


def test_only_the_first_starts_fail(launch: Launch, tmp_path: Path) -> None:
    knobs = {"fail_times": 1, "fail_counter": str(tmp_path / "starts")}
    assert fail(launch, "gpu_too_full", **knobs).process.returncode == 1
    assert launch(sim={"fail": "gpu_too_full", **knobs}).ready().get("/health").status_code == 200


def test_a_taken_port_fails_before_anything_is_loaded(launch: Launch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        simulator = launch("--port", str(taken.getsockname()[1]))
        assert simulator.process.wait(120) == 1
    assert "OSError: [Errno 98] Address already in use" in simulator.log
    assert "EngineCore" not in simulator.log


# --- the start ----------------------------------------------------------------------------------------------------

PHASES = ["simulated", "Resolved architecture: ", "Initializing a V1 LLM engine", "Starting to load model tiny...",
          "Loading weights took", "Model loading took", "torch.compile took", "Available KV cache memory: ",
          "GPU KV cache size: 524,288 tokens, Maximum concurrency for", "Graph capturing finished",
          "Starting vLLM server on "]


def test_the_log_has_vllms_phases_in_order(server: Simulator) -> None:
    lines = server.out.read_text().splitlines()
    place = -1
    for phase in PHASES:
        place = next(number for number in range(place + 1, len(lines)) if phase in lines[number])
        assert re.match(r"\(\w+ pid=\d+\) INFO \d\d-\d\d \d\d:\d\d:\d\d \[\w+\.py:\d+\] ", lines[place])
    bars = server.err.read_bytes()
    assert b"\rLoading safetensors checkpoint shards:  25% Completed | 1/4 [" in bars
    assert b"Application startup complete." in bars


def test_while_it_loads_the_port_refuses_and_signals_are_swallowed(launch: Launch) -> None:
    simulator = launch(sim={"start_s": 0.6})
    wait_until(lambda: "Starting to load model" in simulator.log)
    port = int(re.findall(r"'port': (\d+)", simulator.log)[0])
    assert port == 0 and simulator.port == 0        # not listening yet, so not announced either
    os.killpg(simulator.pid, signal.SIGTERM)
    os.killpg(simulator.pid, signal.SIGINT)
    assert simulator.ready().get("/health").status_code == 200
    assert "VLLM::EngineCore" in simulator.family()


def test_an_engine_that_is_killed_while_it_loads_fails_the_start(launch: Launch) -> None:
    simulator = launch(sim={"start_s": 4})
    wait_until(lambda: "VLLM::EngineCore" in simulator.family())
    simulator.family()["VLLM::EngineCore"].kill()
    assert simulator.process.wait(120) == 1
    assert "Engine core initialization failed" in simulator.log


# --- processes ----------------------------------------------------------------------------------------------------

def test_processes_are_named_and_nested_as_vllms(launch: Launch) -> None:
    simulator = launch("-tp", "2", VLLM_PROCESS_NAME_PREFIX="mine").ready()
    family = simulator.family()
    assert set(family) == {"server", "tracker", "mine::EngineCore", "mine::Worker_TP0", "mine::Worker_TP1"}
    assert family["mine::EngineCore"].ppid() == family["tracker"].ppid() == simulator.pid
    assert {family[f"mine::Worker_TP{rank}"].ppid() for rank in (0, 1)} == {family["mine::EngineCore"].pid}


@pytest.mark.parametrize(("flags", "sim", "titles"), [
    ((), {}, {"VLLM::EngineCore"}),
    ((), {"device": "cpu"}, {"VLLM::EngineCore", "VLLM::Worker"}),
    (("-dp", "2"), {}, {"VLLM::EngineCore_DP0", "VLLM::EngineCore_DP1"}),
])
def test_one_device_has_no_worker_but_on_a_cpu(launch: Launch, flags: tuple[str, ...], sim: dict[str, Any],
                                               titles: set[str]) -> None:
    assert set(launch(*flags, sim=sim).ready().family()) == {"server", "tracker", *titles}


def test_sigterm_without_requests_ends_all_and_leaves_the_ipc_sockets(launch: Launch, tmp_path: Path) -> None:
    rpc = tmp_path / "rpc"
    rpc.mkdir()
    simulator = launch("-tp", "2", VLLM_RPC_BASE_PATH=str(rpc)).ready()
    memory = simulator.shared_memory()
    assert len(memory) == 1 and memory[0].exists()
    simulator.process.terminate()
    assert simulator.process.wait(120) == 0
    wait_until(lambda: not simulator.family())
    assert not memory[0].exists()
    assert [path.is_socket() for path in rpc.iterdir()] == [True] * 6


def test_sigterm_with_a_request_in_flight_hangs_until_the_client_goes(launch: Launch) -> None:
    simulator = launch(sim={"tokens_per_s": 50}).ready()
    client = simulator.send("/v1/chat/completions", FOR_EVER)
    read_until(client, b"token 2")
    port = simulator.port
    simulator.process.terminate()
    wait_until(lambda: "Waiting for connections to close" in simulator.log)
    assert set(simulator.family()) == {"server", "tracker"}
    for number in (signal.SIGTERM, signal.SIGINT):
        simulator.process.send_signal(number)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), timeout=120)
    client.setblocking(False)
    with pytest.raises(BlockingIOError):            # neither an error nor an end, for what was sent is read
        while client.recv(65536):
            pass
    assert simulator.process.poll() is None
    client.close()
    assert simulator.process.wait(120) == 0


def test_the_hang_on_sigterm_can_be_turned_off(launch: Launch) -> None:
    simulator = launch(sim={"ignore_term_in_flight": False}).ready()
    client = simulator.send("/v1/chat/completions", FOR_EVER)
    read_until(client, b"token 2")
    simulator.process.terminate()
    assert simulator.process.wait(120) == 0
    assert b"[DONE]" not in read_all(client)


def test_a_shutdown_timeout_lets_requests_finish(launch: Launch) -> None:
    simulator = launch("--shutdown-timeout", "100").ready()
    client = simulator.send("/v1/chat/completions", {**CHAT, "stream": True, "max_tokens": 30},
                            "HTTP/1.1", "connection: close")
    read_until(client, b"token 2")
    simulator.process.terminate()
    assert b"[DONE]" in read_all(client)
    assert simulator.process.wait(120) == 0


def test_sigkill_of_the_server_orphans_engine_and_workers(launch: Launch) -> None:
    simulator = launch("-tp", "2").ready()
    memory = simulator.shared_memory()
    simulator.process.kill()
    simulator.process.wait(120)
    family = simulator.family()
    assert set(family) == {"tracker", "VLLM::EngineCore", "VLLM::Worker_TP0", "VLLM::Worker_TP1"}
    wait_until(lambda: family["VLLM::EngineCore"].ppid() != simulator.pid)
    assert memory[0].exists()
    simulator.end()                                 # the tracker outlives the killed, and cleans up after them
    assert not memory[0].exists()


@pytest.mark.parametrize("victim", ["VLLM::EngineCore", "VLLM::Worker_TP1"])
def test_the_death_of_the_engine_ends_each_request_with_an_error(launch: Launch, victim: str) -> None:
    simulator = launch("-tp", "2", sim={"engine_death_exit_s": 600}).ready()
    stream = simulator.send("/v1/chat/completions", FOR_EVER)
    plain = simulator.send("/v1/completions", {"prompt": "x", "max_tokens": 30000}, "HTTP/1.1", "connection: close")
    read_until(stream, b"token 2")
    simulator.family()[victim].kill()
    end = read_until(stream, b"data: [DONE]\n\n\r\n0\r\n\r\n").split(b"\r\n")
    error = next(json.loads(line[6:]) for line in end if b'"error"' in line)
    assert error["error"]["code"] == 500
    assert "EngineCore encountered an issue" in error["error"]["message"]
    assert read_all(plain).startswith(b"HTTP/1.1 500 Internal Server Error\r\n")
    assert simulator.get("/health").status_code == 503
    assert simulator.post("/v1/chat/completions", CHAT).status_code == 500
    assert set(simulator.family()) == {"server", "tracker"}


def test_a_server_whose_engine_died_exits_with_0(launch: Launch) -> None:
    simulator = launch(sim={"engine_death_exit_s": 0.01}).ready()
    simulator.family()["VLLM::EngineCore"].kill()
    assert simulator.process.wait(120) == 0
    wait_until(lambda: not simulator.family())


def test_a_process_can_be_made_to_die_in_the_middle_of_a_stream(launch: Launch) -> None:
    simulator = launch(sim={"die_after_chunks": 3}).ready()
    with contextlib.suppress(ConnectionResetError):
        assert b"[DONE]" not in read_all(simulator.send("/v1/chat/completions", FOR_EVER))
    assert simulator.process.wait(120) == -signal.SIGKILL
    assert "VLLM::EngineCore" in simulator.family()


def test_an_engine_can_be_made_to_die_in_the_middle_of_a_stream(launch: Launch) -> None:
    simulator = launch(sim={"die_engine_after_chunks": 3, "tokens_per_s": 5}).ready()
    data = read_until(simulator.send("/v1/chat/completions", FOR_EVER), b"[DONE]")
    assert b" token 3" in data and b" token 4" not in data and b'"code": 500' in data
    assert simulator.process.wait(120) == 0


# --- sleep, pause, hang -------------------------------------------------------------------------------------------

def test_a_sleeping_engine_answers_health_and_parks_requests(server: Simulator) -> None:
    answer = server.post("/sleep?level=2&mode=wait")
    assert answer.json() == {"status": "sleeping", "level": 2}
    assert server.get("/is_sleeping").json() == {"is_sleeping": True}
    parked = server.send("/v1/chat/completions", CHAT)
    stream = server.send("/v1/chat/completions", {**CHAT, "stream": True})
    read_until(stream, b"\r\n\r\n")                 # the head of a stream comes, and nothing after it
    assert server.get("/health").status_code == 200
    assert (server.gauge("num_requests_running"), server.gauge("num_requests_waiting")) == (0, 0)
    states = dict(re.findall(r'sleep_state="(\w+)"} (\S+)', server.get("/metrics").text))
    assert states == {"awake": "0.0", "weights_offloaded": "0.0", "discard_all": "1.0"}
    parked.setblocking(False)
    with pytest.raises(BlockingIOError):
        parked.recv(1)
    parked.settimeout(120)
    assert server.post("/wake_up?tags=weights").json() == {"status": "sleeping", "tags": ["weights"]}
    assert server.post("/wake_up").json() == {"status": "awake", "tags": None}
    assert b"simulated" in read_until(parked, b"usage")
    assert b"simulated" in read_until(stream, b"[DONE]")
    assert server.post("/sleep?level=7").status_code == 400


def test_sleep_aborts_what_is_in_flight_or_waits_for_it(launch: Launch) -> None:
    simulator = launch(VLLM_SERVER_DEV_MODE="1").ready()
    aborted = simulator.send("/v1/chat/completions", FOR_EVER)
    read_until(aborted, b"token 2")
    simulator.post("/sleep")
    assert b'"finish_reason":"abort"' in read_until(aborted, b"[DONE]")
    simulator.post("/wake_up")
    waited = simulator.send("/v1/chat/completions", {**CHAT, "stream": True, "max_tokens": 40})
    read_until(waited, b"token 2")
    simulator.post("/sleep?mode=wait")
    assert 'finished_reason="length",model_name="tiny"} 1.0' in simulator.get("/metrics").text
    assert b'"finish_reason":"length"' in read_until(waited, b"[DONE]")


def test_a_hung_engine_answers_health_only(server: Simulator) -> None:
    assert server.post("/sim", {"hang": True}).json()["hang"] is True
    hung = server.send("/v1/chat/completions", CHAT)
    assert server.get("/health").status_code == 200
    hung.setblocking(False)
    with pytest.raises(BlockingIOError):
        hung.recv(1)
    hung.settimeout(120)
    server.post("/sim", {"hang": False})
    assert b"simulated" in read_until(hung, b"usage")
    assert server.post("/sim", {"hangs": True}).status_code == 400


def test_dev_mode_routes_need_dev_mode(launch: Launch) -> None:
    simulator = launch().ready()
    for path in ("/sleep", "/wake_up", "/sim", "/pause", "/collective_rpc"):
        assert simulator.post(path).status_code == 404


# --- who runs and who waits ---------------------------------------------------------------------------------------

def test_requests_past_the_limit_wait_and_past_the_queue_are_refused(launch: Launch) -> None:
    simulator = launch("--max-num-seqs", "1", "--max-num-queued-reqs", "2").ready()
    first = simulator.send("/v1/chat/completions", FOR_EVER)
    read_until(first, b"token 2")
    second = simulator.send("/v1/chat/completions", CHAT)
    wait_until(lambda: simulator.gauge("num_requests_waiting") == 1)
    assert simulator.gauge("num_requests_running") == 1
    refused = simulator.post("/v1/chat/completions", CHAT)
    assert (refused.status_code, refused.json()["error"]["type"]) == (503, "Service Unavailable")
    first.close()                                   # whose end makes room
    assert b"simulated" in read_until(second, b"usage")
    assert simulator.gauge("num_requests_running") == 0


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_ends_its_request(server: Simulator, stream: bool) -> None:
    server.post("/sim", {"tokens_per_s": 1})
    client = server.send("/v1/chat/completions", {**FOR_EVER, "stream": stream})
    wait_until(lambda: server.gauge("num_requests_running") == 1)
    client.close()
    wait_until(lambda: server.gauge("num_requests_running") == 0)
    server.post("/sim", {"tokens_per_s": 0})


def test_500_streams_at_once_complete(launch: Launch) -> None:
    simulator = launch(sim={"tokens_per_s": 20, "tokens": 8}).ready()
    body = json.dumps({**CHAT, "stream": True}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\ncontent-type: application/json\r\nconnection: close\r\n" \
           f"content-length: {len(body)}\r\n\r\n".encode()
    most = 0

    async def one() -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", simulator.port)
        writer.write(head + body)
        data = await reader.read()
        writer.close()
        await writer.wait_closed()
        return data

    async def everything() -> list[bytes]:
        nonlocal most
        tasks = [asyncio.create_task(one()) for _ in range(500)]
        while not all(task.done() for task in tasks):
            most = max(most, int(await asyncio.to_thread(simulator.gauge, "num_requests_running")))
        return await asyncio.gather(*tasks)

    answers = asyncio.run(everything())
    assert all(answer.count(b"token") >= 8 and b"data: [DONE]\n\n\r\n0\r\n\r\n" in answer for answer in answers)
    assert most > 300                               # they did run together
    assert simulator.gauge("generation_tokens_total") == 4000


def test_metrics_have_vllms_names(server: Simulator) -> None:
    server.post("/v1/chat/completions", {**CHAT, "model": "alias"})
    text = server.get("/metrics").text
    for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "prompt_tokens_total",
                 "generation_tokens_total", 'time_to_first_token_seconds_bucket{engine="0",le="+Inf"',
                 'request_success_total{engine="0",finished_reason="stop"'):
        line = next(line for line in text.splitlines() if line.startswith(f"vllm:{name}"))
        assert 'engine="0"' in line and 'model_name="tiny"' in line


# --- bytes --------------------------------------------------------------------------------------------------------

def test_each_event_is_one_chunk(server: Simulator) -> None:
    client = server.send("/v1/chat/completions", {**CHAT, "stream": True, "max_tokens": 2,
                                                  "stream_options": {"include_usage": True}})
    head, _, rest = read_until(client, b"0\r\n\r\n").partition(b"\r\n\r\n")
    assert b"\r\nserver: uvicorn\r\ncontent-type: text/event-stream; charset=utf-8\r\n" in head
    assert head.endswith(b"\r\ntransfer-encoding: chunked")
    chunks = []
    while rest != b"0\r\n\r\n":
        size, _, rest = rest.partition(b"\r\n")
        chunks.append(rest[:int(size, 16)].decode())
        rest = rest[int(size, 16) + 2:]
    assert all(chunk.startswith("data: ") and chunk.endswith("\n\n") for chunk in chunks)
    first, one, two, last, done = (events(chunk)[0] for chunk in chunks)
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert one["choices"][0]["delta"]["content"] == "simulated token 1"
    assert (one["choices"][0]["finish_reason"], two["choices"][0]["finish_reason"]) == (None, "length")
    assert last["choices"] == [] and last["usage"]["completion_tokens"] == 2
    assert done == "[DONE]"


def test_connections_are_kept_and_idle_ones_closed(launch: Launch) -> None:
    simulator = launch(VLLM_HTTP_TIMEOUT_KEEP_ALIVE="0.2").ready()
    client = simulator.send("/v1/chat/completions", CHAT)
    read_until(client, b'"metrics":null}')
    client.sendall(b"GET /version HTTP/1.1\r\n\r\nGET /version HTTP/1.1\r\n\r\n")
    assert read_all(client).count(b'{"version":"0.32.0"}') == 2     # and then the server closed it


def test_connection_close_and_http_1_0_are_honoured(server: Simulator) -> None:
    for version, headers in (("HTTP/1.0", ()), ("HTTP/1.1", ("connection: close",))):
        answer = read_all(server.send("/v1/completions", {"prompt": "x"}, version, *headers))
        assert b"\r\nconnection: close\r\n" in answer and b"simulated" in answer


def test_a_chunked_body_and_one_that_waits_for_100_are_read(server: Simulator) -> None:
    data = json.dumps(CHAT).encode()
    answer = requests.post(server.url + "/v1/chat/completions", data=iter([data[:9], data[9:]]), timeout=120,
                           headers={"content-type": "application/json"})
    assert answer.json()["object"] == "chat.completion"
    with socket.create_connection(("127.0.0.1", server.port), timeout=120) as client:
        client.sendall(b"POST /v1/chat/completions HTTP/1.1\r\ncontent-type: application/json\r\n"
                       b"expect: 100-continue\r\ncontent-length: %d\r\n\r\n" % len(data))
        read_until(client, b"HTTP/1.1 100 Continue\r\n\r\n")
        client.sendall(data)
        assert b"200 OK" in read_until(client, b'"metrics":null}')


def test_garbage_is_a_400(server: Simulator) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=120) as client:
        client.sendall(b"hello\r\n\r\n")
        assert b"400 Bad Request" in read_all(client)


def test_it_serves_on_a_unix_socket(launch: Launch, tmp_path: Path) -> None:
    launch("--uds", str(tmp_path / "s")).ready()
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(tmp_path / "s"))
        client.sendall(b"GET /health HTTP/1.0\r\n\r\n")
        assert read_all(client).startswith(b"HTTP/1.1 200 OK")


# --- routes -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("body", "status", "kind", "param"), [
    ({**CHAT, "model": "other"}, 404, "NotFoundError", "model"),
    ({"model": "tiny"}, 400, "Bad Request", "body.messages"),
    ({"model": "tiny", "messages": "x"}, 400, "Bad Request", "body.messages"),
    ({**CHAT, "model": 7}, 400, "Bad Request", "body.model"),
    ({**CHAT, "max_tokens": 99999}, 400, "BadRequestError", "max_tokens"),
    ([1], 400, "Bad Request", "body"),
])
def test_a_bad_request_gets_vllms_envelope(server: Simulator, body: Any, status: int, kind: str, param: str) -> None:
    answer = server.post("/v1/chat/completions", body)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["type"], error["param"]) == (status, status, kind, param)


def test_a_body_that_is_no_json_gets_vllms_envelope(server: Simulator) -> None:
    url = server.url + "/v1/chat/completions"
    answer = requests.post(url, data='{"model":', headers={"content-type": "application/json"}, timeout=120)
    assert answer.status_code == 400
    assert "'json_invalid', 'loc': 'body.9'" in answer.json()["error"]["message"]
    assert "Unsupported Media Type" in requests.post(url, data="{}", timeout=120).json()["error"]["message"]


def test_routes_of_other_runners_are_not_found(server: Simulator) -> None:
    for path in ("/v1/embeddings", "/rerank", "/v1/audio/transcriptions", "/nowhere"):
        answer = server.post(path, {})
        assert (answer.status_code, answer.json()) == (404, {"detail": "Not Found"})
    assert server.get("/v1/chat/completions").status_code == 405


def test_models_and_small_routes(server: Simulator) -> None:
    cards = server.get("/v1/models").json()["data"]
    assert [(card["id"], card["parent"]) for card in cards] == [("tiny", None), ("alias", None), ("style", "tiny")]
    assert cards[0]["max_model_len"] == 32000
    assert server.get("/version").json() == {"version": "0.32.0"}
    assert server.get("/load").json() == {"server_load": 0}
    assert server.get("/ping").content == b""
    assert server.post("/tokenize", {"prompt": "two words"}).json()["count"] == 2
    assert "simulated" in server.post("/detokenize", {"tokens": [1, 2]}).json()["prompt"]
    assert server.get("/health", headers={"x-request-id": "mine"}).headers["x-request-id"] == "mine"
    assert server.post("/v1/chat/completions", {**CHAT, "model": "style"}).json()["model"] == "style"
    assert server.post("/v1/chat/completions", {**CHAT, "model": "alias"}).json()["model"] == "tiny"
    assert server.post("/invocations", CHAT).json()["object"] == "chat.completion"


def test_completions_answer_each_prompt_and_choice(server: Simulator) -> None:
    answer = server.post("/v1/completions", {"prompt": ["a b", "c"], "n": 2, "max_tokens": 3}).json()
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert all(choice["text"] == "simulated token 1 token 2 token 3" for choice in answer["choices"])
    assert answer["usage"]["completion_tokens"] == 12


def test_a_response_is_found_again_and_one_in_the_background_cancelled(server: Simulator) -> None:
    first = server.post("/v1/responses", {"input": "hi"}).json()
    assert first["id"].startswith("resp_") and first["status"] == "completed"
    assert server.get(f"/v1/responses/{first['id']}").json() == first
    assert server.get("/v1/responses/resp_no").json()["error"]["param"] == "response_id"
    server.post("/sim", {"hang": True})
    second = server.post("/v1/responses", {"input": "hi", "background": True}).json()
    assert server.post(f"/v1/responses/{second['id']}/cancel").json()["status"] == "cancelled"
    server.post("/sim", {"hang": False})


def test_load_is_tracked_when_asked_for(launch: Launch) -> None:
    simulator = launch("--enable-server-load-tracking").ready()
    with simulator.send("/v1/chat/completions", FOR_EVER) as client:
        read_until(client, b"token 1")
        assert simulator.get("/load").json() == {"server_load": 1}
    wait_until(lambda: simulator.get("/load").json() == {"server_load": 0})


def test_an_api_key_guards_v1_alone(launch: Launch) -> None:
    simulator = launch("--api-key", "secret").ready()
    assert simulator.get("/v1/models").status_code == 401
    assert simulator.get("/v1/models", headers={"authorization": "Bearer secret"}).status_code == 200
    assert simulator.get("/health").status_code == 200
    assert "secret" not in simulator.log


def test_a_pooling_model_has_pooling_routes(launch: Launch) -> None:
    simulator = launch(model="tiny-bert").ready()
    packed = simulator.post("/v1/embeddings", {"input": ["a", "b"], "encoding_format": "base64"}).json()["data"]
    plain = simulator.post("/v1/embeddings", {"input": ["a", "b"]}).json()["data"]
    assert struct.unpack("<16f", base64.b64decode(packed[1]["embedding"])) == pytest.approx(plain[1]["embedding"])
    ranked = simulator.post("/v1/rerank", {"query": "red fox", "documents": ["blue sea", "a red fox"]}).json()
    assert [result["index"] for result in ranked["results"]] == [1, 0]
    assert len(simulator.post("/score", {"text_1": "a", "text_2": ["b", "c"]}).json()["data"]) == 2
    assert simulator.post("/pooling", {"input": "a"}).json()["data"][0]["object"] == "pooling"
    assert simulator.post("/classify", {"input": "a"}).json()["data"][0]["label"] == "LABEL_0"
    assert simulator.post("/v1/chat/completions", CHAT).status_code == 404


def test_a_transcribing_model_reads_a_form(launch: Launch) -> None:
    simulator = launch(model="tiny-whisper").ready()
    url = simulator.url + "/v1/audio/transcriptions"
    form = {"model": "tiny-whisper"}
    answer = requests.post(url, data=form, files={"file": b"\r\nsound\r\n"}, timeout=120)
    assert answer.json()["text"].startswith("simulated")
    streamed = requests.post(url, data={**form, "stream": "true"}, files={"file": b"x"}, timeout=120)
    assert events(streamed.text)[0]["object"] == "transcription.chunk" and events(streamed.text)[-1] == "[DONE]"
    assert requests.post(url, data={"model": "other"}, files={"file": b"x"}, timeout=120).status_code == 404


def test_the_websocket_answers_text_frames(server: Simulator) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=120) as client:
        client.sendall(b"GET /v1/realtime HTTP/1.1\r\nupgrade: websocket\r\nconnection: Upgrade\r\n"
                       b"sec-websocket-version: 13\r\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n")
        head = read_until(client, b"session.created")
        assert b"101 Switching Protocols" in head and b"s3pPLMBiTxaQ9kYGzzhZRbK+xOo=" in head
        client.sendall(b"\x81\x82\x00\x00\x00\x00hi")
        assert b'"received":"hi"' in read_until(client, b"}")


def test_runtime_lora_loading_needs_its_variable(launch: Launch) -> None:
    simulator = launch(VLLM_ALLOW_RUNTIME_LORA_UPDATING="1").ready()
    assert simulator.post("/v1/load_lora_adapter", {"lora_name": "a", "lora_path": "/a"}).status_code == 200
    assert simulator.post("/v1/chat/completions", {**CHAT, "model": "a"}).status_code == 200
    assert simulator.post("/v1/unload_lora_adapter", {"lora_name": "a"}).status_code == 200
    assert simulator.post("/v1/chat/completions", {**CHAT, "model": "a"}).status_code == 404


# --- memory -------------------------------------------------------------------------------------------------------

def test_memory_is_claimed_shrinks_asleep_and_is_free_in_the_end(launch: Launch, tmp_path: Path) -> None:
    folder = tmp_path / "memory"
    folder.mkdir()
    (folder / "devices.json").write_text(json.dumps([{"index": index, "total_bytes": 100 << 30} for index in (0, 3)]))
    environ = {"SIMULATOR_MEMORY_DIR": str(folder), "CUDA_VISIBLE_DEVICES": "3", "VLLM_SERVER_DEV_MODE": "1"}
    simulator = launch("--enable-sleep-mode", "--gpu-memory-utilization", "0.5", **environ).ready()
    engine = simulator.family()["VLLM::EngineCore"].pid
    path = folder / f"{engine}.json"
    assert json.loads(path.read_text()) == {"pid": engine, "memory_bytes": 50 << 30, "devices": [3]}
    second = launch("--gpu-memory-utilization", "0.6", **environ)
    assert second.process.wait(120) == 1
    assert "Free memory on device cuda:0 (50.00/100.00 GiB) on startup is less than" in second.log
    simulator.post("/sleep")
    assert json.loads(path.read_text())["memory_bytes"] < 5 << 30
    simulator.post("/wake_up")
    assert json.loads(path.read_text())["memory_bytes"] == 50 << 30
    simulator.process.terminate()
    simulator.process.wait(120)
    assert [entry.name for entry in folder.iterdir()] == ["devices.json"]


# --- the SDKs -----------------------------------------------------------------------------------------------------

def test_the_sdks_understand_it(server: Simulator) -> None:
    from anthropic import Anthropic
    from openai import OpenAI

    user: Any = [{"role": "user", "content": "hi"}]
    with OpenAI(base_url=server.url + "/v1", api_key="x", max_retries=0) as openai:
        chat = openai.chat.completions.create(model="tiny", messages=user)
        assert "simulated" in (chat.choices[0].message.content or "")
        chunks = openai.chat.completions.create(model="tiny", messages=user, stream=True)
        assert "simulated" in "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        assert "simulated" in openai.responses.create(model="tiny", input="hi").output_text
        with openai.responses.stream(model="tiny", input="hi") as stream:
            assert "simulated" in stream.get_final_response().output_text
    with Anthropic(base_url=server.url, api_key="x", max_retries=0) as anthropic:
        answer = anthropic.messages.create(model="tiny", max_tokens=5, messages=user)
        assert answer.content[0].type == "text" and "simulated" in answer.content[0].text
        with anthropic.messages.stream(model="tiny", max_tokens=5, messages=user) as messages:
            assert "simulated" in messages.get_final_text()
        assert anthropic.messages.count_tokens(model="tiny", messages=user).input_tokens == 1
