"""Who listens on a port, as the kernel shows it (/proc/net/tcp, proc_net_tcp(5)): an answer on a port that we gave to
an engine proves nothing before it is known that the engine's own processes listen there, and on loopback only.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import Enum

from instances.processes import BLIND, PROC

TABLES = ("net/tcp", "net/tcp6")
LISTEN = "0A"


class Listener(Enum):
    """Who has a port."""

    OURS = "ours"
    EXPOSED = "ours, and reachable from other machines"
    STRANGER = "another program"
    UNKNOWN = "cannot be told"      # /proc does not show it


@dataclass(frozen=True)
class _Entry:
    """One line of a table."""

    address: str    # hexadecimal, each word of four bytes in the machine's order
    state: str
    inode: str


def listener(port: int, pids: Iterable[int]) -> Listener:
    """Whether these processes, all of an engine, listen on the port.  Raises OSError when it cannot look now."""
    try:
        listening = [entry for entry in _entries(port) if entry.state == LISTEN]
    except OSError as error:
        if error.errno in BLIND:
            raise
        return Listener.UNKNOWN
    wanted = {f"socket:[{entry.inode}]" for entry in listening}
    held: set[str] = set()
    hidden = False
    for pid in pids:
        try:
            held |= wanted & set(_descriptors(pid))
        except PermissionError:
            hidden = True       # runs as another user
        except OSError as error:
            if error.errno in BLIND:
                raise
            continue            # ended meanwhile
    if not held:
        return Listener.UNKNOWN if hidden else Listener.STRANGER
    ours = [entry for entry in listening if f"socket:[{entry.inode}]" in held]
    return Listener.OURS if all(_is_loopback(entry.address) for entry in ours) else Listener.EXPOSED


def has_connections(port: int) -> bool:
    """Whether connections to that port are left over (in TIME_WAIT, say), with nothing listening."""
    try:
        states = [entry.state for entry in _entries(port)]
    except OSError:
        return True
    return bool(states) and LISTEN not in states


def _entries(port: int) -> Iterator[_Entry]:
    """The sockets with this local port.  Raises OSError when the kernel shows none at all."""
    for number, table in enumerate(TABLES):
        try:
            lines = (PROC / table).read_text().splitlines()[1:]
        except OSError:
            if number == 0:
                raise
            continue            # no IPv6
        for line in lines:
            fields = line.split()
            address, _, hexadecimal = fields[1].rpartition(":")
            if int(hexadecimal, 16) == port:
                yield _Entry(address, fields[3], fields[9])


def _descriptors(pid: int) -> Iterator[str]:
    """What the process has open."""
    folder = PROC / str(pid) / "fd"
    for entry in os.scandir(folder):
        try:
            yield os.readlink(entry.path)  # noqa: PTH115  (a Path would cut nothing and cost more)
        except PermissionError:
            raise
        except OSError:
            continue


def _is_loopback(address: str) -> bool:
    """127.0.0.0/8, ::1, and the former mapped into IPv6."""
    raw = b"".join(int(address[at:at + 8], 16).to_bytes(4, sys.byteorder) for at in range(0, len(address), 8))
    if len(raw) == 4:
        return raw[0] == 127
    return raw == b"\0" * 15 + b"\1" or (raw[:12] == b"\0" * 10 + b"\xff\xff" and raw[12] == 127)

