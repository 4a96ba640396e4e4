"""Guided by coverage, for as long as one likes: `python -m tests.fuzz --seconds 3600 [NAME ...]` (make fuzz).

Each target runs in a process of its own, one after the other, for its share of the time.  What breaks one is written to
FOLDER/NAME/ and printed; then the exit code is 1.  Needs atheris (pip install atheris), which has wheels for Linux.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parent.parent.parent
LONGEST_INPUT_S = 10        # more than that for one input is a finding, too
MAX_BYTES = 16384
INSTRUMENTED = ["configuration", "instances", "routing", "web.intake", "werkzeug.sansio", "yaml", "dotenv"]


def fuzz_one(name: str, folder: Path, seconds: int) -> None:
    """In this process, which atheris ends."""
    import atheris

    with atheris.instrument_imports(include=INSTRUMENTED, enable_loader_override=False):
        from tests.fuzz import targets
    atheris.Setup([sys.argv[0], str(folder), f"-artifact_prefix={folder}/broken-", f"-max_len={MAX_BYTES}",
                   f"-max_total_time={seconds}", f"-timeout={LONGEST_INPUT_S}", "-rss_limit_mb=2048",
                   "-print_final_stats=1"], targets.TARGETS[name].run)
    atheris.Fuzz()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz")
    parser.add_argument("--seconds", type=int, default=3600, help="for all targets together")
    parser.add_argument("--folder", type=Path, help="keeps inputs that were of interest, for the next run")
    parser.add_argument("--in-process", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("names", nargs="*", help="of targets.TARGETS; none: all")
    arguments = parser.parse_args()
    if arguments.in_process:
        fuzz_one(arguments.names[0], arguments.folder, arguments.seconds)
        return 0
    from tests.fuzz.targets import TARGETS  # not before: only what is imported under atheris is seen by it

    names = arguments.names or list(TARGETS)
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="vllm-server-fuzz-"))
    broken = 0
    for name in names:
        own = folder / name
        own.mkdir(parents=True, exist_ok=True)
        for number, example in enumerate(TARGETS[name].examples):
            (own / f"example-{number}").write_bytes(example)
        began = time.monotonic()
        done = subprocess.run([sys.executable, "-m", "tests.fuzz", "--in-process", "--folder", str(own), "--seconds",
                               str(max(1, arguments.seconds // len(names))), name],
                              cwd=CHECKOUT, capture_output=True, text=True, errors="replace", check=False)
        runs = re.search(r"number_of_executed_units: (\d+)", done.stderr)
        print(f"{name}: {runs[1] if runs else '?'} inputs in {time.monotonic() - began:.0f} s, "
              f"{'nothing broke' if done.returncode == 0 else f'BROKEN ({done.returncode})'}", flush=True)
        if done.returncode != 0:
            broken += 1
            print(done.stderr[-3000:], *sorted(str(path) for path in own.glob("broken-*")), sep="\n", flush=True)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
