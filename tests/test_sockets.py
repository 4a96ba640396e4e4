"""Whose socket listens, on real sockets and on tables as other machines write them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from instances import sockets
from instances.sockets import Listener

HEAD = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n"
ME = os.getpid()
IPV6 = pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="this machine has no IPv6")


@pytest.fixture
def proc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A /proc of one process, 7, that holds the socket 4711."""
    (tmp_path / "net").mkdir()
    (tmp_path / "7" / "fd").mkdir(parents=True)
    (tmp_path / "7" / "fd" / "3").symlink_to("socket:[4711]")
    (tmp_path / "7" / "fd" / "4").symlink_to("/dev/null")
    monkeypatch.setattr(sockets, "PROC", tmp_path)
    return tmp_path


def table(proc: Path, *lines: str, name: str = "tcp") -> None:
    """Each line: address:port state inode."""
    rows = []
    for number, (address, state, inode) in enumerate(line.split() for line in lines):
        rows.append(f"{number:4}: {address} 00000000:0000 {state} 00000000:00000000 00:00000000 00000000     0  "
                    f"      0 {inode} 1 0000000000000000 100 0 0 10 0\n")
    (proc / "net" / name).write_text(HEAD + "".join(rows))


@pytest.fixture
def other() -> Iterator[tuple[int, int]]:
    """Pid and port of another program's server."""
    script = "import socket; s = socket.create_server(('127.0.0.1', 0)); print(s.getsockname()[1], flush=True); input()"
    child = subprocess.Popen([sys.executable, "-S", "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with child:
        assert child.stdout is not None and child.stdin is not None
        yield child.pid, int(child.stdout.readline())
        child.stdin.close()
        child.wait()


@pytest.mark.parametrize("host, found", [
    ("127.0.0.1", Listener.OURS), ("127.9.9.9", Listener.OURS), ("0.0.0.0", Listener.EXPOSED),
    pytest.param("::1", Listener.OURS, marks=IPV6), pytest.param("::", Listener.EXPOSED, marks=IPV6)])
def test_a_server_of_ours(host: str, found: Listener) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, 0), family=family) as server:
        assert sockets.listener(server.getsockname()[1], [ME]) is found


def test_a_server_of_another_program(other: tuple[int, int]) -> None:
    pid, port = other
    assert sockets.listener(port, [ME]) is Listener.STRANGER
    assert sockets.listener(port, [ME, pid]) is Listener.OURS
    assert sockets.listener(port, [pid, 2 ** 22 + 1]) is Listener.OURS      # one ended meanwhile


def test_a_connection_is_no_listener() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        with socket.create_connection(server.getsockname()) as client:
            assert sockets.listener(client.getsockname()[1], [ME]) is Listener.STRANGER
            assert sockets.has_connections(client.getsockname()[1])
        assert not sockets.has_connections(server.getsockname()[1])     # something listens there


def test_nothing_there(proc: Path) -> None:
    table(proc)
    assert sockets.listener(9000, [7]) is Listener.STRANGER
    assert not sockets.has_connections(9000)


@pytest.mark.parametrize("line, found", [
    ("0100007F:2328 0A 4711", Listener.OURS),
    ("0100007F:2328 0A 9999", Listener.STRANGER),
    ("0100007F:2329 0A 4711", Listener.STRANGER),
    ("0100007F:2328 06 4711", Listener.STRANGER),
    ("00000000:2328 0A 4711", Listener.EXPOSED),
    ("0A00000A:2328 0A 4711", Listener.EXPOSED)])
def test_lines_of_the_table(proc: Path, line: str, found: Listener) -> None:
    if sys.byteorder != "little":
        pytest.skip("the table is written in the machine's byte order")
    table(proc, line)
    assert sockets.listener(9000, [7]) is found


def test_one_open_door_is_enough(proc: Path) -> None:
    table(proc, "0100007F:2328 0A 4711")
    table(proc, "00000000000000000000000000000000:2328 0A 4712", name="tcp6")
    assert sockets.listener(9000, [7]) is Listener.OURS         # the other one is not ours
    (proc / "7" / "fd" / "5").symlink_to("socket:[4712]")
    assert sockets.listener(9000, [7]) is Listener.EXPOSED


@pytest.mark.parametrize("address, found", [
    ("00000000000000000000000001000000", Listener.OURS),        # ::1
    ("0000000000000000FFFF00000100007F", Listener.OURS),        # ::ffff:127.0.0.1
    ("0000000000000000FFFF00000A00000A", Listener.EXPOSED),
    ("000080FE000000000000000001000000", Listener.EXPOSED)])
def test_addresses_of_ipv6(proc: Path, address: str, found: Listener) -> None:
    table(proc)
    table(proc, f"{address}:2328 0A 4711", name="tcp6")
    assert sockets.listener(9000, [7]) is found


def test_what_the_kernel_hides_cannot_be_told(proc: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert sockets.listener(9000, [7]) is Listener.UNKNOWN      # no table at all
    assert sockets.has_connections(9000)
    table(proc, "0100007F:2328 0A 9999")

    def refuse(path: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "scandir", refuse)
    assert sockets.listener(9000, [7]) is Listener.UNKNOWN
