"""Pages of other origins that may ask for inference (CORS_ORIGINS).  None may unless it is set, and none may manage.

The engines' own CORS headers, which allow every page, are never passed on.
"""

from __future__ import annotations

import re

from flask import Response

from config import Settings
from routing.forwarding import CORS
from routing.incoming import Incoming
from web.auth import is_management

EXPOSED = "X-Request-Id, Retry-After"
METHODS = "GET, POST, DELETE, OPTIONS"
MAX_AGE_S = 600
_NAMES = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+(?: *, *[A-Za-z0-9!#$%&'*+.^_`|~-]+){0,63}")


def begin(request: Incoming, settings: Settings) -> Response | None:
    """Note what a page's browser is to be told with the answer; a preflight is answered here, before any key: it has
    none."""
    origin = request.headers.get("Origin")
    if not settings.cors_origins or origin is None or is_management(request.path):
        return None
    everyone = "*" in settings.cors_origins
    if not everyone and origin.lower() not in settings.cors_origins:
        return None
    headers = [("Access-Control-Allow-Origin", "*" if everyone else origin), ("Vary", "Origin")]
    request.environ[CORS] = [*headers, ("Access-Control-Expose-Headers", EXPOSED)]
    if request.method != "OPTIONS" or "Access-Control-Request-Method" not in request.headers:
        return None
    headers += [("Access-Control-Allow-Methods", METHODS), ("Access-Control-Max-Age", str(MAX_AGE_S))]
    wanted = request.headers.get("Access-Control-Request-Headers", "").strip()
    if _NAMES.fullmatch(wanted):        # whatever an SDK adds; no cookies and no stored password go along in any case
        headers.append(("Access-Control-Allow-Headers", wanted))
    return Response(status=204, headers=headers)


def end(request: Incoming, response: Response) -> None:
    """Of an answer of our own: an engine's has them already (routing/forwarding.py)."""
    for name, value in request.environ.get(CORS, ()):
        response.headers[name] = value
