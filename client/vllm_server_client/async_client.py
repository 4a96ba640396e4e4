"""AsyncVLLMProxyClient: VLLMProxyClient for asyncio.  What the methods do is told there (client.py)."""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from typing import Any, cast

from vllm_server_client import calls
from vllm_server_client.calls import Call
from vllm_server_client.transport import AsyncTransport
from vllm_server_client.types import (
    AuditEntry,
    ChatChunk,
    ChatCompletion,
    Completion,
    ConfiguredModel,
    Devices,
    Embeddings,
    Event,
    Health,
    History,
    Instance,
    LoadStats,
    Model,
    Plan,
    RecentRequest,
    Reload,
    Version,
)


class AsyncVLLMProxyClient(AsyncTransport):
    """A connection pool to one vllm-server.  Use it in an `async with`, or `aclose` it.

    Arguments, methods and exceptions are those of VLLMProxyClient; streams are read with `async for`.
    """

    # --- inference ------------------------------------------------------------------------------------------------

    async def chat_completion(self, model: str, messages: Sequence[Mapping[str, Any]], *,
                              timeout_s: float | None = None, **params: Any) -> ChatCompletion:
        return cast(ChatCompletion, await self._json(calls.chat(model, messages, params, timeout_s)))

    async def chat_completion_stream(self, model: str, messages: Sequence[Mapping[str, Any]], *,
                                     timeout_s: float | None = None, **params: Any) -> AsyncGenerator[str, None]:
        async with aclosing(self.chat_completion_chunks(model, messages, timeout_s=timeout_s, **params)) as chunks:
            async for chunk in chunks:
                if text := calls.chat_text(chunk):
                    yield text

    def chat_completion_chunks(self, model: str, messages: Sequence[Mapping[str, Any]], *,
                               timeout_s: float | None = None, **params: Any) -> AsyncGenerator[ChatChunk, None]:
        return self._events(calls.chat(model, messages, params, timeout_s, stream=True))

    async def completion(self, model: str, prompt: str | Sequence[str], *, timeout_s: float | None = None,
                         **params: Any) -> Completion:
        return cast(Completion, await self._json(calls.completion(model, prompt, params, timeout_s)))

    async def completion_stream(self, model: str, prompt: str, *, timeout_s: float | None = None,
                                **params: Any) -> AsyncGenerator[str, None]:
        async with aclosing(self._events(calls.completion(model, prompt, params, timeout_s, stream=True))) as chunks:
            async for chunk in chunks:
                if text := calls.completion_text(chunk):
                    yield text

    async def embeddings(self, model: str, input: str | Sequence[str], *, timeout_s: float | None = None,
                         **params: Any) -> Embeddings:
        return cast(Embeddings, await self._json(calls.embedding(model, input, params, timeout_s)))

    async def request(self, method: str, path: str, body: Mapping[str, Any] | None = None, *,
                      timeout_s: float | None = None) -> Any:
        return await self._json(Call(method, path, body, timeout_s=timeout_s))

    # --- models ---------------------------------------------------------------------------------------------------

    async def models(self) -> list[Model]:
        return cast(list[Model], await self._list(Call("GET", "/v1/models")))

    async def model(self, name: str) -> Model:
        return cast(Model, await self._json(calls.model(name)))

    async def configured_models(self) -> list[ConfiguredModel]:
        return cast(list[ConfiguredModel], await self._list(Call("GET", "/admin/models")))

    async def configured_model(self, name: str) -> ConfiguredModel:
        return cast(ConfiguredModel, await self._json(calls.configured(name)))

    async def load(self, name: str, *, wait: bool = False, timeout_s: float | None = None) -> ConfiguredModel:
        return cast(ConfiguredModel, await self._json(calls.configured(name, "load", timeout_s, wait=wait)))

    async def unload(self, name: str, *, force: bool = False, wait: bool = False,
                     timeout_s: float | None = None) -> ConfiguredModel:
        return cast(ConfiguredModel, await self._json(
            calls.configured(name, "unload", timeout_s, force=force, wait=wait)))

    async def plan(self, name: str) -> Plan:
        return cast(Plan, await self._json(calls.plan(name)))

    # --- instances ------------------------------------------------------------------------------------------------

    async def instances(self) -> list[Instance]:
        return cast(list[Instance], await self._list(Call("GET", "/instances")))

    async def instance(self, instance_id: str) -> Instance:
        return cast(Instance, await self._json(calls.instance(instance_id)))

    async def create_instance(self, model_name: str, params: Mapping[str, Any] | None = None, *,
                              idle_timeout: float | None = None, start_timeout: float | None = None, wait: bool = False,
                              replace: bool = False, new: bool = False, sleep: int | None = None,
                              stop_after: float | None = None, timeout_s: float | None = None) -> Instance:
        return cast(Instance, await self._json(calls.create(
            model_name, params, timeout_s, timeout=idle_timeout, start_timeout=start_timeout, wait=wait,
            replace=replace, new=new, sleep=sleep, stop_after=stop_after)))

    async def stop_instance(self, instance_id: str, *, force: bool = False, wait: bool = False,
                            timeout_s: float | None = None) -> Instance:
        return cast(Instance, await self._json(calls.instance(
            instance_id, method="DELETE", force=force, wait=wait, timeout_s=timeout_s)))

    async def sleep_instance(self, instance_id: str, *, level: int | None = None, wait: bool = False,
                             timeout_s: float | None = None) -> Instance:
        return cast(Instance, await self._json(calls.tiered(instance_id, "sleep", timeout_s, level=level, wait=wait)))

    async def wake_instance(self, instance_id: str, *, wait: bool = False, timeout_s: float | None = None) -> Instance:
        return cast(Instance, await self._json(calls.tiered(instance_id, "wake", timeout_s, wait=wait)))

    async def logs(self, instance_id: str, *, tail: int | None = None) -> str:
        return (await self._answer(calls.instance(instance_id, "logs", tail=tail))).text

    def follow_logs(self, instance_id: str, *, tail: int | None = None) -> AsyncGenerator[str, None]:
        return self._lines(calls.instance(instance_id, "logs", tail=tail, follow=True, timeout_s=math.inf))

    # --- the server -----------------------------------------------------------------------------------------------

    async def gpus(self) -> Devices:
        return cast(Devices, await self._json(Call("GET", "/gpus")))

    async def health(self) -> Health:
        return cast(Health, await self._json(Call("GET", "/health")))

    async def version(self) -> Version:
        return cast(Version, await self._json(Call("GET", "/version")))

    async def audit(self, *, tail: int | None = None) -> list[AuditEntry]:
        return cast(list[AuditEntry], await self._list(calls.look("/admin/audit", tail=tail)))

    async def load_stats(self) -> LoadStats:
        return cast(LoadStats, await self._json(calls.look("/load-stats")))

    async def history(self, *, since: float | None = None) -> History:
        return cast(History, await self._json(calls.look("/admin/history", since=since)))

    async def events(self, *, tail: int | None = None) -> list[Event]:
        return cast(list[Event], await self._list(calls.look("/admin/events", tail=tail)))

    def follow_events(self, *, after: int | None = None) -> AsyncGenerator[dict[str, Any], None]:
        return self._feed(calls.feed(after))

    async def recent_requests(self, *, tail: int | None = None, failed: bool = False) -> list[RecentRequest]:
        return cast(list[RecentRequest], await self._list(calls.look("/admin/requests", tail=tail, failed=failed)))

    async def reload(self) -> Reload:
        return cast(Reload, await self._json(Call("POST", "/admin/reload")))
