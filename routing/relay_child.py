"""The relay process: a relay loop, fed through its control socket.

Run by path with `python -I -S relay_child.py FD`, so that nothing but the loop is loaded.  FD is its end of a
SOCK_SEQPACKET pair (relay_wire.py); the end of that connection ends the process, and nothing else does: whoever
starts it blocks the signals of a terminal's group (relay_process.py).
"""

from __future__ import annotations

import contextlib
import os
import resource
import select
import socket
import sys

if __name__ == "__main__":
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # noqa: PTH100, PTH120

from routing.relay_loop import RelayLoop
from routing.relay_wire import (
    ENDS_A_MESSAGE,
    MESSAGE_BYTES,
    READY,
    Ended,
    Handover,
    Inbox,
    ended_message,
)

MESSAGES_A_TURN = 32
LAST_REPORTS_S = 1


class RelayChild:
    """Between the control socket and the loop; everything happens in the loop's thread."""

    def __init__(self, control: socket.socket) -> None:
        self._control = control
        self._control.setblocking(False)
        self._inbox = Inbox()
        self._unreported: list[Ended] = []
        self._loop = RelayLoop(self._on_end)
        self._loop.watch(control.fileno(), select.EPOLLIN, self._on_control)

    def run(self) -> None:
        self._control.send(READY)
        self._loop.run()
        # what was open has been cut, and is reported if anybody is there still
        self._control.settimeout(LAST_REPORTS_S)
        with contextlib.suppress(OSError):
            while self._unreported:
                self._report()
        self._control.close()

    def _on_end(self, end: Ended) -> None:
        self._unreported.append(end)
        if self._loop.watched(self._control.fileno()):  # sent in the next turn, with all others of this one
            self._loop.change(self._control.fileno(), select.EPOLLIN | select.EPOLLOUT)

    def _on_control(self, mask: int) -> None:
        try:
            if mask & select.EPOLLOUT:
                self._report()
                if not self._unreported:
                    self._loop.change(self._control.fileno(), select.EPOLLIN)
            if mask & ~select.EPOLLOUT:
                for _ in range(MESSAGES_A_TURN):
                    self._receive()
        except BlockingIOError:
            pass
        except (OSError, EOFError):
            self._loop.forget(self._control.fileno())
            self._loop.stop()

    def _report(self) -> None:
        self._control.send(ended_message(self._unreported[:ENDS_A_MESSAGE]))
        del self._unreported[:ENDS_A_MESSAGE]

    def _receive(self) -> None:
        message, fds, _flags, _address = socket.recv_fds(self._control, MESSAGE_BYTES, 2)
        if not message:
            raise EOFError
        what = self._inbox.take(message)
        if isinstance(what, Handover):
            sockets = [socket.socket(fileno=fd) for fd in fds]
            if len(sockets) == 2:
                self._loop.add(sockets[0], sockets[1], what)
            else:  # out of descriptors: the kernel has closed what found no room, the rest goes with `sockets`
                for sock in sockets:
                    sock.close()
                self._on_end(Ended(what.id, 0, 0, None, 0.0, "cut", complete=False))
        elif what is not None:
            self._loop.cut(*what)


def main() -> None:
    control_fd = int(sys.argv[1])
    os.closerange(control_fd + 1, 1 << 16)  # a listening socket that was inheritable must not live on in here
    _soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    RelayChild(socket.socket(fileno=control_fd)).run()


if __name__ == "__main__":
    main()
