"""routing/requested_model.py: the model that a body names."""

from __future__ import annotations

import json

import pytest

from errors import BadRequest, UnsupportedMediaType
from routing.requested_model import Wanted, find

JSON = "application/json"
FORM = "multipart/form-data; boundary=xx"


def form(*parts: tuple[str, str]) -> bytes:
    """Parts are (what stands after `form-data; `, the value)."""
    return b"".join(f'--xx\r\nContent-Disposition: form-data; {head}\r\n\r\n{value}\r\n'.encode()
                    for head, value in parts) + b"--xx--\r\n"


@pytest.mark.parametrize(("body", "wanted"), [
    ({"model": "m"}, Wanted("m")), ({"model": "m", "stream": True}, Wanted("m", True)),
    ({"model": "m", "stream": 1}, Wanted("m")), ({"model": "org/模型"}, Wanted("org/模型")),
    ({"input": {"model": "inner"}, "model": "outer"}, Wanted("outer")),
    ({"model": "m", "previous_response_id": "resp_1"}, Wanted("m", False, "resp_1")),
    ({"model": "m", "previous_response_id": None}, Wanted("m")),
    ({"model": "m", "previous_response_id": 5}, Wanted("m")), ({"model": "m" * 1024}, Wanted("m" * 1024))])
@pytest.mark.parametrize("content_type", [JSON, "Application/JSON; charset=utf-8", "application/vnd.api+json", ""])
def test_json(body: object, wanted: Wanted, content_type: str) -> None:
    assert find(content_type, json.dumps(body).encode()) == wanted


def test_of_a_name_that_comes_twice_the_last_counts_as_for_the_engine() -> None:
    assert find(JSON, b'{"model": "a", "model": "b"}').model == "b"
    assert find(FORM, form(('name="model"', "a"), ('name="model"', "b"))).model == "b"


@pytest.mark.parametrize(("body", "code", "param"), [
    (b"", "invalid_json", None), (b"{", "invalid_json", None), (b"[]", "invalid_json", None),
    (b"5", "invalid_json", None), (b'{"model": "\xff"}', "invalid_json", None), (b"[" * 5000, "invalid_json", None),
    (b"{}", "missing_model", "model"), (b'{"model": null}', "missing_model", "model"),
    (b'{"Model": "m"}', "missing_model", "model"), (b'{"model": 5}', "invalid_model", "model"),
    (b'{"model": ""}', "invalid_model", "model"), (b'{"model": ["m"]}', "invalid_model", "model"),
    (b'{"model": "' + b"m" * 1025 + b'"}', "invalid_model", "model")])
def test_json_that_names_none(body: bytes, code: str, param: str | None) -> None:
    with pytest.raises(BadRequest) as raised:
        find(JSON, body)
    assert (raised.value.code, raised.value.param) == (code, param)


@pytest.mark.parametrize(("parts", "wanted"), [
    ([('name="model"', "m")], Wanted("m")),
    ([('name="file"; filename="a.wav"', "\0\r\n--x"), ('name="model"', "m")], Wanted("m")),
    ([('name="model"', "m"), ('name="file"; filename="a.wav"', "model")], Wanted("m")),
    ([('name="model"', "m"), ('name="stream"', "True")], Wanted("m", True)),
    ([('name="model"', "m"), ('name="stream"', "false")], Wanted("m")),
    ([('name="prompt"', "x" * 100_000), ('name="model"', "模型")], Wanted("模型"))])
def test_forms(parts: list[tuple[str, str]], wanted: Wanted) -> None:
    assert find(FORM, form(*parts)) == wanted


@pytest.mark.parametrize(("content_type", "body", "code"), [
    ("multipart/form-data", form(('name="model"', "m")), "invalid_form"),
    (FORM, b"no form", "invalid_form"), (FORM, b"", "invalid_form"),
    (FORM, form(('name="model"', "m"))[:-8], "invalid_form"), (FORM, form(), "missing_model"),
    (FORM, form(('name="other"', "m")), "missing_model"), (FORM, form(('name="model"', "")), "invalid_model"),
    (FORM, form(('name="model"; filename="m"', "m")), "missing_model"),
    (FORM, form(*[('name="x"', "y")] * 1001, ('name="model"', "m")), "invalid_form"),
    (FORM, form(('name="model"', "m" * 1025)), "invalid_model")])
def test_forms_that_name_none(content_type: str, body: bytes, code: str) -> None:
    with pytest.raises(BadRequest) as raised:
        find(content_type, body)
    assert raised.value.code == code


@pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded", "audio/wav", "nonsense"])
def test_types_that_hold_no_model(content_type: str) -> None:
    with pytest.raises(UnsupportedMediaType, match="application/json or multipart/form-data") as raised:
        find(content_type, b"model=m")
    assert raised.value.param == "Content-Type"


def test_the_name_is_found_behind_megabytes_of_image() -> None:
    image = "a" * 4_000_000
    assert find(JSON, json.dumps({"messages": [{"content": image}], "model": "m"}).encode()).model == "m"
