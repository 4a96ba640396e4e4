"""The id of the request that a thread works on: in its log lines, in what it sends, in what it answers."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

HEADER = "X-Request-Id"
_GOOD = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")
_current: ContextVar[str] = ContextVar("request_id", default="")


def begin() -> None:
    """This thread works on another request from now on; it has an id before anything of it has been read."""
    _current.set(os.urandom(16).hex())


def adopt(given: str | None) -> None:
    """The client has an id for it, which takes the place of ours if it can stand in a header and a log line."""
    if given is not None and _GOOD.fullmatch(given):
        _current.set(given)
    elif not _current.get():
        begin()


def current() -> str:
    """Empty in a thread that works on none."""
    return _current.get()


@contextmanager
def of(request_id: str) -> Iterator[None]:
    """What is logged inside is about that request."""
    token = _current.set(request_id)
    try:
        yield
    finally:
        _current.reset(token)


class Formatter(logging.Formatter):
    """Puts the id before the message, and shows control characters in it as escapes: what a client or a model is called
    makes no line of its own, and moves no cursor.  A traceback keeps its lines."""

    def format(self, record: logging.LogRecord) -> str:
        request_id = _current.get()
        record.request = f"[{request_id}] " if request_id else ""
        return super().format(record)

    def formatMessage(self, record: logging.LogRecord) -> str:
        record.message = printable(record.message)
        return super().formatMessage(record)


def printable(text: str) -> str:
    """The same on one line, for a log and a terminal; tabs stay."""
    if text.isprintable():
        return text
    return "".join(char if char == "\t" or char.isprintable() else char.encode("unicode_escape").decode()
                   for char in text)
