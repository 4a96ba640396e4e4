"""The routes of a generating model, in OpenAI's two old shapes, its Responses shape, and Anthropic's."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from typing import Any

from simulation.engine import EngineDead
from simulation.http import EventStream, Request, Response
from simulation.service import (
    DEAD_MESSAGE,
    DONE,
    FINGERPRINT,
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


@dataclass(frozen=True)
class Ask:
    """A generation: `n` choices, each of `tokens` tokens, that end for `finish`."""

    id: str
    model: str
    prompt_tokens: int
    tokens: int
    finish: str
    n: int
    created: int
    prompt: str = ""


Step = tuple[str, str | None]


def _steps(service: Service, ask: Ask) -> AsyncGenerator[Step, None]:
    return service.engine.generate(ask.prompt_tokens, ask.tokens, ask.finish, ask.n, ask.prompt)


async def _whole(service: Service, ask: Ask) -> tuple[str, str, int]:
    """The text, why it ended, and its number of tokens."""
    parts: list[str] = []
    last: Step = ("", ask.finish)
    async for last in _steps(service, ask):
        parts.append(last[0])
    reason = last[1] or ask.finish
    return "".join(parts), reason, len(parts) - (reason == "abort")


def _ask(service: Service, body: dict[str, Any], kind: str, prompt: str, choices: int, *limits: str) -> Ask:
    """Raises ApiError for a bad request and the engine's errors for a full or dead one."""
    model = service.model_of(body)
    wanted = body.get("n") or 1
    if not isinstance(wanted, int) or wanted < 1:
        raise ApiError(400, f"n must be at least 1, got {wanted}. (parameter=n, value={wanted})", "BadRequestError",
                       "n")
    prompt_tokens = count_tokens(prompt)
    tokens, finish = service.token_limit(body, prompt_tokens, *limits)
    n = wanted * choices
    service.engine.check_admission(n)
    return Ask(new_id(kind), model, prompt_tokens, tokens, finish, n, now(), prompt)


async def chat(service: Service, request: Request) -> Response | EventStream:
    body = read_json(request)
    messages = need(body, "messages", list, "list")
    batch = len(messages) if messages and all(isinstance(message, list) for message in messages) else 1
    ask = _ask(service, body, "chatcmpl", text_of(messages), batch, "max_completion_tokens", "max_tokens")
    if body.get("stream"):
        return stream(_chunks(service, body, ask, "chat.completion.chunk", _chat_delta))
    text, reason, count = await _whole(service, ask)
    message = {"role": "assistant", "content": text, "refusal": None, "annotations": None, "audio": None,
               "function_call": None, "reasoning": None}
    choices = [{"index": index, "message": message, "logprobs": None, "finish_reason": reason, "stop_reason": None,
                "token_ids": None, "routed_experts": None} for index in range(ask.n)]
    return json_response(_completion(ask, "chat.completion", choices, count))


async def completions(service: Service, request: Request) -> Response | EventStream:
    body = read_json(request)
    prompt = body.get("prompt")
    if not prompt:
        raise ApiError(400, "Either prompt or prompt_embeds must be provided and non-empty. (parameter=prompt)",
                       "BadRequestError", "prompt")
    prompts = len(prompt) if isinstance(prompt, list) and not isinstance(prompt[0], int) else 1
    text = text_of(prompt) or "x " * (len(prompt) if isinstance(prompt, list) else 1)
    ask = _ask(service, body, "cmpl", text, prompts, "max_tokens")
    if body.get("stream"):
        return stream(_chunks(service, body, ask, "text_completion", _text_delta))
    text, reason, count = await _whole(service, ask)
    choices = [{"index": index, "text": text, "logprobs": None, "finish_reason": reason, "stop_reason": None,
                "token_ids": None, "prompt_logprobs": None, "prompt_token_ids": None, "routed_experts": None}
               for index in range(ask.n)]
    return json_response(_completion(ask, "text_completion", choices, count))


def _completion(ask: Ask, kind: str, choices: list[dict[str, Any]], count: int) -> dict[str, Any]:
    return {"id": ask.id, "object": kind, "created": ask.created, "model": ask.model, "choices": choices,
            "service_tier": None, "system_fingerprint": FINGERPRINT, "usage": usage(ask.prompt_tokens, count * ask.n),
            "kv_transfer_params": None, "metrics": None}


def _chat_delta(index: int, text: str, reason: str | None) -> dict[str, Any]:
    choice = {"index": index, "delta": {"content": text}, "logprobs": None, "finish_reason": reason}
    return choice | ({"stop_reason": None, "token_ids": None} if reason else {"token_ids": None})


def _text_delta(index: int, text: str, reason: str | None) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": None, "finish_reason": reason, "stop_reason": None,
            "prompt_token_ids": None, "token_ids": None}


async def _chunks(service: Service, body: dict[str, Any], ask: Ask, kind: str,
                  delta: Callable[[int, str, str | None], dict[str, Any]]) -> AsyncGenerator[bytes, None]:
    options = body.get("stream_options") or {}
    head = {"id": ask.id, "object": kind, "created": ask.created, "model": ask.model}
    total = 0
    try:
        async for text, reason in _steps(service, ask):
            if total == 0 and delta is _chat_delta:
                for index in range(ask.n):
                    role = {"index": index, "delta": {"role": "assistant", "content": ""}, "logprobs": None,
                            "finish_reason": None}
                    yield event({**head, "choices": [role], "prompt_token_ids": None, "prompt_text": None})
            total += ask.n if text else 0
            for index in range(ask.n):
                chunk: dict[str, Any] = {**head, "choices": [delta(index, text, reason)]}
                if options.get("continuous_usage_stats") and options.get("include_usage"):
                    chunk["usage"] = _stream_usage(ask, total)
                if reason and not options.get("include_usage"):
                    chunk["system_fingerprint"] = FINGERPRINT
                yield event(chunk)
        if options.get("include_usage"):
            yield event({**head, "choices": [], "usage": _stream_usage(ask, total), "system_fingerprint": FINGERPRINT})
    except EngineDead:
        yield dead_event()
    yield DONE


def _stream_usage(ask: Ask, total: int) -> dict[str, int]:
    return {"prompt_tokens": ask.prompt_tokens, "total_tokens": ask.prompt_tokens + total, "completion_tokens": total}


# --- OpenAI's Responses -------------------------------------------------------------------------------------------

KEPT_RESPONSES = 1000


async def responses(service: Service, request: Request) -> Response | EventStream:
    body = read_json(request)
    prompt = text_of(need(body, "input", (str, list), "string"))
    ask = _ask(service, body, "resp", prompt, 1, "max_output_tokens")
    answer = _response(body, ask)
    service.responses[answer["id"]] = answer
    while len(service.responses) > KEPT_RESPONSES:
        service.responses.pop(next(iter(service.responses)))
    if body.get("stream"):
        return stream(_response_events(service, ask, answer))
    if body.get("background"):
        answer["status"] = "queued"
        service.background[answer["id"]] = asyncio.create_task(_in_background(service, ask, answer))
        return json_response(answer)
    await _fill(service, ask, answer)
    return json_response(answer)


async def _fill(service: Service, ask: Ask, answer: dict[str, Any]) -> None:
    text, reason, count = await _whole(service, ask)
    _complete(answer, ask, text, reason, count, new_id("msg").replace("-", "_"))


async def _in_background(service: Service, ask: Ask, answer: dict[str, Any]) -> None:
    try:
        answer["status"] = "in_progress"
        await _fill(service, ask, answer)
    except EngineDead:
        answer["status"] = "failed"
    except asyncio.CancelledError:
        answer["status"] = "cancelled"
    finally:
        service.background.pop(answer["id"], None)


def _response(body: dict[str, Any], ask: Ask) -> dict[str, Any]:
    return {"id": ask.id.replace("-", "_"), "created_at": ask.created, "incomplete_details": None,
            "instructions": body.get("instructions"), "metadata": body.get("metadata"), "model": ask.model,
            "object": "response", "output": [], "parallel_tool_calls": True,
            "temperature": body.get("temperature", 1.0), "tool_choice": body.get("tool_choice", "none"),
            "tools": body.get("tools", []), "top_p": body.get("top_p", 1.0), "background": bool(body.get("background")),
            "max_output_tokens": ask.tokens, "max_tool_calls": None,
            "previous_response_id": body.get("previous_response_id"), "prompt": None, "reasoning": None,
            "service_tier": "auto", "status": "in_progress", "text": None, "top_logprobs": None,
            "truncation": "disabled", "usage": None, "user": body.get("user")}


def _complete(answer: dict[str, Any], ask: Ask, text: str, reason: str, count: int, item_id: str) -> None:
    cut = reason == "length"
    answer["output"] = [_item(item_id, text)]
    answer["status"] = "incomplete" if cut else "completed"
    answer["incomplete_details"] = {"reason": "max_output_tokens"} if cut else None
    answer["usage"] = {"input_tokens": ask.prompt_tokens, "output_tokens": count,
                       "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
                       "output_tokens_details": {"reasoning_tokens": 0, "tool_output_tokens": 0},
                       "total_tokens": ask.prompt_tokens + count}


def _part(text: str) -> dict[str, Any]:
    return {"annotations": [], "text": text, "type": "output_text", "logprobs": []}


def _item(item_id: str, text: str | None) -> dict[str, Any]:
    """The message of a response; None for one that has only begun."""
    return {"id": item_id, "content": [] if text is None else [_part(text)], "role": "assistant",
            "status": "in_progress" if text is None else "completed", "type": "message", "phase": None}


async def _response_events(service: Service, ask: Ask, answer: dict[str, Any]) -> AsyncGenerator[bytes, None]:
    sequence = 0
    item_id = new_id("msg").replace("-", "_")
    place = {"item_id": item_id, "output_index": 0, "content_index": 0}

    def tell(kind: str, **fields: Any) -> bytes:
        nonlocal sequence
        sequence += 1
        return event({**fields, "sequence_number": sequence - 1, "type": kind}, kind)

    yield tell("response.created", response=answer)
    yield tell("response.in_progress", response=answer)
    parts: list[str] = []
    last: Step = ("", ask.finish)
    try:
        async for last in _steps(service, ask):
            if not parts:
                yield tell("response.output_item.added", item=_item(item_id, None), output_index=0)
                yield tell("response.content_part.added", part=_part(""), **place)
            parts.append(last[0])
            yield tell("response.output_text.delta", delta=last[0], logprobs=[], **place)
    except EngineDead:
        answer["status"] = "failed"
        yield dead_event()
        yield DONE
        return
    whole = "".join(parts)
    yield tell("response.output_text.done", text=whole, logprobs=[], **place)
    yield tell("response.content_part.done", part=_part(whole), **place)
    yield tell("response.output_item.done", item=_item(item_id, whole), output_index=0)
    _complete(answer, ask, whole, last[1] or ask.finish, len(parts), item_id)
    yield tell("response.completed", response=answer)


def _stored(service: Service, request: Request) -> dict[str, Any]:
    wanted = request.path.split("/")[3]
    if wanted not in service.responses:
        raise ApiError(404, f"Response with id '{wanted}' not found.", "invalid_request_error", "response_id")
    return service.responses[wanted]


async def get_response(service: Service, request: Request) -> Response:
    return json_response(_stored(service, request))


async def cancel_response(service: Service, request: Request) -> Response:
    answer = _stored(service, request)
    task = service.background.get(answer["id"])
    if task is None:
        raise ApiError(400, "Cannot cancel a synchronous response.", "invalid_request_error", "response_id")
    task.cancel()
    await asyncio.wait([task])
    answer["status"] = "cancelled"      # also of a task that had not begun
    return json_response(answer)


# --- Anthropic's Messages -----------------------------------------------------------------------------------------

STOP_REASONS = {"length": "max_tokens", "stop": "end_turn"}


async def messages(service: Service, request: Request) -> Response | EventStream:
    body = read_json(request)
    said = need(body, "messages", list, "list")
    need(body, "max_tokens", int, "integer")
    ask = _ask(service, body, "chatcmpl", text_of(said), 1, "max_tokens")
    if body.get("stream"):
        return stream(_message_events(service, ask))
    text, reason, count = await _whole(service, ask)
    return json_response({**_message(ask), "content": [{"type": "text", "text": text}],
                          "stop_reason": STOP_REASONS.get(reason, reason),
                          "usage": {"input_tokens": ask.prompt_tokens, "output_tokens": count}})


def _message(ask: Ask) -> dict[str, Any]:
    return {"id": ask.id, "type": "message", "role": "assistant", "content": [], "model": ask.model,
            "stop_reason": None, "stop_sequence": None,
            "usage": {"input_tokens": ask.prompt_tokens, "output_tokens": 0}}


async def _message_events(service: Service, ask: Ask) -> AsyncGenerator[bytes, None]:
    def tell(kind: str, **fields: Any) -> bytes:
        return event({"type": kind, **fields}, kind)

    count = 0
    last: Step = ("", ask.finish)
    try:
        async for last in _steps(service, ask):
            if count == 0:
                yield tell("message_start", message=_message(ask))
                yield tell("content_block_start", content_block={"type": "text", "text": ""}, index=0)
            count += 1
            yield tell("content_block_delta", delta={"type": "text_delta", "text": last[0]}, index=0)
    except EngineDead:
        yield tell("error", error={"type": "internal_error", "message": DEAD_MESSAGE})
        yield DONE
        return
    yield tell("content_block_stop", index=0)
    reason = last[1] or ask.finish
    yield tell("message_delta", delta={"stop_reason": STOP_REASONS.get(reason, reason), "stop_sequence": None},
               usage={"input_tokens": ask.prompt_tokens, "output_tokens": count})
    yield tell("message_stop")


async def count_message_tokens(service: Service, request: Request) -> Response:
    body = read_json(request)
    tokens = count_tokens(text_of(need(body, "messages", list, "list")))
    service.model_of(body)
    return json_response({"input_tokens": tokens, "context_management": {"original_input_tokens": tokens}})
