"""web/events.py: told to all who listen, by one thread, and nobody who does not read holds up another."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from tests.support import wait_until
from web import events
from web.events import Feed, TooManyListeners


@pytest.fixture
def feed() -> Iterator[Feed]:
    made = Feed()
    made.start()
    yield made
    made.close()
    made.close()


class Listener:
    def __init__(self, feed: Feed, after: int | None = None) -> None:
        theirs, self.socket = socket.socketpair()
        self.socket.settimeout(120)
        with theirs:
            feed.join(theirs, "the-id", after)
        self._text = self.socket.makefile("rb")
        head = b"".join(iter(self._text.readline, b"\r\n"))
        assert head.startswith(b"HTTP/1.1 200 OK\r\n") and b"X-Request-Id: the-id\r\n" in head
        assert b"Content-Type: text/event-stream" in head

    def next(self) -> dict[str, Any]:
        lines = [line.rstrip(b"\n") for line in iter(self._text.readline, b"\n")]
        assert lines, "it was cut off"
        fields = dict(line.split(b": ", 1) for line in lines)
        found: dict[str, Any] = json.loads(fields[b"data"])
        assert found["event"].encode() == fields[b"event"] and int(fields.get(b"id", found["id"])) == found["id"]
        return found

    def is_at_its_end(self) -> bool:
        while self._text.read(1 << 16):
            pass
        return True

    def __enter__(self) -> Listener:
        return self

    def __exit__(self, *_: object) -> None:
        self._text.close()
        self.socket.close()


def test_who_listens_is_told_and_who_comes_later_is_told_what_is_kept(feed: Feed) -> None:
    with Listener(feed) as one:
        assert one.next()["event"] == "hello"
        feed.publish("state", {"instance": "a"})
        feed.publish("sample", {"n": 1}, keep=False)
        feed.publish("state", {"instance": "b"})
        told = [one.next() for _ in range(3)]
        assert [event["event"] for event in told] == ["state", "sample", "state"]
        with Listener(feed, after=told[0]["id"]) as back:
            assert [back.next().get("instance") for _ in range(2)] == ["b", None]
            feed.publish("state", {"instance": "c"})
            assert back.next()["instance"] == "c"           # once
    assert [event.data["instance"] for event in feed.last(2)] == ["b", "c"] and feed.last(0) == []


def test_what_is_remembered_is_bounded(feed: Feed) -> None:
    for number in range(events.KEPT + 10):
        feed.publish("state", {"n": number})
    assert [feed.last(10_000)[place].data["n"] for place in (0, -1)] == [10, events.KEPT + 9]


def test_one_who_does_not_read_is_cut_off_and_the_others_are_told(feed: Feed) -> None:
    with Listener(feed) as slow, Listener(feed) as good:
        assert good.next()["event"] == "hello"
        for number in range(40):
            feed.publish("state", {"n": number, "filling": "x" * 100_000})
            assert good.next()["n"] == number
        wait_until(lambda: feed.count() == 1)
        assert slow.is_at_its_end()


def test_one_who_leaves_is_forgotten(feed: Feed) -> None:
    with Listener(feed) as one:
        assert one.next()["event"] == "hello" and feed.count() == 1
    wait_until(lambda: feed.count() == 0)


def test_their_number_is_bounded(feed: Feed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "LISTENERS", 3)
    with ExitStack() as stack:
        for _ in range(3):
            assert stack.enter_context(Listener(feed)).next()["event"] == "hello"
        theirs, ours = socket.socketpair()
        with theirs, ours, pytest.raises(TooManyListeners):
            feed.join(theirs, "x", None)
        assert theirs.fileno() == -1            # closed by this test, not by the feed


def test_silence_is_broken_by_comments(feed: Feed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "SILENCE_S", 0.0)
    with Listener(feed) as one:
        assert one.next()["event"] == "hello"
        assert one.socket.recv(1) == b":"


def test_the_end_closes_them() -> None:
    feed = Feed()
    feed.start()
    with Listener(feed) as one:
        assert one.next()["event"] == "hello"
        feed.close()
        assert one.is_at_its_end()
    feed.publish("state", {})                   # nobody is there, which is fine
    with socket.socket() as late, pytest.raises(TooManyListeners):
        feed.join(late, "x", None)
