"""CORS_ORIGINS: whose pages may ask for inference; nobody's may manage, and the engines have no say."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from config import load_settings
from errors import ConfigError
from tests.daemon import Answer, Daemon

pytestmark = pytest.mark.whole

APP = "https://app.example"
CHAT = {"model": "m", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2}
PREFLIGHT = {"Access-Control-Request-Method": "POST",
             "Access-Control-Request-Headers": "authorization, content-type, x-stainless-lang"}


def origin_of(answer: Answer) -> str | None:
    """Who may read it; whatever else is said goes with that."""
    found = answer.headers.get("access-control-allow-origin")
    assert "access-control-allow-credentials" not in answer.headers
    assert found is not None or not [name for name in answer.headers if name.startswith("access-control-")]
    return found


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    env = {"CORS_ORIGINS": f"{APP}, http://localhost:3000", "API_KEYS": "user", "ADMIN_API_KEYS": "admin"}
    with Daemon(tmp_path_factory.mktemp("daemon"), env) as daemon:
        made = daemon.call("POST", "/instances", {"model_name": "m", "wait": True}, {"X-Api-Key": "admin"})
        assert made.status == 201
        yield daemon


@pytest.mark.parametrize("origin", [APP, "http://localhost:3000"])
def test_a_page_that_is_listed_asks_and_reads(daemon: Daemon, origin: str) -> None:
    first = daemon.call("OPTIONS", "/v1/chat/completions", headers={"Origin": origin, **PREFLIGHT})
    assert first.status == 204 and origin_of(first) == origin and first.headers["vary"] == "Origin"
    assert first.headers["access-control-allow-headers"] == PREFLIGHT["Access-Control-Request-Headers"]
    assert "POST" in first.headers["access-control-allow-methods"]
    for body in (CHAT, {**CHAT, "stream": True}, {**CHAT, "model": "none"}):    # plain, by a relay, an error of ours
        answer = daemon.call("POST", "/v1/chat/completions", body, {"Origin": origin, "X-Api-Key": "user"})
        assert origin_of(answer) == origin, body
    refused = daemon.call("GET", "/v1/models", headers={"Origin": origin})
    assert refused.status == 401 and origin_of(refused) == origin       # it may read why


@pytest.mark.parametrize("origin", ["https://evil.example", "https://app.example.evil.example", "http://app.example",
                                    "https://app.example:8443", "null"])
def test_a_page_that_is_not_listed_reads_nothing(daemon: Daemon, origin: str) -> None:
    first = daemon.call("OPTIONS", "/v1/chat/completions", headers={"Origin": origin, **PREFLIGHT})
    assert first.status in (401, 405) and origin_of(first) is None
    for body in (CHAT, {**CHAT, "stream": True}):       # the engine's own headers say that everybody may
        answer = daemon.call("POST", "/v1/chat/completions", body, {"Origin": origin, "X-Api-Key": "user"})
        assert answer.status == 200 and origin_of(answer) is None


@pytest.mark.parametrize("path", ["/instances", "/admin/reload", "/gpus", "/v1/load_lora_adapter"])
def test_no_page_manages(daemon: Daemon, path: str) -> None:
    first = daemon.call("OPTIONS", path, headers={"Origin": APP, **PREFLIGHT})
    assert first.status in (401, 403) and origin_of(first) is None
    answer = daemon.call("POST", path, {}, {"Origin": APP, "X-Api-Key": "admin"})
    assert (answer.status, answer.error["code"], origin_of(answer)) == (403, "cross_origin", None)


def test_names_of_headers_that_are_none_are_not_echoed(daemon: Daemon) -> None:
    asked = {"Origin": APP, **PREFLIGHT, "Access-Control-Request-Headers": "a, b c, <script>"}
    answer = daemon.call("OPTIONS", "/v1/models", headers=asked)
    assert answer.status == 204 and "access-control-allow-headers" not in answer.headers


@pytest.mark.parametrize(("text", "origins"), [
    ("*", ("*",)), ("HTTPS://App.Example:8443, http://[::1]:3000", ("https://app.example:8443", "http://[::1]:3000")),
    ("chrome-extension://abc", ("chrome-extension://abc",)), ("null", None)])
def test_what_may_stand_there(tmp_path: Path, text: str, origins: tuple[str, ...] | None) -> None:
    assert load_settings({"HOME": "/", "CORS_ORIGINS": text}, cwd=tmp_path).cors_origins == origins


@pytest.mark.parametrize("text", ["app.example", "https://app.example/", "https://*.example", "https://", ",", "a, b"])
def test_mistakes(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match="origins such as"):
        load_settings({"HOME": "/", "CORS_ORIGINS": text}, cwd=tmp_path)
