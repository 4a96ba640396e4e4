"""Every way in which vLLM fails to start: status, code and a sentence that says what to do.

All starts of the table run at once, as their first test asks for them.  The daemon retries what may heal, less often
and with shorter waits between two tries than usual.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.daemon import Answer, Daemon, with_knobs
from tests.support import wait_until


@dataclass(frozen=True)
class Row:
    """What a start is made to run into, and what its caller is told."""

    status: int
    code: str
    says: tuple[str, ...]               # words of the sentence: what is wrong, and what to do
    heals: bool = False                 # may work the next time, so that it is tried again
    fail: str = ""                      # the simulator's failure
    params: dict[str, Any] = field(default_factory=dict)
    suggestion: dict[str, Any] | None = None


pytestmark = pytest.mark.whole

ROWS = {
    "unknown flag": Row(400, "bad_flag", ("--no-such-flag", "correct or remove it"), params={"no_such_flag": 1}),
    "unknown flag, simulated": Row(400, "bad_flag", ("--simulated-bad-flag", "params"), fail="bad_flag"),
    "bad choice": Row(400, "bad_flag_value", ("--dtype", "float99", "correct it"), params={"dtype": "float99"}),
    "no number": Row(400, "bad_flag_value", ("--max-num-seqs", "correct it"), params={"max_num_seqs": "many"}),
    "port taken": Row(503, "port_in_use", ("taken by another process", "next try"), True, "port_in_use"),
    "bad local path": Row(404, "bad_model_path", ("no folder", "correct the path"), fail="bad_local_path"),
    "offline": Row(502, "hub_unreachable", ("could not be reached", "check the network", "local folder"), True,
                   "offline"),
    "unknown model": Row(404, "model_not_found", ("neither a folder here nor a model on the hub", "check its name"),
                         fail="model_not_found"),
    "gated model": Row(403, "model_gated", ("gated", "accept its terms", "HF_TOKEN"), fail="gated"),
    "unsupported architecture": Row(400, "unsupported_architecture", ("SimulatedForNothing", "another model"),
                                    fail="unsupported_architecture"),
    "unknown to transformers": Row(400, "unsupported_architecture", ("transformers", "newer engine"),
                                   fail="bad_config_transformers"),
    "length too large": Row(400, "max_model_len_too_large", ("at most 2048", "lower max_model_len to 2048"),
                            fail="length_too_large", params={"max_model_len": 4096},
                            suggestion={"max_model_len": 2048}),
    "no weights": Row(404, "no_weights", ("no weights", "complete the model's files"), fail="no_weights"),
    "KV cache too small": Row(400, "kv_cache_too_small", ("4.00 GiB", "1.25 GiB", "lower max_model_len to 1280"),
                              fail="kv_cache_too_small", params={"max_model_len": 4096},
                              suggestion={"max_model_len": 1280}),
    "GPU too full": Row(503, "gpu_memory_in_use", ("are free", "stop what else", "lower gpu_memory_utilization"), True,
                        "gpu_too_full", suggestion={"gpu_memory_utilization": 0.07}),
    "out of memory": Row(507, "out_of_memory", ("ran out of memory", "tensor_parallel_size", "quantized"), True,
                         "out_of_memory"),
    "memory moved": Row(503, "memory_profiling_failed", ("Another process freed GPU memory", "start it again"), True,
                        "profiling_memory"),
    "no sleep mode": Row(400, "bad_flag_value", ("Sleep mode is not supported",), fail="sleep_mode_unsupported"),
    "another error": Row(502, "engine_failed", ("simulated failure of the engine", "log tells more"), True,
                         "engine_error"),
}


def model_of(name: str) -> str:
    return f"org/{name.replace(' ', '-').replace(',', '')}"


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    with Daemon(tmp_path_factory.mktemp("daemon"), {"VLLM_MAX_INSTANCES": "40"},
                patch={"instances.instance.BACKOFF_LIMIT_S": 0.01, "instances.instance.FAILURES_ALLOWED": 3}) as daemon:
        yield daemon


@pytest.fixture(scope="module")
def answers(daemon: Daemon) -> Iterator[dict[str, Future[Answer]]]:
    """The answers to `POST /instances` with wait, and then to a request for each model."""
    with ThreadPoolExecutor(4) as pool:
        yield {name: pool.submit(daemon.post, "/instances", {
            "model_name": model_of(name), "params": with_knobs(row.params, {"fail": row.fail} if row.fail else None),
            "wait": True}) for name, row in ROWS.items()}


@pytest.mark.parametrize("name", ROWS)
def test_a_start_that_fails(daemon: Daemon, answers: dict[str, Future[Answer]], name: str) -> None:
    row, answer = ROWS[name], answers[name].result()
    assert (answer.status, answer.error["code"], answer.error["param"]) == (row.status, row.code, "model_name")
    message = answer.error["message"]
    for words in row.says:
        assert words in message
    assert model_of(name) in message or row.code == "port_in_use"
    assert "Traceback" not in message and "\n" not in message and len(message) < 600

    one, = (one for one in daemon.instances() if one["model_name"] == model_of(name))
    assert (one["status"], one["last_error"]["code"], one["last_error"]["message"]) == ("failed", row.code, message)
    assert one["last_error"]["suggestion"] == row.suggestion
    assert (one["restarts"] > 0) is row.heals, "what cannot heal is not tried again"

    asked = daemon.post("/v1/completions", {"model": model_of(name), "prompt": "x"})
    assert (asked.status, asked.error["code"], asked.error["message"]) == (row.status, row.code, message)
    assert asked.error["param"] == "model"


def test_nothing_is_left_of_starts_that_failed(daemon: Daemon, answers: dict[str, Future[Answer]]) -> None:
    for answer in answers.values():
        answer.result()
    wait_until(lambda: all(one["pid"] is None for one in daemon.instances()))
    assert daemon.engine_processes() == [] and daemon.records() == []
    assert daemon.get("/health").json["vllm_processes"] == 0


def test_what_heals_is_served_after_all(daemon: Daemon, tmp_path: Path) -> None:
    sim = {"fail": "out_of_memory", "fail_times": 2, "fail_counter": str(tmp_path / "starts")}
    made = daemon.create("healing", sim=sim)
    assert made["restarts"] == 2 and made["last_error"]["code"] == "out_of_memory"
    assert daemon.post("/v1/completions", {"model": "healing", "prompt": "x"}).status == 200
    daemon.remove(made["id"])


def test_requests_that_wait_for_a_start_hear_why_it_failed(daemon: Daemon) -> None:
    with ThreadPoolExecutor(10) as pool:
        daemon.create("waited-for", sim={"fail": "no_weights", "start_s": 0.5}, wait=False)
        body = {"model": "waited-for", "prompt": "x"}
        answers = list(pool.map(lambda _: daemon.post("/v1/completions", body), range(10)))
    assert {(answer.status, answer.error["code"]) for answer in answers} == {(404, "no_weights")}


def test_a_start_that_hangs(daemon: Daemon) -> None:
    answer = daemon.post("/instances", {"model_name": "hanging", "params": with_knobs(None, {"health_hang": True}),
                                        "start_timeout": 0.3, "wait": True})
    assert (answer.status, answer.error["code"]) == (504, "start_timeout")
    assert "0.3 s" in answer.error["message"] and "start_timeout" in answer.error["message"]


def test_an_engine_that_starts_well_and_dies_at_its_first_request(daemon: Daemon) -> None:
    made = daemon.create("frail", sim={"die_after_chunks": 1})
    asked = daemon.post("/v1/completions", {"model": "frail", "prompt": "x"})
    assert (asked.status, asked.error["code"]) == (502, "engine_died")
    assert "the engine of frail died" in asked.error["message"]
    wait_until(lambda: daemon.instance(made["id"])["restarts"] == 1)
    daemon.remove(made["id"])


def test_no_such_engine(tmp_path: Path) -> None:
    with Daemon(tmp_path / "daemon", command="/nowhere/vllm") as daemon:
        answer = daemon.post("/instances", {"model_name": "m", "wait": True})
        assert (answer.status, answer.error["code"]) == (500, "engine_not_found")
        assert "/nowhere/vllm" in answer.error["message"] and "VLLM_COMMAND" in answer.error["message"]
