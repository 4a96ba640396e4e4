"""Where in servers.toml something stands: tomllib tells lines for syntax errors only.  Pure."""

from __future__ import annotations

import re

_OPAQUE = re.compile(r'"""(?:\\.|[^\\])*?"""|\'\'\'.*?\'\'\'|"(?:\\.|[^"\\\n])*"|\'[^\'\n]*\'|#[^\n]*', re.DOTALL)
_LIST = re.compile(r"^[ \t]*(?:servers[ \t]*\.[ \t]*)?servers[ \t]*=[ \t]*\[", re.MULTILINE)
_ENTRY_HEADER = re.compile(r"^[ \t]*\[\[[ \t]*servers[ \t]*\.[ \t]*servers[ \t]*\]\]", re.MULTILINE)
_ANY_HEADER = re.compile(r"^[ \t]*\[", re.MULTILINE)


class Lines:
    """Of a text that tomllib has read without an error."""

    def __init__(self, text: str) -> None:
        # Same length and lines, but nothing in strings and comments that looks like syntax.
        self._text = _OPAQUE.sub(lambda found: re.sub(r"[^\n]", " " if found[0][0] == "#" else "_", found[0]), text)
        self._entries = _entries(self._text)

    def of(self, place: str | int | None, key: str | None) -> int:
        """The line, from 1, of a key: of the server with this index, of a table, or (None) of the top level.

        Of one that is written in an unusual way, the line of what holds it.
        """
        start, end = self._span(place)
        found = None
        if key is not None:
            name = re.escape(key)
            found = re.compile(rf"(?<![\w.\-]){name}[ \t]*[=.]|^[ \t]*\[+[ \t]*{name}[ \t]*[\].]",
                               re.MULTILINE).search(self._text, start, end)
        at = start if found is None else found.end() - 1
        return self._text.count("\n", 0, at) + 1

    def _span(self, place: str | int | None) -> tuple[int, int]:
        if isinstance(place, int):
            return self._entries[place] if place < len(self._entries) else (0, len(self._text))
        if place is not None:
            header = re.compile(rf"^[ \t]*\[[ \t]*{place}[ \t]*\]", re.MULTILINE).search(self._text)
            if header is not None:
                following = _ANY_HEADER.search(self._text, header.end())
                return header.end() - 1, len(self._text) if following is None else following.start()
        return 0, len(self._text)


def _entries(text: str) -> list[tuple[int, int]]:
    """Start and end of each server, in the file's order."""
    opened = _LIST.search(text)
    if opened is not None:
        return _inline_entries(text, opened.end())
    heads = [found.end() - 1 for found in _ENTRY_HEADER.finditer(text)]
    return [(head, following) for head, following in zip(heads, [*heads[1:], len(text)], strict=False)]


def _inline_entries(text: str, at: int) -> list[tuple[int, int]]:
    """The elements of a list, which begins at `at`, between its commas."""
    found: list[tuple[int, int]] = []
    depth, start = 0, None
    for index in range(at, len(text)):
        character = text[index]
        if depth == 0 and character in ",]":
            if start is not None:
                found.append((start, index))
            start = None
            if character == "]":
                break
        elif start is None and not character.isspace():
            start = index
        if character in "[{":
            depth += 1
        elif character in "]}":
            depth -= 1
    return found
