"""Upgraded connections (WebSocket): the handshake goes to the engine, and a relay copies both directions from then on.

The daemon reads nothing of what passes, the engine's answer to the handshake included: a refusal reaches the client
as the engine wrote it.
"""

from __future__ import annotations

import socket
from collections.abc import Iterable

import orjson

from errors import ManagerError
from instances.instance import Lease
from routing.framing import TUNNEL
from routing.relay_process import Relays, RelayUnavailable
from routing.relay_wire import Ended
from routing.upstream import CONNECT_TIMEOUT_S, ConnectionRefused, request_headers


class NoRelay(ManagerError):
    code = "no_relay"


def wants_upgrade(connection: str, upgrade: str) -> bool:
    """Whether these header values ask for another protocol on this connection (RFC 9110, 7.8)."""
    return bool(upgrade) and "upgrade" in (token.strip().lower() for token in connection.split(","))


def handshake(target: str, port: int, headers: Iterable[tuple[str, str]], upgrade: str) -> bytes:
    """The request as the engine gets it: the client's headers without keys and hop-by-hop ones, and the upgrade."""
    lines = [f"GET {target} HTTP/1.1", f"Host: 127.0.0.1:{port}", "Connection: Upgrade", f"Upgrade: {upgrade}",
             *(f"{name}: {value}" for name, value in request_headers(headers, None).items())]
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


def open_tunnel(relays: Relays | None, client: socket.socket, lease: Lease, request: bytes) -> None:
    """Connect to the engine and give both sockets to a relay, which releases the lease at the end.

    Raises ConnectionRefused or NoRelay; the lease is still the caller's then.
    """
    if relays is None:
        raise NoRelay("WebSockets need a relay process: set RELAYS to 1 or more")
    try:
        upstream = socket.create_connection(("127.0.0.1", lease.port), CONNECT_TIMEOUT_S)
    except OSError as error:
        raise ConnectionRefused("the engine takes no connections") from error

    def ended(end: Ended) -> None:
        lease.release(ok=end.complete)

    try:
        tunnel = relays.hand_over(client, upstream, to_client=b"", framing=TUNNEL, to_upstream=request, on_end=ended)
    except RelayUnavailable as error:
        upstream.close()
        raise NoRelay("no relay process is up to carry a WebSocket; try again", retry_after_s=1) from error
    lease.on_cut(lambda: relays.cut(tunnel, orjson.dumps(lease.cut_error.envelope()) if lease.cut_error else b""))
