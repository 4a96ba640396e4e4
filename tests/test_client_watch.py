"""Clients that leave are noticed, and nobody is taken for one who left before."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from routing.client_watch import ClientWatch
from tests.support import wait_until


@pytest.fixture
def watch() -> Iterator[ClientWatch]:
    watch = ClientWatch()
    watch.start()
    yield watch
    watch.close()


def test_a_client_that_leaves_is_noticed_once(watch: ClientWatch) -> None:
    ours, client = socket.socketpair()
    with ours, client:
        watched = watch.add(ours)
        heard: list[str] = []
        watched.on_gone(lambda: heard.append("gone"))
        client.close()
        wait_until(lambda: watched.gone)
        watched.close()
        assert heard == ["gone"]


def test_who_asks_to_be_told_after_the_client_has_left_is_told_at_once(watch: ClientWatch) -> None:
    ours, client = socket.socketpair()
    with ours, client:
        watched = watch.add(ours)
        client.close()
        wait_until(lambda: watched.gone)
        heard: list[str] = []
        watched.on_gone(lambda: heard.append("gone"))
        assert heard == ["gone"]
        watched.close()


def test_an_event_of_the_client_before_does_not_end_the_next_one() -> None:
    """Its descriptor's number is used again between the event and the look at who it belongs to."""
    watch = ClientWatch()       # whose thread does not run: the event comes when the test says so
    ours, client = socket.socketpair()
    old = watch.add(ours)
    client.close()
    old.close()
    number = ours.fileno()
    ours.close()
    again, other = socket.socketpair()
    with again, other:
        assert number in (again.fileno(), other.fileno())
        mine, peer = (again, other) if again.fileno() == number else (other, again)
        watched = watch.add(mine)
        watch._notice(number)
        assert not watched.gone
        peer.close()
        watch._notice(number)
        assert watched.gone
        watched.close()
    watch.close()
