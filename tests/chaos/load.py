"""Clients that ask without end, and what became of each of their requests."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp

PATH = "/v1/chat/completions"
HANG_S = 150.0              # no fault lasts nearly so long: who has no answer by then never gets one
LEAVING = 0.05
STAYING = 0.8               # of a client's requests go to one model, the rest to any
PAUSE_S = 0.2               # at most, between two requests of one client
AFTER_ERROR_S = 0.5

GOOD, LEFT = "good", "left"
REFUSED, RESET, CUT = "refused", "reset", "cut"
"""Nobody listened; the connection broke before an answer; it broke in its middle, and that could be seen."""
HANG, WRONG, FALSE_END = "hang", "wrong answer", "false end"
NEVER = frozenset({HANG, WRONG, FALSE_END})
"""What no fault explains."""


@dataclass
class Asked:
    """One request; times are seconds of the monotonic clock.  `outcome`: GOOD, LEFT, one of the above, or the code of
    the error that it was answered with; None while it is in flight."""

    model: str
    stream: bool
    sent_at: float
    ended_at: float | None = None
    outcome: str | None = None
    detail: str = ""

    @property
    def lost(self) -> bool:
        return self.outcome not in (GOOD, LEFT)

    def __str__(self) -> str:
        took = "" if self.ended_at is None else f" after {self.ended_at - self.sent_at:.2f} s"
        return f"{'stream' if self.stream else 'request'} to {self.model}: {self.outcome}{took} {self.detail[:300]}"


class Load:
    """`clients` clients in a thread of their own, from `running` on.  `url` is asked before each request: a daemon that
    was started anew has another port."""

    def __init__(self, url: Callable[[], str], models: Sequence[str], clients: int, seed: int) -> None:
        self._url, self._models, self._clients, self._seed = url, models, clients, seed
        self.asked: list[Asked] = []
        self._in_flight: set[int] = set()       # indexes of `asked`
        self._lock = threading.Lock()
        self._go = threading.Event()
        self._stop = threading.Event()

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        thread = threading.Thread(target=lambda: asyncio.run(self._run()), name="load")
        self._go.set()
        thread.start()
        try:
            yield
        finally:
            self._stop.set()
            thread.join(2 * HANG_S)
            assert not thread.is_alive()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Nothing new is sent; what is in flight goes on."""
        self._go.clear()
        try:
            yield
        finally:
            self._go.set()

    def in_flight(self) -> list[Asked]:
        with self._lock:
            return [self.asked[index] for index in sorted(self._in_flight)]

    # --- the clients' thread --------------------------------------------------------------------------------------

    async def _run(self) -> None:
        timeout = aiohttp.ClientTimeout(total=HANG_S)
        async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as session, \
                asyncio.TaskGroup() as clients:
            for number in range(self._clients):
                clients.create_task(self._client(session, random.Random(self._seed * 1009 + number)))

    async def _client(self, session: aiohttp.ClientSession, dice: random.Random) -> None:
        favourite = dice.choice(self._models)
        while not self._stop.is_set():
            await asyncio.sleep(dice.random() * PAUSE_S)
            if not self._go.is_set():
                continue
            tokens, leaves = dice.choice([1, 4, 20, 60]), dice.random() < LEAVING
            model = favourite if dice.random() < STAYING else dice.choice(self._models)
            asked = Asked(model, dice.random() < 0.5, time.monotonic())
            with self._lock:
                self.asked.append(asked)
                index = len(self.asked) - 1
                self._in_flight.add(index)
            try:
                limit_s = dice.random() * 0.3 if leaves else None
                async with asyncio.timeout(limit_s):
                    outcome, detail = await ask(session, self._url(), asked.model, asked.stream, tokens)
            except TimeoutError:
                outcome, detail = LEFT, ""
            with self._lock:
                asked.ended_at, asked.outcome, asked.detail = time.monotonic(), outcome, detail
                self._in_flight.discard(index)
            if asked.lost:
                await asyncio.sleep(AFTER_ERROR_S)


async def ask(session: aiohttp.ClientSession, url: str, model: str, stream: bool, tokens: int) -> tuple[str, str]:
    """What became of it, and details.  Raises only what comes from outside (a cancellation)."""
    body = {"model": model, "messages": [{"role": "user", "content": "hello"}], "max_tokens": tokens, "stream": stream}
    begun = False
    try:
        async with session.post(url + PATH, json=body) as answer:
            begun = True
            if answer.status == 200 and stream:
                return await _stream(answer, model, tokens)
            content = await answer.read()
            return judge(answer.status, content, model, tokens)
    except aiohttp.ClientConnectorError as error:
        return REFUSED, repr(error)
    except aiohttp.ServerTimeoutError as error:
        return HANG, repr(error)
    except (aiohttp.ClientError, OSError) as error:
        if isinstance(error, TimeoutError):
            return HANG, repr(error)
        return (CUT if begun else RESET), repr(error)


def judge(status: int, content: bytes, model: str, tokens: int) -> tuple[str, str]:
    """Of a plain answer."""
    try:
        data = json.loads(content)
        if status != 200:
            return code_of(data["error"]), f"{status} {content[:300].decode(errors='replace')}"
        text = data["choices"][0]["message"]["content"]
    except (ValueError, KeyError, TypeError, IndexError):
        return WRONG, f"{status} {content[:300]!r}"
    return judge_text(data["model"], text, model, tokens)


def judge_text(answered_by: str, text: str, model: str, tokens: int) -> tuple[str, str]:
    if answered_by != model or not text.startswith("simulated token 1"):
        return WRONG, f"by {answered_by}: {text[:100]!r}"
    if text.count("token") != tokens:
        return FALSE_END, f"{text.count('token')} of {tokens} tokens, and a good end"
    return GOOD, ""


def code_of(error: Mapping[str, Any]) -> str:
    """An engine's own errors have numbers."""
    code = error["code"]
    return f"engine {code}" if isinstance(code, int) else str(code)


async def _stream(answer: aiohttp.ClientResponse, model: str, tokens: int) -> tuple[str, str]:
    text, by, error, ended = "", model, None, False
    try:
        async for line in answer.content:
            if line.startswith(b"data: [DONE]"):
                ended = True
            elif line.startswith(b"data: "):
                event: Mapping[str, Any] = json.loads(line[6:])
                if "error" in event:
                    error = event["error"]
                    continue
                by = event["model"]
                text += "".join(choice["delta"].get("content") or "" for choice in event["choices"])
    except (aiohttp.ClientError, OSError) as broken:
        if isinstance(broken, TimeoutError):
            return HANG, f"in the middle: {text[-60:]!r}"
        if not ended and error is None:
            return CUT, f"after {text.count('token')} of {tokens} tokens"
    except ValueError as mistake:       # an event that is none
        return WRONG, repr(mistake)
    if error is not None:
        return code_of(error), f"in the stream: {error}"
    if not ended:
        return FALSE_END, f"a good end without [DONE] after {text.count('token')} of {tokens} tokens"
    return judge_text(by, text, model, tokens)
