"""The monitor's main screen: devices, instances, servers, events, and keys that act on the chosen instance."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import suppress

from rich.text import Text
from textual import work
from textual.app import App, ComposeResult
from textual.binding import Binding
from textual.events import Resize
from textual.screen import Screen
from textual.widgets import DataTable, Footer, Static

from vllm_server_client.async_client import AsyncVLLMProxyClient
from vllm_server_client.cli import words
from vllm_server_client.errors import VLLMProxyError
from vllm_server_client.top import drawing, snapshot
from vllm_server_client.top.screens import LoadScreen, LogScreen, StopScreen
from vllm_server_client.top.snapshot import Event, Snapshot
from vllm_server_client.types import Instance

EVENTS_KEPT = 200
EVENTS_SHOWN = 5
SERVERS_SHOWN = 6


class Monitor(App[None]):
    """The full-screen program.  `client` is closed by the caller; it ends when the server is no longer `alive`."""

    ENABLE_COMMAND_PALETTE = False
    CSS = """
    MainScreen Static { text-wrap: nowrap; text-overflow: ellipsis; }
    #head { height: 1; }
    #devices { height: auto; max-height: 40%; overflow-y: auto; }
    #instances { height: 1fr; min-height: 4; }
    #detail, .hint { height: 1; color: $text-muted; }
    #servers { height: auto; max-height: 6; }
    #events { height: auto; max-height: 5; }
    DataTable { background: $background; }
    LoadScreen, StopScreen { align: center middle; }
    #box { width: 70; max-width: 95%; height: auto; max-height: 90%; border: round $primary; padding: 0 1; }
    #models { height: auto; max-height: 10; }
    """
    BINDINGS = [Binding("ctrl+c", "quit", show=False, priority=True)]

    def __init__(self, client: AsyncVLLMProxyClient, interval_s: float, *,
                 alive: Callable[[], bool] = lambda: True) -> None:
        super().__init__()
        self._client, self._interval_s, self._alive = client, interval_s, alive

    def on_mount(self) -> None:
        self.push_screen(MainScreen(self._client, self._interval_s))
        self.set_interval(self._interval_s, self._end_with_server)

    def _end_with_server(self) -> None:
        if not self._alive():
            self.exit()


class MainScreen(Screen[None]):
    """Asks the server every `interval_s` and shows what it answers.  While it does not, the last answer stays."""

    BINDINGS = [
        Binding("l", "load", "Load"), Binding("s", "sleep", "Sleep/Wake"), Binding("x", "stop", "Stop"),
        Binding("f", "logs", "Logs"), Binding("q", "app.quit", "Quit")]

    def __init__(self, client: AsyncVLLMProxyClient, interval_s: float) -> None:
        super().__init__()
        self._client, self._interval_s = client, interval_s
        self._new: Snapshot | None = None
        self._widths = drawing.widths(80)
        self._written: dict[str, Text] = {}
        self._events: deque[tuple[str, Event]] = deque(maxlen=EVENTS_KEPT)

    def compose(self) -> ComposeResult:
        yield Static(Text(f"asking {self._client.base_url} ..."), id="head")
        yield Static(id="devices")
        yield Static(id="servers")
        yield DataTable(id="instances", cursor_type="row", cell_padding=0, zebra_stripes=False)
        yield Static(id="detail")
        yield Static(id="events")
        yield Footer()

    def on_mount(self) -> None:
        self._make_columns()
        self._table.focus()
        self._watch()

    def on_resize(self, _: Resize) -> None:
        if self._new is not None:
            self._make_columns()
            self._show()

    @property
    def _table(self) -> DataTable[Text]:
        return self.query_one("#instances", DataTable)

    def _write(self, name: str, *lines: Text) -> None:
        """Into a part of the screen; nothing is drawn that stands there already.

        Only a part that grows or shrinks makes the others be drawn anew.
        """
        text, old = Text("\n").join(lines), self._written.get(name)
        if text != old:
            self._written[name] = text
            same_height = old is not None and old.plain.count("\n") == text.plain.count("\n")
            self.query_one(f"#{name}", Static).update(text, layout=not same_height)

    # --- what is shown --------------------------------------------------------------------------------------------

    def _make_columns(self) -> None:
        """Anew, for this width."""
        self._table.clear(columns=True)
        self._widths = drawing.widths(self.size.width)
        for name, width in zip(drawing.COLUMNS, self._widths, strict=True):
            self._table.add_column(name, key=name or "letter", width=width + 1)

    @work(exclusive=True, group="watch")
    async def _watch(self) -> None:
        while True:
            try:
                new = await snapshot.take(self._client)
            except VLLMProxyError as error:
                self._write("head", Text(error.message, "bold red"))
            else:
                self._note(snapshot.changes(self._new, new))
                self._new = new
                self._show()
            await asyncio.sleep(self._interval_s)

    def _note(self, events: list[Event]) -> None:
        for event in events:
            self._events.append((time.strftime("%H:%M:%S", time.localtime(event.at)), event))

    def _show(self) -> None:
        new = self._new
        assert new is not None
        self._write("head", drawing.headline(new, self._client.base_url))
        self._write("devices", *(drawing.device_line(device, new.instances, self.size.width)
                                 for device in new.devices["data"]))
        self._write("servers", *(drawing.server_line(one, self.size.width) for one in new.servers[:SERVERS_SHOWN]))
        self.query_one("#servers", Static).display = bool(new.servers)
        self._show_instances(new)
        shown = list(self._events)[-EVENTS_SHOWN:]
        self._write("events", *(Text.assemble((f"{at} ", "dim"), (event.text, event.style)) for at, event in shown))
        self._show_detail()

    def _show_detail(self) -> None:
        chosen = self._chosen()
        self._write("detail", Text("no instances: l loads a model", "dim") if chosen is None else
                    drawing.detail(chosen))

    def _show_instances(self, new: Snapshot) -> None:
        """Cells are changed in place, so that the chosen row stays chosen."""
        table = self._table
        there = {str(key.value) for key in table.rows}
        wanted = [one["id"] for one in new.instances]
        for gone in there - set(wanted):
            table.remove_row(gone)
        for index, one in enumerate(new.instances):
            row = drawing.instance_row(index, one, self._widths)
            if one["id"] not in there:
                table.add_row(*row, key=one["id"])
                continue
            for name, cell in zip(drawing.COLUMNS, row, strict=True):
                if table.get_cell(one["id"], name or "letter") != cell:
                    table.update_cell(one["id"], name or "letter", cell)

    def on_data_table_row_highlighted(self, _: DataTable.RowHighlighted) -> None:
        self._show_detail()

    def _chosen(self) -> Instance | None:
        table = self._table
        if self._new is None or not table.is_valid_row_index(table.cursor_row):
            return None
        key = table.coordinate_to_cell_key(table.cursor_coordinate).row_key.value
        return next((one for one in self._new.instances if one["id"] == key), None)

    # --- keys -----------------------------------------------------------------------------------------------------

    def on_data_table_row_selected(self, _: DataTable.RowSelected) -> None:
        self.action_logs()      # the enter key

    def action_logs(self) -> None:
        if (chosen := self._chosen()) is not None:
            self.app.push_screen(LogScreen(self._client, chosen))

    @work
    async def action_load(self) -> None:
        models = []
        with suppress(VLLMProxyError):
            models = await self._client.models()
        name = await self.app.push_screen_wait(LoadScreen(models))
        if name is not None:
            await self._act(f"load {name}", lambda: self._begin(name))

    async def _begin(self, name: str) -> None:
        configured = await self._client.configured_models()
        if any(name == one["id"] or name in one["aliases"] for one in configured):
            await self._client.load(name)
        else:
            await self._client.create_instance(name)

    @work
    async def action_sleep(self) -> None:
        """Put the chosen one to sleep, or wake it."""
        chosen = self._chosen()
        if chosen is None:
            return
        if chosen["status"] in ("sleeping", "falling_asleep"):
            await self._act(f"wake {words.name(chosen)}", lambda: self._client.wake_instance(chosen["id"]))
        else:
            await self._act(f"put {words.name(chosen)} to sleep", lambda: self._client.sleep_instance(chosen["id"]))

    @work
    async def action_stop(self) -> None:
        chosen = self._chosen()
        if chosen is None:
            return
        answer = await self.app.push_screen_wait(StopScreen(chosen))
        if answer is not None:
            await self._act(f"stop {words.name(chosen)}",
                            lambda: self._client.stop_instance(chosen["id"], force=answer == "force"))

    async def _act(self, what: str, call: Callable[[], Awaitable[object]]) -> None:
        """Its result shows in the table; a refusal is told and noted."""
        try:
            await call()
        except VLLMProxyError as error:
            self._note([Event(f"{what}: {error.message}", "red")])
            self.notify(error.message, title=f"cannot {what}", severity="error", markup=False)
        self._watch()       # now, not at the next round
