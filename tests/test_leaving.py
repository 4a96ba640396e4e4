"""web/leaving.py: a worker without memory ends, and does not hang."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest

from tests.daemon import CHECKOUT
from web import leaving


@pytest.mark.parametrize(("kind", "where", "ends"), [
    (MemoryError, "Exception ignored in thread started by", True),
    (MemoryError, "Exception ignored in", False), (ValueError, "Exception ignored in thread started by", False),
    (MemoryError, None, False)])
def test_a_thread_that_no_memory_is_left_for_ends_the_worker(
        monkeypatch: pytest.MonkeyPatch, kind: type[BaseException], where: str | None, ends: bool) -> None:
    """Python tells of it by this hook alone, and `Thread.start` would wait for ever."""
    exits, told = list[int](), list[object]()
    monkeypatch.setattr(os, "_exit", exits.append)
    monkeypatch.setattr(sys, "__unraisablehook__", told.append)
    unraisable = SimpleNamespace(exc_type=kind, err_msg=where)
    leaving.leave_without_memory(unraisable)
    assert exits == ([leaving.TRY_AGAIN] if ends else [])
    assert ends or told == [unraisable]


def test_two_looks_without_memory_in_a_row_end_the_worker() -> None:
    said = list[bytes]()
    found = iter([True, False, True, False, False])
    watch = leaving.MemoryWatch(said.append, lambda: next(found))
    for look in range(4):
        watch.look(float(look))
    assert said == []
    watch.look(4.0)
    assert said == [leaving.NO_MEMORY]


def test_a_look_that_itself_gets_no_memory_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    def enumerate_threads() -> list[threading.Thread]:
        raise MemoryError

    said = list[bytes]()
    monkeypatch.setattr(threading, "enumerate", enumerate_threads)
    watch = leaving.MemoryWatch(said.append, lambda: True)
    watch.look(0.0)
    assert said == []
    monkeypatch.setattr(leaving, "can_have_memory", enumerate_threads)
    watch = leaving.MemoryWatch(said.append)
    watch.look(0.0)
    watch.look(0.25)
    assert said == [leaving.NO_MEMORY]


def test_a_thread_that_was_started_and_never_lived_ends_the_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    """`Thread.start` waits for it for ever; between its call and the thread's first line it is listed without ident."""
    lost, slow = threading.Thread(), threading.Thread()
    listed = [threading.current_thread(), lost, slow]
    monkeypatch.setattr(threading, "enumerate", lambda: listed)
    said = list[bytes]()
    watch = leaving.MemoryWatch(said.append, lambda: True)
    watch.look(0.0)
    listed.remove(slow)
    watch.look(leaving.BORN_WITHIN_S - 1)
    listed.append(slow)         # another one meanwhile: its time begins now
    assert said == []
    watch.look(leaving.BORN_WITHIN_S)
    assert said == [leaving.NO_THREAD]


WITHOUT = """
import resource, sys, threading, time
from web import leaving
leaving.MemoryWatch().start()
kept = []
resource.setrlimit(resource.RLIMIT_AS, (int(sys.argv[1]), -1))
try:
    while True:
        kept.append(bytearray(64))
except MemoryError:
    pass
time.sleep(600)
"""


def test_a_process_with_not_a_page_left_leaves() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT, str(512 << 20)], cwd=CHECKOUT, capture_output=True,
                          timeout=300)
    assert (done.returncode, done.stderr) == (leaving.TRY_AGAIN, leaving.NO_MEMORY)
