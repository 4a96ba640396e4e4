"""The commands of a checkout: make run, make demo, the Makefile's stamps, and how .venv is made."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
from pathlib import Path

import pytest

from scripts import run
from tests.daemon import CHECKOUT, HANG_S
from tests.demo_run import DemoRun, shell
from tests.support import wait_until

pytestmark = pytest.mark.whole

# --- make run, make demo ---------------------------------------------------------------------------------------------

def test_a_demo_answers_its_lines_work_and_ctrl_c_ends_it_once(tmp_path: Path) -> None:
    with DemoRun(tmp_path, "--demo") as demo:
        demo.wait_for("serving on")
        assert "the engine is SIMULATED" in demo.log
        assert re.search(r"^==> demo: simulated ", demo.log, re.MULTILINE)
        assert demo.get("/health").json["simulated"] is True
        answer = json.loads(shell(demo.lines["ask"]))
        assert answer["choices"][0]["message"]["content"].startswith("simulated")
        [listed] = json.loads(shell(demo.lines["list"]))["data"]
        assert (listed["aliases"], listed["status"], listed["expires_in"]) == (["demo"], "ready", None)
        shell(demo.lines["stop the model"])
        wait_until(lambda: demo.instances() == [])
        demo.ctrl_c()
        assert demo.wait_for_exit() == 0
        assert "hurried" not in demo.log    # which two signals would have been


def test_keys_open_what_they_guard_and_are_never_printed(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("ADMIN_API_KEYS=open-sesame\nAPI_KEYS=talk-to-me\n")
    with DemoRun(tmp_path) as demo:
        demo.wait_for("serving on")
        assert "open-sesame" not in demo.log and "talk-to-me" not in demo.log
        assert demo.get("/instances").status == 401
        with_key = {"PATH": os.environ["PATH"], "KEY": "open-sesame"}
        assert "simulated" in shell(demo.lines["ask"], with_key)
        assert json.loads(shell(demo.lines["list"], with_key))["data"][0]["status"] == "ready"


def test_a_load_that_fails_tells_its_cause_and_leaves_the_daemon_up(tmp_path: Path) -> None:
    with DemoRun(tmp_path, "--demo", env={"SIMULATOR_FAIL": "bad_flag"}) as demo:
        demo.wait_for("serving on")
        assert "failed to load (bad_flag): vLLM does not know --simulated-bad-flag" in demo.log
        assert demo.get("/health").status == 200
        demo.ctrl_c()
        assert demo.wait_for_exit() == 1


def test_ctrl_c_while_the_model_loads_leaves_nothing(tmp_path: Path) -> None:
    with DemoRun(tmp_path, "--demo", env={"SIMULATOR_START_S": "600"}) as demo:
        demo.wait_for("s  resolving")
        demo.ctrl_c()
        assert demo.wait_for_exit() == 130
        assert "Traceback" not in demo.log


def test_a_second_ctrl_c_hurries(tmp_path: Path) -> None:
    with DemoRun(tmp_path, "--demo") as demo:
        demo.wait_for("serving on")
        demo.create("slow", sim={"tokens_per_s": 0.001})
        body = {"model": "slow", "prompt": "a", "max_tokens": 100, "stream": True}
        with demo.open("POST", "/v1/completions", body):
            demo.ctrl_c()
            wait_until(lambda: connection_is_refused(demo.port))
            assert not demo.exited()            # it waits for the stream
            demo.ctrl_c()
            assert demo.wait_for_exit() == 0
        assert "hurried" in demo.log


def test_killed_without_a_word_it_takes_its_daemon_along(tmp_path: Path) -> None:
    with DemoRun(tmp_path, "--demo") as demo:
        demo.wait_for("serving on")
        demo.signal(signal.SIGKILL)
        demo.wait_for_exit()
        wait_until(lambda: connection_is_refused(demo.port) and demo.records() == [])


def test_settings_that_cannot_work_end_it_with_one_sentence(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen(1)
        port = taken.getsockname()[1]
        demo = DemoRun(tmp_path, "--demo", env={"APP_PORT": str(port)})
        assert ended(demo) == (1, f"vllm-server: port {port} is taken: stop what listens there, or take another one: "
                                  f"make demo APP_PORT={port + 1}\n")
    (tmp_path / ".env").write_text("\nAPP_PROT=5000\n")
    code, text = ended(DemoRun(tmp_path, "--demo"))
    assert (code, text.count("\n")) == (1, 1)
    assert f"{tmp_path}/.env:2" in text and "APP_PORT" in text


def ended(demo: DemoRun) -> tuple[int, str]:
    """Exit code and output of a run that does not get far."""
    done = subprocess.run(demo._argv, cwd=demo.folder, env=demo.env, text=True, timeout=HANG_S,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
    demo._end_everything()
    return done.returncode, done.stdout


def connection_is_refused(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) != 0


@pytest.mark.parametrize(("gib", "share"), [((24,), 0.17), ((141, 80), 0.05), ((2,), 0.9)])
def test_the_demo_takes_little_of_a_gpu(gib: tuple[int, ...], share: float) -> None:
    gpus = [{"kind": "cuda", "memory": {"total": size << 30}} for size in gib]
    params = run.engine_params([{"kind": "host", "memory": {"total": 1 << 30}}, *gpus])
    assert params["gpu_memory_utilization"] == share
    assert "dtype" not in params


def test_without_a_gpu_it_asks_for_what_every_cpu_can_do() -> None:
    params = run.engine_params([{"kind": "host", "memory": {"total": 1 << 34}}])
    assert (params["dtype"], params["enforce_eager"]) == ("float32", True)
    assert "gpu_memory_utilization" not in params


# --- Makefile ---------------------------------------------------------------------------------------------------------

def make(folder: Path, *arguments: str) -> str:
    return shell(f"make {' '.join(arguments)}", {"PATH": os.environ["PATH"]}, folder)


def test_make_alone_lists_every_target() -> None:
    text = (CHECKOUT / "Makefile").read_text()
    phony = re.findall(r"^\.PHONY: (.*)$", text, re.MULTILINE)[0].split()
    assert re.findall(r"^make (\w+)", make(CHECKOUT), re.MULTILINE) == phony


def test_the_environment_is_made_once_and_again_when_requirements_change(tmp_path: Path) -> None:
    shutil.copy(CHECKOUT / "Makefile", tmp_path)
    for folder in ("scripts", "client"):
        (tmp_path / folder).mkdir()
    script = tmp_path / "scripts" / "make_venv.sh"
    script.write_text("#!/bin/sh\nmkdir -p .venv\necho $1 >>calls\n")
    script.chmod(0o755)
    old = 1_000_000_000
    for name in ("requirements.txt", "requirements-dev.txt", "client/requirements.txt", "scripts/make_venv.sh"):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (old, old))

    def calls() -> list[str]:
        return (tmp_path / "calls").read_text().split()

    for _ in range(2):
        make(tmp_path, ".venv/run.stamp")
        assert calls() == ["requirements.txt"]
    for _ in range(2):
        make(tmp_path, ".venv/dev.stamp")
        assert calls() == ["requirements.txt", "requirements-dev.txt"]
    make(tmp_path, ".venv/run.stamp")       # the larger one holds the smaller one
    assert len(calls()) == 2
    future = (tmp_path / ".venv" / "run.stamp").stat().st_mtime + 10
    os.utime(tmp_path / "requirements.txt", (future, future))
    make(tmp_path, ".venv/run.stamp")
    assert calls()[2:] == ["requirements.txt"]


# --- make_venv.sh -----------------------------------------------------------------------------------------------------

FAKE_PYTHON = """#!/bin/sh
case "$*" in
    *ensurepip*) echo {verdict} ;;
    *%d.%d*) echo 3.12 ;;
    --version) echo Python 3.12.1 ;;
    "-m venv --clear .venv") /bin/mkdir -p .venv/bin; /bin/cp "$0" .venv/bin/python ;;
    *) echo "$0 $*" >>calls; exit {pip_code} ;;
esac
"""


def make_venv(folder: Path, pythons: dict[str, str], pip_code: int = 0) -> subprocess.CompletedProcess[str]:
    """The script on a machine with these Pythons (name -> what each is good for) and nothing else."""
    (folder / "bin").mkdir()
    for name, verdict in pythons.items():
        (folder / "bin" / name).write_text(FAKE_PYTHON.format(verdict=verdict, pip_code=pip_code))
        (folder / "bin" / name).chmod(0o755)
    return subprocess.run(["/bin/sh", str(CHECKOUT / "scripts" / "make_venv.sh"), "requirements.txt"], cwd=folder,
                          env={"PATH": str(folder / "bin")}, text=True, capture_output=True, timeout=HANG_S)


def test_the_first_python_that_is_fit_makes_the_environment(tmp_path: Path) -> None:
    done = make_venv(tmp_path, {"python3": "old", "python3.13": "no-venv", "python3.12": "good"})
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "calls").read_text().split()[1:] == (
        ["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-input", "-r", "requirements.txt"])


@pytest.mark.parametrize(("pythons", "words"), [
    ({"python3": "no-venv"}, "apt install python3.12-venv"), ({"python3": "old"}, "Python 3.11 or newer is needed"),
    ({}, "Python 3.11 or newer is needed")])
def test_a_machine_without_what_it_takes_gets_one_line(tmp_path: Path, pythons: dict[str, str], words: str) -> None:
    done = make_venv(tmp_path, pythons)
    assert done.returncode != 0
    assert words in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / ".venv").exists()


def test_pip_that_fails_says_what_to_do(tmp_path: Path) -> None:
    done = make_venv(tmp_path, {"python3": "good"}, pip_code=7)
    assert done.returncode == 1
    assert "run this again" in done.stderr


# --- .ci/run ----------------------------------------------------------------------------------------------------------

def ci(folder: Path, failing: str = "-", minutes: int = 60, chromium: str = "true") -> tuple[int, list[str], str]:
    """Exit code, the commands that it ran, and its last line; `failing` is the make target that fails."""
    calls = folder / "calls"
    for name, text in {
        ".ci/run": (CHECKOUT / ".ci" / "run").read_text(),
        "bin/make": f'#!/bin/sh\necho "make $*" >>{calls}\n[ "$1" != {failing} ] || exit 3\n',
        ".venv/bin/python": f'#!/bin/sh\necho "python $*" >>{calls}\n',
        "bin/apt-get": "#!/bin/sh\n",      # a test installs nothing
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    done = subprocess.run([folder / ".ci" / "run"], text=True, capture_output=True, timeout=HANG_S, env={
        "PATH": f"{folder / 'bin'}:/usr/bin:/bin", "MINUTES": str(minutes), "CHROMIUM": chromium})
    return done.returncode, calls.read_text().splitlines(), done.stdout.splitlines()[-1]


def test_the_whole_check_runs_everything_in_order(tmp_path: Path) -> None:
    code, calls, last = ci(tmp_path)
    assert (code, [one.partition(" SEED=")[0] for one in calls]) == (0, [
        "make test", "make whole", "make browser", "python scripts/setup_engine.py", "make e2e", "make chaos",
        "make chaos", "make slow"])
    assert last.startswith("--- all passed")


def test_the_whole_check_goes_on_without_a_browser(tmp_path: Path) -> None:
    code, calls, _ = ci(tmp_path, chromium="/no/such/chromium")
    assert code == 0 and "make browser" not in calls and calls[-1].startswith("make slow")


def test_the_whole_check_stops_where_something_fails(tmp_path: Path) -> None:
    code, calls, last = ci(tmp_path, failing="e2e")
    assert (code, calls[-1], last) == (3, "make e2e", "--- failed (3): make e2e")


def test_the_whole_check_has_a_bound(tmp_path: Path) -> None:
    (tmp_path / "calls").touch()
    assert ci(tmp_path, minutes=0) == (124, [], "--- out of time: make test")


def test_what_is_shipped_can_be_run() -> None:
    for name in (".ci/run", "scripts/make_venv.sh"):
        assert os.access(CHECKOUT / name, os.X_OK), name
        subprocess.run(["bash", "-n", str(CHECKOUT / name)], check=True)
