"""An instance idles since its last request ended, and what it held is free when it is gone."""

from __future__ import annotations

import time
from collections.abc import Callable

from tests.support import wait_until

from .conftest import Models
from .real_daemon import Footprint, RealDaemon, read_to_end

TIMEOUT_S = 3
SLACK_S = 0.1       # between what the daemon says and when it is heard


def test_a_stream_outlives_the_idle_timeout_and_the_instance_goes_after_it(daemon: RealDaemon, models: Models,
                                                                           note: Callable[[str], None]) -> None:
    (third,) = daemon.ready(models.third)
    held = Footprint.of(daemon, third)
    tokens = int(4 * TIMEOUT_S * tokens_per_second(daemon))
    daemon.begin(models.third, timeout=TIMEOUT_S)      # the same instance with another idle time
    began = time.monotonic()
    question = {"model": "third", "prompt": "A small", "max_tokens": tokens, "stream": True}
    with daemon.open("POST", "/v1/completions", question) as stream:
        received = bytearray()
        while time.monotonic() - began < 2 * TIMEOUT_S:     # read all along: the daemon's end of it is ours
            received += stream.read1(1 << 16)
        during = daemon.instance(third["id"])
        assert (during["status"], during["in_flight"], during["expires_in"]) == ("ready", 1, TIMEOUT_S)
        rest, cut = read_to_end(stream)
    ended = time.monotonic()
    assert not cut and (received + rest).endswith(b"data: [DONE]\n\n")

    idle, asked = daemon.instance(third["id"]), time.monotonic()
    assert idle["status"] == "ready" and 0 < idle["expires_in"] <= TIMEOUT_S    # it counts from the end, not the begin
    used = host_memory_used(daemon)
    wait_until(lambda: daemon.status_of(third["id"]) != "ready")
    assert time.monotonic() - asked > idle["expires_in"] - SLACK_S
    waited_s = time.monotonic() - ended
    daemon.wait_gone(third["id"])
    assert "idle for 3 s" in daemon.get(f"/instances/{third['id']}").error["message"]
    note(f"idle: a stream of {ended - began:.1f} s with timeout {TIMEOUT_S}; stopped {waited_s:.2f} s after its end "
         f"({idle['expires_in']:.2f} s were left when it was seen), gone {time.monotonic() - ended:.2f} s after it")

    assert held.left() == []
    measured = third["memory"]["measured_bytes"]
    wait_until(lambda: host_memory_used(daemon) < used - measured // 2)
    note(f"idle: {measured / 2**20:,.0f} MiB measured, {(used - host_memory_used(daemon)) / 2**20:,.0f} MiB given back")


def tokens_per_second(daemon: RealDaemon) -> float:
    began, tokens = time.monotonic(), 500
    assert daemon.post("/v1/completions", {"model": "third", "prompt": "A", "max_tokens": tokens}).status == 200
    return tokens / (time.monotonic() - began)


def host_memory_used(daemon: RealDaemon) -> int:
    used: int = daemon.get("/gpus").json["data"][0]["memory"]["used"]
    return used
