"""What each method sends and how its answer is read: values and functions of values, shared by both clients."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote, urlsplit

import httpx

from vllm_server_client.errors import BadAnswer, StreamBroken, from_answer, from_event

DEFAULT_URL = "http://127.0.0.1:5000"
URL_VARIABLE = "VLLM_SERVER_URL"
KEY_VARIABLE = "VLLM_SERVER_API_KEY"
DONE = "[DONE]"
FEED_SILENCE_S = 60.0       # a feed of events says every 15 s that it is there


@dataclass(frozen=True)
class Call:
    """One request.  `timeout_s` None: the client's own."""

    method: str
    path: str
    body: Mapping[str, Any] | None = None
    query: Mapping[str, str] = field(default_factory=dict)
    timeout_s: float | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def repeatable(self) -> bool:
        """Whether sending it twice does no more than sending it once."""
        return self.method in ("GET", "HEAD")


@dataclass(frozen=True)
class Address:
    """Where the server is, and what every request to it carries."""

    url: str
    headers: Mapping[str, str]
    trust_env: bool


def address(base_url: str | None, api_key: str | None, environ: Mapping[str, str] = os.environ) -> Address:
    """From the arguments, else the environment, else the default.  An OpenAI base URL (with /v1) is understood.

    Raises ValueError for what is no http(s) URL.
    """
    url = (base_url or environ.get(URL_VARIABLE) or DEFAULT_URL).rstrip("/").removesuffix("/v1").rstrip("/")
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"{url!r} is no address of a server; it should look like {DEFAULT_URL}")
    key = environ.get(KEY_VARIABLE) if api_key is None else api_key
    local = parts.hostname == "localhost" or parts.hostname.startswith("127.") or parts.hostname == "::1"
    # No proxy stands between this machine and itself, whatever HTTP_PROXY says.
    return Address(url, {"Authorization": f"Bearer {key}"} if key else {}, trust_env=not local)


# --- inference ---------------------------------------------------------------------------------------------------

def chat(model: str, messages: Sequence[Mapping[str, Any]], params: Mapping[str, Any], timeout_s: float | None,
         *, stream: bool = False) -> Call:
    return _generate("/v1/chat/completions", {"model": model, "messages": list(messages)}, params, timeout_s, stream)


def completion(model: str, prompt: Any, params: Mapping[str, Any], timeout_s: float | None, *,
               stream: bool = False) -> Call:
    return _generate("/v1/completions", {"model": model, "prompt": prompt}, params, timeout_s, stream)


def embedding(model: str, texts: Any, params: Mapping[str, Any], timeout_s: float | None) -> Call:
    return Call("POST", "/v1/embeddings", {"model": model, "input": texts, **params}, timeout_s=timeout_s)


def _generate(path: str, body: dict[str, Any], params: Mapping[str, Any], timeout_s: float | None,
              stream: bool) -> Call:
    if "stream" in params:
        raise TypeError("stream is no parameter here: chat_completion_stream and completion_stream stream")
    return Call("POST", path, {**body, **params, **({"stream": True} if stream else {})}, timeout_s=timeout_s)


# --- events of a stream ------------------------------------------------------------------------------------------

def read_event(data: str) -> Any:
    """The chunk of one event.  Raises ServerError for an error event, StreamBroken for what is no JSON."""
    try:
        chunk = json.loads(data)
    except ValueError:
        raise StreamBroken(f"the stream holds something else than JSON: {data[:200]!r}") from None
    if not isinstance(chunk, dict):
        raise StreamBroken(f"the stream holds something else than a chunk: {data[:200]!r}")
    if "error" in chunk:
        raise from_event(chunk["error"])
    return chunk


def feed(after: int | None) -> Call:
    return Call("GET", "/admin/events", query={"follow": "1"}, timeout_s=FEED_SILENCE_S,
                headers={} if after is None else {"Last-Event-ID": str(after)})


def chat_text(chunk: Mapping[str, Any]) -> str:
    """The text that a chunk adds to the first answer."""
    choices = chunk.get("choices") or [{}]
    return choices[0].get("delta", {}).get("content") or ""


def completion_text(chunk: Mapping[str, Any]) -> str:
    choices = chunk.get("choices") or [{}]
    return choices[0].get("text") or ""


def check_event_stream(response: httpx.Response) -> None:
    """Raises BadAnswer when the server did not answer with a stream."""
    kind = response.headers.get("content-type", "")
    if not kind.startswith("text/event-stream"):
        raise BadAnswer(f"a stream was asked for, and {kind or 'something without a type'} was the answer")


def ended_early(url: str) -> StreamBroken:
    return StreamBroken(f"the stream from {url} ended without its [DONE]: it was cut on the way")


# --- management --------------------------------------------------------------------------------------------------

def model(name: str) -> Call:
    return Call("GET", f"/v1/models/{_segment(name)}")


def configured(name: str, action: str = "", timeout_s: float | None = None, **fields: bool) -> Call:
    """With an action a POST; `fields` that are False are left out."""
    path = f"/admin/models/{_segment(name)}{f'/{action}' if action else ''}"
    if not action:
        return Call("GET", path)
    return Call("POST", path, {field: True for field, wanted in fields.items() if wanted}, timeout_s=timeout_s)


def plan(name: str) -> Call:
    return Call("GET", f"/admin/models/{_segment(name)}/plan")


def tiered(instance_id: str, action: str, timeout_s: float | None, **fields: int | None) -> Call:
    """sleep and wake; `fields` that are None or False are left out."""
    given = {name: value for name, value in fields.items() if value is not None and value is not False}
    return Call("POST", f"/instances/{_segment(instance_id)}/{action}", given, timeout_s=timeout_s)


def look(path: str, **query: float | None) -> Call:
    """A GET; `query` values that are None or False are left out."""
    words = {name: repr(value) if isinstance(value, float) else str(int(value)) for name, value in query.items()
             if value is not None and value is not False}
    return Call("GET", path, query=words)


def instance(instance_id: str, action: str = "", *, method: str = "GET", body: Mapping[str, Any] | None = None,
             timeout_s: float | None = None, **query: Any) -> Call:
    """`query` values that are None or False are left out."""
    words = {name: str(int(value)) for name, value in query.items() if value is not None and value is not False}
    path = f"/instances/{_segment(instance_id)}{f'/{action}' if action else ''}"
    return Call(method, path, body, words, timeout_s)


def create(model_name: str, params: Mapping[str, Any] | None, timeout_s: float | None, **fields: Any) -> Call:
    """`fields` that are None or False are left to the server's defaults."""
    given = {name: value for name, value in fields.items() if value is not None and value is not False}
    return Call("POST", "/instances", {"model_name": model_name, "params": dict(params or {}), **given},
                timeout_s=timeout_s)


def check_status(response: httpx.Response) -> None:
    """Raises ServerError unless the answer, which was read, is a good one."""
    if not response.is_success:
        raise from_answer(response.status_code, response.headers, response.content)


def read_json(response: httpx.Response) -> Any:
    """Raises BadAnswer."""
    try:
        return response.json()
    except ValueError:
        raise BadAnswer(f"{response.request.url} answered with {response.headers.get('content-type', 'no type')} "
                        f"instead of JSON: does vllm-server listen there?") from None


def read_list(response: httpx.Response) -> Any:
    """The `data` of a list.  Raises BadAnswer."""
    answer = read_json(response)
    if not isinstance(answer, dict) or not isinstance(answer.get("data"), list):
        raise BadAnswer(f"{response.request.url} did not answer with a list: does vllm-server listen there?")
    return answer["data"]


def _segment(name: str) -> str:
    """A name as it stands in a path; the slash of a hub's id stays."""
    return quote(name, safe="/")
