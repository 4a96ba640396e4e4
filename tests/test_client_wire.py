"""The SDK against exact bytes: retries, time limits, broken answers and cut streams; both forms behave alike."""

from __future__ import annotations

import inspect
import json
import socket
from typing import Any

import httpx
import pytest
import tenacity
from hypothesis import given
from hypothesis import strategies as st

from tests.daemon import CHECKOUT
from tests.sdk import CLIENTS, Scripted, answer, stream
from tests.test_imports import imported_by
from vllm_server_client import (
    AsyncVLLMProxyClient,
    AuthenticationFailed,
    BadAnswer,
    Conflict,
    ConnectionFailed,
    NotFound,
    PermissionDenied,
    ServerError,
    StreamBroken,
    TimedOut,
    TooManyRequests,
    Unavailable,
    VLLMProxyClient,
    VLLMProxyError,
    calls,
    retry,
)

HELLO = [{"role": "user", "content": "Hello"}]
NOT_NOW = json.dumps({"error": {"message": "later", "type": "service_unavailable", "param": None,
                                "code": "queue_full"}}).encode()
END = b"data: [DONE]\n\n"
GOOD = answer(body=b'{"status": "ok"}')


def chunk(text: str) -> bytes:
    return b"data: " + json.dumps({"choices": [{"index": 0, "delta": {"content": text}}]}).encode() + b"\n\n"


@pytest.fixture(params=CLIENTS)
def client(request: pytest.FixtureRequest) -> Any:
    return CLIENTS[request.param]


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How long it would have waited between tries; it waits for none of it."""
    found: list[float] = []
    original = retry.SendOptions.retrying

    def retrying(self: retry.SendOptions, call: calls.Call) -> dict[str, Any]:
        def note(state: tenacity.RetryCallState) -> None:
            found.append(options["wait"](state))
        options = original(self, call)
        return options | {"before_sleep": note, "wait": tenacity.wait_none()}

    monkeypatch.setattr(retry.SendOptions, "retrying", retrying)
    return found


# --- what is sent again -----------------------------------------------------------------------------------------------

def test_a_server_that_asks_for_patience_is_asked_again_when_it_said(client: Any, waits: list[float]) -> None:
    with (Scripted([answer(503, NOT_NOW, Retry_After=7), answer(429, NOT_NOW, Retry_After=2), GOOD]) as server,
          client(server.url) as sdk):
        assert sdk.chat_completion("m", HELLO) == {"status": "ok"}
    assert waits == [7, 2]
    assert server.requests == ["POST /v1/chat/completions HTTP/1.1"] * 3


def test_it_is_not_asked_for_ever(client: Any, waits: list[float]) -> None:
    with (Scripted([answer(503, NOT_NOW, Retry_After=1)] * 9) as server, client(server.url, max_retries=3) as sdk,
          pytest.raises(Unavailable) as caught):
        sdk.health()
    assert len(server.requests) == 4 and len(waits) == 3
    assert (caught.value.code, caught.value.retry_after_s, str(caught.value)) == ("queue_full", 1, "later")


@pytest.mark.parametrize("first", [
    answer(503, NOT_NOW), answer(503, NOT_NOW, Retry_After=3600), answer(500, NOT_NOW, Retry_After=1),
    answer(504, NOT_NOW, Retry_After=1), answer(404, NOT_NOW)])
def test_other_errors_are_told_at_once(client: Any, first: bytes, waits: list[float]) -> None:
    with Scripted([first, GOOD]) as server, client(server.url) as sdk, pytest.raises(ServerError, match="later"):
        sdk.health()
    assert len(server.requests) == 1 and not waits


def test_a_server_that_is_not_there_yet_is_tried_again(client: Any, waits: list[float]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    with (client(f"http://127.0.0.1:{port}", max_retries=2) as sdk,
          pytest.raises(ConnectionFailed, match="is vllm-server running there") as caught):
        sdk.chat_completion("m", HELLO)
    assert len(waits) == 2 and not caught.value.sent


def test_what_may_have_been_served_is_sent_once(client: Any, waits: list[float]) -> None:
    """A connection that breaks after the request: a GET is sent again, a POST is not."""
    with Scripted([b"", GOOD]) as server, client(server.url) as sdk:
        assert sdk.health() == {"status": "ok"}
    assert len(waits) == 1
    with Scripted([b"", GOOD]) as server, client(server.url) as sdk, pytest.raises(ConnectionFailed) as caught:
        sdk.chat_completion("m", HELLO)
    assert caught.value.sent and len(server.requests) == 1 and len(waits) == 1


def test_a_refused_stream_is_tried_again_before_its_first_piece(client: Any, waits: list[float]) -> None:
    with (Scripted([answer(503, NOT_NOW, Retry_After=5), stream(chunk("a"), END)]) as server,
          client(server.url) as sdk):
        assert list(sdk.chat_completion_stream("m", HELLO)) == ["a"]
    assert waits == [5]


@given(status=st.sampled_from([400, 401, 404, 429, 500, 502, 503, 504]),
       retry_after_s=st.none() | st.floats(0, 1e6), sent=st.booleans(), method=st.sampled_from(["GET", "POST"]))
def test_a_post_is_sent_again_only_if_nothing_was_done(status: int, retry_after_s: float | None, sent: bool,
                                                       method: str) -> None:
    call = calls.Call(method, "/")
    refused = ServerError("no", status=status, retry_after_s=retry_after_s)
    assert retry.may_be_repeated(refused, call) == (
        status in (429, 503) and retry_after_s is not None and retry_after_s <= retry.LONGEST_WAIT_S)
    assert retry.may_be_repeated(ConnectionFailed("lost", sent=sent), call) == (method == "GET" or not sent)
    assert not retry.may_be_repeated(TimedOut("slow"), call)


# --- errors -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("status", "kind"), [(400, ServerError), (401, AuthenticationFailed), (403, PermissionDenied),
                                              (404, NotFound), (409, Conflict), (429, TooManyRequests),
                                              (503, Unavailable), (507, ServerError)])
def test_an_error_keeps_all_that_the_server_said(client: Any, status: int, kind: type[ServerError]) -> None:
    said = {"error": {"message": "what to do", "type": "t", "param": "model", "code": "c"}}
    with (Scripted([answer(status, json.dumps(said).encode())]) as server, client(server.url) as sdk,
          pytest.raises(kind, match="what to do") as caught):
        sdk.health()
    error = caught.value
    assert type(error) is kind and isinstance(error, VLLMProxyError) and error.status == status
    assert error.envelope() == said


@pytest.mark.parametrize(("body", "message"), [
    (b"<html>Bad Gateway</html>", "HTTP 502: <html>Bad Gateway</html>"), (b"", "HTTP 502"),
    (b'{"detail":"Not Found"}', 'HTTP 502: {"detail": "Not Found"}'),
    (b'{"error": "text"}', 'HTTP 502: {"error": "text"}'),
    (b'{"error": {"code": 500}}', "the server gave no reason"), (b"\xff\xfe", "HTTP 502: \ufffd\ufffd")])
def test_an_error_without_the_envelope_is_told_as_it_is(client: Any, body: bytes, message: str) -> None:
    with Scripted([answer(502, body)]) as server, client(server.url) as sdk, pytest.raises(ServerError) as caught:
        sdk.chat_completion("m", HELLO)
    assert str(caught.value) == message


@pytest.mark.parametrize("other", [answer(body=b"<html>"), answer(body=b"[1]"), answer(body=b'{"data": 1}')])
def test_something_else_on_the_port_is_seen(client: Any, other: bytes) -> None:
    with (Scripted([other]) as server, client(server.url) as sdk,
          pytest.raises(BadAnswer, match="does vllm-server listen there")):
        sdk.models()


def test_no_answer_in_time_is_an_error_that_says_so(client: Any) -> None:
    with Scripted([None]) as server, client(server.url, timeout_s=0.05) as sdk, pytest.raises(TimedOut, match="0.05 s"):
        sdk.health()


# --- streams ----------------------------------------------------------------------------------------------------------

def test_a_stream_is_read_past_comments_and_however_it_is_split(client: Any) -> None:
    """Line separators of Unicode within the text end no line, a character may be cut in two, events may be empty."""
    events = (b": loading weights 40 %\n\n" + chunk("a\u2028b") + b"event: x\r\ndata: {\"choices\": []}\r\n\r\n"
              + 'data: {"choices":[{"delta":{"content":"é\u2028\u0085"}}]}\n\n'.encode() + b": ping\n\n" + END)
    pieces = [events[index:index + 1] for index in range(len(events))]
    with Scripted([stream(*pieces)]) as server, client(server.url) as sdk:
        assert list(sdk.chat_completion_stream("m", HELLO)) == ["a\u2028b", "é\u2028\u0085"]


def test_an_error_event_ends_the_stream_with_what_it_says(client: Any) -> None:
    failure = b'data: {"error": {"message": "the engine died", "type": "upstream_error", "code": 500}}\n\n'
    got = []
    with (Scripted([stream(chunk("a"), failure, END)]) as server, client(server.url) as sdk,
          pytest.raises(ServerError, match="the engine died") as caught):
        got.extend(sdk.chat_completion_stream("m", HELLO))
    assert (caught.value.code, caught.value.status) == ("500", None)


@pytest.mark.parametrize("cut", [stream(chunk("a")), stream(chunk("a"), whole=False)])
def test_a_cut_stream_is_no_answer(client: Any, cut: bytes) -> None:
    got = []
    with Scripted([cut]) as server, client(server.url) as sdk, pytest.raises(StreamBroken):
        for piece in sdk.chat_completion_stream("m", HELLO):
            got.append(piece)
    assert got == ["a"] and len(server.requests) == 1


@pytest.mark.parametrize("events", [b"data: {oops\n\n", b"data: [1]\n\n"])
def test_a_stream_of_something_else_is_broken(client: Any, events: bytes) -> None:
    with (Scripted([stream(events)]) as server, client(server.url) as sdk,
          pytest.raises(StreamBroken, match="something else")):
        list(sdk.completion_stream("m", "Hello"))


def test_a_plain_answer_is_no_stream(client: Any) -> None:
    with Scripted([GOOD]) as server, client(server.url) as sdk, pytest.raises(BadAnswer, match="application/json"):
        list(sdk.chat_completion_stream("m", HELLO))


def test_a_stream_that_falls_silent_is_given_up(client: Any) -> None:
    class Silent(Scripted):
        def _answer(self, connection: socket.socket, each: bytes | None) -> None:
            super()._answer(connection, each)
            self._done.wait()

    got = []
    with (Silent([stream(chunk("a"), whole=False)]) as server, client(server.url, timeout_s=0.2) as sdk,
          pytest.raises(TimedOut, match="brought nothing")):
        for piece in sdk.chat_completion_stream("m", HELLO):
            got.append(piece)
    assert got == ["a"]


def test_streaming_is_asked_for_by_the_methods_name(client: Any) -> None:
    with client("http://127.0.0.1:1") as sdk, pytest.raises(TypeError, match="chat_completion_stream"):
        sdk.chat_completion("m", HELLO, stream=True)


# --- where it goes ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("given_url", "environ", "url"), [
    (None, {}, "http://127.0.0.1:5000"), (None, {"VLLM_SERVER_URL": "http://box:1"}, "http://box:1"),
    ("http://localhost:8080", {"VLLM_SERVER_URL": "http://box:1"}, "http://localhost:8080"),
    ("http://box:5000/v1/", {}, "http://box:5000"), ("https://box/gpu/", {}, "https://box/gpu")])
def test_the_address_is_the_arguments_else_the_environments(given_url: str | None, environ: dict[str, str],
                                                           url: str) -> None:
    assert calls.address(given_url, None, environ).url == url


@pytest.mark.parametrize("url", ["localhost:5000", "ftp://box", "http://", "box"])
def test_what_is_no_address_is_said_to_be_none(url: str) -> None:
    with pytest.raises(ValueError, match="http://127.0.0.1:5000"):
        VLLMProxyClient(url)


def test_a_key_comes_from_the_environment_and_is_sent_as_bearer() -> None:
    assert calls.address(None, None, {"VLLM_SERVER_API_KEY": "k"}).headers == {"Authorization": "Bearer k"}
    assert calls.address(None, "mine", {"VLLM_SERVER_API_KEY": "k"}).headers == {"Authorization": "Bearer mine"}
    assert calls.address(None, "", {"VLLM_SERVER_API_KEY": "k"}).headers == {}


def test_a_proxy_does_not_stand_between_this_machine_and_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    with Scripted([GOOD]) as server, VLLMProxyClient(server.url) as sdk:
        assert sdk.health()["status"] == "ok"
    assert calls.address("http://box", None).trust_env


def test_names_stay_one_segment_of_the_path() -> None:
    assert calls.instance("a?b#c").path == "/instances/a%3Fb%23c"
    sent: list[str] = []

    def keep(request: httpx.Request) -> httpx.Response:
        sent.append(request.url.raw_path.decode())
        return httpx.Response(200, json={})

    with VLLMProxyClient(transport=httpx.MockTransport(keep)) as sdk:
        sdk.model("Qwen/Qwen3-0.6B")
        sdk.stop_instance("a b", force=True)
    assert sent == ["/v1/models/Qwen/Qwen3-0.6B", "/instances/a%20b?force=1"]


# --- both forms -------------------------------------------------------------------------------------------------------

def methods(kind: type) -> dict[str, Any]:
    return {name: inspect.signature(one) for name, one in vars(kind).items() if not name.startswith("_")}


def test_both_forms_have_the_same_methods() -> None:
    sync, other = methods(VLLMProxyClient), methods(AsyncVLLMProxyClient)
    assert len(sync) > 15
    assert {name: one.parameters for name, one in sync.items()} == {name: one.parameters for name, one in other.items()}
    assert all(inspect.getdoc(getattr(VLLMProxyClient, name)) for name in ("chat_completion_stream", "logs"))


def test_the_sdk_knows_nothing_of_the_daemon() -> None:
    files = list((CHECKOUT / "client").rglob("*.py"))
    ours = {path.stem for path in CHECKOUT.glob("*.py")} | {
        path.name for path in CHECKOUT.iterdir() if path.is_dir() and (path / "__init__.py").exists()} - {"client"}
    assert len(files) > 8 and {"config", "instances"} <= ours
    reached = {(path.name, module) for path in files for module in imported_by(path)}
    assert {pair for pair in reached if pair[1].partition(".")[0] in ours} == set()
    assert ("client.py", "vllm_server_client.transport") in reached     # else this test has lost its sight
