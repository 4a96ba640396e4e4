"""web/bodies.py: the body of POST /instances, field by field."""

from __future__ import annotations

import io
import json

import pytest
from flask import Request
from werkzeug.test import EnvironBuilder

from errors import BadRequest, DaemonError, TooLarge, UnsupportedMediaType
from instance_manager import CreateRequest
from routing.upstream import ClientLeft
from web import bodies


def request_of(data: bytes, content_type: str | None = "application/json", length: int | None = None) -> Request:
    environ = EnvironBuilder(method="POST", content_type=content_type).get_environ()
    environ["wsgi.input"] = io.BytesIO(data)
    environ["CONTENT_LENGTH"] = str(len(data) if length is None else length)
    return Request(environ)


def parsed(data: bytes, content_type: str | None = "application/json") -> dict[str, object]:
    return bodies.json_object(request_of(data, content_type), bodies.CREATE_FIELDS)


def test_a_whole_request() -> None:
    body = {"model_name": "org/m", "timeout": 5, "start_timeout": 1.5, "params": {"max-model-len": 8}, "wait": True,
            "replace": True}
    assert bodies.create_request(body) == (CreateRequest(
        "org/m", {"max_model_len": 8}, timeout_s=5.0, start_timeout_s=1.5, replace=True), True)


def test_what_is_left_out_is_left_to_the_settings() -> None:
    assert bodies.create_request({"model_name": "m"}) == (CreateRequest("m", {}), False)
    everything_null = dict.fromkeys(("params", "timeout", "start_timeout"))
    assert bodies.create_request({"model_name": "m", **everything_null}) == (CreateRequest("m", {}), False)


def test_zero_is_an_idle_time_but_no_deadline() -> None:
    request, _ = bodies.create_request({"model_name": "m", "timeout": 0})
    assert request.timeout_s == 0.0
    with pytest.raises(BadRequest, match="more than 0") as raised:
        bodies.create_request({"model_name": "m", "start_timeout": 0})
    assert raised.value.param == "start_timeout"


@pytest.mark.parametrize("name", ["m", "org/model", "/a/b c", "./m", "模型", "m" * 512])
def test_model_names(name: str) -> None:
    assert bodies.model_name({"model_name": name}) == name


@pytest.mark.parametrize("name", ["", " m", "m ", "\t", "a\0b", "a\nb", "a\x7fb", "a\u2028b", "--m", "m" * 513, 5, [],
                                  {}, True, 1.5])
def test_no_model_names(name: object) -> None:
    with pytest.raises(BadRequest, match="model_name") as raised:
        bodies.model_name({"model_name": name})
    assert raised.value.param == "model_name"


@pytest.mark.parametrize("value", [-1, -0.001, 1e10, float("inf"), float("nan"), 10 ** 400, "5", True, [], {}])
def test_no_seconds(value: object) -> None:
    with pytest.raises(BadRequest, match='"timeout" must be a number of seconds') as raised:
        bodies.seconds({"timeout": value}, "timeout", zero=True)
    assert raised.value.param == "timeout"


@pytest.mark.parametrize("value", [0, 1, "true", "", None, [], {}])
def test_no_booleans(value: object) -> None:
    with pytest.raises(BadRequest, match='"wait" must be true or false') as raised:
        bodies.boolean({"wait": value}, "wait")
    assert raised.value.param == "wait"


def test_replace_and_new_exclude_each_other() -> None:
    with pytest.raises(BadRequest, match="exclude each other"):
        bodies.create_request({"model_name": "m", "replace": True, "new": True})


@pytest.mark.parametrize(("params", "param"), [
    ([], "params"), ("x", "params"), (5, "params"), ({"host": "0.0.0.0"}, "params.host"),
    ({"port": 1}, "params.port"), ({"x": {"y": float("nan")}}, "params.x"), ({"--dtype": "auto"}, "params.--dtype"),
    ({"api-key": "k"}, "params.api-key"), ({"model": "other"}, "params.model")])
def test_params_that_are_none(params: object, param: str) -> None:
    with pytest.raises(BadRequest) as raised:
        bodies.create_request({"model_name": "m", "params": params})
    assert raised.value.param == param


@pytest.mark.parametrize(("data", "code", "param"), [
    (b"{", "invalid_json", None), (b"nothing", "invalid_json", None), (b"[]", "invalid_json", None),
    (b'"m"', "invalid_json", None), (b"null", "invalid_json", None), (b" ", "invalid_json", None),
    (b'{"timeout": NaN}', "invalid_json", None), (b'{"timeout": Infinity}', "invalid_json", None),
    (b'\xef\xbb\xbf{}', "invalid_json", None), (b'{"model_name": "\xff"}', "invalid_json", None),
    (b'{"model_name": "\\ud800"}', "invalid_json", None), (b"[" * 100_000, "invalid_json", None),
    (b'{"params":' * 1100 + b"1" + b"}" * 1100, "invalid_json", None), (b"{}{}", "invalid_json", None),
    (b'{"model_name": "a", "model_name": "b"}', "duplicate_field", "model_name"),
    (b'{"params": {"dtype": "a", "dtype": "b"}}', "duplicate_field", "dtype"),
    (b'{"timout": 5}', "unknown_field", "timout"), (b'{"": 5}', "unknown_field", "")])
def test_bodies_that_are_refused(data: bytes, code: str, param: str | None) -> None:
    with pytest.raises(BadRequest) as raised:
        parsed(data)
    assert (raised.value.code, raised.value.param) == (code, param)


def test_a_field_that_is_almost_right_is_named() -> None:
    with pytest.raises(BadRequest, match="did you mean 'timeout'"):
        parsed(b'{"timout": 5}')
    with pytest.raises(BadRequest, match="known are model_name, timeout"):
        parsed(b'{"zzz": 5}')


def test_no_body_is_an_empty_object() -> None:
    assert parsed(b"") == {}
    assert parsed(b"", None) == {}


@pytest.mark.parametrize("content_type", [None, "text/plain", "application/x-www-form-urlencoded", "application/jsonx"])
def test_only_json_is_read(content_type: str | None) -> None:
    """A page of another origin can send the other types without asking first."""
    with pytest.raises(UnsupportedMediaType) as raised:
        parsed(b'{"model_name": "m"}', content_type)
    assert raised.value.param == "Content-Type"


def test_a_charset_is_no_other_type() -> None:
    assert parsed(b'{"wait": true}', "application/json; charset=utf-8") == {"wait": True}


def test_a_body_that_ends_early() -> None:
    with pytest.raises(BadRequest, match="ended after 2 bytes; its Content-Length says 5") as raised:
        bodies.json_object(request_of(b"{}", length=5), ())
    assert raised.value.code == "incomplete_body"


def test_a_body_that_is_too_large() -> None:
    with pytest.raises(TooLarge):
        parsed(json.dumps({"model_name": "m" * bodies.MAX_BODY_BYTES}).encode())
    chunked = request_of(b" " * (bodies.MAX_BODY_BYTES + 1))
    del chunked.environ["CONTENT_LENGTH"]
    with pytest.raises(TooLarge):
        bodies.json_object(chunked, ())


def test_a_client_that_leaves_while_it_sends_is_no_error_of_ours() -> None:
    class Reset(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            raise ConnectionResetError

    request = request_of(b"{}")
    request.environ["wsgi.input"] = Reset()
    with pytest.raises(ClientLeft) as raised:
        bodies.json_object(request, ())
    assert not isinstance(raised.value, DaemonError)
