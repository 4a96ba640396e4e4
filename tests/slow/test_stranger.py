"""scripts/stranger.sh, from a clone to its removal, with the simulated engine; with the real one it is run by hand."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.daemon import CHECKOUT
from tests.support import claim_ports

GUARD_S = 1200      # two installs from PyPI among it


@pytest.mark.timeout(GUARD_S + 60)
def test_a_strangers_path_leads_from_a_clone_to_its_removal(tmp_path: Path) -> None:
    claim, base_port = claim_ports()
    with claim, open(tmp_path / "output", "wb") as output:
        done = subprocess.run([str(CHECKOUT / "scripts" / "stranger.sh"), "--simulated", str(tmp_path / "s")],
                              env={**os.environ, "VLLM_BASE_PORT": str(base_port)}, stdin=subprocess.DEVNULL,
                              stdout=output, stderr=output, timeout=GUARD_S)
    said = (tmp_path / "output").read_text()
    assert done.returncode == 0 and "all passed" in said, said
