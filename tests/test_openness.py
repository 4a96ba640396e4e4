"""What is open to others is said in plain words: in the log at the start, and by doctor."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import pytest

import app
from config import load_settings
from configuration.described import described
from configuration.keys import parse_keys
from configuration.openness import left_open
from routing import request_id
from vllm_server_client.cli import checks

OPEN = load_settings({"HOME": "/nowhere", "VLLM_DEFAULT_TRUST_REMOTE_CODE": "false"}, cwd=Path("/nowhere"))
KEYS, ADMIN = parse_keys("user-1"), parse_keys("admin-1")


@pytest.mark.parametrize(("host", "keys", "admin", "cors", "said"), [
    ("0.0.0.0", (), (), None, ["Inference is OPEN", "Management is open to every user"]),
    ("::", (), ADMIN, None, ["Inference is OPEN"]), ("192.168.1.4", KEYS, (), None, ["Management is open"]),
    ("gpu.example", KEYS, ADMIN, ("*",), []), ("0.0.0.0", (), ADMIN, ("*",), ["Inference is OPEN", "every page"]),
    ("127.0.0.1", (), (), None, []), ("localhost", (), (), None, []), ("::1", (), (), None, [])])
def test_what_is_left_open(host: str, keys: tuple, admin: tuple, cors: tuple[str, ...] | None, said: list[str]) -> None:
    settings = replace(OPEN, host=host, api_keys=keys, admin_api_keys=admin, cors_origins=cors)
    found = left_open(vars(settings))
    assert len(found) == len(said) and all(part in sentence for part, sentence in zip(said, found, strict=True))
    assert described(vars(settings))["open"] == list(found)


def test_the_log_says_it_at_the_start(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        app.banner(OPEN, "http://0.0.0.0:5000")
    warned = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warned) == 2 and "whoever reaches 0.0.0.0 port 5000 may use every model" in warned[0]


def test_doctor_says_it() -> None:
    finding = checks.access(described(vars(OPEN)))
    assert finding.verdict is checks.Verdict.WARN
    assert "Inference is OPEN" in finding.found and "ADMIN_API_KEYS" in finding.advice
    assert checks.access({"open": []}).verdict is checks.access({}).verdict is checks.Verdict.OK


def test_no_message_makes_a_line_of_its_own_in_the_log() -> None:
    formatter = request_id.Formatter("%(levelname)s: %(request)s%(message)s")
    name = "a\nERROR: forged\r\x1b[31m\x85\u2028é"
    record = logging.LogRecord("x", logging.INFO, "", 0, "model %s ready\tnow", (name,), None)
    assert formatter.format(record) == ("INFO: model a\\nERROR: forged\\r\\x1b[31m\\x85\\u2028é ready\tnow")
    try:
        raise ValueError("two\nlines")
    except ValueError as error:
        failed = logging.LogRecord("x", logging.ERROR, "", 0, "failed", (), (type(error), error, error.__traceback__))
    assert formatter.format(failed).count("\n") >= 3        # a traceback keeps its own
