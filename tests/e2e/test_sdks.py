"""Two models at once behind one address, spoken with as their users do: openai, anthropic, plain HTTP."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import anthropic
import openai
import pytest

from tests.support import wait_until

from .conftest import Models
from .real_daemon import ENDLESS, RealDaemon

GREEDY: Any = {"temperature": 0, "max_tokens": 12}
HELLO: Any = [{"role": "user", "content": "A small model"}]


@pytest.fixture
def served(daemon: RealDaemon, models: Models) -> RealDaemon:
    daemon.ready(models.tiny, models.bert)
    return daemon


@pytest.fixture
def client(served: RealDaemon) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"http://127.0.0.1:{served.port}/v1", api_key="none", max_retries=0,
                       http_client=openai.DefaultHttpxClient(trust_env=False)) as client:
        yield client


@pytest.fixture
def claude(served: RealDaemon) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=f"http://127.0.0.1:{served.port}", api_key="none", max_retries=0,
                             http_client=anthropic.DefaultHttpxClient(trust_env=False)) as client:
        yield client


# --- openai -------------------------------------------------------------------------------------------------------

def test_openai_chat(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model="tiny", messages=HELLO, **GREEDY)
    assert whole.model == "tiny" and whole.usage is not None and whole.usage.completion_tokens == 12
    pieces = list(client.chat.completions.create(model="tiny", messages=HELLO, stream=True, **GREEDY))
    assert len(pieces) > 6      # came in pieces
    streamed = "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices)
    assert streamed == whole.choices[0].message.content != ""
    assert pieces[-1].choices[0].finish_reason == "length"


def test_openai_completions(client: openai.OpenAI) -> None:
    whole = client.completions.create(model="tiny", prompt="A small", **GREEDY)
    assert whole.choices[0].text == " model knows little and answers with words of its own. A"
    pieces = list(client.completions.create(model="tiny", prompt="A small", stream=True, **GREEDY))
    assert len(pieces) > 6
    assert "".join(piece.choices[0].text for piece in pieces) == whole.choices[0].text


def test_openai_completions_async_and_at_once(served: RealDaemon) -> None:
    async def ask() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{served.port}/v1", api_key="none", max_retries=0,
                                      http_client=openai.DefaultAsyncHttpxClient(trust_env=False)) as client:
            async def streamed() -> str:
                return "".join([piece.choices[0].text async for piece in await client.completions.create(
                    model="tiny", prompt="A small", stream=True, **GREEDY)])

            async def embedded() -> str:
                found = await client.embeddings.create(model="bert", input="A small model")
                return f"{len(found.data[0].embedding)} dimensions"
            return list(await asyncio.gather(*(streamed() for _ in range(8)), embedded()))

    *texts, vector = asyncio.run(ask())
    assert set(texts) == {" model knows little and answers with words of its own. A"}
    assert vector == "128 dimensions"


def test_openai_embeddings(client: openai.OpenAI, served: RealDaemon) -> None:
    texts = ["A small model", "Every request finds the model"]
    found = client.embeddings.create(model="bert", input=texts)
    assert found.model == "bert" and [entry.index for entry in found.data] == [0, 1]
    assert found.data[0].embedding != found.data[1].embedding
    # the SDK asks for base64; as plain numbers it is the same vector
    plain = served.post("/v1/embeddings", {"model": "bert", "input": texts[0]}).json["data"][0]["embedding"]
    assert found.data[0].embedding == pytest.approx(plain, rel=1e-3, abs=1e-4)


def test_openai_responses(client: openai.OpenAI) -> None:
    whole = client.responses.create(model="tiny", input="A small model", max_output_tokens=12, temperature=0)
    assert whole.output_text
    events = list(client.responses.create(model="tiny", input="A small model", max_output_tokens=12, temperature=0,
                                          stream=True))
    assert events[0].type == "response.created"
    streamed = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert streamed == whole.output_text
    # names no model: the daemon knows which instance made it
    again = client.responses.retrieve(whole.id)
    assert (again.id, again.output_text) == (whole.id, whole.output_text)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve("resp_0123456789abcdef")


def test_openai_models(client: openai.OpenAI, models: Models) -> None:
    listed = {model.id for model in client.models.list()}
    assert {"tiny", "bert", str(models.tiny.folder), str(models.bert.folder)} <= listed
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("no-such-model")


def test_openai_unknown_model_names_those_that_are_there(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="no-such-model", messages=HELLO)
    assert caught.value.code == "model_not_found" and "tiny" in caught.value.message


# --- anthropic ----------------------------------------------------------------------------------------------------

def test_anthropic_messages(claude: anthropic.Anthropic) -> None:
    question: Any = {"model": "tiny", "max_tokens": 12, "messages": HELLO, "extra_body": {"temperature": 0}}
    whole = claude.messages.create(**question)
    assert whole.stop_reason == "max_tokens" and whole.usage.output_tokens == 12
    with claude.messages.stream(**question) as stream:
        streamed = "".join(stream.text_stream)
    assert streamed == whole.content[0].text != ""


def test_anthropic_count_tokens(claude: anthropic.Anthropic) -> None:
    assert claude.messages.count_tokens(model="tiny", messages=HELLO).input_tokens > 0


# --- plain HTTP ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("model", ["tiny", "bert"])
def test_tokenize_and_back(served: RealDaemon, model: str) -> None:
    prompt = {"model": model, "prompt": "small model", "add_special_tokens": False}
    tokens = served.post("/tokenize", prompt).json["tokens"]
    assert tokens
    back = served.post("/detokenize", {"model": model, "tokens": tokens})
    assert back.status == 200 and back.json["prompt"].strip() == "small model"


@pytest.mark.parametrize("path", ["/rerank", "/v1/rerank", "/v2/rerank"])
def test_rerank(served: RealDaemon, path: str) -> None:
    documents = ["The engine reads your words", "A small model knows little", "One address"]
    answer = served.post(path, {"model": "bert", "query": "A small model knows little", "documents": documents})
    assert answer.status == 200
    assert answer.json["results"][0]["document"]["text"] == documents[1]
    assert sorted(result["index"] for result in answer.json["results"]) == [0, 1, 2]


@pytest.mark.parametrize("path", ["/score", "/v1/score"])
def test_score(served: RealDaemon, path: str) -> None:
    answer = served.post(path, {"model": "bert", "text_1": "A small model", "text_2": ["A small model", "One address"]})
    assert answer.status == 200
    same, other = (entry["score"] for entry in answer.json["data"])
    assert same == pytest.approx(1, abs=1e-3) and other < same


def test_pooling(served: RealDaemon) -> None:
    answer = served.post("/pooling", {"model": "bert", "input": "A small model"})
    assert answer.status == 200 and answer.json["data"][0]["data"]


def test_messages(served: RealDaemon) -> None:
    answer = served.post("/v1/messages", {"model": "tiny", "max_tokens": 4, "messages": HELLO})
    assert answer.status == 200 and answer.json["type"] == "message"


def test_one_instance_by_its_id(served: RealDaemon, models: Models) -> None:
    (tiny,) = served.ready(models.tiny)
    assert "vllm:" in served.get(f"/proxy/{tiny['id']}/metrics").body.decode()


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_ends_its_request_in_the_engine(served: RealDaemon, models: Models, stream: bool) -> None:
    (tiny,) = served.ready(models.tiny)
    before = served.gauge(tiny, "vllm:generation_tokens_total")
    with served.sent("/v1/completions", {"model": "tiny", "prompt": "a", "max_tokens": ENDLESS, "stream": stream}):
        wait_until(lambda: served.gauge(tiny) == 1)
    wait_until(lambda: served.gauge(tiny) == 0)
    assert served.gauge(tiny, "vllm:generation_tokens_total") < before + ENDLESS    # it did not just come to its end
    wait_until(lambda: served.instance(tiny["id"])["in_flight"] == 0)


# --- vLLM's own errors pass unchanged -----------------------------------------------------------------------------

@pytest.mark.parametrize(("path", "body", "status"), [
    ("/v1/chat/completions", {"model": "tiny", "messages": HELLO, "temperature": -3}, 400),
    ("/v1/completions", {"model": "tiny", "prompt": "a", "max_tokens": "many"}, 400),
    ("/v1/completions", {"model": "tiny", "prompt": "a", "max_tokens": 10**6}, 400),
    ("/v1/chat/completions", {"model": "tiny"}, 400),
    ("/v1/embeddings", {"model": "tiny", "input": "a"}, 404),       # a route that this runner lacks
    ("/v1/chat/completions", {"model": "bert", "messages": HELLO}, 404),
])
def test_errors_of_the_engine_pass_unchanged(served: RealDaemon, models: Models, path: str, body: dict[str, object],
                                             status: int) -> None:
    (instance,) = served.ready(models.tiny if body["model"] == "tiny" else models.bert)
    direct = served.call("POST", path, body, port=instance["port"])
    through = served.post(path, body)
    assert (through.status, through.body) == (direct.status, direct.body)
    assert through.headers["content-type"] == direct.headers["content-type"]
    assert through.status == status
    assert status != 404 or json.loads(through.body) == {"detail": "Not Found"}
