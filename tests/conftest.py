"""Settings and fixtures for all tests."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, configuration, settings

# what these assert tells the values, as in a test file
pytest.register_assert_rewrite("tests.e2e.real_daemon", *(
    f"tests.{path.stem}" for path in Path(__file__).parent.glob("*.py") if path.stem != "conftest"))

# no deadlines: the machine is shared, and a test that waits for a socket is not slow because of what it tests
# the same cases in each run, so that a commit passes or fails whenever it is tested; `make slow` draws others
settings.register_profile("default", max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow],
                          derandomize=True)
settings.register_profile("ci", settings.get_profile("default"), max_examples=10_000, derandomize=False)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))
# its folder in the checkout would make pytest warn, and a warning is an error
configuration.set_hypothesis_home_dir(Path(tempfile.gettempdir()) / f"vllm-server-hypothesis-{os.getuid()}")

# a shell that starts this in the background lets it ignore Ctrl-C, and every program that a test sends one with it
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """For sockets, whose paths end at 107 bytes: `tmp_path` has the test's name in it, and the user's."""
    folder = Path(tempfile.mkdtemp(prefix="vst", dir="/tmp"))
    yield folder
    shutil.rmtree(folder)
