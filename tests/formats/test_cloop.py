"""cloop: compressed disks, forged here."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import byre
from byre.catalog import probe
from byre.errors import ImageError, NotSupported
from byre.formats import cloop
from byre.graph.node import Node
from byre.io.extent import COMPRESSED
from byre.protocols.memory import MemoryNode
from contracts.node import ReadOnlyFormatContract, patchwork
from support.images import open_image


def forge(content: bytes, block: int = 65536) -> bytes:
    assert len(content) % block == 0
    packed = [zlib.compress(content[at : at + block]) for at in range(0, len(content), block)]
    head = cloop.encode_header(cloop.Header(block, len(packed)))
    at = len(head) + 8 * (len(packed) + 1)
    offsets = [at]
    for part in packed:
        at += len(part)
        offsets.append(at)
    return head + struct.pack(f">{len(offsets)}Q", *offsets) + b"".join(packed)


class TestContract(ReadOnlyFormatContract):
    content = patchwork(1 << 20)

    @pytest.fixture(params=[512, 65536, 1 << 20])
    def node(self, request: pytest.FixtureRequest) -> Iterator[Node]:
        with open_image(MemoryNode(forge(self.content, request.param)), "cloop", read_only=True) as image:
            yield image.node


def test_probing() -> None:
    good = forge(bytes(4096), 4096)
    assert probe(good).name == "cloop"
    assert probe(good.replace(b"V2.0", b"V3.0")).name == "raw"


def test_header_is_kept() -> None:
    header = cloop.Header(65536, 7)
    assert cloop.decode_header(cloop.encode_header(header)) == header


@pytest.mark.parametrize(
    ("block", "count", "said"),
    [
        (0, 1, "block size is 0"),
        (1000, 1, "block size is 1000"),
        (128 << 20, 1, "block size"),
        (512, 0xFFFFFFFF, "allowed are"),
        (512, 1 << 20, "past the end of the file"),
    ],
)
def test_headers_that_lie(block: int, count: int, said: str) -> None:
    data = cloop.encode_header(cloop.Header(block, count)) + bytes(64)
    with pytest.raises(ImageError, match=said):
        open_image(MemoryNode(data), "cloop", read_only=True)


def _bomb(data: bytearray) -> None:
    """A stream that holds a byte more than a block."""
    packed = zlib.compress(bytes(4097))
    data[136 + 16 :] = packed
    struct.pack_into(">2Q", data, 136, 152, 152 + len(packed))


def _short(data: bytearray) -> None:
    packed = zlib.compress(bytes(4095))
    data[136 + 16 :] = packed
    struct.pack_into(">2Q", data, 136, 152, 152 + len(packed))


def _cut(data: bytearray) -> None:
    struct.pack_into(">2Q", data, 136, 152, 155)


def _backwards(data: bytearray) -> None:
    struct.pack_into(">2Q", data, 136, 152, 100)


def _far(data: bytearray) -> None:
    struct.pack_into(">2Q", data, 136, 1 << 40, (1 << 40) + 100)


def _huge(data: bytearray) -> None:
    struct.pack_into(">2Q", data, 136, 152, 1 << 62)


@pytest.mark.parametrize("spoil", [_bomb, _short, _cut, _backwards, _far, _huge])
def test_a_damaged_block_is_refused_when_it_is_read(spoil: Callable[[bytearray], None]) -> None:
    data = bytearray(forge(bytes(4096), 4096))
    spoil(data)
    with (
        open_image(MemoryNode(bytes(data)), "cloop", read_only=True) as image,
        pytest.raises(ImageError, match="block 0"),
    ):
        image.read(0, 4096)


def test_map_shows_compressed_blocks() -> None:
    with open_image(MemoryNode(forge(patchwork(8192), 4096)), "cloop", read_only=True) as image:
        assert [(row.offset, row.length, row.kind) for row in image.extents()] == [
            (0, 4096, COMPRESSED), (4096, 4096, COMPRESSED),
        ]  # fmt: skip


def test_it_is_not_written(tmp_path: Path) -> None:
    path = tmp_path / "disk.cloop"
    path.write_bytes(forge(bytes(4096), 4096))
    with pytest.raises(NotSupported, match="only be read"):
        byre.open(str(path), read_only=False)


@pytest.mark.oracle
def test_the_peer_reads_the_same(tmp_path: Path, qemu_img: Callable[..., object]) -> None:
    path, raw = tmp_path / "disk.cloop", tmp_path / "disk.raw"
    content = patchwork(1 << 20, seed=5)
    path.write_bytes(forge(content))
    raw.write_bytes(content)
    qemu_img("compare", "-f", "cloop", "-F", "raw", str(path), str(raw))


@pytest.mark.parametrize("place", [1 << 40, 1 << 63, (1 << 64) - 1])
def test_a_block_past_the_end_is_refused_by_map_as_well(place: int) -> None:
    data = bytearray(forge(patchwork(8192), 4096))
    struct.pack_into(">Q", data, 136 + 8, place)
    with (
        open_image(MemoryNode(bytes(data)), "cloop", read_only=True) as image,
        pytest.raises(ImageError, match="block 1 begins"),
    ):
        image.extents()
