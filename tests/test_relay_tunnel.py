from __future__ import annotations

import random
import socket
import threading
from collections.abc import Callable, Iterator

import pytest

from routing.framing import TUNNEL
from tests.relay_harness import HEAD, Driven, at_end, driven_loop, fill, read_all, read_exactly, reset


@pytest.fixture
def driven() -> Iterator[Driven]:
    with driven_loop() as driven:
        yield driven


def test_a_tunnel_carries_both_ways_and_passes_a_half_close_on(driven: Driven) -> None:
    exchange_id, client, upstream = driven.open(TUNNEL, to_client=b"HTTP/1.1 101\r\n\r\nhi", to_upstream=b"early ")
    assert read_exactly(client, 18) == b"HTTP/1.1 101\r\n\r\nhi"
    client.sendall(b"question")
    assert read_exactly(upstream, 14) == b"early question"
    client.shutdown(socket.SHUT_WR)
    assert at_end(upstream)
    upstream.sendall(b"answer")
    assert read_exactly(client, 6) == b"answer"
    driven.wait_for_rest()
    assert driven.ends == []
    upstream.close()
    assert at_end(client)
    end = driven.end_of(exchange_id)
    assert (end.by, end.complete, end.bytes_to_client, end.bytes_to_upstream) == ("client", True, 24, 14)


@pytest.mark.parametrize("buffer_bytes", [None, 4096])
def test_a_tunnel_under_pressure_in_both_directions(driven: Driven, buffer_bytes: int | None) -> None:
    exchange_id, client, upstream = driven.open(TUNNEL, to_client=b"", body_at=0, buffer_bytes=buffer_bytes)
    up, down = random.Random(3).randbytes(1_500_000), random.Random(4).randbytes(1_000_000)

    def write(sock: socket.socket, data: bytes) -> None:
        sock.sendall(data)
        sock.shutdown(socket.SHUT_WR)

    received: dict[str, bytes] = {}
    threads = [
        threading.Thread(target=write, args=(client, up)),
        threading.Thread(target=write, args=(upstream, down)),
        threading.Thread(target=lambda: received.update(up=read_all(upstream)[0])),
        threading.Thread(target=lambda: received.update(down=read_all(client)[0])),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert received["up"] == up and received["down"] == down
    end = driven.end_of(exchange_id)
    assert (end.complete, end.bytes_to_client, end.bytes_to_upstream) == (True, len(down), len(up))


@pytest.mark.parametrize("dead", ["client", "upstream_cut"])
def test_a_tunnel_ends_with_the_reset_of_either_side(driven: Driven, dead: str) -> None:
    exchange_id, client, upstream = driven.open(TUNNEL, to_client=b"x", body_at=0)
    read_exactly(client, 1)
    died, other = (client, upstream) if dead == "client" else (upstream, client)
    reset(died)
    assert at_end(other)
    end = driven.end_of(exchange_id)
    assert (end.by, end.complete) == (dead, False)


def test_a_tunnel_ends_with_the_reset_of_a_client_that_had_closed_its_direction(driven: Driven) -> None:
    exchange_id, client, upstream = driven.open(TUNNEL)
    read_exactly(client, len(HEAD))
    client.shutdown(socket.SHUT_WR)
    assert at_end(upstream)  # and is silent
    reset(client)
    assert driven.end_of(exchange_id).by == "client"


@pytest.mark.parametrize("die", [socket.socket.close, reset])
def test_a_tunnel_whose_upstream_dies_while_the_client_does_not_read(
        driven: Driven, die: Callable[[socket.socket], None]) -> None:
    exchange_id, client, upstream = driven.open(TUNNEL, to_client=b"", body_at=0, buffer_bytes=65536)
    data = random.Random(5).randbytes(5_000_000)
    sent = fill(driven, upstream, data)
    die(upstream)
    driven.wait_for_rest()
    received, _ = read_all(client)
    assert data.startswith(received)
    if die is not reset:
        assert len(received) == sent
    client.close()
    assert driven.end_of(exchange_id).by in ("upstream", "upstream_cut")


def test_a_tunnel_can_be_cut_and_times_out(driven: Driven) -> None:
    cut_id, client, _ = driven.open(TUNNEL)
    late_id, late_client, _ = driven.open(TUNNEL, idle_timeout_s=10)
    read_exactly(client, len(HEAD))
    read_exactly(late_client, len(HEAD))
    driven.loop.cut(cut_id)
    assert driven.end_of(cut_id).by == "cut"
    assert at_end(client)
    driven.advance(11)
    assert driven.end_of(late_id).by == "timeout"
    assert at_end(late_client)
