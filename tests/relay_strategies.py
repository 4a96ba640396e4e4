"""Random bodies for the relay's tests."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import strategies as st


@dataclass(frozen=True)
class ChunkedText:
    """A chunked body and the places in it at which one more chunk could stand."""

    data: bytes
    boundaries: frozenset[int]


@st.composite
def chunked_texts(draw: st.DrawFn, max_chunk: int = 60) -> ChunkedText:
    data = b""
    boundaries = {0}
    for content in draw(st.lists(st.binary(min_size=1, max_size=max_chunk), max_size=8)):
        size = draw(st.sampled_from(["%x", "%X", "000%x"])) % len(content)
        extension = draw(st.sampled_from(["", ";a=b", " ; c", ';d="e"']))
        data += f"{size}{extension}\r\n".encode() + content + b"\r\n"
        boundaries.add(len(data))
    data += draw(st.sampled_from([b"0\r\n", b"0;last\r\n", b"000\r\n"]))
    data += draw(st.sampled_from([b"", b"X-Sum: 1\r\n", b"A: 0\r\nB: \r\n"])) + b"\r\n"
    return ChunkedText(data, frozenset(boundaries))
