"""Settings and flags: the command line, the environment, `.env`, config.yaml and vllm_config.json, parsed once into
frozen values.

`SETTINGS` is the one table (configuration/settings_table.py): `load_settings` reads it, `.env.example` and README are
tested against it.  Whatever is wrong raises errors.ConfigError with file and line, or the variable's name.  Nothing
here imports Flask or logs.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from configuration.config_file import (
    FILE_NAMES,
    ConfigFile,
    config_paths,
    device_problems,
    find_config_file,
    read_config_file,
)
from configuration.env_file import engine_variables, read_env_file, refuse_near_miss
from configuration.keys import Key, read_keys
from configuration.keys import checked as checked_keys
from configuration.layers import Given, Layer, given, hint, parsed, value, where
from configuration.models import Catalog, Difference, ModelConfig, diff
from configuration.servers import FILE as SERVERS_FILE
from configuration.servers import ServersConfig, read_servers
from configuration.settings_table import (
    DEFAULT_FLAG,
    FLAG_PARSERS,
    FLAGS,
    OF_THE_CLIENT,
    OURS,
    PROXIES,
    REFUSED,
    SETTINGS,
    Setting,
    unset,
)
from configuration.text_file import read_text
from errors import ConfigError
from instances.flags import (
    RESERVED_FLAGS,
    SHARED_RESERVED_FLAGS,
    FlagError,
    check_params,
    checked_flags,
    flags_from_json,
    merge_flags,
    to_argv,
)

__all__ = ["RESERVED_FLAGS", "SETTINGS", "Catalog", "Difference", "Key", "ModelConfig", "Setting", "Settings",
           "check_params", "child_environment", "diff", "load_settings", "merge_flags", "to_argv", "watched_paths"]


@dataclass(frozen=True)
class Settings:
    """All settings; times in seconds.  Keys and what may hold a token stay out of repr."""

    host: str
    port: int
    debug: bool
    threads: int
    one_core: bool
    realtime: bool
    keepalive_s: int
    max_connections: int
    backlog: int                             # requests that wait for a thread
    relays: int
    log_level: str
    access_log: bool
    max_request_bytes: int
    body_memory_bytes: int                   # of all large request bodies at one time
    request_queue_timeout_s: float | None    # None: the start deadline of the instance
    request_timeout_s: float
    base_port: int
    max_instances: int
    default_timeout_s: float                 # idle time of an instance; 0: never
    auto_load: str                           # which models a request loads: "configured", "any", "off"
    gpu_ids: tuple[int, ...] | None          # the devices that may be used; None: all
    memory_utilization: float | None         # share of a device for what has no known footprint; None: vLLM's own
    reserved_memory_bytes: int               # of each device, stays free
    host_memory_budget_bytes: int | None     # without a GPU: most of the host's memory for models; None: all
    sleep_host_memory_bytes: int | None      # most of the host's memory for sleepers; None: half of it
    max_hold_s: float
    max_queue: int                           # requests that wait for one model
    replicas_grow_waiting: int               # more of them for each replica, on average, are too many
    replicas_grow_s: float
    replicas_shrink_s: float
    loading_comments: bool
    routing_policy: str                      # a name of routing.policies.POLICIES
    prefer_local: bool
    prefix_characters: int
    stream_idle_timeout_s: float
    command: tuple[str, ...]
    start_timeout_s: float
    drain_timeout_s: float
    stop_timeout_s: float
    shutdown_grace_s: float
    keep_instances: bool
    state_dir: Path
    instance_log_bytes: int
    probe_interval_s: float                  # 0: no probing
    probe_timeout_s: float
    api_keys: tuple[Key, ...]                # for inference
    admin_api_keys: tuple[Key, ...]          # for management and inference
    allow_unsafe_params: bool
    cors_origins: tuple[str, ...] | None     # whose pages may ask for inference; "*": all
    flags_default: Mapping[str, Any]
    flags_config: Mapping[str, Any]
    flags_env: Mapping[str, Any]
    engine_env: Mapping[str, str] = field(repr=False)
    catalog: Catalog                         # the models of config.yaml
    config_file: Path | None                 # the config.yaml that was read; None: there is none
    servers: ServersConfig                   # of servers.toml
    warnings: tuple[str, ...]


# --- loading ------------------------------------------------------------------------------------------------------

def load_settings(environ: Mapping[str, str], *, env_file: Path | None = None, config_file: Path | None = None,
                  servers_file: Path | None = None, cwd: Path, overrides: Mapping[str, str] | None = None) -> Settings:
    """Parses everything.  Command line (`overrides`, under the variables' names) > environment > .env > config.yaml >
    defaults.

    Without `env_file`, `cwd`/.env is read where it exists; without `config_file`, the first of FILE_NAMES that does;
    without `servers_file`, that of SERVERS_CONFIG, else `cwd`/servers.toml.  Raises ConfigError.
    """
    home = Path(environ.get("HOME") or Path.home())
    env_layer = read_env_file(env_file, cwd, environ)
    config_path = find_config_file(config_file, cwd)
    file = ConfigFile() if config_path is None else read_config_file(config_path, home)
    layers = (_command_line(overrides or {}), {name: Given(text, name) for name, text in environ.items()}, env_layer,
              file.layer)
    values = _values(layers, cwd, home)
    file.refuse(device_problems(file.catalog, values["gpu_ids"]))
    values |= _keys(values, file, layers, cwd, home)
    flags_config = _flags_config(layers, cwd, home)
    flags_env = _flags_env(layers)
    servers = _servers(layers, servers_file, environ, cwd, home)
    return Settings(**values, catalog=file.catalog, config_file=config_path,
                    servers=servers,
                    flags_default=MappingProxyType(merge_flags(
                        {_flag_name(s.name): s.parse(s.default) for s in SETTINGS if s.section == FLAGS})),
                    flags_config=MappingProxyType(flags_config), flags_env=MappingProxyType(flags_env),
                    engine_env=MappingProxyType(engine_variables(env_layer, environ)),
                    warnings=(*_warnings(layers, flags_config, flags_env), *_second_file(config_file, cwd),
                              *servers.warnings, *_seen_by_others(_secret_files(layers, file, config_path, cwd, home))))


def _values(layers: tuple[Layer, ...], cwd: Path, home: Path) -> dict[str, Any]:
    """Every row of the table that is a field of Settings."""
    values = {s.field: value(s, layers) for s in SETTINGS if s.field}
    values["state_dir"] = _state_dir(values["state_dir"], layers, cwd, home)
    if values["debug"]:
        values["log_level"] = "DEBUG"
    if values["base_port"] + values["max_instances"] > 65536:
        raise ConfigError(where("VLLM_BASE_PORT", layers), f"{values['max_instances']} instances from port "
                          f"{values['base_port']} upward do not fit below 65536; lower it or VLLM_MAX_INSTANCES")
    if values["body_memory_bytes"] < values["max_request_bytes"]:
        raise ConfigError(where("MAX_BODY_MEMORY", layers), "MAX_BODY_MEMORY must not be less than MAX_REQUEST_BYTES: "
                          "the largest request could never be taken")
    return values


def _keys(values: Mapping[str, Any], file: ConfigFile, layers: tuple[Layer, ...], cwd: Path,
          home: Path) -> dict[str, tuple[Key, ...]]:
    """Those of the variables, of the files that they name, and of config.yaml's `proxy.keys`, together."""
    found: dict[str, tuple[Key, ...]] = {}
    for name, more in (("API_KEYS", file.keys), ("ADMIN_API_KEYS", file.admin_keys)):
        named = value(next(s for s in SETTINGS if s.name == f"{name}_FILE"), layers)
        from_file = () if named is None else read_keys(_path(named, cwd, home))
        try:
            found[name.lower()] = checked_keys([*(values[name.lower()] or ()), *from_file, *more])
        except ValueError as error:
            raise ConfigError(name, str(error)) from None
    return found


def watched_paths(environ: Mapping[str, str], *, env_file: Path | None = None, config_file: Path | None = None,
                  servers_file: Path | None = None, cwd: Path) -> tuple[Path, ...]:
    """The files that are read anew when they change, there or not; arguments as of `load_settings`.  Raises
    ConfigError where it would because of `.env`."""
    layers = ({name: Given(text, name) for name, text in environ.items()}, read_env_file(env_file, cwd, environ))
    home = Path(environ.get("HOME") or Path.home())
    return *config_paths(config_file, cwd), _servers_path(layers, servers_file, cwd, home)[0]


def child_environment(settings: Settings, environ: Mapping[str, str]) -> dict[str, str]:
    """The environment of an engine: `environ` without our own names and secrets, with what .env holds for it."""
    child = {name: text for name, text in {**settings.engine_env, **environ}.items()
             if name not in OURS and name not in REFUSED and not name.startswith(DEFAULT_FLAG)
             and name not in settings.servers.key_variables and name not in OF_THE_CLIENT
             and name != "PROMETHEUS_MULTIPROC_DIR"}    # the daemon's, were it ever set; the engine makes its own
    if any(child.get(name) for name in PROXIES if name.lower() != "no_proxy"):
        listed = ",".join(filter(None, (child.get("no_proxy"), child.get("NO_PROXY"))))
        hosts = [host.strip() for host in listed.split(",") if host.strip()]
        bypass = "*" if "*" in hosts else ",".join(dict.fromkeys([*hosts, "127.0.0.1", "localhost"]))
        child["NO_PROXY"] = child["no_proxy"] = bypass
    return child


def _command_line(overrides: Mapping[str, str]) -> Layer:
    for name in overrides:
        if name not in OURS and not name.startswith(DEFAULT_FLAG):
            raise ConfigError(name, f"is not a setting{hint(name)}")
    return {name: Given(text, name) for name, text in overrides.items()}


def _path(text: str, cwd: Path, home: Path) -> Path:
    """Absolute; `~` is the home of the environment given, not of this process."""
    return cwd / (home / text[2:] if text.startswith("~/") else Path(text).expanduser())


def _state_dir(chosen: Path, layers: Iterable[Layer], cwd: Path, home: Path) -> Path:
    layers = tuple(layers)
    if any(not unset(layer["STATE_DIR"].text) for layer in layers if "STATE_DIR" in layer):
        return _path(str(chosen), cwd, home)
    base = next((layer["XDG_STATE_HOME"].text for layer in layers if "XDG_STATE_HOME" in layer), "")
    return Path(base) / "vllm-server" if base.startswith("/") else _path(str(chosen), cwd, home)


# --- the flags that every instance gets ---------------------------------------------------------------------------

def _flag_name(variable: str) -> str:
    return variable.removeprefix(DEFAULT_FLAG).lower()


def _flags_env(layers: Iterable[Layer]) -> dict[str, Any]:
    return merge_flags(*(_layer_flags(layer) for layer in reversed(tuple(layers))))


def _layer_flags(layer: Layer) -> dict[str, Any]:
    flags: dict[str, Any] = {}
    for name, one in layer.items():
        if name in OURS - FLAG_PARSERS.keys() or not name.startswith(DEFAULT_FLAG) or unset(one.text):
            continue
        refuse_near_miss(name, one.where)
        flag = parsed(name, one, FLAG_PARSERS.get(name, _flag_value))
        try:
            flags |= checked_flags({_flag_name(name): flag}, SHARED_RESERVED_FLAGS, known=flags)
        except FlagError as error:
            raise ConfigError(one.where, f"{name}: {error}") from None
    return flags


def _flag_value(text: str) -> Any:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    if not text.startswith(("{", "[")):
        return text
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"is not valid JSON: {error}") from None


def _flags_config(layers: Iterable[Layer], cwd: Path, home: Path) -> dict[str, Any]:
    """The flags of VLLM_CONFIG, else of ./vllm_config.json where it exists."""
    layers = tuple(layers)
    named = value(next(s for s in SETTINGS if s.name == "VLLM_CONFIG"), layers)
    path = cwd / "vllm_config.json" if named is None else _path(named, cwd, home)
    if named is None and not path.exists():
        return {}
    if not path.is_file():
        raise ConfigError(where("VLLM_CONFIG", layers), f"VLLM_CONFIG={named}: no such file")
    return flags_from_json(read_text(path), str(path))


def _servers(layers: Iterable[Layer], wanted: Path | None, environ: Mapping[str, str], cwd: Path,
             home: Path) -> ServersConfig:
    path, named = _servers_path(layers, wanted, cwd, home)
    return read_servers(path, environ) if named or path.exists() else ServersConfig()


def _servers_path(layers: Iterable[Layer], wanted: Path | None, cwd: Path, home: Path) -> tuple[Path, bool]:
    """Where the file is, and whether it was asked for."""
    named = value(next(s for s in SETTINGS if s.name == "SERVERS_CONFIG"), layers)
    if wanted is None and named is None:
        return cwd / SERVERS_FILE, False
    return (cwd / wanted if wanted is not None else _path(named, cwd, home)), True


def _warnings(layers: tuple[Layer, ...], *user_flags: Mapping[str, Any]) -> tuple[str, ...]:
    found = []
    if not any("trust_remote_code" in flags for flags in user_flags):
        found.append("trust_remote_code is on by default: a model may run Python code that it brings along. "
                     "VLLM_DEFAULT_TRUST_REMOTE_CODE=false turns it off.")
    for setting in SETTINGS:
        for layer in layers:
            names = [name for name, _ in given(setting, layer)]
            if len(names) > 1:
                found.append(f"{names[1]} is an older name of {names[0]} and is ignored beside it.")
    found += [f"{name} {why}." for name, why in REFUSED.items() if name in layers[1]]
    return tuple(found)


def _secret_files(layers: tuple[Layer, ...], file: ConfigFile, config_path: Path | None, cwd: Path,
                  home: Path) -> Iterable[Path]:
    """Files that keys or tokens stand in."""
    named = [value(setting, layers) for setting in SETTINGS if setting.name in ("API_KEYS_FILE", "ADMIN_API_KEYS_FILE")]
    yield from (_path(text, cwd, home) for text in named if text is not None)
    yield from {Path(one.where.rpartition(":")[0]) for setting in SETTINGS if setting.secret
                for _, one in given(setting, layers[2])}
    models = file.catalog.models.values()
    if config_path is not None and (file.keys or file.admin_keys or any(model.hf_token for model in models)):
        yield config_path


def _seen_by_others(paths: Iterable[Path]) -> Iterable[str]:
    for path in paths:
        if path.stat().st_mode & 0o004:
            yield f"{path} holds keys, and every user of this machine can read it: chmod o-r {path}"


def _second_file(wanted: Path | None, cwd: Path) -> Iterable[str]:
    there = [name for name in FILE_NAMES if (cwd / name).is_file()]
    if wanted is None and len(there) > 1:
        yield f"{there[1]} is ignored beside {there[0]}; --config chooses another one."
