"""Hostile bytes, kept as data: each gets the answers that it is expected to get, and nothing else happens.

A case of tests/data/hostile/*.json has what is sent, each character a byte, and the statuses of all answers that come
until the connection ends.  Behind it on the same connection goes one harmless request: it is answered too (404) where
the daemon still knows where requests begin, and is never a part of something else.  In what is sent, `{{text*count}}`
stands for so many of the text, `{ID}` for the instance's id, `{LENGTH}` for the length of what follows the head.
`"then": "end"`: the client sends nothing more.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.daemon import Daemon
from tests.exchanges import connect, parse
from tests.relay_harness import read_all
from tests.support import wait_until

TABLE: dict[str, dict[str, dict[str, Any]]] = {
    path.stem: json.loads(path.read_text()) for path in sorted((Path(__file__).parent / "data/hostile").glob("*.json"))}
CASES = [(group, name) for group, cases in TABLE.items() if group != "keys" for name in cases]
BEHIND = "GET /v1/models/canary HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n{KEY}\r\n"
REPEATED = re.compile(r"\{\{(.+?)\*(\d+)\}\}", re.DOTALL)
ENV = {"MAX_REQUEST_BYTES": "2000000", "VLLM_SERVER_DEV_MODE": "1"}     # the engine has all of its dangerous routes
KEYS = {"API_KEYS": "user:user-key", "ADMIN_API_KEYS": "boss:admin-key"}


def data_of(case: dict[str, Any], instance_id: str) -> bytes:
    text = REPEATED.sub(lambda found: found[1] * int(found[2]), case["send"]).replace("{ID}", instance_id)
    if "{LENGTH}" in text:
        text = text.replace("{LENGTH}", str(len(text.partition("\r\n\r\n")[2])))
    return text.encode("latin-1")


def answers(daemon: Daemon, case: dict[str, Any], instance_id: str = "none", key: str = "") -> list[int]:
    """The statuses of what comes until the daemon closes the connection; each answer is checked."""
    data = data_of(case, instance_id)
    if case.get("then") != "end":
        data += BEHIND.replace("{KEY}", key).encode()
    with connect(daemon.port) as client:
        with contextlib.suppress(ConnectionError):      # it may answer and close before it has everything
            client.sendall(data)
            if case.get("then") == "end":
                client.shutdown(1)
        received, _ = read_all(client)
    found = parse(received, method="HEAD" if data.startswith(b"HEAD") else "POST")
    for got in found:
        assert got.complete and got.status != 500, received[:500]
        assert b"hidden" not in got.body and b"smuggle" not in got.body and b"Traceback" not in got.body
        assert not {"x-injected", "set-cookie", "x-a"} & {name for name, _ in got.headers}
        if got.status >= 400:
            assert set(json.loads(got.body)["error"]) == {"message", "type", "param", "code"}, got.body[:300]
            assert len(got.body) < 2000
    return [got.status for got in found]


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """Its one instance is, after it all, what it was before, and awake."""
    with Daemon(tmp_path_factory.mktemp("daemon"), ENV) as daemon:
        made = daemon.create("m", timeout=0)
        before, settings = stable(daemon), daemon.call("GET", "/is_sleeping", port=made["port"]).json
        yield daemon
        wait_until(lambda: all(one["in_flight"] == 0 for one in daemon.instances()))
        assert stable(daemon) == before
        assert daemon.call("GET", "/is_sleeping", port=made["port"]).json == settings
        assert daemon.post("/v1/completions", {"model": "m", "prompt": "x", "max_tokens": 1}).status == 200
        assert not [line for line in daemon.log.splitlines() if "ERROR" in line]


def stable(daemon: Daemon) -> list[tuple[Any, ...]]:
    return [tuple(one[name] for name in ("id", "pid", "port", "model_name", "aliases", "status", "params", "restarts",
                                         "created", "timeout")) for one in daemon.instances()]


@pytest.fixture(scope="module")
def instance_id(daemon: Daemon) -> str:
    return str(daemon.instances()[0]["id"])


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    with Daemon(tmp_path_factory.mktemp("keyed"), KEYS) as daemon:
        yield daemon
        log = daemon.log + (daemon.state / "audit.log").read_text()
        assert "user-key" not in log and "admin-key" not in log


def test_the_table_is_long_enough() -> None:
    assert sum(map(len, TABLE.values())) >= 300


@pytest.mark.parametrize(("group", "name"), CASES, ids=lambda word: word if isinstance(word, str) else None)
def test_hostile_input(daemon: Daemon, instance_id: str, group: str, name: str) -> None:
    case = TABLE[group][name]
    assert answers(daemon, case, instance_id) == case["answers"]


@pytest.mark.parametrize("name", TABLE["keys"])
def test_hostile_keys(keyed: Daemon, name: str) -> None:
    case = TABLE["keys"][name]
    assert answers(keyed, case, key="X-Api-Key: user-key\r\n") == case["answers"]
