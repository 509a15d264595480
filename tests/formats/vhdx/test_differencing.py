"""Differencing VHDX disks: what is here and what is the parent's, which parent, and who may name one."""

from __future__ import annotations

import random
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import byre
from byre.errors import AccessDenied, ImageError, NotFound, NotSupported
from byre.graph.opening import Policy
from byre.io.extent import DATA, UNALLOCATED, ZERO
from support.forged_vhd import FULL, MIB, NOT_PRESENT, PARTIAL, Block, Vhdx
from support.forged_vhd import ZERO as ZERO_STATE

PARENT = uuid.UUID(int=0xFA7)
SIZE = 6 * MIB


def locator(name: str = "base.vhdx", guid: uuid.UUID = PARENT, **more: str) -> dict[str, str]:
    return {"parent_linkage": f"{{{guid}}}", "relative_path": f".\\{name}", **more}


def scattered(sectors: int, seed: int) -> list[bool]:
    """Runs of sectors that are here or not, of lengths from one sector to thousands."""
    chooser = random.Random(seed)
    found: list[bool] = []
    while len(found) < sectors:
        found += [bool(len(found) and not found[-1])] * chooser.choice((1, 2, 7, 8, 9, 64, 500, 3000))
    return found[:sectors]


def mixed(above: bytes, below: bytes, sectors: Sequence[bool], unit: int) -> bytes:
    parts = [(above if here else below)[number * unit : (number + 1) * unit] for number, here in enumerate(sectors)]
    return b"".join(parts)


@pytest.fixture(params=[512, 4096])
def folder(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """base.vhdx, top.vhdx over it, and what the top reads as, in "content"."""
    unit: int = request.param
    chooser = random.Random(unit)
    below = {n: chooser.randbytes(MIB) for n in (0, 1, 2, 4)}
    base = Vhdx(size=SIZE, logical=unit, data_guid=PARENT, blocks={n: Block(FULL, data) for n, data in below.items()})
    (tmp_path / "base.vhdx").write_bytes(base.build())
    bits = {n: scattered(MIB // unit, n + unit) for n in (1, 3, 4)}
    own = {n: chooser.randbytes(MIB) for n in (1, 2, 3, 4)}
    blocks = {n: Block(PARTIAL, own[n], bits[n]) for n in bits}
    blocks |= {2: Block(FULL, own[2]), 5: Block(ZERO_STATE), 0: Block(NOT_PRESENT)}
    top = Vhdx(size=SIZE, logical=unit, parent=locator(), blocks=blocks)
    (tmp_path / "top.vhdx").write_bytes(top.build())
    content = [below[0], mixed(own[1], below[1], bits[1], unit), own[2], mixed(own[3], bytes(MIB), bits[3], unit),
               mixed(own[4], below[4], bits[4], unit), bytes(MIB)]  # fmt: skip
    (tmp_path / "content").write_bytes(b"".join(content))
    return tmp_path


def test_sectors_come_from_where_the_bitmap_says(folder: Path) -> None:
    content = (folder / "content").read_bytes()
    with byre.open(str(folder / "top.vhdx")) as image:
        assert image.read(0, SIZE) == content
        chooser = random.Random(1)
        for _ in range(300):
            offset = chooser.randrange(SIZE)
            length = min(chooser.choice((1, 512, 5000, 300_000)), SIZE - offset)
            assert image.read(offset, length) == content[offset : offset + length]


def test_lookups_one_by_one_and_in_bulk_agree(folder: Path) -> None:
    with byre.open(str(folder / "top.vhdx")) as image:
        node: Any = image.node
        at, rows = 0, []
        while at < SIZE:
            with node.lock:
                rows += node.lookup(at, SIZE - at)
            at = rows[-1].end
        from byre.io.extentmap import ExtentMap

        bulk = node.extents(0, SIZE)
        assert list(ExtentMap.from_extents(rows).coalesced()) == list(bulk)
        assert {extent.kind for extent in bulk} == {DATA, UNALLOCATED, ZERO}


def test_the_whole_parent_is_named(folder: Path) -> None:
    with byre.open(str(folder / "top.vhdx"), backing=False) as image:
        node: Any = image.node
        assert (node.backing_name, node.backing_format) == ("base.vhdx", "vhdx")
        assert node.format_info()["subformat"] == "differencing"
        assert node.format_info()["parent"]["parent_linkage"] == f"{{{PARENT}}}"


def test_it_is_only_read(folder: Path) -> None:
    before = (folder / "top.vhdx").read_bytes(), (folder / "base.vhdx").read_bytes()
    with pytest.raises(NotSupported, match="differencing disks can only be read"):
        byre.open(str(folder / "top.vhdx"), read_only=False)
    with byre.open(str(folder / "top.vhdx")) as image, pytest.raises(NotSupported):
        image.reopen(read_only=False)
    assert before == ((folder / "top.vhdx").read_bytes(), (folder / "base.vhdx").read_bytes())


def test_a_parent_that_changed_is_refused(folder: Path) -> None:
    with byre.open(str(folder / "base.vhdx"), read_only=False) as image:
        image.write(0, b"changed")
    with pytest.raises(ImageError, match="the parent was changed since"):
        byre.open(str(folder / "top.vhdx"))
    # What the image itself holds can be looked at all the same.
    with byre.open(str(folder / "top.vhdx"), backing=False) as image:
        assert image.read(2 * MIB, MIB) == (folder / "content").read_bytes()[2 * MIB : 3 * MIB]


def test_the_gate(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    name = str(folder / "top.vhdx")
    with pytest.raises(AccessDenied, match="not opened for an untrusted image"):
        byre.open(name, policy=Policy.untrusted())
    elsewhere = str(tmp_path_factory.mktemp("elsewhere"))
    with pytest.raises(AccessDenied, match="outside the allowed folders"):
        byre.open(name, policy=Policy("below", (elsewhere,)))
    with byre.open(name, policy=Policy("below", (str(folder),))):
        pass


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ({"relative_path": "..\\up\\base.vhdx"}, "../up/base.vhdx"),
        ({"absolute_win32_path": "C:\\disks\\base.vhdx"}, "base.vhdx"),
        ({"volume_path": "\\\\?\\Volume{0}\\disks\\other.vhdx"}, "other.vhdx"),
        ({"relative_path": "json:{}"}, "json:{}"),
    ],
)
def test_names_of_parents(given: dict[str, str], name: str, tmp_path: Path) -> None:
    path = tmp_path / "top.vhdx"
    path.write_bytes(Vhdx(parent={"parent_linkage": "{}", **given}).build())
    with byre.open(str(path), backing=False) as image:
        assert image.node.backing_name == name  # type: ignore[attr-defined]
    with pytest.raises((NotFound, AccessDenied)):
        byre.open(str(path))


def test_a_sector_bitmap_that_is_not_there(folder: Path) -> None:
    data = bytearray((folder / "top.vhdx").read_bytes())
    with byre.open(str(folder / "top.vhdx")) as image:
        ratio = image.node.mapping.ratio  # type: ignore[attr-defined]
    at = 2 * MIB + 8 * ratio
    data[at : at + 8] = bytes(8)
    (folder / "top.vhdx").write_bytes(data)
    with byre.open(str(folder / "top.vhdx")) as image:
        assert image.read(2 * MIB, 10) == (folder / "content").read_bytes()[2 * MIB : 2 * MIB + 10]
        with pytest.raises(ImageError, match="no sector bitmap"):
            image.read(MIB, 10)


@pytest.mark.oracle
def test_other_readers_see_the_same(folder: Path) -> None:
    from dissect.hypervisor.disk.vhdx import VHDX

    content = (folder / "content").read_bytes()
    disk = VHDX(folder / "top.vhdx")
    # Block by block, as its reader of partial blocks wants it.
    for block in range(6):
        disk.seek(block * MIB)
        found = disk.read(MIB)
        assert found == content[block * MIB : (block + 1) * MIB], block


@pytest.mark.oracle
def test_libvhdi_sees_the_same(folder: Path) -> None:
    import pyvhdi

    base, top = pyvhdi.file(), pyvhdi.file()
    base.open(str(folder / "base.vhdx"))
    top.open(str(folder / "top.vhdx"))
    top.set_parent(base)
    assert top.read_buffer_at_offset(SIZE, 0) == (folder / "content").read_bytes()
    top.close()
    base.close()
