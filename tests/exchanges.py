"""Exchanges on raw sockets with an engine that follows a script, and what a client may make of the answers."""

from __future__ import annotations

import base64
import contextlib
import json
import re
import socket
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from instances import processes
from tests.daemon import HANG_S, Daemon
from tests.relay_harness import read_all
from tests.support import wait_until

Step = list[Any]
_SIZE_LINE = re.compile(rb"([0-9a-fA-F]+)[^\r\n]*\r\n")
HOP = frozenset({"connection", "keep-alive", "date", "server", "transfer-encoding", "trailer", "x-request-id"})
CLOSE: Step = ["close"]
RESET: Step = ["reset"]
LAST_WORDS = b'data: {"error":{'      # the last event of a stream that was cut may tell why


def send(data: bytes) -> Step:
    return ["send", data.decode("latin-1")]


def script_header(steps: Sequence[Step]) -> bytes:
    return b"X-Script: " + base64.b64encode(json.dumps(steps).encode()) + b"\r\n"


def request(steps: Sequence[Step], *, method: str = "POST", path: str = "/v1/completions", version: str = "1.1",
            headers: bytes = b"", body: bytes = b'{"model": "m"}') -> bytes:
    """A request that asks the engine for this script; it routes by its body, or by a /proxy/ path."""
    length = b"Content-Length: %d\r\n" % len(body) if body or method == "POST" else b""
    return (f"{method} {path} HTTP/{version}\r\nHost: localhost\r\nContent-Type: application/json\r\n".encode()
            + length + headers + script_header(steps) + b"\r\n" + body)


# --- answers ------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Got:
    """One answer as a careful client reads it.  `complete`: it could tell that nothing is missing.

    `all_data`: the same but for the end of the trailers.
    """

    status: int
    headers: tuple[tuple[str, str], ...]    # without the hop's own and the moment's, names in lower case
    body: bytes
    complete: bool
    all_data: bool = field(compare=False)


def parse(data: bytes, *, was_reset: bool = False, method: str = "POST") -> list[Got]:
    """Every final answer in what came until the end; interim ones (1xx) are passed over.

    An answer of which not even the head is whole is left out.  Raises AssertionError for what is no HTTP.
    """
    answers: list[Got] = []
    while True:
        head, end, rest = data.partition(b"\r\n\r\n")
        if not end:
            return answers
        first, *lines = head.decode("latin-1").split("\r\n")
        assert re.fullmatch(r"HTTP/1\.[01] \d{3}( .*)?", first), first
        status = int(first.split()[1])
        if 100 <= status < 200 and status != 101:
            data = rest
            continue
        pairs = [(name.lower(), value.strip()) for name, _, value in (line.partition(":") for line in lines)]
        fields = dict(pairs)
        bodyless = method == "HEAD" or status in (204, 304)
        body, complete, all_data, data = _body(fields, rest, was_reset, bodyless=bodyless)
        answers.append(Got(status, tuple(pair for pair in pairs if pair[0] not in HOP), body, complete, all_data))
        if not complete or not data:
            return answers


def _body(fields: dict[str, str], rest: bytes, was_reset: bool, *, bodyless: bool) -> tuple[bytes, bool, bool, bytes]:
    """The body, whether it is whole, whether all its data is here, and what follows it."""
    assert not ("transfer-encoding" in fields and "content-length" in fields), "two framings at once"
    if bodyless:
        return b"", True, True, rest
    if "chunked" in fields.get("transfer-encoding", ""):
        return _chunks(rest)
    if "content-length" in fields:
        length = int(fields["content-length"])
        return rest[:length], len(rest) >= length, len(rest) >= length, rest[length:]
    return rest, not was_reset, not was_reset, b""


def _chunks(rest: bytes) -> tuple[bytes, bool, bool, bytes]:
    data: list[bytes] = []
    at = 0
    while found := _SIZE_LINE.match(rest, at):
        size, at = int(found[1], 16), found.end()
        if size == 0:
            while (end := rest.find(b"\r\n", at)) >= 0:
                line, at = rest[at:end], end + 2
                if not line:
                    return b"".join(data), True, True, rest[at:]
            return b"".join(data), False, True, b""
        data.append(rest[at:at + size])
        at += size + 2
        if len(rest) < at:
            break
        assert rest[at - 2:at] == b"\r\n", "a chunk that is longer than it says"
    return b"".join(data), False, False, b""


def assert_same(sent: bytes, was_reset: bool, received: bytes, client_reset: bool, method: str = "POST") -> None:
    """What the engine sent, with the end it put to it, and what the client received mean the same.

    Or the client can see that it is not whole: nothing at all, a short body, or an explained error in its place.
    """
    said = parse(sent, was_reset=was_reset, method=method)
    heard = parse(received, was_reset=client_reset, method=method)
    context = (sent, was_reset, received, client_reset)
    if said and said[0].complete and not was_reset:
        assert len(heard) == 1 and heard[0] == said[0], context
        return
    if not heard:
        assert not received or client_reset or b"\r\n\r\n" not in received, context
        return
    (got,) = heard
    if got.status in (502, 503) and b'"error":{"message"' in got.body and not (said and said[0].status == got.status):
        assert got.complete, context                                    # in the place of an answer, not within one
        return
    assert said, context
    assert (got.status, got.headers) == (said[0].status, said[0].headers), context
    body = got.body if got.complete else got.body.partition(LAST_WORDS)[0].removesuffix(b"\n\n")
    assert said[0].body.startswith(body), context
    # After all data only trailers can be missing, or the reset came after everything.
    assert not got.complete or (said[0].all_data and got.body == said[0].body), context


# --- clients ------------------------------------------------------------------------------------------------------

def exchange(daemon: Daemon, data: bytes, *, receive_bytes: int | None = None) -> tuple[bytes, bool]:
    """Send this on a connection of its own; what came until the daemon closed, and whether that was a reset."""
    with connect(daemon.port, receive_bytes) as client:
        with contextlib.suppress(ConnectionError):      # it may answer and close before it has everything
            client.sendall(data)
        return read_all(client)


def connect(port: int, receive_bytes: int | None = None) -> socket.socket:
    client = socket.socket()
    client.settimeout(HANG_S)
    if receive_bytes:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
    client.connect(("127.0.0.1", port))
    return client


class Reader:
    """Answers one after the other from a connection that stays."""

    def __init__(self, client: socket.socket) -> None:
        self._client = client
        self._data = b""

    def answer(self, method: str = "POST") -> Got:
        """The next answer; it must have a length or chunks."""
        while not self._has_one(method):
            piece = self._client.recv(1 << 16)
            assert piece, f"ended within {self._data!r}"
            self._data += piece
        got = parse(self._data, was_reset=True, method=method)[0]
        self._data = self._rest
        return got

    def _has_one(self, method: str) -> bool:
        data = self._data
        while True:
            head, end, rest = data.partition(b"\r\n\r\n")
            if not end:
                return False
            status = int(head.split()[1])
            if not 100 <= status < 200 or status == 101:
                break
            data = rest
        fields = {name.lower(): value.strip() for name, _, value in
                  (line.partition(":") for line in head.decode("latin-1").split("\r\n")[1:])}
        _, complete, _, self._rest = _body(fields, rest, True, bodyless=method == "HEAD" or status in (204, 304))
        return complete


# --- what is held -------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Held:
    """Of the worker and its relays, by /proc."""

    threads: int
    descriptors: int
    resident_bytes: int


def held(daemon: Daemon) -> Held:
    worker = daemon.worker_pid
    session = [one for one in processes.all_processes() if not one.zombie and _is_ours(one, worker)]
    folders = [Path(f"/proc/{one.pid}") for one in session]
    return Held(sum(len(list((folder / "task").iterdir())) for folder in folders),
                sum(len(list((folder / "fd").iterdir())) for folder in folders),
                sum(int((folder / "statm").read_text().split()[1]) * 4096 for folder in folders))


def _is_ours(process: processes.Process, worker: int) -> bool:
    """The worker, or a relay: a child of the worker in its session."""
    return process.pid == worker or (process.parent == worker and b"relay" in _command_line(process.pid))


def _command_line(pid: int) -> bytes:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


def assert_no_lease(daemon: Daemon) -> None:
    """All instances are ready and nothing is in flight, at once or soon."""
    wait_until(lambda: all(one["in_flight"] == 0 and one["status"] == "ready" for one in daemon.instances()))
