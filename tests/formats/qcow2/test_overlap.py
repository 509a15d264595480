"""Nothing is written over metadata because a damaged table says that something else lies there."""

from __future__ import annotations

import struct
from typing import Any

import pytest

from byre.errors import ByreError, Corrupt, InvalidArgument
from byre.formats.qcow2 import layout, overlap
from byre.formats.qcow2.entries import COPIED
from byre.image import Image
from byre.jobs.job import Control
from byre.protocols.memory import MemoryNode
from support.images import detached, new_image, open_image

CLUSTER = 4096
COUNT = 64


def make(*, snapshot: bool = True, bitmap: bool = False) -> MemoryNode:
    """Data in clusters 0 and 1, one snapshot of it, then cluster 0 written anew."""
    memory = new_image("qcow2", CLUSTER * COUNT, cluster_size=CLUSTER)
    with open_image(memory) as image:
        image.write(0, b"a" * CLUSTER * 2)
        if snapshot:
            image.create_snapshot("one")
            image.write(0, b"b" * CLUSTER)
        if bitmap:
            image.node.bitmap_store().add("bits")  # type: ignore[attr-defined]
    return detached(memory)


def words(memory: MemoryNode, offset: int, count: int) -> tuple[int, ...]:
    data = memory.to_bytes()[offset : offset + 8 * count]
    return struct.unpack(f">{count}Q", data)


def poke(memory: MemoryNode, offset: int, word: int) -> None:
    memory.write_from(offset, memoryview(struct.pack(">Q", word)))


def places(memory: MemoryNode) -> dict[str, int]:
    """Host offset of one structure of each class."""
    with open_image(memory, read_only=True) as image:
        node: Any = image.node
        header, shot = node.header, node.snapshots[0] if node.snapshots else None
        bitmaps = layout.find_extension(node.extensions, layout.EXTENSION_BITMAPS)
    detached(memory)
    found = {
        "main-header": 0,
        "active-l1": header.l1_table_offset,
        "active-l2": words(memory, header.l1_table_offset, 1)[0] & ~COPIED,
        "refcount-table": header.refcount_table_offset,
        "refcount-block": words(memory, header.refcount_table_offset, 1)[0],
    }
    if shot is not None:
        found |= {
            "snapshot-table": header.snapshots_offset,
            "inactive-l1": shot.l1_table_offset,
            "inactive-l2": words(memory, shot.l1_table_offset, 1)[0],
        }
    if bitmaps is not None:
        found["bitmap-directory"] = layout.decode_bitmaps_extension(bitmaps).directory_offset
    return found


def point_data_at(memory: MemoryNode, host: int, guest_cluster: int = 0) -> None:
    """The L2 entry of a guest cluster says that its data lie at ``host``, and are its own."""
    poke(memory, places(memory)["active-l2"] + 8 * guest_cluster, host | COPIED)


def is_marked(memory: MemoryNode) -> bool:
    return bool(memory.to_bytes()[79] & layout.INCOMPATIBLE_CORRUPT)


def close(image: Image) -> None:
    with pytest.raises(ByreError):
        image.close()


@pytest.mark.parametrize("name", [name for name in overlap.CLASSES if name not in ("bitmap-directory", "main-header")])
@pytest.mark.parametrize("level", ["none", "constant", "cached", "all"])
def test_data_in_the_place_of_metadata(name: str, level: str) -> None:
    memory = make()
    host = places(memory)[name]
    point_data_at(memory, host)
    before = memory.to_bytes()
    image = open_image(memory, options={"overlap-check": level})
    if name in overlap.TEMPLATES[level]:
        with pytest.raises(Corrupt, match=overlap.CLASSES[name]):
            image.write(10, b"over it")
        close(image)
        assert is_marked(memory)
        assert memory.to_bytes()[host : host + CLUSTER] == before[host : host + CLUSTER]
    elif name == "inactive-l2":
        image.write(10, b"over it")
        image.close()
        assert memory.to_bytes()[host + 10 : host + 17] == b"over it"


def test_single_classes_on_top_of_a_level() -> None:
    for level, single, found in (("none", "on", True), ("all", "off", False)):
        memory = make()
        point_data_at(memory, places(memory)["inactive-l1"])
        options = {"overlap-check.template": level, "overlap-check.inactive-l1": single}
        image = open_image(memory, options=options)
        if found:
            with pytest.raises(Corrupt):
                image.write(0, b"x")
            close(image)
        else:
            image.write(0, b"x")
            image.close()


def test_the_level_has_two_names() -> None:
    with pytest.raises(InvalidArgument):
        open_image(make(), options={"overlap-check": "all", "overlap-check.template": "none"})


def test_the_bitmap_directory() -> None:
    memory = make(snapshot=False, bitmap=True)
    point_data_at(memory, places(memory)["bitmap-directory"])
    image = open_image(memory)
    with pytest.raises(Corrupt, match="bitmap directory"):
        image.write(0, b"x")
    close(image)


def test_an_l2_table_in_the_place_of_another_structure() -> None:
    for name in ("active-l1", "refcount-table", "refcount-block", "snapshot-table", "inactive-l1"):
        memory = make()
        found = places(memory)
        poke(memory, found["active-l1"], found[name] | COPIED)
        image = open_image(memory)
        with pytest.raises(Corrupt, match=overlap.CLASSES[name]):
            image.write(CLUSTER * 9, b"x")
        close(image)
        assert is_marked(memory)


def test_a_refcount_block_in_the_place_of_the_l1_table() -> None:
    memory = make()
    found = places(memory)
    # Its "counts" say that everything behind the table's few entries is free.
    poke(memory, found["refcount-table"], found["active-l1"])
    image = open_image(memory)
    with pytest.raises(ByreError):
        image.write(CLUSTER * 9, b"x")
        image.flush()
    close(image)
    with open_image(detached(memory), read_only=True) as image:
        assert image.read(CLUSTER, 4) == b"aaaa"


def test_counts_that_call_metadata_free() -> None:
    for name in ("active-l1", "active-l2", "refcount-block", "snapshot-table", "inactive-l1"):
        memory = make()
        found = places(memory)
        cluster = found[name] // CLUSTER
        memory.write_from(found["refcount-block"] + 2 * cluster, memoryview(bytes(2)))
        image = open_image(memory)
        with pytest.raises(Corrupt, match=overlap.CLASSES[name]):
            for guest in range(10, 10 + COUNT // 2):
                image.write(guest * CLUSTER, b"x")
        close(image)


def test_letting_go_of_metadata() -> None:
    """A cluster of the guest's that is the refcount table is not freed with what the guest discards."""
    memory = make(snapshot=False)
    host = places(memory)["refcount-table"]
    poke(memory, places(memory)["active-l2"], host)  # not its own: nothing is written there
    image = open_image(memory)
    with pytest.raises(ByreError, match="refcount table"):
        image.discard(0, CLUSTER)
        image.flush()
    close(image)
    assert is_marked(memory)
    assert words(memory, host, 1)[0]


def test_sharing_a_cluster_with_metadata_is_no_obstacle_to_leaving_it() -> None:
    """Counted twice, as repair leaves it: the guest's write takes another cluster."""
    memory = make()
    host = places(memory)["inactive-l2"]
    point_data_at(memory, host)
    with open_image(memory, check=True) as image:
        assert image.node.check(Control(), "all").corruptions == 0  # type: ignore[attr-defined]
    before = memory.to_bytes()[host : host + CLUSTER]
    with open_image(detached(memory), options={"overlap-check": "all"}) as image:
        image.write(0, b"elsewhere" * 10)
        assert image.read(0, 9) == b"elsewhere"
        image.apply_snapshot("one")
        assert image.read(0, CLUSTER * 2) == b"a" * CLUSTER * 2
    assert memory.to_bytes()[host : host + CLUSTER] == before


def test_what_is_made_later_is_known_at_once() -> None:
    """The lists are kept up while tables come and go."""
    memory = new_image("qcow2", 512 * 64 * 40, cluster_size=512)
    with open_image(memory, options={"overlap-check": "all"}) as image:
        node: Any = image.node
        for table in range(0, 40, 3):
            image.write(table * 512 * 64, b"x")
            if table % 9 == 0:
                image.create_snapshot(f"s{table}")
            if table % 12 == 0:
                image.discard(0, 512 * 64)
            guard = node.guard
            for entry in node.mapping.l1:
                if entry:
                    assert guard.at((entry & ~COPIED) >> 9, 1) in ("active L2 table", "inactive L2 table")
            for entry in node.refcounts.table:
                if entry:
                    assert guard.at(entry >> 9, 1) == "refcount block"
        for shot in node.snapshots:
            assert node.guard.at(shot.l1_table_offset >> 9, 1) == "inactive L1 table"
        image.delete_snapshot("s0")
        image.flush()
        assert not image.node.check(Control()).corruptions  # type: ignore[attr-defined]


def test_ranges_that_overlap_each_other_are_all_found() -> None:
    ranges = overlap._Ranges([(1, 100, "long"), (2, 3, "short"), (50, 51, "short"), (200, 210, "far")])
    assert ranges.find(60, 61, "") == "long"
    assert ranges.find(60, 61, "long") == ""
    assert ranges.find(50, 51, "long") == "short"
    assert ranges.find(150, 201, "") == "far"
    assert ranges.find(100, 200, "") == ""
