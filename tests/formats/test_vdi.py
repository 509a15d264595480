"""vdi: contract, header, differencing images, check, growing."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import byre
from byre.catalog import probe
from byre.errors import AccessDenied, ByreError, Corrupt, ImageError, InvalidArgument, NotFound, NotSupported
from byre.formats import vdi
from byre.graph.node import Node
from byre.graph.opening import Policy
from byre.io.extent import DATA, MAY_UNMAP, UNALLOCATED, ZERO
from byre.jobs.job import Control
from byre.protocols.memory import MemoryNode
from contracts.node import FormatContract, patchwork
from contracts.test_formats import scattered
from support.images import new_image, open_image
from support.vdi import child_of, small_vdi

MIB = 1 << 20


class TestContract(FormatContract):
    content = patchwork(1 << 20)

    @pytest.fixture(params=[4096, 65536, 512])
    def node(self, request: pytest.FixtureRequest) -> Iterator[Node]:
        with open_image(small_vdi(len(self.content), request.param), "vdi") as image:
            scattered(image, self.content, request.param)
            yield image.node


class TestStaticContract(FormatContract):
    content = patchwork(3 * MIB)

    @pytest.fixture
    def node(self) -> Iterator[Node]:
        with open_image(new_image("vdi", len(self.content), static=True), "vdi") as image:
            scattered(image, self.content, MIB)
            yield image.node


def test_probing_and_header() -> None:
    memory = new_image("vdi", 10 * MIB)
    data = memory.to_bytes()
    assert probe(data).name == "vdi"
    header = vdi.decode_header(data)
    assert vdi.encode_header(header) == data[:512]
    assert (header.block_count, header.allocated_count, header.data_offset) == (10, 0, MIB)
    assert len({header.uuid, header.modification_uuid, vdi.NO_UUID}) == 3


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"signature": 1}, "not a VDI image"),
        ({"version": 0x10000}, "version 1.0"),
        ({"image_type": 3}, "type 3"),
        ({"image_type": 4}, "type 4 without a parent"),
        ({"parent_uuid": b"x" * 16}, "type 1 with a parent"),
        ({"sector_size": 4096}, "4096 bytes"),
        ({"block_extra": 512}, "512 extra bytes"),
        ({"block_size": 0}, "block size is 0"),
        ({"block_size": 3 * MIB}, "power of two"),
        ({"block_size": 1 << 31}, "power of two"),
        ({"map_offset": 513}, "multiples of 512"),
        ({"map_offset": 0}, "behind the header"),
        ({"data_offset": 512}, "inside the block map"),
        ({"block_count": 1 << 24}, "allowed are 33554432"),
        ({"block_count": 1}, "room for 1048576"),
        ({"disk_size": 1 << 63}, "room for"),
        ({"map_offset": 1 << 30, "data_offset": 1 << 31}, "past the end of the file"),
    ],
)
def test_refusals(change: dict[str, Any], said: str) -> None:
    data = bytearray(new_image("vdi", 10 * MIB).to_bytes())
    header = vdi.Header._make(vdi._FORMAT.unpack_from(data))._replace(**change)
    data[:512] = vdi.encode_header(header)
    with pytest.raises(ImageError, match=said):
        open_image(MemoryNode(bytes(data)), "vdi")


def test_what_was_never_written_and_what_was_discarded() -> None:
    memory = small_vdi(65536)
    with open_image(memory, "vdi") as image:
        image.write(8192, b"x" * 4096)
        rows = [(row.offset, row.length, row.kind) for row in image.extents()]
    assert rows == [(0, 8192, ZERO), (8192, 4096, DATA), (12288, 53248, ZERO)]


def test_an_entry_outside_is_named_where_it_is_met() -> None:
    data = bytearray(small_vdi(65536).to_bytes())
    struct.pack_into("<I", data, 512 + 4 * 5, 1000)
    with open_image(MemoryNode(bytes(data)), "vdi") as image:
        assert image.read(0, 4096) == bytes(4096)
        for request in (lambda: image.read(5 * 4096, 1), lambda: image.write(5 * 4096, b"x"), image.extents):
            with pytest.raises(Corrupt, match="block map entry 5 points to"):
                request()


def test_zeroes_in_blocks_that_are_there_stay_in_place() -> None:
    memory = small_vdi(65536)
    with open_image(memory, "vdi") as image:
        image.write(0, b"x" * 65536)
        size = memory.size
        image.write_zeroes(4096, 8192, unmap=True)
        image.discard(20480, 4096)
        assert image.read(4096, 8192) == bytes(8192)
        image.write(4096, b"y" * 100)
        image.flush()
        assert memory.size == size
        assert image.node.check(Control())[:3] == (0, 0, 0)  # type: ignore[attr-defined]


# -- differencing ---------------------------------------------------------------------------------


@pytest.fixture
def family(tmp_path: Path) -> Path:
    """``parent.vdi`` and ``child.vdi`` over it, in one folder."""
    memory = small_vdi(65536)
    with open_image(memory, "vdi") as image:
        image.write(0, b"p" * 65536)
    (tmp_path / "parent.vdi").write_bytes(memory.to_bytes())
    (tmp_path / "another.vdi").write_bytes(small_vdi(65536, uuid=b"\7" * 16).to_bytes())
    (tmp_path / "rubbish.vdi").write_bytes(b"rubbish")
    (tmp_path / "child.vdi").write_bytes(child_of(memory.to_bytes(), 65536, {1: b"c" * 4096, 2: None}))
    return tmp_path


EXPECTED = b"p" * 4096 + b"c" * 4096 + bytes(4096) + b"p" * (65536 - 12288)


def test_the_parent_is_found_by_its_uuid(family: Path) -> None:
    with byre.open(str(family / "child.vdi")) as image:
        assert image.read(0, 65536) == EXPECTED
        kinds = [(row.length, row.kind) for row in image.node.extents(0, 65536)]
        assert kinds == [(4096, UNALLOCATED), (4096, DATA), (4096, ZERO), (53248, UNALLOCATED)]
        assert image.node.backing_name == "parent.vdi"  # type: ignore[attr-defined]


def test_a_snapshot_folder_has_its_parent_above(family: Path) -> None:
    (family / "Snapshots").mkdir()
    (family / "child.vdi").rename(family / "Snapshots" / "{1}.vdi")
    with byre.open(str(family / "Snapshots" / "{1}.vdi")) as image:
        assert image.read(0, 65536) == EXPECTED


def test_no_parent_no_reading(family: Path) -> None:
    (family / "parent.vdi").rename(family / "elsewhere")
    with pytest.raises(NotFound, match="UUID 01010101-0101-0101-0101-010101010101, is not in its folder"):
        byre.open(str(family / "child.vdi"))
    child, parent = str(family / "child.vdi"), str(family / "elsewhere")
    spec = {"driver": "vdi", "file": {"driver": "file", "filename": child},
            "backing": {"driver": "vdi", "file": {"driver": "file", "filename": parent}}}  # fmt: skip
    with byre.open(spec) as image:
        assert image.read(0, 65536) == EXPECTED


def test_the_policy_is_asked_before_anything_is_looked_at(family: Path) -> None:
    with pytest.raises(AccessDenied, match="parent image"):
        byre.open(str(family / "child.vdi"), policy=Policy.untrusted())
    with byre.open(str(family / "child.vdi"), policy=Policy("below", (str(family),))) as image:
        assert image.read(0, 65536) == EXPECTED


def test_a_parent_that_changed_is_told(family: Path) -> None:
    data = bytearray((family / "parent.vdi").read_bytes())
    data[408:424] = b"\x09" * 16
    (family / "parent.vdi").write_bytes(data)
    with byre.open(str(family / "child.vdi")) as image:
        assert any("was changed after" in warning for warning in image.graph.warnings)


def test_differencing_images_are_only_read(family: Path) -> None:
    with pytest.raises(NotSupported, match="only be read"):
        byre.open(str(family / "child.vdi"), read_only=False)
    with byre.open(str(family / "child.vdi"), backing=False, no_io=True) as image:
        assert image.node.format_info()["parent-uuid"] == "01010101-0101-0101-0101-010101010101"  # type: ignore[attr-defined]


def test_uuids_are_kept(family: Path) -> None:
    before = vdi.decode_header((family / "parent.vdi").read_bytes())
    with byre.open(str(family / "parent.vdi"), read_only=False) as image:
        image.write(0, b"changed")
    after = vdi.decode_header((family / "parent.vdi").read_bytes())
    assert after == before


# -- check ----------------------------------------------------------------------------------------


def checked(data: bytes, fix: str = "") -> Any:
    with open_image(MemoryNode(data), "vdi", read_only=not fix, check=True) as image:
        return image.node.check(Control(), fix)  # type: ignore[attr-defined]


def test_check() -> None:
    memory = small_vdi(65536)
    with open_image(memory, "vdi") as image:
        image.write(0, b"x" * 12288)
    good = memory.to_bytes()
    assert checked(good)[:3] == (0, 0, 0)
    twice, large, leak = bytearray(good), bytearray(good), bytearray(good)
    struct.pack_into("<I", twice, 512, 1)
    struct.pack_into("<I", large, 512, 99)
    struct.pack_into("<I", leak, 512 + 8, vdi.ABSENT)
    found = checked(bytes(twice))
    assert found.corruptions == 1
    assert "used more than once" in found.messages[0]
    found = checked(bytes(large))
    assert found.corruptions == 1
    assert found.messages[0] == "ERROR: block index 0 too large, is 99"
    found = checked(bytes(leak))
    assert (found.corruptions, found.leaks) == (0, 1)
    mended = MemoryNode(bytes(leak))
    with open_image(mended, "vdi", check=True) as image:
        result = image.node.check(Control(), "all")  # type: ignore[attr-defined]
        assert (result.leaks, result.leaks_fixed) == (0, 1)
    assert checked(mended.to_bytes())[:3] == (0, 0, 0)


def test_a_count_that_is_too_small_is_set_right_by_writing() -> None:
    memory = small_vdi(65536)
    with open_image(memory, "vdi") as image:
        image.write(0, b"x" * 12288)
    data = bytearray(memory.to_bytes())
    struct.pack_into("<I", data, 388, 1)
    assert checked(bytes(data)).corruptions == 1
    memory = MemoryNode(bytes(data))
    with open_image(memory, "vdi") as image:
        image.write(40960, b"y" * 4096)
        assert image.read(0, 12288) == b"x" * 12288
    assert checked(memory.to_bytes())[:3] == (0, 0, 0)


def test_blocks_left_behind_are_used_first() -> None:
    memory = small_vdi(65536)
    with open_image(memory, "vdi") as image:
        image.write(0, b"x" * 12288)
    data = bytearray(memory.to_bytes())
    struct.pack_into("<I", data, 512, vdi.ABSENT)  # a crash between header and map
    memory = MemoryNode(bytes(data))
    with open_image(memory, "vdi") as image:
        image.write(40960, b"y" * 100)
        assert image.read(40960, 4096) == b"y" * 100 + bytes(3996)
    assert memory.size == len(data)
    assert checked(memory.to_bytes())[:3] == (0, 0, 0)


# -- size and creation ----------------------------------------------------------------------------


@pytest.mark.parametrize("static", [False, True])
def test_growing(static: bool) -> None:
    memory = new_image("vdi", 3 * MIB - 512, static=static)
    with open_image(memory, "vdi") as image:
        image.write(0, b"x" * (3 * MIB - 512))
        image.resize(7 * MIB)
        assert image.read(3 * MIB - 512, 4 * MIB + 512) == bytes(4 * MIB + 512)
        image.write(6 * MIB, b"y" * MIB)
        with pytest.raises(NotSupported, match="room for"):
            image.resize(1 << 40)
        with pytest.raises(NotSupported, match="cannot shrink"):
            image.resize(MIB, shrink=True)
    assert checked(memory.to_bytes())[:3] == (0, 0, 0)
    with open_image(memory, "vdi", read_only=True) as image:
        assert image.read(0, 7 * MIB) == b"x" * (3 * MIB - 512) + bytes(3 * MIB + 512) + b"y" * MIB


def test_creation() -> None:
    static = new_image("vdi", 3 * MIB, preallocation="metadata")
    assert static.size == 4 * MIB
    assert vdi.decode_header(static.to_bytes()).image_type == vdi.STATIC
    with pytest.raises(InvalidArgument, match="contradict"):
        new_image("vdi", MIB, static=True, preallocation="off")
    with pytest.raises(InvalidArgument, match="too large"):
        new_image("vdi", 9 << 40)
    with open_image(new_image("vdi", 0), "vdi") as image:
        assert image.size == 0
    assert vdi.measure(vdi.CREATE_OPTIONS.parse({}, what="vdi"), 10 * MIB, 2 * MIB) == (3 * MIB, 11 * MIB)


def test_a_failed_table_write_stops_the_node() -> None:
    from byre.filters.faults import FaultNode

    fault = FaultNode()
    image = open_image(small_vdi(65536), "vdi", filters=[fault])
    image.write(0, b"x" * 4096)
    fault.fail("write", 1)
    with pytest.raises(ByreError):
        image.flush()
    with pytest.raises(ByreError, match="out of service"):
        image.read(0, 1)
    try:
        image.close()
    except ByreError:
        pass


def test_unmap_of_everything_at_once() -> None:
    with open_image(small_vdi(1 << 20), "vdi") as image:
        image.write(0, b"x" * (1 << 20))
        image.node.write_zeroes(0, 1 << 20, MAY_UNMAP)
        assert image.read(0, 1 << 20) == bytes(1 << 20)
