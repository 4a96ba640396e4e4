"""web/auth.py: who may call what."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from flask import Request
from werkzeug.test import EnvironBuilder

from config import Settings, load_settings
from configuration.keys import parse_keys
from errors import BadRequest, DaemonError, Forbidden, Unauthorized, UnsupportedMediaType
from web import auth

OPEN = load_settings({"HOME": "/nowhere"}, cwd=Path("/nowhere"))
KEYED = replace(OPEN, api_keys=parse_keys("user-1,user-2"), admin_api_keys=parse_keys("admin-1,admin-2"))
ONLY_USERS = replace(OPEN, api_keys=parse_keys("user-1"))
ONLY_ADMINS = replace(OPEN, admin_api_keys=parse_keys("admin-1"))
MANAGEMENT = ("/instances", "/instances/ab12", "/instances/ab12/logs", "/instances/", "/gpus", "/admin/reload",
              "/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/proxy/ab12/v1/load_lora_adapter",
              "/proxy/ab12/v1/unload_lora_adapter/", "/proxy/ab12/root/v1/load_lora_adapter")
INFERENCE = ("/v1/models", "/v1/chat/completions", "/tokenize", "/proxy/ab12/metrics", "/proxy/ab12/", "/instancesx",
             "/nothing")


def request_of(path: str, *, host: str = "localhost:5000", client: str = "127.0.0.1", method: str = "POST",
               headers: dict[str, str] | None = None) -> Request:
    environ = EnvironBuilder(path=path, method=method, headers=list((headers or {}).items())).get_environ()
    environ["REMOTE_ADDR"] = client
    environ["HTTP_HOST"] = host
    return Request(environ)


def refusal(request: Request, settings: Settings) -> tuple[type[DaemonError], str] | None:
    try:
        auth.check(request, settings)
    except DaemonError as error:
        assert error.message
        return type(error), error.code
    return None


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


@pytest.mark.parametrize("path", [*sorted(auth.OPEN), "/dashboard/app.js"])
@pytest.mark.parametrize("settings", [OPEN, KEYED])
def test_what_is_open_needs_no_key(path: str, settings: Settings) -> None:
    assert refusal(request_of(path, client="203.0.113.9", host="gpu.example", method="GET"), settings) is None


@pytest.mark.parametrize("path", MANAGEMENT)
def test_management_without_admin_keys_is_for_this_machine(path: str) -> None:
    assert refusal(request_of(path), OPEN) is None
    assert refusal(request_of(path, client="203.0.113.9"), OPEN) == (Forbidden, "management_is_local")
    assert refusal(request_of(path, headers=bearer("user-1")), ONLY_USERS) is None


@pytest.mark.parametrize("path", MANAGEMENT)
@pytest.mark.parametrize("key", ["", "user-1", "admin", "admin-11", "ADMIN-1", "ädmin-1", "admin-1,admin-2"])
def test_management_with_admin_keys_needs_one(path: str, key: str) -> None:
    for headers in (bearer(key), {"X-Api-Key": key}):
        assert refusal(request_of(path, headers=headers), KEYED) == (Unauthorized, "invalid_api_key")


@pytest.mark.parametrize("path", MANAGEMENT)
@pytest.mark.parametrize("key", ["admin-1", "admin-2"])
def test_an_admin_key_manages_from_anywhere(path: str, key: str) -> None:
    for headers in (bearer(key), {"Authorization": f"bearer  {key}"}, {"X-Api-Key": key}):
        request = request_of(path, client="203.0.113.9", host="gpu.example", headers=headers)
        assert refusal(request, KEYED) is None


@pytest.mark.parametrize("path", INFERENCE)
def test_inference_needs_a_key_when_there_are_keys(path: str) -> None:
    assert refusal(request_of(path, client="203.0.113.9", host="gpu.example"), OPEN) is None
    assert refusal(request_of(path), KEYED) == (Unauthorized, "invalid_api_key")
    assert refusal(request_of(path, headers=bearer("wrong")), KEYED) == (Unauthorized, "invalid_api_key")
    assert refusal(request_of(path, headers={"Authorization": "Basic user-1"}), KEYED) is not None
    for key in ("user-1", "user-2", "admin-1"):
        assert refusal(request_of(path, headers=bearer(key)), KEYED) is None
    assert refusal(request_of(path, headers={"X-Api-Key": "user-2"}), KEYED) is None


def test_admin_keys_alone_leave_inference_open() -> None:
    assert refusal(request_of("/v1/models", client="203.0.113.9"), ONLY_ADMINS) is None


@pytest.mark.parametrize("client", ["127.0.0.1", "127.9.9.9", "::1", "::ffff:127.0.0.1"])
def test_loopback(client: str) -> None:
    assert refusal(request_of("/instances", client=client), OPEN) is None


@pytest.mark.parametrize("client", ["10.0.0.1", "::ffff:10.0.0.1", "fe80::1", "", "localhost", "0.0.0.0"])
def test_not_loopback(client: str) -> None:
    assert refusal(request_of("/instances", client=client), OPEN) == (Forbidden, "management_is_local")


@pytest.mark.parametrize("header", ["X-Forwarded-For", "X-Forwarded-Host", "X-Real-Ip", "Forwarded", "Via"])
def test_what_a_proxy_forwards_is_not_local(header: str) -> None:
    request = request_of("/instances", headers={header: "127.0.0.1"})
    assert refusal(request, OPEN) == (Forbidden, "management_is_local")


@pytest.mark.parametrize("host", ["localhost", "localhost:5000", "127.0.0.1:5000", "[::1]:5000", "192.168.1.4",
                                  "LOCALHOST"])
def test_hosts_that_nobody_can_rebind(host: str) -> None:
    assert refusal(request_of("/instances", host=host), OPEN) is None


@pytest.mark.parametrize("host", ["evil.example", "evil.example:5000", "localhost.evil.example", "127.0.0.1.nip.io",
                                  ""])
def test_a_rebound_name_may_not_manage(host: str) -> None:
    assert refusal(request_of("/instances", host=host), OPEN) == (Forbidden, "host_not_allowed")


@pytest.mark.parametrize("host", ["[", "[::1", "localhost@evil.example", "a b", "a/b", "a, b", "localhost:x"])
@pytest.mark.parametrize("path", ["/instances", "/v1/models", "/health"])
def test_a_host_that_is_none_is_refused_everywhere(host: str, path: str) -> None:
    assert refusal(request_of(path, host=host), OPEN) == (BadRequest, "invalid_host")


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "https://localhost:5000", "http://localhost:5001",
                                    "http://localhost:5000.evil.example", ""])
@pytest.mark.parametrize("settings", [OPEN, KEYED])
def test_a_page_of_another_origin_may_not_manage(origin: str, settings: Settings) -> None:
    request = request_of("/instances", headers={"Origin": origin, **bearer("admin-1")})
    assert refusal(request, settings) == (Forbidden, "cross_origin")


@pytest.mark.parametrize(("site", "allowed"), [("same-origin", True), ("none", True), ("same-site", False),
                                               ("cross-site", False)])
def test_the_browser_says_where_a_request_comes_from(site: str, allowed: bool) -> None:
    request = request_of("/instances/ab12/logs", method="GET", headers={"Sec-Fetch-Site": site})
    assert (refusal(request, OPEN) is None) is allowed


def test_the_daemons_own_page_may_manage() -> None:
    request = request_of("/instances", headers={"Origin": "http://localhost:5000", "Sec-Fetch-Site": "same-origin"})
    assert refusal(request, OPEN) is None


def test_a_page_may_ask_for_inference() -> None:
    assert refusal(request_of("/v1/models", headers={"Origin": "http://app.example"}), OPEN) is None


@pytest.mark.parametrize("kind", ["text/plain", "multipart/form-data; boundary=x", "application/x-www-form-urlencoded"])
@pytest.mark.parametrize("path", MANAGEMENT)
def test_management_takes_no_forms_even_empty_ones(path: str, kind: str) -> None:
    found = refusal(request_of(path, headers={"Content-Type": kind}), OPEN)
    assert found == (UnsupportedMediaType, "unsupported_media_type")


@pytest.mark.parametrize(("origin", "listed", "allowed"), [
    ("http://localhost:5000", None, True), ("http://evil.example", None, False), ("null", None, False),
    ("http://evil.example", ("http://app.example",), False), ("http://App.Example", ("http://app.example",), True),
    ("http://evil.example", ("*",), True), (None, None, True)])
def test_whose_pages_may_open_a_socket(origin: str | None, listed: tuple[str, ...] | None, allowed: bool) -> None:
    headers = {"Upgrade": "websocket", **({"Origin": origin} if origin else {})}
    found = refusal(request_of("/v1/realtime", method="GET", headers=headers), replace(OPEN, cors_origins=listed))
    assert found == (None if allowed else (Forbidden, "cross_origin"))


def test_every_key_is_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[bytes] = []

    def compare(given: bytes, key: bytes) -> bool:
        compared.append(key)
        return given == key

    monkeypatch.setattr("configuration.keys.hmac.compare_digest", compare)
    assert refusal(request_of("/instances", headers=bearer("admin-1")), KEYED) is None
    assert compared == [key.digest for key in (*KEYED.admin_api_keys, *KEYED.api_keys)]
