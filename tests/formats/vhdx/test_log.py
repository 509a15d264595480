"""The log: checksums, entries, which sequence counts, and replaying it in memory and into the file."""

from __future__ import annotations

import random
import uuid
from collections.abc import Callable

import pytest

from byre.errors import ImageError
from byre.formats.vhdx import log
from byre.formats.vhdx.crc32c import crc32c
from byre.formats.vhdx.image import VhdxNode
from byre.protocols.memory import MemoryNode
from support import forged_vhd as forged
from support.forged_vhd import FULL, MIB, Block, Vhdx, log_entry
from support.images import open_image

GUID = uuid.UUID(int=0x106)
PAGE = bytes(range(256)) * 16


# -- CRC-32C ------------------------------------------------------------------------------------------


def test_known_values() -> None:
    assert crc32c(b"123456789") == 0xE3069283
    assert crc32c(bytes(32)) == 0x8A9136AA
    assert crc32c(b"") == 0


@pytest.mark.parametrize("length", [1, 255, 4096, 16383, 16384, 20001, 65536, 5 * 4096, 131072 + 17])
def test_every_way_of_computing_it_agrees(length: int) -> None:
    data = random.Random(length).randbytes(length)
    for tail in (0, 1, 4095):
        assert crc32c(data + bytes(tail)) == forged.crc32c(data + bytes(tail))


# -- entries ------------------------------------------------------------------------------------------


def test_what_is_written_is_what_another_implementation_writes() -> None:
    pages = [(2 * MIB, PAGE), (3 * MIB + 4096, PAGE[::-1])]
    made = log.encode_entry(pages, 7, 8192, GUID.bytes_le, 5 * MIB)
    assert made == log_entry(pages, 7, GUID, tail=8192, flushed=5 * MIB, last=5 * MIB)
    entry = log.decode_entry(made)
    assert [(write.offset, write.data) for write in entry.writes] == pages
    assert (entry.sequence_number, entry.tail, entry.length) == (7, 8192, 3 * 4096)


def test_many_descriptors_take_several_sectors() -> None:
    pages = [(4096 * number, PAGE) for number in range(1, 400)]
    entry = log.decode_entry(log_entry(pages, 1, GUID))
    assert [write.offset for write in entry.writes] == [at for at, _ in pages]
    assert all(write.data == PAGE for write in entry.writes)


@pytest.mark.parametrize("at", [0, 4, 8, 16, 24, 40, 64, 80, 96, 4096, 4100, 8188])
def test_an_entry_with_a_wrong_byte_is_none(at: int) -> None:
    data = bytearray(log_entry([(MIB, PAGE)], 3, GUID))
    data[at] ^= 1
    with pytest.raises(ImageError):
        log.decode_entry(data)


Ring = Callable[[dict[int, bytes]], bytes]


@pytest.fixture
def ring() -> Ring:
    def build(entries: dict[int, bytes]) -> bytes:
        data = bytearray(MIB)
        for at, entry in entries.items():
            fits = min(len(entry), MIB - at)
            data[at : at + fits] = entry[:fits]
            data[: len(entry) - fits] = entry[fits:]
        return bytes(data)

    return build


def numbers(data: bytes) -> list[int]:
    return [entry.sequence_number for entry in log.find_sequence(data, GUID.bytes_le)]


def test_the_newest_sequence_counts(ring: Ring) -> None:
    one = [log_entry([(MIB, PAGE)], number, GUID) for number in (4, 5, 6)]
    step = len(one[0])
    old = log_entry([(MIB, PAGE)], 2, GUID, tail=40960)
    assert numbers(ring({40960: old, **{number * step: entry for number, entry in enumerate(one)}})) == [4, 5, 6]


def test_a_tail_in_the_middle_leaves_out_what_is_done(ring: Ring) -> None:
    first = log_entry([(MIB, PAGE)], 4, GUID)
    second = log_entry([(MIB, PAGE)], 5, GUID, tail=len(first))
    third = log_entry([(MIB, PAGE)], 6, GUID, tail=len(first))
    assert numbers(ring({0: first, 8192: second, 16384: third})) == [5, 6]


def test_an_entry_that_is_torn_does_not_count(ring: Ring) -> None:
    good, torn = log_entry([(MIB, PAGE)], 4, GUID), bytearray(log_entry([(MIB, PAGE)], 5, GUID))
    torn[5000] ^= 1
    assert numbers(ring({0: good, 8192: bytes(torn)})) == [4]


def test_an_entry_may_go_round_the_end_of_the_ring(ring: Ring) -> None:
    at = MIB - 4096
    first = log_entry([(MIB, PAGE)], 9, GUID, tail=at)
    second = log_entry([(MIB, PAGE)], 10, GUID, tail=at)
    assert numbers(ring({at: first, 4096: second})) == [9, 10]


def test_a_tail_that_leads_nowhere_stands_for_the_entry_alone(ring: Ring) -> None:
    assert numbers(ring({0: log_entry([(MIB, PAGE)], 9, GUID, tail=65536)})) == [9]


def test_entries_of_another_session_do_not_count(ring: Ring) -> None:
    assert numbers(ring({0: log_entry([(MIB, PAGE)], 9, uuid.UUID(int=5))})) == []


def test_entries_that_overlap_without_end_are_refused(ring: Ring) -> None:
    """Every sector claims to begin an entry as long as the log: that would be 256 checksums of a mebibyte."""
    entry = log_entry([(MIB, 4096)], 1, GUID)
    head = bytearray(entry[:4096])
    head[8:12] = MIB.to_bytes(4, "little")
    with pytest.raises(ImageError, match="overlap"):
        numbers(ring({at: bytes(head) for at in range(0, MIB, 4096)}))


# -- replay -------------------------------------------------------------------------------------------


def logged(*writes: tuple[int, bytes | int], length: int = 6 * MIB, **more: int) -> bytes:
    """A disk of 4 MiB whose block 0 lies at 4 MiB and whose log holds ``writes``."""
    entry = log_entry(writes, 3, GUID, last=length, **more)
    return Vhdx(blocks={0: Block(FULL, b"old" * 1000)}, log=entry, log_guid=GUID).build()


def table_page(**entries: int) -> bytes:
    """The first page of the block table with block ``b0``, ``b1``, ... set."""
    page = bytearray(4096)
    for name, entry in entries.items():
        page[8 * int(name[1:]) : 8 * int(name[1:]) + 8] = entry.to_bytes(8, "little")
    return bytes(page)


def test_reading_only_replays_in_memory_and_changes_not_one_byte() -> None:
    data = logged((2 * MIB, table_page(b0=4 * MIB | FULL, b1=5 * MIB | FULL)), length=6 * MIB)
    memory = MemoryNode(data)
    with open_image(memory, "vhdx", read_only=True) as image:
        assert image.read(0, 6) == b"oldold"
        assert image.read(MIB, 10) == bytes(10)
        assert [extent.host for extent in image.extents(0, 2 * MIB)] == [4 * MIB]
        assert not image.node.format_info()["log-empty"]  # type: ignore[attr-defined]
    assert memory.to_bytes() == data


def test_data_in_the_log_is_read_from_it() -> None:
    memory = MemoryNode(logged((4 * MIB + 4096, PAGE), (4 * MIB + 8192, 4096), (4 * MIB, 4096)))
    with open_image(memory, "vhdx", read_only=True) as image:
        assert image.read(0, 4096) == bytes(4096)
        assert image.read(4000, 4200) == bytes(96) + PAGE + bytes(8)
    before = memory.to_bytes()
    with open_image(memory, "vhdx") as image:
        assert image.read(4000, 4200) == bytes(96) + PAGE + bytes(8)
    assert memory.to_bytes() != before


def test_opening_for_writing_replays_into_the_file_and_empties_the_log() -> None:
    memory = MemoryNode(logged((2 * MIB, table_page(b0=5 * MIB | FULL))))
    with open_image(memory, "vhdx") as image:
        assert isinstance(image.node, VhdxNode)
        assert image.node.replayed
        assert memory.size == 6 * MIB
        assert image.read(0, 3) == bytes(3)
    with open_image(memory, "vhdx", read_only=True) as image:
        assert image.node.format_info()["log-empty"]  # type: ignore[attr-defined]
        assert image.read(0, 3) == bytes(3)


def test_reopening_for_writing_replays_then() -> None:
    memory = MemoryNode(logged((2 * MIB, table_page(b1=4 * MIB | FULL))))
    with open_image(memory, "vhdx", read_only=True) as image:
        assert image.read(MIB, 3) == b"old"
        image.reopen(read_only=False)
        assert image.read(MIB, 3) == b"old"
        image.write(MIB, b"new")
    with open_image(memory, "vhdx", read_only=True) as image:
        assert image.read(0, 3) == bytes(3)
        assert image.read(MIB, 3) == b"new"


def test_a_file_that_was_cut_short_is_refused() -> None:
    for read_only in (True, False):
        with pytest.raises(ImageError, match="had 7340032 when its log was written"):
            open_image(
                MemoryNode(logged((2 * MIB, PAGE), flushed=7 * MIB, length=8 * MIB)), "vhdx", read_only=read_only
            )


def test_a_log_that_writes_past_the_end_is_refused() -> None:
    with pytest.raises(ImageError, match="past the end"):
        open_image(MemoryNode(logged((1 << 50, PAGE))), "vhdx")


def test_a_log_too_long_to_hold_is_refused() -> None:
    length = log.LOG_LIMIT + MIB
    data = Vhdx(log_guid=GUID, log_length=length, log_offset=8 * MIB).build()
    with pytest.raises(ImageError, match=r"log of .* would have to be replayed, allowed are 16777216"):
        open_image(MemoryNode(data, size=8 * MIB + length), "vhdx", read_only=True)
    # Without anything in it, it may be as long as it likes.
    clean = Vhdx(log_length=length, log_offset=8 * MIB).build()
    with open_image(MemoryNode(clean, size=8 * MIB + length), "vhdx") as image:
        image.write(0, b"x")
