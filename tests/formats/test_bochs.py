"""bochs: growing disks, forged here from the description of the format."""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

import byre
from byre.catalog import probe
from byre.errors import ImageError, NotSupported
from byre.formats import bochs
from byre.graph.node import Node
from byre.io.extent import DATA, UNALLOCATED
from byre.protocols.memory import MemoryNode
from contracts.node import ReadOnlyFormatContract, patchwork
from support.images import open_image

SECTOR = 512


def forge(content: bytes, *, version: int = 0x20000, extent: int = 16384, sparse: bool = True, seed: int = 1) -> bytes:
    """A disk whose extents lie in random order; sectors of zeroes are left out where ``sparse``."""
    size = len(content)
    entries = -(-size // extent)
    bitmap = max(1, extent // SECTOR // 8)
    stored = -(-bitmap // SECTOR) * SECTOR
    order = [n for n in range(entries) if not sparse or any(content[n * extent : (n + 1) * extent])]
    random.Random(seed).shuffle(order)
    catalog = [0xFFFFFFFF] * entries
    blocks = []
    for place, index in enumerate(order):
        catalog[index] = place
        part = content[index * extent : (index + 1) * extent].ljust(extent, b"\0")
        bits = sum(1 << n for n in range(extent // SECTOR)
                   if any(part[n * SECTOR : (n + 1) * SECTOR]) or not sparse)  # fmt: skip
        # What the bitmap leaves out is rubbish.
        body = b"".join(
            part[n * SECTOR : (n + 1) * SECTOR] if bits >> n & 1 else b"\xee" * SECTOR for n in range(extent // SECTOR)
        )
        blocks.append(bits.to_bytes(stored, "little") + body)
    pad = b"" if version == 0x10000 else bytes(4)
    head = struct.pack("<32s16s16s5I", b"Bochs Virtual HD Image", b"Redolog", b"Growing", version, 512, entries, bitmap,
                       extent) + pad + struct.pack("<Q", size)  # fmt: skip
    return head.ljust(512, b"\0") + struct.pack(f"<{entries}I", *catalog) + b"".join(blocks)


class TestContract(ReadOnlyFormatContract):
    content = patchwork(1 << 20)

    @pytest.fixture(params=[(0x10000, 4096), (0x20000, 16384), (0x20000, 512), (0x20000, 8 << 20)])
    def node(self, request: pytest.FixtureRequest) -> Iterator[Node]:
        version, extent = request.param
        with open_image(
            MemoryNode(forge(self.content, version=version, extent=extent)), "bochs", read_only=True
        ) as image:
            yield image.node


def test_probing() -> None:
    good = forge(bytes(4096))
    assert probe(good).name == "bochs"
    assert probe(forge(bytes(4096), version=0x10000)).name == "bochs"
    assert probe(good.replace(b"Growing", b"Undoabl")).name == "raw"
    assert probe(forge(bytes(4096), version=0x30000)).name == "raw"


def test_header_is_kept() -> None:
    for version in (bochs.VERSION_1, bochs.VERSION_2):
        header = bochs.Header(version, 512, 8, 4, 16384, 100_000)
        assert bochs.decode_header(bochs.encode_header(header)) == header


@pytest.mark.parametrize(
    ("at", "value", "said"),
    [
        (0, b"X", "not a bochs image"),
        (48, b"V", "only growing"),
        (64, b"\0\0\3\0", "version"),
        (68, struct.pack("<I", 100), "inside the header"),
        (68, struct.pack("<I", 0xFFFFFF00), "past the end"),
        (72, struct.pack("<I", 0x100001), "allowed are 1048576"),
        (72, struct.pack("<I", 0x100000), "past the end"),
        (72, struct.pack("<I", 3), "room for"),
        (76, struct.pack("<I", 0), "bitmap"),
        (76, struct.pack("<I", 0xFFFFFFFF), "bitmap"),
        (80, struct.pack("<I", 0), "extent size"),
        (80, struct.pack("<I", 256), "extent size"),
        (80, struct.pack("<I", 5000), "extent size"),
        (80, struct.pack("<I", 1 << 24), "extent size"),
        (88, struct.pack("<Q", 1 << 63), "room for"),
    ],
)
def test_refusals(at: int, value: bytes, said: str) -> None:
    data = bytearray(forge(patchwork(100_000)))
    data[at : at + len(value)] = value
    with pytest.raises(ImageError, match=said):
        open_image(MemoryNode(bytes(data)), "bochs", read_only=True)


def test_an_extent_past_the_end_is_refused_where_it_is_read() -> None:
    data = bytearray(forge(b"x" * 65536, sparse=False))
    data[512:516] = struct.pack("<I", 1000)
    with open_image(MemoryNode(bytes(data)), "bochs", read_only=True) as image:
        assert image.read(16384, 100) == b"x" * 100
        with pytest.raises(ImageError, match=r"extent 0 .* past the end"):
            image.read(0, 512)


def test_it_is_read_only() -> None:
    file = MemoryNode(forge(b"x" * 65536))
    with pytest.raises(NotSupported, match="only be read"):
        open_image(file, "bochs")
    with open_image(MemoryNode(forge(b"x" * 65536)), "bochs", read_only=True) as image:
        with pytest.raises(NotSupported, match="only be read"):
            image.reopen(read_only=False)
        assert image.read(0, 3) == b"xxx"


def test_what_is_allocated() -> None:
    content = bytes(16384) + b"a" * 1024 + bytes(1024) + b"b" * (16384 - 2048)
    with open_image(MemoryNode(forge(content)), "bochs", read_only=True) as image:
        rows = [(row.offset, row.length, row.kind) for row in image.extents()]
    assert rows == [(0, 16384, UNALLOCATED), (16384, 1024, DATA), (17408, 1024, UNALLOCATED), (18432, 14336, DATA)]


def test_convert(tmp_path: Path) -> None:
    from byre.cli.main import main

    content = patchwork(1 << 20)
    (tmp_path / "disk").write_bytes(forge(content))
    assert main(["convert", "-O", "raw", str(tmp_path / "disk"), str(tmp_path / "out")]) == 0
    assert (tmp_path / "out").read_bytes() == content
    with byre.open(str(tmp_path / "disk")) as image:
        assert image.format == "bochs"
