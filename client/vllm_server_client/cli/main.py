"""The command `vllm-server` and the list of its commands."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import NoReturn

import click

from vllm_server_client import __version__
from vllm_server_client.cli import chat, doctor, instances, models, run, server, stats, top
from vllm_server_client.cli.exits import MEANINGS, Exit
from vllm_server_client.cli.server import VARIABLE
from vllm_server_client.cli.terminal import Group

EPILOG = "\b\nExit codes:\n" + "\n".join(f"  {code:>3}  {meaning}" for code, meaning in MEANINGS.items())


@click.group(cls=Group, epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="vllm-server")
def cli() -> None:
    """Talk to a vllm-server: see what runs, load and stop models, chat.

    The server's address is --url, else VLLM_SERVER_URL; the key is VLLM_SERVER_API_KEY.
    """


for each in (instances.ps, models.models, models.load, models.plan, models.unload, instances.stop, instances.sleep,
             instances.wake, instances.logs, chat.chat, top.top, stats.stats, stats.events, stats.requests,
             instances.gpus, server.health, server.audit,
             server.reload, run.run, doctor.doctor, server.completion):
    cli.add_command(each)


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run it, and exit with a code of exits.py."""
    try:
        code = cli.main(argv, prog_name="vllm-server", complete_var=VARIABLE, standalone_mode=False)
    except click.ClickException as error:
        if "--json" in (sys.argv[1:] if argv is None else argv):
            click.echo(json.dumps({"error": {"message": error.format_message(), "type": "client_error", "param": None,
                                             "code": Exit.USAGE.name.lower()}}, ensure_ascii=False), err=True)
        else:
            error.show()
        code = error.exit_code
    except (click.Abort, KeyboardInterrupt):
        code = Exit.INTERRUPTED
    sys.exit(code or Exit.OK)
