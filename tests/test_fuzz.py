"""Whatever bytes come, what reads them keeps its promises: examples that were cut, mixed and mangled.

`make fuzz` does the same for longer, guided by coverage; CI's `make slow` runs this file with 1,000 cases each.
"""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fuzz.targets import TARGETS

WORDS = (b"", b"\0", b"\n", b"\r\n", b"\r", b"\xff\xfe", b'"', b"'", b"\\", b"{", b"}", b"[[", b"]]", b"&a", b"*a",
         b"<<:", b"!!python/object", b"${X}", b"%25", b"..", b"//", b";", b"1e999", b"-1", b"9" * 30, b"null", b"\xc3",
         b"\x1b[31m", b"--xx", b"--xx--", b"\xe2\x80\xa8", b'"model":', b": ", b"\t", b"#")


EXAMPLES = min(settings().max_examples // 4, 1000)


@st.composite
def mangled(draw: st.DrawFn, examples: tuple[bytes, ...]) -> bytes:
    data = bytearray(draw(st.sampled_from(examples)))
    for _ in range(draw(st.integers(0, 6))):
        at = draw(st.integers(0, len(data)))
        to = min(len(data), at + draw(st.sampled_from((0, 0, 1, 2, 10, 1000))))
        piece = draw(st.one_of(st.sampled_from(WORDS), st.binary(max_size=8), st.just(bytes(data[at:at + 50]))))
        data[at:to] = piece * draw(st.sampled_from((1, 1, 1, 2, 200)))
    return bytes(data[:draw(st.sampled_from((1 << 16, 1 << 16, 100, 1)))])


@pytest.mark.parametrize("name", TARGETS)
def test_mangled_examples(name: str) -> None:
    target = TARGETS[name]

    @settings(max_examples=EXAMPLES)
    @given(st.one_of(mangled(target.examples), st.binary(max_size=200)))
    def run(data: bytes) -> None:
        target.run(data)

    run()


@pytest.mark.parametrize("name", TARGETS)
def test_the_examples_themselves(name: str) -> None:
    for example in TARGETS[name].examples:
        TARGETS[name].run(example)
