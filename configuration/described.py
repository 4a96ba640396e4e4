"""What the settings came to, for `app.py --check`: values that JSON can hold, no secret among them.  Pure."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from configuration.openness import left_open
from configuration.settings_table import SETTINGS


def described(values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` are the fields of config.Settings; settings that only the engine reads are those of its environment."""
    given = {setting.name: values[setting.field] if setting.field else values["engine_env"].get(setting.name)
             for setting in SETTINGS if setting.field or setting.for_engine}
    secrets = {setting.name for setting in SETTINGS if setting.secret}
    secrets |= {name for name, one in given.items() if name.endswith("_PROXY") and "@" in str(one)}     # user:password@
    return {"settings": {name: _hidden(one) if name in secrets else _plain(name, one) for name, one in given.items()},
            "config_file": _plain("", values["config_file"]), "models": values["catalog"].names(),
            "servers": [server.url for server in values["servers"].servers],
            "warnings": list(values["warnings"]), "open": list(left_open(values))}


def _hidden(value: Any) -> str | None:
    return "***" if value else None


def _plain(name: str, value: Any) -> Any:
    """In the unit of its name."""
    if name.endswith("_MB") and value is not None:
        return value >> 20
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, tuple | frozenset):
        return list(value)
    return value
