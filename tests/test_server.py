"""The master process, without one."""

from __future__ import annotations

import queue
import signal
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest

from web.server import Master


class Told(Master):
    """Has one worker, which ends at the order that `heeds` names, when that has come `deaf` times before."""

    def __init__(self, heeds: signal.Signals, deaf: int) -> None:
        self._heeds, self._deaf = heeds, deaf
        self._notifier = MagicMock()
        self.cfg = SimpleNamespace(graceful_timeout=300)
        self.LISTENERS, self.systemd, self.pid = [], False, 0
        self.WORKERS = {1: None}
        self.SIG_QUEUE: queue.SimpleQueue[int] = queue.SimpleQueue()
        self.orders: list[int] = []

    def kill_workers(self, sig: int) -> None:
        self.orders.append(sig)
        if sig == self._heeds and self.orders.count(sig) > self._deaf:
            self.WORKERS.clear()

    def reap_workers(self) -> None:
        pass


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("web.server.TELL_AGAIN_S", 0.0)


def test_a_worker_that_was_too_young_to_hear_it_is_told_again() -> None:
    master = Told(signal.SIGTERM, deaf=2)
    master.stop()
    assert master.orders == [signal.SIGTERM] * 3 + [signal.SIGKILL]     # the last one finds nobody


def test_a_second_interrupt_hurries() -> None:
    master = Told(signal.SIGQUIT, deaf=1)
    master.SIG_QUEUE.put(signal.SIGINT)
    master.SIG_QUEUE.put(signal.SIGINT)
    master.stop()
    assert master.orders == [signal.SIGTERM, signal.SIGQUIT, signal.SIGQUIT, signal.SIGKILL]
