"""Checking, and making the copies of the tables equal."""

from __future__ import annotations

import struct

import pytest

from byre.errors import NotSupported
from byre.formats.abilities import CheckResult
from byre.jobs.job import Control
from byre.protocols.memory import MemoryNode
from support import vmdk
from support.images import open_image

MIB = 1 << 20
DATA = vmdk.hosted(b"x" * MIB, grain=4096, per_table=16)
DIRECTORY = struct.unpack_from("<Q", DATA, 56)[0] * 512
TABLE = struct.unpack_from("<I", DATA, DIRECTORY)[0] * 512


def check(data: bytes, fix: str = "") -> tuple[CheckResult, bytes]:
    memory = MemoryNode(data)
    with open_image(memory, "vmdk", read_only=not fix, check=True) as image:
        result: CheckResult = image.node.check(Control(), fix)  # type: ignore[attr-defined]
    return result, memory.to_bytes()


def with_entry(number: int, entry: int) -> bytes:
    data = bytearray(DATA)
    struct.pack_into("<I", data, TABLE + number * 4, entry)
    return bytes(data)


def test_good_disks() -> None:
    for data in (DATA, vmdk.stream(b"x" * MIB), vmdk.cowd(b"x" * MIB), vmdk.sesparse(b"x" * MIB),
                 vmdk.hosted(bytes(MIB), zero_grains=True, version=2)):  # fmt: skip
        result, after = check(data)
        assert result == CheckResult(), result.messages
        assert after == data


@pytest.mark.parametrize(
    ("entry", "words"),
    [(len(DATA) // 512, "sector 24 points after EOF"), (0xFFFFFFF0, "points after EOF"), (3, "into the metadata")],
)
def test_grains_outside(entry: int, words: str) -> None:
    result, _ = check(with_entry(3, entry))
    assert any(words in message for message in result.messages), result.messages
    assert result.corruptions == 2  # and the second copy differs


def test_grains_that_share_a_place() -> None:
    other = struct.unpack_from("<I", DATA, TABLE + 20)[0]
    for entry in (other, other + 1):
        result, _ = check(with_entry(3, entry))
        assert any("share the place" in message for message in result.messages)


def test_tables_outside() -> None:
    data = bytearray(DATA)
    struct.pack_into("<I", data, DIRECTORY + 4, 0x00FFFFFF)
    result, _ = check(bytes(data))
    assert result.corruptions == 1
    assert "could not get cluster_offset for sector 128" in result.messages[0]


def test_copies_that_differ_are_made_equal() -> None:
    second = struct.unpack_from("<Q", DATA, 48)[0] * 512
    for clear in (False, True):
        data = bytearray(DATA)
        if clear:
            struct.pack_into("<I", data, second + 8, 0)  # the second copy of a table is missing
        else:
            table = struct.unpack_from("<I", data, second + 8)[0] * 512
            data[table] ^= 1
        assert check(bytes(data))[0].corruptions == 1
        result, mended = check(bytes(data), "all")
        assert (result.corruptions, result.corruptions_fixed) == (0, 1)
        assert vmdk.look_through(mended) == ([], [])
        with open_image(MemoryNode(mended), "vmdk", read_only=True) as image:
            assert image.read(0, MIB) == b"x" * MIB
            assert image.node.cid == 0x12345678  # type: ignore[attr-defined]


def test_an_unclean_extent_is_clean_afterwards() -> None:
    data = bytearray(DATA)
    data[72] = 1
    assert check(bytes(data))[0] == CheckResult()
    result, mended = check(bytes(data), "all")
    assert result == CheckResult()
    assert mended[72] == 0


def test_leaks_are_none() -> None:
    result, after = check(DATA + bytes(MIB), "leaks")
    assert result == CheckResult()
    assert after == DATA + bytes(MIB)


def test_what_can_only_be_read_is_not_mended() -> None:
    memory = MemoryNode(vmdk.cowd(b"x" * MIB))
    with open_image(memory, "vmdk", read_only=True) as image, pytest.raises(NotSupported):
        image.node.check(Control(), "all")  # type: ignore[attr-defined]
