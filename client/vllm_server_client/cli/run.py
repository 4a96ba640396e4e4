"""run: the daemon itself, on the machine and in the folder where this is called."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import click

from vllm_server_client.cli import home
from vllm_server_client.cli.terminal import Command, Terminal

FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


@click.command(cls=Command)
@click.option("--host", metavar="ADDRESS", help="To listen on  [default: APP_HOST, else 0.0.0.0]")
@click.option("--port", type=click.IntRange(0, 65535), metavar="PORT", help="[default: APP_PORT, else 5000]")
@click.option("--config", type=FILE, metavar="FILE", help="Instead of ./config.yaml.")
@click.option("--env", type=FILE, metavar="FILE", help="Instead of ./.env.")
@click.pass_context
def run(context: click.Context, host: str | None, port: int | None, config: Path | None, env: Path | None) -> None:
    """Start the daemon here.

    It needs a checkout of vllm-server (the working directory, or VLLM_SERVER_HOME) or its container image, and uses the
    settings of the working directory.  Ctrl-C stops it and all its instances.
    """
    terminal = context.ensure_object(Terminal)
    given = (("--host", host), ("--port", port), ("--config", config), ("--env", env))
    arguments = [word for name, value in given if value is not None for word in (name, str(value))]
    try:
        place = home.find()
        engine = home.engine_elsewhere(place, home.settings(place, arguments)["settings"]["VLLM_COMMAND"])
    except home.NoDaemon as error:
        raise click.ClickException(str(error)) from None
    if engine is not None:
        terminal.say(f"engine: {engine}", "dim")
        os.environ["VLLM_COMMAND"] = engine
    command = place.command(*arguments)
    sys.stdout.flush()
    # In place of this process: signals, exit code and the terminal are the daemon's own.
    os.execv(command[0], command)
