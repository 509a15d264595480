"""parallels: contract with both magics, header, in use, check and repair, dirty bitmaps."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator
from typing import Any

import pytest

from byre.catalog import probe
from byre.errors import ByreError, Corrupt, ImageError, InvalidArgument, NotSupported
from byre.filters.faults import FaultNode
from byre.formats.parallels import layout
from byre.graph.node import Node
from byre.image import Image
from byre.io.extent import DATA, UNALLOCATED
from byre.jobs.job import Control
from byre.protocols.memory import MemoryNode
from contracts.node import FormatContract, patchwork
from contracts.test_formats import scattered
from support.images import new_image, open_image

MIB = 1 << 20
CLUSTER = 4096


def forged(size: int, tracks: int, magic: bytes = layout.MAGIC_SECTORS, **fields: Any) -> MemoryNode:
    """An empty image as older programs made it; ``data_sector`` 0 means behind the BAT."""
    entries = -(-size // (tracks * 512))
    header = layout.Header(magic, tracks=tracks, entries=entries, sectors=size // 512, in_use=0)._replace(**fields)
    return MemoryNode((layout.encode_header(header) + bytes(4 * entries)).ljust(header.data_offset(1 << 40)[0], b"\0"))


def small(size: int = MIB) -> MemoryNode:
    return new_image("parallels", size, cluster_size=CLUSTER)


def header_of(memory: MemoryNode) -> layout.Header:
    return layout.decode_header(memory.to_bytes()[:64])


def checked(image: Image, fix: str = "") -> Any:
    return image.node.check(Control(), fix)  # type: ignore[attr-defined]


class Contract(FormatContract):
    content = patchwork(1 << 20)

    def image(self) -> tuple[MemoryNode, int]:
        raise NotImplementedError

    @pytest.fixture
    def node(self) -> Iterator[Node]:
        memory, cluster = self.image()
        with open_image(memory, "parallels") as image:
            scattered(image, self.content, cluster)
            yield image.node
            closing = len(image.node.parents) == 1
        if not closing:
            return  # the test holds it by another handle
        assert header_of(memory).in_use == layout.CLOSED
        with open_image(memory, "parallels", read_only=True) as image:
            assert checked(image)[:3] == (0, 0, 0)


class TestContract(Contract):
    def image(self) -> tuple[MemoryNode, int]:
        return new_image("parallels", len(self.content), cluster_size=65536), 65536


class TestSmallClusters(Contract):
    def image(self) -> tuple[MemoryNode, int]:
        return small(len(self.content)), CLUSTER


class TestOldMagic(Contract):
    """Clusters of 63 sectors, data right behind the BAT."""

    def image(self) -> tuple[MemoryNode, int]:
        return forged(len(self.content), 63), 63 * 512


class TestOldMagicWithOffset(Contract):
    def image(self) -> tuple[MemoryNode, int]:
        return forged(len(self.content), 8, data_sector=40), CLUSTER


def test_probing_and_header() -> None:
    for memory in (small(), forged(MIB, 8)):
        data = memory.to_bytes()
        assert probe(data).name == "parallels"
        assert layout.encode_header(layout.decode_header(data)) == data[:64]
    header = header_of(new_image("parallels", 100 * MIB))
    assert (header.tracks, header.entries, header.data_sector, header.sectors) == (2048, 100, 2048, 204800)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"magic": b"x" * 16}, "not a Parallels image"),
        ({"version": 1}, "version 1"),
        ({"tracks": 0}, "cluster has 0 sectors"),
        ({"tracks": 0xFFFFFFFF}, "expected 1 to 2097152"),
        ({"entries": 1 << 30}, "allowed are 33554432"),
        ({"entries": 10}, "room for 80"),
        ({"entries": 1 << 22}, "past the end of the file"),
        ({"sectors": 1 << 62}, "room for"),
    ],
)
def test_refusals(change: dict[str, Any], said: str) -> None:
    data = bytearray(small().to_bytes())
    data[:64] = layout.encode_header(layout.decode_header(data)._replace(**change))
    with pytest.raises(ImageError, match=said):
        open_image(MemoryNode(bytes(data)), "parallels")


@pytest.mark.parametrize("sector", [1, 1 << 40, 1 << 54, (1 << 63) - 1, 1 << 63, (1 << 64) - 1, 0x80000000000000])
def test_a_format_extension_that_lies_nowhere_is_an_error(sector: int) -> None:
    data = bytearray(small().to_bytes())
    struct.pack_into("<Q", data, 56, sector)

    def use() -> None:
        with open_image(MemoryNode(bytes(data)), "parallels", read_only=True) as image:
            assert image.read(0, 512) == bytes(512)
            image.node.format_info()  # type: ignore[attr-defined]

    with pytest.raises(ImageError, match="extension"):
        use()


def test_kinds_and_freed_clusters() -> None:
    memory = small()
    with open_image(memory, "parallels") as image:
        image.write(0, b"x" * 5 * CLUSTER)
        image.flush()
        size = memory.size
        image.discard(CLUSTER, 2 * CLUSTER)
        rows = [(row.offset, row.length, row.kind) for row in image.extents(0, 6 * CLUSTER)]
        assert rows == [(0, CLUSTER, DATA), (CLUSTER, 2 * CLUSTER, UNALLOCATED), (3 * CLUSTER, 2 * CLUSTER, DATA),
                        (5 * CLUSTER, CLUSTER, UNALLOCATED)]  # fmt: skip
        image.flush()
        image.write(10 * CLUSTER, b"y" * 2 * CLUSTER)
        image.write(20 * CLUSTER + 5, b"z")
        assert image.read(20 * CLUSTER, CLUSTER) == bytes(5) + b"z" + bytes(CLUSTER - 6)
        image.flush()
        assert memory.size == size + CLUSTER
        assert checked(image)[:3] == (0, 0, 0)


@pytest.mark.parametrize("unmap", [False, True])
def test_zeroes_let_whole_clusters_go(unmap: bool) -> None:
    memory = small()
    with open_image(memory, "parallels") as image:
        image.write(0, b"x" * 4 * CLUSTER)
        image.flush()
        image.write_zeroes(CLUSTER, 2 * CLUSTER + 100, unmap=unmap)
        rows = [(row.offset, row.length, row.kind) for row in image.extents(0, 4 * CLUSTER)]
        assert rows == [(0, CLUSTER, DATA), (CLUSTER, 2 * CLUSTER, UNALLOCATED), (3 * CLUSTER, CLUSTER, DATA)]
        assert image.read(CLUSTER, 3 * CLUSTER) == bytes(2 * CLUSTER + 100) + b"x" * (CLUSTER - 100)


def test_holes_are_found_again_when_opened() -> None:
    memory = small()
    with open_image(memory, "parallels") as image:
        image.write(0, b"x" * 5 * CLUSTER)
        image.flush()
        image.discard(CLUSTER, 2 * CLUSTER)
    size = memory.size
    with open_image(memory, "parallels") as image:
        image.write(10 * CLUSTER + 100, b"y" * CLUSTER)
        assert image.read(10 * CLUSTER, 100) == bytes(100)
    assert memory.size == size


def test_an_entry_outside_is_named_where_it_is_met() -> None:
    for entry in (1000, 0xFFFFFFFF):
        data = bytearray(small().to_bytes())
        struct.pack_into("<I", data, 64 + 4 * 5, entry)
        with open_image(MemoryNode(bytes(data)), "parallels", read_only=True) as image:
            assert image.read(0, CLUSTER) == bytes(CLUSTER)
            for request in (lambda: image.read(5 * CLUSTER, 1), image.extents):
                with pytest.raises(Corrupt, match="BAT entry 5 points to"):
                    request()


# -- in use, check and repair ---------------------------------------------------------------------


def test_in_use() -> None:
    memory = small()
    with open_image(memory, "parallels") as image:
        assert header_of(memory).in_use == layout.CLOSED
        image.write(0, b"x")
        assert header_of(memory).in_use == layout.IN_USE
        assert checked(image)[:3] == (0, 0, 0)
        image.reopen(read_only=True)
        assert header_of(memory).in_use == layout.CLOSED
        image.reopen(read_only=False)
        image.write(0, b"y")
        assert header_of(memory).in_use == layout.IN_USE
    assert header_of(memory).in_use == layout.CLOSED


def damaged(*, entries: dict[int, int] | None = None, grown: int = 0, **fields: int) -> MemoryNode:
    memory = small()
    with open_image(memory, "parallels") as image:
        image.write(0, b"0" * CLUSTER + b"1" * CLUSTER + b"2" * CLUSTER)
    data = bytearray(memory.to_bytes())
    data[:64] = layout.encode_header(layout.decode_header(data)._replace(**fields))
    for index, entry in (entries or {}).items():
        struct.pack_into("<I", data, 64 + 4 * index, entry)
    return MemoryNode(bytes(data) + b"\xee" * grown)


def look(memory: MemoryNode) -> Any:
    with open_image(MemoryNode(memory.to_bytes()), "parallels", read_only=True, check=True) as image:
        return checked(image)


def mend(memory: MemoryNode, fix: str = "all") -> Any:
    with open_image(memory, "parallels", check=True) as image:
        return checked(image, fix)


def test_check_of_a_sound_image() -> None:
    found = look(damaged())
    assert found[:3] == (0, 0, 0)
    assert (found.total_clusters, found.allocated_clusters, found.fragmented_clusters) == (256, 3, 0)
    assert found.image_end_offset == 4 * CLUSTER


def test_not_closed() -> None:
    memory = damaged(in_use=layout.IN_USE)
    found = look(memory)
    assert (found.corruptions, found.messages) == (1, ("ERROR image was not closed correctly",))
    assert mend(memory).corruptions_fixed == 1
    assert look(memory)[:3] == (0, 0, 0)
    assert header_of(memory).in_use == layout.CLOSED


def test_where_the_data_begin() -> None:
    for sector in (0, 1, 1 << 30):
        memory = damaged(data_sector=sector)
        assert "ERROR data_off field has incorrect value" in look(memory).messages
        assert mend(memory).corruptions == 0
        assert look(memory)[:3] == (0, 0, 0)
        assert header_of(memory).data_sector == 8


def test_data_that_begin_between_two_clusters() -> None:
    """Entries count clusters: nothing that is written there could be found again."""
    memory = damaged(data_sector=9)
    assert look(memory).corruptions == 1
    with open_image(memory, "parallels") as image:
        image.write(CLUSTER * 7, b"x" * CLUSTER)
        assert image.read(0, 1) == b"0"
        assert image.read(CLUSTER * 7, CLUSTER) == b"x" * CLUSTER
    assert look(memory)[:3] == (0, 0, 0)


def test_outside() -> None:
    memory = damaged(entries={1: 500, 2: 600})
    found = look(memory)
    assert (found.corruptions, found.leaks) == (2, 2)
    assert "ERROR cluster 1 is outside image" in found.messages
    found = mend(memory)
    assert (found.corruptions, found.corruptions_fixed, found.leaks_fixed) == (0, 2, 2)
    assert look(memory)[:3] == (0, 0, 0)
    with open_image(memory, "parallels") as image:
        assert image.read(0, 3 * CLUSTER) == b"0" * CLUSTER + bytes(2 * CLUSTER)


def test_duplicates() -> None:
    memory = damaged(entries={9: 3, 10: 3})
    found = look(memory)
    assert (found.corruptions, found.leaks) == (2, 0)
    assert "ERROR duplicate offset in BAT entry 9" in found.messages
    assert mend(memory).corruptions_fixed == 2
    assert look(memory)[:3] == (0, 0, 0)
    with open_image(memory, "parallels") as image:
        image.write(9 * CLUSTER, b"changed")
        assert image.read(2 * CLUSTER, CLUSTER) == b"2" * CLUSTER
        assert image.read(10 * CLUSTER, CLUSTER) == b"2" * CLUSTER


def test_leaks() -> None:
    memory = damaged(grown=2 * CLUSTER + 5)
    found = look(memory)
    assert (found.corruptions, found.leaks) == (0, 3)
    assert found.messages == (f"ERROR space leaked at the end of the image {2 * CLUSTER + 5}",)
    found = mend(memory, "leaks")
    assert (found.leaks, found.leaks_fixed) == (0, 3)
    assert memory.size == 4 * CLUSTER


def test_opening_for_writing_mends() -> None:
    memory = damaged(in_use=layout.IN_USE, entries={1: 500})
    with open_image(memory, "parallels") as image:
        assert "Repairing image was not closed correctly" in image.graph.repairs
        assert image.read(0, 3 * CLUSTER) == b"0" * CLUSTER + bytes(CLUSTER) + b"2" * CLUSTER
    assert look(memory)[:3] == (0, 0, 0)


# -- dirty bitmaps --------------------------------------------------------------------------------


def with_bitmap(granularity: int = 8, *, flags: int = 0, kind: int = 0x20385FAE252CB34A, **change: Any) -> MemoryNode:
    """256 clusters, one bit each: the extension in cluster 4, the bits in cluster 5."""
    data = bytearray(damaged().to_bytes())
    bits = bytearray(CLUSTER)
    bits[0], bits[31] = 0b101, 0x80
    table = change.get("table", (5 * 8,))
    body = struct.pack("<Q16sII", change.get("sectors", 2048), bytes(range(16)), granularity, len(table))
    body += struct.pack(f"<{len(table)}Q", *table)
    features = struct.pack("<QQII", kind, flags, len(body), 0) + body + bytes(-len(body) % 8) + bytes(24)
    rest = features.ljust(CLUSTER - 24, b"\0")
    checksum = change.get("checksum", hashlib.md5(rest).digest())
    data += struct.pack("<Q16s", 0xAB234CEF23DCEA87, checksum) + rest + bits
    struct.pack_into("<Q", data, 56, 4 * 8)
    return MemoryNode(bytes(data))


NAME = "00010203-0405-0607-0809-0a0b0c0d0e0f"


def test_bitmaps_are_read() -> None:
    memory = with_bitmap()
    with open_image(memory, "parallels", read_only=True) as image:
        node: Any = image.node
        assert node.format_info() == {"bitmaps": [{"flags": [], "name": NAME, "granularity": 4096}]}
        store = node.bitmap_store()
        assert store.entries() == [(NAME, 4096, False)]
        bitmap = store.find(NAME)
        assert [index for index in range(256) if bitmap.get(index * 4096)] == [0, 2, 255]
        with pytest.raises(NotSupported):
            store.remove(NAME)
        with pytest.raises(NotSupported):
            store.add("new")
        assert checked(image)[:3] == (0, 0, 0)  # what belongs to the extension is no leak


def test_all_ones_and_none() -> None:
    for table, count in (((1,), 256), ((0,), 0)):
        with open_image(with_bitmap(table=table), "parallels", read_only=True) as image:
            node: Any = image.node
            assert node.bitmap_store().find(NAME).dirty_bytes == count * 4096


def test_bitmaps_go_with_the_first_write() -> None:
    memory = with_bitmap()
    with open_image(memory, "parallels") as image:
        node: Any = image.node
        assert node.bitmap_store().entries() == []
        assert header_of(memory).extension_sector == 32
        image.write(0, b"x")
        assert header_of(memory).extension_sector == 0
    assert look(memory)[:3] == (0, 0, 0)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"checksum": bytes(16)}, "checksum"),
        ({"sectors": 5}, "5 sectors"),
        ({"granularity": 3}, "granularity"),
        ({"granularity": 0}, "granularity"),
        ({"kind": 99, "flags": 1}, "unknown feature 0x63, which is necessary"),
        ({"table": (1, 1)}, "table of dirty bitmap"),
        ({"table": (1 << 40,)}, "part of dirty bitmap"),
        ({"table": (1 << 63,)}, "part of dirty bitmap"),
    ],
)
def test_broken_bitmaps(change: dict[str, Any], said: str) -> None:
    with open_image(with_bitmap(**change), "parallels", read_only=True) as image:
        node: Any = image.node
        with pytest.raises(ImageError, match=said):
            node.bitmap_store().all()


@pytest.mark.parametrize("entry", [1 << 60, 0xFFFFFFFE, 5 * 8 + 1])
def test_bits_that_lie_nowhere_do_not_push_clusters_away(entry: int) -> None:
    memory = with_bitmap(table=(entry,))
    data = bytearray(memory.to_bytes())
    struct.pack_into("<2I", data, 64 + 4 * 100, 1 << 20, 1)  # outside, and a cluster that another entry has
    memory = MemoryNode(bytes(data))
    with open_image(memory, "parallels", check=True) as image:
        result = checked(image, "all")
        assert (result.corruptions, result.corruptions_fixed) == (0, 2)
    assert len(memory.to_bytes()) <= 9 * CLUSTER
    with open_image(memory, "parallels") as image:
        image.write(7 * CLUSTER, b"x" * CLUSTER)
        assert image.read(7 * CLUSTER, CLUSTER) == b"x" * CLUSTER
        assert image.read(101 * CLUSTER, 1) == image.read(0, 1) == b"0"
    assert look(memory)[:3] == (0, 0, 0)


def test_unknown_features_are_passed_over() -> None:
    with open_image(with_bitmap(kind=99), "parallels", read_only=True) as image:
        assert image.node.format_info() == {"bitmaps": []}  # type: ignore[attr-defined]


# -- size and creation ----------------------------------------------------------------------------


def test_growing() -> None:
    memory = small(MIB - 512)
    with open_image(memory, "parallels") as image:
        image.write(0, b"x" * (MIB - 512))
        image.resize(2 * MIB)
        assert image.read(MIB - 512, MIB + 512) == bytes(MIB + 512)
        image.write(2 * MIB - 100, b"y" * 100)
        with pytest.raises(NotSupported, match="room for"):
            image.resize(1 << 40)
        with pytest.raises(NotSupported, match="shrink"):
            image.resize(512, shrink=True)
    assert look(memory)[:3] == (0, 0, 0)
    assert header_of(memory).entries == 512


def test_creation_refuses() -> None:
    for size, cluster in ((MIB, 0), (MIB, 2 << 30), (1 << 40, 512)):
        with pytest.raises(InvalidArgument):
            new_image("parallels", size, cluster_size=cluster)
    assert header_of(new_image("parallels", 1000, cluster_size=1000)).tracks == 2


def test_failures_leave_nothing_behind() -> None:
    for kind in ("write", "flush", "any"):
        for number in range(1, 40):
            memory, fault = small(), FaultNode()
            image = open_image(memory, "parallels", filters=[fault])
            fault.fail(kind, number)
            failed = False
            try:
                image.write(1000, b"a" * 10_000)
                image.flush()
                image.discard(4096, 4096)
                image.write(60_000, b"b" * 5000)
                image.flush()
            except ByreError:
                failed = True
            fault.heal()
            node: Any = image.node
            assert node.inflight.claim_count == 0
            assert node.inflight.ticket_count == 0
            if node.failure is None:
                image.write(60_000, b"c" * 5000)
                assert image.read(60_000, 5000) == b"c" * 5000
            try:
                image.close()
            except ByreError:
                pass
            with open_image(memory, "parallels") as image:
                assert checked(image)[:3] == (0, 0, 0)
            if not failed:
                break
