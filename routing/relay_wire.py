"""What a relay is given and what it reports, as values and as the messages that carry them between processes.

The control socket is a SOCK_SEQPACKET pair: a message arrives whole, or not at all.  Towards the relay: a hand-over,
in pieces of at most 64 KiB where the bytes to write first are many (the two descriptors travel with the last), or a
cut.  Back: `READY` once, then ends, several in one message.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from routing.framing import Framing

# who ended an exchange
UPSTREAM = "upstream"  # the body was delivered completely; of a tunnel: the upstream closed first
UPSTREAM_CUT = "upstream_cut"  # it died before its framing's end
CLIENT = "client"  # it left; of a tunnel: it closed first
CUT = "cut"  # we were told to
TIMEOUT = "timeout"  # nothing moved for the idle timeout
RELAY_DIED = "relay_died"


@dataclass(frozen=True)
class Handover:
    """All that finishes one exchange whose request was sent and whose response head was read."""

    id: int
    to_client: bytes  # written to the client first: the head, and what was read of the body
    framing: Framing  # of the whole body
    body_at: int = 0  # where in `to_client` the body begins: the length of the head
    to_upstream: bytes = b""  # tunnel only: what the client has sent already
    idle_timeout_s: float | None = None  # nothing moved in either direction for so long: ended
    sse: bool = False  # a stream of server-sent events: a cut between two chunks is told as an event
    cut_message: bytes = b""  # the JSON of that event, on one line
    started_at: float | None = None  # time.monotonic() that the figures of `Ended` count from; None: its arrival
    sent: int = 0  # bytes of `to_client` that the client has got already


@dataclass(frozen=True)
class Ended:
    """How an exchange ended.  Bytes count what was given to the sockets, from `Handover.to_client` on."""

    id: int
    bytes_to_client: int
    bytes_to_upstream: int
    first_byte_s: float | None  # until the client was sent the first byte of the body
    duration_s: float
    by: str
    complete: bool


READY = b"R"
PIECE_BYTES = 64 * 1024
MESSAGE_BYTES = PIECE_BYTES + 64  # what a receiver must have room for
ENDS_A_MESSAGE = 512

_PIECE, _HANDOVER, _CUT = 1, 2, 3
_HEAD = struct.Struct("<BQ")
_FIELDS = struct.Struct("<BQddIIIIB")
_ENDED = struct.Struct("<QQQddBB")
_KINDS = ("chunked", "length", "eof", "tunnel")
_ENDERS = (UPSTREAM, UPSTREAM_CUT, CLIENT, CUT, TIMEOUT, RELAY_DIED)
_NONE = -1.0  # times are never negative


def handover_messages(handover: Handover) -> list[bytes]:
    """To be sent in order; the last one with the descriptors of client and upstream."""
    framing = handover.framing
    fields = _FIELDS.pack(
        _KINDS.index(framing.kind), framing.length,
        _NONE if handover.idle_timeout_s is None else handover.idle_timeout_s,
        _NONE if handover.started_at is None else handover.started_at,
        handover.body_at, handover.sent, len(handover.to_client), len(handover.to_upstream), handover.sse,
    )
    data = b"".join((fields, handover.to_client, handover.to_upstream, handover.cut_message))
    if len(data) <= PIECE_BYTES:
        return [_HEAD.pack(_HANDOVER, handover.id) + data]
    pieces = [data[at : at + PIECE_BYTES] for at in range(0, len(data), PIECE_BYTES)]
    messages = [_HEAD.pack(_PIECE, handover.id) + piece for piece in pieces]
    messages[-1] = _HEAD.pack(_HANDOVER, handover.id) + pieces[-1]
    return messages


def cut_message(exchange_id: int, reason: bytes) -> bytes:
    return _HEAD.pack(_CUT, exchange_id) + reason[:PIECE_BYTES]


class Inbox:
    """The relay's side: puts pieces together.  One sender holds a lock for all pieces of a hand-over, so pieces of
    another one are those of a sender that failed half-way, and are dropped."""

    def __init__(self) -> None:
        self._of = -1
        self._pieces: list[bytes] = []

    def take(self, message: bytes) -> Handover | tuple[int, bytes] | None:
        """A hand-over whose descriptors came with this message, a cut (id, reason), or nothing yet."""
        kind, exchange_id = _HEAD.unpack_from(message)
        data = message[_HEAD.size :]
        if kind == _CUT:
            return exchange_id, data
        if self._of != exchange_id:
            self._of, self._pieces = exchange_id, []
        self._pieces.append(data)
        if kind == _PIECE:
            return None
        data, self._pieces = b"".join(self._pieces), []
        return _unpack_handover(exchange_id, data)


def _unpack_handover(exchange_id: int, data: bytes) -> Handover:
    kind, length, idle_s, started_at, body_at, sent, client_bytes, upstream_bytes, sse = _FIELDS.unpack_from(data)
    client_end = _FIELDS.size + client_bytes
    upstream_end = client_end + upstream_bytes
    return Handover(
        id=exchange_id, to_client=data[_FIELDS.size : client_end], framing=Framing(_KINDS[kind], length),
        body_at=body_at, to_upstream=data[client_end:upstream_end],
        idle_timeout_s=None if idle_s < 0 else idle_s, sse=bool(sse), cut_message=data[upstream_end:],
        started_at=None if started_at < 0 else started_at, sent=sent,
    )


def ended_message(ends: list[Ended]) -> bytes:
    """At most `ENDS_A_MESSAGE` of them."""
    return b"".join(
        _ENDED.pack(
            end.id, end.bytes_to_client, end.bytes_to_upstream, _NONE if end.first_byte_s is None else end.first_byte_s,
            end.duration_s, _ENDERS.index(end.by), end.complete,
        )
        for end in ends
    )


def unpack_ended(message: bytes) -> Iterator[Ended]:
    for exchange_id, to_client, to_upstream, first_byte_s, duration_s, by, complete in _ENDED.iter_unpack(message):
        yield Ended(exchange_id, to_client, to_upstream, None if first_byte_s < 0 else first_byte_s, duration_s,
                    _ENDERS[by], bool(complete))
