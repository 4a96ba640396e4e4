"""The page at `/`: files as they are, for everyone.  What it shows it asks of the API, like any other client."""

from __future__ import annotations

import hashlib
import mimetypes
from functools import cache
from pathlib import Path

from flask import Blueprint, Response, request

from errors import NotFound

blueprint = Blueprint("page", __name__)

FOLDER = Path(__file__).resolve().parent / "dashboard"
INDEX = "index.html"
TYPES = frozenset({".html", ".css", ".js", ".svg"})
HEADERS = {
    # Nothing but these files, nothing inline, no text that becomes HTML: what an engine or a model says is only text.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
                               "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
                               "require-trusted-types-for 'script'; trusted-types 'none'",
    "X-Content-Type-Options": "nosniff", "X-Frame-Options": "DENY", "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin", "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), microphone=(), geolocation=()",
    "Cache-Control": "no-cache"}     # asked for again each time, and answered with 304


@cache
def files() -> dict[str, tuple[bytes, str, str]]:
    """Name -> content, type, tag.  Only what lies there is served, whatever a path says."""
    found = {}
    for path in FOLDER.iterdir():
        if path.suffix in TYPES:
            content = path.read_bytes()
            kind = mimetypes.guess_type(path.name)[0] or "text/plain"
            found[path.name] = content, f"{kind}; charset=utf-8", hashlib.sha256(content).hexdigest()[:32]
    return found


@blueprint.get("/")
def index() -> Response:
    return _answer(INDEX)


@blueprint.get("/dashboard/<file>")
def part(file: str) -> Response:
    if file not in files():
        raise NotFound(f"the page has no file {file[:64]!r}", code="route_not_found")
    return _answer(file)


def _answer(name: str) -> Response:
    content, kind, tag = files()[name]
    response = Response(content, content_type=kind, headers=HEADERS)
    response.set_etag(tag)
    response.make_conditional(request)      # it is this response that it changes
    return response
