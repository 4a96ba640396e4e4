"""web/request_head.py: a plain head is read as gunicorn reads it, and all others are left to gunicorn."""

from __future__ import annotations

import socket
from typing import Any, cast

import pytest
from gunicorn.config import Config
from gunicorn.http.errors import NoMoreData, ParseException
from gunicorn.http.message import Request
from hypothesis import given
from hypothesis import strategies as st

from web.request_head import PlainRequest, _plain, _Source, parse

CLIENT = ("127.0.0.1", 40000)
HEAD = b"POST /v1/chat/completions?a=b HTTP/1.1\r\nHost: here:5000\r\nContent-Type: application/json\r\n"


class Over:
    """A client that sends nothing more."""

    def recv(self, size: int) -> bytes:
        return b""


NOBODY = cast(socket.socket, Over())
CFG = Config()


def by_gunicorn(head: bytes) -> Any:
    return Request(CFG, _Source(head, NOBODY), CLIENT)


def seen(request: Any) -> tuple[Any, ...]:
    return (request.method, request.uri, request.path, request.query, tuple(request.version), request.headers,
            request.scheme, request.should_close())


@pytest.mark.parametrize("more", [
    b"", b"Content-Length: 12\r\n", b"Connection: close\r\n", b"connection:  Keep-Alive \r\nX-A: 1\r\nX-A: 2\r\n",
    b"Connection:\r\nConnection: close\r\n", b"Connection: TE, close\r\n", b"Connection: \xa0close\r\n",
    b"X-Long: " + b"a" * 8000 + b"\r\n", b"X-Latin: \xe4\r\nX-Empty:\r\n"])
def test_a_plain_head_is_read_as_gunicorn_reads_it(more: bytes) -> None:
    found = parse(CFG, HEAD + more + b"\r\n", NOBODY, CLIENT)
    assert isinstance(found, PlainRequest)
    assert seen(found) == seen(by_gunicorn(HEAD + more + b"\r\n"))


@pytest.mark.parametrize("more", [
    b"Transfer-Encoding: chunked\r\n", b"X-Forwarded-Proto: https\r\n", b"X_Under: score\r\n",
    b"expect: 100-continue\r\n"])
def test_what_gunicorn_has_a_rule_for_is_gunicorns(more: bytes) -> None:
    found = parse(CFG, HEAD + more + b"\r\n", NOBODY, CLIENT)
    assert isinstance(found, Request) and seen(found) == seen(by_gunicorn(HEAD + more + b"\r\n"))


@pytest.mark.parametrize("head", [
    HEAD + b"Host: there\r\n\r\n", HEAD + b"content-type: text/plain\r\n\r\n", HEAD + b"Content-Length: twelve\r\n\r\n",
    HEAD + b"Content-Length: 1\r\nContent-Length: 1\r\n\r\n", HEAD + b"Content-Length: 1, 1\r\n\r\n",
    HEAD + b"No colon\r\n\r\n", HEAD + b"X: a\x00b\r\n\r\n", HEAD + b"X-Long: " + b"a" * 9000 + b"\r\n\r\n",
    HEAD + b"X: 1\r\n" * 101 + b"\r\n", HEAD + b" folded\r\n\r\n", HEAD + b"Expect: tea\r\n\r\n", HEAD,
    b"GET /" + b"a" * 5000 + b" HTTP/1.1\r\n\r\n", b"get / HTTP/1.1\r\n\r\n", b"GET / HTTP/2.0\r\n\r\n", b"\r\n\r\n"])
def test_what_gunicorn_refuses_is_refused_by_gunicorn(head: bytes) -> None:
    with pytest.raises((ParseException, NoMoreData)) as theirs:
        by_gunicorn(head)
    with pytest.raises((ParseException, NoMoreData)) as ours:
        parse(CFG, head, NOBODY, CLIENT)
    assert (ours.type, str(ours.value)) == (theirs.type, str(theirs.value))


NAMES = st.sampled_from([
    b"Host", b"content-type", b"Content-Length", b"Connection", b"Transfer-Encoding", b"X-A", b"x-a", b"X_A", b"Expect",
    b"X-Forwarded-Proto", b"A:", b"A b", b""])
VALUES = st.one_of(st.binary(max_size=12), st.sampled_from([
    b"close", b"keep-alive", b"chunked", b"7", b"7,7", b"100-continue", b"https", b"a\tb", b" x "]), st.lists(
    st.sampled_from([b"close", b"Keep-Alive", b",", b" ", b"\t", b"\x0b", b"\x85", b"\xa0", b"7", b"-", b"+"]),
    max_size=4).map(b"".join))
TARGETS = st.one_of(st.binary(max_size=8).map(lambda more: b"/" + more), st.sampled_from([
    b"/", b"/v1/x", b"/v1/x?a=b?c", b"//a/b", b"/a#b", b"*", b"http://h/p", b"", b"/%20%"]))


@given(method=st.sampled_from([b"POST", b"GET", b"post", b"P OST", b""]), target=TARGETS,
       version=st.sampled_from([b"HTTP/1.1", b"HTTP/1.0", b"HTTP/1.2", b"HTTP/2", b""]),
       fields=st.lists(st.tuples(NAMES, VALUES), max_size=5), end=st.sampled_from([b"\r\n", b"\n", b""]))
def test_no_head_is_read_otherwise(method: bytes, target: bytes, version: bytes, fields: list[tuple[bytes, bytes]],
                                   end: bytes) -> None:
    head = b" ".join([method, target, version]) + b"\r\n" + b"".join(
        name + b":" + value + b"\r\n" for name, value in fields) + end
    found = _plain(CFG, head)
    if found is not None:
        assert seen(found) == seen(by_gunicorn(head))
