"""Stopping: in bounded time, whatever clients do, and nothing is left.  The last test stops the shared daemon."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable

from tests.support import wait_until

from .conftest import Models
from .real_daemon import ENDLESS, ENVIRONMENT, Footprint, RealDaemon, last_error, read_to_end

GRACE_S = float(ENVIRONMENT["DRAIN_TIMEOUT"])


def test_kept_instances_are_adopted_by_the_next_daemon(daemon: RealDaemon, models: Models,
                                                       note: Callable[[str], None]) -> None:
    before = daemon.ready(models.tiny, models.bert)
    daemon.kill()       # the setting is read at the start only
    daemon.env["KEEP_INSTANCES"] = "true"
    try:
        daemon.start()
        daemon.ready(models.tiny, models.bert)
        assert daemon.stop() == 0
        assert set(daemon.engine_sessions()) == daemon.recorded_pids() >= {one["pid"] for one in before}
    finally:
        del daemon.env["KEEP_INSTANCES"]
    began = time.monotonic()
    daemon.start()
    after = daemon.ready(models.tiny, models.bert)
    note(f"KEEP_INSTANCES: both ready {time.monotonic() - began:.2f} s after the next start")
    assert [(one["id"], one["pid"]) for one in after] == [(one["id"], one["pid"]) for one in before]


def test_a_stop_with_open_streams_tells_all_and_leaves_nothing(daemon: RealDaemon, models: Models,
                                                               note: Callable[[str], None]) -> None:
    (tiny,) = daemon.ready(models.tiny)
    held = Footprint.of(daemon, tiny)
    assert len(held.left()) >= 4 + len(held.shared_memory) and held.shared_memory     # it sees what there is
    question = {"model": "tiny", "prompt": "A small", "max_tokens": ENDLESS, "stream": True}
    with (daemon.open("POST", "/v1/completions", question) as reading,
          daemon.open("POST", "/v1/completions", question) as not_reading,
          daemon.sent("/v1/completions", question | {"stream": False}) as plain):
        reading.readline()
        wait_until(lambda: daemon.instance(tiny["id"])["in_flight"] == 3)
        received: list[tuple[bytes, bool]] = []
        reader = threading.Thread(target=lambda: received.append(read_to_end(reading)), daemon=True)
        reader.start()
        began = time.monotonic()
        answer = daemon.delete(f"/instances/{tiny['id']}?wait=1")
        took_s = time.monotonic() - began
        assert (answer.status, answer.json["status"]) == (200, "stopped")
        assert held.left() == []
        reader.join()
        (rest, cut), = received
        error = last_error(rest)
        assert cut or error is not None, (took_s, rest[-500:])
        assert error is None or error["code"] == "engine_stopped"
        told = plain.getresponse()
        assert (told.status, json.loads(told.read())["error"]["code"]) == (503, "engine_stopped")
        rest, cut = read_to_end(not_reading)
        assert cut or last_error(rest) is not None
    note(f"stop with open streams: {took_s:.1f} s, of which {GRACE_S:g} s are grace")
    assert took_s >= GRACE_S


def test_a_delete_while_it_loads_ends_at_once(daemon: RealDaemon, models: Models, note: Callable[[str], None]) -> None:
    for instance in daemon.instances():
        if instance["model_name"] == str(models.tiny.folder):
            daemon.remove(instance["id"])
    loading = daemon.wait_loading(daemon.begin(models.tiny)["id"], 4)
    held = Footprint.of(daemon, loading)
    began = time.monotonic()
    assert daemon.delete(f"/instances/{loading['id']}?wait=1").status == 200
    took_s = time.monotonic() - began
    note(f"delete while it loads: {took_s:.2f} s")
    assert held.left() == []


def test_sigterm_ends_all_instances(daemon: RealDaemon, models: Models, note: Callable[[str], None]) -> None:
    (bert,) = daemon.ready(models.bert)
    held = [Footprint.of(daemon, one) for one in daemon.instances() if one["status"] == "ready"]
    held.append(Footprint.of(daemon, daemon.wait_loading(daemon.begin(models.tiny)["id"], 1)))
    began = time.monotonic()
    assert daemon.stop() == 0
    note(f"SIGTERM of the daemon with {len(held) - 1} ready and one loading: {time.monotonic() - began:.1f} s")
    assert bert["pid"] in {one.session for one in held}
    assert [thing for one in held for thing in one.left()] == []
    daemon.assert_nothing_left()
