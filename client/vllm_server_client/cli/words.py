"""Figures and states as people read them.  Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich import filesize
from rich.text import Text

STYLES: Mapping[str, str] = {
    "ready": "green", "starting": "yellow", "waking": "yellow", "backoff": "magenta", "falling_asleep": "blue",
    "sleeping": "blue", "stopping": "cyan", "stopped": "dim", "failed": "red", "unloaded": "dim"}


def size(count: float | None) -> str:
    """Bytes, in the unit that needs least room: 512 MiB, 1.9 GiB, 80 GiB."""
    if count is None:
        return "-"
    step, unit = filesize.pick_unit_and_suffix(int(count), ["B", "KiB", "MiB", "GiB"], 1024)
    value = count / step
    return f"{value:.1f} {unit}" if value < 9.95 and step > 1 else f"{value:.0f} {unit}"


def span(seconds: float | None) -> str:
    """Of time: 8 s, 2 min 5 s, 3 h 10 min, 2 d 3 h."""
    if seconds is None:
        return "-"
    whole = max(0, round(seconds))
    parts = [(whole // 86400, "d"), (whole // 3600 % 24, "h"), (whole // 60 % 60, "min"), (whole % 60, "s")]
    first = next((index for index, (count, _) in enumerate(parts) if count), 3)
    return " ".join(f"{count} {unit}" for count, unit in parts[first:first + 2] if count) or "0 s"


def rate(per_s: float | None) -> str:
    """A second: 0, 0.05, 2.5, 130."""
    return "-" if per_s is None else f"{per_s:.0f}" if per_s >= 9.95 or per_s == 0 else f"{per_s:.2g}"


def wait(seconds: float | None) -> str:
    """A short time: 35 ms, 1.25 s."""
    return "-" if seconds is None else f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:.2f} s"


def state(instance: Mapping[str, Any]) -> Text:
    """An instance's state, with how far a start is."""
    status = instance["status"]
    words = status.replace("_", " ")
    if status == "starting" and instance.get("progress") is not None:
        words += f" {instance['progress']:.0%}"
    if status == "backoff" and instance.get("retry_in") is not None:
        words += f" {span(instance['retry_in'])}"
    return Text(words, STYLES.get(status, ""))


def name(instance: Mapping[str, Any]) -> str:
    """The first name that requests use."""
    aliases: Sequence[str] = instance["aliases"]
    return aliases[0] if aliases else str(instance["model_name"])


def devices(indexes: Sequence[int]) -> str:
    """0,1,2,5 -> 0-2,5"""
    runs: list[list[int]] = []
    for index in sorted(indexes):
        if runs and index == runs[-1][-1] + 1:
            runs[-1].append(index)
        else:
            runs.append([index])
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 2 else ",".join(map(str, run)) for run in runs) or "-"


def memory(instance: Mapping[str, Any]) -> str:
    """What it holds: measured, else (with ~) as it was planned."""
    figures = instance["memory"]
    if figures["measured_bytes"] is not None:
        return size(figures["measured_bytes"])
    return f"~{size(figures['planned_bytes'])}" if figures["planned_bytes"] else "-"


def expiry(instance: Mapping[str, Any]) -> str:
    """Until it is put to sleep or stopped for want of requests."""
    if instance["status"] in ("failed", "stopping", "stopped"):
        return "-"
    left_s = instance["expires_in"]
    return "never" if left_s is None else span(left_s)


def plain(text: str) -> str:
    """Without the control characters that would steer a terminal; line ends and tabs stay."""
    return text.translate(_CONTROLS)


_CONTROLS = {code: None for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}
