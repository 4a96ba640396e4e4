"""Layers of settings, strongest first: each maps names to their text and the place where it was given.  Pure."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from configuration.settings_table import OURS, Setting, unset
from errors import ConfigError


class Given(NamedTuple):
    """A setting's text; `where`: file and line, or the variable's name."""

    text: str
    where: str


Layer = Mapping[str, Given]


def given(setting: Setting, layer: Layer) -> Iterable[tuple[str, Given]]:
    """What a layer says about a setting, its newest name first."""
    return ((name, layer[name]) for name in (setting.name, *setting.older)
            if name in layer and not unset(layer[name].text))


def value(setting: Setting, layers: Iterable[Layer]) -> Any:
    """The strongest layer's value.  The weaker ones are parsed too: a mistake that is hidden today bites later."""
    found = [parsed(name, one, setting.parse, secret=setting.secret)
             for layer in layers for name, one in given(setting, layer)]
    if found:
        return found[0]
    return None if unset(setting.default) else setting.parse(setting.default)


def parsed(name: str, one: Given, parse: Callable[[str], Any], *, secret: bool = False) -> Any:
    """Raises ConfigError, which shows no secret."""
    try:
        return parse(one.text.strip())
    except ValueError as error:
        shown = name if secret else f"{name}={one.text[:80]}"
        raise ConfigError(one.where, f"{shown}: {error}") from None


def where(name: str, layers: Iterable[Layer]) -> str:
    """The place of the strongest layer that gives it; else its name."""
    return next((layer[name].where for layer in layers if name in layer and not unset(layer[name].text)), name)


def hint(name: str, known: Iterable[str] = OURS) -> str:
    near = difflib.get_close_matches(name.upper(), known, 1, 0.6)
    return f"; did you mean {near[0]}?" if near else "; .env.example lists them all"
