"""The data plane in front of a server behind https: whatever breaks there, at every byte; then at random.

TLS has three ends where TCP has two: with its own goodbye, without it (as a process that dies ends), and reset.  Only
the first may end a body that has no other end.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import pytest
from hypothesis import given, settings

from tests.daemon import Daemon
from tests.data_plane import ANSWERS, CLOSING, closing_steps, steps
from tests.exchanges import CLOSE, RESET, Step, assert_same, connect, exchange, request, send
from tests.relay_harness import reset
from tests.scripted_engine import Engine, Handler, Server
from tests.slow.test_torture import (
    AT_ONCE,
    ENDS,
    EXAMPLES,
    LARGE_ANSWERS,
    REQUESTS,
    SWITCHED,
    UPGRADE,
    Case,
    Leave,
    at_once,
    begin_large_answers,
    cases,
    half_close,
    leave_at_every_byte_of_a_request,
    leave_at_every_byte_of_an_answer,
    read_large_answers,
)
from tests.support import wait_until
from tests.test_tls import certificate

__all__ = ["certificate"]     # a fixture

VANISH: Step = ["vanish"]       # close without a word of TLS
GOODBYE_S = 5.0
pytestmark = pytest.mark.timeout(900)


class TlsHandler(Handler):
    """The scripts of the plain engine, which also know `vanish`."""

    context: ssl.SSLContext
    says_goodbye = True

    def setup(self) -> None:
        self.request = self.context.wrap_socket(self.request, server_side=True)

    def _play(self, script: list[Step], asked: bytes, received: bytes) -> bool:
        self.says_goodbye = VANISH not in script
        return super()._play([CLOSE if step == VANISH else step for step in script], asked, received)

    def finish(self) -> None:
        if self.says_goodbye:
            with contextlib.suppress(OSError, ValueError):      # it was reset, or its peer has gone
                self.request.settimeout(GOODBYE_S)
                cast(ssl.SSLSocket, self.request).unwrap()
        self.request.close()


class TlsServer(Server):
    def handle_error(self, request: object, client_address: object) -> None:
        """A client may leave in the middle of a handshake."""


@pytest.fixture(scope="module")
def served(certificate: Path) -> Iterator[tuple[Engine, int]]:
    """The engine and its port."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    engine = Engine("m")
    with TlsServer(("127.0.0.1", 0), type("Bound", (TlsHandler,), {"engine": engine, "context": context})) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield engine, server.server_address[1]
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def daemon(served: tuple[Engine, int], certificate: Path,
           tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    folder = tmp_path_factory.mktemp("daemon")
    (folder / "servers.toml").write_text(
        f'[servers]\nservers = [{{ url = "https://127.0.0.1:{served[1]}", max_concurrent_requests = 64, '
        f'models = ["m"], tls = {{ ca = "{certificate}" }} }}]\n[config]\nmax_retries = 0\n')
    # The server fails as often as it is told to, and gets the next request all the same.
    with Daemon(folder, patch={"routing.circuit.FAILURES": 1 << 30}) as daemon:
        wait_until(lambda: daemon.get("/load-stats").json["servers"][0]["health"] == "up")
        yield daemon
        assert "Traceback" not in daemon.log


@pytest.fixture(autouse=True)
def nothing_is_held(daemon: Daemon, served: tuple[Engine, int]) -> Iterator[None]:
    yield
    wait_until(lambda: in_flight(daemon) == 0)
    wait_until(lambda: served[0].stats()["open"] <= 2 * AT_ONCE)       # idle ones, to be used again


def in_flight(daemon: Daemon) -> int:
    return int(daemon.get("/load-stats").json["servers"][0]["in_flight"])


@pytest.mark.parametrize("version", ["1.1", "1.0"])
@pytest.mark.parametrize("name", [*ANSWERS, *CLOSING])
def test_an_answer_means_the_same(daemon: Daemon, name: str, version: str) -> None:
    answer = (ANSWERS | CLOSING)[name]
    script = closing_steps(answer) if name in CLOSING else steps(answer)
    received, was_reset = exchange(daemon, request(script, version=version, headers=ENDS))
    assert not was_reset
    assert_same(answer, False, received, was_reset)


@pytest.mark.parametrize("end", [CLOSE, VANISH, RESET], ids=["close", "vanish", "reset"])
@pytest.mark.parametrize("version", ["1.1", "1.0"])
@pytest.mark.parametrize("name", ["events", "trailers", "length", "until the end", "103 before"])
def test_a_server_that_dies_at_every_byte(daemon: Daemon, name: str, version: str, end: Step) -> None:
    answer = (ANSWERS | CLOSING)[name]

    def die(at: int) -> None:
        asked = request([*steps(answer[:at]), ["gap"], end], version=version, headers=ENDS)
        assert_same(answer[:at], end != CLOSE, *exchange(daemon, asked))

    at_once(die, range(len(answer) + 1))


@pytest.mark.parametrize("leave", [socket.socket.close, reset, half_close])
@pytest.mark.parametrize("name", REQUESTS)
def test_a_client_that_leaves_at_every_byte_of_its_request(daemon: Daemon, name: str, leave: Leave) -> None:
    leave_at_every_byte_of_a_request(daemon, REQUESTS[name], leave)


@pytest.mark.parametrize("leave", [socket.socket.close, reset])
@pytest.mark.parametrize("name", ["events", "length", "until the end"])
def test_a_client_that_leaves_at_every_byte_of_the_answer(daemon: Daemon, name: str, leave: Leave) -> None:
    leave_at_every_byte_of_an_answer(daemon, (ANSWERS | CLOSING)[name], leave)


@pytest.mark.parametrize("version", ["1.1", "1.0"])
@pytest.mark.parametrize("name", LARGE_ANSWERS)
def test_slow_clients_get_every_byte(daemon: Daemon, name: str, version: str) -> None:
    clients = [connect(daemon.port, 65536) for _ in range(AT_ONCE)]
    begin_large_answers(clients, name, version)
    assert exchange(daemon, request(steps(ANSWERS["length"]), headers=ENDS))[0]
    read_large_answers(clients)


@pytest.mark.parametrize("end", [CLOSE, VANISH, RESET], ids=["close", "vanish", "reset"])
def test_a_tunnel_ends_with_its_server(daemon: Daemon, end: Step) -> None:
    """And what came before a good end comes whole."""
    asked = request([send(SWITCHED + b"frames"), end], method="GET", path="/v1/realtime?model=m", headers=UPGRADE,
                    body=b"")
    received, _ = exchange(daemon, asked)
    assert received == SWITCHED + b"frames" if end == CLOSE else (SWITCHED + b"frames").startswith(received)


@settings(max_examples=EXAMPLES)
@given(case=cases(statuses=(200, 200, 201, 400)))      # after a 5xx a server is left alone for a while
def test_any_exchange(daemon: Daemon, case: Case) -> None:
    received, was_reset = exchange(daemon, request(case.script(), version=case.version, headers=ENDS),
                                   receive_bytes=case.receive_bytes)
    assert_same(case.sent(), case.was_reset(), received, was_reset)
