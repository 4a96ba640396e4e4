"""instances/log_tail.py: the last lines of a log, and what comes after them."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from instances import log_tail
from tests.support import wait_until


@pytest.mark.parametrize(("text", "count", "expected"), [
    (b"a\nb\nc\n", 2, b"b\nc\n"), (b"a\nb\nc\n", 3, b"a\nb\nc\n"), (b"a\nb\nc\n", 99, b"a\nb\nc\n"),
    (b"a\nb\nc\n", 0, b""), (b"a\nb\nunfinished", 2, b"b\nunfinished"), (b"", 5, b""), (b"\n\n\n", 2, b"\n\n"),
    (b"a\n\r 10%\r 20%\r 99%\nb\n", 2, b"\r 10%\r 20%\r 99%\nb\n"), ("é\u2028x\ny\n".encode(), 1, b"y\n")])
def test_last_lines(tmp_path: Path, text: bytes, count: int, expected: bytes) -> None:
    (tmp_path / "log").write_bytes(text)
    assert log_tail.last_lines(tmp_path / "log", count) == expected


@pytest.mark.parametrize("count", [1, 7, 20_000])
def test_lines_across_blocks(tmp_path: Path, count: int) -> None:
    lines = [f"line {number} {'x' * (number % 40)}\n".encode() for number in range(20_000)]
    (tmp_path / "log").write_bytes(b"".join(lines))
    assert log_tail.last_lines(tmp_path / "log", count) == b"".join(lines[-count:])


def test_no_log_yet(tmp_path: Path) -> None:
    assert log_tail.last_lines(tmp_path / "log", 5) == b""


def test_follow_yields_what_is_added_until_the_end(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"a\nb\n")
    over = threading.Event()
    read = log_tail.follow(path, 1, over.is_set)
    assert next(read) == b"b\n"
    with open(path, "ab") as file:
        file.write(b"c\n")
    assert next(read) == b"c\n"
    with open(path, "ab") as file:
        file.write(b"last\n")
    over.set()
    assert list(read) == [b"last\n"]


def test_follow_goes_on_in_a_new_file_and_a_cut_one(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"first start\n")
    over = threading.Event()
    read = log_tail.follow(path, 5, over.is_set)
    assert next(read) == b"first start\n"
    path.rename(tmp_path / "log.1")
    path.write_bytes(b"a second start, longer than the first\n")
    assert next(read) == b"a second start, longer than the first\n"
    path.write_bytes(b"cut\n")
    assert next(read) == b"cut\n"
    over.set()
    assert list(read) == []


def test_follow_waits_for_a_log_that_is_not_there_yet(tmp_path: Path) -> None:
    path, over, pieces = tmp_path / "log", threading.Event(), list[bytes]()
    reader = threading.Thread(target=lambda: pieces.extend(log_tail.follow(path, 5, over.is_set)))
    reader.start()
    path.write_bytes(b"here\n")
    wait_until(lambda: pieces == [b"here\n"])
    over.set()
    reader.join()
    assert pieces == [b"here\n"]
