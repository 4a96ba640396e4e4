"""run: the daemon itself, on the machine and in the folder where this is called."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import click

from vllm_server_client.calls import KEY_VARIABLE
from vllm_server_client.cli import home, watched_run
from vllm_server_client.cli.terminal import Command, Terminal

FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


@click.command(cls=Command)
@click.option("--host", metavar="ADDRESS", help="To listen on  [default: APP_HOST, else 0.0.0.0]")
@click.option("--port", type=click.IntRange(0, 65535), metavar="PORT", help="[default: APP_PORT, else 5000]")
@click.option("--config", type=FILE, metavar="FILE", help="Instead of ./config.yaml.")
@click.option("--servers", type=FILE, metavar="FILE", help="Instead of ./servers.toml.")
@click.option("--env", type=FILE, metavar="FILE", help="Instead of ./.env.")
@click.option("--console", "form", flag_value="console", help="Its log on this terminal.")
@click.option("--monitor", "form", flag_value="monitor",
              help="The monitor on this terminal, the log in a file.  [default on a terminal]")
@click.pass_context
def run(context: click.Context, host: str | None, port: int | None, config: Path | None,
        servers: Path | None, env: Path | None, form: str | None) -> None:
    """Start the daemon here.

    It needs a checkout of vllm-server (the working directory, or VLLM_SERVER_HOME) or its container image, and uses the
    settings of the working directory.  Its end (q in the monitor, Ctrl-C, SIGTERM) stops all its instances.
    """
    terminal = context.ensure_object(Terminal)
    given = (("--host", host), ("--port", port), ("--config", config), ("--servers", servers),
             ("--env", env))
    arguments = [word for name, value in given if value is not None for word in (name, str(value))]
    try:
        place = home.find()
        settings = home.settings(place, arguments)["settings"]
        engine = home.engine_elsewhere(place, settings["VLLM_COMMAND"])
    except home.NoDaemon as error:
        raise click.ClickException(str(error)) from None
    if engine is not None:
        terminal.say(f"engine: {engine}", "dim")
        os.environ["VLLM_COMMAND"] = engine
    command = place.command(*arguments)
    if _wants_monitor(terminal, form, bool(settings["ADMIN_API_KEYS"])):
        context.exit(watched_run.run(terminal, command, Path(settings["STATE_DIR"])))
    sys.stdout.flush()
    # In place of this process: signals, exit code and the terminal are the daemon's own.
    os.execv(command[0], command)


def _wants_monitor(terminal: Terminal, form: str | None, needs_key: bool) -> bool:
    """Raises click.UsageError when it is asked for where it cannot be."""
    on_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    lacks_key = needs_key and not os.environ.get(KEY_VARIABLE)
    if form == "monitor":
        if not on_terminal:
            raise click.UsageError("--monitor needs a terminal")
        if lacks_key:
            raise click.UsageError(f"--monitor needs one of the ADMIN_API_KEYS in {KEY_VARIABLE}")
    if form is None and on_terminal and lacks_key:
        terminal.say(f"no monitor without one of the ADMIN_API_KEYS in {KEY_VARIABLE}; here is the log", "dim")
    return form != "console" and on_terminal and not lacks_key
