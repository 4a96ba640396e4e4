"""config.yaml: what it may say, what of it is refused with file, line and key path, and what differs between two."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft7Validator

from config import Catalog, ModelConfig, Settings, diff, load_settings
from configuration.config_file import SECTIONS, parse_config
from configuration.keys import parse_keys
from configuration.schema import schema
from configuration.settings_table import SETTINGS
from errors import ConfigError

ROOT = Path(__file__).parent.parent
SEED = """\
models:
  llama2-7b-chat:
    model_path: "meta-llama/Llama-2-7b-chat-hf"
    param_count: 7
    precision: "fp16"
    max_model_len: 4096
    # 如果需要 HuggingFace Token
    api_key: "hf_secret"
gpu:
  gpu_id: 0                    # GPU 设备 ID
  reserved_memory_mb: 1024     # 预留显存缓冲
  memory_utilization: 0.9      # vLLM 显存利用率
proxy:
  host: "127.0.0.1"           # 监听地址
  port: 8080                   # 服务端口
  idle_timeout_seconds: 300    # 空闲超时（秒）
  api_key: "your-secret-key"
"""


def models(text: str) -> Mapping[str, ModelConfig]:
    return parse_config(text, "config.yaml", Path("/home/me")).catalog.models


def model(entry: str) -> ModelConfig:
    """The one model of `org/name: {entry}`."""
    return models(f"models: {{org/name: {{{entry}}}}}")["org/name"]


def refused(text: str) -> list[str]:
    """Every problem told, as `line: message`."""
    with pytest.raises(ConfigError) as caught:
        models(text)
    lines = str(caught.value).split("\n")
    assert all(re.match(r"config\.yaml(:\d+)?: |and \d+ more", line) for line in lines), lines
    return [line.removeprefix("config.yaml:").strip() for line in lines]


def load(tmp_path: Path, text: str | None = None, *, env: str | None = None, environ: dict[str, str] | None = None,
         **kwargs: Any) -> Settings:
    if text is not None:
        (tmp_path / "config.yaml").write_text(text)
    if env is not None:
        (tmp_path / ".env").write_text(env)
    return load_settings({"HOME": "/home/me", **(environ or {})}, cwd=tmp_path, **kwargs)


# --- the file as a layer of the settings ----------------------------------------------------------------------------

def test_the_file_that_the_dynamic_proxy_printed(tmp_path: Path) -> None:
    got = load(tmp_path, SEED)
    assert (got.host, got.port, got.default_timeout_s) == ("127.0.0.1", 8080, 300)
    assert (got.gpu_ids, got.reserved_memory_bytes, got.memory_utilization) == ((0,), 1024 << 20, 0.9)
    assert [key.plain for key in got.api_keys] == ["your-secret-key"]
    assert got.config_file == tmp_path / "config.yaml"
    [one] = got.catalog.models.values()
    assert (one.id, one.model, one.param_count, one.precision) == (
        "llama2-7b-chat", "meta-llama/Llama-2-7b-chat-hf", 7.0, "fp16")
    assert one.params == {"max_model_len": 4096, "dtype": "float16"}
    assert one.hf_token == "hf_secret"


def test_without_a_file_there_are_no_models(tmp_path: Path) -> None:
    got = load(tmp_path)
    assert (got.catalog, got.config_file) == (Catalog(), None)
    assert (got.auto_load, got.gpu_ids, got.memory_utilization) == ("configured", None, None)
    assert (got.reserved_memory_bytes, got.sleep_host_memory_bytes, got.host_memory_budget_bytes) == (
        2048 << 20, None, None)
    assert (got.max_hold_s, got.max_queue, got.loading_comments) == (30, 1000, True)


def test_env_file_over_config_file_and_the_older_names(tmp_path: Path) -> None:
    got = load(tmp_path, SEED, env="PROXY_PORT=9090\nIDLE_TIMEOUT=60\nGPU_ID=1,2\nRESERVED_MEMORY_MB=512\n")
    assert (got.port, got.default_timeout_s, got.gpu_ids, got.reserved_memory_bytes) == (9090, 60, (1, 2), 512 << 20)
    assert load(tmp_path, SEED, environ={"APP_PORT": "1"}, overrides={"APP_HOST": "h"}).port == 1


def test_every_key_of_the_sections_is_a_setting() -> None:
    sections = schema()["properties"]
    keys = {(name, key) for name in ("gpu", "proxy") for key in sections[name]["properties"]}
    assert keys == SECTIONS.keys() | {("proxy", "keys")}      # which hold more than a setting can
    assert set(SECTIONS.values()) <= {setting.name for setting in SETTINGS}


def test_where_the_file_is_found(tmp_path: Path) -> None:
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/config.yaml").write_text("proxy: {port: 1}")
    assert load(tmp_path).port == 1
    got = load(tmp_path, "proxy: {port: 2}")
    assert got.port == 2
    assert any("configs/config.yaml is ignored beside config.yaml" in warning for warning in got.warnings)
    (tmp_path / "mine.yaml").write_text("proxy: {port: 3}")
    got = load(tmp_path, config_file=Path("mine.yaml"))
    assert (got.port, got.config_file) == (3, tmp_path / "mine.yaml")
    assert not any("ignored beside" in warning for warning in got.warnings)
    with pytest.raises(ConfigError, match="no such file"):
        load(tmp_path, config_file=Path("nowhere.yaml"))


def test_a_setting_of_the_file_is_refused_with_its_line(tmp_path: Path) -> None:
    """Also where the schema lets it pass."""
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, "proxy:\n  port: 5000\n", environ={"VLLM_DEFAULT_TIMEOUT": "x"})
    assert caught.value.where == "VLLM_DEFAULT_TIMEOUT"


def test_devices_that_the_daemon_may_not_use(tmp_path: Path) -> None:
    text = "models:\n  o/m:\n    gpus: [0, 3]\ngpu: {gpu_id: [0, 1]}\n"
    with pytest.raises(ConfigError, match=r"config.yaml:3: models.o/m.gpus: device 3 is not among GPU_ID 0, 1"):
        load(tmp_path, text)
    assert load(tmp_path, text, environ={"GPU_ID": "0,3"}).catalog.models["o/m"].gpus == (0, 3)


@pytest.mark.parametrize(("name", "text"), [
    ("AUTO_LOAD", "yes"), ("GPU_ID", "-1"), ("GPU_ID", "0,0"), ("GPU_ID", "0,"), ("GPU_ID", "a"),
    ("MEMORY_UTILIZATION", "0"), ("MEMORY_UTILIZATION", "1.1"), ("MEMORY_UTILIZATION", "nan"),
    ("RESERVED_MEMORY_MB", "-1"), ("RESERVED_MEMORY_MB", "1.5"), ("HOST_MEMORY_BUDGET_MB", "0"),
    ("SLEEP_HOST_MEMORY_MB", "-1"), ("MAX_HOLD_SECONDS", "-1"), ("MAX_QUEUE", "0"), ("LOADING_COMMENTS", "x")])
def test_bad_settings_of_the_environment(tmp_path: Path, name: str, text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, environ={name: text})
    assert caught.value.where == name


def test_several_keys(tmp_path: Path) -> None:
    assert load(tmp_path, "proxy: {api_key: [one, two]}").api_keys == parse_keys("one,two")


def test_no_password_is_shown(tmp_path: Path) -> None:
    assert "secret" not in repr(load(tmp_path, SEED))
    assert "secret" not in repr(parse_config(SEED, "f", Path("/")))
    for text in ("proxy: {api_key: 'sec ret'}", "models: {o/m: {api_key: 'sec ret'}}", "proxy: {api_key: {sec: ret}}",
                 "models: {o/m: {env: {HF_TOKEN: [sec]}}}"):
        assert "sec" not in " ".join(refused(text)), text


# --- one model ------------------------------------------------------------------------------------------------------

def test_the_defaults_of_a_model() -> None:
    assert models("models:\n  org/name:\n") == {"org/name": ModelConfig("org/name", "org/name")}
    one = model("")
    assert (one.aliases, one.params, one.env, one.gpus, one.memory_bytes) == ((), {}, {}, None, None)
    assert (one.idle_timeout_s, one.stop_after_s, one.start_timeout_s) == (None, None, None)
    assert (one.preload, one.pinned, one.priority, one.sleep, one.replicas) == (False, False, 0, 0, (1, 1))


def test_every_key_of_a_model() -> None:
    one = model("model_path: ./m, aliases: [a, b], params: {max-num-seqs: 4, seed: null}, env: {A: 010, B: true, C: x},"
                " memory_mb: 1.5, idle_timeout_seconds: 0, sleep: 2, stop_after_seconds: 7.5, "
                "start_timeout_seconds: 60, preload: true, pinned: true, priority: -3, replicas: {min: 2, max: 4}")
    assert (one.model, one.aliases, one.served_names) == ("./m", ("a", "b"), ("org/name", "a", "b"))
    assert one.params == {"max_num_seqs": 4, "seed": None}
    assert one.env == {"A": "010", "B": "true", "C": "x"}       # as written
    assert (one.memory_bytes, one.idle_timeout_s, one.sleep, one.stop_after_s) == (1572864, 0, 2, 7.5)
    assert (one.start_timeout_s, one.preload, one.pinned, one.priority, one.replicas) == (60, True, True, -3, (2, 4))


@pytest.mark.parametrize(("entry", "params"), [
    ("gpus: 2", {"tensor_parallel_size": 2}), ("gpus: [3, 1]", {"tensor_parallel_size": 2}),
    ("gpus: 1", {"tensor_parallel_size": 1}), ("gpus: 4, params: {tp: 2, pp: 2}", {
        "tensor_parallel_size": 2, "pipeline_parallel_size": 2}),
    ("precision: bf16", {"dtype": "bfloat16"}), ("precision: half", {"dtype": "half"}), ("precision: int4", {}),
    ("precision: fp32, params: {dtype: float32}", {"dtype": "float32"}), ("precision: awq, params: {dtype: half}", {
        "dtype": "half"}),
    ("max_model_len: 2048.0", {"max_model_len": 2048}), ("max_model_len: 32k", {"max_model_len": "32k"}),
    ("max_model_len: auto", {"max_model_len": "auto"})])
def test_keys_that_stand_for_flags(entry: str, params: dict[str, Any]) -> None:
    assert model(entry).params == params


@pytest.mark.parametrize(("text", "sleep"), [("off", 0), ("0", 0), ("1", 1), ("2", 2)])
def test_sleep(text: str, sleep: int) -> None:
    assert model(f"sleep: {text}").sleep == sleep


@pytest.mark.parametrize(("text", "replicas"), [("3", (3, 3)), ("{max: 2}", (1, 2)), ("{min: 2, max: 2}", (2, 2))])
def test_replicas(text: str, replicas: tuple[int, int]) -> None:
    assert model(f"replicas: {text}").replicas == replicas


def test_a_home_and_a_name_that_is_no_text() -> None:
    assert model("model_path: ~/m").model == "/home/me/m"
    assert models("models: {7: {model_path: m}}")["7"].model == "m"


def test_the_catalog_knows_ids_and_aliases() -> None:
    catalog = parse_config("models: {o/a: {aliases: [x, y]}, o/b: }", "f", Path("/")).catalog
    assert catalog.names() == ["o/a", "o/b", "x", "y"]
    assert [found.id if (found := catalog.find(name)) else None for name in ("o/a", "y", "o/b", "z")] == [
        "o/a", "o/a", "o/b", None]


def test_anchors_and_merges() -> None:
    got = models("x-small: &small {params: {seed: 1}, priority: 1}\nx-big: &big {priority: 2, pinned: true}\n"
                 "models:\n  o/a: {<<: *small, priority: 5}\n  o/b: {<<: [*small, *big]}\n  o/c: *small\n")
    assert [(one.params, one.priority, one.pinned) for one in got.values()] == [
        ({"seed": 1}, 5, False), ({"seed": 1}, 1, True), ({"seed": 1}, 1, False)]


# --- what is refused ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("text", "problem"), [
    ("models:\n  o/m:\n    gpuz: 1", "3: models.o/m.gpuz: unknown key; did you mean gpus?"),
    ("models:\n  o/m:\n    modelpath: x", "3: models.o/m.modelpath: unknown key; did you mean model_path?"),
    ("models:\n  o/m:\n    enforce_eager: true",
     "3: models.o/m.enforce_eager: unknown key; flags of vLLM stand under params"),
    ("modles: {}", "1: modles: unknown key; did you mean models?"),
    ("gpu:\n  gpu_ids: 0", "2: gpu.gpu_ids: unknown key; did you mean gpu_id?"),
    ("\nport: 5000", "2: port: unknown key; it belongs to the section proxy"),
    ("model_path: x", "1: model_path: unknown key; did you mean models?"),
    ("pinned: true", "1: pinned: unknown key; it belongs to a model, under models"),
    ("models:\n  m:\n    gpus: 1", "2: models.m: model_path is missing"),
    ("models:\n  m:", "2: models.m: expected the keys of a model, model_path among them, and it is empty"),
    ("models: [a]", "1: models: expected the models, each under its name, not [\"a\"]"),
    ("models: {o/m: 5}", "1: models.o/m: expected the keys of a model, such as model_path, not 5"),
    ("proxy:\n  port: 65536", "2: proxy.port: expected a port, a whole number from 0 to 65535, not 65536"),
    ("proxy: {port: '80'}", "1: proxy.port: expected a port, a whole number from 0 to 65535, not \"80\""),
    ("proxy: {idle_timeout_seconds: -1}", "1: proxy.idle_timeout_seconds: expected seconds, 0 (never) or more, not -1"),
    ("gpu: {memory_utilization: 1.2}",
     "1: gpu.memory_utilization: expected a share, more than 0 and at most 1, not 1.2"),
    ("models: {o/m: {aliases: [a, 5]}}", "1: models.o/m.aliases[1]: expected a name: text (in quotes where it looks "
     "like a number) that does not begin with '-', nor begin or end with a space, not 5"),
    ("models: {o/m: {env: {a b: c}}}", "1: models.o/m.env.a b: is not the name of a variable"),
    ("models: {o/m: {env: {API_KEYS: c}}}",
     "1: models.o/m.env.API_KEYS: is a setting of the daemon and means nothing to an engine"),
    ("models: {o/m: {env: {CUDA_VISIBLE_DEVICES: 1}}}",
     "1: models.o/m.env.CUDA_VISIBLE_DEVICES: is set by the daemon: `gpus` says which"),
    ("models: {o/m: {params: {served_model_name: x}}}",
     "1: models.o/m.params.served_model_name: cannot be set here: the names are its key and its aliases"),
    ("models:\n  o/m:\n    params:\n      port: 1", "4: models.o/m.params.port: cannot be set here: the daemon gives "
     "out the ports itself, from VLLM_BASE_PORT upward"),
    ("models:\n  o/m:\n    params:\n      tp: 1\n      tensor-parallel-size: 2",
     "5: models.o/m.params.tensor-parallel-size: tensor_parallel_size is given twice, under two spellings"),
    ("models: {o/m: {gpus: 2, params: {tp: 4}}}",
     "1: models.o/m.gpus: says 2, and tensor_parallel_size in params 4: leave one out"),
    ("models: {o/m: {max_model_len: 5, params: {max_model_len: 6}}}",
     "1: models.o/m.max_model_len: says 5, and params.max_model_len says 6: leave one out"),
    ("models: {o/m: {precision: fp16, params: {dtype: bfloat16}}}",
     "1: models.o/m.precision: says float16, and params.dtype says bfloat16: leave one out"),
    ("models: {o/m: {stop_after_seconds: 5}}",
     "1: models.o/m.stop_after_seconds: it never sleeps: say sleep: 1 (or 2), or idle_timeout_seconds"),
    ("models: {o/m: {replicas: {min: 3, max: 2}}}", "1: models.o/m.replicas: min 3 is more than max 2"),
    ("models:\n  o/a: {aliases: [x]}\n  o/b:\n    aliases: [y, x]",
     "4: models.o/b.aliases[1]: x is a name of o/a already"),
    ("models:\n  o/a: {aliases: [o/b]}\n  o/b:", "2: models.o/a.aliases[0]: o/b is a name of o/b already"),
    ("models: {o/a: {aliases: [o/a]}}", "1: models.o/a.aliases[0]: o/a is its own name already"),
    ("models:\n  o/a:\n  o/a:", "3: o/a is given twice; first in line 2"),
    ("", "is empty; `models: {}` says that there are none"),
    ("# nothing\n", "is empty; `models: {}` says that there are none"),
    ("[1]", "1: expected the sections models, gpu and proxy, not [1]"),
    ("models:\n\to/m:", "2: a tab indents this line; YAML takes spaces only"),
    ("models:\n  o/m: {", "2: column 9: while parsing a flow node expected the node content, but found '<stream end>'"),
    ("---\nmodels:\n---\nmodels:", "3: column 1: expected a single document in the stream but found another document"),
    ("models: !!python/object:x {}", "1: the tag python/object:x is not known here"),
    ("models: {o/m: {priority: !!int x}}", "1: x is not a number"),
    ("proxy: {port: 1e999}", "1: 1e999 is too large"),
    ("models: {? [a] : 1}", "1: a key must be a word"),
    ("models: {<<: [1]}", "1: << merges mappings only, such as `<<: *defaults`"),
    ("models: \0", "1: holds the control character U+0000"),
    ("models: {o/m: *nowhere}", "1: column 15: found undefined alias 'nowhere'")])
def test_a_mistake_is_told_with_its_line_and_path(text: str, problem: str) -> None:
    assert refused(text) == [problem]


@pytest.mark.parametrize("entry", [
    "gpus: 0", "gpus: -1", "gpus: []", "gpus: [0, 0]", "gpus: [-1]", "gpus: {count: 2, ids: [0, 1]}", "gpus: 1.5",
    "memory_mb: 0", "memory_mb: -5", "memory_mb: all", "param_count: 0", "param_count: -7", "param_count: 7B",
    "max_model_len: 0", "max_model_len: -1", "max_model_len: long", "precision: fp61", "precision: 16",
    "idle_timeout_seconds: -1", "idle_timeout_seconds: .inf", "start_timeout_seconds: 0", "stop_after_seconds: -1",
    "sleep: 3", "sleep: true", "sleep: on", "replicas: 0", "replicas: {}", "replicas: {min: 0, max: 1}",
    "replicas: {max: 2, mix: 1}", "preload: yes", "pinned: 1", "priority: 0.5", "model_path: ''", "model_path: -x",
    "model_path: ' x'", "model_path: [x]", "aliases: x", "aliases: [x, x]", "aliases: [-x]", "aliases: ['a ']",
    "aliases: [\"a\\nb\"]", "params: [a]", "env: [a]", "env: {A: null}", "env: {A: [b]}", "env: {A: \"a\\0b\"}",
    "api_key: 5", "api_key: ''", "gpus:"])
def test_bad_values_of_a_model(entry: str) -> None:
    key = entry.partition(":")[0]
    [problem] = refused(f"models:\n  org/name:\n    {entry}\n")
    assert problem.startswith(f"3: models.org/name.{key}")
    with pytest.raises(ConfigError):
        model(entry)


@pytest.mark.parametrize("name", ["-x", "' x'", "'x '", "'a\\u0007'".replace("'", '"'), "x" * 513, "''"])
def test_bad_names(name: str) -> None:
    [problem] = refused(f"models:\n  {name}: {{model_path: m}}\n")
    assert problem.startswith("2: models.")


def test_all_mistakes_are_told_in_their_order() -> None:
    told = refused("models:\n" + "".join(f"  o/m{number}: {{gpuz: 1}}\n" for number in range(9)) + "prot: 1\n")
    assert [line.partition(":")[0] for line in told[:-1]] == ["2", "3", "4", "5", "6", "7"]
    assert told[-1] == "and 4 more"


ALIASES = "".join(f"x-{number}: &a{number} [{', '.join([f'*a{number - 1}'] * 10)}]\n" for number in range(1, 10))
MERGES = "".join(f"x-{number}: &a{number} {{<<: [{', '.join([f'*a{number - 1}'] * 10)}]}}\n" for number in range(1, 10))


@pytest.mark.parametrize(("text", "says"), [
    (f"x-0: &a0 [1]\n{ALIASES}", "aliases make more than"), (f"x-0: &a0 {{}}\n{MERGES}", "aliases make more than"),
    ("models: &a [*a]", "refers to itself"), ("models: &a {o/m: *a}", "refers to itself"),
    ("models: {o/m: &a {<<: *a}}", "merges itself"), ("[" * 100_000, "nested deeper"),
    ("\n".join(" " * depth + "a:" for depth in range(60)), "nested deeper"),
    ("#" * (1 << 20) + "#", "more than 1048576")])
def test_what_would_never_end(text: str, says: str) -> None:
    [problem] = refused(text)
    assert says in problem


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_bytes(b"models: \xff")
    with pytest.raises(ConfigError, match="config.yaml: is not UTF-8 text"):
        load(tmp_path)


values: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3), max_leaves=8)
keys = st.sampled_from(sorted(schema()["definitions"]["model"]["properties"]))


@given(st.dictionaries(st.text(max_size=6), st.dictionaries(keys, values, max_size=5), max_size=3))
def test_whatever_stands_in_a_model_is_taken_or_refused(entries: dict[str, dict[str, Any]]) -> None:
    try:
        got = models(yaml.safe_dump({"models": entries}, allow_unicode=True))
    except ConfigError as error:
        assert error.where.startswith("config.yaml")
    else:
        assert got.keys() == entries.keys()


@given(st.text(alphabet=":-[]{}&*<!|>'\"#\n\t abmodels/0", max_size=60))
def test_whatever_is_typed_is_taken_or_refused(text: str) -> None:
    try:
        models(text)
    except ConfigError as error:
        assert error.where.startswith("config.yaml")


# --- the schema, for editors ----------------------------------------------------------------------------------------

def test_the_schema_is_one_and_tells_what_it_expects() -> None:
    Draft7Validator.check_schema(schema())
    for rules in constrained(schema()):
        assert isinstance(rules.get("errorMessage"), str), rules


def constrained(rules: Any, told: bool = False) -> Iterator[dict[str, Any]]:
    """Every part that can refuse a value; a part of an alternative is told by what holds it."""
    if isinstance(rules, list):
        for one in rules:
            yield from constrained(one, told)
    elif isinstance(rules, dict):
        if not told and rules.keys() & {"type", "enum", "oneOf", "pattern"}:
            yield rules
        for key, inner in rules.items():
            if key in ("properties", "definitions", "patternProperties"):
                yield from constrained(list(inner.values()), told)
            elif key in ("items", "additionalProperties", "propertyNames", "allOf", "oneOf"):
                yield from constrained(inner, told or key == "oneOf")


def test_every_key_says_what_it_is_for() -> None:
    properties = schema()["properties"]
    for entries in (properties, *(properties[name].get("properties", {}) for name in properties),
                    schema()["definitions"]["model"]["properties"]):
        assert all(rules["description"] for rules in entries.values())


def test_the_example_is_right_and_names_the_schema() -> None:
    text = (ROOT / "config.example.yaml").read_text()
    found = re.match(r"# yaml-language-server: \$schema=(\S+)\n", text)
    assert found and json.loads((ROOT / found[1]).read_text()) == schema()
    got = models(text)
    assert len(got) == 3
    uncommented = re.sub(r"(?m)^( *)# (?=[a-z_]+: )", r"\1", text.split("\nmodels:")[1])
    shown = set(re.findall(r"(?m)^ {4}(\w+):", uncommented))
    assert shown == schema()["definitions"]["model"]["properties"].keys()
    models("models:" + uncommented)


# --- what differs ---------------------------------------------------------------------------------------------------

def catalog(text: str) -> Catalog:
    return parse_config(f"models: {{{text}}}", "f", Path("/")).catalog


def test_the_difference_of_two_catalogs() -> None:
    old = catalog("o/a: , o/b: {priority: 1}, o/c: {params: {seed: 1}}, o/d: {aliases: [x]}, o/e: {env: {A: 1}}")
    new = catalog("o/f: , o/e: {env: {A: 1}}, o/d: {aliases: [y]}, o/c: {params: {seed: 2}}, o/b: {priority: 2}")
    found = diff(old, new)
    assert (found.added, found.removed, found.changed) == (("o/f",), ("o/a",), ("o/b", "o/c", "o/d"))
    assert found.restart == ("o/c", "o/d")


@pytest.mark.parametrize(("entry", "restart"), [
    ("idle_timeout_seconds: 5", False), ("sleep: 1", True), ("gpus: 2", True), ("memory_mb: 5", True),
    ("api_key: x", True), ("start_timeout_seconds: 5", False), ("preload: true", False), ("pinned: true", False),
    ("replicas: 2", False), ("model_path: x", True), ("precision: fp16", True)])
def test_what_needs_a_new_engine(entry: str, restart: bool) -> None:
    found = diff(catalog("o/a: "), catalog(f"o/a: {{{entry}}}"))
    assert found.changed == ("o/a",)
    assert found.restart == (("o/a",) if restart else ())
    same = catalog(f"o/a: {{{entry}}}")
    assert diff(same, catalog(f"o/a: {{{entry}}}")).changed == ()
