"""The floor: what Python itself costs, with no framework, no HTTP parser and no decision.

    python benchmarks/floor.py --port P                      answers each read with one write
    python benchmarks/floor.py --port P --upstream-port U    copies each read to the other side: the least a proxy does

One thread, one epoll loop.  It takes each read for a whole request, which holds for the small requests that
`benchmarks/run.py` sends it.  `benchmarks/run.py --against floor floor-relay` measures both.
"""

from __future__ import annotations

import argparse
import select
import socket

READ_SIZE = 262144
BODY = (b'{"id":"chatcmpl-0","object":"chat.completion","choices":[{"index":0,"message":{"role":"assistant",'
        b'"content":"' + b"a" * 800 + b'"},"finish_reason":"stop"}]}')
ANSWER = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (len(BODY), BODY)


def serve(listener: socket.socket, upstream_port: int | None) -> None:
    """Runs until it is killed."""
    epoll = select.epoll()
    epoll.register(listener.fileno(), select.EPOLLIN)
    sockets: dict[int, socket.socket] = {}
    peers: dict[int, socket.socket] = {}

    def add(opened: socket.socket) -> None:
        opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sockets[opened.fileno()] = opened
        epoll.register(opened.fileno(), select.EPOLLIN)

    def drop(number: int) -> None:
        peer = peers.pop(number, None)
        sockets.pop(number).close()
        if peer is not None and peer.fileno() in sockets:
            drop(peer.fileno())

    while True:
        for number, _ in epoll.poll():
            if number == listener.fileno():
                client = listener.accept()[0]
                add(client)
                if upstream_port is not None:
                    upstream = socket.create_connection(("127.0.0.1", upstream_port))
                    add(upstream)
                    peers[client.fileno()], peers[upstream.fileno()] = upstream, client
                continue
            if number not in sockets:
                continue
            try:
                data = sockets[number].recv(READ_SIZE)
                if not data:
                    drop(number)
                elif upstream_port is None:
                    sockets[number].sendall(ANSWER)
                else:
                    peers[number].sendall(data)
            except OSError:
                drop(number)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--upstream-port", type=int)
    settings = parser.parse_args()
    listener = socket.create_server(("127.0.0.1", settings.port), backlog=4096)
    serve(listener, settings.upstream_port)


if __name__ == "__main__":
    main()
