"""schemathesis: whatever is sent to the daemon, it answers as /openapi.json says, and never with 500."""

from __future__ import annotations

import re
from pathlib import Path

from tests import openapi_fuzz
from tests.daemon import Daemon

EXAMPLES = 2            # a route, beside those that cover each bound of its parameters: about 2,000 in all
SEED = 20260101
GUARD_S = 1200.0


def test_no_500_and_nothing_that_is_not_documented(tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    with Daemon(tmp_path / "daemon", {"DRAIN_TIMEOUT": "1", "VLLM_MAX_INSTANCES": "2"}) as daemon:
        daemon.create("org/tiny", params={"served_model_name": "demo"}, timeout=0)
        done = openapi_fuzz.run(daemon.port, tmp_path / "here", examples=EXAMPLES, seed=SEED, guard_s=GUARD_S)
        assert daemon.get("/health").status == 200
        daemon.remove()
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr
    generated = re.search(r"(\d+) generated", done.stdout)
    assert generated is not None and int(generated[1]) > 500, done.stdout
