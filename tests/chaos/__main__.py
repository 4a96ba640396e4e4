"""python -m tests.chaos --seed 7 --minutes 5: the same seed strikes the same blows in the same order.

Exit code 1 when an invariant broke: then the seed, the last faults and the daemon's log are printed.
"""

from __future__ import annotations

import argparse
import secrets
import shutil
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

from tests.chaos.faults import FAULTS, shapes
from tests.chaos.load import Load
from tests.chaos.runner import Runner
from tests.chaos.schedule import steps
from tests.chaos.world import MODELS, World
from tests.nvml import COMPILER, NO_COMPILER

LOG_LINES = 150
BROKEN_CHARACTERS = 600


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--seed", type=int, help="a fresh one where it is not given")
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--clients", type=int, default=6)
    parser.add_argument("--kinds", help="only these kinds of faults, separated by commas")
    parser.add_argument("--go-on", action="store_true", help="after an invariant broke, too")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))       # and nothing is left behind
    if COMPILER is None:
        sys.exit(f"chaos: {NO_COMPILER}")
    kinds = arguments.kinds.split(",") if arguments.kinds else list(FAULTS)
    if unknown := set(kinds) - FAULTS.keys():
        parser.error(f"unknown: {', '.join(unknown)}; there are {', '.join(FAULTS)}")
    seed = secrets.randbelow(1_000_000) if arguments.seed is None else arguments.seed
    again = f"make chaos SEED={seed} MINUTES={arguments.minutes:g}" + (
        f" KINDS={arguments.kinds}" if arguments.kinds else "")
    sys.stdout.write(f"chaos: seed {seed}; again with: {again}\n")
    return run(seed, arguments.minutes * 60, arguments.clients, kinds, again, arguments.go_on)


def run(seed: int, seconds: float, clients: int, kinds: list[str], again: str, go_on: bool) -> int:
    folder = Path(tempfile.mkdtemp(prefix="vllm-server-chaos-", dir="/tmp"))
    broken: list[str] = []
    began = time.monotonic()
    try:
        world = World(folder)
        with world:
            say(f"models {', '.join(MODELS)}, room for three; STATE_DIR on {world.disk.name}")
            load = Load(lambda: world.url, MODELS, clients, seed)
            runner = Runner(world, load, say)
            with load.running():
                runner.run(steps(seed, {kind: shape for kind, shape in shapes().items() if kind in kinds}), seconds,
                           go_on=go_on)
            broken = runner.broken
            if broken:
                log = world.daemon.log_path.read_text(errors="replace").splitlines()[-LOG_LINES:]
                say("\n".join(["", "the end of the daemon's log:", *log]))
                world.daemon.may_log_tracebacks = True
        say("\n" + runner.report())
    except AssertionError as error:     # what is left at the end
        broken = [*broken, f"at the end: {error}"]
        say(f"BROKEN at the end:\n{traceback.format_exc()}")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    for text in broken:     # once more, where one looks first
        say(f"BROKEN: {text[:BROKEN_CHARACTERS]}")
    say(f"{'BROKEN' if broken else 'all held'} after {time.monotonic() - began:.0f} s; again with: {again}")
    return 1 if broken else 0


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
