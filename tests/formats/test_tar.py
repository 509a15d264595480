"""Tar archives: the same members that Python's own library finds, and limits that it does not have."""

from __future__ import annotations

import io
import tarfile
import time
from collections.abc import Callable

import pytest

from byre.errors import ImageError
from byre.formats import tar
from byre.protocols.memory import MemoryNode

LONG = "a folder with a long name/" * 8 + "disk.vmdk"


def archive(format: int, *rows: tuple[str, bytes, bytes]) -> bytes:
    """:param rows: (name, type, content)"""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w", format=format) as made:
        for name, kind, content in rows:
            info = tarfile.TarInfo(name)
            info.type, info.size = kind, len(content)
            if kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
                info.linkname = "vm.ovf"
            made.addfile(info, io.BytesIO(content))
    return data.getvalue()


def header(name: bytes, kind: bytes, size: int, *, prefix: bytes = b"") -> bytes:
    raw = bytearray(512)
    raw[: len(name)], raw[156:157] = name, kind
    raw[124:136] = b"%011o\0" % size if size >> 33 == 0 else bytes([0x80]) + size.to_bytes(11, "big")
    raw[257:265] = b"ustar\x0000"
    raw[345 : 345 + len(prefix)] = prefix
    raw[148:156] = b" " * 8
    raw[148:156] = b"%06o\0 " % sum(raw)
    return bytes(raw)


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_the_members_that_the_library_finds(format: int) -> None:
    rows = [
        ("vm.ovf", tarfile.REGTYPE, b"x" * 1000), ("folder", tarfile.DIRTYPE, b""), ("link", tarfile.SYMTYPE, b""),
        ("hard", tarfile.LNKTYPE, b""), ("fifo", tarfile.FIFOTYPE, b""), ("empty", tarfile.REGTYPE, b""),
        ("old", tarfile.AREGTYPE, b"z" * 512), ("next", tarfile.CONTTYPE, b"w" * 513),
        ("vm.ovf", tarfile.REGTYPE, b"2"), ("ünïcode.mf", tarfile.REGTYPE, b"u"),
    ]  # fmt: skip
    if format != tarfile.USTAR_FORMAT:
        rows.append((LONG, tarfile.REGTYPE, b"long"))
    else:
        rows.append(("p" * 140 + "/" + "n" * 90, tarfile.REGTYPE, b"prefixed"))
    data = archive(format, *rows)
    with tarfile.open(fileobj=io.BytesIO(data)) as library:
        expected: dict[str, tuple[int, int]] = {}
        for member in library:
            if member.isreg():
                expected.setdefault(member.name, (member.offset_data, member.size))
    assert tar.members(MemoryNode(data)) == expected
    assert len(expected) == 6


def test_sizes_beyond_eight_gigabytes() -> None:
    size = 9 << 30
    found = tar.decode_member(header(b"disk", b"0", size))
    assert found == tar.Member(b"disk", b"0", size)
    attributes = b"19 size=%d\n" % size
    assert len(attributes) == 19
    with pytest.raises(ImageError, match=r"'disk' ends at 0x240000600"):
        tar.members(MemoryNode(header(b"x", b"x", 19) + attributes.ljust(512, b"\0") + header(b"disk", b"0", 0)))


def _chain_of(kind: bytes, size: int) -> bytes:
    return (header(b"x", kind, size) + b"a" * size + bytes(-size % 512)) * 3000 + header(b"vm.ovf", b"0", 0)


SPOILT: dict[str, tuple[Callable[[], bytes], str]] = {
    "checksum": (lambda: header(b"vm.ovf", b"0", 1)[:-1] + b"x", "checksum"),
    "size": (lambda: header(b"vm.ovf", b"0", 1 << 61), "past the end"),
    "negative size": (lambda: _negative(), "size in a header"),
    "sparse": (lambda: header(b"vm.ovf", b"S", 512), "sparse"),
    "too many": (lambda: header(b"vm.ovf", b"0", 0) * 5000, "more than 4096"),
    "too many links": (lambda: header(b"vm.ovf", b"1", 99) * 5000, "more than 4096"),
    "long name": (lambda: header(b"x", b"L", 5000) + bytes(5120), "5000 bytes"),
    "long attributes": (lambda: header(b"x", b"x", 1 << 20) + bytes(1 << 20), "1048576 bytes"),
    "attributes": (lambda: header(b"x", b"x", 512) + b"9" * 512, "attributes"),
    "attribute of no length": (lambda: header(b"x", b"x", 512) + b"0 a=b\n".ljust(512, b"\0"), "attributes"),
    "attribute without an end": (lambda: header(b"x", b"x", 512) + b"511 a=".ljust(512, b"9"), "attributes"),
}


def _negative() -> bytes:
    raw = bytearray(header(b"vm.ovf", b"0", 0))
    raw[124:136] = b"\xff" * 12
    raw[148:156] = b" " * 8
    raw[148:156] = b"%06o\0 " % sum(raw)
    return bytes(raw)


@pytest.mark.parametrize("name", SPOILT)
def test_damage(name: str) -> None:
    make, said = SPOILT[name]
    with pytest.raises(ImageError, match=said):
        tar.members(MemoryNode(make() + bytes(1024)))


def test_a_long_row_of_descriptions_is_no_recursion() -> None:
    started = time.process_time()
    assert list(tar.members(MemoryNode(_chain_of(b"L", 600)))) == ["a" * 600]
    with pytest.raises(ImageError, match="attributes"):
        tar.members(MemoryNode(_chain_of(b"x", 600)))
    assert time.process_time() - started < 2
