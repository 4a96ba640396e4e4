"""The data plane with the whole daemon: requests find their engine, and bytes pass unchanged in both directions."""

from __future__ import annotations

import http.client
import json
import re
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from tests.daemon import CHECKOUT, JSON, Answer, Daemon, events
from tests.support import wait_until

CHAT = [{"role": "user", "content": "hello there"}]


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """With dev mode on, so that what must not be reachable is there, and an engine's knobs can be turned."""
    with Daemon(tmp_path_factory.mktemp("daemon"), {
            "VLLM_SERVER_DEV_MODE": "1", "DRAIN_TIMEOUT": "0.2", "STOP_TIMEOUT": "5"},
            patch={"instances.instance.BACKOFF_LIMIT_S": 0.05}) as daemon:
        yield daemon


@pytest.fixture(scope="module")
def engines(daemon: Daemon) -> dict[str, dict[str, Any]]:
    """One of each kind of runner, under the name of the kind."""
    with ThreadPoolExecutor(3) as pool:
        made = {name: pool.submit(daemon.create, model, params={"served_model_name": [name, f"{name}-alias"]})
                for name, model in (("generate", "org/llama"), ("pooling", "org/bert"), ("sound", "org/whisper"))}
        return {name: one.result() for name, one in made.items()}


@pytest.fixture
def generate(daemon: Daemon, engines: dict[str, dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The generating one, as it was made."""
    yield engines["generate"]
    daemon.turn_knobs(engines["generate"], tokens_per_s=200, first_token_s=0, tokens=16, hang=False)


def steady(body: bytes) -> bytes:
    """Without what differs from answer to answer."""
    return re.sub(rb'"(id|item_id|created|created_at)":("[^"]*"|\d+)', rb'"\1":0', body)


def kept(headers: Any) -> dict[str, str]:
    """The headers that are the engine's: not of the hop, nor of the moment."""
    return {name.lower(): value for name, value in headers.items()
            if name.lower() not in ("connection", "keep-alive", "transfer-encoding", "date", "server",
                                    "x-request-id")}


# --- every route --------------------------------------------------------------------------------------------------

BY_JSON: dict[str, tuple[str, dict[str, Any]]] = {
    "/v1/chat/completions": ("generate", {"messages": CHAT}),
    "/v1/chat/completions/batch": ("generate", {"messages": [CHAT, CHAT]}),
    "/v1/completions": ("generate", {"prompt": "x"}),
    "/v1/responses": ("generate", {"input": "x"}),
    "/v1/messages": ("generate", {"messages": CHAT, "max_tokens": 3}),
    "/v1/messages/count_tokens": ("generate", {"messages": CHAT}),
    "/tokenize": ("generate", {"prompt": "a b"}),
    "/detokenize": ("generate", {"tokens": [1, 2]}),
    "/invocations": ("generate", {"messages": CHAT}),
    "/v1/embeddings": ("pooling", {"input": "x"}),
    "/v2/embed": ("pooling", {"texts": ["x"], "embedding_types": ["float"]}),
    "/pooling": ("pooling", {"input": "x"}),
    "/classify": ("pooling", {"input": "x"}),
    "/score": ("pooling", {"text_1": "x", "text_2": ["y", "z"]}),
    "/v1/score": ("pooling", {"text_1": "x", "text_2": "y"}),
    "/rerank": ("pooling", {"query": "x", "documents": ["y", "x"]}),
    "/v1/rerank": ("pooling", {"query": "x", "documents": ["y", "x"]}),
    "/v2/rerank": ("pooling", {"query": "x", "documents": ["y", "x"]}),
}


@pytest.mark.parametrize("path", BY_JSON)
@pytest.mark.parametrize("suffix", ["", "-alias"])
def test_routes_by_json(daemon: Daemon, engines: dict[str, dict[str, Any]], path: str, suffix: str) -> None:
    name, fields = BY_JSON[path]
    body = {"model": name + suffix, **fields}
    through, direct = daemon.post(path, body), daemon.call("POST", path, body, port=engines[name]["port"])
    assert through.status == direct.status == 200
    assert steady(through.body) == steady(direct.body)
    assert {**kept(through.headers), "content-length": ""} == {**kept(direct.headers), "content-length": ""}


@pytest.mark.parametrize("path", ["/v1/audio/transcriptions", "/v1/audio/translations"])
@pytest.mark.parametrize("stream", ["false", "true"])
def test_routes_by_form(daemon: Daemon, engines: dict[str, dict[str, Any]], path: str, stream: str) -> None:
    parts = {"model": "sound", "stream": stream, 'file"; filename="a.wav': "\0\1\r\n--x\r\nRIFF" * 50}
    form = "".join(f'--xx\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'
                   for name, value in parts.items()).encode() + b"--xx--\r\n"
    kind = {"Content-Type": "multipart/form-data; boundary=xx"}
    through = daemon.post(path, form, kind)
    direct = daemon.call("POST", path, form, kind, port=engines["sound"]["port"])
    assert through.status == direct.status == 200
    assert steady(through.body) == steady(direct.body)
    assert (b"data: [DONE]" in through.body) is (stream == "true")


@pytest.mark.parametrize(("path", "model"), [("/v1/embeddings", "generate"), ("/v1/chat/completions", "pooling"),
                                             ("/v1/audio/transcriptions", "generate")])
def test_a_route_that_this_runner_lacks(daemon: Daemon, engines: dict[str, dict[str, Any]], path: str,
                                        model: str) -> None:
    answer = daemon.post(path, {"model": model, "input": "x", "messages": CHAT})
    assert (answer.status, answer.json) == (404, {"detail": "Not Found"})


def test_an_engines_own_errors_pass_unchanged(daemon: Daemon, generate: dict[str, Any]) -> None:
    for body in ({"model": "generate"}, {"model": "generate", "prompt": "x", "max_tokens": 10 ** 9},
                 {"model": "generate", "prompt": "x", "n": 0, "max_tokens": -5}):
        through, direct = (daemon.call("POST", "/v1/completions", body, port=port)
                           for port in (None, generate["port"]))
        assert (through.status, through.body) == (direct.status, direct.body) and direct.status == 400


def test_no_model_and_an_unknown_one(daemon: Daemon, engines: dict[str, dict[str, Any]]) -> None:
    for path in BY_JSON:
        missing = daemon.post(path, {"prompt": "x"})
        assert (missing.status, missing.error["param"], missing.error["code"]) == (400, "model", "missing_model")
        unknown = daemon.post(path, {"model": "other", "prompt": "x"})
        assert (unknown.status, unknown.error["param"], unknown.error["code"]) == (404, "model", "model_not_found")
        assert unknown.error["type"] == "NotFoundError"
        for name in ("'other'", "generate", "pooling-alias", "org/whisper", "POST /instances"):
            assert name in unknown.error["message"]


def test_models(daemon: Daemon, engines: dict[str, dict[str, Any]]) -> None:
    listed = daemon.get("/v1/models").json
    names = {f"{kind}{suffix}" for kind in engines for suffix in ("", "-alias")}
    assert {entry["id"] for entry in listed["data"]} == names | {"org/llama", "org/bert", "org/whisper"}
    assert {entry["status"] for entry in listed["data"]} == {"ready"}
    one = daemon.get("/v1/models/org/llama").json
    assert one["id"] == "org/llama" and one["instances"] == [{"id": engines["generate"]["id"], "status": "ready"}]
    assert daemon.get("/v1/models/org%2Fllama").json == one


# --- streams ------------------------------------------------------------------------------------------------------

STREAMED: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": CHAT, "stream_options": {"include_usage": True}},
    "/v1/completions": {"prompt": ["a", "b"], "n": 2},
    "/v1/responses": {"input": "x"},
    "/v1/messages": {"messages": CHAT, "max_tokens": 5},
}


@pytest.mark.parametrize("path", STREAMED)
def test_a_stream_is_what_the_engine_sent(daemon: Daemon, generate: dict[str, Any], path: str) -> None:
    body = {"model": "generate", "stream": True, **STREAMED[path]}
    with daemon.open("POST", path, body) as through, \
            daemon.open("POST", path, body, port=generate["port"]) as direct:
        assert through.status == direct.status == 200
        assert kept(through.headers) == kept(direct.headers)
        assert through.headers["transfer-encoding"] == direct.headers["transfer-encoding"] == "chunked"
        assert [steady(event) for event in events(through)] == [steady(event) for event in events(direct)]


def test_an_event_is_not_held_back_for_the_next(daemon: Daemon, generate: dict[str, Any]) -> None:
    """The second token comes after an hour."""
    daemon.turn_knobs(generate, tokens_per_s=1 / 3600)
    with daemon.open("POST", "/v1/completions", {"model": "generate", "prompt": "x", "stream": True}) as stream:
        assert b"simulated" in next(events(stream))
        assert daemon.instance(generate["id"])["in_flight"] == 1
    wait_until(lambda: daemon.instance(generate["id"])["in_flight"] == 0)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("begun", [True, False])
def test_a_client_that_leaves_ends_the_work(daemon: Daemon, generate: dict[str, Any], stream: bool,
                                            begun: bool) -> None:
    daemon.turn_knobs(generate, tokens_per_s=1 / 3600, first_token_s=0 if begun else 3600)
    body = json.dumps({"model": "generate", "prompt": "x", "stream": stream}).encode()
    client = daemon.socket()
    client.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                   b"Content-Length: %d\r\n\r\n%s" % (len(body), body))
    wait_until(lambda: daemon.gauge(generate) == 1)
    if stream and begun:
        received = b""
        while b"simulated" not in received:
            received += client.recv(65536)
    client.close()
    wait_until(lambda: daemon.gauge(generate) == 0)
    wait_until(lambda: daemon.instance(generate["id"])["in_flight"] == 0)


# --- a model that is loading --------------------------------------------------------------------------------------

def test_a_hundred_requests_for_a_loading_model(daemon: Daemon, engines: dict[str, dict[str, Any]]) -> None:
    """One start, and a good answer for each; half of them streams."""
    made = daemon.create("org/cold", sim={"start_s": 1}, wait=False)
    bodies = [{"model": "org/cold", "prompt": "x", "max_tokens": 3, "stream": number % 2 == 0}
              for number in range(100)]
    with ThreadPoolExecutor(100) as pool:
        answers = list(pool.map(lambda body: daemon.post("/v1/completions", body), bodies))
    assert {answer.status for answer in answers} == {200}
    for body, answer in zip(bodies, answers, strict=True):
        assert answer.body.count(b"token") >= 2 and (b"[DONE]" in answer.body) is body["stream"]
    after = daemon.instance(made["id"])
    assert (after["status"], after["restarts"], after["last_error"]) == ("ready", 0, None)
    assert daemon.gauge(after, "vllm:request_success_total") == 100
    wait_until(lambda: daemon.instance(made["id"])["in_flight"] == 0)
    assert [one["model_name"] for one in daemon.instances()].count("org/cold") == 1
    daemon.remove(made["id"])


def test_a_request_waits_no_longer_than_it_may(tmp_path: Path) -> None:
    with Daemon(tmp_path / "daemon", {"REQUEST_QUEUE_TIMEOUT": "0.2"}) as daemon:
        made = daemon.create("slow", sim={"start_s": 600}, wait=False)
        answer = daemon.post("/v1/completions", {"model": "slow", "prompt": "x"})
        assert (answer.status, answer.error["code"], answer.headers["retry-after"]) == (504, "queue_timeout", "10")
        assert "still loading" in answer.error["message"]
        assert daemon.status_of(made["id"]) == "starting"      # the start goes on


# --- the id of a response -----------------------------------------------------------------------------------------

def test_a_response_is_found_where_it_was_made(daemon: Daemon, engines: dict[str, dict[str, Any]]) -> None:
    replica = daemon.create("org/llama", params={"served_model_name": ["generate", "generate-alias"]}, new=True)
    asked = {"model": "generate", "input": "x"}
    made = [daemon.post("/v1/responses", asked).json for _ in range(4)]
    made += [json.loads(re.search(rb'"response":(\{.*\}),"seq', daemon.post("/v1/responses", asked | {
        "stream": True}).body)[1])]     # type: ignore[index]
    # Some that the daemon has not seen being made.
    for port in (replica["port"], engines["generate"]["port"]):
        made.append(daemon.call("POST", "/v1/responses", asked, port=port).json)
    for response in made:
        found = daemon.get(f"/v1/responses/{response['id']}")
        assert (found.status, found.json["id"]) == (200, response["id"])
    background = daemon.post("/v1/responses", asked | {"background": True, "max_output_tokens": 30_000}).json
    cancelled = daemon.post(f"/v1/responses/{background['id']}/cancel")
    assert (cancelled.status, cancelled.json["status"]) == (200, "cancelled")
    unknown = daemon.get("/v1/responses/resp_unknown")
    assert (unknown.status, unknown.error["code"], unknown.error["param"]) == (404, "response_not_found",
                                                                             "response_id")
    daemon.remove(replica["id"])


# --- straight to an instance --------------------------------------------------------------------------------------

def test_proxy(daemon: Daemon, engines: dict[str, dict[str, Any]]) -> None:
    for engine in engines.values():
        assert daemon.get(f"/proxy/{engine['id']}/version").json == {"version": "0.32.0"}
        assert engine["aliases"][0] in daemon.get(f"/proxy/{engine['id']}/v1/models").body.decode()
        assert b"vllm:num_requests_running" in daemon.get(f"/proxy/{engine['id']}/metrics").body
    answer = daemon.post(f"/proxy/{engines['generate']['id']}/v1/completions", {"model": "generate", "prompt": "x"})
    assert answer.status == 200
    other = daemon.post(f"/proxy/{engines['pooling']['id']}/v1/completions", {"model": "generate", "prompt": "x"})
    assert (other.status, other.json) == (404, {"detail": "Not Found"})
    head = daemon.call("HEAD", f"/proxy/{engines['generate']['id']}/health")
    assert (head.status, head.body) == (405, b"")       # the engine's own answer
    assert daemon.get("/proxy/ffffffff/health").error["code"] == "instance_not_found"


SPELLINGS = ["sleep", "/sleep", "//sleep", "SLEEP", "sleep/", "%73leep", "%2573leep", "x/../sleep", "./sleep",
             "v1/..%2fsleep", "v1/%2e%2e/sleep", "sleep?level=1", "sleep;x", "sleep%3b", "sleep%00", "sleep%20",
             "%0asleep", "sleep%09", "..%5csleep", "v1%5c..%5csleep", "%252e%252e/sleep", "x%2f..%2fsleep",
             "sleep%2f", "%2fsleep", "wake_up", "is_sleeping", "server_info", "collective_rpc", "sim", "pause",
             "reset_prefix_cache"]


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_development_routes_are_out_of_reach(daemon: Daemon, generate: dict[str, Any], spelling: str) -> None:
    for method in ("POST", "GET"):
        received = daemon.raw(f"{method} /proxy/{generate['id']}/{spelling} HTTP/1.1\r\nHost: localhost\r\n"
                              "Content-Length: 0\r\nConnection: close\r\n\r\n".encode())
        assert received.split()[1] in (b"403", b"400", b"404"), received
        assert b'{"error":{"message":' in received, "refused here, not by the engine"
    assert daemon.call("GET", "/is_sleeping", port=generate["port"]).json == {"is_sleeping": False}


# --- engines that die ---------------------------------------------------------------------------------------------

def test_a_stream_whose_server_dies_is_cut_visibly_and_the_engine_restarts(daemon: Daemon) -> None:
    made = daemon.create("org/dying", sim={"die_after_chunks": 3, "tokens_per_s": 100})
    with daemon.open("POST", "/v1/completions", {"model": "org/dying", "prompt": "x", "stream": True}) as stream:
        body = b""
        with pytest.raises(http.client.IncompleteRead):
            while piece := stream.read1(65536):
                body += piece
            stream.read()
    assert body.count(b"data: {") >= 3 and b"[DONE]" not in body
    assert b'"error"' in body.split(b"\n\n")[-2]       # the last event says why
    wait_until(lambda: daemon.instance(made["id"])["restarts"] == 1)
    wait_until(lambda: daemon.status_of(made["id"]) == "ready")
    assert daemon.instance(made["id"])["last_error"]["code"] == "engine_died"
    plain = daemon.post("/v1/completions", {"model": "org/dying", "prompt": "x"})
    assert (plain.status, plain.error["code"]) == (502, "engine_died")
    daemon.remove(made["id"])


def test_death_of_the_engine_core_is_told_by_the_server_and_healed(daemon: Daemon) -> None:
    others = set(daemon.engine_processes())
    made = daemon.create("org/core", sim={"die_engine_after_chunks": 3, "tokens_per_s": 100})
    first = set(daemon.engine_processes()) - others
    stream = daemon.post("/v1/completions", {"model": "org/core", "prompt": "x", "stream": True})
    assert stream.status == 200
    assert b"EngineCore encountered an issue" in stream.body and stream.body.endswith(b"data: [DONE]\n\n")
    wait_until(lambda: daemon.instance(made["id"])["restarts"] >= 1 and daemon.status_of(made["id"]) == "ready")
    short = daemon.post("/v1/completions", {"model": "org/core", "prompt": "x", "max_tokens": 2})
    assert short.status == 200
    assert first and not first & set(daemon.engine_processes()), "orphans"
    daemon.remove(made["id"])


# --- exact bytes, with an engine that shows what reached it ---------------------------------------------------------

KEYS = {"API_KEYS": "user-key", "ADMIN_API_KEYS": "admin-key"}
ADMIN, USER = {"Authorization": "Bearer admin-key"}, {"Authorization": "Bearer user-key"}


@pytest.fixture(scope="module")
def echo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    with Daemon(tmp_path_factory.mktemp("echo"), KEYS,
                command=f"{sys.executable} {CHECKOUT / 'tests/echo_engine.py'}") as daemon:
        answer = daemon.post("/instances", {"model_name": "m", "wait": True}, ADMIN)
        assert answer.status == 201
        yield daemon


@pytest.mark.parametrize(("path", "open_"), [
    ("/health", True), ("/ping", True), ("/version", True), ("/v1/models", False), ("/nothing", False)])
def test_what_is_open(echo: Daemon, path: str, open_: bool) -> None:
    answer = echo.get(path)
    assert answer.status == 200 if open_ else (answer.status, answer.error["code"]) == (401, "invalid_api_key")


def test_keys_open_their_own_doors_only(echo: Daemon) -> None:
    instance_id = echo.get("/instances", ADMIN).json["data"][0]["id"]
    managed = [("GET", "/instances"), ("POST", "/instances"), ("DELETE", f"/instances/{instance_id}"),
               ("GET", f"/instances/{instance_id}/logs"), ("GET", "/gpus"), ("POST", "/admin/reload"),
               ("POST", "/v1/load_lora_adapter"), ("POST", f"/proxy/{instance_id}/v1/load_lora_adapter")]
    for method, path in managed:
        for headers in ({}, USER, {"Authorization": "Bearer admin-keyx"}, {"X-Api-Key": "user-key"}):
            refused = echo.call(method, path, headers=headers)
            assert (refused.status, refused.error["type"]) == (401, "authentication_error"), (method, path)
            assert refused.headers["www-authenticate"] == "Bearer"
    for path in ("/v1/completions", "/tokenize", f"/proxy/{instance_id}/v1/completions"):
        body = {"model": "m"}
        assert echo.post(path, body).status == 401
        assert echo.post(path, body, {"Authorization": "Bearer wrong"}).status == 401
        for headers in (USER, ADMIN, {"X-Api-Key": "user-key"}):
            assert echo.post(path, body, headers).status == 200
    crossing = echo.get("/instances", ADMIN | {"Origin": "http://evil.example"})
    assert (crossing.status, crossing.error["code"]) == (403, "cross_origin")


def test_keys_and_what_belongs_to_the_hop_are_not_forwarded(echo: Daemon) -> None:
    sent = {"Authorization": "Bearer user-key", "X-Api-Key": "user-key", "Connection": "close, X-Hop", "X-Hop": "1",
            "Keep-Alive": "timeout=5", "TE": "trailers", "Proxy-Authorization": "Basic eA==", "X-Request-Id": "abc",
            "User-Agent": "me/1", "Accept": "*/*", "Cookie": "a=1; b=2", "Traceparent": "00-1"}
    body = b'{"model": "m",   "prompt": "\xc3\xa9\\u00e9"}  '
    got = echo.post("/v1/completions?api-version=1&x=%20y", body, JSON | sent)
    head, _, received = got.body.partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    assert first == "POST /v1/completions?api-version=1&x=%20y HTTP/1.1"
    assert received == body
    assert b"user-key" not in got.body
    assert not {"authorization", "x-api-key", "x-hop", "keep-alive", "te", "proxy-authorization"} & headers.keys()
    assert headers["content-length"] == str(len(body)) and headers["host"].startswith("127.0.0.1:")
    assert {name: headers[name] for name in ("x-request-id", "user-agent", "accept", "cookie", "traceparent",
                                             "content-type")} == {
        "x-request-id": "abc", "user-agent": "me/1", "accept": "*/*", "cookie": "a=1; b=2", "traceparent": "00-1",
        "content-type": "application/json"}


@pytest.mark.parametrize("path", ["/v1/a%20b", "/x/%E4%BD%A0", "/a%2fb", "/a%3Fb", "/a+b", "/a%25b",
                                  "/$&'()*,;=:@!~-_."])
def test_a_path_goes_on_as_it_came(echo: Daemon, path: str) -> None:
    instance_id = echo.get("/instances", ADMIN).json["data"][0]["id"]
    got = echo.get(f"/proxy/{instance_id}{path}?q=%2F&q=+", USER).body.split()[1].decode()
    assert got.partition("?")[2] == "q=%2F&q=+"
    # One spelling of many: what must be escaped is, and nothing changes its meaning.
    assert got.partition("?")[0] in (path, path.replace("%2f", "/"), quote(path, safe="/%"))


ANSWERS = {
    "an error of its own": "HTTP/1.1 418 I'm a teapot\r\nContent-Type: text/plain\r\nX-Own: 1\r\n"
                           "Content-Length: 5\r\n\r\nshort",
    "headers that come twice": "HTTP/1.1 200 OK\r\nSet-Cookie: a=1\r\nSet-Cookie: b=2\r\nContent-Length: 2\r\n\r\nok",
    "no content": "HTTP/1.1 204 No Content\r\nX-Own: 1\r\n\r\n",
    "not modified": "HTTP/1.1 304 Not Modified\r\nETag: x\r\n\r\n",
    "no length": "HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nConnection: close\r\n\r\nuntil the end",
    "chunks": "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n",
    "compressed": "HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 4\r\n\r\n\x1f\x8b\xff\x00",
    "retry": "HTTP/1.1 503 Service Unavailable\r\nRetry-After: 7\r\nContent-Length: 2\r\n\r\n{}",
    "any bytes": "HTTP/1.1 200 OK\r\nContent-Length: 256\r\n\r\n" + "".join(map(chr, range(256))),
    "a redirect": "HTTP/1.1 307 Temporary Redirect\r\nLocation: /elsewhere\r\nContent-Length: 0\r\n\r\n",
    "empty": "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n",
}


@pytest.mark.parametrize("answer", ANSWERS.values(), ids=ANSWERS)
def test_an_answer_comes_back_as_it_was(echo: Daemon, answer: str) -> None:
    head, _, body = answer.partition("\r\n\r\n")
    status, *lines = head.split("\r\n")
    with echo.open("POST", "/v1/completions", {"model": "m", "answer": answer}, USER) as got:
        received = got.read()
        assert got.status == int(status.split()[1])
        expected = [tuple(line.split(": ", 1)) for line in lines]
        own = [pair for pair in got.getheaders()
               if pair[0].lower() not in ("connection", "date", "server", "x-request-id")]
        assert [pair for pair in own if pair[0] != "Transfer-Encoding"] == [
            pair for pair in expected if pair[0] not in ("Connection", "Transfer-Encoding")]
    assert received == (b"abcde" if "chunked" in answer else body.encode("latin-1"))


BROKEN = [
    pytest.param("", id="nothing at all"), pytest.param("SSH-2.0-x\r\n\r\n", id="no HTTP"),
    pytest.param("HTTP/1.1 200 OK\r\nContent-Le", id="half of a head"),
    pytest.param("HTTP/1.1 200 OK\r\nX-Own: 1\r\n", id="a head without its end")]


@pytest.mark.parametrize("answer", BROKEN)
def test_an_answer_that_is_none(echo: Daemon, answer: str) -> None:
    got = echo.post("/v1/completions", {"model": "m", "answer": answer}, USER)
    assert got.status == 502 and got.error["type"] == "upstream_error"


CUT = {
    "a short body": "HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nshort",
    "no last chunk": "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n",
    "half of a chunk": "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n9\r\nabc",
    "half of an event": "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
                        "9\r\ndata: {\"a\r\n",
}


@pytest.mark.parametrize("answer", CUT.values(), ids=CUT)
def test_an_answer_that_is_cut_is_cut_for_the_client_too(echo: Daemon, answer: str) -> None:
    with echo.open("POST", "/v1/completions", {"model": "m", "answer": answer}, USER) as got:
        assert got.status == 200
        with pytest.raises((http.client.IncompleteRead, ConnectionResetError)):
            got.read()


def test_a_large_body_passes_whole(echo: Daemon) -> None:
    body = json.dumps({"image": "a" * 5_000_000, "model": "m"}).encode()
    got: Answer = echo.post("/v1/chat/completions", body, JSON | USER)
    assert got.body.partition(b"\r\n\r\n")[2] == body
