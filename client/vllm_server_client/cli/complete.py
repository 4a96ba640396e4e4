"""What the shell offers for a word: names that the server knows.  It never says anything, and never waits long."""

from __future__ import annotations

import click
from click.shell_completion import CompletionItem

from vllm_server_client.client import VLLMProxyClient
from vllm_server_client.errors import VLLMProxyError

PATIENCE_S = 1.0


def instance_words(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Ids, and the names of what has instances."""
    client = _client(context)
    if client is None:
        return []
    with client:
        try:
            found = client.instances()
        except VLLMProxyError:
            return []
    items = [CompletionItem(one["id"], help=f"{one['model_name']}, {one['status']}") for one in found]
    names = {name for one in found for name in (*one["aliases"], one["model_name"])}
    return [item for item in (*items, *map(CompletionItem, sorted(names))) if item.value.startswith(incomplete)]


def model_words(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    client = _client(context)
    if client is None:
        return []
    with client:
        try:
            found = client.models()
        except VLLMProxyError:
            return []
    return [CompletionItem(one["id"], help=one["status"]) for one in found if one["id"].startswith(incomplete)]


def _client(context: click.Context) -> VLLMProxyClient | None:
    """Of the address on the command line so far."""
    try:
        return VLLMProxyClient(context.params.get("url"), timeout_s=PATIENCE_S, connect_timeout_s=PATIENCE_S,
                               max_retries=0)
    except ValueError:
        return None
