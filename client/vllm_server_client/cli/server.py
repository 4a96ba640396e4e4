"""health, audit, reload, completion: the server as a whole, and the shell."""

from __future__ import annotations

import os
from datetime import datetime
from pathlib import Path

import click
from click.shell_completion import get_completion_class
from rich.text import Text

from vllm_server_client.cli.terminal import Command, Row, Terminal, pass_terminal, table

SHELLS = ("bash", "zsh", "fish")
VARIABLE = "_VLLM_SERVER_COMPLETE"


@click.command(cls=Command)
@pass_terminal
def health(terminal: Terminal) -> None:
    """Ask whether the server serves.  Exit code 3 when it does not."""
    with terminal.client() as client:
        found = client.health()
    simulated = " with a SIMULATED engine" if found["simulated"] else ""
    problem = found["config"]["error"]
    wrong = [Text(f"the configuration on disk is not used: {problem}", "yellow")] if problem else []
    terminal.show(found, Text(f"{found['status']}: version {found['version']}{simulated}, {found['instances']} "
                              f"instances, ready: {found['ready']}"), *wrong)


@click.command(cls=Command)
@click.option("-n", "--tail", type=click.IntRange(0, 1000), metavar="N", help="The last N entries  [default: 200]")
@pass_terminal
def audit(terminal: Terminal, tail: int | None) -> None:
    """Show who managed what lately: the calls that may change something, and those that were refused."""
    with terminal.client() as client:
        found = client.audit(tail=tail)
    rows: list[Row] = []
    for one in found:
        call = " ".join(filter(None, (one["method"], one["path"], one.get("model"))))
        rows.append([f"{datetime.fromtimestamp(one['at']):%m-%d %H:%M:%S}", call, str(one["status"]), one["code"] or "",
                     one["who"], one["from"] or ""])
    terminal.show(found, table(["at", "call", "answer", "code", "who", "from"], rows))


@click.command(cls=Command)
@pass_terminal
def reload(terminal: Terminal) -> None:
    """Make the server read its settings anew; a mistake leaves the old ones in force."""
    with terminal.client() as client:
        found = client.reload()
    models = found["models"]
    lists = (("added", models["added"]), ("removed", models["removed"]), ("changed", models["changed"]))
    changed = found["changed"] + [f"model {name} {what}" for what, names in lists for name in names]
    terminal.show(found, Text(f"changed: {', '.join(changed)}" if changed else "nothing changed"))


@click.command(cls=Command)
@click.argument("shell", type=click.Choice(SHELLS), required=False)
@click.pass_context
def completion(context: click.Context, shell: str | None) -> None:
    """Print what makes a shell complete commands, models and ids.

    For bash, in ~/.bashrc:  eval "$(vllm-server completion bash)"
    """
    chosen = shell or Path(os.environ.get("SHELL", "")).name
    if chosen not in SHELLS:
        raise click.UsageError(f"name the shell: {', '.join(SHELLS)}")
    root = context.find_root()
    kind = get_completion_class(chosen)
    assert kind is not None
    source = kind(root.command, {}, "vllm-server", VARIABLE).source()
    terminal = context.ensure_object(Terminal)
    if terminal.as_json:
        terminal.print_json({"shell": chosen, "script": source})
    else:
        click.echo(source)
