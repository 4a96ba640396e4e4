"""`vllm-server doctor` and `vllm-server run`: what is found, what is advised, and the daemon started by it."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from config import child_environment, load_settings
from tests.command import ARGV, OnTerminal, environment, vllm_server
from tests.daemon import CHECKOUT, HANG_S, SIMULATOR, Daemon
from tests.sdk import Scripted, answer
from tests.support import wait_until
from tests.tmux import Tmux, needs_tmux
from vllm_server_client import VLLMProxyClient
from vllm_server_client.cli import checks, home
from vllm_server_client.cli.checks import Finding, Verdict
from vllm_server_client.cli.exits import Exit

pytestmark = pytest.mark.whole


@pytest.fixture
def env(tmp_path: Path) -> dict[str, str]:
    """A machine on which all is well, but for what it lacks really."""
    return {"HOME": str(tmp_path), "VLLM_COMMAND": SIMULATOR, "STATE_DIR": str(tmp_path / "state"),
            "VLLM_DEFAULT_TRUST_REMOTE_CODE": "false", "APP_HOST": "127.0.0.1", "APP_PORT": "0"}


def find(text: str, name: str) -> Finding:
    [found] = [one for one in json.loads(text) if one["name"] == name]
    return Finding(name, Verdict(found["verdict"]), found["found"], found["advice"])


# --- doctor -----------------------------------------------------------------------------------------------------------

def test_all_that_is_well_is_said_to_be(tmp_path: Path, env: dict[str, str]) -> None:
    with Daemon(tmp_path / "daemon") as daemon, Scripted([answer()]) as hub:
        done = vllm_server(daemon, "doctor", "--json", cwd=tmp_path,
                           env={**env, "APP_PORT": str(daemon.port), "HF_ENDPOINT": hub.url})
        shown = vllm_server(daemon, "doctor", "--offline", cwd=tmp_path, env=env)
    assert done.code == shown.code == 0
    for name in ("server", "management", "settings", "engine", "port", "instance ports", "state folder", "hub"):
        assert find(done.out, name).verdict is Verdict.OK, name
        assert find(done.out, name).advice == "", name
    assert "SIMULATED" in find(done.out, "server").found and "0.32.0" in find(done.out, "engine").found
    assert hub.requests == ["GET /api/models?limit=1 HTTP/1.1"]
    assert "ok   engine" in shown.out and "hub" not in shown.out


def test_each_thing_that_is_wrong_is_named_with_what_to_do(tmp_path: Path, env: dict[str, str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        wrong = {**env, "VLLM_COMMAND": "no-such-program", "APP_PORT": str(port), "VLLM_SERVER_CACHE": str(tmp_path),
                 "HF_ENDPOINT": "http://127.0.0.1:1", "VLLM_SERVER_URL": "http://127.0.0.1:1"}
        done = vllm_server(None, "doctor", "--json", cwd=tmp_path, env=wrong)
    assert done.code == Exit.FAILED
    assert find(done.out, "server").verdict is Verdict.WARN
    assert find(done.out, "hub").verdict is Verdict.WARN and "HF_ENDPOINT" in find(done.out, "hub").advice
    engine, address = find(done.out, "engine"), find(done.out, "port")
    assert engine.verdict is address.verdict is Verdict.FAIL
    assert "make run" in engine.advice and str(port) in address.found and "APP_PORT" in address.advice


def test_a_wrong_setting_is_named_with_its_line(tmp_path: Path, env: dict[str, str]) -> None:
    (tmp_path / ".env").write_text("# a file\nAPP_PRT=1\n")
    done = vllm_server(None, "doctor", "--offline", "--json", cwd=tmp_path, env=env)
    assert done.code == Exit.FAILED
    assert ".env:2" in find(done.out, "settings").found and "APP_PORT" in find(done.out, "settings").found


def test_of_another_machine_only_the_server_is_checked(env: dict[str, str]) -> None:
    done = vllm_server(None, "doctor", "--json", "--url", "http://host.invalid:5000", env=env)
    assert [one["name"] for one in json.loads(done.out)] == ["server"] and done.code == 0


def test_something_else_at_the_address_is_a_failure() -> None:
    with Scripted([answer(body=b"<html>")]) as other, VLLMProxyClient(other.url) as client:
        assert checks.server(client).verdict is Verdict.FAIL


def test_a_key_that_may_not_manage_is_a_warning(tmp_path: Path, env: dict[str, str]) -> None:
    with Daemon(tmp_path / "daemon", {"ADMIN_API_KEYS": "admin-key"}) as daemon:
        done = vllm_server(daemon, "doctor", "--offline", "--json", cwd=tmp_path, env=env)
    assert find(done.out, "management").verdict is Verdict.WARN and done.code == 0


@pytest.mark.parametrize(("listing", "verdict", "found"), [
    ("0, NVIDIA H100, 560.35, 81559, 1024\n1, NVIDIA H100, 560.35, 81559, [N/A]\n", Verdict.OK,
     "driver 560.35: 0 NVIDIA H100 1.0 GiB of 80 GiB in use; 1 NVIDIA H100 [N/A] of 80 GiB in use"),
    ("", Verdict.FAIL, "the driver sees no GPU")])
def test_nvidia_smi_is_understood(listing: str, verdict: Verdict, found: str) -> None:
    assert (checks.gpus_of(listing).verdict, checks.gpus_of(listing).found) == (verdict, found)


def test_a_driver_that_fails_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'Failed to initialize NVML: Driver/library version mismatch'\nexit 18\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert checks.driver().verdict is Verdict.FAIL
    assert "version mismatch" in checks.driver().found and "restart" in checks.driver().advice


def test_small_memory_is_seen(tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text("MemTotal:  8000000 kB\nMemAvailable:  1000000 kB\n")
    assert checks.host_memory(tmp_path / "meminfo") == Finding(
        "host memory", Verdict.WARN, "977 MiB of 7.6 GiB available", checks.host_memory(tmp_path / "meminfo").advice)
    assert checks.host_memory(tmp_path / "none").verdict is Verdict.SKIP
    assert checks.shared_memory(tmp_path / "none").verdict is Verdict.WARN


def test_whether_the_daemon_may_go_first_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    assert checks.priority(False).verdict is Verdict.SKIP
    policy = os.sched_getscheduler(0)
    assert checks.priority(True).verdict in (Verdict.OK, Verdict.WARN) and os.sched_getscheduler(0) == policy
    for outcome, verdict in (("pass", Verdict.OK), ("raise PermissionError", Verdict.WARN)):
        monkeypatch.setattr(checks, "GO_FIRST", outcome)
        assert checks.priority(True).verdict is verdict
    assert "LimitRTPRIO" in checks.priority(True).advice


def test_full_disks_and_offline_hubs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    for free, verdict in ((1 << 30, Verdict.FAIL), (10 << 30, Verdict.WARN), (100 << 30, Verdict.OK)):
        monkeypatch.setattr(checks.shutil, "disk_usage", lambda _, free=free: usage._replace(free=free))
        assert checks.model_disk(tmp_path / "not" / "made" / "yet").verdict is verdict
    assert checks.hub("http://127.0.0.1:1", {"HF_HUB_OFFLINE": "1"}).verdict is Verdict.SKIP


# --- run --------------------------------------------------------------------------------------------------------------

class RunDaemon(Daemon):
    """Started by the command, which becomes the daemon: same pid, signals and exit code."""

    def __init__(self, folder: Path, *words: str) -> None:
        super().__init__(folder, {"PYTHONPATH": str(CHECKOUT / "client")})
        self._argv = [*ARGV, "run", "--host", "127.0.0.1", "--port", "0", *words]


def test_run_is_the_daemon(tmp_path: Path) -> None:
    (tmp_path / "models.yaml").write_text("models:\n  tiny: {model_path: org/tiny}\n")
    with RunDaemon(tmp_path, "--config", str(tmp_path / "models.yaml")) as daemon:
        assert vllm_server(daemon, "health").code == 0
        wait_until(lambda: daemon.worker_pid)
        assert daemon.stop() == 0


@needs_tmux
def test_run_on_a_terminal_shows_the_monitor_and_its_end_is_the_daemons(tmp_path: Path) -> None:
    with Daemon(tmp_path / "other") as lent:        # its ports and folders; it does not run meanwhile
        lent.stop()
        env = {**lent.env, **environment(None), "VLLM_DEFAULT_TRUST_REMOTE_CODE": "false"}
        with Tmux([*ARGV, "run", "--host", "127.0.0.1", "--port", "0"], env, cwd=tmp_path) as screen:
            screen.wait_for("0 of 0 ready", "SIMULATED", "q Quit")
            log = (lent.state / "daemon.log").read_text()
            address = re.search(r"listens on (http://[^ ]+)", log)
            assert address is not None and address[1] in screen.screen
            assert vllm_server(None, "load", "org/tiny", "--url", address[1]).code == 0
            screen.wait_for("1 of 1 ready", "org/tiny")
            screen.keys("q")
            screen.wait_for("the daemon has ended", "exit=0")
        assert lent.engine_processes() == []
        with Tmux([*ARGV, "run", "--port", "1", "--host", "192.0.2.1"], env, cwd=tmp_path) as screen:
            screen.wait_for("cannot listen", "exit=1")
        with Tmux([*ARGV, "run", "--console", "--host", "127.0.0.1", "--port", "0"], env, cwd=tmp_path) as screen:
            screen.wait_for("listens on", "SIMULATED")
            address = re.search(r"listens on (http://[\d.:]+)", screen.screen.replace("\n", ""))
            assert address is not None
            url = address[1]
            wait_until(lambda: vllm_server(None, "health", "--url", url).code == 0)     # it listens before it serves
            screen.keys("C-c")
            screen.wait_for("stopped", "exit=0")
        lent.start()


@needs_tmux
def test_the_daemons_own_program_shows_the_monitor_too(tmp_path: Path) -> None:
    with Daemon(tmp_path / "other") as lent:
        lent.stop()
        (tmp_path / "servers.toml").write_text("[servers]\nservers = []\n")
        argv = [sys.executable, "app.py", "--monitor", "--host", "127.0.0.1", "--port", "0", "--servers",
                str(tmp_path / "servers.toml")]
        with Tmux(argv, {**environment(None), **lent.env}, cwd=CHECKOUT) as screen:
            screen.wait_for("0 of 0 ready", "q Quit")
            screen.keys("q")
            screen.wait_for("exit=0")
        lent.start()


def test_a_clients_key_reaches_no_engine(tmp_path: Path) -> None:
    environ = {"VLLM_SERVER_API_KEY": "hush", "VLLM_SERVER_URL": "u", "VLLM_SERVER_HOME": "h",
               "VLLM_SERVER_DEV_MODE": "1"}
    settings = load_settings({}, cwd=tmp_path)
    assert child_environment(settings, environ) == {"VLLM_SERVER_DEV_MODE": "1"}


def test_the_monitor_needs_a_terminal_and_a_key(tmp_path: Path, env: dict[str, str]) -> None:
    done = vllm_server(None, "run", "--monitor", cwd=tmp_path, env={**env, "VLLM_SERVER_HOME": str(CHECKOUT)})
    assert done.code == Exit.USAGE and "needs a terminal" in done.err
    with OnTerminal(None, "run", "--monitor", **env, VLLM_SERVER_HOME=str(CHECKOUT), ADMIN_API_KEYS="k") as terminal:
        assert terminal.wait() == Exit.USAGE
    assert "VLLM_SERVER_API_KEY" in terminal.text


def test_run_uses_the_folder_where_it_is_called(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("LOG_LEVEL=nonsense\n")
    done = vllm_server(None, "run", cwd=tmp_path, env={"VLLM_SERVER_HOME": str(CHECKOUT)})
    assert done.code == Exit.FAILED and ".env:1" in done.err


def test_run_without_a_checkout_says_what_it_needs(tmp_path: Path) -> None:
    done = vllm_server(None, "run", cwd=tmp_path, env={"VLLM_SERVER_HOME": str(tmp_path)})
    assert done.code == Exit.FAILED and "VLLM_SERVER_HOME" in done.err


def test_a_checkouts_own_interpreter_goes_before(tmp_path: Path) -> None:
    for name in ("app.py", "instance_manager.py"):
        (tmp_path / name).touch()
    assert home.find({}, tmp_path).python == sys.executable
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "python").symlink_to(sys.executable)
    assert home.find({}, tmp_path).python == str(tmp_path / ".venv" / "bin" / "python")
    assert home.find({"VLLM_SERVER_HOME": str(CHECKOUT)}, tmp_path).folder == CHECKOUT


def test_missing_libraries_are_told_apart_from_wrong_settings(tmp_path: Path) -> None:
    (tmp_path / "app.py").write_text("import no_such_library\n")
    with pytest.raises(home.NoDaemon, match="make run"):
        home.settings(home.Home(tmp_path, sys.executable))


def test_an_engine_that_make_run_installed_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scripts = tmp_path / "scripts"
    scripts.mkdir()
    (scripts / "setup_engine.py").write_text(f"print({shlex.quote(sys.executable)!r})\n")
    place = home.Home(tmp_path, sys.executable)
    assert home.engine_elsewhere(place, ["no-such-program"]) == sys.executable
    assert home.engine_elsewhere(place, [sys.executable]) is None
    assert "VLLM_COMMAND" in checks.engine(["no-such-program"], sys.executable).advice


# --- app.py --check ---------------------------------------------------------------------------------------------------

def test_check_prints_the_settings_and_no_secret(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("API_KEYS=hush\nHF_TOKEN=hush\nHTTPS_PROXY=http://me:hush@proxy:1\n"
                                   "RESERVED_MEMORY_MB=512\nAPP_PORT=5001\n")
    (tmp_path / "config.yaml").write_text("models:\n  tiny: {model_path: org/tiny, aliases: [small], api_key: hush}\n")
    found = home.settings(home.Home(CHECKOUT, sys.executable), ["--env", str(tmp_path / ".env"), "--config",
                                                               str(tmp_path / "config.yaml"), "--port", "7"])
    assert "hush" not in json.dumps(found)
    assert found["settings"] | {"API_KEYS": "***", "HF_TOKEN": "***", "ADMIN_API_KEYS": None, "HTTPS_PROXY": "***",
                                "RESERVED_MEMORY_MB": 512, "APP_PORT": 7} == found["settings"]
    assert {"tiny", "small"} <= set(found["models"]) and found["config_file"].endswith("config.yaml")


def test_check_starts_nothing(tmp_path: Path) -> None:
    env = environment(None, STATE_DIR=str(tmp_path / "state"), HOME=str(tmp_path))
    done = subprocess.run([sys.executable, CHECKOUT / "app.py", "--check"], cwd=tmp_path, env=env, text=True,
                          capture_output=True, timeout=HANG_S)
    assert done.returncode == 0 and json.loads(done.stdout)["settings"]["STATE_DIR"] == str(tmp_path / "state")
    assert list(tmp_path.iterdir()) == []
