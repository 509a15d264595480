"""The binary records: what is written reads back, what makes no sense is refused."""

from __future__ import annotations

import struct

import pytest

from byre.errors import ImageError
from byre.formats.vmdk import layout
from byre.formats.vmdk.creation import new_header
from support import vmdk

GOOD = layout.SparseHeader(3, 0x30003, 1 << 21, 128, 1, 20, 512, 21, 100, 256, 1, 1)


def test_headers_survive() -> None:
    for header in (GOOD, new_header(1 << 20), new_header(12345, compressed=True), new_header(99, zero_grains=True)):
        data = layout.encode_header(header)
        assert len(data) == 512
        assert layout.decode_header(data) == header
    footer = layout.encode_footer(GOOD)
    assert layout.decode_footer(footer) == GOOD
    cowd = layout.CowdHeader(1, 3, 1 << 20, 128, 4, 10, 99)
    assert layout.decode_cowd_header(layout.encode_cowd_header(cowd)) == cowd
    sesparse = layout.SeSparseHeader(1 << 20, 1, 8, 2, 10, 640, 2048, 4096)
    assert layout.decode_sesparse_header(layout.encode_sesparse_header(sesparse)) == sesparse
    assert not layout.decode_sesparse_volatile(layout.encode_sesparse_volatile())
    assert layout.decode_sesparse_volatile(layout.encode_sesparse_volatile(journal=True))


def test_what_others_write() -> None:
    found = layout.decode_header(vmdk.header(2048, version=2, flags=7, grain=16, per_table=64, overhead=50))
    assert (found.capacity, found.grain, found.table_entries, found.overhead) == (2048, 16, 64, 50)
    assert found.zero_grains
    assert not found.compressed
    assert found.table_count == 2


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"version": 4}, "version"),
        ({"version": 0}, "version"),
        ({"grain": 0}, "granularity"),
        ({"grain": 0xFFFFFFFFFFFFFFFF}, "granularity"),
        ({"grain": 100}, "granularity"),
        ({"grain": 1 << 16}, "granularity"),
        ({"per_table": 0}, "table"),
        ({"per_table": 0xFFFFFFFF}, "L2"),
        ({"per_table": 1, "grain": 1, "capacity": 0xFFFFFFFF}, "L1"),
        ({"capacity": 1 << 63}, "L1"),
        ({"text": 2049}, "descriptor"),
        ({"text_at": 1 << 60}, "descriptor"),
        ({"overhead": 1 << 60}, "overhead"),
        ({"compression": 2}, "compression"),
        ({"newlines": b"\n \n\n"}, "line ends"),
    ],
)
def test_headers_that_make_no_sense(changes: dict[str, object], words: str) -> None:
    given: dict[str, object] = {"capacity": 2048, **changes}
    with pytest.raises(ImageError, match=words):
        layout.decode_header(vmdk.header(**given))  # type: ignore[arg-type]


def test_unused_line_end_bytes_are_not_looked_at() -> None:
    assert layout.decode_header(vmdk.header(2048, flags=0, newlines=b"abcd")).version == 1


@pytest.mark.parametrize("at", [0, 512, 1024])
def test_footers_that_make_no_sense(at: int) -> None:
    footer = bytearray(layout.encode_footer(GOOD))
    footer[at + 12] ^= 1
    if at == 512:
        struct.pack_into("<Q", footer, 512 + 56, layout.GD_AT_END)
    with pytest.raises(ImageError, match="footer"):
        layout.decode_footer(footer)


@pytest.mark.parametrize("word", [1, 3, 4, 5, 6, 9, 30, 63])
def test_sesparse_is_read_strictly(word: int) -> None:
    data = bytearray(layout.encode_sesparse_header(layout.SeSparseHeader(1 << 20, 1, 8, 2, 10, 640, 2048, 4096)))
    data[word * 8] ^= 0x55
    with pytest.raises(ImageError, match=r"SEsparse"):
        layout.decode_sesparse_header(data)
