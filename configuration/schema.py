"""Checks config.yaml against config.schema.json, the same file that editors complete from.  Pure but for reading that.

The schema's `errorMessage` (a word of VS Code's, which knows it too) says what was expected where.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path as FilePath
from typing import Any

from jsonschema import Draft7Validator
from jsonschema.exceptions import ValidationError

from configuration.yaml_file import Document, Path

SCHEMA_FILE = FilePath(__file__).parent / "config.schema.json"
SHOWN = 60      # characters of a wrong value

Problem = tuple[Path, str]


def problems(document: Document) -> list[Problem]:
    """What is wrong, and where; the first in the file first, one for each path."""
    found: dict[Path, str] = {}
    for error in _validator().iter_errors(document.value):
        for path, message in _explained(error):
            found.setdefault(path, message)
    return sorted(found.items(), key=lambda problem: document.line(problem[0]))


def path_text(path: Path) -> str:
    """As people write it: models.llama.aliases[1]."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
    return text.removeprefix(".")


@cache
def schema() -> Mapping[str, Any]:
    loaded: dict[str, Any] = json.loads(SCHEMA_FILE.read_text())
    return loaded


@cache
def _validator() -> Draft7Validator:
    return Draft7Validator(schema())


def _explained(error: ValidationError) -> Iterator[Problem]:
    path: Path = tuple(error.absolute_path)
    rules: Mapping[str, Any] = error.schema  # type: ignore[assignment]  # a schema with keywords, else nothing fails
    instance: Any = error.instance
    keyword_value: Any = error.validator_value
    expected = rules.get("errorMessage", error.message)
    if "propertyNames" in error.schema_path:
        yield (*path, str(instance)), expected
    elif error.validator == "additionalProperties":
        for key in instance:
            if key not in rules["properties"] and not (path == () and key.startswith("x-")):
                yield (*path, key), f"unknown key{_hint(key, path, rules['properties'])}"
    elif error.validator == "required":
        for name in keyword_value:
            if name not in instance:
                yield path, f"{name} is missing"
    elif error.validator == "type" and instance is None:
        yield path, f"{expected}, and it is empty"
    else:
        yield path, expected + _shown(path, instance)


def _shown(path: Path, value: object) -> str:
    """Nothing of what may be a secret."""
    if "api_key" in path or "env" in path:
        return ""
    text = json.dumps(value, ensure_ascii=False)
    return f", not {text if len(text) <= SHOWN else text[:SHOWN] + ' ...'}"


def _hint(key: str, path: Path, known: Mapping[str, Any]) -> str:
    if near := difflib.get_close_matches(key, known, 1, 0.6):
        return f"; did you mean {near[0]}?"
    sections: Mapping[str, Any] = schema()["properties"]
    if home := next((name for name, one in sections.items() if key in one.get("properties", {})), None):
        return f"; it belongs to the section {home}"
    if len(path) == 2 and path[0] == "models":
        return "; flags of vLLM stand under params"
    if not path and key in schema()["definitions"]["model"]["properties"]:
        return "; it belongs to a model, under models"
    return f"; known are {', '.join(known)}"
