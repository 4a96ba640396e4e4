"""What every test file may use."""

from __future__ import annotations

import time
from collections.abc import Callable


def wait_until(predicate: Callable[[], object], timeout_s: float = 120) -> None:
    """The only sleep in the tests.  The timeout is a guard against hanging, not part of what is tested."""
    deadline = time.monotonic() + timeout_s
    while not predicate():
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout_s} s: {predicate}")
        time.sleep(0.005)
