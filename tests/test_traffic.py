"""What the load generator counts as answered must be right, or every test that uses it proves nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.daemon import Daemon
from tests.traffic import Ask, longest_wait_s, problems, run_clients

pytestmark = pytest.mark.whole

ASKS = [Ask("good", 3), Ask("good", 3, stream=True), Ask("nowhere"), Ask("cut", 9, stream=True), Ask("cut", 9)]


def test_each_kind_of_answer_is_told_apart(tmp_path: Path) -> None:
    with Daemon(tmp_path / "daemon") as daemon:
        daemon.create("good", sim={"first_token_s": 0.3})
        daemon.create("cut", sim={"die_after_chunks": 4})
        found = run_clients(f"http://127.0.0.1:{daemon.port}", len(ASKS), lambda client, number:
                            ASKS[client] if number == 0 else None, 60)
        daemon.remove()
    assert len(found) == len(ASKS)
    good = [one for one in found if one.model == "good"]
    assert problems(good) == [] and all(one.wait_s >= 0.3 for one in good)
    assert set(longest_wait_s(found)) == {"good", "nowhere", "cut"}
    (nowhere,) = [one.problem for one in found if one.model == "nowhere"]
    assert nowhere is not None and nowhere.startswith("404: ")
    assert all(one.problem for one in found if one.model == "cut")


def test_an_answer_of_another_model_is_a_problem(tmp_path: Path) -> None:
    with Daemon(tmp_path / "daemon") as daemon:
        daemon.create("named", params={"served_model_name": ["first", "second"]})
        found = run_clients(f"http://127.0.0.1:{daemon.port}", 2, lambda client, number:
                            Ask("second", stream=bool(client)) if number == 0 else None, 60)
        daemon.remove()
    assert problems(found) == ["second: asked second, answered by first"] * 2


def test_nobody_begins_after_the_end(tmp_path: Path) -> None:
    with Daemon(tmp_path / "daemon") as daemon:
        daemon.create("m")
        found = run_clients(f"http://127.0.0.1:{daemon.port}", 3, lambda client, number: Ask("m", 2), 0.5)
        daemon.remove()
    assert problems(found) == [] and len(found) > 3
