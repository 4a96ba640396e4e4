"""200 clients, three models, one GPU with room for one of them: the fairness of on-demand loading, measured."""

from __future__ import annotations

import asyncio
import random
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import aiohttp

from tests.gpu_box import GpuBox
from tests.traffic import Ask, Exchange, run_clients

MODELS = ("alpha", "beta", "gamma")
CLIENTS = 200
START_S = 0.5
TOKENS, TOKENS_PER_S = 4, 200.0
PAUSE_S = 0.25                      # a client thinks so long at the most
MAX_HOLD_S = 3.0                    # a busy model has so long while others wait: ten times as short as the default


@dataclass(frozen=True)
class Outcome:
    exchanges: list[Exchange]
    swaps: int                      # how often a model was loaded in place of another one
    log: str


def knobs() -> dict[str, object]:
    return {"start_s": START_S, "tokens_per_s": TOKENS_PER_S}


def config() -> dict[str, object]:
    """Each takes more than half of an 80 GiB GPU."""
    return {"models": {name: {"model_path": f"org/{name}", "memory_mb": 50 * 1024,
                              "params": {"additional_config": {"sim": knobs()}}} for name in MODELS}}


def choose(client: int, number: int) -> Ask:
    """Any of the three, as it comes; every third answer is streamed."""
    dice = random.Random(client * 100_003 + number)
    return Ask(dice.choice(MODELS), TOKENS, dice.random() < 1 / 3, dice.random() * PAUSE_S)


def run(folder: Path, seconds: float, *, max_hold_s: float = MAX_HOLD_S, clients: int = CLIENTS) -> Outcome:
    """By the daemon's own rule: it loads on demand, and in turns."""
    with GpuBox(folder, [80.0], {"MAX_HOLD_SECONDS": f"{max_hold_s:g}"}, config=config()) as box:
        exchanges = run_clients(f"http://127.0.0.1:{box.daemon.port}", clients, choose, seconds)
        return _outcome(box, exchanges)


def run_at_once(folder: Path, seconds: float, *, clients: int = CLIENTS) -> Outcome:
    """The same load, engine and data plane by the rule of llama-swap."""
    with GpuBox(folder, [80.0]) as box:
        exchanges = run_clients(f"http://127.0.0.1:{box.daemon.port}", clients, choose, seconds, SwapAtOnce())
        return _outcome(box, exchanges)


def _outcome(box: GpuBox, exchanges: list[Exchange]) -> Outcome:
    box.daemon.remove()
    assert box.refused() == []
    return Outcome(exchanges, max(0, loads(box.daemon.log) - 1), box.daemon.log)


def loads(log: str) -> int:
    """Starts and wakes that ended well, by the daemon's log."""
    return len(re.findall(r": (?:starting|waking) -> ready ", log))


class SwapAtOnce:
    """llama-swap's rule for models that cannot run at the same time: requests pass in the order in which they came, and
    one that names another model than the last ends that (when its requests have ended) and starts its own."""

    def __init__(self) -> None:
        self._order = asyncio.Lock()        # it is fair: first come, first served
        self._ended = asyncio.Condition()
        self._in_flight = 0
        self._model, self._instance = "", ""

    @asynccontextmanager
    async def __call__(self, session: aiohttp.ClientSession, model: str) -> AsyncIterator[None]:
        async with self._order:
            if model != self._model:
                await self._swap(session, model)
            self._in_flight += 1
        try:
            yield
        finally:
            async with self._ended:
                self._in_flight -= 1
                self._ended.notify_all()

    async def _swap(self, session: aiohttp.ClientSession, model: str) -> None:
        async with self._ended:
            await self._ended.wait_for(lambda: self._in_flight == 0)
        if self._instance:
            async with session.delete(f"/instances/{self._instance}?wait=1"):
                pass
        body = {"model_name": model, "wait": True, "params": {
            "gpu_memory_utilization": 0.6, "additional_config": {"sim": knobs()}}}
        async with session.post("/instances", json=body) as answer:
            self._model, self._instance = model, (await answer.json())["id"]
