"""dmg: Apple's disk images (UDIF), read-only.

Description: libmodi, "Mac OS disk image types", "Universal Disk Image Format". A trailer of 512 bytes at the end of the
file points to a property list, or in older images to a resource fork, with a "blkx" table for each partition; they
say chunk by chunk what the disk holds: zeroes, plain bytes, or a stream (ADC, zlib, bzip2, lzma; LZFSE with a library).
All numbers are big-endian. Not supported: images in several segments, encrypted ones (which begin with "encrcdsa").
"""

from __future__ import annotations

import struct

from ..errors import ImageError
from ..io.extent import COMPRESSED, DATA, ZERO, Extent
from ..options import OptionSet
from ..typing import TYPE_CHECKING, Final, NamedTuple
from ..units import SECTOR
from .opening import read_exactly
from .readonly import ReadOnlyFormat, open_read_only

if TYPE_CHECKING:
    from ..graph.node import Node
    from ..graph.opening import OpenFlags, OpenRequest

__all__ = ["CHILDREN", "OPTIONS", "Chunk", "DmgNode", "Trailer", "decode_block_table", "decode_property_list",
           "decode_resource_fork", "decode_trailer", "encode_block_table", "encode_trailer", "open_node"]  # fmt: skip

CHILDREN: Final = ("file",)
OPTIONS: Final = OptionSet()

TRAILER_SIZE: Final = 512
TABLE_MAGIC: Final = b"mish"
MAX_METADATA: Final = 16 << 20
"""Of the property list or resource fork, bytes."""
MAX_CHUNK: Final = 64 << 20
"""Of a compressed chunk, before and after decoding, bytes."""
MAX_CHUNKS: Final = 1 << 19
MAX_TABLES: Final = 4096
MAX_TAGS: Final = 1 << 16
"""Tags of a property list: what is large in one is the content of a few elements."""

KIND_ZERO: Final = 0x00000000
KIND_RAW: Final = 0x00000001
KIND_IGNORED: Final = 0x00000002
KIND_COMMENT: Final = 0x7FFFFFFE
KIND_END: Final = 0xFFFFFFFF
STREAMS: Final = {
    0x80000004: "adc",
    0x80000005: "zlib",
    0x80000006: "bzip2",
    0x80000007: "lzfse",
    0x80000008: "lzma",
}
_ROWS: Final = 1024


class Trailer(NamedTuple):
    """The "koly" block; offsets and lengths are bytes in the file.

    :ivar data_offset: what the offsets of chunks count from
    :ivar sector_count: of the disk
    """

    data_offset: int
    data_length: int
    resource_offset: int
    resource_length: int
    list_offset: int
    list_length: int
    sector_count: int
    segment_count: int = 1


def encode_trailer(trailer: Trailer) -> bytes:
    """The inverse of :func:`decode_trailer`."""
    data = bytearray(TRAILER_SIZE)
    struct.pack_into(">4sII4x8x4Q", data, 0, b"koly", 4, TRAILER_SIZE, *trailer[:4])
    struct.pack_into(">II", data, 56, 1, trailer.segment_count)
    struct.pack_into(">2Q", data, 216, trailer.list_offset, trailer.list_length)
    struct.pack_into(">Q", data, 492, trailer.sector_count)
    return bytes(data)


def decode_trailer(data: bytes | bytearray | memoryview) -> Trailer:
    """:param data: the last 512 bytes of the file

    :raises ImageError: they are no trailer that byre understands
    """
    if len(data) < TRAILER_SIZE:
        raise ImageError(f"the file has {len(data)} bytes, the trailer of a dmg image takes {TRAILER_SIZE}")
    magic, version, size, *numbers = struct.unpack_from(">4sII4x8x4Q", data)
    (segments,) = struct.unpack_from(">I", data, 60)
    xml_offset, xml_length = struct.unpack_from(">2Q", data, 216)
    (sectors,) = struct.unpack_from(">Q", data, 492)
    if magic != b"koly":
        raise ImageError(f"not a dmg image: the trailer begins with {bytes(magic)!r}")
    if size != TRAILER_SIZE or version != 4:
        raise ImageError(f"the trailer has version {version} and {size} bytes; version 4 with {TRAILER_SIZE} is known")
    if segments > 1:
        raise ImageError(f"the image is one of {segments} segments, which is not supported")
    if numbers[0] >> 62:
        raise ImageError(f"the data fork lies beyond every file, at {numbers[0]:#x}")
    return Trailer._make((*numbers, xml_offset, xml_length, sectors, segments))


class Chunk(NamedTuple):
    """What ``length`` bytes of the disk from ``offset`` are.

    :ivar kind: one of the ``KIND_`` numbers or a key of ``STREAMS``
    :ivar host: where the bytes begin, counted from the data fork; ``host_length`` of them
    """

    offset: int
    length: int
    kind: int
    host: int
    host_length: int


_TABLE_HEAD: Final = 204
_ENTRY = struct.Struct(">II4Q")


def encode_block_table(first_sector: int, chunks: list[Chunk]) -> bytes:
    """The inverse of :func:`decode_block_table`, with the entry that ends it."""
    count = sum(chunk.length for chunk in chunks) // SECTOR
    head = struct.pack(">4sIQQQII", TABLE_MAGIC, 1, first_sector, count, 0, 0, 1).ljust(_TABLE_HEAD - 4, b"\0")
    rows = [
        _ENTRY.pack(
            chunk.kind, 0, chunk.offset // SECTOR - first_sector, chunk.length // SECTOR, chunk.host, chunk.host_length
        )
        for chunk in chunks
    ]
    rows.append(_ENTRY.pack(KIND_END, 0, count, 0, 0, 0))
    return head + struct.pack(">I", len(rows)) + b"".join(rows)


def decode_block_table(data: bytes | bytearray | memoryview) -> list[Chunk]:
    """One "blkx" table: its chunks with what they hold, without comments and the end.

    :raises ImageError: it breaks the format
    """
    if len(data) < _TABLE_HEAD or bytes(data[:4]) != TABLE_MAGIC:
        raise ImageError(f"a block table begins with {bytes(data[:4])!r} and has {len(data)} bytes")
    (first,) = struct.unpack_from(">Q", data, 8)
    (base,) = struct.unpack_from(">Q", data, 24)
    (count,) = struct.unpack_from(">I", data, 200)
    if _TABLE_HEAD + count * _ENTRY.size > len(data):
        raise ImageError(f"a block table of {len(data)} bytes says that it has {count} entries")
    chunks = []
    for index in range(count):
        kind, _, start, sectors, host, length = _ENTRY.unpack_from(data, _TABLE_HEAD + index * _ENTRY.size)
        if kind == KIND_END:
            break
        if kind != KIND_COMMENT and sectors:
            chunk = Chunk((first + start) * SECTOR, sectors * SECTOR, kind, base + host, length)
            _check(chunk, index)
            chunks.append(chunk)
    return chunks


def _check(chunk: Chunk, index: int) -> None:
    if chunk.kind not in (KIND_ZERO, KIND_RAW, KIND_IGNORED) and chunk.kind not in STREAMS:
        raise ImageError(f"entry {index} of a block table has the unknown kind {chunk.kind:#x}")
    if (chunk.offset + chunk.length) >> 63 or (chunk.host + chunk.host_length) >> 62:
        raise ImageError(f"entry {index} of a block table lies beyond every disk: sector {chunk.offset // SECTOR:#x}")
    if chunk.kind in STREAMS and max(chunk.length, chunk.host_length) > MAX_CHUNK:
        raise ImageError(f"entry {index} of a block table packs {chunk.length} bytes into {chunk.host_length}; "
                         f"allowed are {MAX_CHUNK}")  # fmt: skip
    if chunk.kind == KIND_RAW and chunk.host_length < chunk.length:
        raise ImageError(f"entry {index} of a block table has {chunk.host_length} bytes for {chunk.length}")


def decode_property_list(data: bytes | bytearray | memoryview) -> list[bytes]:
    """The block tables in an XML property list.

    :raises ImageError: it is no such list
    """
    import plistlib

    text = bytes(data)
    if text.count(b"<") > MAX_TAGS:
        raise ImageError(f"the property list has more than {MAX_TAGS} tags")
    try:
        root = plistlib.loads(text, fmt=plistlib.FMT_XML)
        found = [bytes(entry["Data"]) for entry in root["resource-fork"]["blkx"]]
    except Exception as error:
        raise ImageError(f"the property list of {len(data)} bytes is damaged: {type(error).__name__} {error}") from None
    return found


def decode_resource_fork(data: bytes | bytearray | memoryview) -> list[bytes]:
    """The block tables in a resource fork ("Inside Macintosh: More Macintosh Toolbox", resource file format).

    :raises ImageError: it breaks the format, or lists more than it can hold
    """
    total = 0
    try:
        base, table, *_ = struct.unpack_from(">4I", data)
        (types,) = struct.unpack_from(">H", data, table + 24)
        types += table
        (last,) = struct.unpack_from(">H", data, types)
        result: list[bytes] = []
        for index in range((last + 1) & 0xFFFF):
            name, last_item, items = struct.unpack_from(">4sHH", data, types + 2 + 8 * index)
            if name != b"blkx":
                continue
            for item in range(last_item + 1):
                (place,) = struct.unpack_from(">I", data, types + items + 12 * item + 4)
                start = base + (place & 0xFFFFFF)
                (length,) = struct.unpack_from(">I", data, start)
                total += length
                if len(result) == MAX_TABLES or total > len(data):
                    raise ImageError(f"the resource fork of {len(data)} bytes lists more than {len(result)} block "
                                     "tables with more bytes than it has")  # fmt: skip
                result.append(bytes(data[start + 4 : start + 4 + length]))
    except struct.error as error:
        raise ImageError(f"the resource fork of {len(data)} bytes is damaged: {error}") from None
    return result


# -- the node -------------------------------------------------------------------------------------


def open_node(request: OpenRequest) -> Node:
    """The node of an existing image; the trailer and the block tables are read.

    :raises ImageError: they break the format
    :raises NotSupported: it is to be written
    """
    return open_read_only(request, DmgNode)


class DmgNode(ReadOnlyFormat):
    """An open image; its chunks lie in memory, about 100 bytes each.

    :ivar chunks: in order, none overlaps another; what lies between them reads as zeroes
    :raises ImageError: the metadata breaks the format
    """

    driver = "dmg"

    def __init__(self, file: Node, flags: OpenFlags) -> None:
        from .streams import ChunkCache

        super().__init__(file, flags)
        if file.size < TRAILER_SIZE:
            raise ImageError(f"the file has {file.size} bytes, the trailer of a dmg image takes {TRAILER_SIZE}")
        self.trailer = decode_trailer(read_exactly(file, file.size - TRAILER_SIZE, TRAILER_SIZE, "trailer"))
        self.chunks = self._load_chunks()
        self._starts = [chunk.offset for chunk in self.chunks]
        ends = [chunk.offset + chunk.length for chunk in self.chunks]
        self._size = max(ends[-1] if ends else 0, self.trailer.sector_count * SECTOR)
        if self._size >> 63:
            raise ImageError(f"the trailer says that the disk has {self.trailer.sector_count} sectors")
        self.cluster_size = self.zero_unit = SECTOR
        self._cache = ChunkCache()

    def _load_chunks(self) -> list[Chunk]:
        from itertools import pairwise

        trailer = self.trailer
        if trailer.list_length:
            what, offset, length = "property list", trailer.list_offset, trailer.list_length
        else:
            what, offset, length = "resource fork", trailer.resource_offset, trailer.resource_length
        if length > MAX_METADATA:
            raise ImageError(f"the {what} has {length} bytes, allowed are {MAX_METADATA}")
        data = read_exactly(self.file, offset, length, what)
        tables = decode_property_list(data) if trailer.list_length else decode_resource_fork(data)
        if not tables:
            raise ImageError(f"the {what} holds no block table")
        chunks: list[Chunk] = []
        for table in tables:
            chunks += decode_block_table(table)
            if len(chunks) > MAX_CHUNKS:
                raise ImageError(f"the image has more than {MAX_CHUNKS} chunks")
        chunks.sort()
        for before, after in pairwise(chunks):
            if before.offset + before.length > after.offset:
                raise ImageError(f"two chunks overlap, at sectors {before.offset // SECTOR} and "
                                 f"{after.offset // SECTOR}")  # fmt: skip
        return chunks

    def _find(self, offset: int) -> int:
        """The index of the last chunk that begins at ``offset`` or before, -1 if none does."""
        from bisect import bisect_right

        return bisect_right(self._starts, offset) - 1

    def lookup(self, offset: int, length: int) -> list[Extent]:
        rows: list[Extent] = []
        end = offset + length
        index = self._find(offset)
        while offset < end and len(rows) < _ROWS:
            chunk = self.chunks[index] if index >= 0 else None
            if chunk is None or offset >= chunk.offset + chunk.length:
                index += 1
                stop = min(end, self._starts[index]) if index < len(self.chunks) else end
                if stop > offset:
                    rows.append(Extent(offset, stop - offset, ZERO))
                offset = stop
                continue
            stop = min(end, chunk.offset + chunk.length)
            rows.append(self._extent(chunk, offset, stop - offset))
            offset = stop
        return rows

    def _extent(self, chunk: Chunk, offset: int, length: int) -> Extent:
        host = self.trailer.data_offset + chunk.host
        if chunk.kind == KIND_RAW:
            return Extent(offset, length, DATA, host + offset - chunk.offset)
        if chunk.kind in STREAMS:
            return Extent(offset, length, COMPRESSED, host)
        return Extent(offset, length, ZERO)

    def decompress(self, extent: Extent, buffer: memoryview) -> None:
        index = self._find(extent.offset)
        chunk = self.chunks[index]
        data = self._cache.get(index, lambda: self._unpack(chunk), chunk.length)
        start = extent.offset - chunk.offset
        buffer[:] = data[start : start + len(buffer)]

    def _unpack(self, chunk: Chunk) -> bytes:
        from .streams import unpack

        where = f"{self.filename}: chunk at sector {chunk.offset // SECTOR}"
        packed = read_exactly(self.file, self.trailer.data_offset + chunk.host, chunk.host_length, "chunk")
        data = unpack(STREAMS[chunk.kind], packed, chunk.length, where)
        if len(data) != chunk.length:
            raise ImageError(f"its stream holds {len(data)} bytes instead of {chunk.length}", where=where)
        return data
