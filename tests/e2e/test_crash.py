"""What dies or hangs, killed for real: the daemon, the engine behind the server, the server alone."""

from __future__ import annotations

import contextlib
import http.client
import json
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from instances import processes
from tests.support import wait_until

from .conftest import Models
from .real_daemon import ENDLESS, Footprint, Model, RealDaemon, kill, last_error, read_to_end

QUESTION = {"prompt": "A small", "max_tokens": 12, "temperature": 0}
ANSWER = " model knows little and answers with words of its own. A"


def assert_serves(daemon: RealDaemon, model: Model) -> None:
    """It answers; the request waits where the instance is just being restarted."""
    if model.alias == "bert":
        with daemon.sent("/v1/embeddings", {"model": model.alias, "input": "A small model"}) as sent:
            answer = sent.getresponse()
            assert answer.status == 200 and len(json.loads(answer.read())["data"][0]["embedding"]) == 128
        return
    with daemon.sent("/v1/completions", {"model": model.alias, **QUESTION}) as sent:
        answer = sent.getresponse()
        body = answer.read()
        assert (answer.status, json.loads(body)["choices"][0]["text"]) == (200, ANSWER), body


def assert_restarted(daemon: RealDaemon, model: Model, before: dict[str, Any], held: Footprint) -> dict[str, Any]:
    """The same instance with another engine; of the one before nothing is left, and nothing runs unrecorded."""
    wait_until(lambda: noticed(daemon.instance(before["id"]), before))
    assert_serves(daemon, model)
    after = daemon.instance(before["id"])
    assert (after["status"], after["restarts"]) == ("ready", before["restarts"] + 1)
    assert after["pid"] != before["pid"]
    assert [thing for thing in held.left() if not thing.startswith("a listener")] == []     # it has its port again
    assert set(daemon.engine_sessions()) == daemon.recorded_pids()
    return after


def noticed(now: dict[str, Any], before: dict[str, Any]) -> bool:
    """Whether its death was."""
    return bool(now["status"] != "ready" or now["restarts"] > before["restarts"])


class Load:
    """Requests in flight to one model: streams that have begun and plain ones, all of which would take minutes."""

    def __init__(self, daemon: RealDaemon, model: Model, *, streams: int, plain: int, stack: contextlib.ExitStack,
                 ) -> None:
        question = {"model": model.alias, "prompt": "A small", "max_tokens": ENDLESS}
        self.streams = [stack.enter_context(daemon.open("POST", "/v1/completions", question | {"stream": True}))
                        for _ in range(streams)]
        for stream in self.streams:
            assert stream.status == 200 and stream.readline().startswith(b"data: ")
        self.plain: list[http.client.HTTPConnection] = [
            stack.enter_context(daemon.sent("/v1/completions", question)) for _ in range(plain)]
        (instance,) = daemon.ready(model)
        wait_until(lambda: daemon.instance(instance["id"])["in_flight"] == streams + plain)

    def assert_all_were_told(self, code: str | None = None) -> None:
        """Each stream ends with an error or is cut, each plain request gets an error; `code` where it is ours."""
        for stream in self.streams:
            rest, cut = read_to_end(stream)
            error = last_error(rest)
            assert cut or error is not None, rest[-500:]
            assert code is None or error is None or error["code"] == code, error
        for connection in self.plain:
            answer = connection.getresponse()
            body = answer.read()
            assert answer.status >= 500, body
            error = json.loads(body)["error"]
            assert error["message"] and (code is None or error["code"] == code), error


def test_a_killed_daemon_finds_its_instances_again(daemon: RealDaemon, models: Models,
                                                   note: Callable[[str], None]) -> None:
    tiny, bert = daemon.ready(models.tiny, models.bert)
    daemon.remove(daemon.begin(models.third)["id"])     # an earlier test may have left it ready
    loading = daemon.wait_loading(daemon.begin(models.third)["id"], 3)
    daemon.kill()
    assert set(daemon.engine_sessions()) == {tiny["pid"], bert["pid"], loading["pid"]}

    began = time.monotonic()
    daemon.start()
    for model in (models.tiny, models.bert):
        assert_serves(daemon, model)
    took_s = time.monotonic() - began
    note(f"kill -9 of the daemon: two instances answered {took_s:.2f} s after its new start, one was loading")
    for before in (tiny, bert):
        after = daemon.instance(before["id"])
        assert (after["status"], after["pid"], after["restarts"]) == ("ready", before["pid"], before["restarts"])
    still = daemon.wait_ready(loading["id"])
    assert (still["pid"], still["restarts"]) == (loading["pid"], 0)
    assert_serves(daemon, models.third)
    assert set(daemon.engine_sessions()) == daemon.recorded_pids() == {tiny["pid"], bert["pid"], loading["pid"]}


def test_a_killed_engine_under_load_is_told_to_all_and_restarted(daemon: RealDaemon, models: Models,
                                                                 note: Callable[[str], None]) -> None:
    (tiny,) = daemon.ready(models.tiny)
    held = Footprint.of(daemon, tiny)
    with contextlib.ExitStack() as stack:
        load = Load(daemon, models.tiny, streams=4, plain=4, stack=stack)
        began = time.monotonic()
        kill(daemon.process_named(tiny, "EngineCore"))
        load.assert_all_were_told()
        told_s = time.monotonic() - began
    assert_restarted(daemon, models.tiny, tiny, held)
    note(f"kill -9 of EngineCore: 8 requests were told within {told_s:.2f} s, served again after "
         f"{time.monotonic() - began:.1f} s")


def test_a_killed_server_leaves_no_orphans_and_is_restarted(daemon: RealDaemon, models: Models,
                                                            note: Callable[[str], None]) -> None:
    (third,) = daemon.ready(models.third)
    held = Footprint.of(daemon, third)
    orphans = [daemon.process_named(third, name) for name in ("EngineCore", "Worker")]
    began = time.monotonic()
    kill(third["pid"])
    wait_until(lambda: all(processes.read_process(pid) is None for pid in orphans))
    note(f"kill -9 of the API server: its orphans were ended after {time.monotonic() - began:.2f} s")
    assert_restarted(daemon, models.third, third, held)


@contextlib.contextmanager
def short_probes(daemon: RealDaemon) -> Iterator[None]:
    """Probes that find a hang in seconds, no longer than they are needed: a busy machine is slow to answer, too."""
    path = daemon.folder / ".env"
    path.write_text("PROBE_INTERVAL=2\nPROBE_TIMEOUT=5\n")
    assert set(daemon.post("/admin/reload").json["changed"]) == {"probe_interval_s", "probe_timeout_s"}
    try:
        yield
    finally:
        path.unlink()
        daemon.post("/admin/reload")


@pytest.mark.parametrize("with_requests", [True, False])
def test_a_hung_engine_is_found_and_restarted(daemon: RealDaemon, models: Models, with_requests: bool,
                                              note: Callable[[str], None]) -> None:
    (tiny,) = daemon.ready(models.tiny)
    held = Footprint.of(daemon, tiny)
    with contextlib.ExitStack() as stack:
        load = Load(daemon, models.tiny, streams=2, plain=2, stack=stack) if with_requests else None
        began = time.monotonic()
        kill(daemon.process_named(tiny, "EngineCore"), signal.SIGSTOP)
        assert daemon.call("GET", "/health", port=tiny["port"]).status == 200      # its health knows nothing of it
        with short_probes(daemon):
            wait_until(lambda: daemon.instance(tiny["id"])["status"] != "ready")
        note(f"SIGSTOP of EngineCore {'under load' if load else 'idle'}: found after {time.monotonic() - began:.1f} s")
        assert daemon.instance(tiny["id"])["last_error"]["code"] == "engine_hung"
        if load is not None:
            load.assert_all_were_told("engine_hung")
    assert_restarted(daemon, models.tiny, tiny, held)
