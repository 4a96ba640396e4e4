"""Which instance a word on the command line means.  Pure."""

from __future__ import annotations

from collections.abc import Sequence

from vllm_server_client.errors import Conflict, NotFound
from vllm_server_client.types import Instance

SHORTEST_PREFIX = 3


def instances(word: str, among: Sequence[Instance]) -> list[Instance]:
    """By id, by the unique beginning of one, or all of a model's by its name.  Raises NotFound or Conflict."""
    if exact := [one for one in among if one["id"] == word]:
        return exact
    if named := [one for one in among if word == one["model_name"] or word in one["aliases"]]:
        return named
    begun = [one for one in among if len(word) >= SHORTEST_PREFIX and one["id"].startswith(word)]
    if len(begun) > 1:
        raise Conflict(f"{word!r} begins several ids: {_listed(begun)}", status=409, code="ambiguous")
    if not begun:
        there = f"There are: {_listed(among)}" if among else "There is none"
        raise NotFound(f"no instance has the id or model name {word!r}. {there}", status=404, code="not_found")
    return begun


def one_instance(word: str, among: Sequence[Instance]) -> Instance:
    """Raises NotFound or Conflict, also when a model has several instances."""
    found = instances(word, among)
    if len(found) > 1:
        raise Conflict(f"{word!r} has {len(found)} instances, name one by its id: {_listed(found)}", status=409,
                       code="ambiguous")
    return found[0]


def _listed(found: Sequence[Instance]) -> str:
    shown = ", ".join(f"{one['id']} ({one['model_name']}, {one['status']})" for one in found[:8])
    return shown + (f" and {len(found) - 8} more" if len(found) > 8 else "")
