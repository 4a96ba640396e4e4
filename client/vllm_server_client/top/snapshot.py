"""What the monitor shows at one moment, as values, and what changed between two of them.  Pure but for `take`."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from vllm_server_client.async_client import AsyncVLLMProxyClient
from vllm_server_client.cli import words
from vllm_server_client.types import Devices, Health, Instance

_SERIES = {"vllm:num_requests_waiting": "waiting", "vllm:kv_cache_usage_perc": "cache",
           "vllm:gpu_cache_usage_perc": "cache", "vllm:generation_tokens_total": "tokens"}
_SAMPLE = re.compile(r'^(vllm:\w+)\{([^}]*)\} (\S+)', re.MULTILINE)
_INSTANCE = re.compile(r'(?:^|,)instance="([^"]+)"')


class Figures(NamedTuple):
    """Of one engine: requests that wait in it, the share of its cache in use, tokens generated since its start."""

    waiting: float = 0.0
    cache: float = 0.0
    tokens: float = 0.0


@dataclass(frozen=True)
class Snapshot:
    """`at` is monotonic; `servers` are those of /load-stats; `figures` are by instance id, where known."""

    at: float
    health: Health
    devices: Devices
    instances: Sequence[Instance]
    servers: Sequence[Mapping[str, Any]] = ()
    figures: Mapping[str, Figures] = field(default_factory=dict)


class Event(NamedTuple):
    text: str
    style: str


async def take(client: AsyncVLLMProxyClient) -> Snapshot:
    """Ask for everything at once.  Raises VLLMProxyError."""
    health, devices, instances = await asyncio.gather(client.health(), client.gpus(), client.instances())
    return Snapshot(time.monotonic(), health, devices, sorted(instances, key=lambda one: (one["created"], one["id"])))


def figures_of(metrics: str) -> dict[str, Figures]:
    """By instance, from the text of /metrics?instances=true; an engine's several series are added up."""
    found: dict[str, dict[str, float]] = {}
    for name, labels, value in _SAMPLE.findall(metrics):
        instance = _INSTANCE.search(labels)
        if instance is None or name not in _SERIES:
            continue
        sums = found.setdefault(instance[1], {})
        sums[_SERIES[name]] = sums.get(_SERIES[name], 0.0) + float(value)
    return {instance: Figures(**sums) for instance, sums in found.items()}


def tokens_per_s(old: Snapshot | None, new: Snapshot, instance_id: str) -> float | None:
    """None while only one reading is there, or when the engine began anew in between."""
    before = old.figures.get(instance_id) if old is not None else None
    after = new.figures.get(instance_id)
    if old is None or before is None or after is None or new.at <= old.at or after.tokens < before.tokens:
        return None
    return (after.tokens - before.tokens) / (new.at - old.at)


def changes(old: Snapshot | None, new: Snapshot) -> list[Event]:
    """What has happened since: instances that came, changed and went, servers that fell and rose."""
    if old is None:
        return []
    before = {one["id"]: one for one in old.instances}
    after = {one["id"]: one for one in new.instances}
    events = [event for one in new.instances for event in _change(before.get(one["id"]), one)]
    gone = [one for one in old.instances if one["id"] not in after]
    events += [Event(f"{words.name(one)} {one['id']} is gone", "dim") for one in gone]
    problem = new.health["config"]["error"]
    if problem and problem != old.health["config"]["error"]:
        events.append(Event(f"the configuration on disk is not used: {problem}", "red"))
    return events + list(_server_changes(old.servers, new.servers))


def _change(old: Instance | None, new: Instance) -> Iterable[Event]:
    status = new["status"]
    if old is not None and old["status"] == status and old["restarts"] == new["restarts"]:
        return
    error = new["last_error"] if status in ("failed", "backoff") else None
    why = error["message"] if error is not None else new["why"]
    yield Event(f"{words.name(new)} {new['id']} is {status.replace('_', ' ')}{f': {why}' if why else ''}",
                words.STYLES.get(status, ""))


def _server_changes(old: Sequence[Mapping[str, Any]], new: Sequence[Mapping[str, Any]]) -> Iterable[Event]:
    before = {one["url"]: one["status"] for one in old}
    for one in new:
        if before.get(one["url"]) not in (None, one["status"]):
            yield Event(f"server {one['url']} is {one['status']}", "green" if one["status"] == "up" else "red")
