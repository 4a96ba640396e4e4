"""How evenly servers of different sizes are loaded: shares of a closed loop of streams against shares of capacity.

    .venv/bin/python benchmarks/shares.py [--streams 60] [--seconds 20]

Four simulated servers that run 1, 2, 4 and 8 streams at once, and a daemon with each policy; `metrics alone` is the
load policy with nothing but what /metrics said last (up to 2 s ago), as mvllm and others choose.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.daemon import CHECKOUT
from tests.fleet_world import closed_loop, world

CAPACITIES = {"a": 1, "b": 2, "c": 4, "d": 8}
TOKENS, TOKENS_PER_S = 20, 50.0
WARM_S = 5.0
ALONE = "metrics alone"
POLICIES = ("load", ALONE, "round_robin", "least_requests")

METRICS_ALONE = f"""
import sys; sys.path.insert(0, {str(CHECKOUT)!r})
import routing.remote
routing.remote.projected = lambda reading, own, capacity: (reading.running, reading.waiting) if reading else (0.0, 0.0)
import app; app.main()
"""


def measure(policy: str, streams: int, seconds: float) -> tuple[dict[str, float], float, float]:
    """Each server's share of the streams over its share of the capacity, streams a second, the p99 of their time."""
    with tempfile.TemporaryDirectory() as folder, world(
            Path(folder), CAPACITIES, sim={"tokens_per_s": TOKENS_PER_S}, interval_s=10,
            entry=METRICS_ALONE if policy == ALONE else None,
            env={"ROUTING_POLICY": "load" if policy == ALONE else policy}) as made:
        begin = time.monotonic()
        load = asyncio.run(closed_loop(made.url, streams, WARM_S + seconds, TOKENS))
    assert not load.problems, load.problems[:3]
    counted = [one for one in load.asked if begin + WARM_S <= one.ended_at < begin + WARM_S + seconds]
    shares = Counter(one.server for one in counted)
    total, capacity = len(counted), sum(CAPACITIES.values())
    times = sorted(one.took_s for one in counted)
    return ({name: shares[name] / total / (own / capacity) for name, own in CAPACITIES.items()}, total / seconds,
            times[int(len(times) * 0.99)])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--streams", type=int, default=60)
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--policies", nargs="*", default=POLICIES)
    asked = parser.parse_args()
    most = sum(CAPACITIES.values()) * TOKENS_PER_S / (TOKENS - 1)       # the first token comes at once
    sizes = ":".join(map(str, CAPACITIES.values()))
    print(f"{asked.streams} streams, capacities {sizes}, at most {most:.1f} a second; share over share of capacity\n")
    print("| policy | " + " | ".join(CAPACITIES) + " | streams/s | p99 s |\n" + "| --- " * (len(CAPACITIES) + 3) + "|")
    for policy in asked.policies:
        shares, rate, p99 = measure(policy, asked.streams, asked.seconds)
        columns = [*(f"{share:.2f}" for share in shares.values()), f"{rate:.1f}", f"{p99:.1f}"]
        print(f"| {policy} | {' | '.join(columns)} |", flush=True)


if __name__ == "__main__":
    main()
