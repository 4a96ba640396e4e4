"""The simulator as a process manager sees it: its command line, its start and its failures, its processes."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
from pathlib import Path
from typing import Any

import psutil
import pytest

from simulation.flags import parse
from simulation.knobs import FAILURES, KnobError, Knobs, load_knobs
from tests.simulator_harness import CHAT, FOR_EVER, Launch, Simulator, launch, read_all, read_until, server
from tests.support import wait_until

__all__ = ["launch", "server"]          # fixtures

pytestmark = pytest.mark.whole

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


@pytest.mark.parametrize(("code", "flags"), [*((code, ()) for code in ENGINE_FAILURES), ("no_weights", ("-tp", "2"))])
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
    for start_s in (0.6, 5, 60):        # if the machine is too busy for signals to come while it loads, once more
        simulator = launch(sim={"start_s": start_s})
        wait_until(lambda simulator=simulator: "Starting to load model" in simulator.log)
        port = int(re.findall(r"'port': (\d+)", simulator.log)[0])
        announced = simulator.port
        os.killpg(simulator.pid, signal.SIGTERM)
        os.killpg(simulator.pid, signal.SIGINT)
        wait_until(lambda simulator=simulator: took_its_signals(simulator.family().get("VLLM::EngineCore")))
        if "init engine" not in simulator.log:
            break
    assert port == 0 and announced == 0     # not listening yet, so not announced either
    assert simulator.ready().get("/health").status_code == 200
    assert "VLLM::EngineCore" in simulator.family()


def took_its_signals(process: psutil.Process | None) -> bool:
    """None is pending, and it waits for something else again; not so while it does not have its title yet."""
    if process is None:
        return False
    status = Path(f"/proc/{process.pid}/status").read_text()
    return not re.search(r"^(Sig|Shd)Pnd:\s*0*[1-9a-f]", status, re.MULTILINE) and "State:\tS" in status


def test_an_engine_that_is_killed_while_it_loads_fails_the_start(launch: Launch) -> None:
    simulator = launch(sim={"start_s": 20})
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


def test_sigterm_without_requests_ends_all_and_leaves_the_ipc_sockets(launch: Launch, short_folder: Path) -> None:
    simulator = launch("-tp", "2", VLLM_RPC_BASE_PATH=str(short_folder)).ready()
    memory = simulator.shared_memory()
    assert len(memory) == 1 and memory[0].exists()
    simulator.process.terminate()
    assert simulator.process.wait(120) == 0
    wait_until(lambda: not simulator.family())
    assert not memory[0].exists()
    assert [path.is_socket() for path in short_folder.iterdir()] == [True] * 6


def test_sigterm_with_a_request_in_flight_hangs_until_the_client_goes(launch: Launch) -> None:
    simulator = launch(sim={"tokens_per_s": 50}).ready()
    client = simulator.send("/v1/chat/completions", FOR_EVER)
    read_until(client, b"token 2")
    port = simulator.port
    simulator.process.terminate()
    wait_until(lambda: "Waiting for connections to close" in simulator.log)
    wait_until(lambda: set(simulator.family()) == {"server", "tracker"})
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


def test_sigterm_to_the_whole_group_hangs_the_same(launch: Launch) -> None:
    simulator = launch("-tp", "2").ready()
    client = simulator.send("/v1/chat/completions", FOR_EVER)
    read_until(client, b"token 2")
    os.killpg(simulator.pid, signal.SIGTERM)
    wait_until(lambda: "Waiting for connections to close" in simulator.log)
    assert "died unexpectedly" not in simulator.log
    assert simulator.process.poll() is None


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
    wait_until(lambda: set(simulator.family()) == {"server", "tracker"})    # the workers notice it by themselves


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
    simulator = launch(sim={"die_engine_after_chunks": 3}).ready()
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


# --- memory -------------------------------------------------------------------------------------------------------

def test_memory_is_claimed_shrinks_asleep_and_is_free_in_the_end(launch: Launch, tmp_path: Path) -> None:
    folder = tmp_path / "memory"
    folder.mkdir()
    (folder / "devices.json").write_text(json.dumps([{"index": index, "total_bytes": 100 << 30} for index in (0, 3)]))
    environ = {"SIMULATOR_MEMORY_DIR": str(folder), "CUDA_VISIBLE_DEVICES": "3", "VLLM_SERVER_DEV_MODE": "1"}
    simulator = launch("--enable-sleep-mode", "--gpu-memory-utilization", "0.5", **environ).ready()
    engine = simulator.family()["VLLM::EngineCore"].pid
    path = folder / f"{engine}.json"
    assert json.loads(path.read_text()) == {"pid": engine, "memory_bytes": 50 << 30, "devices": [3], "label": "tiny"}
    second = launch("--gpu-memory-utilization", "0.6", **environ)
    assert second.process.wait(120) == 1
    assert "Free memory on device cuda:0 (50.00/100.00 GiB) on startup is less than" in second.log
    simulator.post("/sleep")
    assert json.loads(path.read_text())["memory_bytes"] < 5 << 30
    simulator.post("/wake_up")
    assert json.loads(path.read_text())["memory_bytes"] == 50 << 30
    simulator.process.terminate()
    simulator.process.wait(120)
    assert sorted(entry.name for entry in folder.iterdir()) == ["devices.json", "lock", "refused"]
