"""Where models arrive, and for how long a growing one puts a start's deadline off."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from instances import downloads
from instances.downloads import DownloadWatch, cache_folder, size_bytes

NAME = "models--org--model"


@pytest.mark.parametrize("env, folder", [
    ({"HOME": "/home/u"}, "/home/u/.cache/huggingface/hub"),
    ({"HOME": "/home/u", "XDG_CACHE_HOME": "/cache"}, "/cache/huggingface/hub"),
    ({"HOME": "/home/u", "HF_HOME": "/hf"}, "/hf/hub"),
    ({"HOME": "/home/u", "HF_HOME": "~/hf"}, "/home/u/hf/hub"),
    ({"HF_HOME": "/hf", "HF_HUB_CACHE": "/hub"}, "/hub"),
    ({"HF_HOME": "/hf", "HUGGINGFACE_HUB_CACHE": "/old"}, "/old")])
def test_the_folder_as_huggingface_hub_finds_it(env: dict[str, str], folder: str) -> None:
    assert cache_folder("org/model", env) == Path(folder) / NAME


def test_the_engines_own_folder_wins() -> None:
    assert cache_folder("org/model", {"HF_HOME": "/hf"}, "/models") == Path("/models") / NAME


def test_a_name_without_an_owner() -> None:
    assert cache_folder("gpt2", {"HF_HUB_CACHE": "/hub"}) == Path("/hub/models--gpt2")


def test_a_local_model_is_not_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "model").mkdir(parents=True)
    for name in ("/models/x", "./x", "../x", "~/x", "a/b/c", "org/model"):
        assert cache_folder(name, {}) is None


def arrive(folder: Path, name: str, blocks: int) -> None:
    (folder / "blobs").mkdir(parents=True, exist_ok=True)
    with open(folder / "blobs" / name, "wb") as file:
        file.write(os.urandom(4096) * blocks)
        file.flush()
        os.fsync(file.fileno())


def test_unfinished_files_count_as_far_as_they_are_there(tmp_path: Path) -> None:
    assert size_bytes(tmp_path) == 0 and size_bytes(None) == 0
    arrive(tmp_path, "a.incomplete", 10)
    with open(tmp_path / "blobs" / "hole", "wb") as file:
        file.truncate(1 << 40)      # a file that was made in its whole length at once
    assert 40_960 <= size_bytes(tmp_path) < 1 << 20


@pytest.fixture
def size(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    size = [100]
    monkeypatch.setattr(downloads, "size_bytes", lambda folder: size[0])
    return size


def test_time_counts_while_nothing_grows(size: list[int]) -> None:
    watch = DownloadWatch(None, 0.0)
    assert [watch.look(float(at)) for at in (2, 4, 100)] == [0.0, 0.0, 0.0]
    assert not watch.growing(100.0) and watch.downloaded_bytes == 0


def test_time_in_which_it_grows_does_not(size: list[int]) -> None:
    watch = DownloadWatch(None, 0.0)
    put_off = 0.0
    for at in range(2, 202, 2):
        size[0] += 1
        put_off += watch.look(float(at))
    assert (put_off, watch.downloaded_bytes) == (200.0, 100)
    assert watch.growing(200.0)


def test_a_short_pause_is_still_a_download_and_a_long_one_is_not(size: list[int]) -> None:
    watch = DownloadWatch(None, 0.0)
    size[0] += 1
    watch.look(2.0)
    assert [watch.look(at) for at in (20.0, 31.9, 32.0, 60.0)] == [18.0, pytest.approx(11.9), 0.0, 0.0]
    size[0] += 1
    assert watch.look(62.0) == 2.0


def test_files_that_shrink_are_no_download(size: list[int]) -> None:
    watch = DownloadWatch(None, 0.0)
    size[0] -= 50
    assert watch.look(2.0) == 0.0
