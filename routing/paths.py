"""What vLLM serves, as data: which paths the data plane forwards, and which it never does.  Pure.

Source: the route table of vLLM 0.32's OpenAI server (vllm/entrypoints/openai/api_server.py and the routers it
includes).
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from urllib.parse import unquote

BY_MODEL = (
    "/v1/chat/completions", "/v1/chat/completions/batch", "/v1/completions", "/v1/responses", "/v1/messages",
    "/v1/messages/count_tokens", "/v1/embeddings", "/v2/embed", "/v1/audio/transcriptions", "/v1/audio/translations",
    "/v1/score", "/v1/rerank", "/v2/rerank", "/pooling", "/classify", "/score", "/rerank", "/tokenize", "/detokenize",
    "/invocations",
    "/v1/chat/completions/render", "/v1/chat/completions/derender", "/v1/completions/render",
    "/v1/completions/derender", "/v1/messages/render", "/v1/responses/render", "/inference/v1/generate",
    "/generative_scoring", "/v1/systemone", "/cohere/v2/chat", "/cohere/v2/chat/render",
)
"""POST; the body names the model."""

ADAPTERS = ("/v1/load_lora_adapter", "/v1/unload_lora_adapter")
"""POST, management: the body names the adapter, and the model whose engine gets it."""

REALTIME = "/v1/realtime"
"""A WebSocket; its model stands in the query, if anywhere: the message that names it comes after the handshake."""

DEV_MODE = frozenset({
    "sleep", "wake_up", "is_sleeping", "reset_prefix_cache", "reset_mm_cache", "reset_encoder_cache",
    "collective_rpc", "server_info", "pause", "resume", "is_paused", "start_profile", "stop_profile",
    "scale_elastic_ep", "is_scaling_elastic_ep", "init_weight_transfer_engine", "shutdown_weight_transfer_engine",
    "update_weights", "start_weight_update", "start_draft_weight_update", "finish_weight_update",
    "update_weight_version", "weight_info", "weight_checker", "get_world_size", "abort_requests",
    "release_kv_cache_memory", "fault_tolerance", "sim",
})
"""First segments of vLLM's development routes, which no key of the engine protects."""


def is_dev_mode(path: str) -> bool:
    """Whether an engine could read this path as one of its development routes, in any spelling."""
    return any(segment in DEV_MODE for segment in _segments(path))


def is_confusing(path: str) -> bool:
    """Dot segments, doubled slashes and control characters: read differently by different servers, so refused."""
    path = _decoded(path)
    segments = [segment.partition(";")[0] for segment in path.replace("\\", "/").split("/")]
    if "." in segments or ".." in segments or "" in segments[1:-1]:
        return True
    return any(ord(char) < 32 or 0x7f <= ord(char) < 0xa0 or char == "\ufffd" for char in path)


def _decoded(path: str) -> str:
    """As often as it is encoded: some server on the way may decode once more than the last one."""
    while (decoded := unquote(path)) != path:
        path = decoded
    return path


def _segments(path: str) -> Iterator[str]:
    """Every name that any server could read in it: without parameters and queries, in whatever case and script."""
    plain = unicodedata.normalize("NFKC", _decoded(path)).replace("\\", "/")
    for segment in re.split(r"[/?#]", plain):
        yield "".join(char for char in segment.partition(";")[0].casefold() if char.isprintable()).strip().rstrip(".")
