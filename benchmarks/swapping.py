"""200 clients ask three models of which one fits: by turns, and by swapping for whoever is next.

    python benchmarks/swapping.py [--seconds 60] [--clients 200]

Both sides are this daemon with simulated engines that start in half a second on a simulated GPU, under the same
clients.  `turns` is the daemon's own rule.  `at once` is llama-swap's: requests pass in the order in which they came,
and one that names another model than the one before swaps as soon as the requests that run have ended.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests import three_models
from tests.traffic import longest_wait_s, problems, quantiles_s

RULES = {"turns": three_models.run, "at once": three_models.run_at_once}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--clients", type=int, default=three_models.CLIENTS)
    settings = parser.parse_args()
    print(f"{settings.clients} clients, {settings.seconds:g} s; turns of {three_models.MAX_HOLD_S:g} s; "
          f"{platform.machine()}, {os.cpu_count()} cores")
    print(f"{'rule':<9}{'answers':>9}{'failed':>8}{'swaps':>7}{'answers/s':>11}{'answers a swap':>16}"
          f"{'median s':>10}{'p95 s':>8}{'longest s':>11}")
    worst = 0
    for rule, run in RULES.items():
        with tempfile.TemporaryDirectory() as folder:
            outcome = run(Path(folder), settings.seconds, clients=settings.clients)
        found, failed = outcome.exchanges, problems(outcome.exchanges)
        took_s = max(one.ended_at for one in found) - min(one.sent_at for one in found)
        median, p95, _ = quantiles_s(found)
        print(f"{rule:<9}{len(found) - len(failed):>9,}{len(failed):>8}{outcome.swaps:>7}"
              f"{(len(found) - len(failed)) / took_s:>11.1f}{len(found) / max(1, outcome.swaps):>16.1f}{median:>10.2f}"
              f"{p95:>8.2f}{max(longest_wait_s(found).values()):>11.2f}", flush=True)
        for line in failed[:5]:
            print(" ", line)
        worst = max(worst, len(failed))
    return 1 if worst else 0


if __name__ == "__main__":
    sys.exit(main())
