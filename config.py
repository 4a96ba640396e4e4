"""Settings and flags: `.env`, the environment, the command line and vllm_config.json, parsed once into frozen values.

`SETTINGS` is the one table: `load_settings` reads it, `.env.example` and README are tested against it.  Whatever is
wrong raises errors.ConfigError with file and line, or the variable's name.  Nothing here imports Flask or logs.
"""

from __future__ import annotations

import difflib
import io
import json
import math
import re
import shlex
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from dotenv.parser import Binding, parse_stream
from dotenv.variables import parse_variables

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

__all__ = ["RESERVED_FLAGS", "SETTINGS", "Setting", "Settings", "check_params", "child_environment", "load_settings",
           "merge_flags", "to_argv"]

# --- parsers of one value: text in, value out; a ValueError says what was expected -------------------------------

_TRUE, _FALSE = ("true", "1", "yes", "on"), ("false", "0", "no", "off")
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30,
          "B": 1, "KB": 10 ** 3, "MB": 10 ** 6, "GB": 10 ** 9}
_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")
_LONGEST_WAIT_S = 10 ** 9    # some 30 years; waits much beyond it overflow in the threading module


def _unset(text: str) -> bool:
    """Empty, and the `null` that the documents print for 'no default', mean that nothing was given."""
    return text.strip().lower() in ("", "null", "none")


def _boolean(text: str) -> bool:
    if text.lower() not in _TRUE + _FALSE:
        raise ValueError("expected true or false")
    return text.lower() in _TRUE


def _whole(low: int, high: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not re.fullmatch(r"[+-]?[0-9]{1,18}", text) or not low <= int(text) <= high:
            raise ValueError(f"expected a whole number from {low} to {high}")
        return int(text)
    return parse


def _seconds(*, zero: bool) -> Callable[[str], float]:
    def parse(text: str) -> float:
        number = float(text) if re.fullmatch(r"[+-]?[0-9]*\.?[0-9]+(e[+-]?[0-9]+)?", text.lower()) else math.nan
        if not (0 <= number <= _LONGEST_WAIT_S) or (number == 0 and not zero):
            raise ValueError(f"expected seconds, {'0 or more' if zero else 'more than 0'}")
        return number
    return parse


def _size(text: str) -> int:
    match = re.fullmatch(r"([0-9]{1,15})\s*([A-Z]*)", text.upper())
    if not match or match[2] not in _UNITS or int(match[1]) == 0:
        raise ValueError("expected a size such as 104857600, 100M, 100MiB (2^20 bytes) or 100MB (10^6)")
    return int(match[1]) * _UNITS[match[2]]


def _level(text: str) -> str:
    if text.upper() not in _LEVELS:
        raise ValueError(f"expected one of {', '.join(_LEVELS)}")
    return text.upper()


def _words(text: str) -> tuple[str, ...]:
    words = tuple(shlex.split(text))    # its ValueError says "No closing quotation"
    if not words or not words[0]:
        raise ValueError("expected a command")
    return words


def _keys(text: str) -> frozenset[str]:
    keys = frozenset(filter(None, (key.strip() for key in text.split(","))))
    if not keys:      # else one stray comma would open the door that a key was meant to close
        raise ValueError("expected one or more keys separated by commas")
    if not all(re.fullmatch(r"[!-~]+", key) for key in keys):
        raise ValueError("a key may hold printable ASCII characters only, and no space")
    return keys


def _host(text: str) -> str:
    if re.search(r"\s", text):
        raise ValueError("expected a host name or an address")
    return text


# --- the table ----------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Setting:
    """One variable.  `default` is its text as printed (`null`: none); `field` its name in Settings, None for a default
    flag of the engine (VLLM_DEFAULT_*) and for a variable that only the engine reads (`for_engine`)."""

    section: str
    name: str
    field: str | None
    default: str
    parse: Callable[[str], Any]
    help: str
    older: tuple[str, ...] = ()
    secret: bool = False
    for_engine: bool = False


SERVER, ACCESS, INSTANCES, TIMES, FLAGS, ENGINE = (
    "Server", "Access", "Instances", "Times, in seconds", "Default flags of every instance", "Passed to the engine")
_COUNT, _PORT, _WAIT, _SPAN = _whole(1, 10 ** 6), _whole(0, 65535), _seconds(zero=True), _seconds(zero=False)

SETTINGS: tuple[Setting, ...] = (
    Setting(SERVER, "APP_HOST", "host", "0.0.0.0", _host, "Address to listen on"),
    Setting(SERVER, "APP_PORT", "port", "5000", _PORT, "Port to listen on; 0 picks a free one", ("PROXY_PORT",)),
    Setting(SERVER, "APP_DEBUG", "debug", "false", _boolean, "Log at level DEBUG, whatever LOG_LEVEL says"),
    Setting(SERVER, "APP_THREADS", "threads", "512", _COUNT, "Most requests handled at once; threads start as needed"),
    Setting(SERVER, "APP_KEEPALIVE", "keepalive_s", "75", _whole(0, _LONGEST_WAIT_S),
            "Seconds an idle client connection stays open"),
    Setting(SERVER, "APP_MAX_CONNECTIONS", "max_connections", "12000", _COUNT, "Most client connections at once"),
    Setting(SERVER, "RELAYS", "relays", "1", _whole(0, 64),
            "Processes that carry streams; more on many cores, 0: request threads carry them"),
    Setting(SERVER, "MAX_REQUEST_BYTES", "max_request_bytes", "100MiB", _size, "Largest request body; beyond it: 413"),
    Setting(SERVER, "LOG_LEVEL", "log_level", "INFO", _level, "DEBUG, INFO, WARNING, ERROR or CRITICAL"),
    Setting(SERVER, "ACCESS_LOG", "access_log", "false", _boolean, "Log one line for each request"),
    Setting(ACCESS, "API_KEYS", "api_keys", "null", _keys, "Keys for inference, separated by commas; none: open",
            secret=True),
    Setting(ACCESS, "ADMIN_API_KEYS", "admin_api_keys", "null", _keys,
            "Keys for management (and inference); none: management from this machine only", secret=True),
    Setting(INSTANCES, "VLLM_COMMAND", "command", "vllm", _words, "The engine's command; `serve MODEL ...` follows it"),
    Setting(INSTANCES, "VLLM_BASE_PORT", "base_port", "9000", _whole(1024, 65535), "First port for instances"),
    Setting(INSTANCES, "VLLM_MAX_INSTANCES", "max_instances", "20", _whole(1, 10000), "Most instances at once"),
    Setting(INSTANCES, "VLLM_CONFIG", None, "null", str,
            "JSON file with flags of every instance; else ./vllm_config.json where it exists"),
    Setting(INSTANCES, "KEEP_INSTANCES", "keep_instances", "false", _boolean,
            "Leave instances running at shutdown, for the next start to take over"),
    Setting(INSTANCES, "STATE_DIR", "state_dir", "~/.local/state/vllm-server", Path,
            "Records and logs of the instances ($XDG_STATE_HOME is honoured)"),
    Setting(INSTANCES, "INSTANCE_LOG_MAX_BYTES", "instance_log_bytes", "10MiB", _size, "Size of one instance's log"),
    Setting(TIMES, "VLLM_DEFAULT_TIMEOUT", "default_timeout_s", "600", _WAIT,
            "Idle time after which an instance is stopped; 0: never", ("IDLE_TIMEOUT",)),
    Setting(TIMES, "REQUEST_QUEUE_TIMEOUT", "request_queue_timeout_s", "null", _WAIT,
            "Longest wait of a request for a loading model; null: until its start deadline"),
    Setting(TIMES, "REQUEST_TIMEOUT", "request_timeout_s", "3600", _SPAN, "Longest wait for an answer's first byte"),
    Setting(TIMES, "START_TIMEOUT", "start_timeout_s", "600", _SPAN,
            "Longest start of an instance, not counting a download that grows"),
    Setting(TIMES, "DRAIN_TIMEOUT", "drain_timeout_s", "30", _WAIT,
            "Time that requests in flight get when their instance is stopped"),
    Setting(TIMES, "STOP_TIMEOUT", "stop_timeout_s", "10", _WAIT, "Time between an instance's TERM and its KILL"),
    Setting(TIMES, "SHUTDOWN_GRACE", "shutdown_grace_s", "30", _WAIT,
            "Time that requests in flight get when the daemon ends"),
    Setting(TIMES, "PROBE_INTERVAL", "probe_interval_s", "30", _WAIT,
            "Time between probes of an instance without traffic; 0: no probes"),
    Setting(TIMES, "PROBE_TIMEOUT", "probe_timeout_s", "60", _SPAN, "A probe without an answer by then: it hangs"),
    Setting(FLAGS, "VLLM_DEFAULT_DTYPE", None, "auto", str,
            "--dtype; VLLM_DEFAULT_<FLAG> sets any other flag likewise"),
    Setting(FLAGS, "VLLM_DEFAULT_KV_CACHE_DTYPE", None, "auto", str, "--kv-cache-dtype"),
    Setting(FLAGS, "VLLM_DEFAULT_TRUST_REMOTE_CODE", None, "true", _boolean,
            "--trust-remote-code: lets a model run Python code that it brings along"),
    Setting(ENGINE, "HF_ENDPOINT", None, "null", str, "Address of the Hugging Face hub or a mirror", for_engine=True),
    Setting(ENGINE, "HF_HOME", None, "null", str, "Folder of the Hugging Face cache", for_engine=True),
    Setting(ENGINE, "HF_TOKEN", None, "null", str, "Hugging Face token, for gated models", secret=True,
            for_engine=True),
    Setting(ENGINE, "HTTP_PROXY", None, "null", str, "Proxy for http:// addresses", for_engine=True),
    Setting(ENGINE, "HTTPS_PROXY", None, "null", str, "Proxy for https:// addresses", for_engine=True),
    Setting(ENGINE, "NO_PROXY", None, "null", str, "Hosts reached without the proxy; 127.0.0.1 is added",
            for_engine=True),
)

_DEFAULT_FLAG = "VLLM_DEFAULT_"
_OURS = frozenset(name for s in SETTINGS if not s.for_engine for name in (s.name, *s.older))
_FLAG_PARSERS = {s.name: s.parse for s in SETTINGS if s.section == FLAGS}
_PROXIES = frozenset(name for base in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY")
                     for name in (base, base.lower()))
_ENGINE_NAMES = _PROXIES | {"PATH", "TMPDIR", "HOME", "LANG", "TZ", "LD_LIBRARY_PATH", "LD_PRELOAD", "SSL_CERT_FILE",
                            "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"}
_ENGINE_PREFIXES = ("HF_", "HUGGING_FACE_", "HUGGINGFACE_", "TRANSFORMERS_", "TOKENIZERS_", "CUDA_", "NVIDIA_",
                    "NCCL_", "GLOO_", "UCX_", "TORCH_", "TORCHINDUCTOR_", "PYTORCH_", "TRITON_", "FLASHINFER_",
                    "LMCACHE_", "OMP_", "MKL_", "RAY_", "XDG_", "SIMULATOR_", "VLLM_")
# The engine would demand this key from the daemon, which has no use for it: keys are checked once, at the door.
_REFUSED = {"VLLM_API_KEY": "is the engine's own key; the daemon checks keys itself: set API_KEYS"}


@dataclass(frozen=True)
class Settings:
    """All settings; times in seconds.  Keys and what may hold a token stay out of repr."""

    host: str
    port: int
    debug: bool
    threads: int
    keepalive_s: int
    max_connections: int
    relays: int
    log_level: str
    access_log: bool
    max_request_bytes: int
    request_queue_timeout_s: float | None    # None: the start deadline of the instance
    request_timeout_s: float
    base_port: int
    max_instances: int
    default_timeout_s: float                 # idle time of an instance; 0: never
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
    api_keys: frozenset[str] = field(repr=False)
    admin_api_keys: frozenset[str] = field(repr=False)
    flags_default: Mapping[str, Any]
    flags_config: Mapping[str, Any]
    flags_env: Mapping[str, Any]
    engine_env: Mapping[str, str] = field(repr=False)
    warnings: tuple[str, ...]


class _Given(NamedTuple):
    text: str
    where: str


_Layer = Mapping[str, _Given]


# --- loading ------------------------------------------------------------------------------------------------------

def load_settings(environ: Mapping[str, str], *, env_file: Path | None = None, cwd: Path,
                  overrides: Mapping[str, str] | None = None) -> Settings:
    """Parses everything.  Command line (`overrides`, under the variables' names) > environment > .env > defaults.

    Without `env_file`, `cwd`/.env is read where it exists.  Raises ConfigError.
    """
    layers = (_command_line(overrides or {}), {name: _Given(text, name) for name, text in environ.items()},
              _env_file(env_file, cwd, environ))
    home = Path(environ.get("HOME") or Path.home())
    values = {s.field: _value(s, layers) for s in SETTINGS if s.field}
    values["api_keys"] = values["api_keys"] or frozenset()
    values["admin_api_keys"] = values["admin_api_keys"] or frozenset()
    values["state_dir"] = _state_dir(values["state_dir"], layers, cwd, home)
    if values["debug"]:
        values["log_level"] = "DEBUG"
    if values["base_port"] + values["max_instances"] > 65536:
        raise ConfigError(_where("VLLM_BASE_PORT", layers), f"{values['max_instances']} instances from port "
                          f"{values['base_port']} upward do not fit below 65536; lower it or VLLM_MAX_INSTANCES")
    flags_config = _flags_config(layers, cwd, home)
    flags_env = _flags_env(layers)
    return Settings(**values,
                    flags_default=MappingProxyType(merge_flags(
                        {_flag_name(s.name): s.parse(s.default) for s in SETTINGS if s.section == FLAGS})),
                    flags_config=MappingProxyType(flags_config), flags_env=MappingProxyType(flags_env),
                    engine_env=MappingProxyType(_engine_env(layers[2], environ)),
                    warnings=_warnings(layers, flags_config, flags_env))


def child_environment(settings: Settings, environ: Mapping[str, str]) -> dict[str, str]:
    """The environment of an engine: `environ` without our own names and secrets, with what .env holds for it."""
    child = {name: text for name, text in {**settings.engine_env, **environ}.items()
             if name not in _OURS and name not in _REFUSED and not name.startswith(_DEFAULT_FLAG)
             and name != "PROMETHEUS_MULTIPROC_DIR"}    # the daemon's, were it ever set; the engine makes its own
    if any(child.get(name) for name in _PROXIES if name.lower() != "no_proxy"):
        listed = ",".join(filter(None, (child.get("no_proxy"), child.get("NO_PROXY"))))
        hosts = [host.strip() for host in listed.split(",") if host.strip()]
        bypass = "*" if "*" in hosts else ",".join(dict.fromkeys([*hosts, "127.0.0.1", "localhost"]))
        child["NO_PROXY"] = child["no_proxy"] = bypass
    return child


def _command_line(overrides: Mapping[str, str]) -> _Layer:
    for name in overrides:
        if name not in _OURS and not name.startswith(_DEFAULT_FLAG):
            raise ConfigError(name, f"is not a setting{_hint(name, _OURS)}")
    return {name: _Given(text, name) for name, text in overrides.items()}


def _given(setting: Setting, layer: _Layer) -> Iterable[tuple[str, _Given]]:
    """What a layer says about a setting, its newest name first."""
    return ((name, layer[name]) for name in (setting.name, *setting.older)
            if name in layer and not _unset(layer[name].text))


def _value(setting: Setting, layers: Iterable[_Layer]) -> Any:
    """The strongest layer's value.  The weaker ones are parsed too: a mistake that is hidden today bites later."""
    parsed = [_parsed(name, given, setting.parse, secret=setting.secret)
              for layer in layers for name, given in _given(setting, layer)]
    if parsed:
        return parsed[0]
    return None if _unset(setting.default) else setting.parse(setting.default)


def _parsed(name: str, given: _Given, parse: Callable[[str], Any], *, secret: bool = False) -> Any:
    try:
        return parse(given.text.strip())
    except ValueError as error:
        shown = name if secret else f"{name}={given.text[:80]}"
        raise ConfigError(given.where, f"{shown}: {error}") from None


def _where(name: str, layers: Iterable[_Layer]) -> str:
    return next((layer[name].where for layer in layers if name in layer and not _unset(layer[name].text)), name)


def _path(text: str, cwd: Path, home: Path) -> Path:
    """Absolute; `~` is the home of the environment given, not of this process."""
    return cwd / (home / text[2:] if text.startswith("~/") else Path(text).expanduser())


def _state_dir(chosen: Path, layers: Iterable[_Layer], cwd: Path, home: Path) -> Path:
    layers = tuple(layers)
    if any(not _unset(layer["STATE_DIR"].text) for layer in layers if "STATE_DIR" in layer):
        return _path(str(chosen), cwd, home)
    base = next((layer["XDG_STATE_HOME"].text for layer in layers if "XDG_STATE_HOME" in layer), "")
    return Path(base) / "vllm-server" if base.startswith("/") else _path(str(chosen), cwd, home)


# --- .env -----------------------------------------------------------------------------------------------------------

def _env_file(path: Path | None, cwd: Path, environ: Mapping[str, str]) -> _Layer:
    """The file's variables, `${NAME}` and `${NAME:-default}` resolved as python-dotenv does; the last one wins."""
    wanted = path is not None
    path = cwd / ".env" if path is None else cwd / path
    if not wanted and not path.is_file():
        return {}
    found: dict[str, _Given] = {}
    for binding in parse_stream(io.StringIO(_read_text(path))):
        where = f"{path}:{_line_of(binding)}"
        if binding.error or (binding.key is not None and binding.value is None):
            raise ConfigError(where, "expected NAME=value (the rest of a quoted value, or the `=`, is missing)")
        if binding.key is None or binding.value is None:
            continue    # a comment or the blank end
        _check_env_name(binding.key, where)
        known = {**environ, **{name: given.text for name, given in found.items()}}
        text = "".join(atom.resolve(known) for atom in parse_variables(binding.value))
        if "\0" in text:
            raise ConfigError(where, f"{binding.key} holds a NUL character")
        found[binding.key] = _Given(text, where)
    return found


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(str(path), "no such file") from None
    except UnicodeDecodeError as error:
        raise ConfigError(str(path), f"is not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise ConfigError(str(path), f"cannot be read: {error.strerror}") from None


def _line_of(binding: Binding) -> int:
    """The parser counts the blank lines before a binding into it."""
    text = binding.original.string
    return binding.original.line + len(re.findall(r"\r\n|\n|\r", text[:len(text) - len(text.lstrip())]))


def _check_env_name(name: str, where: str) -> None:
    if name in _OURS:
        return
    if name in _REFUSED:
        raise ConfigError(where, f"{name} {_REFUSED[name]}")
    if name.startswith("VLLM_"):
        _refuse_near_miss(name, where)
    elif name not in _ENGINE_NAMES and not name.startswith(_ENGINE_PREFIXES):
        known = _OURS | {s.name for s in SETTINGS} | _ENGINE_NAMES
        raise ConfigError(where, f"unknown setting {name}{_hint(name, known)}")


def _refuse_near_miss(name: str, where: str) -> None:
    """vLLM has VLLM_* variables of its own, and any VLLM_DEFAULT_* is a flag; one typed almost like ours is a slip."""
    prefix = _DEFAULT_FLAG if name.startswith(_DEFAULT_FLAG) else ""
    ours = {known.removeprefix(prefix): known for known in _OURS if known.startswith(prefix or "VLLM_")}
    if name not in _OURS and (near := difflib.get_close_matches(name.removeprefix(prefix), ours, 1, 0.87)):
        raise ConfigError(where, f"unknown setting {name}; did you mean {ours[near[0]]}?")


def _hint(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name.upper(), known, 1, 0.6)
    return f"; did you mean {near[0]}?" if near else "; .env.example lists them all"


def _engine_env(env_file: _Layer, environ: Mapping[str, str]) -> dict[str, str]:
    """What .env holds for the engine, less what the environment sets already (a proxy in either case of letters)."""
    return {name: given.text for name, given in env_file.items()
            if name not in _OURS and not name.startswith(_DEFAULT_FLAG) and not _unset(given.text)
            and name not in environ and not (name in _PROXIES and {name.lower(), name.upper()} & environ.keys())}


# --- the flags that every instance gets ---------------------------------------------------------------------------

def _flag_name(variable: str) -> str:
    return variable.removeprefix(_DEFAULT_FLAG).lower()


def _flags_env(layers: Iterable[_Layer]) -> dict[str, Any]:
    return merge_flags(*(_layer_flags(layer) for layer in reversed(tuple(layers))))


def _layer_flags(layer: _Layer) -> dict[str, Any]:
    flags: dict[str, Any] = {}
    for name, given in layer.items():
        if name in _OURS - _FLAG_PARSERS.keys() or not name.startswith(_DEFAULT_FLAG) or _unset(given.text):
            continue
        _refuse_near_miss(name, given.where)
        value = _parsed(name, given, _FLAG_PARSERS.get(name, _flag_value))
        try:
            flags |= checked_flags({_flag_name(name): value}, SHARED_RESERVED_FLAGS, known=flags)
        except FlagError as error:
            raise ConfigError(given.where, f"{name}: {error}") from None
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


def _flags_config(layers: Iterable[_Layer], cwd: Path, home: Path) -> dict[str, Any]:
    """The flags of VLLM_CONFIG, else of ./vllm_config.json where it exists."""
    layers = tuple(layers)
    named = _value(next(s for s in SETTINGS if s.name == "VLLM_CONFIG"), layers)
    path = cwd / "vllm_config.json" if named is None else _path(named, cwd, home)
    if named is None and not path.exists():
        return {}
    if not path.is_file():
        raise ConfigError(_where("VLLM_CONFIG", layers), f"VLLM_CONFIG={named}: no such file")
    return flags_from_json(_read_text(path), str(path))


def _warnings(layers: tuple[_Layer, ...], *user_flags: Mapping[str, Any]) -> tuple[str, ...]:
    found = []
    if not any("trust_remote_code" in flags for flags in user_flags):
        found.append("trust_remote_code is on by default: a model may run Python code that it brings along. "
                     "VLLM_DEFAULT_TRUST_REMOTE_CODE=false turns it off.")
    for setting in SETTINGS:
        for layer in layers:
            names = [name for name, _ in _given(setting, layer)]
            if len(names) > 1:
                found.append(f"{names[1]} is an older name of {names[0]} and is ignored beside it.")
    found += [f"{name} {why}." for name, why in _REFUSED.items() if name in layers[1]]
    return tuple(found)
