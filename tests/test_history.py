"""What is remembered of earlier starts, and that it survives whatever happens to the file."""

from __future__ import annotations

import json
import stat
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from instances import history
from instances.footprint import Measured
from instances.history import History, key


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "history.json"


def test_times_are_medians_of_the_last_few(path: Path) -> None:
    kept = History(path)
    for seconds in (900.0, 40.0, 60.0, 50.0, 70.0, 30.0):
        kept.note_start("k", "m", seconds)
    kept.note_wake("k", "m", 2.0)
    entry = kept.get("k")
    assert entry is not None and (entry.reload_s, entry.median_wake_s) == (50.0, 2.0)
    assert kept.get("unknown") is None


def test_the_peak_counts_until_the_kv_cache_is_another_one(path: Path) -> None:
    kept = History(path)
    kept.note_ready("k", "m", 70, kv_cache_bytes=50, filled=True)
    kept.note_memory("k", "m", 75)
    kept.note_memory("k", "m", 71)
    assert measured(kept) == Measured(75, 50, True)
    kept.note_ready("k", "m", 30, kv_cache_bytes=10, filled=False)
    kept.note_memory("k", "m", 33)
    kept.note_ready("k", "m", 29, kv_cache_bytes=10, filled=False)
    assert measured(kept) == Measured(33, 10, False)
    kept.note_ready("k", "m", None, kv_cache_bytes=None, filled=False)
    assert measured(kept) == Measured(33, 10, False)


def measured(kept: History) -> Measured | None:
    entry = kept.get("k")
    return None if entry is None else entry.measured


def test_it_is_there_again_after_a_restart_and_for_the_owner_only(path: Path) -> None:
    kept = History(path)
    kept.note_start("k", "org/model", 12.5)
    kept.note_sleep("k", "org/model", 2, None)
    kept.note_ready("k", "org/model", 5, kv_cache_bytes=None, filled=False)
    kept.save()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and [path] == list(path.parent.iterdir())
    again = History(path)
    assert again.get("k") == kept.get("k") and again.get("k") is not None


def test_it_writes_only_what_changed(path: Path) -> None:
    kept = History(path)
    kept.save()
    assert not path.exists()
    kept.note_memory("k", "m", 7)
    kept.save()
    path.unlink()
    kept.note_memory("k", "m", 6)       # below the peak: nothing new
    kept.save()
    assert not path.exists()


def test_it_is_bounded_and_forgets_what_was_noted_longest_ago(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history, "MOST_ENTRIES", 3)
    kept = History(path)
    for name in ("a", "b", "c", "a", "d"):
        kept.note_memory(name, "m", 1)
    kept.save()
    assert list(json.loads(path.read_bytes())["entries"]) == ["c", "a", "d"]
    monkeypatch.setattr(history, "MOST_ENTRIES", 2)
    assert [name for name in "acd" if History(path).get(name)] == ["a", "d"]


GOOD = {"model": "m", "peak_bytes": 1, "kv_cache_bytes": None, "filled": False, "asleep_bytes": None,
        "host_bytes": None, "start_s": [1.0], "wake_s": []}


@pytest.mark.parametrize("text", [
    "", "{", "[]", "null", '{"version": 2, "entries": {}}', '{"version": 1}', '{"version": 1, "entries": []}',
    "\0" * 100, "[" * 100_000, '{"version": 1, "entries": {"k": {}}}',
    *(json.dumps({"version": 1, "entries": {"k": {**GOOD, name: value}}}) for name, value in (
        ("peak_bytes", -1), ("peak_bytes", True), ("peak_bytes", "1"), ("start_s", [-1]), ("start_s", ["x"]),
        ("start_s", 5), ("wake_s", [float("inf")]), ("wake_s", [float("nan")]), ("model", None), ("filled", 1)))])
def test_a_file_that_cannot_be_read_is_set_aside(text: str, path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path.write_text(text)
    kept = History(path)
    assert kept.get("k") is None and path.with_suffix(".unreadable").read_text() == text and not path.exists()
    assert "cannot be read" in caplog.text
    kept.note_memory("k", "m", 5)
    kept.save()
    assert measured(History(path)) == Measured(5)


def test_a_good_file_is_not_set_aside(path: Path) -> None:
    path.write_text(json.dumps({"version": 1, "entries": {"k": GOOD}}))
    assert measured(History(path)) == Measured(1)


@given(st.binary(max_size=200))
def test_no_file_can_stop_the_daemon(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "any-history.json"
    path.write_bytes(data)
    assert History(path).get("k") is None


def test_a_disk_that_is_full_costs_nothing_but_the_file(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    kept = History(path)
    kept.note_memory("k", "m", 5)
    path.with_suffix(".tmp").mkdir()        # stands in for a disk that refuses
    kept.save()
    assert "cannot be written" in caplog.text and not path.exists()
    path.with_suffix(".tmp").rmdir()
    kept.save()
    assert measured(History(path)) == Measured(5)


def test_many_threads_note_and_save(path: Path) -> None:
    kept = History(path)

    def note(number: int) -> None:
        for peak in range(50):
            kept.note_memory(f"k{number}", "m", peak)
            kept.save()

    threads = [threading.Thread(target=note, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    kept.save()
    assert [measured_of(path, number) for number in range(8)] == [Measured(49)] * 8


def measured_of(path: Path, number: int) -> Measured | None:
    entry = History(path).get(f"k{number}")
    return None if entry is None else entry.measured


def test_a_configuration_is_its_model_flags_device_and_environment() -> None:
    flags = {"max_model_len": 4096, "dtype": "auto"}
    one = key("m", flags, device="H200")
    assert one == key("m", dict(reversed(flags.items())), device="H200", env={})
    assert one == key("m", {**flags, "hf_token": "secret", "served_model_name": ["x"]}, device="H200",
                      env={"HF_TOKEN": "secret"})
    others = [key("n", flags, device="H200"), key("m", {**flags, "dtype": "half"}, device="H200"),
              key("m", flags, device="A100"), key("m", flags, device="H200", env={"VLLM_CPU_KVCACHE_SPACE": "1"})]
    assert len({one, *others}) == 5
