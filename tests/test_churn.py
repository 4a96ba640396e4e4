"""Fourteen lives of instances through real keepers, launcher and processes leave nothing (tests/slow has 1,000)."""

from __future__ import annotations

import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

import config
from errors import NotFound
from instance_manager import CreateRequest, InstanceManager
from instances.ports import is_free
from instances.store import StateDir
from tests.churn import WAYS, assert_no_file, assert_no_process, churn, descriptors, settles
from tests.support import claim_ports

pytestmark = pytest.mark.whole

CHECKOUT = Path(__file__).parents[1]
AT_ONCE = 4


class InProcess:
    """A manager in this process, with threads."""

    def __init__(self, manager: InstanceManager) -> None:
        self.manager = manager
        self.ports: set[int] = set()

    def create(self, model: str, params: Mapping[str, Any]) -> str:
        return self.manager.create(CreateRequest(model, params))[0].id

    def status(self, instance_id: str) -> str:
        try:
            view = self.manager.get(instance_id)
        except NotFound:
            return "gone"
        self.ports |= {view.port} if view.port else set()
        return str(view.state)

    def pid(self, instance_id: str) -> int | None:
        return self.manager.get(instance_id).pid

    def delete(self, instance_id: str, *, force: bool) -> None:
        self.manager.stop(instance_id, force=force)


@pytest.fixture
def temporary(short_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(short_folder))
    return short_folder


@pytest.fixture
def base_port() -> Iterator[int]:
    claim, first = claim_ports()
    with claim:
        yield first


def test_nothing_is_left_however_instances_end(tmp_path: Path, temporary: Path, base_port: int) -> None:
    settings = config.load_settings({"HOME": str(tmp_path)}, cwd=tmp_path, overrides={
        "VLLM_COMMAND": f"{sys.executable} {CHECKOUT / 'simulator.py'}", "VLLM_BASE_PORT": str(base_port),
        "VLLM_MAX_INSTANCES": str(AT_ONCE), "STATE_DIR": str(tmp_path / "state")})
    before = descriptors(), threading.active_count()
    state_dir = StateDir(settings.state_dir)
    manager = InstanceManager(settings, state_dir, environ={"PATH": "/usr/bin:/bin", "SIMULATOR_DEVICE": "cpu"})
    manager.start()
    driver = InProcess(manager)
    shared = churn(driver, 2 * len(WAYS), AT_ONCE)
    settles(threading.active_count, before[1] + 1)      # the reaper
    settles(descriptors, before[0])
    assert manager.snapshot() == [] and manager._loops == {}
    assert manager.resources.ports._owners == {} and manager.resources.turns._holders == {}
    # Given back and given out again; one that another program has is passed over.
    assert len(driver.ports) <= 2 * AT_ONCE
    assert all(is_free(port) for port in driver.ports)
    assert_no_process(temporary)
    assert_no_file(temporary, settings.state_dir, shared)
    manager.shutdown(keep=False)
    settles(threading.active_count, before[1])
