"""VLLMProxyClient: vllm-server from Python.  AsyncVLLMProxyClient (async_client.py) has the same methods."""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from typing import Any, cast

from vllm_server_client import calls
from vllm_server_client.calls import Call
from vllm_server_client.transport import Transport
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


class VLLMProxyClient(Transport):
    """A connection pool to one vllm-server.  Thread-safe; close it, or use it in a `with`.

    `base_url` and `api_key` default to VLLM_SERVER_URL and VLLM_SERVER_API_KEY; an admin key does everything.
    `timeout_s` is the longest silence: until an answer begins, and between two pieces of a stream; every method takes
    its own.  What never reached the server and what the server asks to send again (503 with Retry-After) is sent again
    up to `max_retries` times.

    Every method may raise ServerError (the server's own error), ConnectionFailed, TimedOut and BadAnswer, all of them
    VLLMProxyError; streams also StreamBroken.
    """

    # --- inference ------------------------------------------------------------------------------------------------

    def chat_completion(self, model: str, messages: Sequence[Mapping[str, Any]], *,
                        timeout_s: float | None = None, **params: Any) -> ChatCompletion:
        """POST /v1/chat/completions; `params` are its other fields: max_tokens, temperature, tools, ..."""
        return cast(ChatCompletion, self._json(calls.chat(model, messages, params, timeout_s)))

    def chat_completion_stream(self, model: str, messages: Sequence[Mapping[str, Any]], *,
                               timeout_s: float | None = None, **params: Any) -> Generator[str, None, None]:
        """The answer's text as it comes, piece by piece.  Leaving the loop ends the generation."""
        with closing(self.chat_completion_chunks(model, messages, timeout_s=timeout_s, **params)) as chunks:
            yield from filter(None, map(calls.chat_text, chunks))

    def chat_completion_chunks(self, model: str, messages: Sequence[Mapping[str, Any]], *,
                               timeout_s: float | None = None, **params: Any) -> Generator[ChatChunk, None, None]:
        """The same as whole events, with finish reasons, reasoning, tool calls and usage."""
        return self._events(calls.chat(model, messages, params, timeout_s, stream=True))

    def completion(self, model: str, prompt: str | Sequence[str], *, timeout_s: float | None = None,
                   **params: Any) -> Completion:
        """POST /v1/completions."""
        return cast(Completion, self._json(calls.completion(model, prompt, params, timeout_s)))

    def completion_stream(self, model: str, prompt: str, *, timeout_s: float | None = None,
                          **params: Any) -> Generator[str, None, None]:
        with closing(self._events(calls.completion(model, prompt, params, timeout_s, stream=True))) as chunks:
            yield from filter(None, map(calls.completion_text, chunks))

    def embeddings(self, model: str, input: str | Sequence[str], *, timeout_s: float | None = None,
                   **params: Any) -> Embeddings:
        """POST /v1/embeddings."""
        return cast(Embeddings, self._json(calls.embedding(model, input, params, timeout_s)))

    def request(self, method: str, path: str, body: Mapping[str, Any] | None = None, *,
                timeout_s: float | None = None) -> Any:
        """Any other route: the JSON of its answer."""
        return self._json(Call(method, path, body, timeout_s=timeout_s))

    # --- models ---------------------------------------------------------------------------------------------------

    def models(self) -> list[Model]:
        """What may be named in requests, with its status."""
        return cast(list[Model], self._list(Call("GET", "/v1/models")))

    def model(self, name: str) -> Model:
        return cast(Model, self._json(calls.model(name)))

    def configured_models(self) -> list[ConfiguredModel]:
        """The models of the server's config.yaml, with their status."""
        return cast(list[ConfiguredModel], self._list(Call("GET", "/admin/models")))

    def configured_model(self, name: str) -> ConfiguredModel:
        return cast(ConfiguredModel, self._json(calls.configured(name)))

    def load(self, name: str, *, wait: bool = False, timeout_s: float | None = None) -> ConfiguredModel:
        """Load a configured model; with `wait` the answer comes when it is ready, or the cause as ServerError."""
        return cast(ConfiguredModel, self._json(calls.configured(name, "load", timeout_s, wait=wait)))

    def unload(self, name: str, *, force: bool = False, wait: bool = False,
               timeout_s: float | None = None) -> ConfiguredModel:
        """Let its requests finish (`force`: cut them), then stop it.  The next request loads it again."""
        return cast(ConfiguredModel, self._json(calls.configured(name, "unload", timeout_s, force=force, wait=wait)))

    def plan(self, name: str) -> Plan:
        """What a load of a configured model would do, without doing it."""
        return cast(Plan, self._json(calls.plan(name)))

    # --- instances ------------------------------------------------------------------------------------------------

    def instances(self) -> list[Instance]:
        return cast(list[Instance], self._list(Call("GET", "/instances")))

    def instance(self, instance_id: str) -> Instance:
        return cast(Instance, self._json(calls.instance(instance_id)))

    def create_instance(self, model_name: str, params: Mapping[str, Any] | None = None, *,
                        idle_timeout: float | None = None, start_timeout: float | None = None, wait: bool = False,
                        replace: bool = False, new: bool = False, sleep: int | None = None,
                        stop_after: float | None = None, timeout_s: float | None = None) -> Instance:
        """Start an instance, or find the one that is active with the same flags.

        `idle_timeout` is the API's `timeout`: seconds without a request until it is stopped or, with `sleep` 1 or 2,
        put to sleep, and stopped after `stop_after` more.  With `wait` the answer comes when it is ready, or the cause
        of its failure as ServerError.
        """
        return cast(Instance, self._json(calls.create(
            model_name, params, timeout_s, timeout=idle_timeout, start_timeout=start_timeout, wait=wait,
            replace=replace, new=new, sleep=sleep, stop_after=stop_after)))

    def stop_instance(self, instance_id: str, *, force: bool = False, wait: bool = False,
                      timeout_s: float | None = None) -> Instance:
        """Let its requests finish (`force`: cut them), then stop it; with `wait` the answer comes when it has gone."""
        return cast(Instance, self._json(calls.instance(
            instance_id, method="DELETE", force=force, wait=wait, timeout_s=timeout_s)))

    def sleep_instance(self, instance_id: str, *, level: int | None = None, wait: bool = False,
                       timeout_s: float | None = None) -> Instance:
        """Put it to sleep when its requests have ended: 1 keeps the weights in the host's memory, 2 does not."""
        return cast(Instance, self._json(calls.tiered(instance_id, "sleep", timeout_s, level=level, wait=wait)))

    def wake_instance(self, instance_id: str, *, wait: bool = False, timeout_s: float | None = None) -> Instance:
        return cast(Instance, self._json(calls.tiered(instance_id, "wake", timeout_s, wait=wait)))

    def logs(self, instance_id: str, *, tail: int | None = None) -> str:
        """The last `tail` lines of the engine's log, 200 if nothing is said."""
        return self._answer(calls.instance(instance_id, "logs", tail=tail)).text

    def follow_logs(self, instance_id: str, *, tail: int | None = None) -> Generator[str, None, None]:
        """The same and every line that comes, until the instance ends.  Silence is not limited."""
        return self._lines(calls.instance(instance_id, "logs", tail=tail, follow=True, timeout_s=math.inf))

    # --- the server -----------------------------------------------------------------------------------------------

    def gpus(self) -> Devices:
        return cast(Devices, self._json(Call("GET", "/gpus")))

    def health(self) -> Health:
        return cast(Health, self._json(Call("GET", "/health")))

    def version(self) -> Version:
        return cast(Version, self._json(Call("GET", "/version")))

    def audit(self, *, tail: int | None = None) -> list[AuditEntry]:
        """Who managed what lately, oldest first; 200 entries if nothing is said."""
        return cast(list[AuditEntry], self._list(calls.look("/admin/audit", tail=tail)))

    def load_stats(self) -> LoadStats:
        """The load of each instance and of each server on another machine, and of all together."""
        return cast(LoadStats, self._json(calls.look("/load-stats")))

    def history(self, *, since: float | None = None) -> History:
        """Figures of the last hour, a sample every few seconds; `since` (wall clock seconds): only what is later."""
        return cast(History, self._json(calls.look("/admin/history", since=since)))

    def events(self, *, tail: int | None = None) -> list[Event]:
        """What happened to instances, oldest first; the last 100 if nothing is said."""
        return cast(list[Event], self._list(calls.look("/admin/events", tail=tail)))

    def follow_events(self, *, after: int | None = None) -> Generator[dict[str, Any], None, None]:
        """What happens from now on, or since the event with the id `after`: beside what `events` tells also `instance`
        (one that changed), `gone` and `sample` (the newest figures)."""
        return self._feed(calls.feed(after))

    def recent_requests(self, *, tail: int | None = None, failed: bool = False) -> list[RecentRequest]:
        """The last requests for models, oldest first, never what they asked; `failed`: only those that failed."""
        return cast(list[RecentRequest], self._list(calls.look("/admin/requests", tail=tail, failed=failed)))

    def reload(self) -> Reload:
        """Make the server read its settings anew; the names of those that changed."""
        return cast(Reload, self._json(Call("POST", "/admin/reload")))
