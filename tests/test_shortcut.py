"""web/shortcut.py: a request for a model is answered as Flask would, without Flask."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from flask import Flask, Request, current_app
from werkzeug.exceptions import BadRequest as HttpBadRequest
from werkzeug.test import Client, TestResponse

from app import Deps, create_app
from config import Settings, load_settings
from configuration.keys import parse_keys
from errors import RateLimited, UpstreamError
from routing import paths
from routing.incoming import Incoming
from routing.reply import Reply
from routing.upstream import ClientLeft
from web.environ import HEADERS
from web.shortcut import Brief, Shortcut

PATH = "/v1/chat/completions"
OPEN = load_settings({"HOME": "/nowhere"}, cwd=Path("/nowhere"))
KEYED = replace(OPEN, api_keys=parse_keys("user-1"))
SAID = {"X-Request-Id": "the-same"}
GOOD = Reply(200, [], [])


class FakeRouter:
    """Its view says, or raises, what it is told to, and notes by which way it was asked."""

    def __init__(self, outcome: Reply | Exception) -> None:
        self.outcome = outcome
        self.by_flask: list[bool] = []
        self.counted: list[int] = []
        self.observed = SimpleNamespace(answered=lambda about, status, now: self.counted.append(status))

    def view(self, incoming: Incoming) -> Reply:
        self.by_flask.append(bool(current_app))
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return self.outcome


def app_of(router: FakeRouter, settings: Settings = OPEN) -> Flask:
    deps = Deps(cast(Any, SimpleNamespace(settings=settings)), cast(Any, router), reloader=cast(Any, None),
                audit=cast(Any, SimpleNamespace(note=lambda *_: None)), live=cast(Any, None))
    return create_app(deps)


def ask_both(outcome: Reply | Exception, settings: Settings = OPEN, method: str = "POST",
             headers: dict[str, str] = SAID) -> tuple[list[TestResponse], FakeRouter]:
    """By the short way, and by Flask alone."""
    router = FakeRouter(outcome)
    app = app_of(router, settings)
    short = app.wsgi_app
    assert isinstance(short, Shortcut)
    return [Client(way).open(PATH, method=method, headers=headers) for way in (short, short._others)], router


@pytest.mark.parametrize("outcome", [
    Reply(201, [("X-Engine", "1"), ("Set-Cookie", "a"), ("Set-Cookie", "b"), ("X-Request-Id", "the-same")], [b"words"]),
    RateLimited("too many", retry_after_s=3), UpstreamError("it died"), ClientLeft(), HttpBadRequest("so not"),
    RuntimeError("a bug")], ids=lambda outcome: type(outcome).__name__)
def test_either_way_gives_the_same_answer(outcome: Reply | Exception) -> None:
    (short, long), router = ask_both(outcome)
    assert router.by_flask == [False, True]
    assert (short.status_code, short.data, list(short.headers)) == (long.status_code, long.data, list(long.headers))
    assert short.headers["X-Request-Id"] == "the-same"
    assert router.counted == [short.status_code] * 2


def test_either_way_asks_for_a_key() -> None:
    (short, long), router = ask_both(GOOD, KEYED)
    assert (short.status_code, short.data, list(short.headers)) == (401, long.data, list(long.headers))
    assert router.by_flask == []
    answers, router = ask_both(GOOD, KEYED, headers=SAID | {"Authorization": "Bearer user-1"})
    assert [answer.status_code for answer in answers] == [200, 200]


@pytest.mark.parametrize("method", ["GET", "OPTIONS", "PUT"])
def test_other_methods_are_for_flask(method: str) -> None:
    (short, long), router = ask_both(GOOD, method=method)
    assert (short.status, short.data, short.headers.get("Allow")) == (long.status, long.data, long.headers["Allow"])
    assert router.by_flask == []


def test_every_path_of_a_model_has_its_route_in_flask_too() -> None:
    app = app_of(FakeRouter(GOOD))
    assert set(paths.BY_MODEL) <= {rule.rule for rule in app.url_map.iter_rules() if "POST" in (rule.methods or ())}


@pytest.mark.parametrize("headers", [
    [], [("CONTENT-TYPE", "Text/Plain; charset=utf-8"), ("CONTENT-LENGTH", "12"), ("X-API-KEY", "k"), ("VIA", "1.1 a")],
    [("TRANSFER-ENCODING", "chunked"), ("HOST", "here:80"), ("ACCEPT", "")]])
def test_the_short_form_of_a_request_says_what_werkzeug_says(headers: list[tuple[str, str]]) -> None:
    environ = {"REQUEST_METHOD": "POST", "PATH_INFO": PATH, "wsgi.url_scheme": "http", "REMOTE_ADDR": "10.1.2.3",
               "SERVER_NAME": "here", "SERVER_PORT": "80", HEADERS: headers}
    for name, value in headers:
        environ[name.replace("-", "_") if name.startswith("CONTENT") else f"HTTP_{name.replace('-', '_')}"] = value
    brief, long = Brief(environ), Request(environ)
    for name in ("method", "path", "remote_addr", "scheme", "mimetype"):
        assert getattr(brief, name) == getattr(long, name), name
    assert dict(brief.headers) == {name: value for name, value in long.headers if value or name == "Accept"}
    for name in ("content-type", "Content-Length", "X-Api-Key", "VIA", "Host", "Accept", "Cookie"):
        assert (brief.headers.get(name), brief.headers.get(name, "-")) == (long.headers.get(name),
                                                                           long.headers.get(name, "-"))
        assert (name in brief.headers) == (name in long.headers)
