"""Pages of Prometheus text put together: one family after the other, whoever has samples of it.  Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

_PAIR = r'[a-zA-Z_][a-zA-Z0-9_]*="(?:\\.|[^"\\])*"'
_SAMPLE = re.compile(rf"([a-zA-Z_:][a-zA-Z0-9_:]*)(?:\{{((?:{_PAIR},?)*)\}})?[ \t]+"
                     r"([+-]?(?:[0-9.]+(?:[eE][+-]?[0-9]+)?|Inf|NaN)(?:[ \t]+-?[0-9]+)?)", re.ASCII)
_LABEL = re.compile(r'([a-zA-Z_][a-zA-Z0-9_]*)="((?:\\.|[^"\\])*)"')
_SUFFIXES = ("_bucket", "_sum", "_count", "_total", "_created", "_info")


class _Family:
    def __init__(self) -> None:
        self.about: list[str] = []      # its HELP and TYPE, from the first page that has them
        self.samples: list[str] = []


def merged(pages: Iterable[tuple[Mapping[str, str], str]]) -> str:
    """All samples of all pages, those of each page with its labels added.

    A label of a sample that has the name of one that is added becomes `exported_...`, as Prometheus itself does it.
    A line that is no sample is left out: one broken page must not make a bad one of all.
    """
    families: dict[str, _Family] = {}
    for labels, text in pages:
        _add(families, labels, text)
    lines: list[str] = []
    for family in families.values():
        lines += family.about if family.samples else ()
        lines += family.samples
    return "\n".join([*lines, ""])


def _add(families: dict[str, _Family], labels: Mapping[str, str], text: str) -> None:
    added = ",".join(f'{name}="{_escaped(value)}"' for name, value in labels.items())
    fresh: set[str] = set()             # families whose HELP and TYPE this page is the first to tell
    current = ""
    for line in text.splitlines():
        if line.startswith(("# HELP ", "# TYPE ")):
            current = line.split(" ", 3)[2]
            if current not in families:
                fresh.add(current)
            family = families.setdefault(current, _Family())
            if current in fresh:
                family.about.append(line)
        elif (sample := _SAMPLE.fullmatch(line.rstrip())) is not None:
            name, own, value = sample[1], sample[2] or "", sample[3]
            if not (name == current or (name.startswith(current) and name[len(current):] in _SUFFIXES)):
                current = name
            own = _renamed(own.rstrip(","), labels)
            inside = f"{added},{own}" if added and own else added or own
            families.setdefault(current, _Family()).samples.append(f"{name}{{{inside}}} {value}" if inside
                                                                   else f"{name} {value}")


def _renamed(own: str, labels: Mapping[str, str]) -> str:
    if not any(f'{name}="' in own for name in labels):
        return own
    return _LABEL.sub(lambda found: f'{"exported_" if found[1] in labels else ""}{found[1]}="{found[2]}"', own)


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
