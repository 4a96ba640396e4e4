"""top: the monitor, or with --json one look."""

from __future__ import annotations

import asyncio
import sys
from dataclasses import asdict

import click

from vllm_server_client.async_client import AsyncVLLMProxyClient
from vllm_server_client.cli.terminal import Command, Terminal, pass_terminal

PATIENCE_S = 10.0


@click.command(cls=Command)
@click.option("--interval", type=click.FloatRange(0.1, 3600), default=1.0, metavar="SECONDS",
              help="Between two looks  [default: 1]")
@pass_terminal
def top(terminal: Terminal, interval: float) -> None:
    """Watch devices, instances and events, full screen.  With --json: one look, at once."""
    from vllm_server_client.top import snapshot

    try:
        client = AsyncVLLMProxyClient(terminal.url, timeout_s=PATIENCE_S, max_retries=0)
    except ValueError as error:
        raise click.UsageError(str(error)) from None

    async def look() -> snapshot.Snapshot:
        async with client:
            return await snapshot.take(client)

    async def watch() -> None:
        async with client:
            await snapshot.take(client)     # who may not look, or asks nobody, is told before the screen is taken
            await Monitor(client, interval).run_async(mouse=False)

    if terminal.as_json:
        terminal.print_json(asdict(asyncio.run(look())))
        return
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise click.UsageError("top needs a terminal; --json gives one look without")
    from vllm_server_client.top.app import Monitor

    asyncio.run(watch())
