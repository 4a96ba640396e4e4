"""Which of a model's backends gets the next request.  Pure: candidates in, an id out."""

from __future__ import annotations

import random
from collections.abc import Sequence

from instances.instance import Candidate, State


def pick(candidates: Sequence[Candidate], prefer: str | None = None) -> str | None:
    """The ready one with the fewest requests in flight, ties at random; `prefer` when that is ready.

    None when none is ready.  Advice only: the lease decides.
    """
    ready = [candidate for candidate in candidates if candidate.state is State.READY]
    if not ready:
        return None
    if prefer is not None and any(candidate.id == prefer for candidate in ready):
        return prefer
    least = min(candidate.in_flight for candidate in ready)
    return random.choice([candidate.id for candidate in ready if candidate.in_flight == least])
