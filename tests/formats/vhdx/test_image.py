"""Opening VHDX images, good and bad ones; creating, resizing, checking, and what info says."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import pytest

import byre
from byre.errors import Corrupt, ImageError, InvalidArgument, NotSupported
from byre.formats.vhdx import layout
from byre.formats.vhdx.image import VhdxNode
from byre.graph.creating import create
from byre.graph.opening import Policy
from byre.image import Image
from byre.io.extent import DATA, UNALLOCATED, ZERO
from byre.jobs.job import Control
from byre.protocols.memory import MemoryNode
from support.forged_vhd import FULL, KIB, MIB, NOT_PRESENT, PARTIAL, UNDEFINED, UNMAPPED, Block, Vhdx
from support.forged_vhd import ZERO as ZERO_STATE
from support.images import new_image, open_image


def opened(data: bytes, **more: Any) -> Image:
    return open_image(MemoryNode(data), "vhdx", **{"read_only": True, **more})


def test_every_state_of_a_block() -> None:
    blocks = {0: Block(FULL, b"a" * MIB), 1: Block(UNDEFINED), 2: Block(ZERO_STATE), 3: Block(UNMAPPED)}
    with opened(Vhdx(size=6 * MIB, blocks=blocks).build()) as image:
        assert image.read(0, 6 * MIB) == b"a" * MIB + bytes(5 * MIB)
        assert [(extent.offset // MIB, extent.kind) for extent in image.extents(0, 6 * MIB)] == [
            (0, DATA), (1, UNALLOCATED), (2, ZERO), (3, UNALLOCATED),
        ]  # fmt: skip


@pytest.mark.parametrize("state", [4, 5, PARTIAL])
def test_states_this_disk_cannot_have(state: int) -> None:
    with opened(Vhdx(blocks={1: Block(state, b"x", (True,))}).build()) as image:
        if state == 5:  # the draft of the format had that for unmapped
            assert image.read(MIB, 10) == bytes(10)
            return
        for look in (lambda: image.read(MIB, 10), lambda: image.extents(0, 4 * MIB)):
            with pytest.raises(Corrupt, match=rf"guest offset 0x100000.*state {state}"):
                look()
        assert image.read(0, 10) == bytes(10)
        assert image.node.check(Control()).corruptions == 1  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("host", "why"), [(0, "headers"), (MIB, "headers, log"), (2 * MIB, "tables"), (64 * MIB, "past the end"),
                      ((1 << 64) - MIB, "past the end")],
)  # fmt: skip
def test_blocks_that_lie_where_they_must_not(host: int, why: str) -> None:
    data = bytearray(Vhdx(blocks={1: Block(FULL, b"x")}).build())
    struct.pack_into("<Q", data, 2 * MIB + 8, host | FULL)
    with opened(bytes(data), read_only=False) as image:
        for use in (lambda: image.read(MIB, 10), lambda: image.extents(0, 4 * MIB), lambda: image.write(MIB, b"x"),
                    lambda: image.write_zeroes(MIB, MIB)):  # fmt: skip
            with pytest.raises(Corrupt, match=rf"guest offset 0x100000.*{why}"):
                use()
        assert image.node.check(Control()).corruptions == 1  # type: ignore[attr-defined]


def test_check_finds_blocks_that_share_their_space() -> None:
    data = bytearray(Vhdx(blocks={0: Block(FULL, b"x"), 1: Block(FULL, b"y"), 2: Block(FULL, b"z")}).build())
    struct.pack_into("<Q", data, 2 * MIB + 16, 5 * MIB | FULL)
    with opened(bytes(data)) as image:
        result = image.node.check(Control())  # type: ignore[attr-defined]
    assert result.corruptions == 2
    assert "used by another block" in result.messages[0]
    struct.pack_into("<Q", data, 2 * MIB + 16, 6 * MIB | FULL | 8)
    with opened(bytes(data)) as image:
        assert "reserved bits" in image.node.check(Control()).messages[0]  # type: ignore[attr-defined]


# -- headers and tables -------------------------------------------------------------------------------


def damaged(at: int, data: bytes = b"\xff", image: Vhdx | None = None) -> bytes:
    content = bytearray((image or Vhdx(blocks={0: Block(FULL, b"x")})).build())
    content[at : at + len(data)] = data
    return bytes(content)


@pytest.mark.parametrize("at", [64 * KIB + 100, 128 * KIB + 100, 192 * KIB + 100, 256 * KIB + 100])
def test_one_damaged_copy_is_enough(at: int) -> None:
    with opened(damaged(at)) as image:
        assert image.read(0, 1) == b"x"


def test_the_newer_header_counts() -> None:
    with opened(Vhdx(sequence=8).build()) as image:
        assert isinstance(image.node, VhdxNode)
        assert image.node.journal.header.sequence_number == 9


def test_headers_that_claim_the_same_must_be_the_same() -> None:
    data = bytearray(Vhdx().build())
    one = data[64 * KIB : 68 * KIB]
    data[128 * KIB : 132 * KIB] = one
    with opened(bytes(data)) as image:
        assert image.size == 4 * MIB
    data[128 * KIB : 132 * KIB] = Vhdx(log_offset=5 * MIB).header(5)
    with pytest.raises(ImageError, match="both headers have sequence number 5, but they differ"):
        opened(bytes(data))


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "begins with"),
        (b"vhdxfile", "no valid VHDX header"),
        (damaged(0), "begins with"),
        (Vhdx(log_offset=MIB + 4096).build(), "log of 1048576 bytes at 0x101000 is not made of whole"),
        (Vhdx(log_offset=2 * MIB).build(), "begins inside"),
        (Vhdx(size=4 * MIB + 1).build(), "multiples of 512"),
        (Vhdx(size=65 << 40).build(), "virtual size is"),
        (Vhdx(size=1 << 40, block_size=MIB).build(), "room for 131072 entries"),
        (Vhdx(block_size=3 * MIB).build(), "powers of two"),
        (Vhdx(block_size=512 * MIB).build(), "powers of two"),
        (Vhdx(logical=1024).build(), "allowed are 512 and 4096"),
        (damaged(3 * MIB), "metadata table begins"),
        (damaged(3 * MIB + 10, b"\xff\xff"), "65535 entries, allowed are 2047"),
        (Vhdx(extra_regions=[struct.pack("<16sQII", b"?" * 16, 8 * MIB, MIB, 1)]).build(), "is required, but not"),
        (Vhdx(extra_regions=[struct.pack("<16sQII", b"?" * 16, 3 * MIB, MIB, 0)]).build(), "begins inside"),
        (Vhdx(extra_regions=[struct.pack("<16sQII", b"?" * 16, 3, MIB, 0)]).build(), "whole mebibytes"),
        (Vhdx(extra_items=[struct.pack("<16sIIII", b"?" * 16, 64 * KIB, 8, 4, 0)]).build(), "is required, but not"),
        (Vhdx(parent={}).build(), "names no parent"),
    ],
)  # fmt: skip
def test_what_is_refused(data: bytes, why: str) -> None:
    with pytest.raises(ImageError, match=why):
        opened(data)


def test_a_region_table_with_too_many_entries() -> None:
    rows = [struct.pack("<16sQII", bytes((n % 256, n // 256)) * 8, (8 + n) * MIB, MIB, 0) for n in range(2046)]
    with pytest.raises(ImageError, match="2048 entries, allowed are 2047"):
        opened(Vhdx(extra_regions=rows).build()[: 4 * MIB])
    with opened(Vhdx(extra_regions=rows[:2045]).build()) as image:
        assert image.size == 4 * MIB


def test_a_file_that_ends_within_the_block_table() -> None:
    with pytest.raises(ImageError, match="cut short"):
        opened(Vhdx().build()[: 2 * MIB])


def test_the_largest_disk_takes_little_memory_and_time() -> None:
    memory = new_image("vhdx", 64 << 40, block_size=MIB, block_state_zero=False)
    assert memory.size == (512 + 4) * MIB
    with open_image(memory, "vhdx") as image:
        assert image.size == 64 << 40
        image.write((64 << 40) - 4096, b"end")
        image.write(0, b"begin")
        assert image.read((64 << 40) - 4096, 3) == b"end"
    assert memory.allocated_size() < 4 * MIB


def test_untrusted_sizes() -> None:
    with pytest.raises(ImageError, match="allowed are 1048576"):
        opened(Vhdx().build(), policy=Policy.untrusted(MIB))


# -- what is written ----------------------------------------------------------------------------------


def test_reading_changes_nothing_and_writing_leaves_a_clean_file(tmp_path: Path) -> None:
    path = tmp_path / "disk.vhdx"
    create(str(path), "vhdx", 10 * MIB)
    before = path.read_bytes()
    with byre.open(str(path)) as image:
        assert image.format == "vhdx"
        image.read(0, 10 * MIB)
    with byre.open(str(path), read_only=False) as image:
        image.read(0, 100)
    assert path.read_bytes() == before
    with byre.open(str(path), read_only=False) as image:
        image.write(5, b"hello")
    headers = [layout.decode_header(path.read_bytes()[at : at + 4096]) for at in layout.HEADER_OFFSETS]
    first = layout.decode_header(before[layout.HEADER_OFFSETS[0] :])
    assert all(header.log_guid == layout.NO_GUID for header in headers)
    assert all(header.data_write_guid != first.data_write_guid for header in headers)
    assert all(header.file_write_guid != first.file_write_guid for header in headers)


def test_space_given_up_is_used_again() -> None:
    memory = new_image("vhdx", 8 * MIB, block_size=MIB)
    with open_image(memory, "vhdx") as image:
        for _ in range(5):
            image.write(0, b"x" * 3 * MIB)
            image.flush()
            image.discard(0, 3 * MIB)
            image.flush()
        image.write(4 * MIB + 100, b"y")
        assert image.read(4 * MIB, 200) == bytes(100) + b"y" + bytes(99)
    assert memory.size == 7 * MIB


@pytest.mark.parametrize("place", [{"log_length": 0}, {"log_offset": 1 << 40}])
def test_a_file_without_a_log_is_only_read(place: dict[str, int]) -> None:
    with opened(Vhdx(**place).build(), read_only=False) as image:  # type: ignore[arg-type]
        assert image.read(0, 10) == bytes(10)
        with pytest.raises(NotSupported, match="has no log"):
            image.write(0, b"x")
        assert image.read(0, 10) == bytes(10)


def test_sectors_of_4096_bytes() -> None:
    data = Vhdx(logical=4096, blocks={2: Block(FULL, b"big sectors")}).build()
    memory = MemoryNode(data)
    with open_image(memory, "vhdx") as image:
        assert image.read(2 * MIB, 11) == b"big sectors"
        image.write(MIB + 1, b"any byte")
        with pytest.raises(InvalidArgument, match="multiples of 4096"):
            image.resize(8 * MIB + 512)
        image.resize(8 * MIB)
        assert image.read(MIB + 1, 8) == b"any byte"


@pytest.mark.parametrize("options", [{}, {"subformat": "fixed"}, {"block_state_zero": False}])
def test_growing_and_shrinking(options: dict[str, object]) -> None:
    memory = new_image("vhdx", 5 * MIB + 512, block_size=2 * MIB, **options)
    with open_image(memory, "vhdx") as image:
        image.write(0, b"\xee" * image.size)
        image.resize(9 * MIB)
        assert image.read(5 * MIB, MIB) == b"\xee" * 512 + bytes(MIB - 512)
        image.resize(3 * MIB, shrink=True)
        image.resize(200 << 30 if not options else 20 * MIB)
        assert image.read(0, 6 * MIB) == b"\xee" * 3 * MIB + bytes(3 * MIB)
        size = image.size
        assert not image.node.check(Control()).corruptions  # type: ignore[attr-defined]
    with open_image(memory, "vhdx", read_only=True) as image:
        assert image.size == size
        assert image.read(0, 6 * MIB) == b"\xee" * 3 * MIB + bytes(3 * MIB)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"block_size": 3 * MIB}, "powers of two"),
        ({"log_size": 1 << 32}, "below 4 GiB"),
        ({"size": 65 << 40}, "64 TiB"),
        ({"subformat": "differencing"}, "dynamic, fixed"),
    ],
)
def test_options_that_are_refused_leave_no_file(options: dict[str, object], why: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match=why):
        create(str(tmp_path / "x"), "vhdx", options={"size": MIB, **options})
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("size", "block"), [(MIB, 8), (1 << 30, 8), ((1 << 30) + 512, 16), (200 << 30, 32), (33 << 40, 64)]
)
def test_block_sizes_that_creation_chooses(size: int, block: int) -> None:
    with open_image(new_image("vhdx", size), "vhdx") as image:
        assert image.node.cluster_size == block * MIB  # type: ignore[attr-defined]


def test_states_of_new_blocks() -> None:
    for options, kind in (({}, ZERO), ({"block_state_zero": False}, UNALLOCATED), ({"subformat": "fixed"}, DATA)):
        with open_image(new_image("vhdx", 5 * MIB, **options), "vhdx") as image:  # type: ignore[arg-type]
            assert {extent.kind for extent in image.extents(0, 5 * MIB)} == {kind}
    assert NOT_PRESENT == layout.NOT_PRESENT


def test_info() -> None:
    with open_image(new_image("vhdx", 5 * MIB, subformat="fixed"), "vhdx") as image:
        info = image.node.format_info()  # type: ignore[attr-defined]
    assert info == {"subformat": "fixed", "log-size": MIB, "logical-sector-size": 512, "physical-sector-size": 512,
                    "log-empty": True}  # fmt: skip
