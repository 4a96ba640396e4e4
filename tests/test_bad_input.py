"""Bad input: each gets a 4xx in the envelope that names the field where there is one, and changes nothing."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass

import psutil
import pytest

from tests.daemon import JSON, Answer, Daemon
from tests.support import wait_until

LIMIT_BYTES = 2_000_000     # MAX_REQUEST_BYTES of the daemon here


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """With one instance that must stay as it is."""
    with Daemon(tmp_path_factory.mktemp("daemon"), {"MAX_REQUEST_BYTES": str(LIMIT_BYTES)}) as daemon:
        daemon.create("m", timeout=0)
        yield daemon


@pytest.fixture(autouse=True)
def unchanged(daemon: Daemon) -> Iterator[None]:
    before = daemon.instances()
    yield
    assert [stable(one) for one in daemon.instances()] == [stable(one) for one in before]


def stable(instance: dict[str, object]) -> dict[str, object]:
    return {name: value for name, value in instance.items() if name not in ("last_used", "elapsed", "memory", "load")}


@dataclass(frozen=True)
class Bad:
    """A JSON body, and the answer it gets."""

    body: object
    status: int
    code: str
    param: str | None = None


CREATE = {
    "no model": Bad({}, 400, "missing_field", "model_name"),
    "null model": Bad({"model_name": None}, 400, "missing_field", "model_name"),
    "empty model": Bad({"model_name": ""}, 400, "bad_request", "model_name"),
    "long model": Bad({"model_name": "m" * 10_000}, 400, "bad_request", "model_name"),
    "number as model": Bad({"model_name": 7}, 400, "bad_request", "model_name"),
    "list as model": Bad({"model_name": ["m"]}, 400, "bad_request", "model_name"),
    "flag as model": Bad({"model_name": "--host=0.0.0.0"}, 400, "bad_request", "model_name"),
    "NUL in model": Bad({"model_name": "a\0b"}, 400, "bad_request", "model_name"),
    "newline in model": Bad({"model_name": "a\nb"}, 400, "bad_request", "model_name"),
    "escape in model": Bad({"model_name": "\x1b[31m"}, 400, "bad_request", "model_name"),
    "blank model": Bad({"model_name": "  "}, 400, "bad_request", "model_name"),
    "params as list": Bad({"model_name": "x", "params": []}, 400, "bad_request", "params"),
    "params as text": Bad({"model_name": "x", "params": "--dtype auto"}, 400, "bad_request", "params"),
    "params as number": Bad({"model_name": "x", "params": 5}, 400, "bad_request", "params"),
    "host in params": Bad({"model_name": "x", "params": {"host": "::"}}, 400, "bad_request", "params.host"),
    "port in params": Bad({"model_name": "x", "params": {"port": 1}}, 400, "bad_request", "params.port"),
    "short for port": Bad({"model_name": "x", "params": {"por": 1}}, 400, "bad_request", "params.por"),
    "no- in params": Bad({"model_name": "x", "params": {"no-model": True}}, 400, "bad_request", "params.no-model"),
    "dashes in params": Bad({"model_name": "x", "params": {"--seed": 1}}, 400, "bad_request", "params.--seed"),
    "space in params": Bad({"model_name": "x", "params": {"a b": 1}}, 400, "bad_request", "params.a b"),
    "NUL in params": Bad({"model_name": "x", "params": {"dtype": "a\0"}}, 400, "bad_request", "params.dtype"),
    "flag twice": Bad({"model_name": "x", "params": {"tp": 1, "tensor-parallel-size": 2}}, 400, "bad_request",
                      "params.tensor-parallel-size"),
    "empty list": Bad({"model_name": "x", "params": {"lora_modules": []}}, 400, "bad_request", "params.lora_modules"),
    "flag in list": Bad({"model_name": "x", "params": {"lora_modules": ["--port"]}}, 400, "bad_request",
                        "params.lora_modules"),
    "negative timeout": Bad({"model_name": "x", "timeout": -1}, 400, "bad_request", "timeout"),
    "text as timeout": Bad({"model_name": "x", "timeout": "60"}, 400, "bad_request", "timeout"),
    "true as timeout": Bad({"model_name": "x", "timeout": True}, 400, "bad_request", "timeout"),
    "huge timeout": Bad({"model_name": "x", "timeout": 1e300}, 400, "bad_request", "timeout"),
    "endless timeout": Bad(b'{"model_name": "x", "timeout": 1e400}', 400, "invalid_json"),
    "long timeout": Bad(b'{"model_name": "x", "timeout": 1%s}' % (b"0" * 9999), 400, "invalid_json"),
    "NaN timeout": Bad(b'{"model_name": "x", "timeout": NaN}', 400, "invalid_json"),
    "infinite timeout": Bad(b'{"model_name": "x", "timeout": -Infinity}', 400, "invalid_json"),
    "zero start_timeout": Bad({"model_name": "x", "start_timeout": 0}, 400, "bad_request", "start_timeout"),
    "text as wait": Bad({"model_name": "x", "wait": "yes"}, 400, "bad_request", "wait"),
    "number as replace": Bad({"model_name": "m", "replace": 1}, 400, "bad_request", "replace"),
    "replace and new": Bad({"model_name": "m", "replace": True, "new": True}, 400, "bad_request", "new"),
    "unknown key": Bad({"model_name": "x", "Timeout": 5}, 400, "unknown_field", "Timeout"),
    "long key": Bad({"model_name": "x", "k" * 5000: 5}, 400, "unknown_field", "k" * 80),
    "key twice": Bad(b'{"model_name": "x", "model_name": "y"}', 400, "duplicate_field", "model_name"),
    "key twice inside": Bad(b'{"model_name": "x", "params": {"seed": 1, "seed": 2}}', 400, "duplicate_field", "seed"),
    "no JSON": Bad(b"model_name=x", 400, "invalid_json"),
    "half of JSON": Bad(b'{"model_name": "x"', 400, "invalid_json"),
    "more than JSON": Bad(b'{"model_name": "x"} {}', 400, "invalid_json"),
    "list": Bad([{"model_name": "x"}], 400, "invalid_json"),
    "null": Bad(b"null", 400, "invalid_json"),
    "not UTF-8": Bad(b'{"model_name": "\xff"}', 400, "invalid_json"),
    "half of a character": Bad(b'{"model_name": "\\ud800"}', 400, "invalid_json"),
    "control character": Bad(b'{"model_name": "a\x01b"}', 400, "invalid_json"),
    "NUL": Bad(b"\0", 400, "invalid_json"),
    "deep list": Bad(b'{"model_name": "x", "params": ' + b"[" * 200_000, 400, "invalid_json"),
    "deep object": Bad(b'{"a":' * 200_000, 400, "invalid_json"),
    "deep but whole": Bad(b'{"model_name": "x", "params": {"a": %s1%s}}' % (b'{"b":' * 3000, b"}" * 3000), 400,
                          "invalid_json"),
    "too large": Bad({"model_name": "x" * (1 << 20)}, 413, "request_too_large"),
}

ROUTED = {
    "no model": Bad({"prompt": "x"}, 400, "missing_model", "model"),
    "empty model": Bad({"model": "", "prompt": "x"}, 400, "invalid_model", "model"),
    "number as model": Bad({"model": 5}, 400, "invalid_model", "model"),
    "long model": Bad({"model": "m" * 10_000}, 400, "invalid_model", "model"),
    "unknown model": Bad({"model": "other"}, 404, "model_not_found", "model"),
    "control characters": Bad({"model": "a\0\n\x1b[31m"}, 404, "model_not_found", "model"),
    "no JSON": Bad(b"{", 400, "invalid_json"),
    "no body": Bad(b"", 400, "invalid_json"),
    "list": Bad([], 400, "invalid_json"),
    "deep": Bad(b"[" * 200_000, 400, "invalid_json"),
    "not UTF-8": Bad(b'{"model": "\xff"}', 400, "invalid_json"),
    "too large": Bad({"model": "m", "prompt": "x" * LIMIT_BYTES}, 413, "request_too_large"),
}


def check(answer: Answer, bad: Bad) -> None:
    assert (answer.status, answer.error["code"], answer.error["param"]) == (bad.status, bad.code, bad.param)
    assert len(answer.error["message"]) < 1000      # it names what is wrong and does not repeat it


@pytest.mark.parametrize("bad", CREATE.values(), ids=CREATE)
def test_creating(daemon: Daemon, bad: Bad) -> None:
    check(daemon.post("/instances", bad.body, JSON), bad)


@pytest.mark.parametrize("bad", ROUTED.values(), ids=ROUTED)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/tokenize"])
def test_routing(daemon: Daemon, path: str, bad: Bad) -> None:
    check(daemon.post(path, bad.body, JSON), bad)


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x",
                                  "", "application/json5", ";;;", "application/" + "j" * 500])
def test_other_content_types(daemon: Daemon, kind: str) -> None:
    answer = daemon.post("/instances", b'{"model_name": "x"}', {"Content-Type": kind})
    assert (answer.status, answer.error["code"], answer.error["param"]) == (415, "unsupported_media_type",
                                                                           "Content-Type")


@pytest.mark.parametrize(("kind", "status"), [
    ("text/plain", 415), ("application/x-www-form-urlencoded", 415), ("application/octet-stream", 415),
    ("multipart/form-data", 400), ("multipart/form-data; boundary=", 400), ("multipart/form-data; boundary=x", 400)])
def test_content_types_without_a_model(daemon: Daemon, kind: str, status: int) -> None:
    answer = daemon.post("/v1/completions", b'{"model": "m", "prompt": "x"}', {"Content-Type": kind})
    assert answer.status == status and answer.error["code"] in ("unsupported_media_type", "invalid_form")


# --- bytes that are no good HTTP ----------------------------------------------------------------------------------

BODY = b'{"model_name": "smuggled", "timeout": 5}'


def post(*headers: bytes, body: bytes = BODY, target: bytes = b"/instances") -> bytes:
    head = (b"POST " + target + b" HTTP/1.1", b"Host: localhost", b"Content-Type: application/json", *headers)
    return b"\r\n".join(head) + b"\r\n\r\n" + body


LENGTH = b"Content-Length: %d" % len(BODY)
SHORT = b"Content-Length: %d" % (len(BODY) - 1)
CHUNKED = b"Transfer-Encoding: chunked"
RAW = {
    "two lengths": post(LENGTH, SHORT),
    "two equal lengths in one": post(b"Content-Length: %d, %d" % (len(BODY), len(BODY))),
    "negative length": post(b"Content-Length: -1"),
    "signed length": post(b"Content-Length: +%d" % len(BODY)),
    "no number as length": post(b"Content-Length: forty"),
    "hexadecimal length": post(b"Content-Length: 0x28"),
    "length with underscore": post(b"Content-Length: 4_0"),
    "length and chunked": post(LENGTH, CHUNKED, body=b"28\r\n" + BODY + b"\r\n0\r\n\r\n"),
    "chunked twice": post(CHUNKED, CHUNKED, body=b"28\r\n" + BODY + b"\r\n0\r\n\r\n"),
    "chunked, then not": post(b"Transfer-Encoding: chunked, identity", body=b"28\r\n" + BODY + b"\r\n0\r\n\r\n"),
    "unknown coding": post(b"Transfer-Encoding: cow", body=b""),
    "chunked in HTTP/1.0": post(CHUNKED, body=b"28\r\n" + BODY + b"\r\n0\r\n\r\n").replace(b"HTTP/1.1", b"HTTP/1.0"),
    "folded coding": post(b"Transfer-Encoding:\r\n chunked", body=b"28\r\n" + BODY + b"\r\n0\r\n\r\n"),
    "no number as chunk": post(CHUNKED, body=b"zz\r\n" + BODY + b"\r\n0\r\n\r\n"),
    "negative chunk": post(CHUNKED, body=b"-28\r\n" + BODY + b"\r\n0\r\n\r\n"),
    "chunk too long": post(CHUNKED, body=b"5\r\n" + BODY + b"\r\n0\r\n\r\n"),
    "huge chunk": post(CHUNKED, body=b"fffffffffffffffff\r\n" + BODY),
    "large chunk": post(CHUNKED, body=b"%x\r\n" % (LIMIT_BYTES + 1) + BODY),
    "space in header name": post(b"X Y: 1", LENGTH),
    "space before colon": post(b"Content-Length : %d" % len(BODY)),
    "no colon": post(b"nonsense", LENGTH),
    "NUL in header": post(b"X-Y: a\0b", LENGTH),
    "newline in header": post(b"X-Y: a\nTransfer-Encoding: chunked", LENGTH),
    "empty header name": post(b": x", LENGTH),
    "many headers": post(*[b"X-%d: 1" % number for number in range(300)], LENGTH),
    "long header": post(b"X-Y: " + b"a" * 70_000, LENGTH),
    "endless head": b"POST /instances HTTP/1.1\r\n" + b"X: " + b"a" * 200_000,
    "long target": post(LENGTH, target=b"/" + b"a" * 10_000),
    "no version": b"POST /instances\r\n\r\n",
    "odd version": b"POST /instances HTTP/9.9\r\nHost: localhost\r\n\r\n",
    "no request": b"nonsense\r\n\r\n",
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(100) + b"\r\n\r\n",
    "lower-case method": post(LENGTH).replace(b"POST", b"post"),
    "control character in target": post(LENGTH, target=b"/inst\x01ances"),
    "larger than allowed": post(b"Content-Length: %d" % (LIMIT_BYTES + 1)),
    "much larger than allowed": post(b"Content-Length: 999999999999999999999999"),
    "larger behind zeros": post(b"Content-Length: " + b"0" * 30 + b"%d" % (LIMIT_BYTES + 1)),
}


@pytest.mark.parametrize("data", RAW.values(), ids=list(RAW))
def test_bad_http(daemon: Daemon, data: bytes) -> None:
    """Answered once, and closed: what follows might be read as another request."""
    received = daemon.raw(data + b"GET /smuggled HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert len(re.findall(rb"HTTP/1\.1 \d{3} ", received)) == 1, received
    answer = parsed(received)
    assert 400 <= answer.status < 500 or answer.status == 501, received
    assert b"smuggled" not in answer.body
    assert answer.error["message"]


def test_a_body_that_ends_early(daemon: Daemon) -> None:
    for path in (b"/instances", b"/v1/completions"):
        data = post(b"Content-Length: %d" % (len(BODY) + 10), target=path)
        answer = parsed(daemon.raw(data, then_close_sending=True))
        assert (answer.status, answer.error["code"]) == (400, "incomplete_body")
        assert f"ended after {len(BODY)} bytes" in answer.error["message"]


def test_chunks_that_end_early(daemon: Daemon) -> None:
    answer = parsed(daemon.raw(post(CHUNKED, body=b"28\r\n" + BODY + b"\r\n"), then_close_sending=True))
    assert answer.status == 400


def test_a_body_longer_than_it_says_is_another_request(daemon: Daemon) -> None:
    """The first is cut where its length says; the rest is no request."""
    received = daemon.raw(post(SHORT) + b"\r\n\r\n")
    first, second = re.split(rb"(?=HTTP/1\.1 )", received)[1:]
    assert parsed(first).error["code"] == "invalid_json"
    assert parsed(second).status == 400


def test_a_client_that_sends_half_and_waits_holds_nobody_up(daemon: Daemon) -> None:
    clients = [daemon.socket() for _ in range(30)]
    for client in clients:
        client.sendall(post(LENGTH, body=BODY[:10]))
    assert daemon.get("/health").status == 200
    assert daemon.post("/v1/completions", {"model": "m", "prompt": "x", "max_tokens": 1}).status == 200
    for client in clients:
        client.close()


def test_a_client_that_leaves_in_the_middle_makes_no_noise(daemon: Daemon) -> None:
    log = daemon.log
    for data in (post(LENGTH, body=BODY[:10]), post(LENGTH)[:60], b"", post(CHUNKED, body=b"28\r\n{")):
        with daemon.socket() as client:
            port = client.getsockname()[1]
            wait_until(lambda port=port: port in client_ports(daemon))
            client.sendall(data)
        wait_until(lambda port=port: port not in client_ports(daemon))
    assert daemon.log == log


def client_ports(daemon: Daemon) -> set[int]:
    """The other ends of the connections that it holds."""
    return {connection.raddr.port for connection in psutil.Process(daemon.worker_pid).net_connections("tcp")
            if connection.raddr}


@pytest.mark.parametrize("target", ["/instances/%00", "/instances/%ff", "/instances/..%2f..%2fetc", "/proxy/x/%00",
                                    "/v1/models/%00%ff", "/v1/responses/%0d%0aX-Y:1"])
def test_odd_targets(daemon: Daemon, target: str) -> None:
    answer = daemon.get(target)
    assert answer.status in (400, 404) and answer.error
    assert "x-y" not in answer.headers


def parsed(received: bytes) -> Answer:
    head, _, body = received.partition(b"\r\n\r\n")
    status, *lines = head.decode("latin-1").split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    assert int(headers["content-length"]) == len(body), received
    json.loads(body)
    return Answer(int(status.split()[1]), headers, body)
