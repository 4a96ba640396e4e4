"""How long one placement decision takes on a large box: 64 GPUs that 1,000 models live on.

    .venv/bin/python benchmarks/planning.py [--repeat 200]

Each case plans again and again, with other idle times.  The decision runs in a thread of the daemon, outside its lock,
yet holds the interpreter: it should take less than 5 ms.  Times are this thread's on the processor, so that what else
the machine does is not counted.
"""

from __future__ import annotations

import argparse
import gc
import random
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from errors import NoRoom
from gpu import Device
from instances.footprint import Footprint
from instances.ledger import Limits, Resident
from instances.placement import Need, plan

GIB = 1 << 30
GPUS, MODELS = 64, 1000
LIMITS = Limits(reserved_bytes=2 * GIB, sleep_host_bytes=400 * GIB)


def resident(number: int, home: int, asleep: bool, random: random.Random) -> Resident:
    """Every tenth spans two GPUs, every fifth is busy, every twentieth pinned; half of the others can sleep."""
    devices = (home, (home + 1) % GPUS) if number % 10 == 0 else (home,)
    size = random.choice((1, 2, 3, 5, 8)) * GIB
    held = GIB // 2 if asleep else size
    return Resident(f"i{number:04}", f"model-{number}", dict.fromkeys(devices, held), awake=not asleep,
                    busy=number % 5 == 0 and not asleep, pinned=number % 20 == 1, priority=random.choice((0, 0, 0, 1)),
                    idle_s=random.expovariate(1 / 600), reload_s=random.uniform(20, 200), wake_s=random.uniform(1, 8),
                    can_sleep=number % 2, asleep_on=dict.fromkeys(devices, GIB // 2), host_bytes=size * len(devices))


def world(random: random.Random, asleep_share: float) -> tuple[list[Device], list[Resident]]:
    """Each model is on the GPU with the most left; the GPUs are as large as makes them nearly full."""
    held = [0] * GPUS
    residents = []
    for number in range(MODELS):
        home = min(range(GPUS), key=lambda index: held[index])
        residents.append(resident(number, home, random.random() < asleep_share, random))
        for index, count in residents[-1].bytes_on.items():
            held[index] += count
    total = max(held) + 3 * GIB
    return [Device(index, f"GPU-{index}", "NVIDIA B200", "cuda", total, held[index], total - held[index])
            for index in range(GPUS)], residents


def again(residents: list[Resident], random: random.Random) -> list[Resident]:
    return [replace(each, idle_s=random.expovariate(1 / 600)) for each in random.sample(residents, len(residents))]


def measure(case: str, decide: Callable[[list[Resident]], None], residents: list[Resident], repeat: int,
            random: random.Random) -> tuple[float, float]:
    times = []
    for _ in range(repeat):
        now = again(residents, random)
        gc.collect()        # what the benchmark itself leaves about is not to be cleared away meanwhile
        gc.freeze()
        begun = time.thread_time()
        decide(now)
        times.append(1000 * (time.thread_time() - begun))
    times.sort()
    median, high = statistics.median(times), times[min(len(times) - 1, int(0.99 * len(times)))]
    print(f"| {case} | {median:.2f} | {high:.2f} | {times[-1]:.2f} |")
    return median, high


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--repeat", type=int, default=200)
    repeat = arguments.parse_args().repeat
    chance = random.Random(4)
    print(f"{GPUS} GPUs, {MODELS} models on them; milliseconds for one decision\n")
    print("| case | median | p99 | most |\n| --- | ---: | ---: | ---: |")
    for asleep_share, label in ((0.0, "all awake"), (0.5, "half asleep")):
        devices, residents = world(chance, asleep_share)
        free = devices[0].total_bytes
        roomiest = max(device.free_bytes for device in devices)
        for name, size, count in (
                ("room is there", GIB // 2, 1),
                ("one GPU, a few victims", roomiest + 4 * GIB, 1), ("one GPU, many victims", free // 2, 1),
                ("8 GPUs, a few victims", roomiest + 4 * GIB, 8), ("8 GPUs, many victims", free // 2, 8),
                ("no room at all", free - 2 * GIB, 32)):
            need = Need("new", Footprint(size), count)

            def decide(now: list[Resident], need: Need = need, devices: list[Device] = devices) -> None:
                with suppress(NoRoom):
                    plan(need, devices, now, LIMITS)

            measure(f"{name}, {label}", decide, residents, repeat, chance)


if __name__ == "__main__":
    main()
