"""Who may call what.  Decided once, before any view runs.

Inference needs one of API_KEYS (or an admin key) when any is set.  Management needs one of ADMIN_API_KEYS; when none
is set, it is for clients on this machine only.  A browser page of another origin may never manage.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable
from urllib.parse import urlsplit

from config import Key, Settings
from errors import BadRequest, Forbidden, Unauthorized, UnsupportedMediaType
from routing.incoming import Incoming
from routing.limits import CALLER
from routing.paths import ADAPTERS

HOW = "send it as 'Authorization: Bearer KEY'"
OPEN = frozenset({"/", "/health", "/ping", "/version", "/load-stats", "/metrics", "/prometheus/targets",
                  "/openapi.json"})
OPEN_FOLDER = "/dashboard/"     # the files of the page: it asks for a key itself, and shows nothing without
MANAGEMENT = ("/instances", "/admin", "/gpus")
_BELOW = tuple(f"{path}/" for path in MANAGEMENT)
FORM_TYPES = frozenset({"application/x-www-form-urlencoded", "multipart/form-data", "text/plain"})
"""What a page of any origin may send without asking first."""
_HOST = re.compile(r"[A-Za-z0-9._~%-]*(:[0-9]*)?|\[[0-9A-Za-z:.%]+\](:[0-9]*)?")
FORWARDED = ("X-Forwarded-For", "X-Forwarded-Host", "X-Real-Ip", "Forwarded", "Via")


def check(request: Incoming, settings: Settings) -> None:
    """Raises Unauthorized (no key, a wrong one) or Forbidden.  Notes whose key it was, see `caller`."""
    _check_host(request)
    path, everyone = request.path, (*settings.admin_api_keys, *settings.api_keys)
    key = request.environ[CALLER] = _find_key(request, everyone)
    if is_management(path):
        _check_origin(request)
        if not settings.admin_api_keys:
            _check_local(request)
        elif key not in settings.admin_api_keys:
            raise Unauthorized(f"management needs an admin key: {HOW}")
        if request.mimetype in FORM_TYPES and request.method not in ("GET", "HEAD"):
            raise UnsupportedMediaType("management takes no forms: send the body as application/json",
                                       param="Content-Type")
        return
    if request.headers.get("Upgrade") is not None:
        _check_socket_origin(request, settings)
    if not is_open(path) and settings.api_keys and key is None:
        raise Unauthorized(f"this server needs a key: {HOW}")


def _check_host(request: Incoming) -> None:
    """Raises BadRequest where it is missing or none (RFC 9112, 3.2): servers on the way may read another one."""
    host = request.environ.get("HTTP_HOST")
    if host is None:
        if request.environ.get("SERVER_PROTOCOL") == "HTTP/1.1":
            raise BadRequest("the Host header is missing", param="Host", code="invalid_host")
    elif _HOST.fullmatch(host) is None:
        raise BadRequest("the Host header holds no name and no address", param="Host", code="invalid_host")


def caller(request: Incoming) -> Key | None:
    """Whose key came with it; None without a key, or with one that is not known where none is needed."""
    return request.environ.get(CALLER)


def is_open(path: str) -> bool:
    return path in OPEN or path.startswith(OPEN_FOLDER)


def is_management(path: str) -> bool:
    """Also an adapter's route behind /proxy: whoever may load one may run code of its choice."""
    if path.startswith("/proxy/"):
        return path.rstrip("/").endswith(ADAPTERS)
    return path in ADAPTERS or path in MANAGEMENT or path.startswith(_BELOW)


def given_key(request: Incoming) -> str:
    """The key of `Authorization: Bearer` or, as Anthropic's SDK sends it, `x-api-key`; empty when there is none."""
    scheme, _, value = request.headers.get("Authorization", "").partition(" ")
    return value.strip() if scheme.lower() == "bearer" else request.headers.get("X-Api-Key", "")


def who(request: Incoming) -> str:
    """Who sent it, for logs: the key's name, which gives none of it away."""
    key = caller(request)
    return key.name if key is not None else "a wrong key" if given_key(request) else "no key"


def _find_key(request: Incoming, keys: Iterable[Key]) -> Key | None:
    """The one that came with it.  All are compared, so that the time it takes does not tell which it was."""
    given = given_key(request)
    found = [key for key in keys if key.is_key(given)]
    return found[0] if found else None


def _check_local(request: Incoming) -> None:
    if not _is_loopback(request.remote_addr) or any(name in request.headers for name in FORWARDED):
        raise Forbidden("management is for clients on this machine as long as ADMIN_API_KEYS is not set; set it to "
                        "manage from elsewhere", code="management_is_local")
    if not _is_own_host(request.headers.get("Host", "")):
        raise Forbidden("the Host header names neither localhost nor an address: a page may have rebound a name to "
                        "this machine", code="host_not_allowed")


def _check_socket_origin(request: Incoming, settings: Settings) -> None:
    """Browsers let every page open WebSockets to everywhere, and leave it to the server."""
    origin = request.headers.get("Origin")
    allowed = settings.cors_origins or ()
    if origin is not None and origin != f"{request.scheme}://{request.headers.get('Host', '')}" \
            and "*" not in allowed and origin.lower() not in allowed:
        raise Forbidden("pages of another origin may not open WebSockets here; CORS_ORIGINS names those that may",
                        code="cross_origin")


def _check_origin(request: Incoming) -> None:
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
