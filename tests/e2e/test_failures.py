"""Starts that fail in the real engine: each is told by status, code and a sentence that says what to do."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.daemon import Answer
from tests.support import wait_until

from .conftest import Models
from .real_daemon import LOAD_S, RealDaemon

AT_ONCE = 2 * (os.cpu_count() or 2)     # a start is mostly imports


@dataclass(frozen=True)
class Case:
    """What is wrong, and what the answer must say."""

    code: str
    status: int
    words: tuple[str, ...]
    params: dict[str, Any] = field(default_factory=dict)
    suggestion: dict[str, Any] | None = None
    model: str | None = None        # None: a good one, damaged in the way that `damage` says
    damage: str = ""


CASES = {
    "bad flag": Case("bad_flag", 400, ("does not know --such-a-flag", "correct or remove it"),
                     params={"such_a_flag": 1}),
    "bad value": Case("bad_flag_value", 400, ("refuses the value of", "--max-model-len", "correct it"),
                      params={"max_model_len": "many"}),
    "bad path": Case("bad_model_path", 404, ("There is no folder /nowhere/at-all", "correct the path"),
                     model="/nowhere/at-all"),
    "length": Case("max_model_len_too_large", 400, ("takes at most 512 tokens", "lower max_model_len to 512"),
                   params={"max_model_len": 4096}, suggestion={"max_model_len": 512}),
    "kv cache": Case("kv_cache_too_small", 400, ("GiB of KV cache", "lower max_model_len to "),
                     params={"max_model_len": 2**20, "hf_overrides": {"max_position_embeddings": 2**20}}),
    "no weights": Case("no_weights", 404, ("There are no weights", "complete the model's files"),
                       damage="no weights"),
    "architecture": Case("unsupported_architecture", 400, ("FooForCausalLM", "use a newer vLLM or another model"),
                         damage="architecture"),
}
NOT_ON_DISK = "no-one/no-such-model"


@pytest.fixture(scope="module")
def failing(engine: str, models: Models, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealDaemon]:
    with RealDaemon(tmp_path_factory.mktemp("failing"), engine) as running:
        yield running
        running.remove()


@pytest.fixture(scope="module")
def answers(failing: RealDaemon, models: Models, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Answer]:
    """All of them, side by side."""
    folder = tmp_path_factory.mktemp("broken")

    def start(name: str) -> Answer:
        case = CASES[name]
        model = case.model or str(damaged(models.tiny.folder, folder / name.replace(" ", "-"), case.damage))
        with failing.sent("/instances", {"model_name": model, "params": case.params, "wait": True}) as sent:
            answer = sent.getresponse()
            return Answer(answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read())

    with ThreadPoolExecutor(AT_ONCE) as pool:
        return dict(zip(CASES, pool.map(start, CASES), strict=True))


def damaged(good: Path, folder: Path, damage: str) -> Path:
    """A copy of a model: each start gets one, as a new start of a model forgets its failures."""
    shutil.copytree(good, folder)
    if damage == "no weights":
        for weights in folder.glob("*.safetensors"):
            weights.unlink()
    elif damage == "architecture":
        settings = json.loads((folder / "config.json").read_text()) | {"architectures": ["FooForCausalLM"]}
        (folder / "config.json").write_text(json.dumps(settings))
    return folder


@pytest.mark.parametrize("name", CASES)
def test_a_start_that_fails_says_why_and_what_to_do(answers: dict[str, Answer], failing: RealDaemon, name: str) -> None:
    case, error = CASES[name], answers[name].error
    assert (answers[name].status, error["code"]) == (case.status, case.code), error
    assert error["type"] == {400: "invalid_request_error", 404: "not_found_error"}[case.status]
    for words in case.words:
        assert words in error["message"]
    assert error["message"].endswith(".") and "\n" not in error["message"]
    listed = [one for one in failing.instances() if (one["last_error"] or {}).get("message") == error["message"]]
    assert [(one["status"], one["restarts"]) for one in listed] == [("failed", 0)]     # not tried again
    assert case.suggestion is None or listed[0]["last_error"]["suggestion"] == case.suggestion
    wait_until(lambda: failing.instance(listed[0]["id"])["pid"] is None)


def test_a_model_that_is_not_in_the_cache_may_come_yet(failing: RealDaemon) -> None:
    """The hub may answer again: it waits for another try, and says why."""
    begun = failing.post("/instances", {"model_name": NOT_ON_DISK}).json
    wait_until(lambda: failing.instance(begun["id"])["status"] == "backoff", LOAD_S)
    found = failing.instance(begun["id"])
    assert found["last_error"]["code"] == "hub_unreachable"
    assert "HF_HUB_OFFLINE" in found["last_error"]["message"]
    failing.remove(begun["id"])
    assert failing.status_of(begun["id"]) == "gone"


def test_a_failed_start_leaves_no_process(answers: dict[str, Answer], failing: RealDaemon) -> None:
    assert failing.engine_processes() == []
    assert list(failing.temporary.iterdir()) == []
