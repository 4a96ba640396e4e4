"""docs/DEPLOYMENT, OPERATIONS and MIGRATION, in both languages: complete, alike, and their snippets are taken."""

from __future__ import annotations

import re
from pathlib import Path

import click
import pytest

import config
import errors
from configuration.servers import parse_servers
from instances.instance import State
from instances.startup_log import CAUSES
from tests.daemon import CHECKOUT
from tests.test_docs import code_blocks, other_codes, section
from vllm_server_client.cli.main import cli

DOCS = CHECKOUT / "docs"
GUIDES = {path.name: path.read_text() for path in sorted(DOCS.glob("*.md"))
          if path.stem.removesuffix("_zh") in ("DEPLOYMENT", "OPERATIONS", "MIGRATION")}
each_guide = pytest.mark.parametrize("text", GUIDES.values(), ids=GUIDES.keys())


def first_cells(text: str) -> set[str]:
    """Every name in backticks in the first column of a table."""
    cells = re.findall(r"^\| ([^|]+) \|", text, re.MULTILINE)
    return {name for cell in cells for name in re.findall(r"`([^`]+)`", cell)}


@pytest.mark.parametrize("name", ["DEPLOYMENT", "OPERATIONS", "MIGRATION"])
def test_both_languages_say_the_same(name: str) -> None:
    english, chinese = GUIDES[f"{name}.md"], GUIDES[f"{name}_zh.md"]
    assert code_blocks(english) == code_blocks(chinese)
    assert first_cells(english) == first_cells(chinese)
    assert [line.count("#") for line in re.findall(r"^#+ ", english, re.MULTILINE)] == [
        line.count("#") for line in re.findall(r"^#+ ", chinese, re.MULTILINE)]
    assert len(re.findall(r"^[|-] ", english, re.MULTILINE)) == len(re.findall(r"^[|-] ", chinese, re.MULTILINE))


@pytest.mark.parametrize("name", ["OPERATIONS.md", "OPERATIONS_zh.md"])
def test_every_state_and_code_has_its_advice(name: str) -> None:
    told = first_cells(GUIDES[name])
    assert {str(state) for state in State} <= told
    assert {cause.code for cause in CAUSES} | other_codes() <= told
    later = {one.code for one in vars(errors).values() if isinstance(one, type)
             and issubclass(one, errors.DaemonError) and (one.status >= 502 or one.status == 429)}
    assert {"queue_full", "backends_busy", "upstream_timeout"} <= later     # else this test has lost its sight
    assert later <= told, later - told


@each_guide
def test_the_commands_that_they_name_exist(text: str) -> None:
    named = set(re.findall(r"`(?:\.venv/bin/)?vllm-server ([a-z]+)", text))
    assert isinstance(cli, click.Group) and named
    assert named <= cli.commands.keys(), named - cli.commands.keys()
    settings = {name for one in config.SETTINGS for name in (one.name, *one.older)}
    for script in re.findall(r"\bscripts/\w+\.sh\b", text):
        assert (CHECKOUT / script).exists(), script
    upper = set(re.findall(r"`([A-Z]+(?:_[A-Z]+)+)`", text))
    assert {one for one in upper if not one.startswith(("OLLAMA_", "CUDA_"))} <= settings, upper - settings


@pytest.mark.parametrize("name", ["MIGRATION.md", "MIGRATION_zh.md"])
def test_our_snippets_are_whole_files_that_are_taken(tmp_path: Path, name: str) -> None:
    ours = [(language, code) for language, code in re.findall(r"^```(\w+)\n(.*?)^```$", GUIDES[name], re.M | re.S)
            if code.startswith("# vllm-server: ")]
    assert len(ours) == GUIDES[name].count("# vllm-server: ") == 5
    for language, code in ours:
        if language == "toml":
            assert len(parse_servers(code, tmp_path / "servers.toml", {}).servers) == 2
        else:
            (tmp_path / "config.yaml").write_text(code)
            read = config.load_settings({}, cwd=tmp_path)
            assert read.catalog.models and read.config_file is not None
            assert not any("unknown" in warning for warning in read.warnings)


def test_a_move_keeps_what_was_meant(tmp_path: Path) -> None:
    """The value of each key of theirs, in our file beside it."""
    def read(title: str) -> config.Settings:
        block = re.search(r"^```yaml\n(# vllm-server.*?)^```$", section(GUIDES["MIGRATION.md"], f"From {title}"),
                          re.MULTILINE | re.DOTALL)
        assert block is not None
        (tmp_path / "config.yaml").write_text(block[1])
        return config.load_settings({}, cwd=tmp_path)

    swapped = read("llama-swap").catalog.models
    assert (swapped["llama-8b"].idle_timeout_s, swapped["llama-8b"].aliases) == (300, ("gpt-4o-mini",))
    assert swapped["embedder"].pinned and swapped["embedder"].preload and swapped["embedder"].idle_timeout_s == 0
    ollama = read("Ollama")
    assert (ollama.host, ollama.port, ollama.catalog.models["qwen3:0.6b"].idle_timeout_s) == ("0.0.0.0", 11434, 300)
    plain = read("plain `vllm serve`")
    assert plain.catalog.models["big"].gpus == (0, 1) and plain.port == 8000 and len(plain.api_keys) == 1
