"""routing/requested_model.py: the model that a body names."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from errors import BadRequest, UnsupportedMediaType
from routing import requested_model
from routing.requested_model import LARGE_BODY_BYTES, LONG_BYTES, Wanted, find, without_long_strings

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


LONG = st.builds(lambda unit, times, odd: unit * times + odd, st.text(min_size=1, max_size=8),
                 st.sampled_from([LONG_BYTES // 8, LONG_BYTES, LONG_BYTES * 2]), st.text('\\"\x7f/é模', max_size=3))
TEXT = st.one_of(st.sampled_from(["model", "stream", "", "\\", '"', '\\"', "data:image/png;base64,"]),
                 st.text(max_size=8))
SCALARS = st.one_of(st.none(), st.booleans(), st.integers(-9, 9), TEXT, LONG)
VALUES = st.recursive(SCALARS, lambda inner: st.one_of(
    st.lists(inner, max_size=3), st.dictionaries(st.one_of(TEXT, LONG), inner, max_size=3)), max_leaves=5)
KEYS = st.sampled_from(["model", "model", "previous_response_id", "stream", "messages", "mo\\del"])
FIELDS = st.lists(st.tuples(KEYS, VALUES), max_size=5)


@settings(max_examples=min(settings.default.max_examples, 2000))    # each is a body of 100 kB
@given(FIELDS, st.booleans(), st.sampled_from([(",", ":"), (", ", ": "), (" ,\n", "\t: ")]), st.integers(0, 99))
def test_a_large_body_names_what_all_of_it_names(fields: list[tuple[str, object]], ascii_only: bool,
                                                 separators: tuple[str, str], broken_at: int) -> None:
    """Valid or cut off anywhere: as if every string were decoded."""
    def dump(value: object) -> str:
        return json.dumps(value, ensure_ascii=ascii_only, separators=separators)

    pairs = [*fields, ("padding", "x" * LARGE_BODY_BYTES)]
    body = ("{" + separators[0].join(f"{dump(key)}{separators[1]}{dump(value)}" for key, value in pairs) + "}").encode()
    assert outcome(body) == outcome_of(json.loads(body))
    assert outcome(body[:len(body) * broken_at // 100]) == "invalid_json"


def outcome(body: bytes) -> Wanted | str:
    try:
        return find(JSON, bytearray(body))
    except BadRequest as error:
        return str(error.code)


def outcome_of(data: dict[str, object]) -> Wanted | str:
    """By the rules, from what a decoder made of the whole body."""
    model, previous = data.get("model"), data.get("previous_response_id")
    if model is None:
        return "missing_model"
    if not isinstance(model, str) or not model or len(model) > requested_model.MAX_NAME:
        return "invalid_model"
    is_id = isinstance(previous, str) and len(previous) <= requested_model.MAX_NAME
    return Wanted(model, data.get("stream") is True, previous if is_id else None)  # type: ignore[arg-type]


def test_of_an_image_next_to_nothing_is_decoded() -> None:
    fields = {"messages": [{"content": [{"type": "text", "text": 'what "is" this?'},
                                        {"image_url": {"url": "data:image/png;base64," + "iVBO" * 1_000_000}}]}],
              "model": "m", "stream": True}
    body = json.dumps(fields).encode()
    assert len(without_long_strings(body)) < 2000
    assert find(JSON, body) == Wanted("m", True)
    with pytest.raises(BadRequest):
        find(JSON, body + b"}")


@pytest.mark.parametrize("body", [
    json.dumps({"messages": ["short"] * 50_000, "model": "m"}).encode(),
    json.dumps({"messages": ['say "so"\n' * 50_000], "model": "m"}).encode(),
    json.dumps({"messages": ["\\" * 500_000], "model": "m"}).encode()])
def test_what_does_not_pay_is_decoded_whole(body: bytes) -> None:
    assert without_long_strings(body) is body
    assert find(JSON, body) == Wanted("m")


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
