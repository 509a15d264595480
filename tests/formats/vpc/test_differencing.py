"""Differencing VHD disks: what is here and what is the parent's, which parent, and who may name one."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

import byre
from byre.errors import AccessDenied, ImageError, NotSupported
from byre.graph.opening import Policy
from support.forged_vhd import MIB, Vhd

SIZE = 8 * MIB
UNIQUE = b"parent's own id."
NAME = "base.vhd"


def runs(seed: int) -> list[bool]:
    chooser = random.Random(seed)
    found: list[bool] = []
    while len(found) < 4096:
        found += [bool(len(found) and not found[-1])] * chooser.choice((1, 2, 7, 8, 9, 64, 500))
    return found[:4096]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """base.vhd, top.vhd over it, and what the top reads as, in "content"."""
    return build(tmp_path, {n: runs(n) for n in (1, 2)})


def build(tmp_path: Path, bits: dict[int, list[bool]]) -> Path:
    """:param bits: which sectors of blocks 1 and 2 are in the top"""
    chooser = random.Random(5)
    below = {n: chooser.randbytes(2 * MIB) for n in (0, 1)}
    all_here = [True] * 4096
    base = Vhd(blocks={n: (data, all_here) for n, data in below.items()}, unique=UNIQUE)
    (tmp_path / NAME).write_bytes(base.build())
    own = {n: chooser.randbytes(2 * MIB) for n in (1, 2)}
    names = [(b"W2ru", f".\\{NAME}".encode("utf-16-le")), (b"W2ku", f"C:\\x\\{NAME}".encode("utf-16-le"))]
    top = Vhd(kind=4, blocks={n: (own[n], bits[n]) for n in own}, parent_unique=UNIQUE, parent_name=NAME,
              locators=names)  # fmt: skip
    (tmp_path / "top.vhd").write_bytes(top.build())
    content = bytearray(SIZE)
    for n, data in below.items():
        content[n * 2 * MIB : (n + 1) * 2 * MIB] = data
    for n, data in own.items():
        for sector, here in enumerate(bits[n]):
            if here:
                at = sector * 512
                content[n * 2 * MIB + at : n * 2 * MIB + at + 512] = data[at : at + 512]
    (tmp_path / "content").write_bytes(content)
    return tmp_path


def test_sectors_come_from_where_the_bitmap_says(folder: Path) -> None:
    content = (folder / "content").read_bytes()
    with byre.open(str(folder / "top.vhd")) as image:
        assert image.read(0, SIZE) == content
        chooser = random.Random(1)
        for _ in range(200):
            offset = chooser.randrange(SIZE)
            length = min(chooser.choice((1, 512, 5000, 300_000)), SIZE - offset)
            assert image.read(offset, length) == content[offset : offset + length]
        assert image.node.format_info()["parent"] == NAME  # type: ignore[attr-defined]


def test_it_is_only_read(folder: Path) -> None:
    with pytest.raises(NotSupported, match="differencing disks can only be read"):
        byre.open(str(folder / "top.vhd"), read_only=False)


def test_another_parent_is_refused(folder: Path) -> None:
    (folder / NAME).write_bytes(Vhd(unique=b"somebody else's.").build())
    with pytest.raises(ImageError, match="this image was made over"):
        byre.open(str(folder / "top.vhd"))


def test_the_gate(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    name = str(folder / "top.vhd")
    with pytest.raises(AccessDenied, match="not opened for an untrusted image"):
        byre.open(name, policy=Policy.untrusted())
    with pytest.raises(AccessDenied, match="outside the allowed folders"):
        byre.open(name, policy=Policy("below", (str(tmp_path_factory.mktemp("elsewhere")),)))


@pytest.mark.parametrize(
    ("locators", "name"),
    [
        ([(b"Wi2r", b".\\old.vhd")], "old.vhd"),
        ([(b"W2ku", "D:\\disks\\far.vhd".encode("utf-16-le"))], "far.vhd"),
        ([(b"W2ru", "..\\up.vhd".encode("utf-16-le")), (b"W2ku", "D:\\far.vhd".encode("utf-16-le"))], "../up.vhd"),
        ([(b"MacX", b"file:///base.vhd")], None),
    ],
)
def test_names_of_parents(locators: list[tuple[bytes, bytes]], name: str | None, tmp_path: Path) -> None:
    path = tmp_path / "top.vhd"
    path.write_bytes(Vhd(kind=4, locators=locators).build())
    if name is None:
        with pytest.raises(ImageError, match="names no parent"):
            byre.open(str(path), backing=False)
        path.write_bytes(Vhd(kind=4, locators=locators, parent_name="folder\\unicode.vhd").build())
    with byre.open(str(path), backing=False) as image:
        assert image.node.backing_name == (name or "unicode.vhd")  # type: ignore[attr-defined]


@pytest.mark.oracle
def test_libvhdi_sees_the_same(tmp_path: Path) -> None:
    """Its runs of sectors begin anywhere, but end with a byte of the bitmap."""
    import pyvhdi

    bits = {n: runs(n) for n in (1, 2)}
    for sectors in bits.values():
        for at in range(1, 4096):
            if at % 8 and sectors[at - 1]:
                sectors[at] = True
    folder = build(tmp_path, bits)
    base, top = pyvhdi.file(), pyvhdi.file()
    base.open(str(folder / NAME))
    top.open(str(folder / "top.vhd"))
    top.set_parent(base)
    assert top.read_buffer_at_offset(SIZE, 0) == (folder / "content").read_bytes()
    top.close()
    base.close()
