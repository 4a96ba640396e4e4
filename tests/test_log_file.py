"""Engines' logs: rotated, bounded, and read as they grow without losing or repeating a line."""

from __future__ import annotations

import codecs
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from instances import log_file
from instances.log_file import LogReader, open_log, previous_log, prune_logs, read_tail, trim_log


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "0123abcd.log"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("logs")


def write(path: Path, text: str | bytes) -> None:
    with open(path, "ab") as file:
        file.write(text.encode() if isinstance(text, str) else text)


def test_a_new_start_begins_an_empty_log_and_keeps_one_old_one(path: Path) -> None:
    for number in range(3):
        with open_log(path) as output:
            os.write(output, b"start %d\n" % number)
    assert path.read_text() == "start 2\n" and previous_log(path).read_text() == "start 1\n"
    assert len(list(path.parent.iterdir())) == 2
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_writer_goes_on_after_a_trim(path: Path) -> None:
    with open_log(path) as output:
        os.write(output, b"".join(b"line %d\n" % number for number in range(1000)))
        assert trim_log(path, 4000)
        os.write(output, b"line 1000\n")
    lines = path.read_text().splitlines()
    assert lines[-2:] == ["line 999", "line 1000"] and lines[0].startswith("line ")
    assert path.stat().st_size <= 1010 and "\0" not in path.read_text()


def test_a_log_within_its_bound_stays_as_it_is(path: Path) -> None:
    write(path, "x" * 100)
    assert not trim_log(path, 100)
    assert path.stat().st_size == 100


def test_a_line_longer_than_all_the_bound(path: Path) -> None:
    write(path, "x" * 1000)
    assert trim_log(path, 100)
    assert path.read_text() == "x" * 25


def test_a_log_that_is_not_there_is_no_trouble(path: Path) -> None:
    assert not trim_log(path, 10)
    assert read_tail(path) == "" and LogReader(path).read() == ""
    LogReader(path).trim(10)
    prune_logs(path.parent / "none", 1, [])


def test_the_end_of_a_log(path: Path) -> None:
    write(path, "one\ntwo\nthree\n")
    assert (read_tail(path), read_tail(path, 6)) == ("one\ntwo\nthree\n", "three\n")


def test_what_was_added_since_the_last_time(path: Path) -> None:
    reader = LogReader(path)
    assert reader.read() == ""
    write(path, "one\n")
    assert reader.read() == "one\n"
    assert reader.read() == ""
    write(path, "two")
    write(path, " and a half\n")
    assert reader.read() == "two and a half\n"


def test_a_log_that_someone_else_cut_is_read_anew(path: Path) -> None:
    reader = LogReader(path)
    write(path, "one\ntwo\n")
    reader.read()
    path.write_text("new\n")
    assert reader.read() == "new\n"


def test_a_trim_repeats_nothing_and_loses_nothing_unread(path: Path) -> None:
    reader = LogReader(path)
    write(path, "old\n" * 1000)
    reader.read()
    write(path, "new\n" * 10)
    reader.trim(1000)
    assert path.stat().st_size <= 1000
    assert reader.read() == "new\n" * 10
    reader.trim(1000)
    write(path, "newer\n")
    assert reader.read() == "newer\n"


def test_the_rest_in_pieces(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_file, "PIECE_BYTES", 10)
    write(path, "0123456789" * 3 + "end")
    assert list(LogReader(path).read_rest()) == ["0123456789"] * 3 + ["end"]


@settings(max_examples=100)
@given(st.lists(st.binary(max_size=12) | st.text(max_size=4).map(lambda text: text.encode("utf-8", "replace"))))
def test_however_it_is_cut_the_text_is_the_same(folder: Path, pieces: list[bytes]) -> None:
    path = folder / "x.log"
    path.unlink(missing_ok=True)
    reader, seen = LogReader(path), ""
    for piece in pieces:
        write(path, piece)
        seen += reader.read()
    assert seen == codecs.getincrementaldecoder("utf-8")("replace").decode(b"".join(pieces))


def test_characters_cut_in_two_are_read_whole(path: Path) -> None:
    reader, data = LogReader(path), "模型 é 🚀\n".encode()
    seen = ""
    for at in range(len(data)):
        write(path, data[at:at + 1])
        seen += reader.read()
    assert seen == "模型 é 🚀\n"


def test_the_oldest_logs_of_those_that_are_gone_are_deleted(tmp_path: Path) -> None:
    for number in range(10):
        file = tmp_path / f"{number}.log"
        file.touch()
        os.utime(file, (number, number))
    in_use = tmp_path / "0.log"
    previous_log(in_use).touch()
    os.utime(previous_log(in_use), (0, 0))
    prune_logs(tmp_path, 3, [in_use])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.log", "0.log.1", "7.log", "8.log", "9.log"]
    prune_logs(tmp_path, 0, [in_use])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.log", "0.log.1"]
