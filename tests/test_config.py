"""Settings and flags: every layer, every bound, every refusal with its place, and .env.example against the table."""

from __future__ import annotations

import random
import re
from dataclasses import FrozenInstanceError, fields
from pathlib import Path
from typing import Any

import pytest

from config import (
    RESERVED_FLAGS,
    SETTINGS,
    Settings,
    check_params,
    child_environment,
    load_settings,
    merge_flags,
    to_argv,
)
from configuration.keys import parse_keys
from errors import BadRequest, ConfigError

ROOT = Path(__file__).parent.parent


def load(tmp_path: Path, *, env: str | None = None, flags: str | None = None, environ: dict[str, str] | None = None,
         **kwargs: Any) -> Settings:
    if env is not None:
        (tmp_path / ".env").write_text(env)
    if flags is not None:
        (tmp_path / "vllm_config.json").write_text(flags)
    return load_settings({"HOME": "/home/me", **(environ or {})}, cwd=tmp_path, **kwargs)


def refused(tmp_path: Path, **kwargs: Any) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, **kwargs)
    return caught.value


# --- defaults and layers --------------------------------------------------------------------------------------------

def test_the_printed_defaults(tmp_path: Path) -> None:
    got = load(tmp_path)
    assert (got.host, got.port, got.debug, got.threads) == ("0.0.0.0", 5000, False, 512)
    assert (got.keepalive_s, got.max_connections, got.log_level, got.access_log) == (75, 12000, "INFO", False)
    assert (got.max_request_bytes, got.instance_log_bytes) == (104857600, 10 * 1024 * 1024)
    assert (got.request_queue_timeout_s, got.request_timeout_s) == (None, 3600)
    assert (got.base_port, got.max_instances, got.default_timeout_s, got.command) == (9000, 20, 600, ("vllm",))
    assert (got.start_timeout_s, got.drain_timeout_s, got.stop_timeout_s, got.shutdown_grace_s) == (600, 30, 10, 30)
    assert (got.keep_instances, got.probe_interval_s, got.probe_timeout_s) == (False, 30, 60)
    assert got.state_dir == Path("/home/me/.local/state/vllm-server")
    assert (got.api_keys, got.admin_api_keys) == ((), ())
    assert got.flags_default == {"dtype": "auto", "kv_cache_dtype": "auto", "trust_remote_code": True}
    assert (got.flags_config, got.flags_env, got.engine_env) == ({}, {}, {})


def test_every_field_of_settings_has_its_row_in_the_table() -> None:
    derived = {"flags_default", "flags_config", "flags_env", "engine_env", "catalog", "config_file", "servers",
               "warnings"}
    assert {field.name for field in fields(Settings)} - derived == {s.field for s in SETTINGS if s.field}
    names = [name for s in SETTINGS for name in (s.name, *s.older)]
    assert len(names) == len(set(names))


def test_command_line_over_environment_over_file_over_default(tmp_path: Path) -> None:
    env = "APP_PORT=1001\nAPP_THREADS=11\nAPP_HOST=a\n"
    environ = {"APP_PORT": "1002", "APP_THREADS": "12"}
    got = load(tmp_path, env=env, environ=environ, overrides={"APP_PORT": "1003"})
    assert (got.port, got.threads, got.host, got.base_port) == (1003, 12, "a", 9000)


@pytest.mark.parametrize("text", ["", "null", "None", "  "])
def test_empty_and_null_mean_not_given(tmp_path: Path, text: str) -> None:
    got = load(tmp_path, env="APP_PORT=1001\nVLLM_CONFIG=null\n", environ={"APP_PORT": text, "APP_THREADS": text})
    assert (got.port, got.threads) == (1001, 512)


def test_older_names_and_the_newer_beside_them(tmp_path: Path) -> None:
    got = load(tmp_path, env="PROXY_PORT=8080\nIDLE_TIMEOUT=300\n")
    assert (got.port, got.default_timeout_s) == (8080, 300)
    got = load(tmp_path, env="APP_PORT=7000\nPROXY_PORT=8080\n")
    assert got.port == 7000
    assert any("PROXY_PORT" in warning and "APP_PORT" in warning for warning in got.warnings)
    # a stronger layer wins by whichever name it speaks
    assert load(tmp_path, env="APP_PORT=7000\n", environ={"PROXY_PORT": "8080"}).port == 8080


@pytest.mark.parametrize(("text", "size"), [
    ("104857600", 104857600), ("100MiB", 100 << 20), ("100M", 100 << 20), ("100MB", 100_000_000), ("1GiB", 1 << 30),
    ("5 kb", 5000), ("7k", 7 << 10), ("9B", 9)])
def test_sizes(tmp_path: Path, text: str, size: int) -> None:
    assert load(tmp_path, environ={"MAX_REQUEST_BYTES": text}).max_request_bytes == size


@pytest.mark.parametrize(("text", "value"), [("true", True), ("1", True), ("YES", True), ("On", True),
                                             ("false", False), ("0", False), ("no", False), ("OFF", False)])
def test_booleans(tmp_path: Path, text: str, value: bool) -> None:
    assert load(tmp_path, environ={"KEEP_INSTANCES": text}).keep_instances is value


def test_debug_is_a_log_level(tmp_path: Path) -> None:
    assert load(tmp_path, environ={"APP_DEBUG": "true", "LOG_LEVEL": "error"}).log_level == "DEBUG"
    assert load(tmp_path, environ={"LOG_LEVEL": "error"}).log_level == "ERROR"


def test_the_command_is_split_as_a_shell_would(tmp_path: Path) -> None:
    assert load(tmp_path, environ={"VLLM_COMMAND": "python -u 'my simulator.py'"}).command == (
        "python", "-u", "my simulator.py")


def test_zero_means_never_where_it_is_allowed(tmp_path: Path) -> None:
    got = load(tmp_path, environ={"VLLM_DEFAULT_TIMEOUT": "0", "PROBE_INTERVAL": "0", "REQUEST_QUEUE_TIMEOUT": "0",
                                  "APP_PORT": "0", "DRAIN_TIMEOUT": "1.5"})
    assert (got.default_timeout_s, got.probe_interval_s, got.request_queue_timeout_s, got.port) == (0, 0, 0, 0)
    assert got.drain_timeout_s == 1.5


@pytest.mark.parametrize(("environ", "expected"), [
    ({}, "/home/me/.local/state/vllm-server"), ({"XDG_STATE_HOME": "/x"}, "/x/vllm-server"),
    ({"XDG_STATE_HOME": "relative"}, "/home/me/.local/state/vllm-server"),
    ({"STATE_DIR": "~/s", "XDG_STATE_HOME": "/x"}, "/home/me/s"), ({"STATE_DIR": "/abs"}, "/abs")])
def test_state_dir(tmp_path: Path, environ: dict[str, str], expected: str) -> None:
    assert load(tmp_path, environ=environ).state_dir == Path(expected)


def test_a_relative_state_dir_is_below_the_working_directory(tmp_path: Path) -> None:
    assert load(tmp_path, environ={"STATE_DIR": "s"}).state_dir == tmp_path / "s"
    assert load(tmp_path, env="XDG_STATE_HOME=/from-env-file\n").state_dir == Path("/from-env-file/vllm-server")


def test_settings_are_frozen_and_keep_secrets_out_of_repr(tmp_path: Path) -> None:
    got = load(tmp_path, env="API_KEYS=sk-one, sk-two,\nADMIN_API_KEYS=sk-admin\nHF_TOKEN=hf_secret\n")
    assert got.api_keys == parse_keys("sk-one,sk-two")
    assert got.admin_api_keys == parse_keys("sk-admin")
    assert got.engine_env == {"HF_TOKEN": "hf_secret"}
    assert "sk-" not in repr(got)
    assert "hf_secret" not in repr(got)
    with pytest.raises(FrozenInstanceError):
        got.port = 1    # type: ignore[misc]
    with pytest.raises(TypeError):
        got.flags_default["dtype"] = "half"    # type: ignore[index]


# --- what is refused ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("name", "text"), [
    ("APP_PORT", "65536"), ("APP_PORT", "-1"), ("APP_PORT", "5k"), ("APP_PORT", "٥"), ("APP_PORT", "5_0"),
    ("VLLM_BASE_PORT", "1023"), ("VLLM_BASE_PORT", "65536"), ("VLLM_MAX_INSTANCES", "0"), ("APP_THREADS", "0"),
    ("APP_MAX_CONNECTIONS", "-5"), ("APP_KEEPALIVE", "1.5"), ("APP_DEBUG", "maybe"), ("LOG_LEVEL", "LOUD"),
    ("MAX_REQUEST_BYTES", "0"), ("MAX_REQUEST_BYTES", "-1"), ("MAX_REQUEST_BYTES", "10 parsecs"),
    ("VLLM_DEFAULT_TIMEOUT", "-1"), ("VLLM_DEFAULT_TIMEOUT", "nan"), ("VLLM_DEFAULT_TIMEOUT", "inf"),
    ("VLLM_DEFAULT_TIMEOUT", "1e400"), ("START_TIMEOUT", "0"), ("REQUEST_TIMEOUT", "0"), ("PROBE_TIMEOUT", "0"),
    ("STOP_TIMEOUT", "1e12"), ("VLLM_COMMAND", "'open"), ("APP_HOST", "a b"), ("PROXY_PORT", "x"),
    ("IDLE_TIMEOUT", "soon"), ("VLLM_DEFAULT_TRUST_REMOTE_CODE", "perhaps"), ("VLLM_CONFIG", "nowhere.json")])
def test_bad_values_name_the_variable_or_the_line(tmp_path: Path, name: str, text: str) -> None:
    error = refused(tmp_path, environ={name: text})
    assert error.where == name
    error = refused(tmp_path, env=f"# a comment\n\n{name}=\"{text}\"\n")
    assert error.where == f"{tmp_path}/.env:3"
    assert f"{name}={text}" in str(error)


def test_a_bad_value_is_refused_even_where_a_stronger_layer_hides_it(tmp_path: Path) -> None:
    assert refused(tmp_path, env="APP_PORT=x\n", environ={"APP_PORT": "1"}).where.endswith(".env:1")


def test_ports_must_fit_below_65536(tmp_path: Path) -> None:
    error = refused(tmp_path, env="#\nVLLM_BASE_PORT=65530\n")
    assert error.where.endswith(".env:2")
    assert load(tmp_path, env="VLLM_BASE_PORT=65530\nVLLM_MAX_INSTANCES=6\n").max_instances == 6
    refused(tmp_path, env="VLLM_BASE_PORT=65530\nVLLM_MAX_INSTANCES=7\n")


@pytest.mark.parametrize("text", [",", "sk-ä", "two words", "sk-secret\\tx"])
def test_bad_keys_are_refused_and_not_shown(tmp_path: Path, text: str) -> None:
    error = refused(tmp_path, env=f'API_KEYS="{text}"\n')
    assert error.where.endswith(".env:1")
    assert text.split("\\")[0] not in str(error).replace("separated by commas", "") or text == ","


@pytest.mark.parametrize(("line", "suggestion"), [
    ("APP_PROT=1", "APP_PORT"), ("app_port=1", "APP_PORT"), ("STATE_DRI=x", "STATE_DIR"), ("API_KEY=k", "API_KEYS"),
    ("VLLM_BASEPORT=9000", "VLLM_BASE_PORT"), ("VLLM_MAX_INSTANCE=2", "VLLM_MAX_INSTANCES"),
    ("VLLM_DEFAULT_TIMOUT=5", "VLLM_DEFAULT_TIMEOUT"), ("VLLM_DEFUALT_TIMEOUT=5", "VLLM_DEFAULT_TIMEOUT"),
    ("VLLM_DEFAULT_TRUST_REMOTE_CODES=0", "VLLM_DEFAULT_TRUST_REMOTE_CODE"), ("HTTPS_PROXI=x", "HTTPS_PROXY"),
    ("VLLM_API_KEY=k", "API_KEYS")])
def test_unknown_keys_get_a_line_and_the_nearest_name(tmp_path: Path, line: str, suggestion: str) -> None:
    error = refused(tmp_path, env=f"\r\n\r\n# one\r\n{line}\r\n")
    assert error.where == f"{tmp_path}/.env:4"
    assert line.partition("=")[0] in str(error)
    assert suggestion in str(error)


def test_a_key_like_nothing_at_all_points_to_the_list(tmp_path: Path) -> None:
    assert ".env.example" in str(refused(tmp_path, env="FROBNICATE=1\n"))


@pytest.mark.parametrize(("env", "line"), [
    ("APP_PORT\n", 1), ("APP_HOST=x\n\nAPP_PORT=\"50\n", 3), ("APP_HOST='x' y\n", 1), ("=5\n", 1),
    ("#\nexport\n", 2)])
def test_syntax_errors_name_the_line_but_not_its_text(tmp_path: Path, env: str, line: int) -> None:
    error = refused(tmp_path, env=env)
    assert error.where == f"{tmp_path}/.env:{line}"


@pytest.mark.parametrize("name", ["HF_HO\0ME", "'HF_A=B'", "CUDA_-X", "'VLLM_A B'", "VLLM_DEFAULT_A\0B"])
def test_what_is_no_name_of_a_variable_is_refused(tmp_path: Path, name: str) -> None:
    """It would be passed on, and then no engine could be started."""
    error = refused(tmp_path, env=f"#\n{name}=x\n")
    assert error.where == f"{tmp_path}/.env:2" and "is not the name of a variable" in str(error)


def test_a_secret_in_a_broken_line_is_not_shown(tmp_path: Path) -> None:
    assert "hf_secret" not in str(refused(tmp_path, env="HF_TOKEN='hf_secret\n"))
    assert "hf_secret" not in str(refused(tmp_path, env="HFTOKEN=hf_secret\n"))


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    assert refused(tmp_path, env_file=tmp_path / "nowhere.env").where == str(tmp_path / "nowhere.env")
    (tmp_path / "latin.env").write_bytes(b"APP_HOST=\xff\n")
    assert "UTF-8" in str(refused(tmp_path, env_file=tmp_path / "latin.env"))
    (tmp_path / "folder").mkdir()
    assert refused(tmp_path, env_file=tmp_path / "folder").where == str(tmp_path / "folder")


def test_an_override_that_is_no_setting(tmp_path: Path) -> None:
    assert refused(tmp_path, overrides={"APP_PROT": "1"}).where == "APP_PROT"


# --- .env -----------------------------------------------------------------------------------------------------------

def test_the_dialect_of_env_files(tmp_path: Path) -> None:
    (tmp_path / "my.env").write_text("\ufeffexport APP_HOST = 'one' # comment\nAPP_PORT=1\nAPP_PORT=2\n"
                                     "HF_HOME=${BASE:-/cache}/hf\nHF_ENDPOINT=http://${APP_HOST}\nTMPDIR=${OUTER}\n")
    got = load(tmp_path, env="APP_PORT=9\n", env_file=Path("my.env"), environ={"OUTER": "/out"})
    assert (got.host, got.port) == ("one", 2)
    assert got.engine_env == {"HF_HOME": "/cache/hf", "HF_ENDPOINT": "http://one", "TMPDIR": "/out"}


def test_what_the_engine_gets_from_the_file(tmp_path: Path) -> None:
    names = ["HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_X", "TRANSFORMERS_OFFLINE", "CUDA_HOME", "NCCL_DEBUG",
             "TORCH_X", "PYTORCH_CUDA_ALLOC_CONF", "TRITON_X", "OMP_NUM_THREADS", "RAY_X", "LD_LIBRARY_PATH", "PATH",
             "TMPDIR", "XDG_CACHE_HOME", "SIMULATOR_START_S", "HTTP_PROXY", "https_proxy", "NO_PROXY",
             "VLLM_USE_V1", "VLLM_CPU_KVCACHE_SPACE", "VLLM_CONFIG_ROOT", "VLLM_PORT", "VLLM_LOGGING_LEVEL"]
    got = load(tmp_path, env="".join(f"{name}=v\n" for name in names) + "HF_HOME=\nHF_ENDPOINT=null\n")
    assert got.engine_env == dict.fromkeys(names, "v")


def test_the_environment_beats_the_file_for_the_engine_too(tmp_path: Path) -> None:
    got = load(tmp_path, env="HF_TOKEN=file\nHTTP_PROXY=http://file\nCUDA_VISIBLE_DEVICES=0\n",
               environ={"HF_TOKEN": "env", "http_proxy": "http://env", "CUDA_VISIBLE_DEVICES": ""})
    assert got.engine_env == {}


def test_the_childs_environment_has_none_of_our_names_or_secrets(tmp_path: Path) -> None:
    environ = {"PATH": "/bin", "HOME": "/home/me", "PROMETHEUS_MULTIPROC_DIR": "/p", "VLLM_USE_V1": "1",
               "VLLM_DEFAULT_MAX_MODEL_LEN": "5", "VLLM_API_KEY": "sk-x", "HF_TOKEN": "env",
               **{name: "1" for s in SETTINGS if not s.for_engine for name in (s.name, *s.older)}}
    got = load(tmp_path, env="HF_TOKEN=file\nHF_HOME=/hf\n")
    assert child_environment(got, environ) == {"PATH": "/bin", "HOME": "/home/me", "VLLM_USE_V1": "1",
                                               "HF_TOKEN": "env", "HF_HOME": "/hf"}
    assert environ["API_KEYS"] == "1"


@pytest.mark.parametrize(("environ", "expected"), [
    ({"HTTP_PROXY": "p"}, "127.0.0.1,localhost"),
    ({"https_proxy": "p", "NO_PROXY": "a, localhost"}, "a,localhost,127.0.0.1"),
    ({"ALL_PROXY": "p", "no_proxy": "b", "NO_PROXY": "a"}, "b,a,127.0.0.1,localhost"),
    ({"HTTP_PROXY": "p", "no_proxy": "*"}, "*"), ({"HTTP_PROXY": ""}, None), ({}, None)])
def test_a_proxy_never_stands_before_loopback(tmp_path: Path, environ: dict[str, str], expected: str | None) -> None:
    child = child_environment(load(tmp_path), environ)
    assert (child.get("NO_PROXY"), child.get("no_proxy")) == (expected, expected)


def test_a_proxy_of_the_file_counts(tmp_path: Path) -> None:
    assert child_environment(load(tmp_path, env="HTTPS_PROXY=http://p\n"), {})["no_proxy"] == "127.0.0.1,localhost"


def test_the_engines_own_key_is_warned_about(tmp_path: Path) -> None:
    got = load(tmp_path, environ={"VLLM_API_KEY": "sk-x"})
    assert any("VLLM_API_KEY" in warning and "sk-x" not in warning for warning in got.warnings)


# --- default flags --------------------------------------------------------------------------------------------------

def test_flags_of_the_environment(tmp_path: Path) -> None:
    got = load(tmp_path, env="VLLM_DEFAULT_MAX_MODEL_LEN=1\nVLLM_DEFAULT_ENFORCE_EAGER=TRUE\n", environ={
        "VLLM_DEFAULT_MAX_MODEL_LEN": "2048", "VLLM_DEFAULT_DTYPE": "half", "VLLM_DEFAULT_TP": "2",
        "VLLM_DEFAULT_HF_OVERRIDES": '{"a": [1]}', "VLLM_DEFAULT_TRUST_REMOTE_CODE": "no",
        "VLLM_DEFAULT_SEED": "null", "VLLM_DEFAULT_TIMEOUT": "5"}, overrides={"VLLM_DEFAULT_DTYPE": "float32"})
    assert got.flags_env == {"max_model_len": "2048", "enforce_eager": True, "dtype": "float32",
                             "tensor_parallel_size": "2", "hf_overrides": {"a": [1]}, "trust_remote_code": False}
    assert got.default_timeout_s == 5


@pytest.mark.parametrize(("name", "text"), [
    ("VLLM_DEFAULT_PORT", "1"), ("VLLM_DEFAULT_HOST", "0.0.0.0"), ("VLLM_DEFAULT_SERVED_MODEL_NAME", "a"),
    ("VLLM_DEFAULT_HF_OVERRIDES", "{oops"), ("VLLM_DEFAULT_HF_OVERRIDES", '{"a": NaN}'),
    ("VLLM_DEFAULT_TIMOUT", "5"), ("VLLM_DEFAULT_", "x")])
def test_bad_flags_of_the_environment(tmp_path: Path, name: str, text: str) -> None:
    assert refused(tmp_path, environ={name: text}).where == name
    assert refused(tmp_path, env=f"#\n{name}='{text}'\n").where.endswith(".env:2")


def test_one_flag_under_two_spellings_in_one_layer(tmp_path: Path) -> None:
    assert "twice" in str(refused(tmp_path, env="VLLM_DEFAULT_TP=1\nVLLM_DEFAULT_TENSOR_PARALLEL_SIZE=2\n"))


def test_trust_remote_code_is_warned_about_unless_someone_chose_it(tmp_path: Path) -> None:
    assert any("VLLM_DEFAULT_TRUST_REMOTE_CODE=false" in warning for warning in load(tmp_path).warnings)
    assert load(tmp_path, environ={"VLLM_DEFAULT_TRUST_REMOTE_CODE": "true"}).warnings == ()
    assert load(tmp_path, flags='{"trust-remote-code": false}').warnings == ()


def test_vllm_config_json(tmp_path: Path) -> None:
    flags = '{"max-model-len": 2048, "gpu_memory_utilization": 0.5, "no_enable_prefix_caching": true, "seed": null}'
    assert load(tmp_path, flags=flags).flags_config == {
        "max_model_len": 2048, "gpu_memory_utilization": 0.5, "enable_prefix_caching": False, "seed": None}
    (tmp_path / "other.json").write_text('{"tp": 2}')
    for named in ("other.json", str(tmp_path / "other.json")):
        assert load(tmp_path, environ={"VLLM_CONFIG": named}).flags_config == {"tensor_parallel_size": 2}


@pytest.mark.parametrize(("text", "line", "says"), [
    ('{\n  "max_model_len": 5,\n  "port": 1\n}', 3, "port"),
    ('{\n  "served-model-name": "x"}', 2, "served-model-name"),
    ('{\n\n  "seed": 1,\n  "seed": 2}', 4, "twice"),
    ('{"tp": 1,\n "tensor-parallel-size": 2}', 2, "twice"),
    ('{"a": {"b": 1,\n "b": 2}}', 2, "twice"),
    ('{\n "a": 1,\n "b": NaN}', 3, "NaN"),
    ('{\n "a": -Infinity}', 2, "Infinity"),
    ('{\n "seed": 1e999}', 2, "finite"),
    ('{\n "a": 1,\n}', 3, "column"),
    ('[1]', 1, "object"), ('', 1, "column"),
    ('{\n "Bad Name": 1}', 2, "name of a flag"),
    ('{\n "seed": []}', 2, "empty list"),
])
def test_bad_vllm_config_json(tmp_path: Path, text: str, line: int, says: str) -> None:
    error = refused(tmp_path, flags=text)
    assert error.where == f"{tmp_path}/vllm_config.json:{line}"
    assert says in str(error)


def test_a_bottomless_vllm_config_json(tmp_path: Path) -> None:
    assert "vllm_config.json" in refused(tmp_path, flags='{"a":' + "[" * 100_000).where


# --- merging and the command line -----------------------------------------------------------------------------------

def test_a_later_layer_wins_under_any_spelling_and_none_removes() -> None:
    assert merge_flags({"tp": 1, "dtype": "auto", "enable-x": True}, {"tensor-parallel-size": 2, "no_enable_x": True},
                       {"dtype": None, "O": 3}) == {"tensor_parallel_size": 2, "enable_x": False,
                                                    "optimization_level": 3}


def test_to_argv_as_documented() -> None:
    assert to_argv({"max_model_len": 2048, "enforce_eager": True, "enable_prefix_caching": False,
                    "served_model_name": ["a", "b"], "hf_overrides": {"a": 1}, "disable_log_stats": False}) == [
        "--no-enable-prefix-caching", "--enforce-eager", "--hf-overrides", '{"a":1}', "--max-model-len", "2048",
        "--served-model-name", "a", "b"]


@pytest.mark.parametrize(("flags", "argv"), [
    ({"disable_log_stats": True}, ["--disable-log-stats"]),
    ({"chat_template": "-x"}, ["--chat-template=-x"]), ({"seed": -1}, ["--seed=-1"]),
    ({"gpu_memory_utilization": 0.5}, ["--gpu-memory-utilization", "0.5"]), ({"quantization": ""},
                                                                            ["--quantization", ""]),
    ({"compilation-config.some_key": True}, ["--compilation-config.some_key", "true"]),
    ({"hf_overrides.sizes": [1, 2]}, ["--hf-overrides.sizes", "[1,2]"]),
    ({"cc": {"level": 3}}, ["--compilation-config", '{"level":3}']),
    ({"allowed_origins": ["*"]}, ["--allowed-origins", '["*"]']),
    ({"middleware": ["a.b", "c.d"]}, ["--middleware", "a.b", "--middleware", "c.d"]),
    ({"lora_modules": [{"name": "l", "path": "/p"}, "m=/q"]},
     ["--lora-modules", '{"name":"l","path":"/p"}', "m=/q"]),
    ({"seed": None}, [])])
def test_to_argv_case_by_case(flags: dict[str, Any], argv: list[str]) -> None:
    assert to_argv(flags) == argv


def test_equal_flags_give_equal_command_lines() -> None:
    items = [("a", 1), ("b", "x"), ("c", True), ("d", {"k": 1})]
    assert to_argv(dict(items)) == to_argv(dict(random.Random(1).sample(items, 4)))


# --- params of a request --------------------------------------------------------------------------------------------

def test_check_params_gives_one_spelling_and_keeps_none() -> None:
    assert check_params({"max-model-len": 5, "tp": 2, "served_model_name": ["a"], "dtype": None}, param="params") == {
        "max_model_len": 5, "tensor_parallel_size": 2, "served_model_name": ["a"], "dtype": None}
    assert check_params(None, param="params") == {}


@pytest.mark.parametrize(("params", "param"), [
    ([], "params"), ("x", "params"), (5, "params"),
    *(({name: 1}, f"params.{name}") for name in RESERVED_FLAGS),
    ({"api-key": "k"}, "params.api-key"), ({"no_headless": True}, "params.no_headless"),
    ({"config.x": 1}, "params.config.x"),
    # the engine's parser takes a beginning for the whole
    ({"hos": "0.0.0.0"}, "params.hos"), ({"p": 1}, "params.p"), ({"ssl-key": "f"}, "params.ssl-key"),
    ({"--host": 1}, "params.--host"), ({"Host": 1}, "params.Host"), ({"a b": 1}, "params.a b"), ({"": 1}, "params."),
    ({"a=b": 1}, "params.a=b"), ({"x" * 200: 1}, "params." + "x" * 128), ({"a\n": 1}, "params.a\n"),
    ({"x": float("nan")}, "params.x"), ({"x": {"y": float("inf")}}, "params.x"), ({"x": [float("inf")]}, "params.x"),
    ({"x": "a\0b"}, "params.x"), ({"x": "\ud800"}, "params.x"), ({"x": "y" * 200_000}, "params.x"),
    ({"x": ["y" * 60_000] * 2}, "params.x"), ({"x": {"k": "y" * 200_000}}, "params.x"),
    ({"x": []}, "params.x"), ({"x": [[1]]}, "params.x"), ({"x": [True]}, "params.x"), ({"x": [None]}, "params.x"),
    ({"x": b"y"}, "params.x"), ({"tp": 1, "tensor_parallel_size": 2}, "params.tensor_parallel_size"),
    # would be a flag of its own on the command line
    ({"lora_modules": ["a=b", "--host", "0.0.0.0"]}, "params.lora_modules"), ({"x": ["-O3"]}, "params.x"),
    ({"x": [-1e30]}, "params.x")])
def test_bad_params_name_the_field(params: Any, param: str) -> None:
    with pytest.raises(BadRequest) as caught:
        check_params(params, param="params")
    assert caught.value.param == param
    assert caught.value.status == 400
    assert param in caught.value.message


def test_no_accepted_flag_reaches_a_reserved_one() -> None:
    for name in RESERVED_FLAGS:
        for end in range(1, len(name) + 1):
            for spelled in {name[:end], name[:end].replace("_", "-")}:
                try:
                    argv = to_argv(check_params({spelled: "v"}, param="params"))
                except BadRequest:
                    continue
                # single letters that are short names of other flags
                assert argv[0].lstrip("-").replace("-", "_") not in RESERVED_FLAGS, spelled
                assert not any(flag.startswith(argv[0].lstrip("-").replace("-", "_")) for flag in RESERVED_FLAGS)


def random_value(rng: random.Random, depth: int = 0) -> Any:
    text = "".join(rng.choices("-=.a1 \n{\"é", k=rng.randrange(5)))
    scalar = rng.choice([text, f"--{text}", rng.randrange(-9, 9), rng.uniform(-1, 1) * 10 ** rng.randrange(-30, 30)])
    if depth:
        return scalar
    return rng.choice([scalar, None, True, False, [random_value(rng, 1) for _ in range(rng.randrange(4))],
                       {text: random_value(rng, 1)}])


def test_no_value_can_smuggle_in_another_flag() -> None:
    """Every argument that begins with a dash is one of the names given, or a negative number."""
    rng = random.Random(4)
    accepted = 0
    for _ in range(3000):
        names = ["".join(rng.choices("abno_-.x", k=rng.randrange(1, 8))) for _ in range(rng.randrange(4))]
        try:
            flags = merge_flags(check_params({name: random_value(rng) for name in names}, param="params"))
        except BadRequest:
            continue
        accepted += bool(flags)
        heads = {form + name.partition(".")[0].replace("_", "-") for name in flags for form in ("--", "--no-")}
        for argument in to_argv(flags):
            if argument.startswith("-") and not re.fullmatch(r"-(\d+|\d*\.\d+)", argument):
                assert argument.partition("=")[0].partition(".")[0] in heads
    assert accepted > 500


# --- .env.example ---------------------------------------------------------------------------------------------------

def test_env_example_is_the_table() -> None:
    """Same sections, names, help and defaults, in the same order.  To change it, print example() into the file."""
    assert (ROOT / ".env.example").read_text() == example()


def test_env_example_uncommented_is_what_the_daemon_does_anyway(tmp_path: Path) -> None:
    uncommented = re.sub(r"(?m)^#(?=[A-Z_]+=)", "", (ROOT / ".env.example").read_text())
    got = load(tmp_path, env=uncommented)
    default = load_settings({"HOME": "/home/me"}, cwd=tmp_path / "empty")
    same = [field.name for field in fields(Settings) if field.name not in ("flags_env", "warnings")]
    assert [getattr(got, name) for name in same] == [getattr(default, name) for name in same]
    assert got.flags_env == default.flags_default


def example() -> str:
    """`.env.example` as the table has it."""
    lines = ["# Copy to .env and uncomment what you change.  The command line and the environment win over this file.",
             "# `null` stands for 'not set'."]
    section = ""
    for setting in SETTINGS:
        if setting.section != section:
            section = setting.section
            lines += ["", f"# --- {section} ---"]
        older = f" (older name: {', '.join(setting.older)})" if setting.older else ""
        lines += ["", f"# {setting.help}{older}", f"#{setting.name}={setting.default}"]
    return "\n".join(lines) + "\n"
