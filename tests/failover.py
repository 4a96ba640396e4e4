"""Requests at a steady rate while one server after another is killed, hung, made to answer 500, and brought back."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from pathlib import Path

from tests.fleet_world import Asked, FleetWorld, Load, OpenLoop, SimulatedServer, until, world

CAPACITIES = {"a": 32, "b": 32, "c": 32, "d": 32}
SIM = {"tokens_per_s": 200.0}
INTERVAL_S = 1.0            # health_check_interval
TIMEOUT_S = 10.0            # request_timeout
WAYS = ("killed", "hung", "500")


@dataclass(frozen=True)
class Harm:
    """What one server was done, and what the requests that were under way meanwhile saw of it."""

    server: str
    way: str
    asked: int
    problems: list[Asked]
    worst_s: float              # the longest that one of them took
    noticed_s: float            # from the harm to the server's last answer or to when it was taken out
    back_s: float               # from its being able to answer again until it got requests


async def harm(made: FleetWorld, loop: OpenLoop, server: SimulatedServer, way: str, lasts_s: float) -> Harm:
    begin = time.monotonic()
    if way == "killed":
        await asyncio.to_thread(server.kill)
    elif way == "hung":
        await asyncio.to_thread(server.hang)
    else:
        await asyncio.to_thread(server.set, answer_status=500)
    out = (lambda: made.load()[server.name]["circuit"] != "closed") if way == "500" else \
        (lambda: made.load()[server.name]["health"] == "down")
    await until(out)
    noticed = time.monotonic()
    await asyncio.sleep(lasts_s)
    if way == "killed":
        await asyncio.to_thread(server.start)
        await asyncio.to_thread(server.ready)
    elif way == "hung":
        await asyncio.to_thread(server.resume)
    else:
        await asyncio.to_thread(server.set, answer_status=0)
    mended = time.monotonic()
    await until(lambda: any(one.server == server.name and one.sent_at >= mended for one in loop.load.asked))
    back = min(one.ended_at for one in loop.load.asked if one.server == server.name and one.sent_at >= mended)
    await asyncio.sleep(0.5)
    seen = loop.load.between(begin, back)
    return Harm(server.name, way, len(seen.asked), seen.problems, seen.worst_s(), noticed - begin, back - mended)


async def _run(made: FleetWorld, rate: float, ways: tuple[str, ...], lasts_s: float) -> tuple[list[Harm], Load]:
    async with OpenLoop(made.url, rate) as loop:
        await asyncio.sleep(2.0)
        harms = [await harm(made, loop, server, way, lasts_s)
                 for server, way in zip(made.servers.values(), ways, strict=False)]
    return harms, loop.load


def run(folder: Path, *, rate: float, ways: tuple[str, ...] = WAYS, lasts_s: float = 2.0) -> tuple[list[Harm], Load]:
    """Each way befalls another server."""
    with world(folder, CAPACITIES, sim=SIM, interval_s=INTERVAL_S, timeout_s=TIMEOUT_S) as made:
        return asyncio.run(_run(made, rate, ways, lasts_s))
