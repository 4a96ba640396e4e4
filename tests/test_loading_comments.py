"""A streaming client that waits long for its model is told so, in comments of the stream, and how it ended."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.daemon import Daemon, events
from tests.support import wait_until

pytestmark = pytest.mark.whole

MESSAGES = [{"role": "user", "content": "hello there"}]
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": MESSAGES}, "/v1/completions": {"prompt": "x"},
    "/v1/responses": {"input": "x"}, "/v1/messages": {"messages": MESSAGES, "max_tokens": 4}}
each_path = pytest.mark.parametrize("path", BODIES)
SOON = {"routing.commented.AFTER_S": 0.2, "routing.commented.EVERY_S": 0.1}
LOADING = {"start_s": 1.5}
FAILING = {"start_s": 4, "fail": "no_weights"}      # two fifths of the way


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    with Daemon(tmp_path_factory.mktemp("daemon"), {"DRAIN_TIMEOUT": "0.2"}, patch=SOON) as daemon:
        yield daemon


@pytest.fixture(autouse=True)
def without_instances(daemon: Daemon) -> Iterator[None]:
    yield
    daemon.remove()


def stream(daemon: Daemon, path: str = "/v1/chat/completions", **fields: object) -> tuple[list[bytes], list[bytes]]:
    """The comments and the events of one whole answer: 200, and ended as it should."""
    with daemon.open("POST", path, BODIES[path] | {"model": "org/m", "stream": True, **fields}) as answer:
        assert answer.status == 200
        assert answer.headers["Content-Type"].startswith("text/event-stream")
        told = list(events(answer))
    comments = [one for one in told if one.startswith(b":")]
    assert told[:len(comments)] == comments, "a comment after an event"
    return comments, told[len(comments):]


def steady(told: list[bytes]) -> list[bytes]:
    """Without what differs from answer to answer."""
    return [re.sub(rb'"(id|item_id|created|created_at)":("[^"]*"|\d+)', b"", one) for one in told]


@each_path
def test_comments_come_before_the_engines_own_events(daemon: Daemon, path: str) -> None:
    daemon.create("org/m", sim=LOADING, wait=False)
    comments, told = stream(daemon, path)
    assert comments
    assert all(re.fullmatch(rb": loading org/m [a-z][^\n]*\n\n", one) for one in comments), comments
    again, same = stream(daemon, path)
    assert again == []
    assert steady(told) == steady(same)


def test_who_wants_no_stream_gets_none(daemon: Daemon) -> None:
    daemon.create("org/m", sim=LOADING, wait=False)
    answer = daemon.post("/v1/chat/completions", {"model": "org/m", "messages": MESSAGES})
    assert (answer.status, answer.json["object"]) == (200, "chat.completion")


def test_a_route_that_streams_nothing_is_left_alone(daemon: Daemon) -> None:
    daemon.create("org/m", sim=LOADING, wait=False)
    answer = daemon.post("/tokenize", {"model": "org/m", "prompt": "a b", "stream": True})
    assert answer.status == 200
    assert answer.json["tokens"]


@each_path
def test_a_load_that_fails_ends_the_stream_with_its_cause(daemon: Daemon, path: str) -> None:
    daemon.create("org/m", sim=FAILING, wait=False)
    comments, told = stream(daemon, path)
    assert comments
    [problem, done] = told
    assert done == b"data: [DONE]\n\n"
    named, _, data = problem.rpartition(b"data: ")
    error = json.loads(data)
    assert set(error["error"]) == {"message", "type", "param", "code"}
    assert (error["error"]["code"], error["error"]["param"]) == ("no_weights", "model")
    typed = path in ("/v1/messages", "/v1/responses")
    assert named == (b"event: error\n" if typed else b"")
    assert error.get("type") == ("error" if typed else None)


def test_an_engine_that_refuses_the_request_ends_the_stream_with_its_own_error(daemon: Daemon) -> None:
    wrong = {"max_tokens": -5}
    daemon.create("org/m", sim=LOADING, wait=False)
    comments, [problem, done] = stream(daemon, **wrong)
    assert comments and done == b"data: [DONE]\n\n"
    own = daemon.post("/v1/chat/completions", {"model": "org/m", "messages": MESSAGES, "stream": True, **wrong})
    assert own.status == 400
    assert json.loads(problem.removeprefix(b"data: ")) == own.json


def test_a_client_that_leaves_meanwhile_costs_the_engine_nothing(daemon: Daemon) -> None:
    made = daemon.create("org/m", sim=LOADING, wait=False)
    ask = {"model": "org/m", "messages": MESSAGES, "stream": True}
    with daemon.open("POST", "/v1/chat/completions", ask) as answer:
        assert next(events(answer)).startswith(b": loading")
    wait_until(lambda: daemon.status_of(made["id"]) == "ready")
    assert stream(daemon)[1]        # whoever came before would have been served by now
    wait_until(lambda: daemon.get("/load").json == {"server_load": 0})
    assert daemon.get(f"/instances/{made['id']}/logs?tail=100").body.count(b"POST /v1/chat/completions") == 1


def test_many_wait_for_one_model(daemon: Daemon) -> None:
    daemon.create("org/m", sim=LOADING, wait=False)
    with ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(lambda _: stream(daemon), range(20)))
    assert all(comments for comments, _ in answers)
    assert {len(told) for _, told in answers} == {len(answers[0][1])}


def test_an_id_that_was_told_in_such_a_stream_is_remembered(daemon: Daemon) -> None:
    daemon.create("org/m", sim=LOADING, wait=False)
    _, told = stream(daemon, "/v1/responses")
    found = re.search(rb'"id":"(resp_[^"]+)"', b"".join(told))
    assert found
    daemon.create("org/other")
    assert daemon.get(f"/v1/responses/{found[1].decode()}").status == 200


def test_the_sdks_read_such_a_stream(daemon: Daemon) -> None:
    from anthropic import Anthropic, APIStatusError
    from openai import APIError, OpenAI

    url = f"http://127.0.0.1:{daemon.port}"
    with OpenAI(base_url=url + "/v1", api_key="x", max_retries=0) as openai, \
            Anthropic(base_url=url, api_key="x", max_retries=0) as anthropic:
        ask: Any = {"model": "org/m", "messages": MESSAGES}
        daemon.create("org/m", sim=LOADING, wait=False)
        assert "simulated" in "".join(chunk.choices[0].delta.content or "" for chunk in
                                      openai.chat.completions.create(**ask, stream=True) if chunk.choices)
        daemon.remove()
        daemon.create("org/m", sim=LOADING, wait=False)
        with anthropic.messages.stream(**ask, max_tokens=8) as told:
            assert told.get_final_text()
        daemon.remove()
        daemon.create("org/m", sim=FAILING, wait=False)
        with pytest.raises(APIError, match="holds no weights|weights"):
            list(openai.chat.completions.create(**ask, stream=True))
        daemon.remove()
        daemon.create("org/m", sim=FAILING, wait=False)
        with pytest.raises(APIStatusError, match="weights"), anthropic.messages.stream(**ask, max_tokens=8) as told:
            told.get_final_text()
        daemon.remove()
        daemon.create("org/m", sim=FAILING, wait=False)
        with pytest.raises(APIError, match="weights"), openai.responses.stream(model="org/m", input="x") as said:
            said.get_final_response()


def test_a_daemon_that_ends_tells_who_waits(tmp_path: Path) -> None:
    with Daemon(tmp_path, {"SHUTDOWN_GRACE": "60"}, patch=SOON) as daemon:
        daemon.create("org/m", sim={"start_s": 600}, wait=False)
        with daemon.open("POST", "/v1/chat/completions",
                         {"model": "org/m", "messages": MESSAGES, "stream": True}) as answer:
            told = events(answer)
            assert next(told).startswith(b": loading")
            daemon.signal(signal.SIGTERM)
            *_, problem, done = told
        assert json.loads(problem.removeprefix(b"data: "))["error"]["code"] == "shutting_down"
        assert done == b"data: [DONE]\n\n"
        assert daemon.wait_for_exit() == 0


def test_comments_can_be_turned_off(tmp_path: Path) -> None:
    with Daemon(tmp_path, {"LOADING_COMMENTS": "false"}, patch=SOON) as daemon:
        daemon.create("org/m", sim=LOADING, wait=False)
        assert stream(daemon)[0] == []
        daemon.remove()
        daemon.create("org/m", sim=FAILING, wait=False)
        answer = daemon.post("/v1/chat/completions", {"model": "org/m", "messages": MESSAGES, "stream": True})
        assert (answer.status, answer.error["code"]) == (404, "no_weights")
