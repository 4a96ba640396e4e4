"""What reads bytes of others, each as a function that raises on a broken promise, and real examples to begin with.

The promises: it returns a good value or raises the one error that its callers handle, whose message is short and names
its place; it never hangs, and how the bytes were cut makes no difference.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

from configuration.config_file import parse_config
from configuration.env_file import read_env_file
from configuration.keys import parse_keys
from configuration.servers import parse_servers
from errors import BadRequest, ConfigError, DaemonError, UnsupportedMediaType
from instances.flags import flags_from_json, to_argv
from instances.startup_log import StartupLog
from routing import paths, requested_model
from routing.limits import reported_tokens
from routing.response_head import BadHead, read_head
from web.intake import Intake

CHECKOUT = Path(__file__).resolve().parent.parent.parent
HOME = Path("/home/nobody")
MOST_MESSAGE = 3000     # characters of an error
FORM = "multipart/form-data; boundary=xx"


@dataclass(frozen=True)
class Target:
    run: Callable[[bytes], None]
    examples: tuple[bytes, ...]


def _is_short(error: Exception) -> None:
    assert 0 < len(str(error)) < MOST_MESSAGE, str(error)[:200]


def _config(data: bytes) -> None:
    try:
        parse_config(data.decode("utf-8", "replace"), "config.yaml", HOME)
    except ConfigError as error:
        _is_short(error)
        assert error.where.startswith("config.yaml")


def _servers(data: bytes) -> None:
    try:
        parse_servers(data.decode("utf-8", "replace"), Path("servers.toml"), {"KEY": "secret"})
    except ConfigError as error:
        _is_short(error)
        assert "secret" not in str(error)


def _vllm_config(data: bytes) -> None:
    try:
        flags = flags_from_json(data.decode("utf-8", "replace"), "vllm_config.json")
    except ConfigError as error:
        _is_short(error)
    else:
        assert not any("\0" in word for word in to_argv(flags))


_folder = tempfile.TemporaryDirectory(prefix="vllm-server-fuzz-")


def _env(data: bytes) -> None:
    path = Path(_folder.name) / ".env"
    path.write_bytes(data)
    try:
        layer = read_env_file(path, path.parent, {})
    except ConfigError as error:
        _is_short(error)
    else:
        assert all(name.isascii() and name.isidentifier() and "\0" not in given.text for name, given in layer.items())


def _keys(data: bytes) -> None:
    text = data.decode("utf-8", "replace")
    try:
        keys = parse_keys(text)
    except ValueError as error:
        assert len(text) < 20 or text not in str(error)
    else:
        assert all(key.name and len(key.digest) == 32 for key in keys)
        assert not any(key.plain and len(key.plain) > 8 and key.plain in repr(key) for key in keys)


def _startup_log(data: bytes) -> None:
    text = data.decode("utf-8", "replace")
    whole, cut = StartupLog(), StartupLog()
    whole.feed(text)
    at = len(text) * (data[0] if data else 0) // 256
    cut.feed(text[:at])
    cut.feed(text[at:])
    for log in (whole, cut):
        assert log.progress is None or 0 <= log.progress <= 1
        cause = log.cause(1, "owner/model")
        assert cause.message and len(cause.message) < MOST_MESSAGE and 400 <= cause.status < 600
    assert (whole.phase, whole.progress, whole.facts, whole.cause(1, "m")) == (
        cut.phase, cut.progress, cut.facts, cut.cause(1, "m"))


def _finder(kind: str, with_fields: bool) -> Callable[[bytes], None]:
    def run(data: bytes) -> None:
        try:
            wanted = requested_model.find(kind, data, with_fields=with_fields)
        except (BadRequest, UnsupportedMediaType) as error:
            _is_short(error)
        else:
            assert 0 < len(wanted.model) <= requested_model.MAX_NAME
    return run


def _large_json(data: bytes) -> None:
    """A long string before it, so that what is left out of large bodies is, and the outcome is the same."""
    rest = data.removeprefix(b"{")
    _same_model(b'{"a":"' + b"x" * requested_model.LARGE_BODY_BYTES + b'",' + rest, b'{"a":"x",' + rest)


def _same_model(large: bytes, small: bytes) -> None:
    found: list[str | None] = []
    for body in (large, small):
        try:
            found.append(requested_model.find("application/json", body).model)
        except BadRequest:
            found.append(None)
    # what stands in a long string is not looked at in a large body: where that is no JSON, the engine says so
    assert found[0] == found[1] or (found[1] is None and len(small) > requested_model.LONG_BYTES), found


def _path(data: bytes) -> None:
    path = data.decode("latin-1")
    paths.is_dev_mode(path)
    paths.is_confusing(path)
    # However often it is encoded, it stays what it is.
    assert paths.is_dev_mode("/" + "".join(f"%{byte:02x}" for byte in b"sleep") + "/") is True


def _intake(data: bytes) -> None:
    """A connection's bytes, whole and cut in two: the same requests."""
    outcomes = []
    for pieces in ((data,), (data[:len(data) // 3], data[len(data) // 3:])):
        intake, taken = Intake(1 << 16), []
        for piece in pieces:
            ready = intake.feed(piece)
            while ready and len(taken) < 50:
                one = intake.take()
                taken.append((one.head, bytes(one.body), one.whole, type(one.refusal)))
                assert one.refusal is None or isinstance(one.refusal, DaemonError)
                if not one.whole:
                    break
                ready = intake.begun and intake.ready()
            if taken and not taken[-1][2]:
                break       # the connection would be closed
        outcomes.append(taken)
    first, second = outcomes
    shared = min(len(first), len(second))
    assert [one[2:] for one in first[:shared] if one[2]] == [one[2:] for one in second[:shared] if one[2]]


def _head(data: bytes) -> None:
    file = BytesIO(data)
    try:
        head = read_head(file)
    except (BadHead, ConnectionError) as error:
        _is_short(error)
    else:
        assert 200 <= head.status < 1000 and (head.length is None or head.length >= 0)
        assert not any(char in value for _, value in head.headers for char in "\r\n\0")


def _tokens(data: bytes) -> None:
    assert reported_tokens(data) >= 0


def _file(name: str) -> bytes:
    return (CHECKOUT / name).read_bytes()


def _form(*parts: tuple[str, str]) -> bytes:
    return b"".join(f'--xx\r\nContent-Disposition: form-data; {head}\r\n\r\n{value}\r\n'.encode()
                    for head, value in parts) + b"--xx--\r\n"


_CHAT = json.dumps({"model": "m", "stream": True, "previous_response_id": "resp_1",
                    "messages": [{"role": "user", "content": "é\"\\ \ud83d\ude00"}]}).encode()
_FORMS = (_form(('name="model"', "m"), ('name="file"; filename="a.wav"', "RIFF")),
          _form(('name="stream"', "true"), ('name=model', "org/m"), ('name="model"', "again")))
_POST = (b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\nabcGET / HTTP/1.1\r\nHost: x\r\n\r\n",
         b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\nExpect: 100-continue\r\n\r\n"
         b"3;a=b\r\nabc\r\n0\r\nA: b\r\n\r\n")
_ANSWERS = (b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 2, 2\r\nConnection: close\r\n\r\nok",
            b"HTTP/1.0 404 Not Found\nTransfer-Encoding: chunked\r\nX: \xe9\r\n\r\n")

TARGETS = {
    "env": Target(_env, (_file(".env.example"), b'API_KEYS="a:b,c"\nexport X=1\nHF_HOME=${HOME:-/x}\n')),
    "config": Target(_config, (_file("config.example.yaml"), b"models:\n  a: &x {model_path: o/m}\n  b: {<<: *x}\n",
                               b"proxy:\n  keys: [{name: a, key: b, models: ['l*']}]\n")),
    "servers": Target(_servers, (_file("servers.example.toml"), b'[[servers]]\nurl = "http://a:1"\napi_key = "x"\n')),
    "vllm_config": Target(_vllm_config, (b'{"max_model_len": 9, "hf_overrides": {"a": [1.5, null]}, "lora": ["a"]}',)),
    "keys": Target(_keys, (b"sk-one,alice:sk-two", b"a:sha256:" + b"0f" * 32)),
    "startup_log": Target(_startup_log, tuple(path.read_bytes()[-20_000:] for path in sorted(
        (CHECKOUT / "tests/data/startup_logs").glob("*.log")))),
    "json_model": Target(_finder("application/json", True), (_CHAT, b'{"model": "a\\u00e9", "x": [{}, 1e9]}')),
    "large_json_model": Target(_large_json, (_CHAT, b'{"model":"a","b":"\\\\\\""}')),
    "form_model": Target(_finder(FORM, False), _FORMS),
    "paths": Target(_path, (b"/v1/%73leep", b"//SLEEP;a/../x", b"/proxy/ab/%252e%252e/wake_up")),
    "intake": Target(_intake, _POST),
    "response_head": Target(_head, _ANSWERS),
    "tokens": Target(_tokens, (b'data: {"usage":{"total_tokens":5}}\n\ndata: [DONE]\n\n',)),
}

