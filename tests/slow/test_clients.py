"""The programs that people point at the daemon stream through it unchanged: the words of the engine itself."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import aiohttp
import httpx
import openai
import pytest

from tests.daemon import HANG_S, Daemon

ASKED = {"model": "m", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 40, "temperature": 0}
STREAMED = {**ASKED, "stream": True}
OPENAI_FOR_NODE = "openai@6"

FETCH = """
const answer = await fetch(process.argv[2] + "/v1/chat/completions", {method: "POST",
    headers: {"Content-Type": "application/json"}, body: process.argv[3]});
if (!answer.ok) throw new Error(await answer.text());
let text = "";
for await (const piece of answer.body.pipeThrough(new TextDecoderStream())) text += piece;
process.stdout.write(text);
"""
SDK = """
import OpenAI from "openai";
const client = new OpenAI({baseURL: process.argv[2] + "/v1", apiKey: "EMPTY"});
const stream = await client.chat.completions.create(JSON.parse(process.argv[3]));
for await (const chunk of stream) process.stdout.write(chunk.choices[0]?.delta?.content ?? "");
"""


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    with Daemon(tmp_path_factory.mktemp("daemon")) as daemon:
        daemon.create("m", timeout=0)
        yield daemon
        daemon.remove()


@pytest.fixture(scope="module")
def words(daemon: Daemon) -> str:
    """What the engine says when it is asked past the daemon."""
    [instance] = daemon.instances()
    body = daemon.call("POST", "/v1/chat/completions", STREAMED, port=instance["port"]).body
    found = text_of(body.decode())
    assert found.count("token") == 40
    return found


def text_of(stream: str) -> str:
    """The words of a stream of events, which must end as OpenAI's do."""
    events = [line.removeprefix("data: ") for line in stream.splitlines() if line.startswith("data: ")]
    assert events[-1] == "[DONE]"
    return "".join(json.loads(event)["choices"][0]["delta"].get("content") or "" for event in events[:-1])


def url(daemon: Daemon) -> str:
    return f"http://127.0.0.1:{daemon.port}"


def by_openai(daemon: Daemon) -> str:
    with openai.OpenAI(base_url=url(daemon) + "/v1", api_key="EMPTY", timeout=HANG_S) as client:
        chunks = list(client.chat.completions.create(**STREAMED))
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)


def by_openai_async(daemon: Daemon) -> str:
    async def ask() -> str:
        async with openai.AsyncOpenAI(base_url=url(daemon) + "/v1", api_key="EMPTY", timeout=HANG_S) as client:
            stream = await client.chat.completions.create(**STREAMED)
            return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
    return asyncio.run(ask())


def by_httpx(daemon: Daemon) -> str:
    with httpx.stream("POST", url(daemon) + "/v1/chat/completions", json=STREAMED, timeout=HANG_S) as answer:
        return text_of("".join(answer.iter_text()))


def by_aiohttp(daemon: Daemon) -> str:
    async def ask() -> str:
        timeout = aiohttp.ClientTimeout(HANG_S)
        async with aiohttp.ClientSession(timeout=timeout) as session, \
                session.post(url(daemon) + "/v1/chat/completions", json=STREAMED) as answer:
            assert answer.status == 200
            return b"".join([piece async for piece in answer.content.iter_any()]).decode()
    return text_of(asyncio.run(ask()))


def by_curl(daemon: Daemon) -> str:
    return text_of(run(["curl", "-sSN", "--fail-with-body", url(daemon) + "/v1/chat/completions",
                        "-H", "Content-Type: application/json", "-d", json.dumps(STREAMED)]))


def by_node_fetch(daemon: Daemon) -> str:
    return text_of(run(["node", "--input-type=module", "-", url(daemon), json.dumps(STREAMED)], script=FETCH))


def by_node_openai(daemon: Daemon) -> str:
    return run(["node", "--input-type=module", "-", url(daemon), json.dumps(STREAMED)], script=SDK,
               folder=node_packages())


CLIENTS: dict[str, tuple[Callable[[Daemon], str], str | None]] = {
    "openai": (by_openai, None), "openai async": (by_openai_async, None), "httpx": (by_httpx, None),
    "aiohttp": (by_aiohttp, None), "curl": (by_curl, "curl"), "fetch of Node": (by_node_fetch, "node"),
    "openai for Node": (by_node_openai, "npm"),
}


@pytest.mark.parametrize("name", list(CLIENTS))
def test_a_client_hears_what_the_engine_says(name: str, daemon: Daemon, words: str) -> None:
    client, program = CLIENTS[name]
    if program is not None and shutil.which(program) is None:
        pytest.skip(f"{program} is not installed: {name} is left out")
    for _ in range(3):      # its connections are used again, or not, as each client likes
        assert client(daemon) == words


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_a_plain_answer_is_the_same_too(path: str, daemon: Daemon) -> None:
    body = ASKED if "chat" in path else {"model": "m", "prompt": "hello", "max_tokens": 40}
    [instance] = daemon.instances()
    direct, through = daemon.call("POST", path, body, port=instance["port"]).json, daemon.post(path, body).json
    for answer in (direct, through):
        del answer["id"], answer["created"]
    assert through == direct


def run(argv: list[str], *, script: str | None = None, folder: Path | None = None) -> str:
    done = subprocess.run(argv, input=script, capture_output=True, text=True, timeout=HANG_S, cwd=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout


def node_packages() -> Path:
    """A folder with OpenAI's SDK for Node, outside the checkout; installed when it is not there."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = Path(os.environ.get("VLLM_SERVER_CACHE") or cache / "vllm-server") / "node"
    if not (folder / "node_modules" / "openai").is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        done = subprocess.run(["npm", "install", "--no-audit", "--no-fund", "--prefix", str(folder), OPENAI_FOR_NODE],
                              capture_output=True, text=True, timeout=300)
        if done.returncode:
            pytest.skip(f"npm cannot install {OPENAI_FOR_NODE}: {done.stderr[-300:]}")
    return folder
