"""Keys: how they are written, where they stand, whose they are."""

from __future__ import annotations

from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import pytest

from config import Settings, load_settings
from configuration.keys import Key, parse_keys, read_keys
from errors import ConfigError

HEX = sha256(b"sk-one").hexdigest()


def load(folder: Path, config: str = "", **environ: str) -> Settings:
    if config:
        (folder / "config.yaml").write_text(config)
    return load_settings({"HOME": str(folder), **environ}, cwd=folder)


@pytest.mark.parametrize(("text", "name", "plain"), [
    ("sk-one", f"key-{HEX[:8]}", "sk-one"), ("alice:sk-one", "alice", "sk-one"),
    (f"sha256:{HEX}", f"key-{HEX[:8]}", None), (f"alice:sha256:{HEX.upper()}", "alice", None)])
def test_the_ways_to_write_one_key(text: str, name: str, plain: str | None) -> None:
    (key,) = parse_keys(text)
    assert (key.name, key.digest.hex(), key.plain) == (name, HEX, plain)
    assert "sk-one" not in repr(key) and HEX not in repr(key)


@pytest.mark.parametrize(("text", "message"), [
    (",", "one or more keys"), ("two words", "printable ASCII"), ("sha256:123", "64 hexadecimal"),
    ("a:sha256:xyz", "64 hexadecimal"), ("one,one", "given twice"), (f"one:sk-one,two:sha256:{HEX}", "given twice"),
    ("me:one,me:two", "two keys are named me"), ("my-sk-one:sk-one", "in its own name")])
def test_mistakes_are_told_and_no_key_is_shown(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, API_KEYS=text)
    assert message in str(caught.value) and caught.value.where == "API_KEYS" and "sk-one" not in str(caught.value)


def test_a_file_of_keys(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text(f"# ours\nalice:one\n\n  bob:sha256:{HEX}\n#last\n")
    got = load(tmp_path, API_KEYS="carol:three", API_KEYS_FILE="~/keys", ADMIN_API_KEYS_FILE=str(tmp_path / "keys"))
    assert [key.name for key in got.api_keys] == ["carol", "alice", "bob"]
    assert [key.name for key in got.admin_api_keys] == ["alice", "bob"]


@pytest.mark.parametrize(("text", "where", "message"), [
    ("", "keys", "holds no key"), ("# none\n", "keys", "holds no key"), ("one\n\ntwo words\n", "keys:3", "printable"),
    ("me:one\nme:two", "keys:2", "two keys are named me")])
def test_a_bad_file_of_keys(tmp_path: Path, text: str, where: str, message: str) -> None:
    (tmp_path / "keys").write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_keys(tmp_path / "keys")
    assert caught.value.where == str(tmp_path / where) and message in str(caught.value)


def test_a_file_that_is_not_there_keeps_the_door_shut(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        load(tmp_path, API_KEYS_FILE="keys")


def test_keys_of_config_yaml_have_limits(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("sk-three\n")
    got = load(tmp_path, f"""
proxy:
  keys:
    - {{name: alice, key: "sk:one", models: [llama*, bert], requests_per_minute: 60, tokens_per_minute: 1000,
       concurrent_requests: 2}}
    - {{name: boss, sha256: {HEX}, admin: true}}
    - {{name: carol, key_file: ~/secret}}
""", API_KEYS="sk-two")
    assert [key.name for key in got.api_keys] == [parse_keys("sk-two")[0].name, "alice", "carol"]
    [alice] = [key for key in got.api_keys if key.name == "alice"]
    assert alice == replace(parse_keys("alice:sk:one")[0], plain="sk:one", models=("llama*", "bert"),
                            requests_per_minute=60, tokens_per_minute=1000, concurrent_requests=2)
    assert got.api_keys[2].digest == parse_keys("sk-three")[0].digest
    assert [(key.name, key.digest.hex()) for key in got.admin_api_keys] == [("boss", HEX)]
    assert "sk-" not in repr(got)


@pytest.mark.parametrize(("entry", "message"), [
    ("{name: a}", "one of key, sha256 and key_file"), ("{name: a, key: x, sha256: y}", "64 hexadecimal"),
    ("{key: x}", "name is missing"), ("{name: a, key: x, limit: 3}", "unknown key"),
    ("{name: a, key: x, models: []}", "list of names"), ("{name: a, key: x, requests_per_minute: 0}", "1 or more"),
    ("{name: a, key_file: none-there}", "no such file"), ("{name: a, key: x}, {name: a, key: y}", "are named a"),
    ("{name: a, key: x}, {name: b, key: x, admin: true}", "given twice")])
def test_mistakes_in_config_yaml(tmp_path: Path, entry: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, f"proxy:\n  keys:\n    [{entry}]\n")
    assert message in str(caught.value)


def test_which_models_a_key_may_use() -> None:
    key = Key("a", b"", models=("llama*", "org/bert"))
    assert key.may_use(["x", "llama2-7b"]) and key.may_use(["org/bert"])
    assert not key.may_use(["bert", "org/bert-large"]) and not key.may_use([])
    assert Key("a", b"").may_use(["anything"])
