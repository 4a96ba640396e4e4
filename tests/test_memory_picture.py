"""The picture of devices' memory shows each holder as long, and as high, as it held it."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from benchmarks.memory_picture import LEFT, PANEL, WIDTH, Moment, Recorder, draw
from simulation.devices import DeviceFolder, Holding
from tests.support import wait_until

GIB = 1 << 30
KINDS = {"small": ("#111111", "small ones"), "big": ("#222222", "big ones"), "job": ("#333333", "foreign")}
SVG = "{http://www.w3.org/2000/svg}"


def areas(text: str) -> dict[str, list[str]]:
    """Outlines by label."""
    found: dict[str, list[str]] = {}
    for path in ElementTree.fromstring(text).iter(f"{SVG}path"):
        title = path.find(f"{SVG}title")
        if title is not None and title.text:
            found.setdefault(title.text, []).append(path.attrib["d"])
    return found


def test_areas_are_stacked_and_end_when_their_holder_goes() -> None:
    moments = [Moment(0, {0: {"a1 small-1": 20.0}}), Moment(5, {0: {"a1 small-1": 20.0, "b2 big-1": 60.0}}),
               Moment(10, {0: {"b2 big-1": 60.0}}), Moment(15, {0: {"a1 small-1": 20.0}}), Moment(20, {})]
    found = areas(draw(moments, {0: 80.0}, KINDS, "Title & more"))
    wide = (WIDTH - LEFT - 16) / 20
    quarter = PANEL / 4
    assert found["a1 small-1"] == [
        f"M0.0 {PANEL - quarter:.1f}H{10 * wide:.1f}L{10 * wide:.1f} {PANEL:.1f}H0.0Z",
        f"M{15 * wide:.1f} {PANEL - quarter:.1f}H{20 * wide:.1f}L{20 * wide:.1f} {PANEL:.1f}H{15 * wide:.1f}Z"]
    assert found["b2 big-1"] == [
        f"M{5 * wide:.1f} 0.0H{10 * wide:.1f}L{10 * wide:.1f} {quarter:.1f}H{15 * wide:.1f}"
        f"L{15 * wide:.1f} {PANEL:.1f}H{10 * wide:.1f}L{10 * wide:.1f} {PANEL - quarter:.1f}H{5 * wide:.1f}Z"]


def test_each_gpu_has_a_panel_and_each_kind_a_colour() -> None:
    moments = [Moment(0, {}), Moment(1, {0: {"a1 small-1": 1.0}, 1: {"job": 2.0}}), Moment(2, {})]
    text = draw(moments, {0: 80.0, 1: 24.0}, KINDS, "t")
    assert re.findall(r"GPU \d", text) == ["GPU 0", "GPU 1"]
    assert 'fill="#111111" stroke' in text and 'fill="#333333" stroke' in text
    assert "big ones" in text and 'fill="#222222" stroke' not in text


def test_what_is_held_is_recorded(tmp_path: Path) -> None:
    folder = DeviceFolder(tmp_path)
    with Recorder(folder) as recorder:
        folder.claim(Holding(5_000_000, 3 * GIB, (0, 1), label="job", always=True))
        wait_until(lambda: len(recorder.moments) > 1)
        wait_until(lambda: recorder.moments[-1].held)
    assert recorder.moments[-1].held == {0: {"job": 3.0}, 1: {"job": 3.0}}
