"""Lines and cells of the monitor: from values to texts of a given width.  Pure."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from operator import itemgetter
from string import ascii_lowercase, ascii_uppercase, digits

from rich.text import Text

from vllm_server_client.cli import words
from vllm_server_client.top.snapshot import Snapshot
from vllm_server_client.types import BackendLoad, Device, Instance

LETTERS = ascii_lowercase + ascii_uppercase + digits
COLOURS = ("green", "blue", "magenta", "cyan", "yellow", "red")
FOREIGN, FREE = "▒", "·"
COLUMNS = ("", "id", "model", "state", "on", "memory", "busy", "wait", "tok/s", "cache", "idle")
WIDTHS = (1, 8, 0, 14, 3, 6, 4, 4, 5, 5, 6)     # the model's column takes what is left
SCROLLBAR = 2
SHORTEST_NAME = 8


def widths(terminal: int) -> list[int]:
    """Of the columns, without the one space after each."""
    left = terminal - SCROLLBAR - sum(width + 1 for width in WIDTHS)
    return [width or max(SHORTEST_NAME, left) for width in WIDTHS]


def letter(index: int) -> str:
    """By which an instance is found in the bars."""
    return LETTERS[index % len(LETTERS)]


def style(index: int) -> str:
    return COLOURS[index % len(COLOURS)]


def device_line(device: Device, instances: Sequence[Instance], width: int) -> Text:
    """Index, a bar of who has its memory, and figures; `instances` are all, in the order of their letters."""
    memory = device["memory"]
    name = device["name"].removeprefix("NVIDIA ").removeprefix("GeForce ")
    head = f"{device['index']:>2} {name[:15]:<15} "
    if device["error"]:
        return Text.assemble(head, (device["error"], "red"))
    tail = f" {words.size(memory['used'])} of {words.size(memory['total'])}"
    if device["utilization"] is not None:
        tail += f" {device['utilization']:>4.0%}"
    if device["temperature_c"] is not None:
        tail += f" {device['temperature_c']}°C"
    line = Text(head)
    line.append_text(bar(device, instances, max(8, width - len(head) - len(tail) - 1)))
    return line.append(tail)


def bar(device: Device, instances: Sequence[Instance], width: int) -> Text:
    """`width` cells: letters for instances by what they hold, then foreign memory, then what is free."""
    total = device["memory"]["total"] or 1
    shares = [(index, held_bytes(one, device["index"])) for index, one in enumerate(instances)]
    ours = sum(held for _, held in shares)
    cells: list[tuple[str, str]] = []
    reached = 0.0
    for index, held in shares:
        reached += held
        # Rounded up to its end, so that what is there is seen, and the sum never grows beyond the whole.
        want = max(round(reached / total * width), len(cells) + (1 if held else 0))
        cells += [(letter(index), style(index))] * (min(want, width) - len(cells))
    used = max(device["memory"]["used"], ours)
    cells += [(FOREIGN, "dim")] * (min(round(used / total * width), width) - len(cells))
    cells += [(FREE, "dim")] * (width - len(cells))
    runs = groupby(cells, key=itemgetter(1))
    return Text.assemble(*(("".join(cell for cell, _ in run), look) for look, run in runs))


def held_bytes(one: Instance, device: int) -> float:
    """What an instance has of one device: measured, else as planned; evenly over its devices."""
    if device not in one["gpus"]:
        return 0.0
    memory = one["memory"]
    total = memory["measured_bytes"] if memory["measured_bytes"] is not None else memory["planned_bytes"]
    return (total or 0) / len(one["gpus"])


def instance_row(index: int, one: Instance, columns: Sequence[int]) -> list[Text]:
    """The cells of one instance, in the order of COLUMNS, each cut to its column's width."""
    load, serves = one["load"], one["status"] == "ready"
    rate = load["tokens_per_s"] if serves else None
    cells = [
        Text(letter(index), style(index)), Text(one["id"]), Text(short_name(words.name(one), columns[2])),
        words.state(one), Text(words.devices(one["gpus"])), _right(words.memory(one).replace("iB", "")),
        _right(str(one["in_flight"])), _right(f"{load['waiting']:.0f}" if serves else "-"),
        _right("-" if rate is None else f"{rate:.0f}"),
        _right("-" if load["cache_usage"] is None else f"{load['cache_usage']:.0%}"),
        _right(_short(words.expiry(one)))]
    for cell, width in zip(cells, columns, strict=True):
        cell.truncate(width, overflow="ellipsis")
    return cells


def short_name(name: str, width: int) -> str:
    """Without its organisation or folder, where it would not fit with it."""
    return name if len(name) <= width else name.rpartition("/")[2]


def _right(text: str) -> Text:
    return Text(text, justify="right")


def _short(span: str) -> str:
    """10 min 5 s -> 10m 5s"""
    return span.replace(" min", "m").replace(" s", "s").replace(" h", "h").replace(" d", "d")


def detail(one: Instance) -> Text:
    """One line about the chosen instance."""
    error = one["last_error"]
    if error is not None and one["status"] in ("failed", "backoff"):
        return Text(error["message"], words.STYLES[one["status"]])
    phase = f"{step(one)}; " if one["status"] in ("starting", "waking") else ""
    restarts = f"; restarts: {one['restarts']}" if one["restarts"] else ""
    place = f"; {one['because']}" if one["because"] else ""
    return Text(f"{one['model_name']}: {phase}{one['why']}{place}{restarts}", "dim")


def step(one: Instance) -> str:
    """Of a load or a wake: what it does, for how long, and how long it takes as a rule."""
    usual = f" of about {words.span(one['expected'])}" if one["expected"] else ""
    return f"{(one['phase'] or one['status']).replace('_', ' ')}, {words.span(one['elapsed'])}{usual}"


def server_line(one: BackendLoad, width: int) -> Text:
    """A server on another machine: its address, health, load and models."""
    health = one["health"] if one["circuit"] == "closed" else f"{one['health']}, breaker {one['circuit']}"
    cache = "" if one["cache_usage"] is None else f" cache {one['cache_usage']:.0%}"
    line = Text.assemble(("@ ", "dim"), f"{one['id'][:25]:<25} ", (f"{health:<6}", "green" if one["status"] else "red"),
                         f" {one['running']:g} running {one['waiting']:g} waiting of {one['capacity']}{cache}  ",
                         (words.plain(", ".join(one["models"])), "dim"))
    line.truncate(width, overflow="ellipsis")
    return line


def headline(snapshot: Snapshot, url: str) -> Text:
    health = snapshot.health
    text = Text.assemble(("vllm-server ", "bold"), f"{health['version']}  {url}  ")
    text.append(f"{health['ready']} of {health['instances']} ready", "green" if health["ready"] else "yellow")
    if health["simulated"]:
        text.append("  SIMULATED", "bold magenta")
    return text
