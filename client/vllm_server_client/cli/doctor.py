"""doctor: looks at all that vllm-server needs, and says what to do about what is missing."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import click
from rich.text import Text

from vllm_server_client.cli import checks, home
from vllm_server_client.cli.checks import Finding, Verdict
from vllm_server_client.cli.exits import Exit
from vllm_server_client.cli.terminal import Command, Terminal

MARKS = {Verdict.OK: ("ok", "green"), Verdict.WARN: ("warn", "yellow"), Verdict.FAIL: ("FAIL", "bold red"),
         Verdict.SKIP: ("skip", "dim")}
LOCAL = frozenset({"localhost", "127.0.0.1", "::1", "0.0.0.0"})  # nosec B104
SERVER_TIMEOUT_S = 10.0


@click.command(cls=Command)
@click.option("--offline", is_flag=True, help="Do not ask the model hub.")
@click.pass_context
def doctor(context: click.Context, offline: bool) -> None:
    """Check engine, GPU and driver, ports, disks, priority, hub and settings.

    Exit code 1 when a check fails.  For a server on another machine only the server itself is checked.
    """
    terminal = context.ensure_object(Terminal)
    findings = []
    for finding in _findings(terminal, offline):
        findings.append(finding)
        if not terminal.as_json:
            terminal.out.print(_line(finding), soft_wrap=True)
    if terminal.as_json:
        terminal.print_json([{"name": one.name, "verdict": one.verdict, "found": one.found, "advice": one.advice}
                             for one in findings])
    if any(finding.verdict is Verdict.FAIL for finding in findings):
        context.exit(Exit.FAILED)


def _line(finding: Finding) -> Text:
    mark, style = MARKS[finding.verdict]
    text = Text.assemble((f"{mark:<5}", style), (f"{finding.name:<15}", "bold"), finding.found)
    if finding.advice:
        text.append(f"\n{'':20}{finding.advice}", "dim")
    return text


def _findings(terminal: Terminal, offline: bool) -> Iterator[Finding]:
    """One after another, as they are found: some take seconds."""
    with terminal.client(SERVER_TIMEOUT_S) as client:
        there = checks.server(client)
        yield there
        serves = there.serves
        if serves:
            yield checks.management(client)
    where = urlsplit(client.base_url)
    if where.hostname in LOCAL:
        yield from _here(terminal, offline, where.port if serves else None)


def _here(terminal: Terminal, offline: bool, served_port: int | None) -> Iterator[Finding]:
    """Of this machine, with the settings that a daemon started in this folder would have."""
    found: dict[str, Any] | None = None
    try:
        place = home.find()
        found = home.settings(place)
        yield checks.settings(found)
        yield checks.access(found)
    except home.NoDaemon as error:
        yield Finding("settings", Verdict.FAIL, str(error), "correct it, and call doctor again")
    values = found["settings"] if found is not None else {}
    if found is not None:
        with terminal.err.status("the engine's version ..."):
            yield checks.engine(values["VLLM_COMMAND"], home.engine_elsewhere(place, values["VLLM_COMMAND"]))
        yield checks.address(values["APP_HOST"], values["APP_PORT"], serves=values["APP_PORT"] == served_port)
        yield checks.instance_ports(values["VLLM_BASE_PORT"], values["VLLM_MAX_INSTANCES"])
        yield checks.state_disk(Path(values["STATE_DIR"]))
    for check in (checks.driver, checks.host_memory, checks.shared_memory, checks.open_files):
        yield check()
    yield checks.priority(bool(values.get("APP_REALTIME", True)))
    environ = {name: str(value) for name, value in values.items() if value is not None} | dict(os.environ)
    yield checks.model_disk(Path(environ.get("HF_HOME", "~/.cache/huggingface")).expanduser())
    if not offline:
        yield checks.hub(environ.get("HF_ENDPOINT", "https://huggingface.co"), environ)
