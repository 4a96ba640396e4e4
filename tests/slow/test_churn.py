"""A thousand lives of instances behind one daemon: no port, thread, descriptor, process or file is left of them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from instances.ports import is_free
from instances.resources import LOGS_KEPT
from tests.churn import WAYS, assert_no_file, assert_no_process, churn, descriptors, settles, threads
from tests.daemon import Daemon
from web.threads import CORE

LIVES = int(os.environ.get("CHURN_LIVES", "1000"))
AT_ONCE = 8


class OverHttp:
    def __init__(self, daemon: Daemon) -> None:
        self.daemon = daemon
        self.ports: set[int] = set()

    def create(self, model: str, params: Mapping[str, Any]) -> str:
        found: str = self.daemon.create(model, params=params, wait=False)["id"]
        return found

    def _get(self, instance_id: str) -> dict[str, Any]:
        answer = self.daemon.get(f"/instances/{instance_id}")
        if answer.status == 404:
            return {"status": "gone", "pid": None}
        found: dict[str, Any] = answer.json
        self.ports |= {found["port"]} if found["port"] else set()
        return found

    def status(self, instance_id: str) -> str:
        return str(self._get(instance_id)["status"])

    def pid(self, instance_id: str) -> int | None:
        pid: int | None = self._get(instance_id)["pid"]
        return pid

    def delete(self, instance_id: str, *, force: bool) -> None:
        answer = self.daemon.delete(f"/instances/{instance_id}?force={int(force)}")
        assert answer.status in (200, 202), answer


@pytest.mark.timeout(3600)
def test_a_thousand_lives_leave_nothing(tmp_path: Path) -> None:
    env = {"VLLM_MAX_INSTANCES": str(AT_ONCE), "SIMULATOR_DEVICE": "cpu", "LOG_LEVEL": "INFO"}
    with Daemon(tmp_path / "daemon", env) as daemon:
        driver = OverHttp(daemon)
        shared = churn(driver, 2 * len(WAYS), AT_ONCE)      # what is made once and kept is made now
        worker = daemon.worker_pid
        # The server keeps a core of request threads, made as needed; one that each life kept would be a thousand.
        before = descriptors(worker), threads(worker)
        shared |= churn(driver, LIVES, AT_ONCE)
        settles(lambda: descriptors(worker), before[0] + AT_ONCE)
        settles(lambda: threads(worker), before[1] + CORE)
        assert daemon.instances() == []
        health = daemon.get("/health").json
        assert (health["instances"], health["vllm_processes"]) == (0, 0)
        assert len(driver.ports) <= 3 * AT_ONCE and all(is_free(port) for port in driver.ports)
        assert_no_process(daemon.temporary)
        assert_no_file(daemon.temporary, daemon.state, shared)
        assert len(list((daemon.state / "logs").iterdir())) <= LOGS_KEPT + 4 * AT_ONCE
        assert daemon.create("after")["status"] == "ready"
