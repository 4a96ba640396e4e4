"""deploy/nginx.conf in Debian's nginx before a daemon: TLS, streams as they come, WebSockets, and who is local."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import socket
import ssl
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import requests

from tests.daemon import CHECKOUT, HANG_S, Daemon
from tests.support import claim_ports, wait_until

NGINX = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
pytestmark = pytest.mark.skipif(NGINX is None, reason="nginx is not installed (apt install nginx-light)")
ADMIN = {"Authorization": "Bearer open-sesame"}


@dataclass(frozen=True)
class Front:
    port: int
    certificate: Path

    def url(self, path: str) -> str:
        return f"https://localhost:{self.port}{path}"

    def request(self, method: str, path: str, **more: Any) -> requests.Response:
        return requests.request(method, self.url(path), verify=str(self.certificate), timeout=HANG_S, **more)


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    with Daemon(tmp_path_factory.mktemp("daemon"), {"ADMIN_API_KEYS": "open-sesame",
                                                    "VLLM_SERVER_DEV_MODE": "1"}) as daemon:
        yield daemon
        for one in daemon.get("/instances", ADMIN).json["data"]:
            daemon.delete(f"/instances/{one['id']}?force=1&wait=1", ADMIN)


@pytest.fixture(scope="module")
def front(daemon: Daemon, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Front]:
    folder = tmp_path_factory.mktemp("nginx")
    certificate, key = folder / "cert.pem", folder / "key.pem"
    subprocess.run(["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
                    "-days", "2", "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost",
                    "-keyout", key, "-out", certificate], check=True, capture_output=True)
    claim, port = claim_ports()
    example = (CHECKOUT / "deploy" / "nginx.conf").read_text()
    for printed, here in (("127.0.0.1:5000", f"127.0.0.1:{daemon.port}"), ("llm.example.com;", "localhost;"),
                          ("/etc/ssl/certs/llm.example.com.pem", str(certificate)),
                          ("/etc/ssl/private/llm.example.com.key", str(key)),
                          ("listen 443 ssl", f"listen 127.0.0.1:{port} ssl"),
                          ("    listen [::]:443 ssl http2;\n", ""),
                          ("listen 80;", f"listen 127.0.0.1:{port + 1};"), ("    listen [::]:80;\n", "")):
        assert printed in example, printed      # else this test runs another file than the one that is shipped
        example = example.replace(printed, here)
    (folder / "site.conf").write_text(example)
    temporary = "".join(f"{name}_temp_path {folder}/{name};" for name in
                        ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
    (folder / "nginx.conf").write_text(
        f"daemon off; worker_processes 1; pid {folder}/pid; error_log {folder}/error.log;\n"
        f"events {{ worker_connections 256; }}\nhttp {{ access_log off; {temporary} include {folder}/site.conf; }}\n")
    argv = [str(NGINX), "-p", str(folder), "-e", str(folder / "error.log"), "-c", str(folder / "nginx.conf")]
    tested = subprocess.run([*argv, "-t"], text=True, capture_output=True)
    assert tested.returncode == 0 and "warn" not in tested.stderr, tested.stderr
    with subprocess.Popen(argv) as process:
        try:
            wait_until(lambda: connects(port))
            yield Front(port, certificate)
        finally:
            process.terminate()
    claim.close()


def connects(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), HANG_S):
        return True
    return False


@pytest.fixture(scope="module")
def instance(front: Front) -> dict[str, Any]:
    return create(front)


def create(front: Front, **sim: float) -> dict[str, Any]:
    body = {"model_name": "m", "wait": True, "timeout": 0, "replace": True, "params": {"additional_config": {
        "sim": sim}}}
    answer = front.request("POST", "/instances", json=body, headers=ADMIN)
    assert answer.status_code == 201, answer.text
    made: dict[str, Any] = answer.json()
    return made


def test_tls_is_the_only_way_in(front: Front, instance: dict[str, Any]) -> None:
    answer = front.request("POST", "/v1/completions", json={"model": "m", "prompt": "x", "max_tokens": 2})
    assert answer.status_code == 200 and answer.json()["choices"]
    plain = requests.get(f"http://localhost:{front.port + 1}/v1/models", allow_redirects=False, timeout=HANG_S)
    assert (plain.status_code, plain.headers["Location"]) == (301, "https://localhost/v1/models")
    with pytest.raises(requests.exceptions.SSLError):
        requests.get(front.url("/health"), timeout=HANG_S)      # a client that does not know the certificate


def test_a_large_body_goes_through(front: Front, instance: dict[str, Any]) -> None:
    answer = front.request("POST", "/v1/completions", json={"model": "m", "prompt": "x " * 2_000_000, "max_tokens": 1})
    assert answer.status_code != 413, answer.text[:200]


def test_websockets_pass(front: Front, instance: dict[str, Any]) -> None:
    context = ssl.create_default_context(cafile=str(front.certificate))
    context.set_alpn_protocols(["http/1.1"])
    with socket.create_connection(("127.0.0.1", front.port), HANG_S) as plain, \
            context.wrap_socket(plain, server_hostname="localhost") as client:
        client.sendall(b"GET /v1/realtime?model=m HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\n"
                       b"Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
                       b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n")
        assert client.recv(4096).startswith(b"HTTP/1.1 101 ")


def test_what_it_forwards_is_not_local(front: Front, daemon: Daemon) -> None:
    assert front.request("GET", "/instances").status_code == 401
    assert front.request("GET", "/instances", headers=ADMIN).status_code == 200


def test_metrics_are_for_this_machine(front: Front) -> None:
    assert "vllm_server_" in front.request("GET", "/metrics").text
    assert re.search(r"location = /metrics \{\s+allow 127.0.0.1;\s+allow ::1;\s+deny all;",
                     (CHECKOUT / "deploy" / "nginx.conf").read_text())


def test_an_event_arrives_long_before_the_next_one_is_there(front: Front, daemon: Daemon) -> None:
    instance = create(front, tokens_per_s=0.001)
    body = {"model": "m", "prompt": "x", "max_tokens": 100, "stream": True}
    with front.request("POST", "/v1/completions", json=body, stream=True) as stream:
        assert stream.headers["Content-Type"].startswith("text/event-stream")
        lines = stream.iter_lines()
        event = next(line for line in lines if line)        # the next one is due in a quarter of an hour
        assert json.loads(event.removeprefix(b"data: "))["choices"][0]["text"]
        assert daemon.gauge(instance) == 1
    wait_until(lambda: daemon.gauge(instance) == 0)     # a client that leaves ends it, through nginx too
