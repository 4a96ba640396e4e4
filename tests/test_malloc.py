"""web/malloc.py: what large bodies took is given back, whatever small things lie between them."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

from tests.daemon import CHECKOUT

BODIES = """
import os, sys
from web.malloc import return_large_blocks
if sys.argv[1] == "told":
    return_large_blocks()

def resident_mib():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") >> 20

first = bytes(bytearray(4 << 20))
del first                       # from here on glibc keeps what is not larger
before, small = resident_mib(), []
for _ in range(3):
    large = []
    for _ in range(40):
        large.append(b"x" * (3 << 20))
        small.append(bytes(bytearray(1000)))
    del large
print(resident_mib() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
@pytest.mark.parametrize(("told", "low", "high"), [("told", -10, 8), ("not", 60, 1000)])
def test_large_blocks_are_returned(told: str, low: int, high: int) -> None:
    done = subprocess.run([sys.executable, "-c", BODIES, told], cwd=CHECKOUT, capture_output=True, text=True,
                          check=True)
    assert low <= int(done.stdout) <= high
