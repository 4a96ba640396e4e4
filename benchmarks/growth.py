"""How replicas follow a load: how many there are, and what clients get, second by second.

    .venv/bin/python benchmarks/growth.py [--clients 24] [--load 60] [--quiet 60]

One model with `replicas: {min: 1, max: 4}` whose simulated engine takes 5 s to start and runs four streams at once, at
20 tokens a second each.  So many clients ask for 20 tokens again and again for `--load` seconds, then one of them for
`--quiet` seconds.  REPLICAS_GROW_SECONDS is 5 and REPLICAS_SHRINK_SECONDS 10, so that it does not take a quarter of an
hour.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.daemon import Daemon
from tests.fleet_world import Load, closed_loop

STEP_S = 5.0
ENTRY = {"model_path": "org/m", "replicas": {"min": 1, "max": 4}, "params": {
    "max_num_seqs": 4, "additional_config": {"sim": {"start_s": 5, "tokens_per_s": 20}}}}
SETTINGS = {"REPLICAS_GROW_SECONDS": "5", "REPLICAS_SHRINK_SECONDS": "10"}


async def watch(daemon: Daemon, until: float, begun: float, seen: list[tuple[float, dict[str, Any]]]) -> None:
    while time.monotonic() < until:
        model = await asyncio.to_thread(lambda: daemon.get("/admin/models/m").json)
        ready = sum(one["status"] == "ready" for one in model["instances"])
        seen.append((time.monotonic() - begun, model["replicas"] | {"ready": ready}))
        await asyncio.sleep(0.5)


async def phase(daemon: Daemon, clients: int, seconds: float, begun: float,
                seen: list[tuple[float, dict[str, Any]]]) -> Load:
    watching = asyncio.create_task(watch(daemon, time.monotonic() + seconds, begun, seen))
    load = await closed_loop(f"http://127.0.0.1:{daemon.port}", clients, seconds, tokens=20)
    await watching
    return load


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--clients", type=int, default=24)
    parser.add_argument("--load", type=float, default=60, metavar="SECONDS")
    parser.add_argument("--quiet", type=float, default=60, metavar="SECONDS")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        daemon = Daemon(Path(folder) / "daemon", SETTINGS)
        daemon.folder.mkdir()
        (daemon.folder / "config.yaml").write_text(json.dumps({"models": {"m": ENTRY}}))
        with daemon:
            seen: list[tuple[float, dict[str, Any]]] = []
            assert daemon.post("/admin/models/m/load", {"wait": True}).status == 200
            begun = time.monotonic()
            loads = [asyncio.run(phase(daemon, clients, seconds, begun, seen))
                     for clients, seconds in ((asked.clients, asked.load), (1, asked.quiet))]
    answers = [one for load in loads for one in load.asked]
    print("| seconds | replicas ready | streams ended a second | p50 | longest |\n| --- | --- | --- | --- | --- |")
    for step in range(int((asked.load + asked.quiet) / STEP_S)):
        low, high = step * STEP_S, (step + 1) * STEP_S
        ready = [found["ready"] for at, found in seen if low <= at < high]
        took = sorted(one.took_s for one in answers if low <= one.ended_at - begun < high)
        if took and ready:
            print(f"| {low:.0f} to {high:.0f} | {min(ready)} to {max(ready)} | {len(took) / STEP_S:.1f} | "
                  f"{took[len(took) // 2]:.1f} s | {took[-1]:.1f} s |")
    lost = [one for one in answers if one.problem is not None]
    print(f"\n{len(answers)} requests, {len(lost)} lost; at most {max(found['ready'] for _, found in seen)} replicas, "
          f"{seen[-1][1]['ready']} at the end")
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
