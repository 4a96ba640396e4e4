"""Questions to servers that answer, are slow, lie, break off or are not there: nothing ever waits for them."""

from __future__ import annotations

import errno
import http.client
import socket
import threading
from collections.abc import Callable, Iterator

import pytest

from instances import probe
from instances.probe import Answer, Probe
from tests.support import wait_until


class Server:
    """Takes one connection at a time; the test says what goes back."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._client: socket.socket | None = None

    def accept(self) -> bytes:
        self._client, _ = self._listener.accept()
        request = b""
        while b"\r\n\r\n" not in request:
            request += self._client.recv(65536)
        head, _, body = request.partition(b"\r\n\r\n")
        length = next((int(line.split(b":")[1]) for line in head.split(b"\r\n")
                       if line.lower().startswith(b"content-length")), 0)
        while len(body) < length:
            body += self._client.recv(65536)
        return head + b"\r\n\r\n" + body

    def send(self, data: bytes) -> None:
        assert self._client is not None
        self._client.sendall(data)

    def hang_up(self) -> None:
        assert self._client is not None
        self._client.close()

    def close(self) -> None:
        self._listener.close()
        if self._client is not None:
            self._client.close()


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


def settled(question: Probe) -> Answer:
    wait_until(lambda: question.poll() is not None)
    answer = question.poll()
    assert answer is not None
    return answer


def test_an_answer(server: Server) -> None:
    question = probe.health(server.port)
    assert question.poll() is None
    assert server.accept().startswith(b"GET /health HTTP/1.1\r\n")
    assert question.poll() is None
    server.send(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
    assert settled(question) == Answer(200, b"ok")
    assert question.poll() == Answer(200, b"ok")       # however often it is asked
    question.close()


def test_a_question_to_the_engine_carries_its_smallest_request(server: Server) -> None:
    question = probe.inference(server.port, "chat", "/v1/completions")
    request = server.accept()
    assert request.startswith(b"POST /v1/completions HTTP/1.1\r\n") and b"Content-Type: application/json" in request
    assert request.endswith(b'{"model": "chat", "prompt": "a", "max_tokens": 1}')
    question.close()


def test_nobody_listens() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        assert probe.health(unused.getsockname()[1]).poll() == Answer(0)


@pytest.mark.parametrize("said", [
    b"", b"HTTP/1.1 2", b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nshort", b"\x00\x01\x02 nonsense\r\n\r\n",
    b"HTTP/1.1 abc OK\r\n\r\n", b"HTTP/1.1 200 OK\r\nX: " + b"y" * 70_000])
def test_an_answer_that_breaks_off_or_is_none(server: Server, said: bytes) -> None:
    question = probe.health(server.port)
    server.accept()
    server.send(said)
    server.hang_up()
    assert settled(question) == Answer(0)


def test_a_server_that_never_answers_holds_nobody_up(server: Server) -> None:
    question = probe.health(server.port)
    assert [question.poll() for _ in range(3)] == [None] * 3       # not even accepted
    assert probe.wait(question, 0.02) is None
    server.accept()         # was asked, and closed when given up
    with pytest.raises(OSError):
        server.send(b"x")
        wait_until(lambda: server.send(b"x"))  # type: ignore[func-returns-value]


def test_a_server_that_stops_in_the_middle_is_given_up(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "READ_TIMEOUT_S", 0.05)
    question = probe.health(server.port)
    server.accept()
    server.send(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nshort")
    assert settled(question) == Answer(0)


def test_waiting_for_an_answer(server: Server) -> None:
    def serve() -> None:
        server.accept()
        server.send(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")

    thread = threading.Thread(target=serve)
    thread.start()
    assert probe.wait(probe.models(server.port), 120) == Answer(200)
    thread.join()


def test_descriptors_above_1023_are_watched_too(server: Server) -> None:
    """A daemon with a thousand streams has them; select() would not take one."""
    low: list[socket.socket] = []
    try:
        while not low or low[-1].fileno() < 1024:
            try:
                low.append(socket.socket())
            except OSError:
                pytest.skip("this machine grants no more than 1024 descriptors")
        question = probe.health(server.port)
        server.accept()
        assert question.poll() is None
        server.send(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
        assert settled(question) == Answer(200)
    finally:
        for each in low:
            each.close()


@pytest.mark.parametrize("body, names", [
    (b'{"object":"list","data":[{"id":"chat"},{"id":"org/model"},{"id":"adapter"}]}', ["chat", "org/model", "adapter"]),
    (b'{"data":[]}', []), (b"", []), (b"<html>", []), (b"[]", []), (b'{"data":[{}]}', []), (b'{"data":7}', []),
    (b"\xff\xfe", [])])
def test_names_of_a_model_list(body: bytes, names: list[str]) -> None:
    assert list(probe.model_names(body)) == names


METRICS = b"""# HELP vllm:generation_tokens_total Number of generation tokens processed.
# TYPE vllm:generation_tokens_total counter
vllm:generation_tokens_total{engine="0",model_name="m"} 120.0
vllm:generation_tokens_total{engine="1",model_name="m"} 3.0
vllm:prompt_tokens_total{engine="0",model_name="m"} 1e3
vllm:generation_tokens_created{engine="0",model_name="m"} 1.7e+09
vllm:request_generation_tokens_total_sum{engine="0"} 9.0
"""


@pytest.mark.parametrize("text, tokens", [(METRICS, 1123.0), (b"", 0.0), (b"nonsense", 0.0)])
def test_tokens_that_were_made(text: bytes, tokens: float) -> None:
    assert probe.tokens_done(text) == tokens


@pytest.mark.parametrize("ask", [probe.health, probe.models, probe.metrics])
def test_a_question_that_was_closed_stays_closed(server: Server, ask: Callable[[int], Probe]) -> None:
    question = ask(server.port)
    question.close()
    question.close()


def test_a_question_that_no_descriptor_is_left_for_is_asked_later(
        server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    def none_left(*arguments: object, **options: object) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(http.client.HTTPConnection, "connect", none_left)
        question = probe.inference(server.port, "m", "/v1/completions")
        assert question.poll() is None and not question.sent
    assert question.poll() is None and question.sent
    assert server.accept().startswith(b"POST /v1/completions HTTP/1.1")
    server.send(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
    wait_until(lambda: question.poll() is not None)
    assert question.poll() == Answer(200, b"ok")
