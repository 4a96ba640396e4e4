"""Reads `.env`: every mistake has its line, and a name that nobody knows is one."""

from __future__ import annotations

import difflib
import io
import re
from collections.abc import Mapping
from pathlib import Path

from dotenv.parser import Binding, parse_stream
from dotenv.variables import parse_variables

from configuration.layers import Given, Layer, hint
from configuration.settings_table import (
    DEFAULT_FLAG,
    ENGINE_NAMES,
    ENGINE_PREFIXES,
    OURS,
    PROXIES,
    REFUSED,
    SETTINGS,
    unset,
)
from configuration.text_file import read_text
from errors import ConfigError

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def read_env_file(path: Path | None, cwd: Path, environ: Mapping[str, str]) -> Layer:
    """The file's variables, `${NAME}` and `${NAME:-default}` resolved as python-dotenv does; the last one wins."""
    wanted = path is not None
    path = cwd / ".env" if path is None else cwd / path
    if not wanted and not path.is_file():
        return {}
    found: dict[str, Given] = {}
    for binding in parse_stream(io.StringIO(read_text(path))):
        where = f"{path}:{_line_of(binding)}"
        if binding.error or (binding.key is not None and binding.value is None):
            raise ConfigError(where, "expected NAME=value (the rest of a quoted value, or the `=`, is missing)")
        if binding.key is None or binding.value is None:
            continue    # a comment or the blank end
        check_env_name(binding.key, where)
        known = {**environ, **{name: one.text for name, one in found.items()}}
        text = "".join(atom.resolve(known) for atom in parse_variables(binding.value))
        if "\0" in text:
            raise ConfigError(where, f"{binding.key} holds a NUL character")
        found[binding.key] = Given(text, where)
    return found


def _line_of(binding: Binding) -> int:
    """The parser counts the blank lines before a binding into it."""
    text = binding.original.string
    return binding.original.line + len(re.findall(r"\r\n|\n|\r", text[:len(text) - len(text.lstrip())]))


def check_env_name(name: str, where: str) -> None:
    if name in OURS:
        return
    if name in REFUSED:
        raise ConfigError(where, f"{name} {REFUSED[name]}")
    if name.startswith("VLLM_"):
        refuse_near_miss(name, where)
    elif name not in ENGINE_NAMES and not name.startswith(ENGINE_PREFIXES):
        known = OURS | {s.name for s in SETTINGS} | ENGINE_NAMES
        raise ConfigError(where, f"unknown setting {name}{hint(name, known)}")
    if not _NAME.fullmatch(name):
        raise ConfigError(where, f"{name!r:.80} is not the name of a variable")     # and no engine could be started


def refuse_near_miss(name: str, where: str) -> None:
    """vLLM has VLLM_* variables of its own, and any VLLM_DEFAULT_* is a flag; one typed almost like ours is a slip."""
    prefix = DEFAULT_FLAG if name.startswith(DEFAULT_FLAG) else ""
    ours = {known.removeprefix(prefix): known for known in OURS if known.startswith(prefix or "VLLM_")}
    if name not in OURS and (near := difflib.get_close_matches(name.removeprefix(prefix), ours, 1, 0.87)):
        raise ConfigError(where, f"unknown setting {name}; did you mean {ours[near[0]]}?")


def engine_variables(env_file: Layer, environ: Mapping[str, str]) -> dict[str, str]:
    """What .env holds for the engine, less what the environment sets already (a proxy in either case of letters)."""
    return {name: one.text for name, one in env_file.items()
            if name not in OURS and not name.startswith(DEFAULT_FLAG) and not unset(one.text)
            and name not in environ and not (name in PROXIES and {name.lower(), name.upper()} & environ.keys())}
