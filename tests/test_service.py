"""scripts/start.sh, stop.sh, restart.sh and status.sh in a copy of the checkout: what they do, say and exit with."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import requests

from scripts import pid_file, service
from tests.checkout import Checkout, alive, create, url_of
from tests.daemon import CHECKOUT, HANG_S

pytestmark = pytest.mark.whole

SCRIPTS = ("start", "stop", "restart", "status")


@pytest.fixture
def checkout(tmp_path: Path) -> Iterator[Checkout]:
    with Checkout(tmp_path) as made:
        yield made


def test_start_status_stop_each_twice(checkout: Checkout) -> None:
    assert checkout.script("status").code == 3
    started = checkout.script("start", "-d")
    assert started.code == 0, started.err
    url, pid = url_of(started.out), checkout.pid
    assert requests.get(f"{url}/health", timeout=HANG_S).status_code == 200
    again = checkout.script("start", "-d")
    assert (again.code, checkout.pid) == (0, pid) and f"runs already, pid {pid}" in again.out

    create(url)
    brief, full = checkout.script("status"), checkout.script("status", "-v")
    assert (brief.code, full.code) == (0, 0)
    assert f"pid {pid}" in brief.out and "with a SIMULATED engine" in brief.out
    assert re.search(r"^  [0-9a-f]{8}  m  ready  0 in flight$", full.out, re.MULTILINE), full.out

    stopped = checkout.script("stop")
    assert stopped.code == 0 and stopped.out.endswith("stopped\n") and not alive(pid)
    assert not checkout.pid_file.exists()
    again = checkout.script("stop")
    assert (again.code, again.out) == (0, "vllm-server: is not running\n")
    assert checkout.script("status").code == 3


def test_a_start_that_fails_says_why(checkout: Checkout) -> None:
    with open(checkout.path / ".env", "a") as env:
        env.write("APP_THREADS=many\n")
    failed = checkout.script("start", "-d")
    assert failed.code == 1 and "APP_THREADS=many" in failed.err and ".env" in failed.err
    assert checkout.script("status").code == 3


def test_a_reused_pid_is_never_killed(checkout: Checkout) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as stranger:
        mine = pid_file.Started.of(stranger.pid, (), checkout.state, 100.0, background=True)
        checkout.pid_file.parent.mkdir()
        assert mine.process() is not None
        assert replace(mine, boot_id="another boot").process() is None
        pid_file.write(checkout.pid_file, replace(mine, started_ticks=mine.started_ticks - 1))
        status = checkout.script("status")
        assert (status.code, "ended by itself" in status.out) == (1, True)
        assert checkout.script("stop", "-f").out == "vllm-server: is not running\n"
        assert stranger.poll() is None
        stranger.communicate(b"\n", HANG_S)
        assert mine.process() is None
    checkout.pid_file.write_text(json.dumps(asdict(mine))[:20])
    assert pid_file.read(checkout.pid_file) is None         # a torn file is no file


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_wrong_command_line_is_told(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        service.parse(name, ["--sideways"])
    assert f"usage: scripts/{name}.sh" in capsys.readouterr().err


def test_before_the_install_they_say_what_to_do(checkout: Checkout) -> None:
    (checkout.path / ".venv").unlink()
    done = checkout.script("start", "-d")
    assert (done.code, done.err) == (1, "vllm-server: nothing is installed here yet: scripts/install.sh\n")
    (checkout.path / ".venv").symlink_to(sys.prefix)


def test_they_can_be_run() -> None:
    for path in sorted((CHECKOUT / "scripts").glob("*.sh")):
        assert os.access(path, os.X_OK), path
        shell = path.read_text().partition("\n")[0].rpartition("/")[2].split()[-1]      # that its first line names
        subprocess.run([shell, "-n", str(path)], check=True)
