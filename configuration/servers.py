"""The vLLM servers on other machines, as `servers.toml` lists them; every mistake is named with its line.

    [servers]
    servers = [
        { url = "http://gpu-server-1:8081", max_concurrent_requests = 3 },
    ]
    [config]
    health_check_interval = 10
    request_timeout = 120
    max_retries = 3
"""

from __future__ import annotations

import difflib
import math
import re
import ssl
import tomllib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any
from urllib.parse import SplitResult, urlsplit

from configuration.servers_lines import Lines
from configuration.text_file import read_text
from errors import ConfigError

FILE = "servers.toml"
MAX_SERVERS = 10_000
OTHERS = frozenset({
    "config_reload_interval", "health_check_timeout", "failure_threshold", "auto_recovery_threshold",
    "enable_active_health_check", "health_check_max_response_time", "health_check_min_success_rate",
    "health_check_window_size", "health_check_consecutive_failures"})
"""Keys of [config] that mvllm has beyond the three: its files are read too, with a warning that these do nothing."""
SERVER_KEYS: Mapping[str, tuple[str | None, str]] = MappingProxyType({
    "url": (None, "Its address, without /v1"),
    "max_concurrent_requests": (None, "What its load is measured by; more than these are sent only when all are full"),
    "models": ("null", "What it serves; without it, its own /v1/models is asked now and then"),
    "api_key": ("null", "Sent to it as Authorization: Bearer ..."),
    "api_key_env": ("null", "The environment variable that holds that key; not beside api_key"),
    "weight": ("1.0", "Of two servers with equal capacity, 2.0 gets twice the requests of 1.0; 0.001 to 1000"),
    "headers": ("{}", "More headers for it"),
    "tls": ("{ verify = true }", "Of an https:// address: how its certificate is checked"),
})
"""Of an entry of `servers`: default (None: required) and meaning."""
TLS_KEYS: Mapping[str, tuple[str | None, str]] = MappingProxyType({
    "verify": ("true", "Whether its certificate is checked"),
    "ca": ("null", "PEM file of the authorities that it is checked against; null: the system's"),
})
CONFIG_KEYS: Mapping[str, tuple[str | None, str]] = MappingProxyType({
    "health_check_interval": ("10", "Seconds between two checks of a server; 0.1 to 86400"),
    "request_timeout": ("120", "Seconds to an answer's first byte, all tries together"),
    "max_retries": ("3", "How often a request that failed is sent elsewhere, 0 to 100"),
})
_NOTHING: Mapping[str, str] = MappingProxyType({})
_PORTS = {"http": 80, "https": 443}
_HEADER = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")
_VALUE = re.compile(r"[\x20-\x7e]*")
_NOT_SETTABLE = frozenset({"host", "content-length", "content-type", "transfer-encoding", "connection", "keep-alive",
                           "te", "trailer", "upgrade", "expect", "via", "x-request-id", "proxy-connection"})
"""Headers that the daemon sets itself, or that belong to one connection."""


@dataclass(frozen=True)
class ServerConfig:
    """One server.  `url` has no slash at its end, and tells it from the others."""

    url: str
    max_concurrent_requests: int                        # what it is measured by: 100 % of its capacity
    models: tuple[str, ...] | None = None               # None: its own /v1/models says
    weight: float = 1.0                                 # of two with equal capacity, 2.0 gets twice what 1.0 gets
    api_key: str | None = field(default=None, repr=False)
    headers: Mapping[str, str] = field(default_factory=lambda: _NOTHING, repr=False)
    verify: bool = True                                 # the certificate of an https:// server
    ca: Path | None = None                              # against these authorities; None: the system's

    @property
    def name(self) -> str:
        """Host and port, for people and labels; with the path if there is one."""
        return self.url.partition("://")[2]


@dataclass(frozen=True)
class ServersConfig:
    """The whole file.  `file` is None when there is none."""

    servers: tuple[ServerConfig, ...] = ()
    health_check_interval_s: float = 10.0
    request_timeout_s: float = 120.0                    # to an answer's first byte, all tries together
    max_retries: int = 3
    file: Path | None = None
    key_variables: frozenset[str] = frozenset()         # environment variables that hold keys
    warnings: tuple[str, ...] = ()


def read_servers(path: Path, environ: Mapping[str, str]) -> ServersConfig:
    """Raises ConfigError with file and line.  `environ` holds what `api_key_env` names."""
    return parse_servers(read_text(path), path, environ)


def parse_servers(text: str, path: Path, environ: Mapping[str, str]) -> ServersConfig:
    """As `read_servers`.  Touches the disk only for the files that `tls` names."""
    try:
        document = tomllib.loads(text.replace("\r\n", "\n"))
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise _syntax_error(error, text, path) from None
    return _Reader(Lines(text), path, environ).file(document)


def _syntax_error(error: Exception, text: str, path: Path) -> ConfigError:
    found = re.fullmatch(r"(.*?) \(at (?:line (\d+), column \d+|end of document)\)", str(error), re.DOTALL)
    if found is None:
        return ConfigError(str(path), f"is not valid TOML: {error or 'nested too deep'}")
    line = int(found[2]) if found[2] else text.rstrip().count("\n") + 1
    return ConfigError(f"{path}:{line}", f"is not valid TOML: {found[1]}")


class _Reader:
    """From the document to the values.  `index` None stands for what is not in a server's entry."""

    def __init__(self, lines: Lines, path: Path, environ: Mapping[str, str]) -> None:
        self._lines = lines
        self._path = path
        self._environ = environ

    def file(self, document: Mapping[str, Any]) -> ServersConfig:
        self._known(document, ("servers", "config"), None)
        listed = self._table(document, "servers")
        self._known(listed, ("servers",), "servers")
        config = self._table(document, "config")
        idle = sorted(config.keys() & OTHERS)
        self._known(config, (*CONFIG_KEYS, *idle), "config")
        entries = listed.get("servers", [])
        if not isinstance(entries, list) or len(entries) > MAX_SERVERS:
            raise self._error("servers", "servers", f"expected a list of at most {MAX_SERVERS} servers")
        servers = tuple(self._server(index, entry) for index, entry in enumerate(entries))
        self._no_duplicates(servers)
        return ServersConfig(
            servers, file=self._path,
            key_variables=frozenset(entry["api_key_env"] for entry in entries if "api_key_env" in entry),
            warnings=(f"{self._path}: {', '.join(idle)} of [config] has no effect here",) if idle else (),
            health_check_interval_s=self._number(config, "health_check_interval", "config", 10.0, 0.1, 86400),
            request_timeout_s=self._number(config, "request_timeout", "config", 120.0, 0.1, 10 ** 6),
            max_retries=self._whole(config, "max_retries", "config", 0, 100, 3))

    def _server(self, index: int, entry: object) -> ServerConfig:
        if not isinstance(entry, Mapping):
            raise self._error(index, None, "expected { url = \"http://HOST:PORT\", max_concurrent_requests = N }")
        self._known(entry, SERVER_KEYS, index)
        url = self._url(entry, index)
        verify, ca = self._tls(entry, index, url)
        api_key = self._api_key(entry, index)
        return ServerConfig(
            url=url, max_concurrent_requests=self._whole(entry, "max_concurrent_requests", index, 1, 10 ** 6),
            models=self._models(entry, index), weight=self._number(entry, "weight", index, 1.0, 0.001, 1000),
            api_key=api_key, headers=self._headers(entry, index, api_key), verify=verify, ca=ca)

    def _no_duplicates(self, servers: tuple[ServerConfig, ...]) -> None:
        first: dict[str, int] = {}
        for index, server in enumerate(servers):
            if server.url in first:
                raise self._error(index, "url", f"{server.url} is listed twice, first in line "
                                  f"{self._lines.of(first[server.url], 'url')}")
            first[server.url] = index

    # --- one value each -------------------------------------------------------------------------------------------

    def _url(self, entry: Mapping[str, Any], index: int) -> str:
        text = self._text(entry, "url", index)
        if text is None:
            raise self._error(index, None, "a server needs its url, such as \"http://gpu-server-1:8081\"")
        parts, problem = _split(text)
        if problem is not None:
            raise self._error(index, "url", f"url = {text[:100]!r}: {problem}")
        assert parts is not None and parts.hostname is not None
        host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
        return f"{parts.scheme}://{host}:{parts.port or _PORTS[parts.scheme]}{parts.path.rstrip('/')}"

    def _models(self, entry: Mapping[str, Any], index: int) -> tuple[str, ...] | None:
        models = entry.get("models")
        if models is None:
            return None
        if not isinstance(models, list) or not models or not all(isinstance(one, str) and one for one in models):
            raise self._error(index, "models", "models: expected a list of names; leave it out and the server is asked")
        return tuple(dict.fromkeys(models))

    def _api_key(self, entry: Mapping[str, Any], index: int) -> str | None:
        key, variable = self._text(entry, "api_key", index), self._text(entry, "api_key_env", index)
        if variable is not None:
            if key is not None:
                raise self._error(index, "api_key_env", "give api_key or api_key_env, not both")
            key = self._environ.get(variable)
            if not key:
                raise self._error(index, "api_key_env", f"the environment variable {variable[:80]} is not set")
        if key is not None and not re.fullmatch(r"[!-~]+", key):
            raise self._error(index, "api_key" if variable is None else "api_key_env",
                              "the key is empty or holds a character that no header can carry")
        return key

    def _headers(self, entry: Mapping[str, Any], index: int, api_key: str | None) -> Mapping[str, str]:
        headers = entry.get("headers", {})
        if not isinstance(headers, Mapping):
            raise self._error(index, "headers", "headers: expected { Name = \"value\" }")
        for name, value in headers.items():
            if not _HEADER.fullmatch(name) or not isinstance(value, str) or not _VALUE.fullmatch(value):
                raise self._error(index, "headers", f"headers: {name[:80]!r} and its value cannot be a header")
            if name.lower() in _NOT_SETTABLE or (name.lower() == "authorization" and api_key is not None):
                raise self._error(index, "headers", f"headers: {name} is set by the daemon itself")
        return MappingProxyType(dict(headers))

    def _tls(self, entry: Mapping[str, Any], index: int, url: str) -> tuple[bool, Path | None]:
        tls = entry.get("tls")
        if tls is None:
            return True, None
        if not isinstance(tls, Mapping) or not url.startswith("https://"):
            raise self._error(index, "tls", "tls: expected { verify = true, ca = \"FILE\" }, of an https:// url")
        self._known(tls, TLS_KEYS, index)
        verify, ca = tls.get("verify", True), tls.get("ca")
        if not isinstance(verify, bool):
            raise self._error(index, "verify", f"verify = {verify!r}: expected true or false")
        if ca is None:
            return verify, None
        if not isinstance(ca, str) or not verify:
            raise self._error(index, "ca", "ca: expected the name of a PEM file, and not beside verify = false")
        path = self._path.parent / Path(ca).expanduser()
        try:
            ssl.create_default_context(cafile=str(path))
        except (OSError, ssl.SSLError) as error:
            raise self._error(index, "ca", f"ca = {ca!r}: {getattr(error, 'strerror', None) or error}") from None
        return verify, path

    # --- kinds of values ------------------------------------------------------------------------------------------

    def _table(self, document: Mapping[str, Any], name: str) -> Mapping[str, Any]:
        found = document.get(name, {})
        if not isinstance(found, Mapping):
            raise self._error(None, name, f"expected a table: [{name}]")
        return found

    def _known(self, found: Mapping[str, Any], known: Collection[str], place: str | int | None) -> None:
        for name in found:
            if name not in known:
                near = difflib.get_close_matches(name, known, 1, 0.6)
                raise self._error(place, name, f"unknown key {name[:80]!r}; "
                                  + (f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known)}"))

    def _text(self, found: Mapping[str, Any], name: str, place: str | int) -> str | None:
        value = found.get(name)
        if value is not None and not isinstance(value, str):
            raise self._error(place, name, f"{name} = {value!r:.80}: expected a text in quotes")
        return value

    def _whole(self, found: Mapping[str, Any], name: str, place: str | int, low: int, high: int,
               default: int | None = None) -> int:
        value = found.get(name, default)
        if value is None:
            raise self._error(place, None, f"{name} is missing: how many requests at once the server is meant for")
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self._error(place, name, f"{name} = {value!r:.80}: expected a whole number from {low} to {high}")
        return value

    def _number(self, found: Mapping[str, Any], name: str, place: str | int, default: float, low: float,
                high: float) -> float:
        value = found.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value) \
                or not low <= value <= high:
            raise self._error(place, name, f"{name} = {value!r:.80}: expected a number from {low:g} to {high:g}")
        return float(value)

    def _error(self, place: str | int | None, name: str | None, message: str) -> ConfigError:
        return ConfigError(f"{self._path}:{self._lines.of(place, name)}", message)


def _split(text: str) -> tuple[SplitResult | None, str | None]:
    """The parts of a server's address, and what is wrong with it."""
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError as error:
        return None, str(error)
    if parts.scheme not in _PORTS or "://" not in text:
        return None, "it must begin with http:// or https://"
    if not parts.hostname or not re.fullmatch(r"[!-~]+", text) or port == 0:
        return None, "expected http://HOST:PORT"
    if parts.username is not None or parts.password is not None:
        return None, "an address holds no password: use api_key, api_key_env or headers"
    if parts.query or parts.fragment or "?" in text or "#" in text:
        return None, "it must end with the path, without ? or #"
    if parts.path.rstrip("/").endswith("/v1"):
        return None, "leave out /v1 at its end: the paths of requests are appended to it"
    return parts, None
