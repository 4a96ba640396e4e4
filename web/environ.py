"""A request's environ (PEP 3333) from what gunicorn's parser read of it.

gunicorn's own makes everything anew for each request, and half of it for nobody here: early hints, the PROXY protocol,
SCRIPT_NAME, a logger.  It takes longer than the parser itself.
"""

from __future__ import annotations

import socket
import sys
from functools import lru_cache
from typing import Any

from gunicorn.http import wsgi
from gunicorn.util import unquote_to_wsgi_str

HEADERS = "vllm_server.headers"     # in the environ: (name in upper case, value), as they came
_SAME: dict[str, Any] = {
    "wsgi.errors": sys.stderr, "wsgi.version": (1, 0), "wsgi.multithread": True, "wsgi.multiprocess": False,
    "wsgi.run_once": False, "wsgi.input_terminated": True, "SERVER_SOFTWARE": wsgi.SERVER_SOFTWARE, "SCRIPT_NAME": ""}


def environ_of(request: Any, sock: socket.socket, client: tuple[Any, ...], server: tuple[Any, ...]) -> dict[str, Any]:
    """`request` is a parser's; `client` and `server` are addresses of sockets."""
    major, minor = request.version
    environ = {
        **_SAME, "wsgi.input": request.body, "wsgi.url_scheme": request.scheme, "gunicorn.socket": sock,
        "REQUEST_METHOD": request.method, "PATH_INFO": _path_info(request.path), "QUERY_STRING": request.query,
        "RAW_URI": request.uri, "SERVER_PROTOCOL": f"HTTP/{major}.{minor}", "REMOTE_ADDR": client[0],
        "REMOTE_PORT": str(client[1]), "SERVER_NAME": server[0], "SERVER_PORT": str(server[1]),
        HEADERS: request.headers}
    for name, value in request.headers:
        key = key_of(name)
        environ[key] = f"{environ[key]},{value}" if key in environ else value
    return environ


@lru_cache(maxsize=256)
def key_of(name: str) -> str:
    """Of a header in the environ, by its name in upper case.  One with an underscore never comes here: the parser
    drops it, as it could be taken for another."""
    key = name.replace("-", "_")
    return key if key in ("CONTENT_TYPE", "CONTENT_LENGTH") else f"HTTP_{key}"


def _path_info(path: str) -> str:
    decoded: str = path if path.isascii() and "%" not in path else unquote_to_wsgi_str(path)
    return decoded
