"""What the settings leave open to others, in sentences for the log and for `doctor`.  Pure."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from typing import Any


def left_open(values: Mapping[str, Any]) -> tuple[str, ...]:
    """`values` are the fields of config.Settings.  Nothing for a daemon that only this machine reaches."""
    host, port = values["host"], values["port"]
    if is_loopback(host):
        return ()
    found = []
    if not values["api_keys"]:
        found.append(f"Inference is OPEN: whoever reaches {host} port {port} may use every model, for no API_KEYS are "
                     "set. Set them, or APP_HOST=127.0.0.1.")
    if not values["admin_api_keys"]:
        found.append("Management is open to every user and program of this machine, and to no other machine, for no "
                     "ADMIN_API_KEYS are set.")
    if values["cors_origins"] and "*" in values["cors_origins"] and not values["api_keys"]:
        found.append("CORS_ORIGINS=* without API_KEYS: every page that a browser here opens may use every model.")
    return tuple(found)


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
