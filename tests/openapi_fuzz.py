"""schemathesis over /openapi.json: requests that the document allows and such that it does not, and what comes back.

The daemon is a real one with the simulated engine.  As a module of its own it is the hooks that schemathesis loads.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

CHECKS = ("not_a_server_error", "status_code_conformance", "content_type_conformance", "response_schema_conformance",
          "response_headers_conformance", "unsupported_method")
CONFIG = """[checks.not_a_server_error]
expected-statuses = ["1xx", "2xx", "3xx", "4xx", 501, 502, 503, 504, 507, 508]
"""
"""What is documented says what is wrong elsewhere; 500 is never right."""
REQUEST_S = 20      # a guard: what waits for nobody answers at once


def run(port: int, folder: Path, *, examples: int, seed: int, guard_s: float) -> subprocess.CompletedProcess[str]:
    """What comes back tells each request that was answered otherwise than described, as a curl command."""
    (folder / "schemathesis.toml").write_text(CONFIG)
    return subprocess.run(
        [sys.executable, "-m", "schemathesis.cli", "run", f"http://127.0.0.1:{port}/openapi.json",
         "--phases", "examples,coverage,fuzzing", "--checks", ",".join(CHECKS), "--max-examples", str(examples),
         "--seed", str(seed), "--generation-database", "none", "--request-timeout", str(REQUEST_S), "--warnings", "off",
         "--continue-on-failure", "--no-color"],
        cwd=folder, text=True, capture_output=True, timeout=guard_s,
        env={"PATH": os.environ["PATH"], "HOME": str(folder), "LANG": "C.UTF-8",
             "SCHEMATHESIS_HOOKS": str(Path(__file__).resolve())})


def _end_streams() -> None:
    """What would be told without end is asked for once."""
    import schemathesis

    @schemathesis.hook
    def before_call(context: Any, case: Any, kwargs: Any) -> None:
        if case.query:
            case.query.pop("follow", None)
        for name in [name for name in case.headers or () if name.lower() == "accept"]:
            del case.headers[name]


if __name__ != "tests.openapi_fuzz":
    _end_streams()
