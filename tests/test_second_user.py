"""Another account of this machine reads nothing of the daemon's, and reaches nothing through it."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from config import load_settings
from tests.daemon import Daemon
from tests.support import wait_until

STRANGER = 54321        # a user id that nobody has
LOOK = """
import encodings.idna, os, sys, urllib.request, urllib.error
os.setgroups([]); os.setgid({id}); os.setuid({id})
for path in sys.argv[2:]:
    try:
        print("READ", path, open(path, "rb").read(20) if not os.path.isdir(path) else os.listdir(path))
    except OSError as error:
        pass
for method, path in (("GET", "/is_sleeping"), ("POST", "/sleep"), ("POST", "/%73leep"), ("POST", "//sleep")):
    try:
        answer = urllib.request.urlopen(urllib.request.Request(sys.argv[1] + path, method=method, data=b"" if
                                        method == "POST" else None))
        print("REACHED", path, answer.status)
    except urllib.error.HTTPError as error:
        assert error.code in (401, 403, 404), error.code
"""


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """Of somebody whose umask keeps nothing from others."""
    folder = tmp_path_factory.mktemp("daemon")
    before = os.umask(0)
    try:
        (folder / "state").mkdir()      # by hand, for all to see
        running = Daemon(folder, {"ADMIN_API_KEYS": "boss:admin-key", "API_KEYS": "user-key",
                                  "VLLM_SERVER_DEV_MODE": "1"})
        running.start()
    finally:
        os.umask(before)
    try:
        made = running.call("POST", "/instances", {"model_name": "m", "wait": True}, {"X-Api-Key": "admin-key"})
        assert made.status == 201
        yield running
    finally:
        running.stop()
        running._end_everything()


def kept(daemon: Daemon) -> list[Path]:
    """All that the daemon and its engines keep in files."""
    places = [daemon.state, *Path("/dev/shm").glob("psm_*"), *daemon.temporary.iterdir()]
    ours = [place for place in places if place.parent != Path("/dev/shm") or place in daemon.engine_memory()]
    return [path for place in ours for path in (place, *(place.rglob("*") if place.is_dir() else ()))]


def test_every_file_is_the_owners_alone_whatever_the_umask(daemon: Daemon) -> None:
    wait_until(lambda: (daemon.state / "audit.log").exists())
    found = kept(daemon)
    names = {path.name for path in found}
    assert {"state", "logs", "instances", "lock", "audit.log"} <= names
    assert [name for name in names if name.endswith(".json")]
    tops = [path for path in found if path.parent in (daemon.state, daemon.temporary, Path("/dev/shm"), daemon.folder)]
    assert {path: oct(mode) for path in tops if (mode := stat.S_IMODE(path.lstat().st_mode)) & 0o077} == {}
    logs = [path for path in found if path.suffix in (".log", ".json")]
    assert {path: oct(mode) for path in logs if (mode := stat.S_IMODE(path.lstat().st_mode)) & 0o077} == {}


@pytest.mark.skipif(os.getuid() != 0, reason="only root may become another user")
def test_another_user_reads_nothing_and_reaches_no_development_route(daemon: Daemon) -> None:
    for folder in (daemon.folder, *daemon.folder.parents):      # only the daemon's own modes are to be in the way
        if folder.is_relative_to("/tmp") and folder != Path("/tmp"):
            folder.chmod(folder.stat().st_mode | 0o755)
    instance = daemon.get("/instances", {"X-Api-Key": "admin-key"}).json["data"][0]
    paths = [*map(str, kept(daemon)), *(f"/proc/{pid}/environ" for pid in (daemon.worker_pid, instance["pid"]))]
    done = subprocess.run([sys.executable, "-c", LOOK.format(id=STRANGER),
                           f"http://127.0.0.1:{daemon.port}/proxy/{instance['id']}", *paths],
                          capture_output=True, text=True, timeout=120, cwd="/")
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    for pid in (daemon.pid, daemon.worker_pid, instance["pid"]):
        assert b"-key" not in Path(f"/proc/{pid}/cmdline").read_bytes()     # which everyone may read


@pytest.mark.parametrize(("name", "text"), [
    (".env", "API_KEYS=user-key\n"), ("keys", "user-key\n"),
    ("config.yaml", "models: {}\nproxy: {keys: [{name: a, key: user-key}]}\n"),
    ("config.yaml", "models: {m: {model_path: o/m, api_key: hf_x}}\n")])
def test_a_file_of_keys_that_all_can_read_is_told(tmp_path: Path, name: str, text: str) -> None:
    path = tmp_path / name
    path.write_text(text)
    environ = {"HOME": str(tmp_path), **({"API_KEYS_FILE": str(path)} if name == "keys" else {})}
    path.chmod(0o644)
    warned = [one for one in load_settings(environ, cwd=tmp_path).warnings if "can read it" in one]
    assert len(warned) == 1 and str(path) in warned[0] and "user-key" not in warned[0]
    path.chmod(0o640)
    assert not [one for one in load_settings(environ, cwd=tmp_path).warnings if "can read it" in one]
