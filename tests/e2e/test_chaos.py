"""What tests/chaos does to simulated engines, done to a real one where it could behave differently."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable

from instances import processes
from tests.support import wait_until

from .conftest import Models
from .real_daemon import Footprint, RealDaemon, kill
from .test_crash import Load, assert_restarted, assert_serves, short_probes

PAUSE_S = 3.0
GENERATED = "vllm:generation_tokens_total"


def test_an_engine_that_was_stopped_for_a_moment_loses_nothing(daemon: RealDaemon, models: Models) -> None:
    """SIGSTOP and SIGCONT of EngineCore, as a debugger or a machine that swaps does it: its streams go on."""
    (tiny,) = daemon.ready(models.tiny)
    with contextlib.ExitStack() as stack:
        load = Load(daemon, models.tiny, streams=2, plain=1, stack=stack)
        core = daemon.process_named(tiny, "EngineCore")
        kill(core, signal.SIGSTOP)
        until = time.monotonic() + PAUSE_S
        wait_until(lambda: time.monotonic() > until)
        made = daemon.gauge(tiny, GENERATED)
        kill(core, signal.SIGCONT)
        wait_until(lambda: daemon.gauge(tiny, GENERATED) > made + 100)
        assert daemon.instance(tiny["id"])["in_flight"] == 3
        for stream in load.streams:
            assert all(line.startswith(b"data: {") for line in (stream.readline(), stream.readline()) if line.strip())
    after = daemon.instance(tiny["id"])
    assert (after["status"], after["pid"], after["restarts"]) == ("ready", tiny["pid"], tiny["restarts"])
    assert_serves(daemon, models.tiny)


def test_a_server_that_stands_still_is_found_and_restarted(daemon: RealDaemon, models: Models,
                                                           note: Callable[[str], None]) -> None:
    """SIGSTOP of the API server: it takes connections, and answers nothing, not even its health."""
    (third,) = daemon.ready(models.third)
    held = Footprint.of(daemon, third)
    began = time.monotonic()
    kill(third["pid"], signal.SIGSTOP)
    with short_probes(daemon):
        wait_until(lambda: daemon.instance(third["id"])["status"] != "ready")
    note(f"SIGSTOP of the API server: found after {time.monotonic() - began:.1f} s")
    assert daemon.instance(third["id"])["last_error"]["code"] == "engine_hung"
    assert_restarted(daemon, models.third, third, held)


def test_daemon_and_server_die_in_one_moment(daemon: RealDaemon, models: Models, note: Callable[[str], None]) -> None:
    """EngineCore and Worker are left with neither parent nor watcher, and keep their memory, until a daemon starts."""
    bert, tiny = daemon.ready(models.bert, models.tiny)
    held = Footprint.of(daemon, bert)
    orphans = [daemon.process_named(bert, name) for name in ("EngineCore", "Worker")]
    daemon.kill()
    kill(bert["pid"])
    assert all(processes.read_process(pid) is not None for pid in orphans)
    began = time.monotonic()
    daemon.start()
    wait_until(lambda: all(processes.read_process(pid) is None for pid in orphans))
    note(f"kill -9 of daemon and API server: the orphans were ended {time.monotonic() - began:.2f} s after a new start")
    after = daemon.wait_ready(bert["id"])
    assert after["pid"] != bert["pid"]
    assert_serves(daemon, models.bert)
    assert [thing for thing in held.left() if not thing.startswith("a listener")] == []
    assert daemon.instance(tiny["id"])["pid"] == tiny["pid"]
    assert set(daemon.engine_sessions()) == daemon.recorded_pids()
