"""The one table of settings: names, defaults, parsers and help; and which other variables are whose.

`config.load_settings` reads it; `.env.example` and README are tested against it.
"""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configuration.keys import parse_keys

# --- parsers of one value: text in, value out; a ValueError says what was expected -------------------------------

_TRUE, _FALSE = ("true", "1", "yes", "on"), ("false", "0", "no", "off")
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30,
          "B": 1, "KB": 10 ** 3, "MB": 10 ** 6, "GB": 10 ** 9}
_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")
_NUMBER = re.compile(r"[+-]?[0-9]*\.?[0-9]+([eE][+-]?[0-9]+)?")
_LONGEST_WAIT_S = 10 ** 9    # some 30 years; waits much beyond it overflow in the threading module


def unset(text: str) -> bool:
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
        number = float(text) if _NUMBER.fullmatch(text) else math.nan
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


def _host(text: str) -> str:
    if re.search(r"\s", text):
        raise ValueError("expected a host name or an address")
    return text


def _one_of(*words: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text.lower() not in words:
            raise ValueError(f"expected one of {', '.join(words)}")
        return text.lower()
    return parse


def _origins(text: str) -> tuple[str, ...]:
    """As browsers write them: scheme, host and perhaps a port, in lower case."""
    found = tuple(word.strip().lower() for word in text.split(","))
    for origin in found:
        if origin != "*" and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[a-z0-9.\-_\[\]:]+", origin):
            raise ValueError("expected origins such as https://app.example or http://localhost:3000, or *")
    return found


def _mebibytes(low: int) -> Callable[[str], int]:
    """Text in MiB, as NVIDIA's tools count (they write MB); the value in bytes."""
    whole = _whole(low, 10 ** 9)
    return lambda text: whole(text) << 20


def _indexes(text: str) -> tuple[int, ...]:
    found = tuple(_whole(0, 4095)(word.strip()) for word in text.split(","))
    if len(set(found)) < len(found):
        raise ValueError("lists a device twice")
    return found


def _share(text: str) -> float:
    number = float(text) if _NUMBER.fullmatch(text) else math.nan
    if not 0 < number <= 1:
        raise ValueError("expected a share, more than 0 and at most 1")
    return number


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


SERVER, ACCESS, INSTANCES, DEMAND, BALANCE, TIMES, FLAGS, ENGINE = (
    "Server", "Access", "Instances", "Models on demand and their memory", "Choosing among instances and other servers",
    "Times, in seconds", "Default flags of every instance", "Passed to the engine")
_COUNT, _PORT, _WAIT, _SPAN = _whole(1, 10 ** 6), _whole(0, 65535), _seconds(zero=True), _seconds(zero=False)

SETTINGS: tuple[Setting, ...] = (
    Setting(SERVER, "APP_HOST", "host", "0.0.0.0", _host, "Address to listen on"),  # nosec B104
    Setting(SERVER, "APP_PORT", "port", "5000", _PORT, "Port to listen on; 0 picks a free one", ("PROXY_PORT",)),
    Setting(SERVER, "APP_DEBUG", "debug", "false", _boolean, "Log at level DEBUG, whatever LOG_LEVEL says"),
    Setting(SERVER, "APP_THREADS", "threads", "512", _COUNT,
            "Most requests handled at once, beside those that wait for a model"),
    Setting(SERVER, "APP_ONE_CORE", "one_core", "true", _boolean,
            "Run the daemon's own threads on one core, the least used; engines and relays run on all"),
    Setting(SERVER, "APP_REALTIME", "realtime", "true", _boolean,
            "Run the daemon's own threads before all other programs, engines too, where the system allows it "
            "(SCHED_RR)"),
    Setting(SERVER, "APP_KEEPALIVE", "keepalive_s", "75", _whole(0, _LONGEST_WAIT_S),
            "Seconds an idle client connection stays open"),
    Setting(SERVER, "APP_MAX_CONNECTIONS", "max_connections", "12000", _COUNT, "Most client connections at once"),
    Setting(SERVER, "APP_BACKLOG", "backlog", "2048", _COUNT,
            "Most requests that wait for one of these threads; beyond it: 503"),
    Setting(SERVER, "RELAYS", "relays", "1", _whole(0, 64),
            "Processes that carry streams; more on many cores, 0: request threads carry them"),
    Setting(SERVER, "MAX_REQUEST_BYTES", "max_request_bytes", "100MiB", _size, "Largest request body; beyond it: 413"),
    Setting(SERVER, "MAX_BODY_MEMORY", "body_memory_bytes", "2GiB", _size,
            "Most memory for all large request bodies at once; beyond it: 503"),
    Setting(SERVER, "LOG_LEVEL", "log_level", "INFO", _level, "DEBUG, INFO, WARNING, ERROR or CRITICAL"),
    Setting(SERVER, "ACCESS_LOG", "access_log", "false", _boolean, "Log one line for each request"),
    Setting(ACCESS, "API_KEYS", "api_keys", "null", parse_keys,
            "Keys for inference, separated by commas: KEY, NAME:KEY or NAME:sha256:HEX; none: open", secret=True),
    Setting(ACCESS, "API_KEYS_FILE", None, "null", str, "File with more of them, one a line"),
    Setting(ACCESS, "ADMIN_API_KEYS", "admin_api_keys", "null", parse_keys,
            "Keys for management (and inference); none: management from this machine only", secret=True),
    Setting(ACCESS, "ADMIN_API_KEYS_FILE", None, "null", str, "File with more of them, one a line"),
    Setting(ACCESS, "CORS_ORIGINS", "cors_origins", "null", _origins,
            "Origins whose pages may ask for inference, separated by commas, such as https://app.example; *: all"),
    Setting(ACCESS, "ALLOW_UNSAFE_PARAMS", "allow_unsafe_params", "false", _boolean,
            "Let the params of a request name files and code too, not only the configuration"),
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
    Setting(DEMAND, "AUTO_LOAD", "auto_load", "configured", _one_of("configured", "any", "off"),
            "Models that requests load: configured (those of config.yaml), any (every name a client sends), off"),
    Setting(DEMAND, "GPU_ID", "gpu_ids", "null", _indexes, "GPUs that may be used, such as 0 or 0,1; null: all"),
    Setting(DEMAND, "MEMORY_UTILIZATION", "memory_utilization", "null", _share,
            "Share of a device for a model whose footprint is not known otherwise; null: vLLM's own default"),
    Setting(DEMAND, "RESERVED_MEMORY_MB", "reserved_memory_bytes", "2048", _mebibytes(0),
            "Memory of each device that stays free, in MiB"),
    Setting(DEMAND, "HOST_MEMORY_BUDGET_MB", "host_memory_budget_bytes", "null", _mebibytes(1),
            "Where there is no GPU: most of the host's memory for all models, in MiB; null: all of it"),
    Setting(DEMAND, "SLEEP_HOST_MEMORY_MB", "sleep_host_memory_bytes", "null", _mebibytes(0),
            "Most of the host's memory for sleeping models, in MiB; null: half of it"),
    Setting(DEMAND, "MAX_HOLD_SECONDS", "max_hold_s", "30", _WAIT,
            "A busy model that others wait for makes room after so many seconds"),
    Setting(DEMAND, "MAX_QUEUE", "max_queue", "1000", _COUNT, "Most requests that wait for one model; beyond it: 503"),
    Setting(DEMAND, "REPLICAS_GROW_WAITING", "replicas_grow_waiting", "1", _whole(0, 10 ** 6),
            "One more replica when more requests than these wait for each, on average over REPLICAS_GROW_SECONDS"),
    Setting(DEMAND, "REPLICAS_GROW_SECONDS", "replicas_grow_s", "10", _SPAN,
            "Time that a load must last for one more replica"),
    Setting(DEMAND, "REPLICAS_SHRINK_SECONDS", "replicas_shrink_s", "300", _SPAN,
            "Time that half of the others' places must have been enough for one replica fewer"),
    Setting(DEMAND, "LOADING_COMMENTS", "loading_comments", "true", _boolean,
            "Tell streaming clients that wait how far their model is, in comment lines of the stream"),
    Setting(BALANCE, "SERVERS_CONFIG", None, "null", str,
            "TOML file with vLLM servers on other machines; else ./servers.toml where it exists"),
    Setting(BALANCE, "ROUTING_POLICY", "routing_policy", "load",
            _one_of("load", "round_robin", "least_requests", "prefix", "session"),
            "Who gets a request: load, round_robin, least_requests, prefix (who has the prompt's start), session"),
    Setting(BALANCE, "PREFER_LOCAL", "prefer_local", "true", _boolean,
            "Servers on other machines only when no instance here has room"),
    Setting(BALANCE, "PREFIX_CHARACTERS", "prefix_characters", "256", _COUNT,
            "So much of the start of a prompt decides where the policy prefix sends it"),
    Setting(TIMES, "VLLM_DEFAULT_TIMEOUT", "default_timeout_s", "600", _WAIT,
            "Idle time after which an instance is stopped; 0: never", ("IDLE_TIMEOUT",)),
    Setting(TIMES, "REQUEST_QUEUE_TIMEOUT", "request_queue_timeout_s", "null", _WAIT,
            "Longest wait of a request for a loading model; null: as long as its start may take"),
    Setting(TIMES, "REQUEST_TIMEOUT", "request_timeout_s", "3600", _SPAN, "Longest wait for an answer's first byte"),
    Setting(TIMES, "STREAM_IDLE_TIMEOUT", "stream_idle_timeout_s", "600", _SPAN,
            "A stream that says nothing for so long is cut"),
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

DEFAULT_FLAG = "VLLM_DEFAULT_"
OURS = frozenset(name for s in SETTINGS if not s.for_engine for name in (s.name, *s.older))
FLAG_PARSERS = {s.name: s.parse for s in SETTINGS if s.section == FLAGS}
PROXIES = frozenset(name for base in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY")
                     for name in (base, base.lower()))
ENGINE_NAMES = PROXIES | {"PATH", "TMPDIR", "HOME", "LANG", "TZ", "LD_LIBRARY_PATH", "LD_PRELOAD", "SSL_CERT_FILE",
                            "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"}
ENGINE_PREFIXES = ("HF_", "HUGGING_FACE_", "HUGGINGFACE_", "TRANSFORMERS_", "TOKENIZERS_", "CUDA_", "NVIDIA_",
                    "NCCL_", "GLOO_", "UCX_", "TORCH_", "TORCHINDUCTOR_", "PYTORCH_", "TRITON_", "FLASHINFER_",
                    "LMCACHE_", "OMP_", "MKL_", "RAY_", "XDG_", "SIMULATOR_", "VLLM_")
OF_THE_CLIENT = frozenset({"VLLM_SERVER_URL", "VLLM_SERVER_API_KEY", "VLLM_SERVER_HOME"})
"""Variables of the command vllm-server, which may have started the daemon.  A key is among them: engines get none."""
# The engine would demand this key from the daemon, which has no use for it: keys are checked once, at the door.
REFUSED = {"VLLM_API_KEY": "is the engine's own key; the daemon checks keys itself: set API_KEYS"}
