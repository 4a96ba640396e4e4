"""What every command has: the server's address, where output goes and in which form, and how errors end it."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import click
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from vllm_server_client.calls import DEFAULT_URL, URL_VARIABLE
from vllm_server_client.cli.exits import Exit, exit_code
from vllm_server_client.client import VLLMProxyClient
from vllm_server_client.errors import ServerError, VLLMProxyError

Row = Sequence[str | Text]
PIPE_WIDTH = 400        # what goes into a file or a pipe is not cut to a screen's width
CALL_TIMEOUT_S = 60.0   # of calls that change or tell something; loading and answers have limits of their own


@dataclass
class Terminal:
    """The state of one run of the command.  Results go to stdout; progress and errors to stderr."""

    url: str | None = None
    as_json: bool = False
    out: Console = field(default_factory=lambda: _console(stderr=False))
    err: Console = field(default_factory=lambda: _console(stderr=True))

    def client(self, timeout_s: float = CALL_TIMEOUT_S) -> VLLMProxyClient:
        """Raises click.UsageError for an address that is none.  The key comes from the environment alone: a command
        line can be read by every user of the machine."""
        try:
            return VLLMProxyClient(self.url, timeout_s=timeout_s)
        except ValueError as error:
            raise click.UsageError(str(error)) from None

    def print_json(self, value: Any) -> None:
        click.echo(json.dumps(value, indent=2, ensure_ascii=False))

    def show(self, value: Any, *shown: Any) -> None:
        """The value as JSON, or for people what `shown` says (tables, texts)."""
        if self.as_json:
            self.print_json(value)
        else:
            for each in shown:
                self.out.print(each, soft_wrap=isinstance(each, Text))

    def say(self, text: str, style: str = "") -> None:
        """Something about the work, which is no result."""
        if not self.as_json:
            self.err.print(Text(text, style), soft_wrap=True)

    def report(self, error: VLLMProxyError) -> Exit:
        """Tell an error on stderr, in the server's envelope if JSON is wanted."""
        code = exit_code(error)
        if self.as_json:
            envelope = error.envelope() if isinstance(error, ServerError) else {
                "error": {"message": error.message, "type": "client_error", "param": None, "code": code.name.lower()}}
            click.echo(json.dumps(envelope, ensure_ascii=False), err=True)
        else:
            self.err.print(Text.assemble(("vllm-server: ", "bold red"), error.message), soft_wrap=True)
            if code is Exit.REFUSED:
                self.say("the key is taken from VLLM_SERVER_API_KEY", "dim")
        return code


def _console(*, stderr: bool) -> Console:
    stream = sys.stderr if stderr else sys.stdout
    return Console(stderr=stderr, highlight=False, width=None if stream.isatty() else PIPE_WIDTH)


def table(columns: Sequence[str], rows: Iterable[Row], *, wide: int = 1) -> Table:
    """Of plain texts.  When the terminal is narrow, column `wide` gives way."""
    made = Table(box=SIMPLE_HEAD if sys.stdout.isatty() else None, pad_edge=False, show_edge=False)
    for index, name in enumerate(columns):
        # What may be wrapped is what rich makes narrower; a name is one word and is cut instead.
        made.add_column(name, no_wrap=index != wide, overflow="ellipsis",
                        justify="right" if name in NUMBERS else "left")
    for row in rows:
        made.add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in row))
    return made


NUMBERS = frozenset({"memory", "busy", "waiting", "tokens/s", "cache", "used", "total", "free", "load", "running",
                     "requests/s", "first token", "seconds"})


# --- options of every command ----------------------------------------------------------------------------------------

def _set_url(context: click.Context, _: click.Parameter, value: str | None) -> None:
    if value is not None:
        context.ensure_object(Terminal).url = value


def _set_json(context: click.Context, _: click.Parameter, value: bool) -> None:
    if value:
        context.ensure_object(Terminal).as_json = True


def common_options() -> list[click.Parameter]:
    return [
        click.Option(["--url"], metavar="URL", expose_value=False, callback=_set_url,
                     help=f"The server  [default: {URL_VARIABLE}, else {DEFAULT_URL}]"),
        click.Option(["--json"], is_flag=True, expose_value=False, callback=_set_json,
                     help="Print JSON, errors too (on stderr)")]


class Command(click.Command):
    """A command that takes the options of all, and ends with the exit code that its error means."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.params.extend(common_options())

    def invoke(self, context: click.Context) -> Any:
        terminal = context.ensure_object(Terminal)
        try:
            return super().invoke(context)
        except VLLMProxyError as error:
            context.exit(terminal.report(error))
        except BrokenPipeError:     # `| head` has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            context.exit(Exit.OK)


class Group(click.Group):
    """Its commands are Commands; they are listed in the order in which they were added."""

    command_class = Command

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.params.extend(common_options())

    def list_commands(self, context: click.Context) -> list[str]:
        return list(self.commands)


pass_terminal = click.make_pass_decorator(Terminal, ensure=True)
