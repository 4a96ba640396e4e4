"""The benchmark's own programs: what they count must be right, or every figure made with them is wrong."""

from __future__ import annotations

import http.client
import importlib
import json
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from support import wait_until

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
OWN_MODULES = ("processes", "servers", "scenarios", "targets", "report", "document")
EVENT = b"data: {\"choices\": []}\n\n"

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("build")
    for name in ("load", "upstream"):
        subprocess.run(["cc", "-std=gnu11", "-O1", "-Wall", "-Wextra", "-Werror", "-o", str(folder / name),
                        str(BENCHMARKS / f"{name}.c")], check=True)
    return folder


@pytest.fixture
def upstream_port(programs: Path) -> Iterator[int]:
    """A null upstream, started with the command line of an engine."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = int(taken.getsockname()[1])
    argv = [str(programs / "upstream"), "--interval-us", "1000", "serve", "tiny", "--host", "127.0.0.1",
            "--port", str(port), "--dtype", "auto", "--no-enable-log-requests"]
    process = subprocess.Popen(argv, stdout=subprocess.DEVNULL)
    try:
        wait_until(lambda: process.poll() is not None or _connects(port))
        yield port
    finally:
        process.kill()
        process.wait()


def _connects(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture
def scripted() -> Iterator[Callable[[Callable[[socket.socket], None]], int]]:
    """start(answer) -> port of a server that reads one request a connection and lets `answer` write and close."""
    listeners: list[socket.socket] = []
    threads: list[threading.Thread] = []

    def serve(listener: socket.socket, answer: Callable[[socket.socket], None]) -> None:
        while True:
            try:
                client = listener.accept()[0]
            except OSError:
                return
            with client:
                client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                try:
                    client.recv(65536)
                    answer(client)
                except OSError:
                    continue

    def start(answer: Callable[[socket.socket], None]) -> int:
        listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        listeners.append(listener)
        threads.append(threading.Thread(target=serve, args=(listener, answer)))
        threads[-1].start()
        return int(listener.getsockname()[1])

    yield start
    for listener in listeners:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
    for thread in threads:
        thread.join(60)


def run_load(programs: Path, port: int, *options: str) -> dict[str, Any]:
    done = subprocess.run([str(programs / "load"), "--port", str(port), *options], check=True, capture_output=True,
                          text=True, timeout=120)
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def chunked(body: bytes, size: int) -> bytes:
    parts = [body[at:at + size] for at in range(0, len(body), size)]
    return b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"


STREAM_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n"


@pytest.mark.parametrize("chunk_size", [1, 2, 3, 7, len(EVENT), len(EVENT) + 1, 1000])
@pytest.mark.parametrize("newline", [b"\n", b"\r\n"])
def test_load_counts_events_across_chunks_and_reads(programs: Path, scripted: Any, chunk_size: int,
                                                     newline: bytes) -> None:
    body = (EVENT * 9 + b": a comment\ndata: [DONE]\n\n").replace(b"\n", newline)
    answer = STREAM_HEAD + b"transfer-encoding: chunked\r\n\r\n" + chunked(body, chunk_size)

    def dribble(client: socket.socket) -> None:
        for at in range(len(answer)):
            client.sendall(answer[at:at + 1])

    report = run_load(programs, scripted(dribble), "--stream", "--arrivals-per-s", "100", "--seconds", "0.05",
                      "--connections", "20", "--warmup-s", "0")
    assert report["total_requests"] == 5
    assert report["total_events"] == 5 * 10
    assert report["errors"] == 0


@pytest.mark.parametrize("answer, kind", [
    (STREAM_HEAD + b"transfer-encoding: chunked\r\n\r\n5\r\nda", "cut"),
    (STREAM_HEAD + b"transfer-encoding: chunked\r\n\r\n" + chunked(EVENT, 5)[:-2], "cut"),
    (STREAM_HEAD + b"content-length: 10\r\n\r\n123456789", "cut"),
    (STREAM_HEAD[:-5], "cut"),
    (b"HTTP/1.1 503 Busy\r\ncontent-length: 2\r\n\r\n{}", "status"),
    (STREAM_HEAD + b"transfer-encoding: chunked\r\n\r\nxyz\r\n", "framing"),
    (STREAM_HEAD + b"content-length: 3\r\n\r\n1234", "framing"),
    (b"SSH-2.0-OpenSSH\r\n\r\n", "framing"),
])
def test_load_names_what_went_wrong(programs: Path, scripted: Any, answer: bytes, kind: str) -> None:
    report = run_load(programs, scripted(lambda client: client.sendall(answer)), "--stream", "--arrivals-per-s", "100",
                      "--seconds", "0.05", "--connections", "20")
    assert report["error_kinds"][kind] == report["errors"] == 5
    assert report["total_requests"] == 0


def test_load_takes_a_body_that_ends_with_the_connection(programs: Path, scripted: Any) -> None:
    port = scripted(lambda client: client.sendall(STREAM_HEAD + b"\r\n" + EVENT * 3))
    report = run_load(programs, port, "--stream", "--arrivals-per-s", "100", "--seconds", "0.05", "--connections", "9")
    assert (report["total_requests"], report["total_events"], report["errors"]) == (5, 15, 0)


def test_load_reports_a_port_where_nobody_listens(programs: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = int(taken.getsockname()[1])
    report = run_load(programs, port, "--seconds", "10", "--max-errors", "3")
    assert report["gave_up"] and report["error_kinds"]["refused"] == report["errors"] >= 3


def test_streams_of_load_and_upstream_agree(programs: Path, upstream_port: int) -> None:
    report = run_load(programs, upstream_port, "--stream", "--tokens", "40", "--arrivals-per-s", "500",
                      "--seconds", "0.2", "--connections", "100")
    assert report["total_requests"] == 100
    assert report["total_events"] == 100 * 41               # the last is [DONE]
    assert report["errors"] == 0


def test_idle_connections_are_held_and_used_again(programs: Path, upstream_port: int) -> None:
    report = run_load(programs, upstream_port, "--idle", "--path", "/health", "--connections", "200",
                      "--seconds", "0.1", "--sample", "50")
    assert (report["held"], report["idle_closed"], report["sampled"], report["errors"]) == (200, 0, 50, 0)
    assert report["total_requests"] == 250


def test_idle_connections_that_the_server_closes_are_counted(programs: Path, scripted: Any) -> None:
    port = scripted(lambda client: client.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}"))
    report = run_load(programs, port, "--idle", "--path", "/", "--connections", "10", "--seconds", "0.1")
    assert (report["held"], report["idle_closed"], report["sampled"]) == (0, 10, 0)


def test_upstream_answers_as_an_engine(upstream_port: int) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", upstream_port, timeout=60)
    connection.request("GET", "/v1/models")
    assert json.loads(connection.getresponse().read())["data"][0]["id"] == "tiny"
    connection.request("POST", "/v1/chat/completions", b"x" * 4_000_000)
    answer = connection.getresponse().read()
    assert 900 < len(answer) < 1300 and json.loads(answer)["object"] == "chat.completion"
    body = json.dumps({"messages": "y" * 9000, "stream": True, "max_tokens": 3})     # the fields after the front
    connection.request("POST", "/v1/chat/completions", body)
    assert connection.getresponse().read().count(b"data: {") == 3
    connection.request("GET", "/metrics", headers={"Connection": "close"})
    reply = connection.getresponse()
    assert b'num_requests_running{engine="0",model_name="tiny"} 0' in reply.read()
    assert reply.getheader("connection") == "close"
    connection.close()


def test_upstream_ends_the_stream_of_a_client_that_left(upstream_port: int) -> None:
    def running() -> int:
        connection = http.client.HTTPConnection("127.0.0.1", upstream_port, timeout=60)
        connection.request("GET", "/metrics")
        lines = connection.getresponse().read().decode().splitlines()
        connection.close()
        return int(next(line for line in lines if line.startswith("vllm:num_requests_running")).split()[-1])

    client = socket.create_connection(("127.0.0.1", upstream_port))
    body = b'{"stream":true,"max_tokens":1000000}'
    client.sendall(b"POST / HTTP/1.1\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body))
    wait_until(lambda: running() == 1)
    client.close()
    wait_until(lambda: running() == 0)


@pytest.fixture
def targets(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield importlib.import_module("targets")
    for name in OWN_MODULES:
        sys.modules.pop(name, None)


def test_targets_are_judged_by_ratio_difference_and_limit(targets: ModuleType) -> None:
    ours = {"events_per_s": 48_000.0, "gap_p99_ms": 80.0, "cpu_us_per_event": 15.0, "pss_mb": 120.0}
    medians = {("streams_ramped", "this daemon"): ours,
               ("streams_ramped", "nginx"): {"events_per_s": 48_000.0, "gap_p99_ms": 41.0},
               ("streams_ramped", "vllm-router"): {"gap_p99_ms": 70.0},
               ("ttfb_arrivals", "this daemon"): {"first_p50_ms": 1.5, "first_p99_ms": 9.0},
               ("ttfb_arrivals", "direct"): {"first_p50_ms": 0.6, "first_p99_ms": 2.0}}
    verdicts = targets.judge(medians, {("streams_at_once", "this daemon"): 1.0})
    reached = {verdict.name: verdict.reached for verdict in verdicts}
    assert reached["1,000 streams over 5 s: events/s against nginx"] is True
    assert reached["1,000 streams over 5 s: p99 gap against nginx"] is True
    assert reached["1,000 streams over 5 s: p99 gap against vllm-router"] is False
    assert reached["time to first byte over direct, p50"] is True
    assert reached["time to first byte over direct, p99"] is False
    assert reached["CPU per event"] is False                                # under 15, not 15
    assert reached["memory with 1,000 streams open (PSS)"] is True
    assert reached["1,000 streams at once: errors"] is False
    assert reached["JSON of 1 kB, 32 connections: requests/s against litellm"] is None


def test_every_target_names_who_must_be_measured(targets: ModuleType) -> None:
    """Else a run that measures only those would leave one open."""
    figures = dict.fromkeys(("events_per_s", "requests_per_s", "sent_mb_per_s", "gap_p99_ms", "first_p50_ms",
                             "first_p99_ms", "pss_mb", "cpu_us_per_event", "held"), 1.0)
    medians = {(scenario, server): figures for scenario, servers in targets.needed().items() for server in servers}
    verdicts = targets.judge(medians, dict.fromkeys(medians, 0.0))
    assert [verdict.name for verdict in verdicts if verdict.measured == "not measured"] == []


def test_a_run_is_put_into_its_document(targets: ModuleType) -> None:
    document, report = importlib.import_module("document"), importlib.import_module("report")
    run = report.Run(False, 2, {"this daemon": "v1", "nginx": "1.22"}, {"caddy": "not installed\nat all"},
                     notes=["slow"])
    run.samples = {("body_4mb", name): [{"sent_mb_per_s": rate, "errors": 0.0} for rate in rates]
                   for name, rates in (("this daemon", (300.0, 500.0)), ("nginx", (1000.0,)))}
    found = json.loads(json.dumps(report.as_json(run)))
    tables = document.as_markdown(found)
    assert "| this daemon | 400 |" in tables and "| 0.4 x |" in tables and "- caddy: not installed\n" in tables
    assert "bytes/s against nginx | at least 0.5 x nginx | 0.4 x (400 to 1,000) | **not reached** |" in tables
    text = f"# P\n\n{document.BEGIN}\nold\n{document.END}\nrest\n"
    written = document.with_tables(text, tables)
    assert tables in written and "old" not in written and written.endswith("rest\n")
    assert document.with_tables(written, tables) == written
    with pytest.raises(ValueError):
        document.with_tables("no marks", tables)
    with pytest.raises(ValueError):
        document.as_markdown(found | {"quick": True})
    assert document.with_tables(document.DOCUMENT.read_text(), tables)
