"""Replicas of simulated engines that come with the load and go without it, as clients and operators see them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.daemon import Daemon
from tests.support import wait_until
from tests.test_metrics import value
from tests.test_on_demand import configure, entry

pytestmark = pytest.mark.whole

QUICK = {"app.SCALE_S": 0.1, "routing.checker.SCRAPE_S": 0.2, "routing.checker.LOOK_S": 0.1}
BODY = {"model": "m", "prompt": "x", "max_tokens": 20}


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    running = Daemon(tmp_path / "daemon", {"REPLICAS_GROW_SECONDS": "1", "REPLICAS_SHRINK_SECONDS": "1"}, patch=QUICK)
    configure(running, {"m": entry({"tokens_per_s": 100}, model_path="org/m", replicas={"min": 1, "max": 3},
                                   params={"max_num_seqs": 2})})
    with running:
        yield running


class Clients:
    """Each asks again as soon as it has its answer; a context manager, at whose end all have."""

    def __init__(self, daemon: Daemon, count: int) -> None:
        self.statuses: list[int] = []
        self._daemon = daemon
        self._over = threading.Event()
        self._pool = ThreadPoolExecutor(count)
        self._count = count

    def __enter__(self) -> Clients:
        self._asking = [self._pool.submit(self._ask) for _ in range(self._count)]
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._pool.shutdown()
        for one in self._asking:
            one.result()

    def _ask(self) -> None:
        while not self._over.is_set():
            body = BODY | {"stream": len(self.statuses) % 2 == 0}
            answer = self._daemon.post("/v1/completions", body)
            self.statuses.append(answer.status)
            assert not body["stream"] or answer.body.endswith(b"data: [DONE]\n\n")


def model(daemon: Daemon) -> dict[str, Any]:
    found: dict[str, Any] = daemon.get("/admin/models/m").json
    return found


def test_load_brings_replicas_and_quiet_takes_them_away_and_no_request_is_lost(daemon: Daemon) -> None:
    assert daemon.post("/v1/completions", BODY).status == 200
    assert model(daemon)["replicas"] == {"min": 1, "max": 3, "running": 1, "wanted": 1,
                                         "because": "its load calls for no other number"}
    by_hand = daemon.create("m", new=True)
    with Clients(daemon, 20) as many:
        wait_until(lambda: len(model(daemon)["instances"]) == 4)        # three, and the one made by hand
        wait_until(lambda: model(daemon)["replicas"]["because"].endswith("; 3 is its most"))
        assert {one["id"]: (one["added_for_load"], one["made_with_new"]) for one in daemon.instances()}[
            by_hand["id"]] == (False, True)
        assert value(daemon, "vllm_server_replicas", model="m", which="wanted") == 3
    with Clients(daemon, 1) as one:
        wait_until(lambda: {found["id"] for found in daemon.instances()} >= {by_hand["id"]}
                   and len(daemon.instances()) == 2)
    assert set(many.statuses) == set(one.statuses) == {200}
    assert (value(daemon, "vllm_server_replicas_added_total"), value(daemon, "vllm_server_replicas_removed_total")) == (
        2, 2)
    assert "one replica fewer" in daemon.log and "one more replica" in daemon.log
