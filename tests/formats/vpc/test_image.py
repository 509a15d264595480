"""VHD images: footers, geometry and size, blocks and their bitmaps; creating, resizing, checking, recognising."""

from __future__ import annotations

import random
import struct
from pathlib import Path
from typing import Any

import pytest

import byre
from byre.errors import AccessDenied, Corrupt, ImageError, InvalidArgument
from byre.formats.vpc import layout
from byre.formats.vpc.image import VpcNode
from byre.graph.creating import create
from byre.graph.opening import Policy
from byre.image import Image
from byre.io.extent import DATA, ZERO
from byre.jobs.job import Control
from byre.protocols.memory import MemoryNode
from support.forged_vhd import MIB, Vhd, footer
from support.images import detached, new_image, open_image

ALL = (True,) * 4096


def opened(data: bytes, **more: Any) -> Image:
    return open_image(MemoryNode(data), "vpc", **{"read_only": True, **more})


def test_what_is_not_there_is_the_disks_own_zeroes_unless_there_is_a_parent() -> None:
    with opened(Vhd(size=6 * MIB, blocks={1: (b"x" * 2 * MIB, ALL)}).build()) as image:
        node: Any = image.node
        assert [extent.kind for extent in node.extents(0, 6 * MIB)] == [ZERO, DATA, ZERO]
        assert node.lookup(0, 6 * MIB)[0].kind == ZERO


# -- geometry and size --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sectors", "chs"),
    [
        (20480, (301, 4, 17)),
        (0, (0, 4, 17)),
        (1 << 16, (963, 4, 17)),
        (1 << 20, (1040, 16, 63)),
        (1 << 24, (16644, 16, 63)),
        (65535 * 16 * 63, (16191, 16, 255)),
        (layout.MAX_GEOMETRY, (65535, 16, 255)),
        (1 << 40, (65535, 16, 255)),
    ],
)
def test_geometry(sectors: int, chs: tuple[int, int, int]) -> None:
    assert layout.geometry(sectors) == chs


def test_a_geometry_that_covers_is_the_smallest() -> None:
    for sectors in (1, 20480, 102400, 1 << 20, 1 << 23, 65535 * 16 * 63 - 5, layout.MAX_GEOMETRY):
        cylinders, heads, track = layout.covering_geometry(sectors)
        assert cylinders * heads * track >= sectors
        assert cylinders * heads * track - sectors <= 16 * 255


@pytest.mark.parametrize(
    ("application", "geometry", "option", "expected"),
    [
        (b"vpc ", (100, 4, 17), {}, 100 * 4 * 17 * 512),
        (b"qemu", (100, 4, 17), {}, 100 * 4 * 17 * 512),
        (b"qem2", (100, 4, 17), {}, 8 * MIB),
        (b"win ", (100, 4, 17), {}, 8 * MIB),
        (b"tap\0", (100, 4, 17), {}, 8 * MIB),
        (b"vpc ", (65535, 16, 255), {}, 8 * MIB),
        (b"win ", (100, 4, 17), {"force_size_calc": "chs"}, 100 * 4 * 17 * 512),
        (b"vpc ", (100, 4, 17), {"force_size_calc": "current_size"}, 8 * MIB),
        (b"win ", (65535, 16, 255), {"force_size_calc": "chs"}, 8 * MIB),
    ],
)
def test_the_size_depends_on_the_creator(
    application: bytes, geometry: tuple[int, int, int], option: dict[str, str], expected: int
) -> None:
    with opened(Vhd(application=application, geometry=geometry).build(), options=option) as image:
        assert image.size == expected


# -- blocks and bitmaps -------------------------------------------------------------------------------


def test_sectors_that_are_not_there_read_as_zeroes_and_stay_so_when_the_block_is_written() -> None:
    chooser = random.Random(3)
    junk = chooser.randbytes(2 * MIB)
    here = [chooser.random() < 0.5 for _ in range(4096)]
    expected = bytearray(b"".join(junk[n * 512 : n * 512 + 512] if bit else bytes(512) for n, bit in enumerate(here)))
    memory = MemoryNode(Vhd(blocks={1: (junk, here), 2: (junk, ALL)}).build())
    with open_image(memory, "vpc") as image:
        assert image.read(2 * MIB, 2 * MIB) == expected
        assert image.read(4 * MIB, 2 * MIB) == junk
        node: Any = image.node
        assert {extent.kind for extent in node.extents(2 * MIB, 2 * MIB)} == {DATA, ZERO}
        for _ in range(50):
            offset, length = chooser.randrange(2 * MIB - 9000), chooser.randrange(9000)
            assert image.read(2 * MIB + offset, length) == expected[offset : offset + length]
        image.write(2 * MIB + 1000, b"now")
        expected[1000:1003] = b"now"
        assert image.read(2 * MIB, 2 * MIB) == expected
        assert [extent.kind for extent in node.extents(2 * MIB, 2 * MIB)] == [DATA]
    with open_image(memory, "vpc", read_only=True) as image:
        assert image.read(2 * MIB, 2 * MIB) == expected


def test_zeroing_in_a_block_that_is_there_in_part() -> None:
    memory = MemoryNode(Vhd(blocks={0: (b"x" * 2 * MIB, [n % 2 == 0 for n in range(4096)])}).build())
    with open_image(memory, "vpc") as image:
        image.write_zeroes(0, 1024)
        assert image.read(0, 2048) == bytes(1024) + b"x" * 512 + bytes(512)


@pytest.mark.parametrize(("entry", "why"), [(0, "headers"), (1, "headers"), (3, "headers"), (1 << 20, "past the end")])
def test_blocks_that_lie_where_they_must_not(entry: int, why: str) -> None:
    data = bytearray(Vhd(blocks={0: (b"good", ALL)}).build())
    struct.pack_into(">I", data, 1536 + 4, entry)
    with opened(bytes(data), read_only=False) as image:
        assert image.read(0, 4) == b"good"
        for use in (lambda: image.read(2 * MIB, 10), lambda: image.extents(0, 8 * MIB),
                    lambda: image.write(2 * MIB, b"x"), lambda: image.write_zeroes(2 * MIB, 2 * MIB)):  # fmt: skip
            with pytest.raises(Corrupt, match=rf"guest offset 0x200000.*{why}"):
                use()
        assert image.node.check(Control()).corruptions >= 1  # type: ignore[attr-defined]


def test_a_block_where_the_footer_should_be_is_not_written_over() -> None:
    data = bytearray(Vhd(blocks={0: (b"x" * 2 * MIB, ALL)}).build())
    data[1536 + 3] += 1  # one sector further
    with open_image(MemoryNode(bytes(data)), "vpc") as image:
        before = image.read(0, 2 * MIB)
        image.write(2 * MIB, b"another")
        image.flush()
        assert image.read(0, 2 * MIB) == before


def test_check_finds_blocks_that_share_their_space() -> None:
    data = bytearray(Vhd(blocks={0: (b"x", ALL), 1: (b"y", ALL), 2: (b"z", ALL)}).build())
    data[1536 + 8 : 1536 + 12] = data[1536 + 4 : 1536 + 8]
    with opened(bytes(data)) as image:
        result = image.node.check(Control())  # type: ignore[attr-defined]
    assert result.corruptions == 1
    assert "as well" in result.messages[0]


# -- footers ------------------------------------------------------------------------------------------


def test_a_damaged_footer_is_refused_and_mended() -> None:
    good = Vhd(blocks={0: (b"data", ALL)}).build()
    for at in (100, len(good) - 100):
        data = bytearray(good)
        data[at] ^= 1
        memory = MemoryNode(bytes(data))
        if at == 100:
            with pytest.raises(ImageError, match=r"checksum of the footer.*byre check -r all"):
                open_image(memory, "vpc", read_only=True)
        with open_image(memory, "vpc", read_only=True, check=True) as image:
            assert image.node.check(Control()).corruptions == 1  # type: ignore[attr-defined]
        with open_image(memory, "vpc", check=True) as image:
            assert image.node.check(Control(), "all").corruptions_fixed == 1  # type: ignore[attr-defined]
        assert memory.to_bytes() == good


def test_a_wrong_checksum_of_the_header_is_said() -> None:
    data = bytearray(Vhd().build())
    data[512 + 1000] ^= 1
    with opened(bytes(data)) as image:
        assert ["checksum of the dynamic header" in warning for warning in image.graph.warnings] == [True]


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "a footer alone has 512"),
        (bytes(4096), "begins with"),
        (Vhd(block_size=3 * MIB).build(), "powers of two"),
        (Vhd(max_entries=3).build(), "has 3 entries"),
        (Vhd(size=64 << 30, block_size=4096).build()[:4096], "allowed are 33554432"),
        (Vhd().build()[:1540], "reaches past"),
        (footer(1 << 60), "2040 GiB"),
        (footer(8 * MIB, 7), "disk type is 7"),
        (footer(8 * MIB, data_offset=1 << 50), "dynamic header at 0x4000000000000 lies past"),
        (bytes(4096) + footer(8 * MIB, 2), "cut short"),
        (footer(8 * MIB, 2) + bytes(8 * MIB), "none at the end"),
    ],
)
def test_what_is_refused(data: bytes, why: str) -> None:
    with pytest.raises(ImageError, match=why):
        opened(data)


def test_untrusted_sizes() -> None:
    with pytest.raises(ImageError, match="allowed are 1048576"):
        opened(Vhd().build(), policy=Policy.untrusted(MIB))


# -- fixed disks, known by their end ------------------------------------------------------------------


def test_a_fixed_disk_is_recognised_by_its_end(tmp_path: Path) -> None:
    path = tmp_path / "disk.vhd"
    create(str(path), "vpc", 10 * MIB, options={"subformat": "fixed", "force_size": True})
    assert path.stat().st_size == 10 * MIB + 512
    with byre.open(str(path), read_only=False) as image:
        assert (image.format, image.size) == ("vpc", 10 * MIB)
        image.write(10 * MIB - 5, b"last!")
    with byre.open(str(path)) as image:
        assert image.read(10 * MIB - 5, 5) == b"last!"


def test_what_azure_takes(tmp_path: Path) -> None:
    """A fixed disk, a whole number of mebibytes and a footer that says so, with a right checksum."""
    path = tmp_path / "disk.vhd"
    create(str(path), "vpc", 30 * MIB, options={"subformat": "fixed", "force_size": True})
    data = path.read_bytes()
    found = layout.decode_footer(data[-512:])
    assert (len(data) - 512) % MIB == 0
    assert (found.current_size, found.original_size) == (30 * MIB, 30 * MIB)
    assert (found.disk_type, found.data_offset) == (layout.FIXED, layout.NO_OFFSET)
    assert data[:-512] == bytes(30 * MIB)


def test_the_guest_of_a_fixed_disk_cannot_make_it_a_differencing_one(tmp_path: Path) -> None:
    path = tmp_path / "disk.vhd"
    (tmp_path / "secret").write_bytes(b"secret" * 100)
    create(str(path), "vpc", 10 * MIB, options={"subformat": "fixed", "force_size": True})
    forged = Vhd(kind=4, parent_name="secret", locators=[(b"W2ru", "secret".encode("utf-16-le"))]).build()
    with byre.open(str(path), read_only=False) as image:
        image.write(0, forged)
    with byre.open(str(path)) as image:
        assert image.node.children.keys() == {"file"}
        assert image.read(0, len(forged)) == forged


def test_the_guest_of_a_probed_raw_disk_cannot_make_it_a_fixed_vhd(tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(MIB))
    with byre.open(str(path), read_only=False) as image:
        assert image.format == "raw"
        with pytest.raises(AccessDenied, match="look like vpc"):
            image.write(MIB - 512, footer(MIB - 512, 2))
        image.write(MIB - 1024, footer(MIB - 512, 2))
    with byre.open(str(path)) as image:
        assert image.format == "raw"


# -- what is written ----------------------------------------------------------------------------------


def test_the_size_is_rounded_up_to_a_geometry() -> None:
    with open_image(new_image("vpc", 10 * MIB), "vpc") as image:
        assert image.size == 10514432
        assert isinstance(image.node, VpcNode)
        assert image.node.footer.chs_sectors * 512 == image.size
    with open_image(new_image("vpc", 10 * MIB, force_size=True), "vpc") as image:
        assert image.size == 10 * MIB


def test_too_large() -> None:
    with pytest.raises(InvalidArgument, match="2040 GiB"):
        new_image("vpc", 3 << 40)


def test_both_footers_and_the_end_of_the_file() -> None:
    memory = new_image("vpc", 8 * MIB, force_size=True)
    with open_image(memory, "vpc") as image:
        for block in (2, 0, 3):
            image.write(block * 2 * MIB + 77, b"x")
    data = memory.to_bytes()
    assert data[:512] == data[-512:]
    assert len(data) == 2048 + 3 * (2 * MIB + 512) + 512


def test_space_given_up_is_used_again() -> None:
    memory = new_image("vpc", 8 * MIB, force_size=True)
    with open_image(memory, "vpc") as image:
        for _ in range(4):
            image.write(0, b"x" * 4 * MIB)
            image.flush()
            image.discard(0, 4 * MIB)
            image.flush()
        image.write(4 * MIB + 100, b"y")
        assert image.read(4 * MIB, 200) == bytes(100) + b"y" + bytes(99)
    assert memory.size == 2048 + 2 * (2 * MIB + 512) + 512


@pytest.mark.parametrize("options", [{}, {"subformat": "fixed"}])
def test_growing_and_shrinking(options: dict[str, object]) -> None:
    memory = new_image("vpc", 5 * MIB + 512, force_size=True, **options)
    with open_image(memory, "vpc") as image:
        image.write(0, b"\xee" * image.size)
        image.resize(9 * MIB)
        assert image.read(5 * MIB, MIB) == b"\xee" * 512 + bytes(MIB - 512)
        image.resize(3 * MIB, shrink=True)
        image.resize(400 * MIB)
        image.write(399 * MIB, b"far")
        assert image.read(0, 6 * MIB) == b"\xee" * 3 * MIB + bytes(3 * MIB)
        with pytest.raises(InvalidArgument, match="2040 GiB"):
            image.resize(3 << 40)
    with open_image(detached(memory), "vpc", read_only=True) as image:
        assert image.size == 400 * MIB
        assert image.read(0, 6 * MIB) == b"\xee" * 3 * MIB + bytes(3 * MIB)
        assert image.read(399 * MIB, 3) == b"far"
        assert not image.node.check(Control()).messages  # type: ignore[attr-defined]


def test_a_resized_disk_is_measured_by_its_size_whoever_made_it() -> None:
    memory = MemoryNode(Vhd(application=b"vpc ", geometry=(100, 4, 17)).build())
    with open_image(memory, "vpc") as image:
        image.resize(11 * MIB)
    with open_image(memory, "vpc", read_only=True) as image:
        assert image.size == 11 * MIB


def test_info() -> None:
    with open_image(new_image("vpc", 10 * MIB), "vpc") as image:
        info = image.node.format_info()  # type: ignore[attr-defined]
    assert info == {"subformat": "dynamic", "creator": "byre", "current-size": 10514432, "cylinders": 302, "heads": 4,
                    "sectors": 17}  # fmt: skip
