"""cloop: compressed read-only disks as Knoppix has them, "V2.0 Format".

There is no document: 128 bytes of shell preamble, the block size and the number of blocks as 32-bit numbers, then that
many and one 64-bit offsets of zlib streams, each of which holds one block. All numbers are big-endian.
"""

from __future__ import annotations

import struct

from ..errors import ImageError
from ..io.extent import COMPRESSED, Extent
from ..options import OptionSet
from ..typing import TYPE_CHECKING, Final, NamedTuple
from ..units import SECTOR
from .opening import read_exactly, read_head
from .readonly import ReadOnlyFormat, open_read_only

if TYPE_CHECKING:
    from array import array

    from ..graph.node import Node
    from ..graph.opening import OpenFlags, OpenRequest

__all__ = ["CHILDREN", "MAGIC", "OPTIONS", "CloopNode", "Header", "decode_header", "encode_header", "open_node"]

CHILDREN: Final = ("file",)
OPTIONS: Final = OptionSet()

MAGIC: Final = b"#!/bin/sh\n#V2.0 Format\nmodprobe cloop file=$0 && mount -r -t iso9660 /dev/cloop $1\n"
PREAMBLE: Final = 128
HEADER_SIZE: Final = PREAMBLE + 8
MAX_BLOCK: Final = 64 << 20
MAX_BLOCKS: Final = (32 << 20) // 8
_ROWS: Final = 1024


class Header(NamedTuple):
    """:ivar block_size: guest bytes of a block; :ivar block_count: how many there are"""

    block_size: int
    block_count: int


def encode_header(header: Header) -> bytes:
    """The inverse of :func:`decode_header`."""
    return MAGIC.ljust(PREAMBLE, b"\0") + struct.pack(">II", *header)


def decode_header(data: bytes | bytearray | memoryview) -> Header:
    """:raises ImageError: it breaks the format, or is larger than byre reads"""
    if len(data) < HEADER_SIZE:
        raise ImageError(f"the file has {len(data)} bytes, a cloop header takes {HEADER_SIZE}")
    header = Header(*struct.unpack_from(">II", data, PREAMBLE))
    size, count = header
    if size == 0 or size % SECTOR or size > MAX_BLOCK:
        raise ImageError(f"the block size is {size}: expected a multiple of {SECTOR} up to {MAX_BLOCK}")
    if count > MAX_BLOCKS:
        raise ImageError(f"the image has {count} blocks, allowed are {MAX_BLOCKS}")
    return header


def open_node(request: OpenRequest) -> Node:
    """The node of an existing image; only the header is read.

    :raises ImageError: the header breaks the format
    :raises NotSupported: it is to be written
    """
    return open_read_only(request, CloopNode)


class CloopNode(ReadOnlyFormat):
    """An open image. Guarded by ``lock``: the table of offsets.

    :raises ImageError: the header breaks the format
    """

    driver = "cloop"

    def __init__(self, file: Node, flags: OpenFlags) -> None:
        from .streams import ChunkCache

        super().__init__(file, flags)
        self.header = decode_header(read_head(file, HEADER_SIZE))
        table_end = HEADER_SIZE + 8 * (self.header.block_count + 1)
        if table_end > file.size:
            raise ImageError(f"the table of {self.header.block_count + 1} offsets ends at {table_end:#x}, past the end "
                             f"of the file ({file.size:#x})")  # fmt: skip
        self.cluster_size = self.zero_unit = self.header.block_size
        self._size = self.header.block_size * self.header.block_count
        self._offsets: array[int] | None = None
        self._chunks = ChunkCache()

    def _load_offsets(self) -> array[int]:
        from ..io.tables import decode_words

        offsets = decode_words(read_exactly(self.file, HEADER_SIZE, 8 * (self.header.block_count + 1), "offset table"))
        self._offsets = offsets
        return offsets

    def lookup(self, offset: int, length: int) -> list[Extent]:
        offsets = self._offsets if self._offsets is not None else self._load_offsets()
        block = self.header.block_size
        rows: list[Extent] = []
        end = offset + length
        while offset < end and len(rows) < _ROWS:
            index = offset // block
            stop = min(end, (index + 1) * block)
            if offsets[index] > self.file.size:
                raise ImageError(f"block {index} begins at {offsets[index]:#x}, past the end of the file "
                                 f"({self.file.size:#x})", where=self.filename)  # fmt: skip
            rows.append(Extent(offset, stop - offset, COMPRESSED, offsets[index]))
            offset = stop
        return rows

    def decompress(self, extent: Extent, buffer: memoryview) -> None:
        index = extent.offset // self.header.block_size
        data = self._chunks.get(index, lambda: self._block(index), self.header.block_size)
        start = extent.offset - index * self.header.block_size
        buffer[:] = data[start : start + len(buffer)]

    def _block(self, index: int) -> bytes:
        from .streams import unpack

        size = self.header.block_size
        assert self._offsets is not None
        start, end = self._offsets[index], self._offsets[index + 1]
        where = f"{self.filename}: block {index}"
        if not start <= end <= start + 2 * size + SECTOR:
            raise ImageError(f"its stream lies from {start:#x} to {end:#x}", where=where)
        data = unpack("zlib", read_exactly(self.file, start, end - start, f"block {index}"), size, where)
        if len(data) != size:
            raise ImageError(f"its stream holds {len(data)} bytes instead of {size}", where=where)
        return data
