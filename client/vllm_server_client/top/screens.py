"""The monitor's other screens: a model to load, a question before what hurts, a log that goes on."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import aclosing

from rich.text import Text
from textual import work
from textual.app import ComposeResult
from textual.binding import Binding
from textual.containers import Vertical
from textual.screen import ModalScreen, Screen
from textual.widgets import Footer, Input, Label, Log, OptionList
from textual.widgets.option_list import Option

from vllm_server_client.async_client import AsyncVLLMProxyClient
from vllm_server_client.cli import words
from vllm_server_client.errors import VLLMProxyError
from vllm_server_client.types import Instance, Model

LOG_LINES = 10_000


class LoadScreen(ModalScreen[str | None]):
    """Ends with a model's name, or None."""

    BINDINGS = [Binding("escape", "dismiss(None)", "Back")]

    def __init__(self, models: Sequence[Model]) -> None:
        super().__init__()
        self._models = sorted((one for one in models if one["status"] != "ready"), key=lambda one: one["id"])

    def compose(self) -> ComposeResult:
        with Vertical(id="box"):
            yield Label("Load a model: choose one, or type a hub name or a folder")
            yield Input(placeholder="Qwen/Qwen3-0.6B")
            yield OptionList(*(Option(f"{one['id']}  ({one['status']})", id=one["id"]) for one in self._models),
                             id="models")
            yield Label("enter loads, tab changes between both, escape goes back", classes="hint")

    def on_input_changed(self, event: Input.Changed) -> None:
        """Only what contains the typed letters is offered."""
        listed = self.query_one(OptionList)
        listed.clear_options()
        listed.add_options(Option(f"{one['id']}  ({one['status']})", id=one["id"]) for one in self._models
                           if event.value.lower() in one["id"].lower())

    def on_input_submitted(self, event: Input.Submitted) -> None:
        if name := event.value.strip():
            self.dismiss(name)

    def on_option_list_option_selected(self, event: OptionList.OptionSelected) -> None:
        self.dismiss(event.option.id)


class StopScreen(ModalScreen[str | None]):
    """Ends with "drain", "force" or None."""

    BINDINGS = [Binding("y", "dismiss('drain')", "Stop"), Binding("f", "dismiss('force')", "Force"),
                Binding("n,escape", "dismiss(None)", "No")]

    def __init__(self, instance: Instance) -> None:
        super().__init__()
        self._instance = instance

    def compose(self) -> ComposeResult:
        one = self._instance
        with Vertical(id="box"):
            yield Label(Text(f"Stop {words.name(one)} ({one['id']})?"))
            if one["in_flight"]:
                yield Label(f"{one['in_flight']} requests are in flight: y lets them finish, f cuts them.")
            yield Label("y stops it, f at once, n or escape leaves it", classes="hint")


class LogScreen(Screen[None]):
    """An engine's log; it goes on while it is at its end."""

    BINDINGS = [Binding("escape,q", "dismiss", "Back", key_display="esc"), Binding("space", "follow", "Hold/Follow"),
                Binding("home,g", "top", "Begin", show=False), Binding("end,G", "bottom", "End", show=False)]

    def __init__(self, client: AsyncVLLMProxyClient, instance: Instance) -> None:
        super().__init__()
        self._client, self._instance = client, instance

    def compose(self) -> ComposeResult:
        yield Label(Text(f"log of {words.name(self._instance)} ({self._instance['id']})"), id="title")
        yield Log(max_lines=LOG_LINES, highlight=False)
        yield Footer()

    def on_mount(self) -> None:
        self.query_one(Log).focus()
        self._read()

    @work(exclusive=True)
    async def _read(self) -> None:
        log = self.query_one(Log)
        try:
            async with aclosing(self._client.follow_logs(self._instance["id"], tail=1000)) as lines:
                async for line in lines:
                    log.write_line(words.plain(line.rpartition("\r")[2]))
            log.write_line("--- the instance has ended")
        except VLLMProxyError as error:
            log.write_line(f"--- {error.message}")

    def action_follow(self) -> None:
        log = self.query_one(Log)
        log.auto_scroll = not log.auto_scroll
        if log.auto_scroll:
            log.scroll_end(animate=False)

    def action_top(self) -> None:
        self.query_one(Log).auto_scroll = False
        self.query_one(Log).scroll_home(animate=False)

    def action_bottom(self) -> None:
        self.query_one(Log).auto_scroll = True
        self.query_one(Log).scroll_end(animate=False)
