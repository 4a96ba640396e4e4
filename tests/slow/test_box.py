"""More models than fit, for a minute: nobody is refused, lost or starved, and no GPU is ever over its memory."""

from __future__ import annotations

import os
import re
from datetime import datetime
from pathlib import Path

import pytest

from instances.switching import longest_wait_s as bound_s
from tests import forty_models, three_models
from tests.gpu_box import needs_compiler
from tests.traffic import longest_wait_s, problems

pytestmark = [needs_compiler, pytest.mark.timeout(1200)]

SECONDS = float(os.environ.get("BOX_SECONDS", "60"))


def test_forty_models_on_eight_gpus_that_foreigners_use_too(tmp_path: Path) -> None:
    """What a foreigner's arrival may cost is a start that was under way on its GPU, never a request."""
    outcome = forty_models.run(tmp_path, SECONDS)
    assert problems(outcome.exchanges) == []
    assert forty_models.unexplained(outcome) == [], outcome.log
    asked = {one.model for one in outcome.exchanges}
    assert {name.partition("-")[0] for name in asked} == {size.name for size in forty_models.SIZES}
    assert outcome.loads > len(asked), "nobody had to make room"
    assert outcome.visits
    spoilt = {line.split()[1] for line in forty_models.spoilt(outcome)}
    assert [line for line in failures(outcome.log) if not any(name in line for name in spoilt)] == []


def test_two_hundred_clients_share_a_gpu_among_three_models(tmp_path: Path) -> None:
    outcome = three_models.run(tmp_path, SECONDS)
    assert problems(outcome.exchanges) == []
    assert {one.model for one in outcome.exchanges} == set(three_models.MODELS)
    assert 2 <= outcome.swaps < 40 * max(1.0, SECONDS / 60)
    drain_s = three_models.TOKENS / three_models.TOKENS_PER_S + 1
    limit_s = bound_s(len(three_models.MODELS), max_hold_s=three_models.MAX_HOLD_S, drain_s=drain_s,
                      load_s=longest_load_s(outcome.log))
    assert max(longest_wait_s(outcome.exchanges).values()) <= limit_s + 1
    assert failures(outcome.log) == []


def failures(log: str) -> list[str]:
    """Whatever did not go as planned, as the daemon tells it."""
    return [line for line in log.splitlines() if " WARNING " in line or " ERROR " in line or "-> backoff" in line]


def longest_load_s(log: str) -> float:
    """From the moment that a place was found for it until it was ready: a busy machine takes longer."""
    began: dict[str, datetime] = {}
    longest = 0.0
    for line in log.splitlines():
        at = datetime.strptime(line[:23], "%Y-%m-%d %H:%M:%S,%f") if re.match(r"\d{4}-", line) else None
        found = re.search(r": ([0-9a-f]{8}) \(", line)
        if at is None or found is None:
            continue
        if ": devices [" in line:
            began[found[1]] = at
        elif "starting -> ready" in line and found[1] in began:
            longest = max(longest, (at - began.pop(found[1])).total_seconds())
    return longest
