"""Who managed what: kept in a file that is bounded and the owner's alone, and shown to who may manage."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

import pytest
from flask import Flask, Response, jsonify, request

from routing import request_id
from tests.daemon import Daemon
from web import audit
from web.audit import AuditLog


def entries(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def note(log: AuditLog, method: str, path: str, response: Response | None = None, **headers: str) -> None:
    with Flask("test").test_request_context(path, method=method, headers=headers,
                                            environ_base={"REMOTE_ADDR": "127.0.0.1"}), request_id.of("r-1"):
        log.note(request, response or jsonify())


def test_calls_that_change_something_are_kept_and_looks_are_not(tmp_path: Path) -> None:
    log = AuditLog(tmp_path / "audit.log", wall=lambda: 12.5)
    note(log, "POST", "/instances", Authorization="Bearer sk-secret")
    note(log, "GET", "/instances")
    note(log, "POST", "/v1/chat/completions")
    log.close()
    (only,) = entries(tmp_path / "audit.log")
    assert only == {"at": 12.5, "who": "a wrong key", "from": "127.0.0.1", "method": "POST", "path": "/instances",
                    "id": None, "model": None, "status": 200, "code": None, "request_id": "r-1"}
    assert log.last(10) == [only] and "sk-secret" not in (tmp_path / "audit.log").read_text()
    assert stat.S_IMODE((tmp_path / "audit.log").stat().st_mode) == 0o600


def test_it_tells_what_was_made(tmp_path: Path) -> None:
    log = AuditLog(tmp_path / "audit.log")
    with Flask("test").app_context():
        note(log, "POST", "/instances", jsonify(id="ab12", model_name="org/name", status="starting"))
        note(log, "POST", "/instances/x%0a{}/wake", jsonify([1]))
    first, second = entries(tmp_path / "audit.log")
    assert (first["id"], first["model"]) == ("ab12", "org/name")
    assert second["path"] == "/instances/x\n{}/wake" and second["id"] is None      # one line, whatever is in it
    log.close()


def test_an_answer_that_an_engine_makes_is_left_alone(tmp_path: Path) -> None:
    """Of a route that is management and goes to an engine: its body is on its way, and not ours to read."""
    log = AuditLog(tmp_path / "audit.log")
    passing = Response(iter([b"{}"]), status=404, mimetype="application/json", direct_passthrough=True)
    note(log, "POST", "/v1/load_lora_adapter", passing)
    log.close()
    assert [(one["status"], one["code"]) for one in log.last(10)] == [(404, None)]


def test_the_file_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit, "AUDIT_BYTES", 2000)
    log = AuditLog(tmp_path / "audit.log")
    for number in range(200):
        note(log, "DELETE", f"/instances/{number}")
    log.close()
    files = sorted(tmp_path.iterdir())
    assert len(files) == audit.AUDIT_FILES and all(one.stat().st_size <= 2000 for one in files)
    assert entries(tmp_path / "audit.log")[-1]["path"] == "/instances/199"


def test_a_disk_that_takes_nothing_costs_one_line_of_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "gone"
    log = AuditLog(folder / "audit.log")
    for _ in range(3):
        note(log, "POST", "/admin/reload")
    assert len(log.last(10)) == 3 and [one.levelname for one in caplog.records] == ["ERROR"]
    folder.mkdir()
    note(log, "POST", "/admin/reload")
    log.close()
    assert len(entries(folder / "audit.log")) == 1 and "is written again" in caplog.text


def test_the_daemon_keeps_and_shows_it(tmp_path: Path) -> None:
    with Daemon(tmp_path, {"ADMIN_API_KEYS": "admin-key"}) as daemon:
        assert daemon.call("POST", "/instances", {"model_name": 3}).status == 401
        assert daemon.call("POST", "/instances", {"model_name": 3}, {"X-Api-Key": "admin-key"}).status == 400
        answer = daemon.call("GET", "/admin/audit?tail=5", headers={"X-Api-Key": "admin-key"})
        assert [(one["who"], one["path"], one["status"]) for one in answer.json["data"]] == [
            ("no key", "/instances", 401), ("key-69a52655", "/instances", 400)]
        assert answer.json["data"][0]["code"] == "invalid_api_key"
    assert [one["status"] for one in entries(daemon.state / "audit.log")] == [401, 400]
