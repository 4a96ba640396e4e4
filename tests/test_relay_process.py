from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from instances import cores
from routing.framing import CHUNKED, EOF, TUNNEL, Framing, content_length
from routing.relay_process import CHILD, Ended, Relays, RelayUnavailable, _Relay
from routing.relay_wire import (
    MESSAGE_BYTES,
    PIECE_BYTES,
    Handover,
    Inbox,
    cut_message,
    ended_message,
    handover_messages,
    unpack_ended,
)
from tests.relay_harness import HEAD, Sockets, at_end, read_all, read_exactly
from tests.support import wait_until

WIRE = b"5\r\nhello\r\n0\r\n\r\n"
ERROR = b'{"error": {"message": "gone"}}'
ERROR_CHUNK = b"26\r\ndata: %s\n\n\r\n" % ERROR
ROOT = CHILD.parent.parent


class Running:
    """Relays, sockets for them, and every end they told of."""

    def __init__(self, processes: int = 1) -> None:
        self.sockets = Sockets()
        self.ends: list[Ended] = []
        self.relays = Relays(processes, wait_s=60)      # for a process on a busy machine
        self.relays.start()

    def open(self, framing: Framing = CHUNKED, to_client: bytes = HEAD, body_at: int | None = None, *,
             sse: bool = False, on_end: Callable[[Ended], None] | None = None
             ) -> tuple[int, socket.socket, socket.socket]:
        client, client_side = self.sockets.pair()
        upstream, upstream_side = self.sockets.pair()
        exchange_id = self.relays.hand_over(
            client_side, upstream_side, to_client=to_client, framing=framing, on_end=on_end or self.ends.append,
            body_at=len(to_client) if body_at is None else body_at, sse=sse, cut_message=ERROR)
        return exchange_id, client, upstream

    def pids(self) -> list[int | None]:
        return [stats.pid for stats in self.relays.stats()]

    def pid(self) -> int:
        pid, = self.pids()
        assert pid is not None
        return pid

    def end_of(self, exchange_id: int) -> Ended:
        wait_until(lambda: any(end.id == exchange_id for end in list(self.ends)))
        end, = (end for end in list(self.ends) if end.id == exchange_id)
        return end

    def close(self) -> None:
        self.relays.close()
        self.sockets.close()


@pytest.fixture
def running() -> Iterator[Running]:
    running = Running()
    yield running
    running.close()


def descriptors(pid: int | str) -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


def is_alive(pid: int) -> bool:
    """A zombie that nobody waits for is dead."""
    try:
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


# --- one exchange --------------------------------------------------------------------------------------------------

def test_a_stream_goes_through_and_its_end_is_told(running: Running) -> None:
    exchange_id, client, upstream = running.open()
    assert read_exactly(client, len(HEAD)) == HEAD
    assert running.relays.open_count() == 1
    upstream.sendall(WIRE)
    assert read_all(client) == (HEAD[:0] + WIRE, False)
    end = running.end_of(exchange_id)
    assert (end.by, end.complete, end.bytes_to_client) == ("upstream", True, len(HEAD + WIRE))
    assert end.first_byte_s is not None and 0 <= end.first_byte_s <= end.duration_s
    assert running.relays.open_count() == 0
    stats, = running.relays.stats()
    assert (stats.open, stats.handed_over, stats.restarts) == (0, 1, 0)


def test_the_sockets_are_given_away(running: Running) -> None:
    client, client_side = running.sockets.pair()
    upstream, upstream_side = running.sockets.pair()
    with client_side.makefile("rb"):  # which would keep the descriptor open after a plain close
        running.relays.hand_over(client_side, upstream_side, to_client=b"", framing=EOF, on_end=running.ends.append)
        assert (client_side.fileno(), upstream_side.fileno()) == (-1, -1)
        upstream.close()
        assert at_end(client)  # no descriptor here keeps it open


def test_a_long_beginning_goes_over_in_pieces(running: Running) -> None:
    body = random.Random(1).randbytes(900_000)
    _, client, upstream = running.open(content_length(len(body)), HEAD + body[:700_000], len(HEAD))
    threading.Thread(target=upstream.sendall, args=(body[700_000:],)).start()
    assert read_all(client) == (HEAD + body, False)


@pytest.mark.parametrize("at_once", [0, 3, len(HEAD), len(HEAD) + 5, len(HEAD) + 500_000])
def test_what_goes_at_once_goes_once(running: Running, at_once: int) -> None:
    """The last is more than the client's socket takes."""
    data = random.Random(2).randbytes(500_000)
    begin = HEAD + b"%x\r\n%s" % (len(data), data)
    client, client_side = running.sockets.pair(buffer_bytes=1 << 17)
    upstream, upstream_side = running.sockets.pair()
    client_side.settimeout(60)
    exchange_id = running.relays.hand_over(client_side, upstream_side, to_client=begin, body_at=len(HEAD),
                                           at_once=at_once, framing=CHUNKED, on_end=running.ends.append)
    upstream.sendall(b"\r\n0\r\n\r\n")
    assert read_all(client) == (begin + b"\r\n0\r\n\r\n", False)
    end = running.end_of(exchange_id)
    assert (end.complete, end.bytes_to_client) == (True, len(begin) + 7)
    assert end.first_byte_s is not None


def test_an_answer_that_had_begun_when_its_relay_died_is_not_given_back_as_new(
        running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    def die(relay: _Relay, *_: object) -> bool:
        relay._up = False
        return False

    monkeypatch.setattr(_Relay, "send", die)
    running.relays._wait_s = 0.1
    client, client_side = running.sockets.pair()
    _, upstream_side = running.sockets.pair()
    for at_once in (0, len(HEAD)):
        running.relays._relays[0]._up = True
        with pytest.raises(RelayUnavailable) as raised:
            running.relays.hand_over(client_side, upstream_side, to_client=HEAD, body_at=len(HEAD), at_once=at_once,
                                     framing=CHUNKED, on_end=running.ends.append)
        assert raised.value.begun is (at_once > 0)
    assert client_side.gettimeout() is None
    assert read_exactly(client, len(HEAD)) == HEAD


def test_a_tunnel(running: Running) -> None:
    exchange_id, client, upstream = running.open(TUNNEL)
    client.sendall(b"question")
    assert read_exactly(upstream, 8) == b"question"
    upstream.sendall(b"answer")
    assert read_exactly(client, len(HEAD) + 6) == HEAD + b"answer"
    client.close()
    assert at_end(upstream)
    upstream.close()
    assert running.end_of(exchange_id).bytes_to_upstream == 8


def test_cut(running: Running) -> None:
    exchange_id, client, _ = running.open(sse=True)
    running.relays.cut(exchange_id)
    assert read_all(client) == (HEAD + ERROR_CHUNK, False)
    assert running.end_of(exchange_id).by == "cut"
    running.relays.cut(exchange_id)  # has ended: nothing
    running.relays.cut(12345)


def test_an_end_that_cannot_be_noted_does_not_stop_the_others(running: Running, caplog: pytest.LogCaptureFixture
                                                              ) -> None:
    def fail(end: Ended) -> None:
        raise RuntimeError("on_end failed")

    _, client, upstream = running.open(on_end=fail)
    upstream.sendall(WIRE)
    read_all(client)
    exchange_id, client, upstream = running.open()
    upstream.sendall(WIRE)
    assert running.end_of(exchange_id).complete
    assert "on_end failed" in caplog.text


def test_many_threads_hand_over_long_beginnings(running: Running) -> None:
    bodies = {}

    def hand_over(seed: int) -> None:
        for turn in range(10):
            body = random.Random(seed * 100 + turn).randbytes(150_000)
            exchange_id, client, _ = running.open(content_length(len(body)), HEAD + body, len(HEAD))
            bodies[exchange_id] = read_all(client)[0] == HEAD + body

    threads = [threading.Thread(target=hand_over, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(bodies) == 40 and all(bodies.values())
    wait_until(lambda: len(running.ends) == 40)


def test_streams_are_spread_over_the_processes() -> None:
    running = Running(processes=2)
    try:
        assert len(set(running.pids())) == 2
        for _ in range(6):
            running.open()
        assert [stats.open for stats in running.relays.stats()] == [3, 3]
        assert running.relays.open_count() == 6
    finally:
        running.close()
    assert sorted(end.by for end in running.ends) == ["cut"] * 6


# --- deaths --------------------------------------------------------------------------------------------------------

def test_who_is_to_cut_goes_first_until_that_is_done(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, bool]] = []
    monkeypatch.setattr(cores, "hurry", lambda pid, on: asked.append((pid, on)))
    pid, ids = running.pid(), [running.open()[0] for _ in range(3)]
    for exchange_id in ids[:2]:
        running.relays.cut(exchange_id)
        running.end_of(exchange_id)
    running.relays.cut(ids[0])      # it is over already
    wait_until(lambda: asked.count((pid, False)) == 2)
    assert asked == [(pid, True), (pid, False)] * 2


def test_a_killed_process_cuts_its_streams_visibly_and_is_replaced(running: Running) -> None:
    pid = running.pid()
    chunked = [running.open() for _ in range(3)]
    to_eof = running.open(EOF)
    for _, client, _ in (*chunked, to_eof):
        assert read_exactly(client, len(HEAD)) == HEAD
    os.kill(pid, signal.SIGKILL)
    for _, client, upstream in chunked:
        assert at_end(client)  # without the last chunk
        assert at_end(upstream)
    assert read_all(to_eof[1]) == (b"", True)  # an end would look like the body's
    for exchange_id, *_ in (*chunked, to_eof):
        end = running.end_of(exchange_id)
        assert (end.by, end.complete) == ("relay_died", False)
    exchange_id, client, upstream = running.open()  # waits for the new one
    assert running.pid() != pid
    upstream.sendall(WIRE)
    assert read_all(client) == (HEAD + WIRE, False)
    assert running.end_of(exchange_id).complete
    assert len(running.ends) == 5
    assert not is_alive(pid)
    assert running.relays.stats()[0].restarts == 1


def test_hand_overs_while_processes_die_are_told_once_or_refused(running: Running) -> None:
    told: dict[int, int] = {}
    opened: list[int] = []
    stop = threading.Event()

    def note(end: Ended) -> None:
        told[end.id] = told.get(end.id, 0) + 1

    def hand_over() -> None:
        while not stop.is_set():
            exchange_id, client, upstream = running.open(on_end=note)
            opened.append(exchange_id)
            client.close()
            upstream.close()

    threads = [threading.Thread(target=hand_over) for _ in range(3)]
    for thread in threads:
        thread.start()
    for _ in range(3):
        pid, count = running.pid(), len(opened)
        wait_until(lambda count=count: len(opened) > count + 50)  # type: ignore[misc]
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda pid=pid: running.pids() not in ([pid], [None]))  # type: ignore[misc]
    stop.set()
    for thread in threads:
        thread.join()
    wait_until(lambda: len(told) == len(opened))
    assert set(told) == set(opened)
    assert set(told.values()) == {1}
    assert running.relays.open_count() == 0


def test_without_a_process_the_sockets_stay_the_callers(caplog: pytest.LogCaptureFixture) -> None:
    relays = Relays(wait_s=0.1, python="/bin/false")
    relays.start(timeout_s=0.1)
    assert "does not come up" in caplog.text
    sockets = Sockets()
    client, client_side = sockets.pair()
    _, upstream_side = sockets.pair()
    ends: list[Ended] = []
    with pytest.raises(RelayUnavailable):
        relays.hand_over(client_side, upstream_side, to_client=b"x", framing=EOF, on_end=ends.append)
    client_side.sendall(b"by the plain path")
    assert read_exactly(client, 17) == b"by the plain path"
    relays.close()
    sockets.close()
    assert ends == []


def test_a_closed_socket_is_refused_at_once(running: Running) -> None:
    _, client_side = running.sockets.pair()
    _, upstream_side = running.sockets.pair()
    upstream_side.close()
    with pytest.raises(RelayUnavailable):
        running.relays.hand_over(client_side, upstream_side, to_client=b"", framing=EOF, on_end=running.ends.append)
    assert client_side.fileno() >= 0
    assert running.relays.open_count() == 0


def test_the_signals_of_a_terminal_do_not_end_it(running: Running) -> None:
    pid = running.pid()
    exchange_id, client, upstream = running.open()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        os.kill(pid, number)
    upstream.sendall(WIRE)
    assert read_all(client) == (HEAD + WIRE, False)
    assert running.end_of(exchange_id).complete
    assert running.pid() == pid


DAEMON = """
import signal, socket, sys
sys.path.insert(0, sys.argv[1])
from routing.framing import CHUNKED
from routing.relay_process import Relays
listener = socket.create_server(("127.0.0.1", 0))
relays = Relays()
relays.start()
print(listener.getsockname()[1], relays.stats()[0].pid, flush=True)
client, upstream = listener.accept()[0], listener.accept()[0]
relays.hand_over(client, upstream, to_client=b"HEAD", body_at=4, framing=CHUNKED, on_end=print, sse=True,
                 cut_message=sys.argv[2].encode())
signal.pause()
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_it_ends_with_the_daemon_and_tells_the_clients(number: signal.Signals) -> None:
    with subprocess.Popen([sys.executable, "-c", DAEMON, str(ROOT), ERROR.decode()], stdout=subprocess.PIPE,
                          text=True) as daemon:
        assert daemon.stdout is not None
        port, pid = map(int, daemon.stdout.readline().split())
        with socket.create_connection(("127.0.0.1", port)) as client, \
                socket.create_connection(("127.0.0.1", port)) as upstream:
            assert read_exactly(client, 4) == b"HEAD"
            daemon.send_signal(number)
            assert read_all(client) == (ERROR_CHUNK, False)
            assert at_end(upstream)
        wait_until(lambda: not is_alive(pid))


# --- closing -------------------------------------------------------------------------------------------------------

def test_close_lets_what_is_open_finish() -> None:
    running = Running()
    exchange_id, client, upstream = running.open()
    closer = threading.Thread(target=running.relays.close, args=(120.0,))
    closer.start()
    wait_until(lambda: running.relays._closing)
    _, client_side = running.sockets.pair()
    _, upstream_side = running.sockets.pair()
    with pytest.raises(RelayUnavailable):
        running.relays.hand_over(client_side, upstream_side, to_client=b"", framing=EOF, on_end=running.ends.append)
    upstream.sendall(WIRE)
    assert read_all(client) == (HEAD + WIRE, False)
    closer.join()
    assert [(end.id, end.by) for end in running.ends] == [(exchange_id, "upstream")]
    running.sockets.close()


def test_close_cuts_what_does_not_finish_and_leaves_nothing() -> None:
    threads = set(threading.enumerate())
    running = Running(processes=2)
    pids = running.pids()
    clients = [running.open(sse=True)[1] for _ in range(200)]
    running.relays.close()
    assert [end.by for end in running.ends] == ["cut"] * 200
    assert all(read_all(client) == (HEAD + ERROR_CHUNK, False) for client in clients)
    assert set(threading.enumerate()) == threads
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)  # waited for as well
    running.relays.close()  # again: nothing
    running.sockets.close()


def test_a_process_that_hangs_is_killed_at_the_close(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("routing.relay_process.EXIT_S", 0.1)
    exchange_id, client, _ = running.open()
    read_exactly(client, len(HEAD))
    pid = running.pid()
    os.kill(pid, signal.SIGSTOP)
    running.relays.close()
    assert running.end_of(exchange_id).by == "relay_died"
    assert not Path(f"/proc/{pid}").exists()


def test_a_process_that_takes_nothing_refuses_and_blocks_nobody_for_long(
        running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("routing.relay_process.EXIT_S", 0.1)
    os.kill(running.pid(), signal.SIGSTOP)
    opened = 0
    with pytest.raises(RelayUnavailable, match="did not take it"):
        for _ in range(100):
            running.open(EOF, bytes(60_000))
            opened += 1
    assert running.relays.open_count() == opened
    os.kill(running.pid(), signal.SIGCONT)
    exchange_id, client, upstream = running.open()
    upstream.sendall(WIRE)
    assert read_all(client) == (HEAD + WIRE, False)


def test_no_descriptor_is_left_after_many_exchanges(running: Running) -> None:
    def exchange(count: int) -> None:
        opened = [running.open() for _ in range(count)]
        for _, _, upstream in opened:
            upstream.sendall(WIRE)
        for _, client, _ in opened:
            assert read_all(client) == (HEAD + WIRE, False)
        wait_until(lambda: len(running.ends) == count)
        running.sockets.close_peers()
        running.ends.clear()

    exchange(1)
    pid = running.pid()
    wait_until(lambda: descriptors(pid) == 6)  # three standard ones, control, epoll, wake-up
    here = descriptors("self")
    for _ in range(10):
        exchange(50)
    wait_until(lambda: descriptors(pid) == 6)
    assert descriptors("self") == here


def test_what_a_process_told_before_its_death_is_heard() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ends: list[Ended] = []
    relay = _Relay(0, sys.executable, lambda: None)
    relay._open[1] = ends.append
    end = Ended(1, 5, 0, None, 1.0, "client", complete=False)
    theirs.send(ended_message([end]))
    ours.send(b"a message that it did not read")  # makes its death a reset
    theirs.close()
    with ours:
        relay._hear(ours)
    assert ends == [end]


# --- the process ---------------------------------------------------------------------------------------------------

def test_it_inherits_no_listening_socket() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.set_inheritable(True)  # as a server does that restarts itself
        running = Running()
        assert descriptors(running.pid()) == 6
        running.close()


def test_it_loads_little() -> None:
    """Each module is memory beside the daemon's; a thousand streams are to fit in little."""
    code = (f"import sys; sys.path.insert(0, {str(ROOT)!r}); import routing.relay_child; "
            "print(*sys.modules)")
    modules = subprocess.run([sys.executable, "-I", "-S", "-c", code], check=True, capture_output=True,
                             text=True).stdout.split()
    heavy = {"asyncio", "logging", "threading", "typing", "ssl", "subprocess", "multiprocessing", "json", "flask",
             "requests", "site"}
    assert heavy.isdisjoint(modules)
    assert {name for name in modules if name.startswith("routing")} == {
        "routing", "routing.framing", "routing.poller", "routing.relay_child", "routing.relay_exchange",
        "routing.relay_loop", "routing.relay_wire"}


# --- messages ------------------------------------------------------------------------------------------------------

handovers = st.builds(
    Handover, id=st.integers(0, 2**64 - 1), to_client=st.binary(max_size=50) | st.just(bytes(3 * PIECE_BYTES)),
    framing=st.sampled_from([CHUNKED, EOF, TUNNEL]) | st.builds(content_length, st.integers(0, 2**64 - 1)),
    body_at=st.integers(0, 2**31), to_upstream=st.binary(max_size=50),
    idle_timeout_s=st.none() | st.floats(0, 1e6), sse=st.booleans(), cut_message=st.binary(max_size=50),
    started_at=st.none() | st.floats(0, 1e9), sent=st.integers(0, 2**31),
)


@given(handovers, handovers)
def test_a_hand_over_arrives_as_it_was_sent(first: Handover, second: Handover) -> None:
    inbox = Inbox()
    if first.id != second.id:
        for message in handover_messages(first)[:-1]:  # its sender failed half-way
            assert inbox.take(message) is None
    *pieces, last = handover_messages(second)
    assert all(len(message) <= MESSAGE_BYTES for message in (*pieces, last))
    assert all(inbox.take(message) is None for message in pieces)
    assert inbox.take(cut_message(5, b"why")) == (5, b"why")
    assert inbox.take(last) == second


@given(st.lists(st.builds(
    Ended, id=st.integers(0, 2**64 - 1), bytes_to_client=st.integers(0, 2**60),
    bytes_to_upstream=st.integers(0, 2**60), first_byte_s=st.none() | st.floats(0, 1e6),
    duration_s=st.floats(0, 1e6), by=st.sampled_from(["upstream", "upstream_cut", "client", "cut", "timeout"]),
    complete=st.booleans())))
def test_ends_arrive_as_they_were_sent(ends: list[Ended]) -> None:
    assert list(unpack_ended(ended_message(ends))) == ends
