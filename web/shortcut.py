"""The short way of nearly all requests: a POST to a path whose body names a model.

What Flask does for one (its URL map, two contexts and proxies to them, a session, signals, werkzeug's request and
response) is half of what the daemon spends on it, and nothing here needs that.  So these paths are looked up before
Flask is asked; the view, what happens before and after it, and the answer to an error are the same either way.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, overload

from flask import Response

from routing.incoming import Incoming
from routing.reply import Reply
from web.environ import HEADERS, key_of

Wsgi = Callable[..., Iterable[bytes]]


@dataclass(frozen=True)
class Steps:
    """What happens to every request around its view."""

    before: Callable[[Incoming], Response | None]   # the answer, if it is one already; raises what the client is told
    error: Callable[[Incoming, Exception], Response]
    after: Callable[[Incoming, Response | Reply], None]


class Shortcut:
    """A WSGI application: POST to one of `paths` goes to `view`, everything else to `others`."""

    def __init__(self, others: Wsgi, paths: Collection[str], view: Callable[[Incoming], Response | Reply],
                 steps: Steps) -> None:
        self._others = others
        self._paths = frozenset(paths)
        self._view = view
        self._steps = steps

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        if environ["PATH_INFO"] in self._paths and environ["REQUEST_METHOD"] == "POST":
            return self._answer(Brief(environ))(environ, start_response)
        return self._others(environ, start_response)

    def _answer(self, incoming: Incoming) -> Response | Reply:
        answer: Response | Reply | None
        try:
            if (answer := self._steps.before(incoming)) is None:
                answer = self._view(incoming)
        except Exception as error:
            answer = self._steps.error(incoming, error)
        self._steps.after(incoming, answer)
        return answer


class BriefHeaders:
    """The headers in an environ, read there when they are asked for."""

    __slots__ = ("_environ",)

    def __init__(self, environ: dict[str, Any]) -> None:
        self._environ = environ

    @overload
    def get(self, key: str) -> str | None: ...

    @overload
    def get(self, key: str, default: str) -> str: ...

    def get(self, key: str, default: str | None = None) -> str | None:
        value: str | None = self._environ.get(_environ_key(key), default)
        return value

    def __contains__(self, key: str) -> bool:
        return _environ_key(key) in self._environ

    def __iter__(self) -> Iterator[tuple[str, str]]:
        """Repeated ones as they came, one by one."""
        return iter([(_title(name), value) for name, value in self._environ[HEADERS]])


class Brief:
    """A request, as far as the steps and the router look at it."""

    __slots__ = ("environ", "headers", "method", "path")

    def __init__(self, environ: dict[str, Any]) -> None:
        self.environ = environ
        self.headers = BriefHeaders(environ)
        self.method: str = environ["REQUEST_METHOD"]
        self.path: str = environ["PATH_INFO"]       # one of few: nothing in it is to be decoded

    @property
    def remote_addr(self) -> str | None:
        address: str | None = self.environ.get("REMOTE_ADDR")
        return address

    @property
    def scheme(self) -> str:
        scheme: str = self.environ["wsgi.url_scheme"]
        return scheme

    @property
    def mimetype(self) -> str:
        return self.headers.get("Content-Type", "").partition(";")[0].strip().lower()


@lru_cache(maxsize=256)
def _environ_key(name: str) -> str:
    return key_of(name.upper())


@lru_cache(maxsize=256)
def _title(name: str) -> str:
    """As werkzeug writes them, too."""
    return name.title()
