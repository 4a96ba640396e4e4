"""Keys that clients send: who they are, what they may do, how much.  Pure but for reading the files that hold them.

A key stands in API_KEYS or ADMIN_API_KEYS (separated by commas), or in the file of API_KEYS_FILE or ADMIN_API_KEYS_FILE
(one a line, `#` begins a comment), as `KEY`, `NAME:KEY`, `sha256:HEX` or `NAME:sha256:HEX`; or in config.yaml under
`proxy.keys`, where it may have limits too.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from configuration.text_file import read_text
from errors import ConfigError

_NAMED = re.compile(r"(?:(?P<name>[A-Za-z][\w.-]{0,63}):)?(?P<key>[!-~]+)", re.ASCII)
_DIGEST = re.compile(r"sha256:([0-9a-fA-F]{64})")


@dataclass(frozen=True)
class Key:
    """`digest` is the key's SHA-256; `plain` the key itself, where it is known.  None: no limit."""

    name: str
    digest: bytes = field(repr=False)
    plain: str | None = field(default=None, repr=False)
    models: tuple[str, ...] | None = None           # names, with * as in file names
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None            # of prompts and answers, as engines report them
    concurrent_requests: int | None = None

    def is_key(self, given: str) -> bool:
        """In constant time: how long it takes tells nothing."""
        return hmac.compare_digest(digest(given), self.digest)

    def may_use(self, names: Iterable[str]) -> bool:
        """Whether one of these names of a model is among its `models`."""
        return self.models is None or any(fnmatchcase(name, pattern) for name in names for pattern in self.models)


def digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


def parse_key(text: str, *, name: str | None = None, **limits: Any) -> Key:
    """With a `name`, all of `text` is the key.  Raises ValueError, which does not show it."""
    found = _NAMED.fullmatch(text)
    if found is None:
        raise ValueError("a key may hold printable ASCII characters only, and no space")
    whole = name is not None or found["name"] == "sha256"
    named, key = (None, text) if whole else (found["name"], found["key"])
    hashed = _DIGEST.fullmatch(key)
    if key.startswith("sha256:") and hashed is None:
        raise ValueError("sha256: is followed by 64 hexadecimal digits")
    if not hashed and key in (name or named or ""):
        raise ValueError("a key must not stand in its own name, which logs show")
    value = bytes.fromhex(hashed[1]) if hashed else digest(key)
    return Key(name=name or named or f"key-{value.hex()[:8]}", digest=value, plain=None if hashed else key, **limits)


def parse_keys(text: str) -> tuple[Key, ...]:
    """Those of a setting, separated by commas.  Raises ValueError."""
    keys = tuple(parse_key(one.strip()) for one in text.split(",") if one.strip())
    if not keys:      # else one stray comma would open the door that a key was meant to close
        raise ValueError("expected one or more keys separated by commas")
    return checked(keys)


def read_keys(path: Path) -> tuple[Key, ...]:
    """Those of a file.  Raises ConfigError with file and line; a file without a key is one too."""
    keys: list[Key] = []
    for number, line in enumerate(read_text(path).splitlines(), 1):
        text = line.strip()
        if text and not text.startswith("#"):
            try:
                keys = [*checked([*keys, parse_key(text)])]
            except ValueError as error:
                raise ConfigError(f"{path}:{number}", str(error)) from None
    if not keys:
        raise ConfigError(str(path), "holds no key")
    return tuple(keys)


def key_of_entry(entry: Mapping[str, Any], home: Path) -> Key:
    """One of `proxy.keys`, already checked against the schema.  Raises ValueError, and ConfigError for its file."""
    limits = {name: entry.get(name) for name in ("requests_per_minute", "tokens_per_minute", "concurrent_requests")}
    models = None if entry.get("models") is None else tuple(entry["models"])
    if "key_file" in entry:
        path = home / Path(entry["key_file"].removeprefix("~/"))
        (key, *more) = read_keys(path)
        if more:
            raise ValueError(f"{path} holds more than one key")
        return Key(name=entry["name"], digest=key.digest, plain=key.plain, models=models, **limits)
    text = f"sha256:{entry['sha256']}" if "sha256" in entry else entry["key"]
    return parse_key(text, name=entry["name"], models=models, **limits)


def checked(keys: Iterable[Key]) -> tuple[Key, ...]:
    """Raises ValueError when two have one name, or are one key."""
    keys = tuple(keys)
    for index, key in enumerate(keys):
        for other in keys[:index]:
            if key.digest == other.digest:
                raise ValueError(f"the key {other.name} is given twice")
            if key.name == other.name:
                raise ValueError(f"two keys are named {key.name}")
    return keys
