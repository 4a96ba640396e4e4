"""Forty models on eight simulated GPUs for a while, and the picture of what held their memory.

    python benchmarks/forty_models.py [--seconds 60] [--clients 100] [--picture docs/forty-models.svg]

The world is tests/forty_models.py, which the slow tests judge; this draws it and prints its figures.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.memory_picture import draw
from tests import forty_models
from tests.traffic import problems, quantiles_s


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--clients", type=int, default=forty_models.CLIENTS)
    parser.add_argument("--picture", type=Path)
    settings = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        outcome = forty_models.run(Path(folder), settings.seconds, settings.clients)
    failed = problems(outcome.exchanges)
    median, p95, p99 = quantiles_s(outcome.exchanges)
    print(f"{settings.clients} clients for {settings.seconds:g} s on {platform.machine()}, {os.cpu_count()} cores: "
          f"{len(outcome.exchanges):,} requests, {len(failed)} failed; {outcome.loads} loads, "
          f"{len(forty_models.spoilt(outcome))} of them begun anew for foreigners who came, "
          f"{len(forty_models.unexplained(outcome))} that found no memory otherwise; wait for the first token: median "
          f"{median:.2f} s, p95 {p95:.2f} s, p99 {p99:.2f} s")
    for line in failed[:10]:
        print(line)
    if settings.picture is not None:
        count = sum(size.count for size in forty_models.SIZES)
        title = (f"Memory of {forty_models.GPUS} simulated GPUs by instance: {count} models, {settings.clients} "
                 f"clients, {outcome.loads} loads")
        settings.picture.write_text(draw(outcome.moments, forty_models.sizes_gib(), forty_models.KINDS, title))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
