"""The short way of nearly all requests: a POST to a path whose body names a model.

What Flask does for one (its URL map, two contexts and proxies to them, a session, signals) is a quarter of what the
daemon spends on it, and nothing here needs that.  So these paths are looked up before Flask is asked; the view, what
happens before and after it, and the answer to an error are the same either way.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any

from flask import Request, Response

Wsgi = Callable[..., Iterable[bytes]]


@dataclass(frozen=True)
class Steps:
    """What happens to every request around its view."""

    before: Callable[[Request], Response | None]    # the answer, if it is one already; raises what the client is told
    error: Callable[[Request, Exception], Response]
    after: Callable[[Request, Response], Response]


class Shortcut:
    """A WSGI application: POST to one of `paths` goes to `view`, everything else to `others`."""

    def __init__(self, others: Wsgi, paths: Collection[str], view: Callable[[Request], Response],
                 steps: Steps) -> None:
        self._others = others
        self._paths = frozenset(paths)
        self._view = view
        self._steps = steps

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        if environ["PATH_INFO"] in self._paths and environ["REQUEST_METHOD"] == "POST":
            return self._answer(Request(environ))(environ, start_response)
        return self._others(environ, start_response)

    def _answer(self, incoming: Request) -> Response:
        try:
            answered = self._steps.before(incoming)
            response = self._view(incoming) if answered is None else answered
        except Exception as error:
            response = self._steps.error(incoming, error)
        return self._steps.after(incoming, response)
