"""scripts/check_security.py finds what it looks for."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from scripts import check_security

AWS = "AKIA" + "IOSFODNN7EXAMPLQ"       # put together, so that it is not found here


def test_secrets_are_found_but_for_those_that_are_argued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    (tmp_path / "tests").mkdir()
    (tmp_path / "settings.py").write_text('password = "hunter2hunter2"\n\napi_key = "an-example-key"\n')
    (tmp_path / "tests/test_x.py").write_text(f'api_key = "made-up-word-1"\nkey = "{AWS}"\n')
    monkeypatch.setattr(check_security, "CHECKOUT", tmp_path)
    assert list(check_security.secrets({"an-example-key": "an example"})) == [
        "settings.py:1 Secret Keyword", "tests/test_x.py:2 AWS Access Key"]


def test_risky_calls_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pyproject.toml").write_text('[tool.bandit]\nskips = ["B101"]\n')
    (tmp_path / "app.py").write_text("assert eval('1')\n")
    monkeypatch.setattr(check_security, "CHECKOUT", tmp_path)
    monkeypatch.setattr(check_security, "CODE", ("app.py",))
    (found,) = check_security.risky_calls()
    assert found.startswith("./app.py:1 B307")


def test_packages_with_known_holes_are_found_without_the_network(monkeypatch: pytest.MonkeyPatch,
                                                                 capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(check_security, "_audited", lambda installed: None)
    monkeypatch.setattr(check_security.metadata, "distributions", lambda: [Old("Flask", "0.10"), Old("x", "1")])
    found = list(check_security.packages({}))
    assert found and all(one.startswith("flask 0.10 has a known hole: ") for one in found)
    assert "cannot be reached" in capsys.readouterr().out
    holes = {one.rpartition(": ")[2]: "not used that way" for one in found}
    assert list(check_security.packages(holes)) == []


class Old:
    def __init__(self, name: str, version: str) -> None:
        self.metadata, self.version = {"Name": name}, version
