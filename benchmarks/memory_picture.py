"""Records what holds the memory of simulated GPUs, and draws it: one panel a GPU, an area for each instance."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from simulation.devices import DeviceFolder

GIB = 1 << 30
STEP_S = 0.2
WIDTH, PANEL, GAP, LEFT, TOP = 960, 64, 12, 64, 64      # pixels


@dataclass(frozen=True)
class Moment:
    """GiB by label of the holder, for each device."""

    at: float                                           # seconds since the record began
    held: Mapping[int, Mapping[str, float]]


class Recorder:
    """As a context manager it looks every STEP_S; `moments` are what it saw."""

    def __init__(self, folder: DeviceFolder) -> None:
        self.moments: list[Moment] = []
        self._folder = folder
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="recorder")

    def __enter__(self) -> Recorder:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        began = time.monotonic()
        while not self._over.wait(STEP_S):
            held: dict[int, dict[str, float]] = {}
            with self._folder.locked():
                holdings = self._folder.holdings()
            for one in holdings:
                for device in one.devices:
                    panel = held.setdefault(device, {})
                    panel[one.label] = panel.get(one.label, 0.0) + one.memory_bytes / GIB
            self.moments.append(Moment(time.monotonic() - began, held))


def draw(moments: Sequence[Moment], sizes_gib: Mapping[int, float], kinds: Mapping[str, tuple[str, str]],
         title: str) -> str:
    """An SVG.  `sizes_gib` by device; `kinds` gives the beginning of a model's name its colour and its place in the
    legend.  A label is an instance's id and its model, or one word for a foreigner."""
    end = moments[-1].at
    height = TOP + len(sizes_gib) * (PANEL + GAP) + 30
    x = (WIDTH - LEFT - 16) / end
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif" '
        f'font-size="11">', f'<rect width="{WIDTH}" height="{height}" fill="#fff"/>',
        f'<text x="{LEFT}" y="20" font-size="14">{escape(title)}</text>', *_legend(kinds)]
    for row, (device, size) in enumerate(sorted(sizes_gib.items())):
        top = TOP + row * (PANEL + GAP)
        parts.append(f'<g transform="translate({LEFT} {top})"><rect width="{end * x:.0f}" height="{PANEL}" '
                     f'fill="#f4f4f4"/><text x="-8" y="{PANEL / 2:.0f}" text-anchor="end">GPU {device}</text>'
                     f'<text x="-8" y="{PANEL / 2 + 13:.0f}" text-anchor="end" fill="#777" font-size="9">{size:g} GiB'
                     '</text>')
        parts += [f'<path d="{path}" fill="{_colour(label, kinds)}" stroke="#fff" stroke-width=".4">'
                  f'<title>{escape(label)}</title></path>' for label, path in _areas(moments, device, PANEL / size, x)]
        parts.append(f'<path d="M0 0H{end * x:.0f}" stroke="#333" stroke-width=".8"/></g>')
    bottom = TOP + len(sizes_gib) * (PANEL + GAP)
    for second in range(0, int(end) + 1, 10):
        parts.append(f'<text x="{LEFT + second * x:.0f}" y="{bottom + 8}" text-anchor="middle" fill="#555">{second} s'
                     '</text>')
    return "\n".join([*parts, "</svg>\n"])


def _legend(kinds: Mapping[str, tuple[str, str]]) -> list[str]:
    parts, at = [], LEFT
    for colour, name in dict.fromkeys(kinds.values()):
        parts.append(f'<rect x="{at}" y="34" width="11" height="11" fill="{colour}"/>'
                     f'<text x="{at + 15}" y="43">{escape(name)}</text>')
        at += round(26 + 5.3 * len(name))
    return parts


def _colour(label: str, kinds: Mapping[str, tuple[str, str]]) -> str:
    model = label.rpartition(" ")[2]
    return next((colour for start, (colour, _) in kinds.items() if model.startswith(start)), "#999")


def _areas(moments: Sequence[Moment], device: int, y: float, x: float) -> list[tuple[str, str]]:
    """Label and outline of each holder, stacked from the bottom up, the eldest lowest."""
    order = list(dict.fromkeys(label for moment in moments for label in moment.held.get(device, {})))
    floors = [0.0] * len(moments)
    areas = []
    for label in order:
        steps: list[tuple[float, float, float]] = []    # from when on, between which heights
        for number, moment in enumerate(moments):
            tall = moment.held.get(device, {}).get(label, 0.0)
            low, high = PANEL - floors[number] * y, PANEL - (floors[number] + tall) * y
            floors[number] += tall
            if not steps or steps[-1][1:] != (low, high):
                steps.append((moment.at * x, low, high))
        areas += [(label, path) for path in _outlines(steps, moments[-1].at * x)]
    return areas


def _outlines(steps: Sequence[tuple[float, float, float]], end: float) -> list[str]:
    """One closed path for each stretch of time with some height."""
    paths, stretch = [], []
    for number, step in enumerate(steps):
        until = steps[number + 1][0] if number + 1 < len(steps) else end
        if step[1] - step[2] > 0:
            stretch.append((step, until))
        if stretch and (step[1] - step[2] <= 0 or number + 1 == len(steps)):
            upper = "".join(f"L{left:.1f} {high:.1f}H{right:.1f}" for (left, _, high), right in stretch)
            lower = "".join(f"L{right:.1f} {low:.1f}H{left:.1f}" for (left, low, _), right in reversed(stretch))
            paths.append("M" + upper[1:] + lower + "Z")
            stretch = []
    return paths
