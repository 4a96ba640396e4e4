"""An instance idles since its last request ended, and what it held is free when it is gone."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from tests.support import wait_until

from .conftest import Models
from .real_daemon import ENDLESS, Footprint, Model, RealDaemon, read_to_end

TIMEOUT_S = 3
ROUNDED_S = 0.01    # what the daemon says, at most


@dataclass(frozen=True)
class Streamed:
    """A whole stream."""

    third: dict[str, Any]       # the instance before it,
    held: Footprint
    during: dict[str, Any]      # and when the stream had gone on for twice its idle time, or was over before
    took_s: float
    busy_until: float           # monotonic; the request was in flight then


def test_a_stream_outlives_the_idle_timeout_and_the_instance_goes_after_it(daemon: RealDaemon, models: Models,
                                                                           note: Callable[[str], None]) -> None:
    tokens = 1000
    streamed = stream(daemon, models.third, tokens)
    while not streamed.during.get("in_flight"):     # whole, and too short on this machine
        tokens *= 2
        assert tokens <= ENDLESS
        streamed = stream(daemon, models.third, tokens)
    third, during, busy_until = streamed.third, streamed.during, streamed.busy_until
    assert (during["status"], during["in_flight"], during["expires_in"]) == ("ready", 1, TIMEOUT_S)

    asked = time.monotonic()
    idle = daemon.instance(third["id"])
    if time.monotonic() - busy_until < TIMEOUT_S:       # it counts from the end, not the begin
        assert idle["status"] == "ready" and 0 < idle["expires_in"] <= TIMEOUT_S
    used = host_memory_used(daemon)
    wait_until(lambda: daemon.status_of(third["id"]) != "ready")
    assert time.monotonic() - busy_until >= TIMEOUT_S
    assert time.monotonic() - asked >= (idle.get("expires_in") or 0) - ROUNDED_S
    waited_s = time.monotonic() - busy_until
    daemon.wait_gone(third["id"])
    assert "idle for 3 s" in daemon.get(f"/instances/{third['id']}").error["message"]
    note(f"idle: a stream of {streamed.took_s:.1f} s with timeout {TIMEOUT_S}; stopped {waited_s:.2f} s after its end, "
         f"gone {time.monotonic() - busy_until:.2f} s after it")

    assert streamed.held.left() == []
    measured = third["memory"]["measured_bytes"]
    wait_until(lambda: host_memory_used(daemon) < used - measured // 2)
    note(f"idle: {measured / 2**20:,.0f} MiB measured, {(used - host_memory_used(daemon)) / 2**20:,.0f} MiB given back")


def stream(daemon: RealDaemon, model: Model, tokens: int) -> Streamed:
    """One of so many tokens, to an instance that may idle from its begin on."""
    (third,) = daemon.ready(model, timeout=0)
    held = Footprint.of(daemon, third)
    question = {"model": model.alias, "prompt": "A small", "max_tokens": tokens, "stream": True}
    began = time.monotonic()
    with daemon.open("POST", "/v1/completions", question) as answer, ThreadPoolExecutor(1) as pool:
        daemon.begin(model, timeout=TIMEOUT_S)      # the same instance with another idle time
        received = bytearray()
        while time.monotonic() - began < 2 * TIMEOUT_S and (piece := answer.read1(1 << 16)):
            received += piece       # all along: the daemon's end of it is ours
        asked = time.monotonic()
        during = daemon.instance(third["id"])
        watched = pool.submit(watch, daemon, third["id"], asked)
        rest, cut = read_to_end(answer)
        assert not cut and (received + rest).endswith(b"data: [DONE]\n\n")
        return Streamed(third, held, during, time.monotonic() - began, watched.result())


def watch(daemon: RealDaemon, instance_id: str, busy_until: float) -> float:
    """When it was last seen to serve, once it does no more."""
    while True:
        asked = time.monotonic()
        if not daemon.instance(instance_id).get("in_flight"):
            return busy_until
        busy_until = asked


def host_memory_used(daemon: RealDaemon) -> int:
    used: int = daemon.get("/gpus").json["data"][0]["memory"]["used"]
    return used
