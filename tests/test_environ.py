"""web/environ.py and web/connection.py: environ and answer are what gunicorn's own would be, made in less time."""

from __future__ import annotations

import socket
from typing import Any, cast

import pytest
from gunicorn.config import Config
from gunicorn.http import wsgi
from gunicorn.http.errors import InvalidHeader
from gunicorn.http.message import Request

from web.connection import OneWrite
from web.environ import HEADERS, environ_of
from web.request_head import _Source, parse

CFG = Config()
CLIENT, SERVER = ("10.0.0.7", 40000), ("127.0.0.1", 5000)
LEFT_OUT = {"wsgi.file_wrapper", "wsgi.early_hints"}      # for nobody here
OURS = {"wsgi.multithread": True}


class Client:
    """Keeps what it is sent."""

    def __init__(self) -> None:
        self.got: list[bytes] = []

    def sendall(self, data: bytes) -> None:
        self.got.append(data)

    def recv(self, size: int) -> bytes:
        return b""


def head_of(lines: tuple[str, ...]) -> bytes:
    return "".join(f"{line}\r\n" for line in (*lines, "")).encode("latin-1")


def request_of(*lines: str) -> Any:
    request = parse(CFG, head_of(lines), cast(socket.socket, Client()), CLIENT)
    request.body = None
    return request


@pytest.mark.parametrize("lines", [
    ("GET / HTTP/1.1", "Host: a"), ("POST /v1/x?a=1&b=%20 HTTP/1.0",),
    ("POST /a%20b/%C3%A4 HTTP/1.1", "Host: a:1", "Content-Type: text/plain", "Content-Length: 3"),
    ("GET /\xe4 HTTP/1.1", "Host: a", "X-Two: 1", "x-two: 2", "Accept-Language: de"),
    ("GET http://else/p?q HTTP/1.1", "Host: a", "Transfer-Encoding: chunked", "X-Forwarded-Proto: https")])
def test_an_environ_is_what_gunicorn_makes_of_it(lines: tuple[str, ...]) -> None:
    request, sock = request_of(*lines), cast(socket.socket, Client())
    known = Request(CFG, _Source(head_of(lines), sock), CLIENT)
    known.body = None
    _, theirs = wsgi.create(known, sock, CLIENT, SERVER, CFG)
    ours = environ_of(request, sock, CLIENT, SERVER)
    assert ours.pop(HEADERS) == request.headers
    assert ours.pop("wsgi.errors") is not None and theirs.pop("wsgi.errors") is not None
    assert ours == {key: value for key, value in theirs.items() if key not in LEFT_OUT} | OURS


def test_nothing_of_one_request_is_left_in_the_next() -> None:
    first = environ_of(request_of("GET / HTTP/1.1", "X-A: 1"), cast(socket.socket, Client()), CLIENT, SERVER)
    first["note"] = 1
    second = environ_of(request_of("GET / HTTP/1.1"), cast(socket.socket, Client()), CLIENT, SERVER)
    assert "HTTP_X_A" not in second and "note" not in second


def written(status: str, headers: list[tuple[str, str]], pieces: list[bytes], *lines: str) -> list[bytes]:
    client = Client()
    answer = OneWrite(request_of(*(lines or ("GET / HTTP/1.1", "Host: a"))), cast(socket.socket, client), CFG)
    answer.start_response(status, headers)
    for piece in pieces:
        answer.write(piece)
    answer.close()
    return client.got


def test_the_head_goes_with_the_first_piece() -> None:
    first, second, last = written("200 OK", [("X-A", "1"), ("X-A", "\xe4")], [b"one", b"two"])
    head, _, body = first.partition(b"\r\n\r\n")
    lines = head.split(b"\r\n")
    assert lines[0] == b"HTTP/1.1 200 OK" and lines[3:] == [
        b"Connection: keep-alive", b"Transfer-Encoding: chunked", b"X-A: 1", b"X-A: \xe4"]
    assert (body, second, last) == (b"3\r\none\r\n", b"3\r\ntwo\r\n", b"0\r\n\r\n")


def test_a_length_is_kept_and_what_is_the_servers_is_not() -> None:
    headers = [("Content-Length", "3"), ("Connection", "close"), ("Server", "x"), ("Date", "then"), ("Keep-Alive", "1")]
    one, = written("200 OK", headers, [b"one"])
    assert one.endswith(b"Connection: keep-alive\r\nContent-Length: 3\r\n\r\none")
    assert one.count(b"Server: ") == one.count(b"Date: ") == 1 and b"then" not in one and b"Keep-Alive" not in one


def test_a_client_that_wants_it_closed_is_told() -> None:
    assert b"Connection: close\r\n" in written("200 OK", [("Content-Length", "0")], [], "GET / HTTP/1.0")[0]


@pytest.mark.parametrize("header", [
    ("X", "a\r\nY: b"), ("X", "a\nb"), ("X", "a\rb"), ("X", "a\x00b"), ("X\r\nY", "a"), ("X\r", "\nb")])
def test_no_header_becomes_another_line(header: tuple[str, str]) -> None:
    client = Client()
    answer = OneWrite(request_of("GET / HTTP/1.1", "Host: a"), cast(socket.socket, client), CFG)
    answer.start_response("200 OK", [header])
    with pytest.raises(InvalidHeader):
        answer.write(b"body")
    assert client.got == [] and not answer.headers_sent
