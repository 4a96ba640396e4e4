"""routing/paths.py: vLLM's development routes are recognized in any spelling, and nothing else is."""

from __future__ import annotations

import pytest

from routing import paths


@pytest.mark.parametrize("path", [
    "/sleep", "/sleep/", "//sleep", "/SLEEP", "/%73leep", "/%2573leep", "/%25252573leep", "/x/../sleep", "/./sleep",
    "/v1/..%2fsleep", "/v1/%2e%2e/sleep", "\\sleep", "/v1\\..\\sleep", "/sleep;x=1", "/sleep?level=1",
    "/sleep%3flevel=1", "/ sleep", "/sleep%20", "/sleep\t", "/sleep%0a", "/root/sleep", "sleep", "/collective_rpc",
    "/fault_tolerance/apply", "/sim", "/wake_up", "/is_sleeping", "/server_info", "/reset_prefix_cache", "/pause",
    "/v1;x/sleep", "/x;a/%73leep;b", "/v1/sleep#x", "/\uff53\uff4c\uff45\uff45\uff50", "/%EF%BD%93leep", "/\u017fleep",
    "/sl\u200beep", "/sleep.",
    "/start_profile", "/update_weights", "/abort_requests"])
def test_development_routes(path: str) -> None:
    assert paths.is_dev_mode(path)


@pytest.mark.parametrize("path", [
    "/", "", "/v1/models", "/v1/chat/completions", "/metrics", "/health", "/v1/responses/resp_1/cancel", "/asleep",
    "/sleepy", "/v1/sleep_well", "/load", "/docs", "/version", "/%E4%BD%A0", "/%", "/%zz"])
def test_other_routes(path: str) -> None:
    assert not paths.is_dev_mode(path)


@pytest.mark.parametrize("path", [
    "/a//b", "/a/./b", "/a/../b", "/..", "/%2e%2e/b", "/a%2f%2fb", "/a\\..\\b", "/%252e%252e/b", "/a\0b", "/a%0ab",
    "/a%250db", "//a", "/\x7f", "/a/..;x=1/b", "/a/%2e%2e;/b", "/a\x85b"])
def test_paths_that_servers_read_differently(path: str) -> None:
    assert paths.is_confusing(path)


@pytest.mark.parametrize("path", ["/", "/a", "/a/b", "/a/", "/v1/models/org%2fname", "/a.b/..c", "/%E4%BD%A0"])
def test_plain_paths(path: str) -> None:
    assert not paths.is_confusing(path)


def test_no_route_of_the_data_plane_is_a_development_route() -> None:
    assert not [path for path in (*paths.BY_MODEL, *paths.ADAPTERS) if paths.is_dev_mode(path) or
                paths.is_confusing(path)]
