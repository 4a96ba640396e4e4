"""What every test file may use."""

from __future__ import annotations

import random
import socket
import time
from collections.abc import Callable

PORTS_EACH = 60


def wait_until(predicate: Callable[[], object], timeout_s: float = 120) -> None:
    """The only sleep in the tests.  The timeout is a guard against hanging, not part of what is tested."""
    deadline = time.monotonic() + timeout_s
    while not predicate():
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout_s} s: {predicate}")
        time.sleep(0.005)


def claim_ports() -> tuple[socket.socket, int]:
    """The first of PORTS_EACH - 1 free ports that no other test of this machine has, and the socket that keeps it so
    while it is open.

    Below the ephemeral range: what the kernel gives out to others meanwhile is none of them.
    """
    for start in random.sample(range(10_000, 32_000, PORTS_EACH), k=300):
        claim = socket.socket()
        try:
            claim.bind(("127.0.0.1", start))
            claim.listen(1)
        except OSError:
            claim.close()
            continue
        if all(map(can_bind_plainly, range(start + 1, start + PORTS_EACH))):
            return claim, start + 1
        claim.close()
    raise AssertionError("no range of ports is free")


def can_bind_plainly(port: int) -> bool:
    """Whether nobody has it, and no connection of somebody who had it lingers."""
    with socket.socket() as plain:
        try:
            plain.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
