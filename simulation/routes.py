"""The route table of a simulated server, and the handlers that touch no model: health, models, metrics, dev mode."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import os
from collections.abc import Awaitable, Callable
from typing import Any

import orjson

from simulation import generate, pooling
from simulation.engine import EngineDead, QueueFull
from simulation.http import EventStream, Request, Response, Upgrade
from simulation.knobs import KnobError
from simulation.log import log
from simulation.memory import MemoryFailure
from simulation.realtime import accept
from simulation.service import (
    BUSY_MESSAGE,
    ApiError,
    Service,
    dead_error,
    invalid,
    json_response,
    need,
    new_id,
    now,
    read_json,
)

Handler = Callable[[Service, Request], Awaitable[Response | EventStream]]
GUARDED = ("/v1", "/v2", "/inference", "/cohere")


class Router:
    """Finds the handler of a request and turns what it raises into an answer."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.table = routes(service)

    async def answer(self, request: Request) -> Response | EventStream:
        """Never raises but for a cancelled request or one that is upgraded."""
        headers = {}
        if self.service.options.enable_request_id_headers:
            headers["x-request-id"] = request.headers.get("x-request-id") or os.urandom(16).hex()
        try:
            answer = await self._handle(request)
        except ApiError as error:
            answer = json_response(error.envelope(), error.status)
            if request.path.endswith("/messages") or request.path.endswith("/count_tokens"):
                answer = json_response({"type": "error", "error": {"type": error.type, "message": error.message}},
                                       error.status)
        except (asyncio.CancelledError, Upgrade):
            raise
        except Exception:
            import traceback
            traceback.print_exc()
            answer = json_response(ApiError(500, "Internal server error", "InternalServerError").envelope(), 500)
        answer.headers.update(headers)
        return answer

    async def _handle(self, request: Request) -> Response | EventStream:
        path = request.path.removeprefix(self.service.options.root_path)
        if not authorized(self.service.options.api_keys, path, request):
            return json_response({"error": "Unauthorized"}, 401)
        parts = path.split("/")
        if path.startswith("/v1/responses/") and len(parts) > 3:
            parts[3] = "{response_id}"
        methods = self.table.get("/".join(parts))
        if methods is None:
            return json_response({"detail": "Not Found"}, 404)
        handler = methods.get(request.method)
        if handler is None:
            answer = json_response({"detail": "Method Not Allowed"}, 405)
            answer.headers["allow"] = ", ".join(methods)
            return answer
        try:
            return await self._counted(handler, request)
        except EngineDead:
            raise dead_error() from None
        except QueueFull:
            raise ApiError(503, BUSY_MESSAGE, "Service Unavailable") from None

    async def _counted(self, handler: Handler, request: Request) -> Response | EventStream:
        """Counts inference requests for /load, streams until their end."""
        service = self.service
        if handler in INFERENCE and (status := service.engine.knobs.answer_status):
            raise ApiError(status, f"simulated: every request is answered with {status}")
        if handler not in INFERENCE or not service.options.enable_server_load_tracking:
            return await handler(service, request)
        service.load += 1
        answer: Response | EventStream | None = None
        try:
            answer = await handler(service, request)
        finally:
            if not isinstance(answer, EventStream):
                service.load -= 1
        if isinstance(answer, EventStream):
            return EventStream(self._until_end(answer), answer.headers)
        return answer

    async def _until_end(self, answer: EventStream) -> Any:
        try:
            async for item in answer.events:
                yield item
        finally:
            self.service.load -= 1


def authorized(keys: tuple[str, ...], path: str, request: Request) -> bool:
    if not keys or request.method == "OPTIONS" or not path.startswith(GUARDED):
        return True
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    given = hashlib.sha256(token.encode()).digest()
    matches = [hmac.compare_digest(given, hashlib.sha256(key.encode()).digest()) for key in keys]
    return scheme.lower() == "bearer" and any(matches)


# --- always there -------------------------------------------------------------------------------------------------

async def health(service: Service, request: Request) -> Response:
    if service.engine.knobs.health_hang:
        await asyncio.Event().wait()
    return Response(503 if service.engine.dead else 200)


async def version(service: Service, request: Request) -> Response:
    return json_response({"version": "0.32.0"})


async def load(service: Service, request: Request) -> Response:
    return json_response({"server_load": service.load})


async def metrics(service: Service, request: Request) -> Response:
    engine = service.engine
    text = service.metrics.render(running=engine.running_count, waiting=engine.waiting_count,
                                  max_num_seqs=service.options.max_num_seqs, sleep_level=engine.sleep_level)
    return Response(200, text.encode(), "text/plain; version=0.0.4; charset=utf-8")


async def models(service: Service, request: Request) -> Response:
    options = service.options

    def card(name: str, root: str, parent: str | None, length: int | None) -> dict[str, Any]:
        permission = {"id": new_id("modelperm"), "object": "model_permission", "created": now(),
                      "allow_create_engine": False, "allow_sampling": True, "allow_logprobs": True,
                      "allow_search_indices": False, "allow_view": True, "allow_fine_tuning": False,
                      "organization": "*", "group": None, "is_blocking": False}
        return {"id": name, "object": "model", "created": now(), "owned_by": "vllm", "root": root, "parent": parent,
                "max_model_len": length, "permission": [permission]}

    cards = [card(name, options.model, None, options.max_model_len) for name in options.served_model_names]
    cards += [card(name, path, service.name, None) for name, path in service.loras.items()]
    return json_response({"object": "list", "data": cards})


async def docs(service: Service, request: Request) -> Response:
    return Response(200, b"<!DOCTYPE html><title>FastAPI - Swagger UI (simulated)</title>", "text/html; charset=utf-8")


async def invocations(service: Service, request: Request) -> Response | EventStream:
    """SageMaker's one route: what the body holds says which request it is."""
    body = read_json(request)
    handlers: dict[str, Handler] = {"messages": generate.chat, "prompt": generate.completions, "query": pooling.rerank,
                                    "text_1": pooling.score_pairs, "input": pooling.embeddings}
    for key, handler in handlers.items():
        if key in body:
            return await handler(service, request)
    raise ApiError(400, "Cannot find suitable handler for request. Expected one of: messages, prompt, input",
                   "Bad Request")


async def load_lora(service: Service, request: Request) -> Response:
    body = read_json(request)
    name, path = body.get("lora_name"), body.get("lora_path")
    if not name or not path:
        raise ApiError(400, "Both 'lora_name' and 'lora_path' must be provided.", "InvalidUserInput")
    if name in service.loras and not body.get("load_inplace"):
        raise ApiError(400, f"The lora adapter '{name}' has already been loaded. If you want to load the adapter in "
                            "place, set 'load_inplace' to True.", "InvalidUserInput")
    service.loras[name] = path
    return Response(200, f"Success: LoRA adapter '{name}' added successfully.".encode(), "text/plain; charset=utf-8")


async def unload_lora(service: Service, request: Request) -> Response:
    name = need(read_json(request), "lora_name", str, "string")
    if service.loras.pop(name, None) is None:
        raise ApiError(404, f"The lora adapter '{name}' cannot be found.", "NotFoundError")
    return Response(200, f"Success: LoRA adapter '{name}' removed successfully.".encode(), "text/plain; charset=utf-8")


# --- dev mode -----------------------------------------------------------------------------------------------------

def _mode(request: Request) -> str:
    mode = request.query.get("mode", ["abort"])[0]
    if mode not in ("abort", "wait", "keep"):
        raise invalid("query.mode", "literal_error", "Input should be 'abort', 'wait' or 'keep'", mode)
    return mode


async def sleep(service: Service, request: Request) -> Response:
    level = request.query.get("level", ["1"])[0]
    if not level.lstrip("-").isdigit():
        raise invalid("query.level", "int_parsing",
                      "Input should be a valid integer, unable to parse string as an integer", level)
    if not 0 <= int(level) <= 2:
        bound = "less than or equal to 2" if int(level) > 2 else "greater than or equal to 0"
        raise invalid("query.level", "less_than_equal" if int(level) > 2 else "greater_than_equal",
                      f"Input should be {bound}", level)
    await service.engine.sleep(int(level), _mode(request))
    if service.options.enable_sleep_mode and int(level) > 0:
        await asyncio.sleep(service.engine.knobs.sleep_s)
        service.ledger.sleep(int(level), service.engine.knobs.sleep_keeps_mb)
        service.engine.weights_lost |= int(level) == 2
    return json_response({"status": "sleeping", "level": int(level)})


async def wake_up(service: Service, request: Request) -> Response:
    tags, engine = request.query.get("tags"), service.engine
    if engine.knobs.wake_fails:
        raise ApiError(500, "Internal server error", "InternalServerError")
    if service.options.enable_sleep_mode and engine.sleep_level > 0:
        await asyncio.sleep(engine.knobs.wake_s)
        try:
            service.ledger.wake(tags)
        except MemoryFailure as error:
            log("EngineCore", f"Invocation of wake_up method failed\nRuntimeError: CUDA Error: out of memory at "
                              f"cumem_allocator.cpp:145 ({error.message})", where="core.py:1120", level="ERROR")
            raise ApiError(500, "Internal server error", "InternalServerError") from error
    return json_response({"status": "awake" if engine.wake_up(tags) else "sleeping", "tags": tags})


def device_pids(service: Service) -> list[int]:
    return [pid for process in service.processes for pid, _ in process.device_processes]


async def is_sleeping(service: Service, request: Request) -> Response:
    return json_response({"is_sleeping": service.engine.sleep_level > 0})


async def pause(service: Service, request: Request) -> Response:
    await service.engine.pause(_mode(request))
    return json_response({"status": "paused"})


async def resume(service: Service, request: Request) -> Response:
    service.engine.resume()
    return json_response({"status": "resumed"})


async def is_paused(service: Service, request: Request) -> Response:
    return json_response({"is_paused": service.engine.paused})


async def reset_cache(service: Service, request: Request) -> Response:
    return json_response({"success": True})


async def server_info(service: Service, request: Request) -> Response:
    return json_response({"vllm_config": f"simulated: {service.options.given}", "vllm_env": {}, "system_env": {}})


async def collective_rpc(service: Service, request: Request) -> Response:
    method = need(read_json(request), "method", str, "string")
    if method == "reload_weights":
        service.engine.weights_lost = False
    return json_response({"results": [None] * len(device_pids(service))})


async def set_knobs(service: Service, request: Request) -> Response:
    """The simulator's own route: changes knobs while it runs, and answers with all of them."""
    try:
        service.engine.set_knobs(service.engine.knobs.changed(orjson.loads(request.body or b"{}")))
    except (KnobError, orjson.JSONDecodeError) as error:
        raise ApiError(400, str(error), "Bad Request") from error
    return json_response(vars(service.engine.knobs))


# --- the table ----------------------------------------------------------------------------------------------------

COMMON: dict[str, dict[str, Handler]] = {
    "/docs": {"GET": docs}, "/load": {"GET": load}, "/version": {"GET": version}, "/health": {"GET": health},
    "/metrics": {"GET": metrics}, "/ping": {"GET": health, "POST": health}, "/v1/models": {"GET": models},
    "/tokenize": {"POST": pooling.tokenize}, "/detokenize": {"POST": pooling.detokenize},
    "/invocations": {"POST": invocations}}

GENERATE: dict[str, dict[str, Handler]] = {
    "/v1/chat/completions": {"POST": generate.chat}, "/v1/chat/completions/batch": {"POST": generate.chat},
    "/v1/completions": {"POST": generate.completions}, "/v1/responses": {"POST": generate.responses},
    "/v1/responses/{response_id}": {"GET": generate.get_response},
    "/v1/responses/{response_id}/cancel": {"POST": generate.cancel_response},
    "/v1/messages": {"POST": generate.messages}, "/v1/messages/count_tokens": {"POST": generate.count_message_tokens},
    "/v1/realtime": {"GET": accept}}

POOLING: dict[str, dict[str, Handler]] = {
    "/pooling": {"POST": pooling.pooling}, "/v1/embeddings": {"POST": pooling.embeddings},
    "/v2/embed": {"POST": pooling.embed_v2}, "/classify": {"POST": pooling.classify},
    **{path: {"POST": pooling.score_pairs} for path in ("/score", "/v1/score")},
    **{path: {"POST": pooling.rerank} for path in ("/rerank", "/v1/rerank", "/v2/rerank")}}

TRANSCRIPTION: dict[str, dict[str, Handler]] = {
    "/v1/audio/transcriptions": {"POST": pooling.transcribe}, "/v1/audio/translations": {"POST": pooling.transcribe},
    "/v1/realtime": {"GET": accept}}

DEV: dict[str, dict[str, Handler]] = {
    "/sleep": {"POST": sleep}, "/wake_up": {"POST": wake_up}, "/is_sleeping": {"GET": is_sleeping},
    "/pause": {"POST": pause}, "/resume": {"POST": resume}, "/is_paused": {"GET": is_paused},
    "/reset_prefix_cache": {"POST": reset_cache}, "/reset_mm_cache": {"POST": reset_cache},
    "/server_info": {"GET": server_info}, "/collective_rpc": {"POST": collective_rpc}, "/sim": {"POST": set_knobs}}

LORA: dict[str, dict[str, Handler]] = {
    "/v1/load_lora_adapter": {"POST": load_lora}, "/v1/unload_lora_adapter": {"POST": unload_lora}}

INFERENCE: frozenset[Handler] = frozenset(
    handler for table in (GENERATE, POOLING, TRANSCRIPTION) for methods in table.values()
    for handler in methods.values() if handler is not accept)


def routes(service: Service) -> dict[str, dict[str, Handler]]:
    """The paths this server has, with their methods."""
    table = dict(COMMON)
    table |= {"pooling": POOLING, "transcription": TRANSCRIPTION}.get(service.runner, GENERATE)
    if service.dev_mode:
        table |= DEV
    if os.environ.get("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "").lower() in ("1", "true"):
        table |= LORA
    return table
