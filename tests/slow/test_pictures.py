"""The pictures in the documents can be drawn anew, and show what they are said to show."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

from tests.daemon import CHECKOUT, HANG_S, Daemon

SVG = "{http://www.w3.org/2000/svg}"


def words_of(picture: Path) -> str:
    texts = ElementTree.parse(picture).iter(f"{SVG}text")
    return re.sub(r"\s+", " ", " ".join(text.text or "" for text in texts).replace("\xa0", " "))


def test_the_monitor_draws_itself(tmp_path: Path) -> None:
    with Daemon(tmp_path / "daemon") as daemon:
        daemon.create("org/tiny")
        subprocess.run([sys.executable, "-m", "scripts.picture_top", f"http://127.0.0.1:{daemon.port}",
                        str(tmp_path / "top.svg")], cwd=CHECKOUT, check=True, timeout=HANG_S)
        daemon.remove()
    drawn = words_of(tmp_path / "top.svg")
    assert "1 of 1 ready" in drawn and "org/tiny" in drawn
    assert "http" not in re.sub(r'xmlns="[^"]+"|<!--.*?-->|http://127[.\d:]+', "", (tmp_path / "top.svg").read_text())


def test_the_one_in_the_documents_shows_a_box_at_work() -> None:
    shown = words_of(CHECKOUT / "docs" / "pictures" / "top.svg")
    assert all(word in shown for word in ("48 GiB", "qwen3-32b", "ready", "sleeping", "starting", "Sleep/Wake"))
