"""Both forms of the SDK behind one face, and a server that answers with exact bytes."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import socket
import threading
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any, Self

from vllm_server_client import AsyncVLLMProxyClient, VLLMProxyClient


class Blocking:
    """An AsyncVLLMProxyClient whose methods block, and whose streams are plain iterators."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self._client = AsyncVLLMProxyClient(*arguments, **options)
        self._runner = asyncio.Runner()

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._client, name)

        def call(*arguments: Any, **options: Any) -> Any:
            result = method(*arguments, **options)
            return self._runner.run(result) if inspect.iscoroutine(result) else self._iterate(result)
        return call

    def _iterate(self, stream: Any) -> Iterator[Any]:
        try:
            with contextlib.suppress(StopAsyncIteration):
                while True:
                    yield self._runner.run(anext(stream))
        finally:
            self._runner.run(stream.aclose())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 traceback: TracebackType | None) -> None:
        self._runner.run(self._client.aclose())
        self._runner.close()


CLIENTS: dict[str, Any] = {"sync": VLLMProxyClient, "async": Blocking}


def answer(status: int = 200, body: bytes = b"{}", *, kind: str = "application/json", **headers: object) -> bytes:
    """The bytes of a whole answer; `retry_after=1` is the header Retry-After."""
    lines = [f"HTTP/1.1 {status} Status", f"Content-Type: {kind}", f"Content-Length: {len(body)}", "Connection: close",
             *(f"{name.replace('_', '-')}: {value}" for name, value in headers.items())]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def stream(*events: bytes, whole: bool = True) -> bytes:
    """A chunked event stream, with its end or cut before it."""
    chunks = b"".join(b"%x\r\n%s\r\n" % (len(event), event) for event in events)
    return (b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\nTransfer-Encoding: chunked\r\n"
            b"Connection: close\r\n\r\n" + chunks + (b"0\r\n\r\n" if whole else b""))


class Scripted:
    """Answers connection after connection: each with the next bytes, then closes it; with None it keeps silent.

    `requests` are the first lines of what came.  After the last answer it listens no more.
    """

    def __init__(self, answers: Sequence[bytes | None]) -> None:
        self.requests: list[str] = []
        self._answers = answers
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._serve)
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    def _serve(self) -> None:
        with self._listener:
            for each in self._answers:
                try:
                    connection, _ = self._listener.accept()
                except OSError:     # the test has ended
                    return
                with connection:
                    self._answer(connection, each)

    def _answer(self, connection: socket.socket, each: bytes | None) -> None:
        received = b""
        while b"\r\n\r\n" not in received and (piece := connection.recv(1 << 16)):
            received += piece
        if not received:
            return
        head, _, body = received.partition(b"\r\n\r\n")
        lines = head.decode().lower().split("\r\n")
        length = next((int(line.partition(":")[2]) for line in lines if line.startswith("content-length:")), 0)
        while len(body) < length and (piece := connection.recv(1 << 16)):
            body += piece
        self.requests.append(head.decode().split("\r\n")[0])
        if each is None:
            self._done.wait()
        else:
            with contextlib.suppress(OSError):
                connection.sendall(each)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 traceback: TracebackType | None) -> None:
        self._done.set()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
