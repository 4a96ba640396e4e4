"""stats, events, requests: how much there is to do, what happened, and what was asked lately."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from typing import Any

import click
from rich.text import Text

from vllm_server_client.cli import words
from vllm_server_client.cli.terminal import Command, Row, Terminal, pass_terminal, table
from vllm_server_client.errors import AuthenticationFailed, PermissionDenied
from vllm_server_client.types import BackendLoad, History, RecentRequest

SPANS = (("last minute", 60.0), ("last 10 minutes", 600.0), ("last hour", 3600.0))


@click.command(cls=Command)
@pass_terminal
def stats(terminal: Terminal) -> None:
    """Tell how much each instance and server has to do, and how the last hour was.

    With --json: the answer of /load-stats.
    """
    with terminal.client() as client:
        found = client.load_stats()
        history = None
        with suppress(AuthenticationFailed, PermissionDenied):      # everyone may see the load, not the hour
            history = client.history() if not terminal.as_json else None
    summary = found["summary"]
    lines = [Text(f"{summary['healthy_servers']} of {summary['total_servers']} take requests; running "
                  f"{summary['total_running']:g}, waiting {summary['total_waiting']:g}, load "
                  f"{summary['overall_utilization_percent']:g}%; routing: {found['policy']}", "dim")]
    shown = [backend_table(found["servers"])] if found["servers"] else [Text("no instances and no servers", "dim")]
    terminal.show(found, *shown, *lines, *([] if history is None else [past_table(history)]))


def backend_table(backends: Iterable[BackendLoad]) -> Any:
    rows: list[Row] = [[
        one["id"], ", ".join(one["models"]) or "-", _state(one), f"{one['running']:g}", f"{one['waiting']:g}",
        f"{one['utilization']:.0%}", words.rate(one["tokens_per_s"]), words.rate(one["requests_per_s"]),
        words.wait(one["ttft_s"]), "-" if one["cache_usage"] is None else f"{one['cache_usage']:.0%}"]
        for one in backends]
    return table(["backend", "models", "state", "running", "waiting", "load", "tokens/s", "requests/s", "first token",
                  "cache"], rows)


def _state(one: BackendLoad) -> Text:
    style = words.STYLES.get(one["health"], "green" if one["status"] else "red")
    breaker = "" if one["circuit"] == "closed" else f", breaker {one['circuit'].replace('_', ' ')}"
    return Text(one["health"].replace("_", " ") + breaker, style)


def past_table(history: History) -> Any:
    rows: list[Row] = []
    now = history["at"][-1] if history["at"] else 0.0
    for name, span_s in SPANS:
        chosen = [index for index, at in enumerate(history["at"]) if at > now - span_s]
        rows.append([name, *figures_of(history["total"], chosen, history["every_s"])])
    return table(["all together", "requests", "tokens", "tokens/s", "first token", "most in flight", "most waiting"],
                 rows)


def figures_of(columns: Mapping[str, Sequence[float | None]], chosen: Sequence[int], every_s: float) -> list[str]:
    """Requests and tokens in these samples, tokens a second, the mean time to a first token, and the most at once."""
    def there(name: str) -> list[float]:
        return [value for index in chosen if (value := columns[name][index]) is not None]

    tokens, firsts = there("tokens_per_s"), there("ttft_s")
    return [f"{sum(there('requests_per_s')) * every_s:.0f}", f"{sum(tokens) * every_s:.0f}",
            words.rate(sum(tokens) / len(tokens) if tokens else None),
            words.wait(sum(firsts) / len(firsts) if firsts else None),
            f"{max(there('in_flight'), default=0):g}", f"{max(there('waiting'), default=0):g}"]


@click.command(cls=Command)
@click.option("-f", "--follow", is_flag=True, help="Go on with what comes, until Ctrl-C.")
@click.option("-n", "--tail", type=click.IntRange(0, 500), metavar="N", help="The last N  [default: 100]")
@pass_terminal
def events(terminal: Terminal, follow: bool, tail: int | None) -> None:
    """Show what happened to instances: new states, and the steps of loads.

    With --json a list; with --follow one object a line.
    """
    with terminal.client() as client:
        found = client.events(tail=tail)
        if not follow:
            return terminal.show(found, *(map(event_line, found) if found else [Text("nothing has happened", "dim")]))
        for event in found:
            _tell(terminal, event)
        for happened in client.follow_events(after=found[-1]["id"] if found else None):
            if happened["event"] in ("state", "phase"):
                _tell(terminal, happened)
    return None


def _tell(terminal: Terminal, event: Mapping[str, Any]) -> None:
    if terminal.as_json:
        click.echo(json.dumps(event, ensure_ascii=False))
    else:
        terminal.out.print(event_line(event), soft_wrap=True)


def event_line(event: Mapping[str, Any]) -> Text:
    at = f"{datetime.fromtimestamp(event['at']):%H:%M:%S}"
    who = words.plain(f"{event.get('model', '?')} {event.get('instance', '')}")
    text, style = what_happened(event)
    return Text.assemble((f"{at} ", "dim"), f"{who} ", (text, style))


def what_happened(event: Mapping[str, Any]) -> tuple[str, str]:
    """In words, and in which style."""
    if event["event"] == "phase":
        share = event.get("progress")
        return f"{event['phase'].replace('_', ' ')}{'' if share is None else f' {share:.0%}'}", "dim"
    why = event.get("why")
    return (words.plain(f"is {event['to'].replace('_', ' ')}{f': {why}' if why else ''}"),
            words.STYLES.get(event["to"], ""))


@click.command(cls=Command)
@click.option("--failed", is_flag=True, help="Only those that failed.")
@click.option("-n", "--tail", type=click.IntRange(0, 1000), metavar="N", help="The last N  [default: 100]")
@pass_terminal
def requests(terminal: Terminal, failed: bool, tail: int | None) -> None:
    """Show the last requests for models and how they were answered; never what they asked."""
    with terminal.client() as client:
        found = client.recent_requests(tail=tail, failed=failed)
    terminal.show(found, table(
        ["at", "model", "call", "answer", "code", "first token", "seconds", "backend", "key"], map(_row, found))
        if found else Text("no requests yet", "dim"))


def _row(one: RecentRequest) -> Row:
    bad = one["status"] is None or one["status"] >= 400
    return [f"{datetime.fromtimestamp(one['at']):%H:%M:%S}", one["model"] or "-", one["path"],
            Text(str(one["status"] or "-"), "red" if bad else ""), one["code"] or "", words.wait(one["first_byte_s"]),
            words.wait(one["seconds"]), one["backend"] or "-", one["key"] or "-"]
