"""WebSockets to servers behind https: a bridge between a relay's plain bytes and TLS."""

from __future__ import annotations

import contextlib
import random
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from routing.remote import Origin
from routing.tls_bridge import plain_end
from routing.upstream import ConnectionRefused
from tests.daemon import HANG_S, Daemon
from tests.relay_harness import at_end, read_all, read_exactly
from tests.support import wait_until
from tests.test_servers import daemon_with
from tests.test_tls import certificate

__all__ = ["certificate"]     # a fixture

Served = Callable[[ssl.SSLSocket], None]


class Server:
    """Does the same with every connection, each in a thread; a context manager, at whose end all are over."""

    def __init__(self, certificate: Path, serve: Served) -> None:
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(certificate)
        self._serve = serve
        self._threads: list[threading.Thread] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        client = ssl.create_default_context(cafile=str(certificate))
        self.origin = Origin(f"https://127.0.0.1:{self.port}", "127.0.0.1", self.port, tls=client)

    def __enter__(self) -> Server:
        self._acceptor = threading.Thread(target=self._accept)
        self._acceptor.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for thread in (self._acceptor, *self._threads):
            thread.join(HANG_S)
            assert not thread.is_alive()
        wait_until(lambda: not any(one.name == "tls-bridge" for one in threading.enumerate()))

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                sock, _ = self._listener.accept()
                sock.settimeout(HANG_S)
                thread = threading.Thread(target=self._one, args=(sock,))
                self._threads.append(thread)
                thread.start()

    def _one(self, sock: socket.socket) -> None:
        with contextlib.suppress(OSError), self._context.wrap_socket(sock, server_side=True) as secure:
            self._serve(secure)


def echo(secure: ssl.SSLSocket) -> None:
    while data := secure.recv(65536):
        secure.sendall(data)


@contextlib.contextmanager
def bridged(certificate: Path, serve: Served) -> Iterator[socket.socket]:
    with Server(certificate, serve) as server, plain_end(server.origin) as plain:
        plain.settimeout(HANG_S)
        yield plain


def test_bytes_come_back_under_pressure_in_both_directions(certificate: Path) -> None:
    data = random.Random(1).randbytes(3_000_000)
    with bridged(certificate, echo) as plain:
        sender = threading.Thread(target=plain.sendall, args=(data,))
        sender.start()
        assert read_exactly(plain, len(data)) == data
        sender.join()


def test_a_large_answer_to_who_reads_late_is_whole_and_its_end_is_seen(certificate: Path) -> None:
    data = random.Random(2).randbytes(2_000_000)
    sent = threading.Event()

    def answer(secure: ssl.SSLSocket) -> None:
        secure.recv(100)
        sent.set()
        secure.sendall(data)

    with bridged(certificate, answer) as plain:
        plain.sendall(b"question")
        assert sent.wait(HANG_S)
        assert read_all(plain)[0] == data


def test_the_server_sees_it_when_the_relay_has_gone(certificate: Path) -> None:
    ended = threading.Event()

    def listen(secure: ssl.SSLSocket) -> None:
        while secure.recv(100):
            pass
        ended.set()

    with bridged(certificate, listen) as plain:
        plain.sendall(b"x")
        plain.close()
        assert ended.wait(HANG_S)


def test_a_relay_that_goes_while_the_server_reads_nothing_leaves_no_thread(certificate: Path) -> None:
    gone = threading.Event()
    with bridged(certificate, lambda secure: (gone.wait(HANG_S), None)[1]) as plain:
        plain.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            for _ in range(10_000):
                plain.send(b"x" * 65536)
        plain.close()
        try:
            wait_until(lambda: not any(one.name == "tls-bridge" for one in threading.enumerate()))
        finally:
            gone.set()


def test_a_connection_that_cannot_be_made_is_refused(certificate: Path) -> None:
    with Server(certificate, echo) as server:
        stranger = Origin(server.origin.base, "127.0.0.1", server.port, tls=ssl.create_default_context())
        with pytest.raises(ConnectionRefused, match="not trusted"):
            plain_end(stranger)
    with pytest.raises(ConnectionRefused, match="takes no connections"):
        plain_end(server.origin)


# --- through the daemon -----------------------------------------------------------------------------------------------

def websocket(secure: ssl.SSLSocket) -> None:
    """/health and the like are well; a handshake is taken, and what follows echoed."""
    head = b""
    while True:
        while b"\r\n\r\n" not in head:
            if not (piece := secure.recv(65536)):
                return
            head += piece
        first, _, head = head.partition(b"\r\n\r\n")
        if b"Upgrade: websocket" in first:
            secure.sendall(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n")
            secure.sendall(first.splitlines()[0] + head)
            echo(secure)
            return
        secure.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")


def in_flight(daemon: Daemon) -> int:
    return int(daemon.get("/load-stats").json["servers"][0]["in_flight"])


def test_a_websocket_reaches_a_server_behind_https(tmp_path: Path, certificate: Path) -> None:
    with Server(certificate, websocket) as server:
        entry = (f'{{ url = "{server.origin.base}", max_concurrent_requests = 8, models = ["m"], '
                 f'tls = {{ ca = "{certificate}" }} }}')
        with daemon_with(tmp_path, f"[servers]\nservers = [{entry}]\n") as daemon:
            wait_until(lambda: daemon.get("/load-stats").json["servers"][0]["health"] == "up")
            with daemon.socket() as client:
                client.sendall(b"GET /v1/realtime?model=m HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\n"
                               b"Upgrade: websocket\r\nSec-WebSocket-Key: eA==\r\n\r\n")
                received = b""
                while not received.endswith(b"GET /v1/realtime?model=m HTTP/1.1"):
                    received += client.recv(1)
                assert received.startswith(b"HTTP/1.1 101 ")
                client.sendall(b"frames")
                assert read_exactly(client, 6) == b"frames" and in_flight(daemon) == 1
                client.shutdown(socket.SHUT_WR)
                assert at_end(client)
            wait_until(lambda: in_flight(daemon) == 0)
