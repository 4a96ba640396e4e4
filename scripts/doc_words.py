"""Tables of Markdown, and the Chinese of what the code says in English."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).resolve().parent


class NoChinese(Exception):
    """A text of the code that nobody has translated."""


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cell or ' ' for cell in line)} |".replace("|   |", "| |") for line in lines) + "\n"


@cache
def chinese() -> Mapping[str, str]:
    found: dict[str, str] = yaml.safe_load((HERE / "docs_zh.yaml").read_text())
    return found


def told(text: str, language: str) -> str:
    """In that language.  Raises NoChinese."""
    if language == "en" or not text:
        return text
    if text not in chinese():
        raise NoChinese(f"scripts/docs_zh.yaml has no translation of {text!r}")
    return chinese()[text]


@cache
def rows(readme: Path) -> Mapping[str, str]:
    """What README's tables say of a name in backticks: the last cell of its row."""
    found = re.findall(r"^\| (`[^|]+`) \|(.*)\|$", readme.read_text(), re.MULTILINE)
    return {name: rest.split("|")[-1].strip() for cell, rest in found for name in re.findall(r"`([^`]+)`", cell)}


def kind_of(schema: Mapping[str, Any]) -> str:
    """Its type and bounds, for people: `integer from 1`, `"a"` or `"b"`."""
    if "enum" in schema:
        return ", ".join(f"`{str(one).lower() if isinstance(one, bool) else 'null' if one is None else one}`"
                         for one in schema["enum"])
    if "oneOf" in schema:
        return " / ".join(kind_of(one) for one in schema["oneOf"])
    named = schema.get("type", "any")
    names = [one for one in (named if isinstance(named, list) else [named]) if one != "null"]
    text = " / ".join(names)
    if "items" in schema and names == ["array"]:
        text += f" of {kind_of(schema['items'])}" if "type" in schema["items"] else ""
    low, above, high = (schema.get(name) for name in ("minimum", "exclusiveMinimum", "maximum"))
    if above is not None:
        text += f", > {above:g}"
    if low is not None:
        text += f", ≥ {low:g}"
    if high is not None and high < 10 ** 6:
        text += f", ≤ {high:g}"
    return text
