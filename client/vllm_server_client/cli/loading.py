"""Waits for an instance to be ready and shows how far it is: a bar on a terminal, one line a phase elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, Progress, SpinnerColumn, TaskProgressColumn, TextColumn

from vllm_server_client.cli import words
from vllm_server_client.cli.exits import LoadFailed
from vllm_server_client.cli.terminal import Terminal
from vllm_server_client.client import VLLMProxyClient
from vllm_server_client.errors import NotFound, TimedOut
from vllm_server_client.types import Instance

POLL_S = 0.25
LOADING = frozenset({"starting", "waking", "backoff"})
PENDING = LOADING | {"falling_asleep", "sleeping"}      # of one that was told to load

Show = Callable[[Instance], None]


def begin(client: VLLMProxyClient, model: str) -> tuple[Instance, float | None]:
    """Load a model by the server's configuration, or as a hub's name or a folder where that has none of this name.

    Its instance, and the seconds that it took before, where that is known.
    """
    if model not in {name for one in client.configured_models() for name in (one["id"], *one["aliases"])}:
        return client.create_instance(model), None
    expected_s = client.plan(model)["seconds_expected"]
    shown = client.load(model)
    found = next((one for one in shown["instances"] if one["status"] in PENDING | {"ready"}), None)
    if found is None:
        raise LoadFailed(f"{model} was loaded and is {shown['status']} again", code="stopped")
    return client.instance(found["id"]), expected_s


def until_ready(terminal: Terminal, client: VLLMProxyClient, instance: Instance, *, timeout_s: float | None,
                expected_s: float | None = None) -> Instance:
    """The instance once it serves.

    Raises LoadFailed with the cause when it failed or was stopped, TimedOut after `timeout_s`; loading goes on then.
    """
    started = time.monotonic()
    with _shown(terminal, words.name(instance), expected_s) as show:
        while instance["status"] in PENDING:
            show(instance)
            if timeout_s is not None and time.monotonic() - started >= timeout_s:
                raise TimedOut(f"{words.name(instance)} is still {instance['status']} after {timeout_s:g} s; "
                               f"it goes on: vllm-server ps, vllm-server logs -f {instance['id']}")
            time.sleep(POLL_S)
            try:
                instance = client.instance(instance["id"])
            except NotFound:
                break
    if instance["status"] == "ready":
        return instance
    error = instance["last_error"]
    if instance["status"] != "failed" or error is None:
        raise LoadFailed(f"instance {instance['id']} of {instance['model_name']} was stopped before it was ready",
                         code="stopped")
    raise LoadFailed(f"{error['message']} (its log: vllm-server logs {instance['id']})", code=error["code"])


def step(instance: Instance) -> str:
    """What it does now, in a few words."""
    if instance["status"] == "backoff" and instance["last_error"] is not None:
        return f"failed, next try in {words.span(instance['retry_in'])}: {instance['last_error']['message']}"
    phase = instance["phase"] if instance["status"] == "starting" else None
    return (phase or instance["status"]).replace("_", " ")


@contextmanager
def _shown(terminal: Terminal, name: str, expected_s: float | None) -> Iterator[Show]:
    if terminal.as_json:
        yield lambda _: None
    elif terminal.err.is_terminal:
        with _bar(terminal, name, expected_s) as show:
            yield show
    else:
        with _lines(terminal, name) as show:
            yield show


@contextmanager
def _bar(terminal: Terminal, name: str, expected_s: float | None) -> Iterator[Show]:
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(bar_width=20), TaskProgressColumn(),
               TextColumn("{task.fields[times]}", style="dim"))
    with Progress(*columns, console=terminal.err, transient=True) as progress:
        task = progress.add_task(name, total=None, times="")

        def show(instance: Instance) -> None:
            elapsed_s = progress.tasks[0].elapsed or 0.0
            usual_s = instance["expected"] or expected_s
            of = f" of about {words.span(usual_s)}" if usual_s else ""
            share = instance["progress"]
            progress.update(task, description=f"{name}: {step(instance)}"[:48], total=None if share is None else 1.0,
                            completed=share or 0.0, times=f"{words.span(elapsed_s)}{of}")
        yield show


@contextmanager
def _lines(terminal: Terminal, name: str) -> Iterator[Show]:
    told = ""

    def show(instance: Instance) -> None:
        nonlocal told
        if (now := step(instance).partition(":")[0]) != told:
            told = now
            terminal.say(f"{name}: {step(instance)}")
    yield show
