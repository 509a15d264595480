"""asif: Apple Sparse Images of macOS 26, read-only.

There is no public specification; the layout follows the notes that the authors of dissect.hypervisor published. A
header names two directories, of which the one with the higher version counts; a directory lists tables, a table lists
chunks. In a table, one entry for a bitmap follows each group of entries for data. All numbers are big-endian.
"""

from __future__ import annotations

import struct

from ..errors import ImageError
from ..io.extent import DATA, UNALLOCATED, Extent
from ..options import OptionSet
from ..typing import TYPE_CHECKING, Final, NamedTuple
from .opening import read_exactly, read_head
from .readonly import ReadOnlyFormat, open_read_only

if TYPE_CHECKING:
    from array import array

    from ..graph.node import Node
    from ..graph.opening import OpenFlags, OpenRequest

__all__ = ["CHILDREN", "OPTIONS", "AsifNode", "Header", "decode_header", "encode_header", "open_node"]

CHILDREN: Final = ("file",)
OPTIONS: Final = OptionSet()

MAGIC: Final = b"shdw"
HEADER_SIZE: Final = 108
MAX_DIRECTORY: Final = (32 << 20) // 8
"""Tables; what the largest disk needs has far fewer."""
MAX_CHUNK: Final = 64 << 20
_CHUNK_MASK: Final = (1 << 55) - 1
"""The bits above say whether entry and content were written back."""
_TABLES_KEPT: Final = 32
"""Tables in memory, of at most 8 MiB in all: windows of ``_PAGE`` entries are kept, not whole tables."""
_PAGE: Final = 4096


class Header(NamedTuple):
    """The header.

    :ivar directories: where the two directories lie, bytes
    :ivar max_sectors: what the disk may grow to; the directory has room for it
    :ivar chunk_size: unit of allocation, bytes; offsets in tables count in it
    :ivar block_size: bytes of a sector
    """

    version: int
    header_size: int
    flags: int
    directories: tuple[int, int]
    guid: bytes
    sectors: int
    max_sectors: int
    chunk_size: int
    block_size: int
    segments: int = 0
    metadata_chunk: int = 0


_HEADER = struct.Struct(">4s3I2Q16s2QI2HQ16x12x")


def encode_header(header: Header) -> bytes:
    """The inverse of :func:`decode_header`."""
    first = (MAGIC, header.version, header.header_size, header.flags, *header.directories)
    return _HEADER.pack(*first, *header[4:])


def decode_header(data: bytes | bytearray | memoryview) -> Header:
    """:raises ImageError: it breaks the format"""
    if len(data) < _HEADER.size:
        raise ImageError(f"the file has {len(data)} bytes, an asif header takes {_HEADER.size}")
    magic, version, size, flags, one, other, *rest = _HEADER.unpack_from(data)
    if magic != MAGIC:
        raise ImageError(f"not an asif image: it begins with {magic!r}")
    header = Header._make((version, size, flags, (one, other), *rest))
    block, chunk = header.block_size, header.chunk_size
    if version != 1:
        raise ImageError(f"the header has version {version}; version 1 is known")
    if block not in (512, 1024, 2048, 4096):
        raise ImageError(f"the block size is {block}: expected 512 to 4096")
    if chunk % block or not 4096 <= chunk <= MAX_CHUNK or chunk & (chunk - 1):
        raise ImageError(f"the chunk size is {chunk}: expected a power of two from 4096 to {MAX_CHUNK}")
    if header.sectors > header.max_sectors or header.max_sectors * block >> 63:
        raise ImageError(f"the disk has {header.sectors} sectors and may grow to {header.max_sectors}")
    return header


class Geometry(NamedTuple):
    """Numbers that follow from the header.

    :ivar group: data entries between two bitmap entries
    :ivar table_entries: of a table, bitmaps included
    :ivar table_chunks: chunks of the disk that a table covers
    :ivar table_count: tables of a directory
    """

    group: int
    table_entries: int
    table_chunks: int
    table_count: int


def geometry(header: Header) -> Geometry:
    """:raises ImageError: the directory would be too large"""
    chunk = header.chunk_size
    # A bitmap chunk has two bits for each sector.
    group = max(1, 4 * chunk // (chunk // header.block_size))
    entries = chunk >> 3
    entries -= entries % (group + 1)
    if not entries:
        raise ImageError(f"a table of one chunk ({chunk} bytes) has no room for a group of {group} entries")
    chunks = entries - entries // (group + 1)
    span = chunks * chunk
    count = -(-header.max_sectors * header.block_size // span)
    if count > MAX_DIRECTORY:
        raise ImageError(f"the directory has {count} tables, allowed are {MAX_DIRECTORY}")
    return Geometry(group, entries, chunks, count)


# -- the node -------------------------------------------------------------------------------------


def open_node(request: OpenRequest) -> Node:
    """The node of an existing image; the header and the versions of the directories are read.

    :raises ImageError: they break the format
    :raises NotSupported: it is to be written
    """
    return open_read_only(request, AsifNode)


class AsifNode(ReadOnlyFormat):
    """An open image. Guarded by ``lock``: the directory and the pieces of tables in memory.

    :raises ImageError: the header breaks the format
    """

    driver = "asif"

    def __init__(self, file: Node, flags: OpenFlags) -> None:
        super().__init__(file, flags)
        self.header = header = decode_header(read_head(file, HEADER_SIZE))
        self.geometry = geometry(header)
        self.cluster_size = self.zero_unit = header.chunk_size
        self._size = header.sectors * header.block_size
        versions = [int.from_bytes(read_exactly(file, at, 8, "directory"), "big") for at in header.directories]
        self._directory_at = header.directories[1 if versions[1] > versions[0] else 0]
        self._directory: array[int] | None = None
        self._pages: dict[tuple[int, int], array[int]] = {}

    def _tables(self) -> array[int]:
        if self._directory is None:
            from ..io.tables import decode_words

            length = 8 * self.geometry.table_count
            self._directory = decode_words(read_exactly(self.file, self._directory_at + 8, length, "directory"))
        return self._directory

    def _entry(self, table: int, index: int) -> int:
        """Entry ``index`` of the table in chunk ``table``: a chunk of the file, 0 for none."""
        key = table, index // _PAGE
        page = self._pages.get(key)
        if page is None:
            from ..io.tables import decode_words

            first = key[1] * _PAGE
            count = min(_PAGE, self.geometry.table_entries - first)
            page = decode_words(read_exactly(self.file, table * self.header.chunk_size + 8 * first, 8 * count, "table"))
            if len(self._pages) >= _TABLES_KEPT:
                del self._pages[next(iter(self._pages))]
            self._pages[key] = page
        return page[index - key[1] * _PAGE] & _CHUNK_MASK

    def lookup(self, offset: int, length: int) -> list[Extent]:
        size, shape = self.header.chunk_size, self.geometry
        number, index = divmod(offset // size, shape.table_chunks)
        span_end = (number + 1) * shape.table_chunks * size
        end = min(offset + length, span_end)
        table = self._tables()[number] & _CHUNK_MASK
        if not table:
            return [Extent(offset, end - offset, UNALLOCATED)]
        rows: list[Extent] = []
        while offset < end and len(rows) < _PAGE:
            stop = min(end, (offset // size + 1) * size)
            chunk = self._entry(table, index + index // shape.group)
            if chunk * size >= self.file.size:
                raise ImageError(f"the chunk of the disk at {offset:#x} is said to lie at {chunk * size:#x}, past the "
                                 f"end of the file ({self.file.size:#x})", where=self.filename)  # fmt: skip
            if chunk:
                rows.append(Extent(offset, stop - offset, DATA, chunk * size + offset % size))
            else:
                rows.append(Extent(offset, stop - offset, UNALLOCATED))
            index += 1
            offset = stop
        return rows

    def format_info(self) -> dict[str, object]:
        """What the header says."""
        import uuid

        header = self.header
        return {
            "guid": str(uuid.UUID(bytes=header.guid)),
            "block-size": header.block_size,
            "maximum-size": header.max_sectors * header.block_size,
        }
