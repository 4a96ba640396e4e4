"""Two replicas of a real model, and the same two engines as servers of another daemon: one model to the OpenAI SDK,
which loses nothing when one of them is killed while it answers."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.daemon import Daemon
from tests.support import wait_until

from .conftest import Models
from .real_daemon import LOAD_S, RealDaemon, kill

REQUESTS, AT_ONCE, TOKENS = 50, 8, 100
KILLED_AFTER = 15       # answers


@contextlib.contextmanager
def sdk(daemon: Daemon) -> Iterator[openai.OpenAI]:
    """It tries nothing again by itself."""
    with openai.OpenAI(base_url=f"http://127.0.0.1:{daemon.port}/v1", api_key="none", max_retries=0, timeout=LOAD_S,
                       http_client=openai.DefaultHttpxClient(trust_env=False)) as client:
        yield client


@pytest.fixture(scope="module")
def second(shared_daemon: RealDaemon) -> Iterator[list[str]]:
    """The id of the replica that this file adds, and takes away: other files count on one."""
    added: list[str] = []
    yield added
    for one in added:
        assert shared_daemon.delete(f"/instances/{one}?wait=1").status == 200


@pytest.fixture
def replicas(daemon: RealDaemon, models: Models, second: list[str]) -> list[dict[str, Any]]:
    """Two of them, ready."""
    first = daemon.begin(models.tiny)
    if not second:
        second.append(daemon.begin(models.tiny, new=True)["id"])
    other = second[0] if second[0] != first["id"] else next(
        one["id"] for one in daemon.instances() if "tiny" in one["aliases"] and one["id"] != second[0])
    return [daemon.wait_ready(first["id"]), daemon.wait_ready(other)]


def ask_while_one_dies(daemon: Daemon, victim_pid: int, busy: Callable[[], bool]) -> tuple[int, float]:
    """How many requests were asked, all of them answered whole, and the seconds of the longest.  They go on until the
    engine has been killed while it had some of them, and for REQUESTS at least."""
    took: list[float] = []
    over = threading.Event()
    with sdk(daemon) as client, ThreadPoolExecutor(AT_ONCE) as pool:
        def keep_asking() -> None:
            while len(took) < REQUESTS or not over.is_set():
                begun = time.monotonic()
                answer = client.completions.create(model="tiny", prompt=f"A small {len(took)}", max_tokens=TOKENS,
                                                   extra_body={"ignore_eos": True})
                assert answer.usage is not None and answer.usage.completion_tokens == TOKENS
                took.append(time.monotonic() - begun)

        asking = [pool.submit(keep_asking) for _ in range(AT_ONCE)]
        try:
            wait_until(lambda: len(took) >= KILLED_AFTER or any(one.done() for one in asking), LOAD_S)
            wait_until(lambda: busy() or any(one.done() for one in asking), LOAD_S)
            kill(victim_pid, signal.SIGKILL)
            killed_at = len(took)
            wait_until(lambda: len(took) >= killed_at + AT_ONCE or any(one.done() for one in asking), LOAD_S)
        finally:
            over.set()
        for one in asking:
            one.result()
    return len(took), max(took)


def test_one_of_two_servers_is_killed(daemon: RealDaemon, replicas: list[dict[str, Any]], tmp_path: Path,
                                      note: Callable[[str], None]) -> None:
    """Plain `vllm serve` processes to a daemon that has no engine of its own."""
    front = Daemon(tmp_path / "front")
    front.folder.mkdir()
    entries = ", ".join(f'{{ url = "http://127.0.0.1:{one["port"]}", max_concurrent_requests = 8 }}'
                        for one in replicas)
    (front.folder / "servers.toml").write_text(
        f"[servers]\nservers = [{entries}]\n[config]\nhealth_check_interval = 10\nmax_retries = 3\n")
    with front:
        def load() -> dict[str, dict[str, Any]]:
            return {one["url"].rpartition(":")[2]: one for one in front.get("/load-stats").json["servers"]}

        wait_until(lambda: [one["health"] for one in load().values()] == ["up", "up"] and any(
            model["id"] == "tiny" for model in front.get("/v1/models").json["data"]))
        with sdk(front) as client:
            assert [model.id for model in client.models.list()].count("tiny") == 1
        port = str(replicas[1]["port"])
        count, longest_s = ask_while_one_dies(front, replicas[1]["pid"], lambda: load()[port]["in_flight"] > 0)
        page = front.get("/metrics").body.decode()
        assert 'vllm_server_retries_total{' in page
    note(f"two real servers, one killed: {count} of {count} answered, the longest in {longest_s:.1f} s")


def test_one_of_two_replicas_is_killed(daemon: RealDaemon, replicas: list[dict[str, Any]], second: list[str],
                                       note: Callable[[str], None]) -> None:
    """The other one of the two; it is started again."""
    with sdk(daemon) as client:
        assert [model.id for model in client.models.list()].count("tiny") == 1
    victim, other = sorted(replicas, key=lambda one: one["id"] in second)
    count, longest_s = ask_while_one_dies(daemon, victim["pid"],
                                          lambda: daemon.instance(victim["id"])["in_flight"] > 0)
    page = daemon.get("/metrics").body.decode()
    backends = Counter(line.split('backend="')[1].split('"')[0] for line in page.splitlines()
                       if line.startswith("vllm_server_requests_total") and 'model="tiny"' in line)
    assert backends.keys() >= {victim["id"], other["id"]}
    note(f"two real replicas, one killed: {count} of {count} answered, the longest in {longest_s:.1f} s")
