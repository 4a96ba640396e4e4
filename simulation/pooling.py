"""The routes of a pooling model, and those that read text or sound without generating: tokens and transcriptions."""

from __future__ import annotations

import base64
import math
import struct
import zlib
from collections.abc import AsyncGenerator
from typing import Any

from simulation.engine import EngineDead
from simulation.http import EventStream, Request, Response
from simulation.service import (
    DONE,
    ApiError,
    Service,
    count_tokens,
    dead_event,
    event,
    json_response,
    need,
    new_id,
    now,
    read_json,
    stream,
    text_of,
    usage,
)

DIMENSIONS = 16


def vector(text: str, dimensions: int) -> list[float]:
    """A unit vector that depends on the text alone."""
    state = zlib.crc32(text.encode()) or 1
    values = []
    for _ in range(dimensions):
        state = (state * 1103515245 + 12345) % (1 << 31)
        values.append(state / (1 << 30) - 1)
    length = math.sqrt(sum(value * value for value in values)) or 1.0
    return [value / length for value in values]


def score(query: str, text: str) -> float:
    """Between 0 and 1, higher for a text that shares words with the query."""
    common = set(query.lower().split()) & set(text.lower().split())
    return round((len(common) + 0.5 + zlib.crc32(text.encode()) / (1 << 33)) / (len(query.split()) + 2), 6)


def texts_of(value: Any) -> list[str]:
    """The inputs of a request: a text, texts, tokens, or lists of tokens."""
    if isinstance(value, list):
        if value and isinstance(value[0], int):
            return [str(value)]
        return [text_of(item) or str(item) for item in value]
    return [text_of(value)]


async def _pass(service: Service, body: dict[str, Any], texts: list[str]) -> tuple[str, int]:
    """One pass of the engine over the texts.  The model's name and the number of tokens."""
    model = service.model_of(body)
    tokens = sum(count_tokens(text) for text in texts)
    service.engine.check_admission()
    await service.engine.compute(tokens)
    return model, tokens


async def embeddings(service: Service, request: Request) -> Response:
    body = read_json(request)
    texts = texts_of(body["messages"] if "messages" in body else need(body, "input", (str, list), "string"))
    model, tokens = await _pass(service, body, texts)
    dimensions = body.get("dimensions") or DIMENSIONS
    packed = body.get("encoding_format") == "base64"
    data = [{"index": index, "object": "embedding", "embedding": _packed(values) if packed else values}
            for index, values in enumerate(vector(text, dimensions) for text in texts)]
    return json_response({"id": new_id("embd"), "object": "list", "created": now(), "model": model, "data": data,
                          "usage": usage(tokens, 0)})


def _packed(values: list[float]) -> str:
    return base64.b64encode(struct.pack(f"<{len(values)}f", *values)).decode()


async def embed_v2(service: Service, request: Request) -> Response:
    body = read_json(request)
    texts = texts_of(need(body, "texts", list, "list"))
    _, tokens = await _pass(service, body, texts)
    return json_response({"id": new_id("embd"), "texts": texts,
                          "embeddings": {"float": [vector(text, DIMENSIONS) for text in texts]},
                          "meta": {"api_version": {"version": "2"}, "billed_units": {"input_tokens": tokens}}})


async def pooling(service: Service, request: Request) -> Response:
    body = read_json(request)
    texts = texts_of(body["messages"] if "messages" in body else need(body, "input", (str, list), "string"))
    model, tokens = await _pass(service, body, texts)
    data = [{"index": index, "object": "pooling", "data": vector(text, DIMENSIONS)}
            for index, text in enumerate(texts)]
    return json_response({"id": new_id("pooling"), "object": "list", "created": now(), "model": model, "data": data,
                          "usage": usage(tokens, 0)})


async def classify(service: Service, request: Request) -> Response:
    body = read_json(request)
    texts = texts_of(need(body, "input", (str, list), "string"))
    model, tokens = await _pass(service, body, texts)
    data = [{"index": index, "label": "LABEL_0", "probs": [score("simulated", text)], "num_classes": 1}
            for index, text in enumerate(texts)]
    return json_response({"id": new_id("classify"), "object": "list", "created": now(), "model": model, "data": data,
                          "usage": usage(tokens, 0)})


async def score_pairs(service: Service, request: Request) -> Response:
    body = read_json(request)
    left = texts_of(body.get("text_1") or body.get("queries") or need(body, "text_1", (str, list), "string"))
    right = texts_of(body.get("text_2") or body.get("documents") or need(body, "text_2", (str, list), "string"))
    if len(left) not in (1, len(right)):
        raise ApiError(400, "Input lengths must be either 1:1, 1:N or N:N", "BadRequestError")
    model, tokens = await _pass(service, body, left + right)
    pairs = zip(left * (len(right) if len(left) == 1 else 1), right, strict=True)
    data = [{"index": index, "object": "score", "score": score(query, text)}
            for index, (query, text) in enumerate(pairs)]
    return json_response({"id": new_id("score"), "object": "list", "created": now(), "model": model, "data": data,
                          "usage": usage(tokens, 0)})


async def rerank(service: Service, request: Request) -> Response:
    body = read_json(request)
    query = text_of(need(body, "query", (str, dict), "string"))
    documents = texts_of(need(body, "documents", list, "list"))
    model, tokens = await _pass(service, body, [query, *documents])
    results = [{"index": index, "document": {"text": text, "multi_modal": None}, "relevance_score": score(query, text)}
               for index, text in enumerate(documents)]
    results.sort(key=lambda result: (-result["relevance_score"], result["index"]))     # type: ignore[operator]
    return json_response({"id": new_id("score"), "model": model,
                          "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
                          "results": results[:body.get("top_n") or len(results)]})


async def tokenize(service: Service, request: Request) -> Response:
    body = read_json(request)
    text = text_of(body["messages"] if "messages" in body else need(body, "prompt", str, "string"))
    service.model_of(body)
    words = text.split()
    tokens = [zlib.crc32(word.encode()) % 32000 for word in words]
    return json_response({"count": len(tokens), "max_model_len": service.options.max_model_len, "tokens": tokens,
                          "token_strs": words if body.get("return_token_strs") else None})


async def detokenize(service: Service, request: Request) -> Response:
    body = read_json(request)
    tokens = need(body, "tokens", list, "list")
    service.model_of(body)
    return json_response({"prompt": " ".join(f"simulated-{token}" for token in tokens)})


# --- sound --------------------------------------------------------------------------------------------------------

async def transcribe(service: Service, request: Request) -> Response | EventStream:
    fields = read_form(request)
    if "file" not in fields:
        raise ApiError(400, "1 validation error:\n  {'type': 'missing', 'loc': 'body.file', 'msg': 'Field required', "
                            "'input': None}", "Bad Request", "body.file")
    model = service.model_of({"model": fields.get("model", b"").decode(errors="replace")})
    tokens, finish = service.token_limit({}, 1)
    service.engine.check_admission()
    steps = service.engine.generate(1, tokens, finish)
    if fields.get("stream", b"").lower() in (b"true", b"1"):
        return stream(_sound_events(model, steps))
    text = "".join([text async for text, _ in steps])
    if fields.get("response_format") == b"text":
        return Response(200, text.encode(), "text/plain; charset=utf-8")
    return json_response({"text": text, "usage": {"type": "duration", "seconds": 1}})


async def _sound_events(model: str, steps: AsyncGenerator[tuple[str, str | None], None]) -> AsyncGenerator[bytes, None]:
    head = {"id": new_id("trsc"), "object": "transcription.chunk", "created": now(), "model": model}
    try:
        async for text, reason in steps:
            yield event({**head, "choices": [{"delta": {"content": text}, "finish_reason": reason}]})
    except EngineDead:
        yield dead_event()
    yield DONE


def read_form(request: Request) -> dict[str, bytes]:
    """The fields of a multipart form; a file's is its content.  Raises ApiError for a body that is none."""
    kind, _, parameters = request.headers.get("content-type", "").partition(";")
    marks = [word.partition("=")[2].strip('" ') for word in parameters.split(";") if "boundary=" in word]
    if kind.strip().lower() != "multipart/form-data" or not marks:
        raise ApiError(400, "Missing boundary in multipart.", "Bad Request")
    fields: dict[str, bytes] = {}
    for part in request.body.split(b"--" + marks[0].encode())[1:]:
        head, blank, content = part.partition(b"\r\n\r\n")
        name = head.partition(b'name="')[2].partition(b'"')[0]
        if blank and name:
            fields[name.decode(errors="replace")] = content.removesuffix(b"\r\n")
    return fields
