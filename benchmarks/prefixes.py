"""What the prefix policy brings on prompts that begin alike: hit rate of the caches and time to first token.

    .venv/bin/python benchmarks/prefixes.py [--rate 40] [--seconds 15]

Four simulated servers compute prompts at a pace, one after the other, and keep the beginnings of some: each cache holds
a third of them, so that all four together could hold them all.  Every request has one of 48 long beginnings, some far
more often than others (Zipf), and an end of its own.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

import aiohttp
import requests

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.fleet_world import Asked, FleetWorld, Load, ask, body, world

CAPACITIES = {"a": 16, "b": 16, "c": 16, "d": 16}
BEGINNINGS = 48
WORDS = 600                     # of a beginning
END_WORDS = 30
SIM = {"tokens_per_s": 100.0, "prefill_tokens_per_s": 6000.0}
POLICIES = ("load", "prefix", "session", "least_requests")


def beginnings(draw: random.Random) -> list[str]:
    return [" ".join(f"w{draw.randrange(10_000):04}" for _ in range(WORDS)) for _ in range(BEGINNINGS)]


def cache_tokens() -> int:
    """Room for a third of the beginnings, in the simulator's measure of 16 tokens for each block of 64 characters."""
    return BEGINNINGS * len(beginnings(random.Random(1))[0]) // 64 * 16 // 3


async def requests_of(url: str, rate: float, seconds: float) -> Load:
    draw, load, end = random.Random(2), Load(), time.monotonic() + seconds
    texts = beginnings(random.Random(1))
    weights = [1 / (rank + 1) for rank in range(BEGINNINGS)]

    async def one(session: aiohttp.ClientSession, prompt: str) -> None:
        load.asked.append(await ask(session, url, body(8, stream=True, prompt=prompt)))

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session, asyncio.TaskGroup() as tasks:
        while time.monotonic() < end:
            await asyncio.sleep(draw.expovariate(rate))
            tail = " ".join(f"e{draw.randrange(10_000)}" for _ in range(END_WORDS))
            tasks.create_task(one(session, f"{draw.choices(texts, weights)[0]} {tail}"))
    return load


def counted(made: FleetWorld, name: str) -> float:
    total = 0.0
    for server in made.servers.values():
        for line in requests.get(f"{server.url}/metrics", timeout=60).text.splitlines():
            if line.startswith(f"vllm:{name}{{"):
                total += float(line.rpartition(" ")[2])
    return total


def first_tokens_s(asked: list[Asked]) -> list[float]:
    return sorted(one.first_at - one.sent_at for one in asked if one.first_at is not None)


def measure(policy: str, rate: float, seconds: float) -> tuple[float, list[float], Load]:
    """The share of prompt tokens that came from a cache, after a warm-up as long; the times to the first token."""
    sim = SIM | {"prefix_cache_tokens": cache_tokens()}
    with tempfile.TemporaryDirectory() as folder, world(Path(folder), CAPACITIES, sim=sim, interval_s=10,
                                                        env={"ROUTING_POLICY": policy}) as made:
        asyncio.run(requests_of(made.url, rate, seconds))
        before = counted(made, "prefix_cache_hits_total"), counted(made, "prompt_tokens_total")
        load = asyncio.run(requests_of(made.url, rate, seconds))
        after = counted(made, "prefix_cache_hits_total"), counted(made, "prompt_tokens_total")
    assert not load.problems, load.problems[:3]
    return (after[0] - before[0]) / (after[1] - before[1]), first_tokens_s(load.asked), load


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rate", type=float, default=40)
    parser.add_argument("--seconds", type=float, default=15)
    parser.add_argument("--policies", nargs="*", default=POLICIES[:2])
    asked = parser.parse_args()
    print(f"{asked.rate:g} requests/s, {BEGINNINGS} beginnings, each server's cache holds a third of them\n\n"
          "| policy | hit rate | first token p50 ms | p90 ms | p99 ms | largest share of a server |\n"
          "| --- | --- | --- | --- | --- | --- |")
    for policy in asked.policies:
        hits, times, load = measure(policy, asked.rate, asked.seconds)
        shares = load.shares()
        print(f"| {policy} | {hits:.0%} | {statistics.median(times) * 1000:.0f} | "
              f"{times[int(len(times) * 0.9)] * 1000:.0f} | {times[int(len(times) * 0.99)] * 1000:.0f} | "
              f"{max(shares.values()) / sum(shares.values()):.0%} |", flush=True)


if __name__ == "__main__":
    main()
