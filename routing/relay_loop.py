"""The loop that carries exchanges after their heads: upstream to client, byte for byte, with back-pressure.

Pure sockets.  It runs in a process of its own (relay_child.py, relay_process.py) or, in tests, in a thread.  The
modules it imports are few and small on purpose: they are most of that process's memory.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable

from routing.poller import Poller
from routing.relay_exchange import Exchange, OnEnd, Stream, Tunnel
from routing.relay_wire import CUT, TIMEOUT, Ended, Handover

__all__ = ["Ended", "Handover", "RelayLoop"]


class RelayLoop(Poller):
    """`on_end` is called in the loop's thread, once for each exchange added, and must not block.

    `add`, `cut` and `stop` may be called from any thread.  `run` returns after `stop`, when every exchange left has
    been cut and reported.
    """

    def __init__(self, on_end: OnEnd, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(clock)
        self._on_end = on_end
        self._exchanges: dict[int, Exchange] = {}

    def add(self, client: socket.socket, upstream: socket.socket, handover: Handover) -> None:
        """Both sockets are the loop's from here on."""
        self.call_soon(lambda: self._admit(client, upstream, handover))

    def cut(self, exchange_id: int, reason: bytes = b"") -> None:
        """Ends one visibly; `reason` stands for its `cut_message`.  Nothing happens where it has ended already."""
        self.call_soon(lambda: self._cut(exchange_id, reason))

    def open_count(self) -> int:
        return len(self._exchanges)

    def _admit(self, client: socket.socket, upstream: socket.socket, handover: Handover) -> None:
        kind = Tunnel if handover.framing.kind == "tunnel" else Stream
        try:
            exchange: Exchange = kind(self, client, upstream, handover, self._ended)
            self._exchanges[handover.id] = exchange
            exchange.start()
        except OSError:  # no socket that epoll takes, or no room for it
            self._exchanges.pop(handover.id, None)
            self.discard(client)
            self.discard(upstream)
            self._on_end(Ended(handover.id, 0, 0, None, 0.0, CUT, complete=False))

    def _ended(self, end: Ended) -> None:
        del self._exchanges[end.id]
        self._on_end(end)

    def _cut(self, exchange_id: int, reason: bytes) -> None:
        exchange = self._exchanges.get(exchange_id)
        if exchange is not None:
            exchange.abort(CUT, reason)

    def busy(self) -> bool:
        return bool(self._exchanges) or super().busy()

    def tick(self) -> None:
        super().tick()
        late = [
            exchange for exchange in self._exchanges.values()
            if exchange.idle_timeout_s is not None and self.now - exchange.active_at >= exchange.idle_timeout_s
        ]
        for exchange in late:
            exchange.abort(TIMEOUT)

    def close(self) -> None:
        while self._commands:
            self._commands.popleft()()
        for exchange in list(self._exchanges.values()):
            exchange.abort(CUT)
        super().close()
