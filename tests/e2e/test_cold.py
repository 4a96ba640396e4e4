"""A model that config.yaml gained while the daemon ran, asked for by a streaming client before anybody loaded it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator

import pytest

from tests.daemon import events
from tests.support import wait_until

from .conftest import Models
from .real_daemon import RealDaemon


@pytest.fixture
def configured(daemon: RealDaemon, models: Models) -> Iterator[RealDaemon]:
    """With `cold` in its config.yaml, which it finds by itself."""
    path = daemon.folder / "config.yaml"
    entry = {"model_path": str(models.third.folder), "max_model_len": 512, "aliases": ["kalt"]}
    path.write_text(json.dumps({"models": {"cold": entry}}))
    wait_until(lambda: daemon.get("/admin/models/cold").status == 200)
    yield daemon
    assert daemon.post("/admin/models/cold/unload", {"force": True, "wait": True}).status == 200
    path.write_text("models: {}\n")
    wait_until(lambda: daemon.get("/admin/models/cold").status == 404)


def test_a_stream_to_a_cold_model_is_kept_alive_and_then_answered(
        configured: RealDaemon, note: Callable[[str], None]) -> None:
    assert configured.get("/v1/models/kalt").json["status"] == "unloaded"
    assert configured.get("/admin/models/cold/plan").json["fits"]
    question = {"model": "kalt", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 8, "stream": True}
    with configured.open("POST", "/v1/chat/completions", question) as answer:
        assert answer.status == 200
        told = list(events(answer))
    comments = [one for one in told if one.startswith(b":")]
    assert comments and told[:len(comments)] == comments
    assert all(one.startswith(b": loading kalt ") for one in comments)
    assert told[-1] == b"data: [DONE]\n\n"
    text = "".join(choice["delta"].get("content") or "" for one in told[len(comments):-1]
                   for choice in json.loads(one.removeprefix(b"data: "))["choices"])
    assert text
    phases = {one.decode().split()[3] for one in comments}
    assert len(phases) > 1, phases      # it moved on
    assert configured.get("/v1/models/cold").json["status"] == "ready"
    assert configured.get("/admin/models/cold/plan").json["seconds_expected"] == 0      # there it is
    assert configured.post("/admin/models/cold/unload", {"wait": True}).json["status"] == "unloaded"
    plan = configured.get("/admin/models/cold/plan").json
    assert plan["seconds_expected"] > 1
    note(f"cold stream: {len(comments)} comments while the model loaded ({plan['seconds_expected']:.0f} s)")
