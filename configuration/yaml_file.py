"""Reads YAML as YAML 1.2 has it, so that an editor and the daemon agree (`off` is a word), and knows each value's line.

PyYAML composes the nodes, which have lines; from nodes to values it is a short way, and here it is: keys are unique
texts, aliases and merges (`<<`) work but cannot grow without bound, tags are refused.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import yaml

from errors import ConfigError

MAX_BYTES = 1 << 20         # PyYAML takes three seconds for so much
MAX_VALUES = 100_000        # aliases within aliases make a small file a huge one
MAX_DEPTH = 50

Path = tuple[str | int, ...]


class Place(NamedTuple):
    line: int
    text: str       # a scalar as it is written; else empty


@dataclass(frozen=True)
class Document:
    """`value` is made of dict, list, str, int, float, bool and None; `places` has each value by its path."""

    file: str
    value: Any
    places: Mapping[Path, Place]

    def line(self, path: Path) -> int:
        """Of a value; of one that is not there, of what should hold it."""
        while path not in self.places:
            path = path[:-1]
        return self.places[path].line

    def where(self, path: Path) -> str:
        return f"{self.file}:{self.line(path)}"


def read_yaml(text: str, file: str) -> Document:
    """Raises ConfigError with file and line."""
    if len(text) > MAX_BYTES:
        raise ConfigError(file, f"has more than {MAX_BYTES} characters")
    try:
        root = yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        raise _syntax_error(error, text, file) from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise ConfigError(f"{file}:{line}", f"holds the control character U+{_code(error.character):04X}") from None
    except RecursionError:
        raise ConfigError(file, f"is nested deeper than {MAX_DEPTH} levels") from None
    if root is None:
        raise ConfigError(file, "is empty; `models: {}` says that there are none")
    reader = _Reader(file)
    value = reader.read(root, (), None)
    return Document(file, value, reader.places)


class _Loader(yaml.SafeLoader):
    """What a plain word means, by YAML 1.2's core schema."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}


_TAG = "tag:yaml.org,2002:"
for _name, _pattern, _first in (
        ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
        ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
        ("int", r"[-+]?[0-9]{1,18}|0o[0-7]{1,18}|0x[0-9a-fA-F]{1,15}", list("-+0123456789")),
        ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", list("-+0123456789.")),
        ("merge", r"<<", ["<"])):
    _Loader.add_implicit_resolver(_TAG + _name, re.compile(rf"(?:{_pattern})$"), _first)


class _Reader:
    def __init__(self, file: str) -> None:
        self.places: dict[Path, Place] = {}
        self._file = file
        self._count = 0

    def read(self, node: yaml.Node, path: Path, key: yaml.Node | None) -> Any:
        """The value; its place is its key's, if it has one."""
        self._spend(node)
        if len(path) > MAX_DEPTH:
            raise self._error(node, f"is nested deeper than {MAX_DEPTH} levels, or refers to itself")
        line = (key or node).start_mark.line + 1
        self.places[path] = Place(line, node.value if isinstance(node, yaml.ScalarNode) else "")
        if isinstance(node, yaml.MappingNode):
            self._check_tag(node, "map")
            return {name: self.read(value, (*path, name), key) for name, key, value in self._pairs(node)}
        if isinstance(node, yaml.SequenceNode):
            self._check_tag(node, "seq")
            return [self.read(item, (*path, index), None) for index, item in enumerate(node.value)]
        return self._scalar(node)

    def _pairs(self, node: yaml.MappingNode, depth: int = 0) -> Iterator[tuple[str, yaml.Node, yaml.Node]]:
        """Name, key and value; what is merged in stands behind what is written here."""
        if depth > MAX_DEPTH:
            raise self._error(node, "merges itself")
        seen: dict[str, int] = {}
        merged: list[yaml.MappingNode] = []
        for key, value in node.value:
            if key.tag == _TAG + "merge":
                merged += self._merged(value)
                continue
            if not isinstance(key, yaml.ScalarNode) or not key.tag.startswith(_TAG):
                raise self._error(key, "a key must be a word")
            name = str(key.value)
            if name in seen:
                raise self._error(key, f"{name} is given twice; first in line {seen[name]}")
            seen[name] = key.start_mark.line + 1
            yield name, key, value
        for other in merged:
            self._spend(node)
            for name, key, value in self._pairs(other, depth + 1):
                self._spend(node)
                if name not in seen:
                    seen[name] = key.start_mark.line + 1
                    yield name, key, value

    def _merged(self, value: yaml.Node) -> list[yaml.MappingNode]:
        nodes = value.value if isinstance(value, yaml.SequenceNode) else [value]
        for node in nodes:
            if not isinstance(node, yaml.MappingNode):
                raise self._error(value, "<< merges mappings only, such as `<<: *defaults`")
        return list(nodes)

    def _scalar(self, node: yaml.Node) -> Any:
        text = str(node.value)
        match node.tag.removeprefix(_TAG):
            case "str" | "merge":
                return text
            case "null":
                return None
            case "bool" if text.lower() in ("true", "false"):
                return text.lower() == "true"
            case "int" | "float" as kind:
                return self._number(node, text, kind)
        raise self._error(node, f"the tag {node.tag.removeprefix(_TAG)[:40]} is not known here")

    def _number(self, node: yaml.Node, text: str, kind: str) -> int | float:
        try:
            if kind == "int":
                return int(text, 0) if text[:2] in ("0o", "0x") else int(text)
            number = float(text)
        except ValueError:
            raise self._error(node, f"{text[:40]} is not a number") from None
        if not math.isfinite(number):
            raise self._error(node, f"{text[:40]} is too large")
        return number

    def _check_tag(self, node: yaml.Node, kind: str) -> None:
        if node.tag != _TAG + kind:
            raise self._error(node, f"the tag {node.tag.removeprefix(_TAG)[:40]} is not known here")

    def _spend(self, node: yaml.Node) -> None:
        self._count += 1
        if self._count > MAX_VALUES:
            raise self._error(node, f"its aliases make more than {MAX_VALUES} values of it")

    def _error(self, node: yaml.Node, message: str) -> ConfigError:
        return ConfigError(f"{self._file}:{node.start_mark.line + 1}", message)


def _code(character: object) -> int:
    return character if isinstance(character, int) else ord(str(character)[:1] or "?")


def _syntax_error(error: yaml.MarkedYAMLError, text: str, file: str) -> ConfigError:
    mark = error.problem_mark or error.context_mark
    line = mark.line if mark is not None else 0
    lines = text.splitlines()
    written = lines[line] if line < len(lines) else ""
    if "\t" in written[:len(written) - len(written.lstrip())]:
        return ConfigError(f"{file}:{line + 1}", "a tab indents this line; YAML takes spaces only")
    message = " ".join(part for part in (error.context, error.problem) if part) or "is not YAML"
    column = f"column {mark.column + 1}: " if mark is not None else ""
    return ConfigError(f"{file}:{line + 1}", column + message)
