"""Upgraded connections (WebSocket): the handshake goes to the engine, and a relay copies both directions from then on.

The daemon reads nothing of what passes, the engine's answer to the handshake included: a refusal reaches the client
as the engine wrote it.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping

import orjson

from errors import ManagerError
from instances.instance import Lease
from routing import tls_bridge
from routing.framing import TUNNEL
from routing.relay_process import Relays, RelayUnavailable
from routing.relay_wire import Ended
from routing.remote import Origin
from routing.upstream import CONNECT_TIMEOUT_S, ConnectionRefused


class NoRelay(ManagerError):
    code = "no_relay"


def wants_upgrade(connection: str, upgrade: str) -> bool:
    """Whether these header values ask for another protocol on this connection (RFC 9110, 7.8)."""
    return bool(upgrade) and "upgrade" in (token.strip().lower() for token in connection.split(","))


def handshake(target: str, origin: Origin, headers: Mapping[str, str], upgrade: str) -> bytes:
    """The request as the backend gets it: with these headers, which hold no keys and no hop-by-hop ones."""
    path = origin.base.partition("://")[2].partition("/")
    lines = [f"GET {path[1]}{path[2]}{target} HTTP/1.1", f"Host: {path[0]}", "Connection: Upgrade",
             f"Upgrade: {upgrade}", *(f"{name}: {value}" for name, value in headers.items())]
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


def _connect(origin: Origin) -> socket.socket:
    """Raises ConnectionRefused."""
    if origin.tls is not None:
        return tls_bridge.plain_end(origin)
    try:
        return socket.create_connection((origin.host, origin.port), CONNECT_TIMEOUT_S)
    except OSError as error:
        raise ConnectionRefused("the engine takes no connections") from error


def open_tunnel(relays: Relays | None, client: socket.socket, lease: Lease, origin: Origin, request: bytes) -> None:
    """Connect to the backend and give both sockets to a relay, which releases the lease at the end.

    Raises ConnectionRefused or NoRelay; the lease is still the caller's then.
    """
    if relays is None:
        raise NoRelay("WebSockets need a relay process: set RELAYS to 1 or more")
    upstream = _connect(origin)
    if not lease.runs():        # a stranger may have its port
        upstream.close()
        raise ConnectionRefused("the engine takes no connections")

    def ended(end: Ended) -> None:
        lease.release(ok=end.complete)

    try:
        tunnel = relays.hand_over(client, upstream, to_client=b"", framing=TUNNEL, to_upstream=request, on_end=ended)
    except RelayUnavailable as error:
        upstream.close()
        raise NoRelay("no relay process is up to carry a WebSocket; try again", retry_after_s=1) from error
    lease.on_cut(lambda: relays.cut(tunnel, orjson.dumps(lease.cut_error.envelope()) if lease.cut_error else b""))
