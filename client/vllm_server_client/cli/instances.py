"""ps, gpus, stop, sleep, wake, logs: the instances and what they stand on."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import click
from rich.text import Text

from vllm_server_client.cli import find, words
from vllm_server_client.cli.complete import instance_words
from vllm_server_client.cli.terminal import Command, Row, Terminal, pass_terminal, table
from vllm_server_client.client import VLLMProxyClient
from vllm_server_client.errors import NotFound
from vllm_server_client.types import Device, Instance

STOP_TIMEOUT_S = 600.0      # requests in flight are let finish, as long as the server's DRAIN_TIMEOUT says


@click.command(cls=Command)
@pass_terminal
def ps(terminal: Terminal) -> None:
    """List the instances."""
    with terminal.client() as client:
        found = client.instances()
    if not found:
        return terminal.show(found, Text("no instances; load one: vllm-server load MODEL", "dim"))
    errors = [problem for one in found if (problem := problem_of(one))]
    return terminal.show(found, instance_table(found), *errors)


def instance_table(found: Iterable[Instance]) -> Any:
    rows: list[Row] = [[one["id"], words.name(one), words.state(one), words.devices(one["gpus"]), words.memory(one),
             str(one["in_flight"]), words.expiry(one)] for one in found]
    return table(["id", "model", "state", "on", "memory", "busy", "idle stop"], rows)


def problem_of(one: Instance) -> Text | None:
    """What a failed or waiting one lacks, as a line below the table."""
    error = one["last_error"]
    if error is None or one["status"] not in ("failed", "backoff"):
        return None
    return Text.assemble((one["id"], "bold"), ": ", (error["message"], words.STYLES[one["status"]]))


@click.command(cls=Command)
@pass_terminal
def gpus(terminal: Terminal) -> None:
    """List the devices with their memory and what is on them."""
    with terminal.client() as client:
        found = client.gpus()
    rows = [[str(one["index"]), one["name"], words.size(one["memory"]["used"]), words.size(one["memory"]["total"]),
             "-" if one["utilization"] is None else f"{one['utilization']:.0%}", _on(one)] for one in found["data"]]
    versions = f"driver {found['driver']}, CUDA {found['cuda']}" if found["driver"] else "no NVIDIA driver"
    terminal.show(found, table(["device", "name", "used", "total", "load", "instances"], rows), Text(versions, "dim"))


def _on(device: Device) -> str:
    return device["error"] or ", ".join(device["instances"]) or "-"


@click.command(cls=Command)
@click.argument("target", nargs=-1, metavar="ID|MODEL...", shell_complete=instance_words)
@click.option("--all", "everything", is_flag=True, help="Stop all instances.")
@click.option("--force", is_flag=True, help="Cut the requests that are in flight.")
@click.option("--wait/--no-wait", default=True, help="Wait until they are gone.  [default: wait]")
@pass_terminal
def stop(terminal: Terminal, target: Sequence[str], everything: bool, force: bool, wait: bool) -> None:
    """Let the requests of an instance finish, then stop it and free its memory."""
    if bool(target) == everything:
        raise click.UsageError("name the instances, or give --all")
    with terminal.client(STOP_TIMEOUT_S) as client:
        there = client.instances()
        chosen = there if everything else [one for word in target for one in find.instances(word, there)]
        chosen = list({one["id"]: one for one in chosen}.values())
        # All begin to stop before any is waited for.
        stopped = [client.stop_instance(one["id"], force=force) for one in chosen]
        if wait:
            stopped = [_gone(client, one, force) for one in stopped]
    rows: list[Row] = [[one["id"], words.name(one), words.state(one)] for one in stopped]
    terminal.show(stopped, table(["id", "model", "state"], rows) if rows else Text("nothing to stop", "dim"))


def _gone(client: VLLMProxyClient, one: Instance, force: bool) -> Instance:
    """Wait for its end; it may be gone by now."""
    if one["status"] == "stopped":
        return one
    try:
        return client.stop_instance(one["id"], force=force, wait=True)
    except NotFound:
        return {**one, "status": "stopped"}


@click.command(cls=Command)
@click.argument("target", nargs=-1, required=True, metavar="ID|MODEL...", shell_complete=instance_words)
@click.option("--level", type=click.IntRange(1, 2), help="1 keeps the weights in the host's memory, 2 does not.")
@click.option("--wait/--no-wait", default=True, help="Wait until they sleep.  [default: wait]")
@pass_terminal
def sleep(terminal: Terminal, target: Sequence[str], level: int | None, wait: bool) -> None:
    """Put instances to sleep when their requests have ended; the next request wakes them."""
    _tier(terminal, target, lambda client, one: client.sleep_instance(one["id"], level=level, wait=wait))


@click.command(cls=Command)
@click.argument("target", nargs=-1, required=True, metavar="ID|MODEL...", shell_complete=instance_words)
@click.option("--wait/--no-wait", default=True, help="Wait until they serve.  [default: wait]")
@pass_terminal
def wake(terminal: Terminal, target: Sequence[str], wait: bool) -> None:
    """Wake instances that sleep."""
    _tier(terminal, target, lambda client, one: client.wake_instance(one["id"], wait=wait))


def _tier(terminal: Terminal, target: Sequence[str], act: Callable[[VLLMProxyClient, Instance], Instance]) -> None:
    with terminal.client(STOP_TIMEOUT_S) as client:
        there = client.instances()
        chosen = {one["id"]: one for word in target for one in find.instances(word, there)}
        done = [act(client, one) for one in chosen.values()]
    terminal.show(done, instance_table(done))


@click.command(cls=Command)
@click.argument("target", metavar="ID|MODEL", shell_complete=instance_words)
@click.option("-f", "--follow", is_flag=True, help="Go on with what comes, until the instance ends or Ctrl-C.")
@click.option("-n", "--tail", type=click.IntRange(0), metavar="N", help="The last N lines  [default: 200]")
@pass_terminal
def logs(terminal: Terminal, target: str, follow: bool, tail: int | None) -> None:
    """Print the log of an instance's engine.  With --json: one string for each line."""
    with terminal.client() as client:
        chosen = find.one_instance(target, client.instances())
        if follow:
            for line in client.follow_logs(chosen["id"], tail=tail):
                _print_line(terminal, line)
        else:
            for line in client.logs(chosen["id"], tail=tail).splitlines():
                _print_line(terminal, line)


def _print_line(terminal: Terminal, line: str) -> None:
    click.echo(json.dumps(line, ensure_ascii=False) if terminal.as_json else line)
