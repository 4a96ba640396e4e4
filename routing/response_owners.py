"""Which backend made a stored response: the ids of /v1/responses mean something there only."""

from __future__ import annotations

import re
import threading
from collections import OrderedDict

REMEMBERED = 10_000
_RESPONSE_ID = re.compile(rb'"id"\s*:\s*"(resp_[\w-]{1,128})"')


class ResponseOwners:
    """Thread-safe; the oldest are forgotten."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._owners: OrderedDict[str, str] = OrderedDict()

    def learn(self, first_piece: bytes, backend: str) -> None:
        """From the first bytes of an answer, which hold its id."""
        if found := _RESPONSE_ID.search(first_piece):
            self.note(found[1].decode(), backend)

    def note(self, response_id: str, backend: str) -> None:
        with self._lock:
            self._owners[response_id] = backend
            self._owners.move_to_end(response_id)
            while len(self._owners) > REMEMBERED:
                self._owners.popitem(last=False)

    def find(self, response_id: str | None) -> str | None:
        with self._lock:
            return self._owners.get(response_id) if response_id is not None else None
