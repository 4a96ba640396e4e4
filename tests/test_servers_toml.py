"""configuration/servers.py: the file of the servers, its values and the line of each mistake."""

from __future__ import annotations

from pathlib import Path

import pytest

from configuration.servers import ServerConfig, ServersConfig, parse_servers, read_servers
from errors import ConfigError

PRINTED = """
[servers]
servers = [
    { url = "http://gpu-server-1:8081", max_concurrent_requests = 3 },
    { url = "http://gpu-server-2:8088", max_concurrent_requests = 5 },
    { url = "http://gpu-server-3:8089", max_concurrent_requests = 4 },
]

[config]
health_check_interval = 10
request_timeout = 120
max_retries = 3
"""
"""As mvllm's README has it."""

PATH = Path("/etc/servers.toml")
CHECKOUT = Path(__file__).resolve().parent.parent


def parse(text: str, environ: dict[str, str] | None = None) -> ServersConfig:
    return parse_servers(text, PATH, environ or {})


def one(entry: str, environ: dict[str, str] | None = None) -> ServerConfig:
    [server] = parse(f"[servers]\nservers = [{entry}]\n", environ).servers
    return server


def problem(text: str, environ: dict[str, str] | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        parse(text, environ)
    return str(caught.value)


def test_the_printed_file_is_read_as_it_stands() -> None:
    config = parse(PRINTED)
    assert [(one.url, one.max_concurrent_requests) for one in config.servers] == [
        ("http://gpu-server-1:8081", 3), ("http://gpu-server-2:8088", 5), ("http://gpu-server-3:8089", 4)]
    assert (config.health_check_interval_s, config.request_timeout_s, config.max_retries) == (10, 120, 3)
    assert all(one.models is None and one.weight == 1.0 and one.verify for one in config.servers)


def test_the_example_in_the_repository_is_valid() -> None:
    config = read_servers(CHECKOUT / "servers.example.toml", {"GPU_SERVER_KEY": "secret"})
    assert len(config.servers) >= 3


def test_the_defaults_are_those_of_the_printed_file() -> None:
    config = parse("")
    assert config.servers == ()
    assert (config.health_check_interval_s, config.request_timeout_s, config.max_retries) == (10, 120, 3)


def test_an_entry_with_everything(tmp_path: Path) -> None:
    server = one('{ url = "https://gpu.example.com/vllm/", max_concurrent_requests = 8, models = ["a", "b", "a"], '
                 'api_key = "s3cret", weight = 2, headers = { X-Team = "blue" }, tls = { verify = false } }')
    assert server.url == "https://gpu.example.com:443/vllm"
    assert (server.models, server.weight, dict(server.headers), server.verify) == (("a", "b"), 2.0, {"X-Team": "blue"},
                                                                                  False)
    assert server.api_key == "s3cret" and "s3cret" not in repr(server) and "blue" not in repr(server)


def test_a_key_may_stand_in_the_environment() -> None:
    entry = '{ url = "http://a:1", max_concurrent_requests = 1, api_key_env = "THE_KEY" }'
    assert one(entry, {"THE_KEY": "k"}).api_key == "k"
    assert "THE_KEY is not set" in problem(f"servers.servers = [{entry}]")


def test_other_spellings_of_toml_are_the_same() -> None:
    config = parse('[[servers.servers]]\nurl = "http://a:1"\nmax_concurrent_requests = 1\n'
                   '[[servers.servers]]\nurl = "http://[::1]:2"\nmax_concurrent_requests = 2\n'
                   "[servers.servers.headers]\nX-A = 'b'\n")
    assert [one.url for one in config.servers] == ["http://a:1", "http://[::1]:2"]
    assert dict(config.servers[1].headers) == {"X-A": "b"}


GOOD = '{ url = "http://a:1", max_concurrent_requests = 1 }'


@pytest.mark.parametrize(("entry", "line", "says"), [
    ('{ url = "gpu-server-1:8081", max_concurrent_requests = 3 }', 4, "must begin with http:// or https://"),
    ('{ url = "ftp://a:1", max_concurrent_requests = 3 }', 4, "must begin with"),
    ('{ url = "http://", max_concurrent_requests = 3 }', 4, "expected http://HOST:PORT"),
    ('{ url = "http://a:99999", max_concurrent_requests = 3 }', 4, "Port out of range"),
    ('{ url = "http://u:p@a:1", max_concurrent_requests = 3 }', 4, "holds no password"),
    ('{ url = "http://b:1/v1", max_concurrent_requests = 3 }', 4, "leave out /v1"),
    ('{ url = "http://b:1/?x=1", max_concurrent_requests = 3 }', 4, "without ? or #"),
    ('{ url = 7, max_concurrent_requests = 3 }', 4, "expected a text"),
    ('{ max_concurrent_requests = 3 }', 4, "needs its url"),
    ('{ url = "http://b:1", max_concurrent_requests = 0 }', 4, "whole number from 1"),
    ('{ url = "http://b:1", max_concurrent_requests = "3" }', 4, "whole number from 1"),
    ('{ url = "http://b:1", max_concurrent_requests = true }', 4, "whole number from 1"),
    ('{ url = "http://b:1" }', 4, "max_concurrent_requests is missing"),
    ('{ url = "http://A:1/", max_concurrent_requests = 1 }', 4, "http://a:1 is listed twice, first in line 3"),
    ('{ url = "http://b:1", max_concurrent_requests = 1, wieght = 2 }', 4, "did you mean 'weight'?"),
    ('{ url = "http://b:1", max_concurrent_requests = 1, weight = 0 }', 4, "a number from 0.001"),
    ('{ url = "http://b:1", max_concurrent_requests = 1, weight = nan }', 4, "a number from"),
    ('{ url = "http://b:1", max_concurrent_requests = 1, models = [] }', 4, "a list of names"),
    ('{ url = "http://b:1", max_concurrent_requests = 1, models = "a" }', 4, "a list of names"),
    ('{ url = "http://b:1", max_concurrent_requests = 1, api_key = "a b" }', 4, "no header can carry"),
    ('{ url = "http://b:1", max_concurrent_requests = 1, api_key = "a", api_key_env = "B" }', 4, "not both"),
    ('{ url = "http://b:1", max_concurrent_requests = 1, headers = { Host = "x" } }', 4, "set by the daemon"),
    ('{ url = "http://b:1", max_concurrent_requests = 1, headers = { "a b" = "x" } }', 4, "cannot be a header"),
    ('{ url = "http://b:1", max_concurrent_requests = 1, headers = { X = "a\\r\\nB: c" } }', 4, "cannot be a header"),
    ('{ url = "http://b:1", max_concurrent_requests = 1, tls = { verify = false } }', 4, "https://"),
    ('{ url = "https://b:1", max_concurrent_requests = 1, tls = { ca = "/no/such.pem" } }', 4, "No such file"),
    ('{ url = "https://b:1", max_concurrent_requests = 1, tls = { verify = 1 } }', 4, "true or false"),
    ('"http://b:1"', 4, "expected { url ="),
])
def test_a_mistake_in_an_entry_is_named_with_its_line(entry: str, line: int, says: str) -> None:
    said = problem(f"[servers]\nservers = [\n    {GOOD},\n    {entry},\n]\n")
    assert said.startswith(f"{PATH}:{line}: ") and says in said


@pytest.mark.parametrize(("text", "line", "says"), [
    ("[servers]\nservers = [\n\n", ":2", "not valid TOML"),
    ("[servers]\nservers = [ { url = 'a }\n", ":2", "not valid TOML"),
    ("[servers]\n[servers]\n", ":2", "not valid TOML"),
    ("[severs]\n", ":1", "did you mean 'servers'?"),
    ("servers = 3\n", ":1", "expected a table"),
    ("[servers]\nservers = 3\n", ":2", "expected a list"),
    ("[servers]\nserver = []\n", ":2", "did you mean 'servers'?"),
    ("\n[config]\n# timeouts\nrequest_timeout = 0\n", ":4", "a number from 0.1"),
    ("[config]\nmax_retries = -1\n", ":2", "whole number from 0"),
    ("[config]\nmax_retries = 1.5\n", ":2", "whole number from 0"),
    ("[config]\nhealth_check_interval = '10'\n", ":2", "a number from"),
    ("[config]\nrequest_timout = 1\n", ":2", "did you mean 'request_timeout'?"),
])
def test_a_mistake_elsewhere_is_named_with_its_line(text: str, line: str, says: str) -> None:
    said = problem(text)
    assert said.startswith(f"{PATH}{line}: ") and says in said


def test_the_line_of_a_mistake_in_tables_of_their_own() -> None:
    text = ('[[servers.servers]]\nurl = "http://a:1"\nmax_concurrent_requests = 1\n\n'
            '[[servers.servers]]\nurl = "http://b:1"   # max_concurrent_requests = 1\nmax_concurrent_requests = 0\n')
    assert problem(text).startswith(f"{PATH}:7: ")
    assert problem(text.replace("b:1", "a:1")).startswith(f"{PATH}:7: ")
    assert problem(text.replace("b:1", "a:1").replace("= 0", "= 2")).startswith(
        f"{PATH}:6: http://a:1 is listed twice, first in line 2")


def test_what_looks_like_syntax_in_texts_and_comments_does_not_move_the_line() -> None:
    text = ('# servers = [ { url = "x" } ]\n[servers]\nservers = [\n'
            '  { url = "http://a:1", max_concurrent_requests = 1, headers = { X = "}] url = \\" {" } }, # ] }\n'
            "  { url = 'http://b:1', max_concurrent_requests = 0 },\n]\n")
    assert problem(text).startswith(f"{PATH}:5: max_concurrent_requests = 0")


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        read_servers(tmp_path / "servers.toml", {})
