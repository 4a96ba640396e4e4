"""The simulator as a proxy sees it: who waits, the bytes of its answers, its routes, and the SDKs that read them."""

from __future__ import annotations

import asyncio
import base64
import json
import socket
import struct
from pathlib import Path
from typing import Any

import pytest
import requests

from tests.simulator_harness import CHAT, FOR_EVER, Launch, Simulator, events, launch, read_all, read_until, server
from tests.support import wait_until

__all__ = ["launch", "server"]          # fixtures


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
    simulator = launch(sim={"tokens_per_s": 1 / 3600, "tokens": 8}, VLLM_SERVER_DEV_MODE="1").ready()
    body = json.dumps({**CHAT, "stream": True}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\ncontent-type: application/json\r\nconnection: close\r\n" \
           f"content-length: {len(body)}\r\n\r\n".encode()

    async def one() -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", simulator.port)
        writer.write(head + body)
        data = await reader.read()
        writer.close()
        await writer.wait_closed()
        return data

    async def everything() -> list[bytes]:
        tasks = [asyncio.create_task(one()) for _ in range(500)]
        await asyncio.to_thread(wait_until, lambda: simulator.gauge("num_requests_running") == 500)
        simulator.post("/sim", {"tokens_per_s": 20})
        return await asyncio.gather(*tasks)

    answers = asyncio.run(everything())
    assert all(answer.count(b"token") >= 8 and b"data: [DONE]\n\n\r\n0\r\n\r\n" in answer for answer in answers)
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
    with socket.create_connection(("127.0.0.1", simulator.port), timeout=120) as client:
        client.sendall(b"GET /version HTTP/1.1\r\n\r\n" * 3)
        assert read_all(client).count(b'{"version":"0.32.0"}') == 3     # and then the server closed it


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


# --- the SDKs -----------------------------------------------------------------------------------------------------

@pytest.mark.whole
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
