"""What the monitor shows at one moment, as values, and what changed between two of them.  Pure but for `take`."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from vllm_server_client.async_client import AsyncVLLMProxyClient
from vllm_server_client.cli import words
from vllm_server_client.types import BackendLoad, Devices, Health, Instance
from vllm_server_client.types import Event as Happened

EVENTS_ASKED = 100


@dataclass(frozen=True)
class Snapshot:
    """`servers` are on other machines, `events` the last that the daemon remembers, oldest first."""

    health: Health
    devices: Devices
    instances: Sequence[Instance]
    servers: Sequence[BackendLoad] = ()
    events: Sequence[Happened] = ()


class Event(NamedTuple):
    """`at`: wall clock, None: now."""

    text: str
    style: str
    at: float | None = None


async def take(client: AsyncVLLMProxyClient) -> Snapshot:
    """Ask for everything at once.  Raises VLLMProxyError."""
    health, devices, instances, load, events = await asyncio.gather(
        client.health(), client.gpus(), client.instances(), client.load_stats(), client.events(tail=EVENTS_ASKED))
    return Snapshot(health, devices, sorted(instances, key=lambda one: (one["created"], one["id"])),
                    [one for one in load["servers"] if one["kind"] == "server"], events)


def changes(old: Snapshot | None, new: Snapshot) -> list[Event]:
    """What has happened since; at first, what the daemon remembers."""
    last_id = old.events[-1]["id"] if old is not None and old.events else 0
    if new.events and new.events[-1]["id"] < last_id:
        last_id = 0     # another daemon
    events = [Event(_told(one), words.STYLES.get(one["to"], ""), one["at"]) for one in new.events
              if one["id"] > last_id and one["event"] == "state"]
    problem = new.health["config"]["error"]
    if problem and (old is None or problem != old.health["config"]["error"]):
        events.append(Event(f"the configuration on disk is not used: {problem}", "red"))
    return events + list(_server_changes(() if old is None else old.servers, new.servers))


def _told(one: Happened) -> str:
    why = one.get("why")
    return words.plain(f"{one['model']} {one['instance']} is {one['to'].replace('_', ' ')}{f': {why}' if why else ''}")


def _server_changes(old: Sequence[BackendLoad], new: Sequence[BackendLoad]) -> Iterable[Event]:
    before = {one["id"]: one["health"] for one in old}
    for one in new:
        if before.get(one["id"]) not in (None, one["health"]):
            yield Event(f"server {one['id']} is {one['health']}: {one['why']}", "green" if one["status"] else "red")
