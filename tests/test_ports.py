"""Ports that two never get, that nobody else has, and that come back."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator

import pytest

from instances import ports as ports_module
from instances.ports import Ports, is_free
from tests.support import can_bind_plainly, claim_ports


@pytest.fixture
def base() -> Iterator[int]:
    """The first of many free ports in a row."""
    claim, first = claim_ports()
    with claim:
        yield first


@pytest.fixture
def taken(base: int) -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", base)) as server:
        yield server


def test_the_lowest_free_one_upward_from_the_base(base: int) -> None:
    ports = Ports(base)
    assert [ports.reserve(name) for name in "abc"] == [base, base + 1, base + 2]
    ports.release("b")
    assert ports.reserve("d") == base + 1


def test_one_that_somebody_listens_on_is_passed_over(base: int, taken: socket.socket) -> None:
    assert Ports(base).reserve("a") == base + 1


@pytest.mark.parametrize("host", ["0.0.0.0", pytest.param("::", marks=pytest.mark.skipif(
    not socket.has_dualstack_ipv6(), reason="this machine has no IPv6"))])
def test_also_one_that_is_taken_on_all_addresses(base: int, host: str) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, base), family=family, dualstack_ipv6=":" in host):
        assert not is_free(base)


def test_also_one_that_an_engine_has_bound_and_still_loads(base: int) -> None:
    with socket.socket() as loading:
        loading.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        loading.bind(("127.0.0.1", base))
        assert not is_free(base)
    assert is_free(base)


def test_connections_that_linger_do_not_matter(base: int) -> None:
    address = "127.0.0.1", base
    with socket.create_server(address) as server, socket.create_connection(address) as client:
        accepted, _ = server.accept()
        accepted.close()                # the server closes first, so TIME_WAIT is on its side
        assert client.recv(1) == b""
    assert not can_bind_plainly(base)       # it does linger
    assert is_free(base)


def test_its_own_port_again_if_that_is_free(base: int) -> None:
    ports = Ports(base)
    assert ports.reserve("a", preferred=base + 7) == base + 7
    assert ports.reserve("a", preferred=base + 7) == base + 7
    ports.release("a")
    assert ports.reserve("b", preferred=base + 7) == base + 7
    assert ports.reserve("a", preferred=base + 7) == base


def test_those_that_it_could_not_use_are_avoided(base: int) -> None:
    assert Ports(base).reserve("a", preferred=base, avoid={base, base + 1}) == base + 2


def test_an_owner_has_one_port(base: int) -> None:
    ports = Ports(base)
    ports.reserve("a")
    ports.reserve("a", preferred=base + 3)
    assert ports.reserve("b") == base


def test_one_that_runs_already_holds_its_port(base: int) -> None:
    ports = Ports(base)
    ports.take("adopted", base)
    assert ports.reserve("a") == base + 1


def test_none_left(base: int, taken: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ports_module, "TRIES", 2)
    ports = Ports(base)
    assert [ports.reserve("a"), ports.reserve("b")] == [base + 1, None]
    ports.release("a")
    assert ports.reserve("b") == base + 1


def test_the_last_port_there_is() -> None:
    ports = Ports(65535)
    assert ports.reserve("a") in (65535, None) and ports.reserve("b") is None


def test_many_at_once_get_different_ones(base: int) -> None:
    ports, together, found = Ports(base), threading.Barrier(16), []

    def reserve(name: str) -> None:
        together.wait()
        found.append(ports.reserve(name))

    threads = [threading.Thread(target=reserve, args=(str(number),)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert None not in found and len(set(found)) == 16
