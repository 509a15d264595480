"""dmg: Apple's disk images, forged here in every kind of chunk."""

from __future__ import annotations

import bz2
import lzma
import plistlib
import random
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import byre
from byre.catalog import probe
from byre.errors import ByreError, ImageError, NotSupported
from byre.formats import dmg
from byre.formats.dmg import Chunk, Trailer
from byre.formats.streams import unpack
from byre.graph.node import Node
from byre.io.extent import COMPRESSED, DATA, ZERO
from byre.protocols.memory import MemoryNode
from contracts.node import ReadOnlyFormatContract, patchwork
from support.images import open_image

PACK: dict[int, Callable[[bytes], bytes]] = {
    dmg.KIND_RAW: bytes,
    0x80000004: lambda data: b"".join(bytes([127 + len(data[at : at + 128])]) + data[at : at + 128]
                                      for at in range(0, len(data), 128)),
    0x80000005: zlib.compress,
    0x80000006: bz2.compress,
    0x80000008: lzma.compress,
}  # fmt: skip


def forge(
    content: bytes, *, fork: bool = False, tables: int = 1, kinds: tuple[int, ...] = tuple(PACK), start: int = 0
) -> bytes:
    """An image whose chunks are of all ``kinds`` in turn; runs of zeroes are left out or said to be zero.

    :param fork: with a resource fork rather than a property list
    :param start: bytes before the data fork
    """
    chooser = random.Random(3)
    chunks: list[Chunk] = []
    body, at, turn = b"", 0, 0
    while at < len(content):
        length = min(len(content) - at, 512 * chooser.randrange(1, 200))
        part = content[at : at + length]
        if not any(part):
            if chooser.random() < 0.7:
                chunks.append(Chunk(at, length, chooser.choice((dmg.KIND_ZERO, dmg.KIND_IGNORED)), len(body), 0))
        else:
            kind = kinds[turn % len(kinds)]
            packed = PACK[kind](part)
            chunks.append(Chunk(at, length, kind, len(body), len(packed)))
            body += packed
            turn += 1
        at += length
    share = -(-len(chunks) // tables)
    encoded = [
        dmg.encode_block_table(part[0].offset // 512, part)
        for part in (chunks[n * share : (n + 1) * share] for n in range(tables))
    ]
    body = bytes(start) + body
    if fork:
        metadata = resource_fork(encoded)
        trailer = Trailer(start, len(body) - start, len(body), len(metadata), 0, 0, len(content) // 512)
    else:
        metadata = plistlib.dumps(
            {"resource-fork": {"blkx": [{"Attributes": "0x0050", "Data": data} for data in encoded]}}
        )
        trailer = Trailer(start, len(body) - start, 0, 0, len(body), len(metadata), len(content) // 512)
    return body + metadata + dmg.encode_trailer(trailer)


def resource_fork(tables: list[bytes]) -> bytes:
    data = b"".join(struct.pack(">I", len(table)) + table for table in tables)
    items, at = b"", 0
    for number, table in enumerate(tables):
        items += struct.pack(">HHII", number, 0xFFFF, at, 0)
        at += 4 + len(table)
    types = struct.pack(">H4sHH4sHH", 1, b"plst", 0, 18, b"blkx", len(tables) - 1, 18 + 12)
    kept = struct.pack(">HHII", 0, 0xFFFF, 0, 0)
    table = struct.pack(">16x4x2x2xHH", 28, 0) + types + kept + items
    return struct.pack(">4I", 256, 256 + len(data), len(data), len(table)).ljust(256, b"\0") + data + table


class TestContract(ReadOnlyFormatContract):
    content = patchwork(1 << 20)[: 1 << 20]

    @pytest.fixture(params=[{}, {"fork": True}, {"tables": 3}, {"start": 1000, "kinds": (dmg.KIND_RAW,)}])
    def node(self, request: pytest.FixtureRequest) -> Iterator[Node]:
        with open_image(MemoryNode(forge(self.content, **request.param)), "dmg", read_only=True) as image:
            yield image.node


def test_it_is_recognised_by_its_end(tmp_path: Path) -> None:
    path = tmp_path / "disk.dmg"
    path.write_bytes(forge(patchwork(1 << 17)))
    with byre.open(str(path)) as image:
        assert image.format == "dmg"
    assert probe(bytes(512), dmg.encode_trailer(Trailer(0, 0, 0, 0, 0, 0, 1))).name == "dmg"
    assert probe(bytes(512), b"koly".ljust(512, b"\0")).name == "raw"


def test_trailer_and_tables_are_kept() -> None:
    trailer = Trailer(1, 2, 3, 4, 5, 6, 7)
    assert dmg.decode_trailer(dmg.encode_trailer(trailer)) == trailer
    chunks = [Chunk(5120, 512, 1, 9, 512), Chunk(5632, 1024, 0x80000005, 521, 30)]
    assert dmg.decode_block_table(dmg.encode_block_table(10, chunks)) == chunks


def test_map_tells_what_is_plain_packed_and_nothing() -> None:
    content = b"a" * 1024 + bytes(1024) + b"b" * 1024
    chunks = [
        Chunk(0, 1024, dmg.KIND_RAW, 0, 1024),
        Chunk(2048, 1024, 0x80000005, 1024, len(zlib.compress(b"b" * 1024))),
    ]
    body = b"a" * 1024 + zlib.compress(b"b" * 1024)
    metadata = plistlib.dumps({"resource-fork": {"blkx": [{"Data": dmg.encode_block_table(0, chunks)}]}})
    data = body + metadata + dmg.encode_trailer(Trailer(0, len(body), 0, 0, len(body), len(metadata), 6))
    with open_image(MemoryNode(data), "dmg", read_only=True) as image:
        assert image.read(0, image.size) == content
        assert [(row.offset, row.length, row.kind) for row in image.extents()] == [
            (0, 1024, DATA), (1024, 1024, ZERO), (2048, 1024, COMPRESSED),
        ]  # fmt: skip


def _with_chunks(*chunks: Chunk) -> bytes:
    table = dmg.encode_block_table(0, list(chunks))
    metadata = plistlib.dumps({"resource-fork": {"blkx": [{"Data": table}]}})
    return metadata + dmg.encode_trailer(Trailer(0, 0, 0, 0, 0, len(metadata), 8))


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (bytes(100), "takes 512"),
        (bytes(1024), "not a dmg image"),
        (dmg.encode_trailer(Trailer(0, 0, 0, 0, 0, 0, 1)), "resource fork"),
        (dmg.encode_trailer(Trailer(0, 0, 0, 0, 0, 1 << 40, 1)), "allowed are"),
        (dmg.encode_trailer(Trailer(0, 0, 0, 0, 0, 4096, 1)), "past the end"),
        (dmg.encode_trailer(Trailer(0, 0, 0, 0, 0, 10, 1, 2)), "segments"),
        (b"<plist" + dmg.encode_trailer(Trailer(0, 0, 0, 0, 0, 6, 1)), "property list"),
        (_with_chunks(Chunk(0, 512, 0x80000099, 0, 1)), "unknown kind"),
        (_with_chunks(Chunk(0, 128 << 20, 0x80000005, 0, 1)), "allowed are"),
        (_with_chunks(Chunk(0, 512, 0x80000005, 0, 128 << 20)), "allowed are"),
        (_with_chunks(Chunk(0, 1024, 1, 0, 512)), "has 512 bytes for 1024"),
        (_with_chunks(Chunk(0, 1024, 0, 0, 0), Chunk(512, 512, 0, 0, 0)), "overlap"),
    ],
)
def test_metadata_that_lies(data: bytes, said: str) -> None:
    with pytest.raises(ImageError, match=said):
        open_image(MemoryNode(data), "dmg", read_only=True)


def test_entities_in_the_property_list_are_refused() -> None:
    entities = b'<!DOCTYPE plist [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;">]>'
    bomb = b'<?xml version="1.0"?>' + entities + b"<plist><string>&b;</string></plist>"
    with pytest.raises(ImageError, match="property list"):
        dmg.decode_property_list(bomb)


@pytest.mark.parametrize(
    "packed", [zlib.compress(bytes(100_000)), zlib.compress(bytes(512))[:-5], zlib.compress(b"x"), b"junk"]
)
def test_a_damaged_chunk_is_refused_when_it_is_read(packed: bytes) -> None:
    table = dmg.encode_block_table(0, [Chunk(0, 512, 0x80000005, 0, len(packed))])
    metadata = plistlib.dumps({"resource-fork": {"blkx": [{"Data": table}]}})
    data = packed + metadata + dmg.encode_trailer(Trailer(0, 0, 0, 0, len(packed), len(metadata), 1))
    with (
        open_image(MemoryNode(data), "dmg", read_only=True) as image,
        pytest.raises(ImageError, match="chunk at sector 0"),
    ):
        image.read(0, 512)


def test_lzfse_without_its_library_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "liblzfse", None)
    with pytest.raises(NotSupported, match="LZFSE"):
        unpack("lzfse", b"bvx2", 100, "disk.dmg")


def test_adc_references_may_reach_into_themselves() -> None:
    # "ab", then 10 bytes from 2 back, then 3 bytes from 12 back in the short form.
    data = bytes([0x81]) + b"ab" + bytes([0x40 | 6, 0, 1]) + bytes([0 << 2, 11])
    assert unpack("adc", data, 100, "x") == b"ab" * 6 + b"aba"
    for bad in (b"\x40\x00", b"\x40\x00\x05", b"\x00"):
        with pytest.raises(ImageError, match="back"):
            unpack("adc", bad, 100, "x")


@pytest.mark.parametrize("method", ["zlib", "gzip", "bzip2", "lzma", "zstd", "adc"])
def test_no_stream_gives_more_than_is_asked_for(method: str) -> None:
    import gzip

    from backports import zstd

    big = bytes(10_000_000)
    pack: dict[str, Callable[[bytes], bytes]] = {
        "zlib": zlib.compress,
        "gzip": gzip.compress,
        "bzip2": bz2.compress,
        "lzma": lzma.compress,
        "zstd": zstd.compress,
        "adc": lambda data: b"\x80\0" + b"\x7f\0\0" * (len(data) // 67),
    }
    packed = pack[method](big)
    with pytest.raises(ImageError, match="more than 1000 bytes"):
        unpack(method, packed, 1000, "x")
    for bad in (b"", b"\0", packed[: len(packed) // 2]):
        try:
            assert len(unpack(method, bad, 20_000_000, "x")) < 20_000_000
        except ByreError:
            pass


@pytest.mark.oracle
@pytest.mark.parametrize("fork", [False, True])
def test_the_peer_reads_the_same(tmp_path: Path, qemu_img: Callable[..., object], fork: bool) -> None:
    path, raw = tmp_path / "disk.dmg", tmp_path / "disk.raw"
    content = patchwork(1 << 20, seed=5)
    # Everywhere installed peers lack ADC; bzip2 is a module of its own.
    path.write_bytes(forge(content, fork=fork, tables=2, kinds=(dmg.KIND_RAW, 0x80000005)))
    raw.write_bytes(content)
    qemu_img("compare", "-f", "dmg", "-F", "raw", str(path), str(raw))


def test_a_resource_fork_that_lists_one_table_for_ever() -> None:
    """7000 types of 65,536 items each, all the same item and the same table."""
    table = dmg.encode_block_table(0, [Chunk(0, 512, 1, 0, 512)])
    data = struct.pack(">I", len(table)) + table
    types = struct.pack(">H", 6999) + struct.pack(">4sHH", b"blkx", 0xFFFF, 56002) * 7000
    rest = struct.pack(">16x4x2x2xHH", 28, 0) + types + bytes(12 * 65536)
    fork = struct.pack(">4I", 256, 256 + len(data), len(data), len(rest)).ljust(256, b"\0") + data + rest
    with pytest.raises(ImageError, match="more than"):
        dmg.decode_resource_fork(fork)


@pytest.mark.parametrize("element", [b"<dict/>", b"<array>"])
def test_a_property_list_of_nothing_but_tags(element: bytes) -> None:
    data = b'<?xml version="1.0"?><plist version="1.0"><array>' + element * 100_000
    with pytest.raises(ImageError, match="65536 tags"):
        dmg.decode_property_list(data)


@pytest.mark.parametrize("place", [(1 << 64) - 512, 1 << 63, (1 << 63) - 512])
def test_a_data_fork_beyond_every_file(place: int) -> None:
    data = bytearray(forge(patchwork(1 << 16)))
    struct.pack_into(">Q", data, len(data) - 512 + 24, place)
    with pytest.raises(ImageError, match="beyond every"):
        open_image(MemoryNode(bytes(data)), "dmg", read_only=True)
