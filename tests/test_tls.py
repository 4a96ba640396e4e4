"""Servers behind https://: whose certificate counts, and that nothing goes to one that is not trusted."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import socket
import ssl
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from configuration.servers import ServerConfig
from errors import UpstreamError
from routing.questions import Conversation, NoAnswer
from routing.remote import Origin
from routing.upstream import ConnectionRefused, Exchange, Upstream, upstream_errors
from tests.stub_server import StubServer


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One for 127.0.0.1 that is its own authority, with its key in the same file."""
    openssl = shutil.which("openssl")
    assert openssl is not None, "the tests of TLS need openssl (apt install openssl)"
    folder = tmp_path_factory.mktemp("tls")
    path = folder / "server.pem"
    subprocess.run([openssl, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
                    "-days", "2", "-subj", "/CN=test", "-addext", "subjectAltName=IP:127.0.0.1",
                    "-keyout", folder / "key.pem", "-out", folder / "cert.pem"], check=True, capture_output=True)
    path.write_bytes((folder / "key.pem").read_bytes() + (folder / "cert.pem").read_bytes())
    return path


@pytest.fixture
def server(certificate: Path) -> Iterator[StubServer]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    with StubServer(tls=context) as running:
        yield running


def origin(server: StubServer, **tls: object) -> Origin:
    return Origin.of(ServerConfig(server.url, 1, **tls))  # type: ignore[arg-type]


def post(where: Origin, upstream: Upstream, exchange: Exchange | None = None) -> bytes:
    answer = upstream.send(exchange or Exchange(), "POST", f"{where.base}/v1/completions", {"Content-Length": "2"},
                           b"{}", 60, where.tls)
    complete = False
    try:
        with upstream_errors():
            body = b"".join(answer.pieces())
        complete = True
    finally:
        answer.close(complete)
    return body


@pytest.mark.parametrize("verified", [True, False])
def test_a_server_that_is_trusted_gets_requests_on_one_connection(server: StubServer, certificate: Path,
                                                                  verified: bool) -> None:
    where = origin(server, ca=certificate) if verified else origin(server, verify=False)
    upstream = Upstream(4)
    try:
        for _ in range(3):
            exchange = Exchange()
            assert b'"server": "stub"' in post(where, upstream, exchange)
            assert isinstance(exchange.socket, ssl.SSLSocket)
        assert len(server._open) == 1
    finally:
        upstream.close()


def test_one_that_is_not_trusted_gets_nothing(server: StubServer) -> None:
    upstream = Upstream(4)
    try:
        with pytest.raises(ConnectionRefused, match="not trusted"):
            post(origin(server), upstream)
    finally:
        upstream.close()
    assert not server.asked


def test_an_exchange_can_be_ended_while_it_waits(server: StubServer, certificate: Path) -> None:
    server.hangs["*"] = True
    upstream, exchange, where = Upstream(4), Exchange(), origin(server, ca=certificate)
    done: list[BaseException] = []

    def ask() -> None:
        try:
            post(where, upstream, exchange)
        except Exception as error:
            done.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        while not server.asked:
            thread.join(0.01)
        exchange.abort()
        thread.join(60)
        assert len(done) == 1 and type(done[0]).__name__ == "UpstreamError"
    finally:
        server.released.set()
        upstream.close()


@pytest.mark.parametrize("answer", [b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nwhole",
                                    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nwhole\r\n0\r\n\r\n"],
                         ids=["length", "chunks"])
def test_an_answer_that_ends_at_any_byte_is_whole_or_broken(answer: bytes, certificate: Path) -> None:
    """The connection is closed without a word of TLS, as a process that dies does it."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        def serve() -> None:
            for at in range(len(answer) + 1):
                plain, _ = listener.accept()
                with context.wrap_socket(plain, server_side=True) as client:
                    while not client.recv(65536).endswith(b"{}"):
                        pass
                    client.sendall(answer[:at])

        thread = threading.Thread(target=serve)
        thread.start()
        where = Origin.of(ServerConfig(f"https://127.0.0.1:{listener.getsockname()[1]}", 1, ca=certificate))
        upstream = Upstream(4)
        for _ in range(len(answer)):
            with pytest.raises(UpstreamError):
                post(where, upstream)
        assert post(where, upstream) == b"whole"
        upstream.close()
        thread.join()


def test_checks_hold_to_the_same(server: StubServer, certificate: Path) -> None:
    def ask(where: Origin) -> int:
        async def once() -> int:
            async with Conversation(where) as talk:
                return (await talk.get("/health", 60)).status
        return asyncio.run(once())

    assert ask(origin(server, ca=certificate)) == ask(origin(server, verify=False)) == 200
    with pytest.raises(NoAnswer, match="certificate verify failed"):
        ask(origin(server))


@pytest.mark.parametrize("says_goodbye", [True, False])
def test_a_body_without_a_length_ends_with_the_goodbye_of_tls(says_goodbye: bool, certificate: Path) -> None:
    """And not with the connection alone: anyone on the way could end that."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        def serve() -> None:
            plain, _ = listener.accept()
            with context.wrap_socket(plain, server_side=True) as client:
                while not client.recv(65536).endswith(b"{}"):
                    pass
                client.sendall(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nwhole")
                if says_goodbye:
                    with contextlib.suppress(OSError):      # it closes without one of its own
                        client.unwrap()

        thread = threading.Thread(target=serve)
        thread.start()
        where = Origin.of(ServerConfig(f"https://127.0.0.1:{listener.getsockname()[1]}", 1, ca=certificate))
        upstream = Upstream(4)
        with contextlib.nullcontext() if says_goodbye else pytest.raises(UpstreamError):
            assert post(where, upstream) == b"whole"
        upstream.close()
        thread.join()
