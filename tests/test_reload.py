"""config.yaml is read again when it changes; what is bad changes nothing, and says so where people look."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from configuration.file_watch import FileWatch
from tests.daemon import Daemon
from tests.support import wait_until

pytestmark = pytest.mark.whole

OPEN, CLOSED = "proxy: {idle_timeout_seconds: 60}\n", "proxy: {api_key: sesame}\n"


# --- looking at a file ------------------------------------------------------------------------------------------------

@pytest.fixture
def path(tmp_path: Path) -> Path:
    found = tmp_path / "config.yaml"
    found.write_text("one")
    return found


def test_a_file_that_stays_as_it_is(path: Path) -> None:
    watch = FileWatch(path)
    assert [watch.changed() for _ in range(3)] == [False] * 3


def test_a_change_is_told_once_and_only_when_it_is_over(path: Path) -> None:
    watch = FileWatch(path)
    path.write_text("two and")
    assert not watch.changed()
    path.write_text("two and more")
    assert not watch.changed()          # it is still being written
    assert watch.changed()
    assert not watch.changed()


def test_a_file_put_in_its_place_with_the_same_size_and_time(path: Path) -> None:
    watch = FileWatch(path)
    before = path.stat()
    other = path.with_name("other")
    other.write_text("two")
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    other.replace(path)
    assert [watch.changed() for _ in range(3)] == [False, True, False]


def test_a_file_that_comes_and_goes(path: Path) -> None:
    other = path.with_name("other")
    watch = FileWatch(path, other)
    other.write_text("x")
    assert [watch.changed(), watch.changed()] == [False, True]
    path.unlink()
    assert [watch.changed(), watch.changed()] == [False, True]


def test_a_change_that_is_taken_back_is_none(path: Path) -> None:
    watch = FileWatch(path)
    path.rename(path.with_name("away"))
    assert not watch.changed()
    path.with_name("away").rename(path)
    assert [watch.changed(), watch.changed()] == [False, False]


def test_who_reads_the_file_notes_it(path: Path) -> None:
    watch = FileWatch(path)
    path.write_text("two and")
    watch.note()
    assert [watch.changed(), watch.changed()] == [False, False]


# --- the daemon -------------------------------------------------------------------------------------------------------

@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    daemon = Daemon(tmp_path, patch={"app.EVERY_S": 0.02})
    (tmp_path / "config.yaml").write_text(OPEN)
    with daemon:
        yield daemon


def write(daemon: Daemon, text: str) -> None:
    """As careful editors do: a new file in its place."""
    fresh = daemon.folder / "fresh"
    fresh.write_text(text)
    fresh.replace(daemon.folder / "config.yaml")


def is_open(daemon: Daemon) -> bool:
    return daemon.get("/v1/models").status == 200


def state(daemon: Daemon) -> dict[str, str | None]:
    found: dict[str, str | None] = daemon.get("/health").json["config"]
    return found


def test_a_changed_file_is_in_force_without_a_word(daemon: Daemon) -> None:
    assert is_open(daemon)
    assert state(daemon) == {"file": "config.yaml", "error": None}
    write(daemon, CLOSED)
    wait_until(lambda: not is_open(daemon))
    wait_until(lambda: "settings reloaded; changed: " in daemon.log)     # said when all of it is in force
    write(daemon, OPEN)
    wait_until(lambda: is_open(daemon))


@pytest.mark.parametrize(("bad", "says"), [
    ("proxy: {api_kee: x}\n", "config.yaml:1: proxy.api_kee: unknown key; did you mean api_key?"),
    ("", "config.yaml: is empty; `models: {}` says that there are none"), ("models: {\n", "config.yaml:2: ")])
def test_a_bad_file_changes_nothing_and_is_told_everywhere(daemon: Daemon, bad: str, says: str) -> None:
    write(daemon, CLOSED)
    wait_until(lambda: not is_open(daemon))
    write(daemon, bad)
    wait_until(lambda: state(daemon)["error"])
    assert str(state(daemon)["error"]).startswith(says)
    assert f"not reloaded, the old settings stay: {daemon.folder}/{says}" in daemon.log
    answer = daemon.post("/admin/reload")
    assert (answer.status, answer.error["code"]) == (400, "bad_config")
    assert says in answer.error["message"]
    assert not is_open(daemon)
    write(daemon, OPEN)
    wait_until(lambda: is_open(daemon))
    assert state(daemon)["error"] is None


def test_a_file_that_vanishes_does_not_mean_that_there_are_no_models(daemon: Daemon) -> None:
    write(daemon, CLOSED)
    wait_until(lambda: not is_open(daemon))
    (daemon.folder / "config.yaml").unlink()
    wait_until(lambda: state(daemon)["error"])
    assert "is gone" in str(state(daemon)["error"])
    assert not is_open(daemon)


def test_a_reload_tells_which_models_changed(daemon: Daemon) -> None:
    write(daemon, "models: {o/a: , o/b: {priority: 1}}\n")
    wait_until(lambda: "models added: o/a, o/b" in daemon.log)
    write(daemon, "models: {o/c: , o/b: {priority: 2}}\n")
    wait_until(lambda: "models added: o/c; models removed: o/a; models changed: o/b" in daemon.log)
    assert daemon.post("/admin/reload").json == {
        "object": "reload", "changed": [], "models": {"added": [], "removed": [], "changed": []}}


def test_a_bad_file_stops_the_start(tmp_path: Path) -> None:
    daemon = Daemon(tmp_path)
    (tmp_path / "config.yaml").write_text("models:\n  o/m: {gpus: 0}\n")
    with pytest.raises(AssertionError, match="the daemon did not start"), daemon:
        pass
    assert "config.yaml:2: models.o/m.gpus: expected a number of GPUs" in daemon.log
    assert "Traceback" not in daemon.log


def test_another_file_can_be_named(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(CLOSED)
    with Daemon(tmp_path / "daemon", arguments=("--config", str(tmp_path / "mine.yaml"))) as daemon:
        assert not is_open(daemon)
        assert state(daemon)["file"] == "mine.yaml"
