"""What the worker asks of the C library's allocator."""

from __future__ import annotations

import ctypes

LARGE_BLOCK_BYTES = 1 << 18     # of a body, mostly
_M_MMAP_THRESHOLD = -3          # malloc.h


def return_large_blocks() -> None:
    """Memory of large blocks goes back to the system when they are freed: mallopt(3).

    By itself, glibc takes the first one that is freed as a sign that there will be more, and keeps blocks of its size
    from then on: after some bodies of 4 MB, each on another thread, the daemon held 70 to 170 MB more, for good.
    """
    try:
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, LARGE_BLOCK_BYTES)
    except (OSError, AttributeError):
        return      # another C library, which has ways of its own
