"""A hundred requests for a model that is still loading."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable

from .conftest import Models
from .real_daemon import RealDaemon

REQUESTS = 100


def test_a_hundred_requests_for_a_loading_model_cause_one_start_and_get_a_hundred_good_answers(
        daemon: RealDaemon, models: Models, note: Callable[[str], None]) -> None:
    loading = daemon.begin(models.tiny)
    daemon.begin(models.bert)       # for the tests that follow: both load side by side
    question = {"model": "tiny", "prompt": "A small model", "max_tokens": 16, "temperature": 0}
    with contextlib.ExitStack() as stack:
        waiting = [stack.enter_context(daemon.sent("/v1/completions", question)) for _ in range(REQUESTS)]
        assert daemon.instance(loading["id"])["status"] == "starting"
        answers = [connection.getresponse() for connection in waiting]
        bodies = [answer.read() for answer in answers]

    assert [answer.status for answer in answers] == [200] * REQUESTS
    assert {json.loads(body)["choices"][0]["text"] for body in bodies} == {
        " knows little and answers with words of its own. A small model knows little and"}
    assert [one["id"] for one in daemon.instances() if one["model_name"] == str(models.tiny.folder)] == [loading["id"]]
    assert daemon.instance(loading["id"])["restarts"] == 0
    assert list(daemon.engine_sessions().values()).count(loading["id"]) == 1
    assert daemon.log.count("devices") == 2     # one launch of each of the two models
    note(f"loading: {REQUESTS} requests held and answered by one engine")
