"""Content IDs, parents, both copies of the tables, streams, reopening."""

from __future__ import annotations

import struct
import zlib

import pytest

from byre.errors import Corrupt, ImageError, InvalidArgument, NotSupported, ReadOnly
from byre.graph.graph import Graph
from byre.io.extent import COMPRESSED
from byre.jobs.job import Control
from byre.protocols.memory import MemoryNode
from support import vmdk
from support.images import layer, new_image, open_image

MIB = 1 << 20
GRAIN = 65536


def cid_of(memory: MemoryNode) -> bytes:
    return memory.to_bytes().partition(b"\nCID=")[2].partition(b"\n")[0]


# -- content IDs and parents ----------------------------------------------------------------------


def test_the_first_write_changes_the_content_id_and_no_other() -> None:
    memory = new_image("vmdk", MIB)
    first = cid_of(memory)
    with open_image(memory, "vmdk") as image:
        image.flush()
        image.read(0, 100)
        assert cid_of(memory) == first
        image.write(0, b"a")
        second = cid_of(memory)
        assert second != first
        image.write(GRAIN, b"b")
        image.flush()
        assert cid_of(memory) == second
    open_image(memory, "vmdk").close()
    assert cid_of(memory) == second
    with open_image(memory, "vmdk") as image:
        image.write_zeroes(0, GRAIN)
    assert cid_of(memory) != second


@pytest.mark.parametrize("cid", ["1", "abc", "fffffffd"])
def test_content_ids_keep_their_width(cid: str) -> None:
    text = vmdk.descriptor(['RW 2048 SPARSE "memory"'], cid=cid)
    memory = MemoryNode(vmdk.hosted(bytes(MIB), text=text))
    with open_image(memory, "vmdk") as image:
        image.write(0, b"a")
    assert len(cid_of(memory)) == len(cid)
    assert cid_of(memory) != cid.encode()
    assert memory.to_bytes()[512:].count(b"# The Disk Data Base") == 1


def overlay(parent_cid: str, **options: object) -> MemoryNode:
    text = vmdk.descriptor(['RW 2048 SPARSE "memory"'], parent=parent_cid, more='parentFileNameHint="base"')
    return MemoryNode(vmdk.hosted(bytes(MIB), text=text, **options))  # type: ignore[arg-type]


def test_a_parent_that_was_changed_is_not_read() -> None:
    base = MemoryNode(vmdk.hosted(b"x" * MIB))
    graph = Graph()
    with open_image(overlay("12345678"), "vmdk", graph=graph, backing=layer(graph, base, "vmdk")) as image:
        assert image.read(0, 10) == b"x" * 10
    graph = Graph()
    with open_image(overlay("99"), "vmdk", graph=graph, backing=layer(graph, base, "vmdk")) as image:
        for use in (lambda: image.read(0, 10), lambda: image.write(0, b"a"), lambda: image.write(0, bytes(GRAIN))):
            with pytest.raises(ImageError, match="content ID 12345678, expected is 00000099"):
                use()
        assert len(image.node.extents(0, MIB))
    graph = Graph()
    with (
        open_image(
            overlay("12345678"), "vmdk", graph=graph, backing=layer(graph, MemoryNode(b"x" * MIB), "raw")
        ) as image,
        pytest.raises(ImageError, match="must be vmdk"),
    ):
        image.read(0, 10)


def test_zeroes_over_a_parent() -> None:
    base = MemoryNode(vmdk.hosted(b"x" * MIB))
    for zero_grains in (False, True):
        top = overlay("12345678", zero_grains=zero_grains, fill=False)
        graph = Graph()
        with open_image(top, "vmdk", graph=graph, backing=layer(graph, base, "vmdk")) as image:
            image.discard(2 * GRAIN, GRAIN)
            image.write_zeroes(0, GRAIN, unmap=True)
            assert image.read(0, 2 * GRAIN) == bytes(GRAIN) + b"x" * GRAIN
            assert image.read(2 * GRAIN, GRAIN) == (bytes(GRAIN) if zero_grains else b"x" * GRAIN)


# -- tables ---------------------------------------------------------------------------------------


def test_both_copies_are_written() -> None:
    memory = new_image("vmdk", 40 * MIB)
    with open_image(memory, "vmdk") as image:
        for offset in (0, 33 * MIB, 39 * MIB):
            image.write(offset, b"data")
        image.discard(0, GRAIN)
    assert vmdk.look_through(memory.to_bytes()) == ([], [])
    assert memory.to_bytes()[72] == 0


def test_an_extent_that_was_not_closed_is_mended_when_it_is_written() -> None:
    memory = MemoryNode(vmdk.hosted(b"x" * MIB, grain=4096, per_table=16))
    data = bytearray(memory.to_bytes())
    second = struct.unpack_from("<Q", data, 48)[0] * 512
    table = struct.unpack_from("<I", data, second + 4)[0] * 512
    data[table : table + 64] = bytes(64)
    assert vmdk.look_through(bytes(data)).unequal == ["table 1"]
    with open_image(MemoryNode(bytes(data)), "vmdk", read_only=True, check=True) as image:
        assert image.node.check(Control()).corruptions == 1  # type: ignore[attr-defined]
    data[72] = 1
    memory = MemoryNode(bytes(data))
    with open_image(memory, "vmdk", read_only=True, check=True) as image:
        result = image.node.check(Control())  # type: ignore[attr-defined]
        assert (result.corruptions, len(result.messages)) == (0, 1)
    open_image(memory, "vmdk").close()
    assert memory.to_bytes() == bytes(data)
    with open_image(memory, "vmdk") as image:
        image.write(0, b"y")
        assert memory.to_bytes()[72] == 1
    assert vmdk.look_through(memory.to_bytes()) == ([], [])
    assert memory.to_bytes()[72] == 0


def test_space_let_go_is_used_again() -> None:
    memory = new_image("vmdk", 8 * MIB)
    with open_image(memory, "vmdk") as image:
        image.write(0, b"x" * 4 * MIB)
        image.flush()
        size = memory.size
        image.discard(0, 4 * MIB)
        image.flush()
        image.write(4 * MIB, b"y" * 4 * MIB)
        assert memory.size == size
        assert image.read(0, 8 * MIB) == bytes(4 * MIB) + b"y" * 4 * MIB
    assert vmdk.look_through(memory.to_bytes()) == ([], [])


def test_nothing_is_written_into_the_metadata() -> None:
    data = bytearray(vmdk.hosted(b"x" * MIB, grain=4096))
    directory = struct.unpack_from("<Q", data, 56)[0] * 512
    table = struct.unpack_from("<I", data, directory)[0] * 512
    struct.pack_into("<I", data, table, 1)
    with open_image(MemoryNode(bytes(data)), "vmdk") as image:
        image.write(8192, b"fine")
        with pytest.raises(Corrupt, match="inside the metadata"):
            image.write(0, b"bad")


def test_writing_needs_a_writable_disk() -> None:
    memory = new_image("vmdk", MIB)
    with open_image(memory, "vmdk", read_only=True) as image:
        with pytest.raises(ReadOnly):
            image.write(0, b"a")
        image.reopen(read_only=False)
        image.write(0, b"a")
        image.reopen(read_only=True)
        assert vmdk.look_through(memory.to_bytes()) == ([], [])
        assert memory.to_bytes()[72] == 0
        image.reopen(read_only=False)
        image.write(GRAIN, b"b")
    with open_image(memory, "vmdk", read_only=True) as image:
        assert image.read(0, 1) + image.read(GRAIN, 1) == b"ab"


def test_a_disk_keeps_its_size() -> None:
    with open_image(new_image("vmdk", MIB), "vmdk") as image, pytest.raises(NotSupported, match="size"):
        image.resize(2 * MIB)


def test_many_tables_in_a_small_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("byre.formats.vmdk.opening._CACHE_BYTES", 4 * 64)
    memory = MemoryNode(vmdk.hosted(bytes(MIB), grain=512, per_table=16))
    with open_image(memory, "vmdk") as image:
        for offset in range(0, MIB, 8192):
            image.write(offset + 700, offset.to_bytes(4, "little"))
        for offset in range(0, MIB, 8192):
            assert image.read(offset + 700, 4) == offset.to_bytes(4, "little")
    assert vmdk.look_through(memory.to_bytes()) == ([], [])


# -- streams --------------------------------------------------------------------------------------


def stream() -> MemoryNode:
    return new_image("vmdk", 4 * GRAIN + 4096, subformat="streamOptimized")


def test_a_stream_takes_each_grain_once() -> None:
    memory = stream()
    with open_image(memory, "vmdk") as image:
        image.write(GRAIN, b"a" * 2 * GRAIN)
        image.write(4 * GRAIN, b"tail" * 1024)
        with pytest.raises(NotSupported, match="written already"):
            image.write(2 * GRAIN, b"b" * GRAIN)
        with pytest.raises(NotSupported, match="once"):
            image.write_zeroes(GRAIN, GRAIN)
        image.write_zeroes(0, GRAIN)
        for offset, length in ((5, 10), (0, 1000), (GRAIN + 512, GRAIN)):
            with pytest.raises(InvalidArgument, match="whole grains"):
                image.write(offset, b"c" * length)
        image.write(0, b"d" * GRAIN)
        image.flush()
    with open_image(memory, "vmdk", read_only=True) as image:
        assert image.read(0, image.size) == b"d" * GRAIN + b"a" * 2 * GRAIN + bytes(GRAIN) + b"tail" * 1024
        assert image.read(GRAIN - 5, 10) == b"d" * 5 + b"a" * 5
    assert vmdk.look_through(memory.to_bytes()) == ([], [])
    assert memory.size % 512 == 0


def test_what_does_not_shrink_is_compressed_all_the_same() -> None:
    import random

    data = random.Random(1).randbytes(GRAIN)
    memory = stream()
    with open_image(memory, "vmdk") as image:
        image.write_compressed(0, data)
    with open_image(memory, "vmdk", read_only=True) as image:
        assert image.read(0, GRAIN) == data
        assert image.node.extents(0, GRAIN).kind.tolist() == [COMPRESSED]


@pytest.mark.parametrize("damage", ["size", "huge", "data", "short", "long"])
def test_damaged_grains(damage: str) -> None:
    grain = 4096
    data = bytearray(vmdk.stream(b"x" * grain * 2, grain=grain, per_table=4))
    at = 21 * 512
    if damage == "size":
        data[at + 8 : at + 12] = bytes(4)
    elif damage == "huge":
        data[at + 8 : at + 12] = b"\xff" * 4
    elif damage == "data":
        data[at + 16] ^= 0x55
    else:
        packed = zlib.compress(b"y" * (grain + 1 if damage == "long" else grain))
        packed = packed[:-6] if damage == "short" else packed
        struct.pack_into("<QI", data, at, 0, len(packed))
        data[at + 12 : at + 12 + len(packed)] = packed
    with open_image(MemoryNode(bytes(data)), "vmdk", read_only=True) as image:
        with pytest.raises(Corrupt, match="guest offset 0x0"):
            image.read(100, 10)
        assert image.read(grain, grain) == b"x" * grain


def test_a_short_last_grain_is_followed_by_zeroes() -> None:
    content = b"x" * 4096 + b"y" * 1024
    with open_image(MemoryNode(vmdk.stream(content, grain=4096, per_table=4)), "vmdk", read_only=True) as image:
        assert image.read(0, image.size) == content


def test_compression_levels() -> None:
    for level in (1, 3, 4, 9):
        memory = stream()
        with open_image(memory, "vmdk") as image:
            image.node.compression_level = level  # type: ignore[attr-defined]
            image.write(0, b"level" * 13107 + b"!")
        with open_image(memory, "vmdk", read_only=True) as image:
            assert image.read(0, GRAIN) == b"level" * 13107 + b"!"
    with open_image(stream(), "vmdk") as image:
        image.node.compression_level = 10  # type: ignore[attr-defined]
        with pytest.raises(InvalidArgument, match="level"):
            image.write(0, bytes(GRAIN - 1) + b"x")
