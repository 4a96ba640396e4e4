"""What clients see of it when servers are killed, hung, made to answer 500, and brought back, at a steady rate.

    .venv/bin/python benchmarks/failover.py [--rate 300] [--rounds 1]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests import failover


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rate", type=float, default=300)
    parser.add_argument("--rounds", type=int, default=1)
    asked = parser.parse_args()
    print(f"{asked.rate:g} requests/s to {len(failover.CAPACITIES)} servers, health checks every "
          f"{failover.INTERVAL_S:g} s, request_timeout {failover.TIMEOUT_S:g} s\n")
    print("| server is | requests meanwhile | failed | longest request s | out after s | back after s |\n"
          "| --- | --- | --- | --- | --- | --- |")
    failed = 0
    for _ in range(asked.rounds):
        with tempfile.TemporaryDirectory() as folder:
            harms, load = failover.run(Path(folder), rate=asked.rate)
        failed += len(load.problems)
        for one in harms:
            print(f"| {one.way} | {one.asked} | {len(one.problems)} | {one.worst_s:.2f} | {one.noticed_s:.2f} | "
                  f"{one.back_s:.2f} |", flush=True)
        times = sorted(one.took_s for one in load.asked)
        print(f"| all: {len(load.asked)} requests | | {len(load.problems)} | {times[-1]:.2f} | | |")
        for one in load.problems[:5]:
            print(one, file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
