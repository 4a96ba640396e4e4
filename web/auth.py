"""Who may call what.  Decided once, before any view runs.

Inference needs one of API_KEYS (or an admin key) when any is set.  Management needs one of ADMIN_API_KEYS; when none
is set, it is for clients on this machine only.  A browser page of another origin may never manage.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
from collections.abc import Collection
from urllib.parse import urlsplit

from flask import Request

from config import Settings
from errors import Forbidden, Unauthorized
from routing.paths import ADAPTERS

OPEN = frozenset({"/", "/health", "/ping", "/version", "/load-stats", "/metrics"})
MANAGEMENT = ("/instances", "/admin", "/gpus")
FORWARDED = ("X-Forwarded-For", "X-Forwarded-Host", "X-Real-Ip", "Forwarded", "Via")


def check(request: Request, settings: Settings) -> None:
    """Raises Unauthorized (no key, a wrong one) or Forbidden."""
    path = request.path
    if is_management(path):
        _check_origin(request)
        if settings.admin_api_keys:
            _check_key(request, settings.admin_api_keys, "management needs an admin key")
        else:
            _check_local(request)
    elif path not in OPEN and settings.api_keys:
        _check_key(request, settings.api_keys | settings.admin_api_keys, "this server needs a key")


def is_management(path: str) -> bool:
    """Also an adapter's route behind /proxy: whoever may load one may run code of its choice."""
    if path.startswith("/proxy/"):
        return path.rstrip("/").endswith(ADAPTERS)
    return path in ADAPTERS or any(path == prefix or path.startswith(prefix + "/") for prefix in MANAGEMENT)


def given_key(request: Request) -> str:
    """The key of `Authorization: Bearer` or, as Anthropic's SDK sends it, `x-api-key`; empty when there is none."""
    scheme, _, value = request.headers.get("Authorization", "").partition(" ")
    return value.strip() if scheme.lower() == "bearer" else request.headers.get("X-Api-Key", "")


def who(request: Request) -> str:
    """Who sent it, for logs: the beginning of its key's SHA-256, which tells keys apart and gives none away."""
    key = given_key(request)
    return f"key {hashlib.sha256(key.encode()).hexdigest()[:8]}" if key else "no key"


def _check_key(request: Request, keys: Collection[str], why: str) -> None:
    given = given_key(request).encode()
    # Every key is compared, each in constant time: how long it takes tells nothing.
    matches = [hmac.compare_digest(given, key.encode()) for key in keys]
    if not any(matches):
        raise Unauthorized(f"{why}: send it as 'Authorization: Bearer KEY'")


def _check_local(request: Request) -> None:
    if not _is_loopback(request.remote_addr) or any(name in request.headers for name in FORWARDED):
        raise Forbidden("management is for clients on this machine as long as ADMIN_API_KEYS is not set; set it to "
                        "manage from elsewhere", code="management_is_local")
    if not _is_own_host(request.headers.get("Host", "")):
        raise Forbidden("the Host header names neither localhost nor an address: a page may have rebound a name to "
                        "this machine", code="host_not_allowed")


def _check_origin(request: Request) -> None:
    origin = request.headers.get("Origin")
    if origin is not None and origin != f"{request.scheme}://{request.headers.get('Host', '')}":
        raise Forbidden("pages of another origin may not manage this server", code="cross_origin")
    if request.headers.get("Sec-Fetch-Site", "none") not in ("none", "same-origin"):
        raise Forbidden("pages of another site may not manage this server", code="cross_origin")


def _is_loopback(address: str | None) -> bool:
    try:
        parsed = ipaddress.ip_address(address or "")
    except ValueError:
        return False
    mapped = getattr(parsed, "ipv4_mapped", None)
    return parsed.is_loopback or (mapped is not None and mapped.is_loopback)


def _is_own_host(host: str) -> bool:
    """localhost, or an address: a name could have been rebound by whoever owns it, an address cannot."""
    try:
        name = urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return False
    if name == "localhost":
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
