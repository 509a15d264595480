"""asif: Apple Sparse Images, forged here; an independent reader agrees."""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

import byre
from byre.catalog import probe
from byre.errors import ImageError, NotSupported
from byre.formats import asif
from byre.graph.node import Node
from byre.io.extent import DATA, UNALLOCATED
from byre.protocols.memory import MemoryNode
from contracts.node import ReadOnlyFormatContract, patchwork
from support.images import open_image

CHUNK = 256 << 10
HEADER = asif.Header(1, 512, 0, (CHUNK, CHUNK + 65536), bytes(range(16)), 0, 1 << 30, CHUNK, 512)


def forge(path: Path, parts: dict[int, bytes], sectors: int, *, newer: int = 1) -> None:
    """A sparse file with ``parts`` (by chunk of the disk), whose chunks lie in random order.

    :param newer: which directory has the higher version; the other one lists nothing
    """
    header = HEADER._replace(sectors=sectors)
    shape = asif.geometry(header)
    tables = sorted({chunk // shape.table_chunks for chunk in parts})
    place = {table: 2 + index for index, table in enumerate(tables)}
    order = list(parts)
    random.Random(2).shuffle(order)
    with open(path, "wb") as file:
        file.write(asif.encode_header(header))
        for index, at in enumerate(header.directories):
            file.seek(at)
            file.write(struct.pack(">Q", 7 if index == newer else 6))
            for table in tables if index == newer else ():
                file.seek(at + 8 + 8 * table)
                file.write(struct.pack(">Q", place[table]))
        for number, chunk in enumerate(order):
            host = 2 + len(tables) + number
            table, index = divmod(chunk, shape.table_chunks)
            file.seek(place[table] * CHUNK + 8 * (index + index // shape.group))
            file.write(struct.pack(">Q", host | 1 << 63))
            file.seek(host * CHUNK)
            file.write(parts[chunk].ljust(CHUNK, b"\0"))
        for table in tables:
            file.truncate(max(file.seek(0, 2), (place[table] + 1) * CHUNK))
        file.truncate(max(file.seek(0, 2), 2 * CHUNK + 8 * shape.table_count))


def split(content: bytes) -> dict[int, bytes]:
    parts = {at // CHUNK: content[at : at + CHUNK] for at in range(0, len(content), CHUNK)}
    return {chunk: part for chunk, part in parts.items() if any(part)}


class TestContract(ReadOnlyFormatContract):
    content = (patchwork(1 << 20) + bytes(600_000) + patchwork(1 << 20, seed=8))[: 5000 * 512]

    @pytest.fixture(params=[0, 1])
    def node(self, request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Node]:
        forge(tmp_path / "disk.asif", split(self.content), 5000, newer=request.param)
        with byre.open(str(tmp_path / "disk.asif")) as image:
            assert image.format == "asif"
            yield image.node


def test_chunks_behind_bitmaps_and_in_other_tables(tmp_path: Path) -> None:
    """Also what an independent reader makes of it."""
    from dissect.hypervisor.disk.asif import ASIF

    shape = asif.geometry(HEADER)
    places = [0, 2047, 2048, 4096, shape.table_chunks - 1, shape.table_chunks, shape.table_chunks + 2049]
    parts = {chunk: random.Random(chunk).randbytes(CHUNK) for chunk in places}
    path = tmp_path / "disk.asif"
    forge(path, parts, (places[-1] + 1) * CHUNK // 512)
    with byre.open(str(path)) as image, open(path, "rb") as file:
        other = ASIF(file).open()
        for chunk in [*places, 1, 2049, shape.table_chunks + 1]:
            want = parts.get(chunk, bytes(CHUNK))
            assert image.read(chunk * CHUNK, CHUNK) == want, chunk
            other.seek(chunk * CHUNK)
            assert other.read(CHUNK) == want, chunk


def test_map(tmp_path: Path) -> None:
    path = tmp_path / "disk.asif"
    forge(path, {1: b"x"}, 3 * CHUNK // 512)
    with byre.open(str(path)) as image:
        rows = [(row.offset, row.length, row.kind) for row in image.node.extents(0, image.size)]
        assert rows == [(0, CHUNK, UNALLOCATED), (CHUNK, CHUNK, DATA), (2 * CHUNK, CHUNK, UNALLOCATED)]
        with pytest.raises(NotSupported, match="only be read"):
            byre.open(str(path), read_only=False)


def test_header_is_kept() -> None:
    assert asif.decode_header(asif.encode_header(HEADER)) == HEADER
    assert probe(asif.encode_header(HEADER)).name == "asif"


@pytest.mark.parametrize(
    ("header", "said"),
    [
        (HEADER._replace(version=9), "version 9"),
        (HEADER._replace(block_size=513), "block size is 513"),
        (HEADER._replace(chunk_size=1000), "chunk size is 1000"),
        (HEADER._replace(chunk_size=1 << 30), "chunk size"),
        (HEADER._replace(chunk_size=4096), "no room for a group"),
        (HEADER._replace(sectors=1 << 40), "may grow to"),
        (HEADER._replace(max_sectors=1 << 60), "may grow to"),
        (HEADER._replace(max_sectors=1 << 53), "directory has"),
        (HEADER._replace(directories=(1 << 40, 0)), "past the end"),
    ],
)
def test_headers_that_lie(header: asif.Header, said: str) -> None:
    with pytest.raises(ImageError, match=said):
        open_image(MemoryNode(asif.encode_header(header) + bytes(1000)), "asif", read_only=True)


def test_a_table_past_the_end_is_refused_when_it_is_needed(tmp_path: Path) -> None:
    path = tmp_path / "disk.asif"
    forge(path, {1: b"x"}, 3 * CHUNK // 512)
    with open(path, "r+b") as file:
        file.seek(HEADER.directories[1] + 8)
        file.write(struct.pack(">Q", 1 << 50))
    with byre.open(str(path)) as image, pytest.raises(ImageError, match="past the end"):
        image.read(0, 512)


def test_a_chunk_past_the_end_is_refused_when_it_is_needed(tmp_path: Path) -> None:
    path = tmp_path / "disk.asif"
    forge(path, {0: b"x", 1: b"y"}, 3 * CHUNK // 512)
    with open(path, "r+b") as file:
        file.seek(2 * CHUNK + 8)
        file.write(struct.pack(">Q", (1 << 55) - 1))
    with byre.open(str(path)) as image:
        assert image.read(0, 1) == b"x"
        for look in (lambda: image.read(CHUNK, 512), image.extents):
            with pytest.raises(ImageError, match="past the end"):
                look()
