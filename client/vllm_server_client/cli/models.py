"""models, load, plan, unload: what can be named in requests, and bringing it into memory and out of it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
from rich.text import Text

from vllm_server_client.cli import loading, words
from vllm_server_client.cli.complete import model_words
from vllm_server_client.cli.exits import Exit
from vllm_server_client.cli.instances import STOP_TIMEOUT_S, instance_table
from vllm_server_client.cli.terminal import Command, Row, Terminal, pass_terminal, table
from vllm_server_client.types import Displaced


@click.command(cls=Command)
@pass_terminal
def models(terminal: Terminal) -> None:
    """List the models that requests may name."""
    with terminal.client() as client:
        found = client.models()
    rows: list[Row] = [[one["id"], _status(one["status"]),
             str(len(one["instances"])), one["root"] if one["root"] != one["id"] else ""] for one in found]
    terminal.show(found, table(["model", "state", "instances", "from"], rows, wide=3) if rows
                  else Text("no models; load one: vllm-server load MODEL", "dim"))


@click.command(cls=Command)
@click.argument("model", shell_complete=model_words)
@click.option("-p", "--param", "params", multiple=True, metavar="FLAG=VALUE",
              help="A flag of vLLM, e.g. -p max_model_len=4096; several may be given.")
@click.option("--idle-timeout", type=click.FloatRange(0), metavar="SECONDS",
              help="Without a request for so long, it is stopped or put to sleep; 0: never.")
@click.option("--sleep", type=click.IntRange(0, 2), metavar="LEVEL", help="How it sleeps when it idles: 1 or 2.")
@click.option("--new", is_flag=True, help="One more replica.")
@click.option("--replace", is_flag=True, help="In place of one that has other flags.")
@click.option("--wait/--no-wait", default=True, help="Wait until it is ready, and show how far it is.  [default: wait]")
@click.option("--timeout", type=click.FloatRange(0), metavar="SECONDS", help="Wait no longer; loading goes on.")
@pass_terminal
def load(terminal: Terminal, model: str, params: Sequence[str], wait: bool, timeout: float | None,
         **options: Any) -> None:
    """Load a model: one of the server's config.yaml, a name of Hugging Face, or a folder.

    The options that say how it runs are for the latter two; a configured model runs as it is configured.
    """
    with terminal.client() as client:
        if params or any(value not in (None, False) for value in options.values()):
            instance, expected_s = client.create_instance(whole_path(model), flags(params), **options), None
        else:
            instance, expected_s = loading.begin(client, whole_path(model))
        if wait:
            instance = loading.until_ready(terminal, client, instance, timeout_s=timeout, expected_s=expected_s)
    terminal.show(instance, instance_table([instance]))


@click.command(cls=Command)
@click.argument("model", shell_complete=model_words)
@click.pass_context
def plan(context: click.Context, model: str) -> None:
    """Tell what loading a configured model would do, without doing it.  Exit code 6 when it does not fit."""
    terminal = context.ensure_object(Terminal)
    with terminal.client() as client:
        found = client.plan(model)
    verdict = Text("fits", "green") if found["fits"] else Text("does not fit now", "red")
    lines = [Text.assemble((found["model"], "bold"), " ", verdict, f": {found['because']}")]
    if found["bytes_per_gpu"] is not None:
        lines.append(Text(f"memory    {words.size(found['bytes_per_gpu'])} on each device ({found['source']})"))
    if found["gpus"]:
        lines.append(Text(f"devices   {words.devices(found['gpus'])}"))
    lines += [Text(f"{what:<10}{', '.join(_displaced(one) for one in going)}")
              for what, going in (("to sleep", found["sleep"]), ("to stop", found["stop"])) if going]
    if found["seconds_expected"] is not None:
        lines.append(Text(f"takes     about {words.span(found['seconds_expected'])}"))
    terminal.show(found, *lines)
    context.exit(Exit.OK if found["fits"] else Exit.UNAVAILABLE)


def _displaced(one: Displaced) -> str:
    return f"{one['model'] or 'an instance'} ({one['id']})"


@click.command(cls=Command)
@click.argument("model", shell_complete=model_words)
@click.option("--force", is_flag=True, help="Cut the requests that are in flight.")
@click.option("--wait/--no-wait", default=True, help="Wait until it is gone.  [default: wait]")
@pass_terminal
def unload(terminal: Terminal, model: str, force: bool, wait: bool) -> None:
    """Stop all instances of a model.  A configured one is loaded again by the next request for it."""
    with terminal.client(STOP_TIMEOUT_S) as client:
        shown = client.unload(model, force=force, wait=wait)
    terminal.show(shown, Text.assemble(f"{shown['id']} is ", _status(shown["status"])))


def _status(status: str) -> Text:
    return Text(status.replace("_", " "), words.STYLES.get(status, ""))


def flags(params: Sequence[str]) -> dict[str, Any]:
    """`flag=value` words; a value that is JSON is taken as such, any other as text.  Raises click.BadParameter."""
    found: dict[str, Any] = {}
    for word in params:
        name, equals, value = word.lstrip("-").partition("=")
        if not name or not equals:
            raise click.BadParameter(f"{word!r} should look like max_model_len=4096", param_hint="--param")
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    return found


def whole_path(model: str) -> str:
    """A folder here as an absolute path, since the server is at home in another one; any other name as it is."""
    return str(Path(model).resolve()) if model.startswith((".", "~")) and Path(model).expanduser().is_dir() else model

