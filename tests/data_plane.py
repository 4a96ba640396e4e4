"""What the fast and the slow tests of the data plane share: a daemon whose engine follows scripts, and the answers."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.daemon import CHECKOUT, Daemon
from tests.exchanges import CLOSE, Step, send

COMMAND = f"{sys.executable} {CHECKOUT / 'tests/scripted_engine.py'}"
PATCH: dict[str, object] = {"routing.forwarding.VERDICT_S": 0.02, "instances.instance.BACKOFF_LIMIT_S": 0.05}
"""A broken answer of an engine that lives is given up at once, and one that died comes back at once."""


@contextmanager
def scripted_daemon(folder: Path, relays: int = 1, env: dict[str, str] | None = None) -> Iterator[tuple[Daemon, str]]:
    """The daemon and the id of its one instance, of the model `m`."""
    with Daemon(folder, {"RELAYS": str(relays), "DRAIN_TIMEOUT": "0.2", **(env or {})}, patch=PATCH,
                command=COMMAND) as daemon:
        yield daemon, daemon.create("m")["id"]


GZIP = b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x02\xff\x4b\x4c\x4a\x06\x00\xc2\x41\x24\x35\x03\x00\x00\x00"
ANSWERS: dict[str, bytes] = {
    "events": b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\nTransfer-Encoding: chunked\r\n"
              b"\r\n9\r\ndata: 1\n\n\r\n9\r\ndata: 2\n\n\r\ne\r\ndata: [DONE]\n\n\r\n0\r\n\r\n",
    "chunks": b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3;x=y\r\nabc\r\n00002\r\nde\r\n0\r\n\r\n",
    "trailers": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTrailer: X-Sum\r\n\r\n3\r\nabc\r\n0\r\n"
                b"X-Sum: 1\r\nX-Two: 2\r\n\r\n",
    "no chunks": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "length": b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 11\r\nX-Own: 1\r\n\r\n"
              b"{\"id\": \"x\"}",
    "no body": b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n",
    "no content": b"HTTP/1.1 204 No Content\r\nX-Own: 1\r\n\r\n",
    "not modified": b"HTTP/1.1 304 Not Modified\r\nETag: x\r\n\r\n",
    "error": b"HTTP/1.1 422 Unprocessable Entity\r\nContent-Length: 2\r\n\r\n{}",
    "no reason": b"HTTP/1.1 200 \r\nContent-Length: 2\r\n\r\nok",
    "gzip": b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: %d\r\n\r\n%s" % (len(GZIP), GZIP),
    "gzip in chunks": b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nTransfer-Encoding: chunked\r\n\r\n"
                      b"%x\r\n%s\r\n0\r\n\r\n" % (len(GZIP), GZIP),
    "100 before": b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok",
    "103 before": b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\nHTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n"
                  b"\r\n2\r\nok\r\n0\r\n\r\n",
    "many before": b"HTTP/1.1 102 Processing\r\n\r\n" * 3 + b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok",
    "twice": b"HTTP/1.1 200 OK\r\nSet-Cookie: a=1\r\nSet-Cookie: b=2\r\nContent-Length: 2\r\n\r\nok",
    "odd spacing": b"HTTP/1.1 200 OK\r\nX-A:1\r\nX-B:   2  \r\nX-Empty:\r\nContent-Length:2\r\n\r\nok",
    "any bytes": b"HTTP/1.1 200 OK\r\nX-Latin: \xe4\xff\r\nContent-Length: 256\r\n\r\n" + bytes(range(256)),
}
"""Whole answers after which the connection stays."""

CLOSING: dict[str, bytes] = {
    "until the end": b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nConnection: close\r\n\r\nuntil the end",
    "until the end, unsaid": b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\ndata: 1\n\n",
    "of 1.0": b"HTTP/1.0 200 OK\r\nContent-Type: text/plain\r\n\r\nuntil the end",
    "of 1.0 with a length": b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nok",
    "nothing until the end": b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n",
    "a length, and the end": b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok",
    "chunks, and the end": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n"
                           b"2\r\nok\r\n0\r\n\r\n",
}

INVALID: dict[str, bytes] = {
    "nothing": b"",
    "no HTTP": b"SSH-2.0-x\r\n\r\n",
    "HTTP/2": b"HTTP/2.0 200 OK\r\nContent-Length: 0\r\n\r\n",
    "no status": b"HTTP/1.1 abc OK\r\nContent-Length: 0\r\n\r\n",
    "a long status": b"HTTP/1.1 2000 OK\r\nContent-Length: 0\r\n\r\n",
    "two lengths": b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\nabc",
    "a list of lengths": b"HTTP/1.1 200 OK\r\nContent-Length: 2, 3\r\n\r\nabc",
    "a length that is none": b"HTTP/1.1 200 OK\r\nContent-Length: abc\r\n\r\nabc",
    "a negative length": b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\nabc",
    "a length with a sign": b"HTTP/1.1 200 OK\r\nContent-Length: +3\r\n\r\nabc",
    "a coding that is unknown": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\n\r\nabc",
    "gzip, chunked": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
    "a control character": b"HTTP/1.1 200 OK\r\nX-Bad: a\x01b\r\nContent-Length: 0\r\n\r\n",
    "a bare carriage return": b"HTTP/1.1 200 OK\r\nX-Bad: a\rX-Injected: b\r\nContent-Length: 0\r\n\r\n",
    "a zero byte": b"HTTP/1.1 200 OK\r\nX-Bad: a\x00b\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "a bad name": b"HTTP/1.1 200 OK\r\nX Bad: 1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "a line without a colon": b"HTTP/1.1 200 OK\r\nX-Bad\r\nContent-Length: 0\r\n\r\n",
    "an unasked upgrade": b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n",
    "half of a head": b"HTTP/1.1 200 OK\r\nContent-Le",
    "a head without its end": b"HTTP/1.1 200 OK\r\nX-Own: 1\r\n",
}
"""Answers that cannot be passed on: 502, whoever asks how.  Each is followed by the end of the connection."""

ENDLESS: dict[str, list[Step]] = {
    "a long line": [send(b"HTTP/1.1 200 OK\r\nX-Long: "), ["repeat", "x" * 1000, 70],
                    send(b"\r\nContent-Length: 0\r\n\r\n"), CLOSE],
    "many lines": [send(b"HTTP/1.1 200 OK\r\n"), ["repeat", "X-A: 1\r\n" * 100, 20],
                   send(b"Content-Length: 0\r\n\r\n"), CLOSE],
    "many before": [["repeat", "HTTP/1.1 102 Processing\r\n\r\n" * 10, 100], CLOSE],
}
"""Heads beyond all bounds."""


def steps(answer: bytes, end: Step | None = None) -> list[Step]:
    return [send(answer), *([end] if end else [])]


def closing_steps(answer: bytes) -> list[Step]:
    return steps(answer, CLOSE)
