"""Many clients that ask a daemon for models at the same time, and what became of each of their requests."""

from __future__ import annotations

import asyncio
import json
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import aiohttp

from tests.daemon import HANG_S

PATH = "/v1/chat/completions"


@dataclass(frozen=True)
class Exchange:
    """One request and its answer; times are seconds of the monotonic clock."""

    model: str
    sent_at: float
    first_at: float | None      # its first token (a stream's first event with text)
    ended_at: float
    problem: str | None         # None: it was answered as it should be
    comments: int = 0           # of a stream, before its first event

    @property
    def wait_s(self) -> float:
        """How long its client saw nothing of an answer."""
        return (self.first_at or self.ended_at) - self.sent_at


@dataclass(frozen=True)
class Ask:
    """What a client asks next, and how long it thinks before."""

    model: str
    tokens: int = 4
    stream: bool = False
    pause_s: float = 0.0


Chooser = Callable[[int, int], Ask | None]
"""(client's number, number of its request) -> what it asks; None: it goes home."""


Gate = Callable[[aiohttp.ClientSession, str], AbstractAsyncContextManager[None]]
"""Entered for a model before each request for it is sent; to wait in there counts as waiting for the answer."""


def run_clients(url: str, count: int, choose: Chooser, seconds: float, gate: Gate | None = None) -> list[Exchange]:
    """`count` clients ask, each one thing after another, and begin nothing new after `seconds`.  Every request begun
    is in the result."""
    return asyncio.run(_run(url, count, choose, time.monotonic() + seconds, gate))


async def _run(url: str, count: int, choose: Chooser, deadline: float, gate: Gate | None) -> list[Exchange]:
    found: list[Exchange] = []
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(url, connector=connector, timeout=aiohttp.ClientTimeout(2 * HANG_S)) as session:
        async def client(number: int) -> None:
            asked = 0
            while time.monotonic() < deadline and (ask := choose(number, asked)) is not None:
                await asyncio.sleep(ask.pause_s)
                found.append(await exchange(session, ask, gate))
                asked += 1

        async with asyncio.TaskGroup() as tasks:
            for number in range(count):
                tasks.create_task(client(number))
    return found


async def exchange(session: aiohttp.ClientSession, ask: Ask, gate: Gate | None = None) -> Exchange:
    """Never raises for what the daemon does."""
    body = {"model": ask.model, "messages": [{"role": "user", "content": "hello"}], "max_tokens": ask.tokens,
            "stream": ask.stream}
    sent_at = time.monotonic()
    try:
        async with gate(session, ask.model) if gate else nullcontext(), session.post(PATH, json=body) as answer:
            if answer.status == 200 and ask.stream:
                return await _stream(answer, ask, sent_at)
            content = await answer.read()
            now = time.monotonic()
            return Exchange(ask.model, sent_at, now, now, _problem(answer.status, content, ask))
    except (aiohttp.ClientError, TimeoutError, OSError) as error:
        return Exchange(ask.model, sent_at, None, time.monotonic(), f"{type(error).__name__}: {error}")


def _problem(status: int, content: bytes, ask: Ask) -> str | None:
    if status != 200:
        return f"{status}: {content[:600].decode(errors='replace')}"
    answer = json.loads(content)
    text = answer["choices"][0]["message"]["content"]
    return _wrong(answer["model"], text, ask)


def _wrong(model: str, text: str, ask: Ask) -> str | None:
    """The right model's answer, and all of it?"""
    if model != ask.model:
        return f"asked {ask.model}, answered by {model}"
    if text.count("token") != ask.tokens or not text.startswith("simulated token 1"):
        return f"{ask.tokens} tokens asked, got {text!r}"
    return None


async def _stream(answer: aiohttp.ClientResponse, ask: Ask, sent_at: float) -> Exchange:
    first_at, text, model, comments, ended, problem = None, "", ask.model, 0, False, None
    async for line in answer.content:
        if line.startswith(b":"):
            comments += first_at is None
        elif line.startswith(b"data: [DONE]"):
            ended = True
        elif line.startswith(b"data: "):
            event: Mapping[str, Any] = json.loads(line[6:])
            if "error" in event:
                problem = f"in the stream: {event['error']}"
                continue
            first_at = first_at or time.monotonic()
            model = event["model"]
            text += "".join(choice["delta"].get("content") or "" for choice in event["choices"])
    if problem is None:
        problem = _wrong(model, text, ask) if ended else "the stream was cut"
    return Exchange(ask.model, sent_at, first_at, time.monotonic(), problem, comments)


# --- what came of it ----------------------------------------------------------------------------------------------

def problems(exchanges: Iterable[Exchange]) -> list[str]:
    return [f"{one.model}: {one.problem}" for one in exchanges if one.problem is not None]


def longest_wait_s(exchanges: Iterable[Exchange]) -> dict[str, float]:
    """By model."""
    longest: dict[str, float] = {}
    for one in exchanges:
        longest[one.model] = max(longest.get(one.model, 0.0), one.wait_s)
    return longest


def quantiles_s(exchanges: Iterable[Exchange]) -> tuple[float, float, float]:
    """The median wait, its 95th and 99th percentile."""
    waits = [one.wait_s for one in exchanges]
    cuts = statistics.quantiles(waits, n=100, method="inclusive")
    return cuts[49], cuts[94], cuts[98]
