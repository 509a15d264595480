"""VHD mapping: guest offset -> extents. A fixed disk is its file; a dynamic one has a block table.

Each block of a dynamic disk follows its sector bitmap, whose bits (the highest first) say which sectors are there.
What is not there reads as zeroes, or from the parent of a differencing disk. Blocks written here are whole.
"""

from __future__ import annotations

import sys
from array import array

from ...errors import Corrupt, NoSpace
from ...io.extent import DATA, MAY_UNMAP, Extent
from ...io.extent import ZERO as KIND_ZERO
from ...typing import TYPE_CHECKING, Final, Protocol
from ...units import SECTOR, align_up
from ..base import Placement
from .layout import NONE, bitmap_size

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ...graph.node import Node
    from ...io.extentmap import ExtentMap

__all__ = ["DynamicMapping", "FixedMapping", "Mapping", "decode_table", "encode_table"]

_ROWS: Final = 64
"""Extents that one lookup answers at most."""
_BITMAP_PART: Final = 512
"""Bytes of a sector bitmap that are looked at in one go: 4096 sectors."""
_ZERO_STEP: Final = 1 << 30
"""Bytes of allocated space that are zeroed with the lock held."""
_ALLOCATE: Final = 64 << 20
"""New blocks are made up to this many bytes at a time."""
_PAGE: Final = 4096

_WHOLE: Final = 1
_PARTIAL: Final = 2


class Mapping(Protocol):
    """What both kinds of disk have. Guarded by the node's lock.

    :ivar size: of the disk, bytes
    """

    size: int

    def lookup(self, offset: int, length: int) -> list[Extent]: ...
    def lookup_all(self, offset: int, length: int) -> ExtentMap: ...
    def in_place(self, offset: int, length: int) -> int: ...
    def reserve(self, offset: int, length: int) -> list[Placement]: ...
    def publish(self, placements: Sequence[Placement]) -> None: ...
    def cancel(self, placements: Sequence[Placement]) -> None: ...
    def unmap(self, offset: int, length: int, kind: int, keep: bool) -> int: ...


class FixedMapping:
    """The disk is the file, without the footer at its end."""

    def __init__(self, file: Node, size: int) -> None:
        self.file = file
        self.size = size

    def lookup(self, offset: int, length: int) -> list[Extent]:
        return [Extent(offset, length, DATA, offset)]

    def lookup_all(self, offset: int, length: int) -> ExtentMap:
        from ...io.extentmap import ExtentMap

        return ExtentMap.single(offset, length, DATA, offset)

    def in_place(self, offset: int, length: int) -> int:
        return offset

    def reserve(self, offset: int, length: int) -> list[Placement]:
        return [Placement(offset, length, offset)]

    def publish(self, placements: Sequence[Placement]) -> None:
        raise AssertionError("a fixed disk has no new blocks")

    cancel = publish

    def unmap(self, offset: int, length: int, kind: int, keep: bool) -> int:
        done = min(length, _ZERO_STEP)
        if kind == KIND_ZERO:
            self.file.write_zeroes(offset, done, 0 if keep else MAY_UNMAP)
        else:
            self.file.discard(offset, done)
        return done


class DynamicMapping:
    """Blocks where the table says.

    :param end: where the next new block goes, which is where the footer lies
    :ivar table: sector numbers of the blocks' bitmaps, in host byte order
    :ivar dirty: changed pages of the table
    :ivar end_moved: the file has grown, and has no footer at its end yet
    :ivar released: blocks that the table in memory does not name any more, by the offset of their bitmap
    :ivar free: blocks that nothing names
    :ivar hole: the kind of extent that sectors are which are not there: UNALLOCATED only over a parent
    """

    def __init__(self, file: Node, size: int, block_size: int, table_offset: int, table: array[int], end: int,
                 reserved: Sequence[tuple[int, int]], where: str) -> None:  # fmt: skip
        self.file = file
        self.size = size
        self.block_size = block_size
        self.block_bits = block_size.bit_length() - 1
        self.bitmap_size = bitmap_size(block_size)
        self.table_offset = table_offset
        self.table = table
        self.end = end
        self.reserved = tuple(reserved)
        self.where = where
        self.dirty: set[int] = set()
        self.end_moved = False
        self._end_settled = False
        self.released: list[int] = []
        self.free: list[int] = []
        self.hole = KIND_ZERO
        #: Per block, whether all its sectors are there; 0 where nobody has looked.
        self.known = bytearray(len(table))

    # -- looking ----------------------------------------------------------------------------------

    def host(self, block: int) -> int:
        """Where the bitmap of a block lies, -1 if the block is not there.

        :raises Corrupt: outside the file, or where something else lies
        """
        entry = self.table[block]
        if entry == NONE:
            return -1
        host = entry * SECTOR
        end = host + self.bitmap_size + self.used(block)
        if end > self.file.size:
            raise self._corrupt(block, f"past the end of the file at {self.file.size:#x}")
        if any(host < stop and start < end for start, stop in self.reserved):
            raise self._corrupt(block, "where headers or tables lie")
        return host

    def used(self, block: int) -> int:
        """Bytes of the block that belong to the disk."""
        return min(self.block_size, self.size - (block << self.block_bits))

    def _corrupt(self, block: int, why: str) -> Corrupt:
        return Corrupt(f"cannot map guest offset {block << self.block_bits:#x}: block table entry "
                       f"{self.table[block]:#010x} points {why}", where=self.where,
                       hint='run "byre check"')  # fmt: skip

    def is_whole(self, block: int, host: int) -> bool:
        """Whether all sectors of a block are there."""
        known = self.known[block]
        if not known:
            count = -(-self.used(block) // SECTOR)
            data = bytearray(-(-count // 8))
            self.file.read_into(host, memoryview(data))
            word = int.from_bytes(data, "big") >> 8 * len(data) - count
            known = self.known[block] = _WHOLE if word == (1 << count) - 1 else _PARTIAL
        return known == _WHOLE

    def lookup(self, offset: int, length: int) -> list[Extent]:
        rows: list[Extent] = []
        end = offset + length
        while offset < end and len(rows) < _ROWS:
            block = offset >> self.block_bits
            skip = offset & (self.block_size - 1)
            size = min(self.block_size - skip, end - offset)
            host = self.host(block)
            if host < 0:
                row = Extent(offset, size, self.hole)
            elif self.is_whole(block, host):
                row = Extent(offset, size, DATA, host + self.bitmap_size + skip)
            else:
                row = self._partial(host, offset, skip, size)
            if rows and row.kind == rows[-1].kind and row.kind == self.hole:
                rows[-1] = rows[-1]._replace(length=rows[-1].length + row.length)
            else:
                rows.append(row)
            offset = row.end
        return rows

    def _partial(self, host: int, offset: int, skip: int, length: int) -> Extent:
        """The first run of sectors that are alike, of a block that is there in part."""
        first, last = skip // SECTOR, (skip + length - 1) // SECTOR
        start, stop = first // 8, min(last // 8 + 1, first // 8 + _BITMAP_PART)
        data = bytearray(stop - start)
        self.file.read_into(host + start, memoryview(data))
        count = 8 * len(data) - first % 8
        mask = (1 << count) - 1
        word = int.from_bytes(data, "big") & mask
        here = word >> count - 1
        run = count - (word ^ mask if here else word).bit_length()
        size = min((first + run) * SECTOR, skip + length) - skip
        if here:
            return Extent(offset, size, DATA, host + self.bitmap_size + skip)
        return Extent(offset, size, self.hole)

    def lookup_all(self, offset: int, length: int) -> ExtentMap:
        from .mapping_bulk import extents

        return extents(self, offset, length)

    # -- space ------------------------------------------------------------------------------------

    def in_place(self, offset: int, length: int) -> int:
        block = offset >> self.block_bits
        skip = offset & (self.block_size - 1)
        if skip + length > self.block_size or self.known[block] != _WHOLE:
            return -1
        host = self.host(block)
        return host + self.bitmap_size + skip if host >= 0 else -1

    def reserve(self, offset: int, length: int) -> list[Placement]:
        placements: list[Placement] = []
        end = offset + length
        while offset < end and len(placements) < _ROWS:
            block = offset >> self.block_bits
            host = self.host(block)
            if host >= 0:
                if not self.is_whole(block, host):
                    self._complete(block, host)
                skip = offset & (self.block_size - 1)
                size = min(self.block_size - skip, end - offset)
                placements.append(Placement(offset, size, host + self.bitmap_size + skip))
            else:
                if sum(placement.length for placement in placements if placement.fresh) >= _ALLOCATE:
                    break
                placements.append(self._allocate(block, placements))
            offset = placements[-1].offset + placements[-1].length
        return placements

    def _complete(self, block: int, host: int) -> None:
        """Sectors that are not there become zeroes that are: **zeroes | bitmap**."""
        start, offset = block << self.block_bits, block << self.block_bits
        end = start + self.used(block)
        while offset < end:
            row = self._partial(host, offset, offset - start, end - offset)
            if row.kind != DATA:
                self.file.write_zeroes(host + self.bitmap_size + offset - start, row.length)
            offset = row.end
        self.file.flush()
        self._write_bitmap(host)
        self.known[block] = _WHOLE

    def _write_bitmap(self, host: int) -> None:
        self.file.write_from(host, memoryview(b"\xff" * self.bitmap_size))

    def _allocate(self, block: int, others: Sequence[Placement]) -> Placement:
        """Space for one block, which reads as zeroes; if there is none, ``others`` are given back."""
        try:
            host = self._take()
        except BaseException:
            self.cancel([placement for placement in others if placement.fresh])
            raise
        return Placement(block << self.block_bits, self.block_size, host + self.bitmap_size, fresh=True, zeroed=True,
                         blank=True)  # fmt: skip

    def _take(self) -> int:
        if self.free:
            host = self.free[-1]
            self.file.write_zeroes(host + self.bitmap_size, self.block_size, MAY_UNMAP)
            self._write_bitmap(host)
            self.free.pop()
            return host
        host = self.settled_end()
        end = host + self.bitmap_size + self.block_size
        if host // SECTOR >= NONE:
            raise NoSpace("the file is as long as the block table can say (2 TiB)", where=self.where)
        # The footer that lies here goes: until the next flush the copy at the beginning of the file has to do.
        self.file.resize(max(end + SECTOR, self.file.size), exact=False)
        self._write_bitmap(host)
        if not self.file.has_zero_init:
            self.file.write_zeroes(host + self.bitmap_size, self.block_size)
        self.end, self.end_moved = end, True
        return host

    def publish(self, placements: Sequence[Placement]) -> None:
        for placement in placements:
            block = placement.offset >> self.block_bits
            self._set(block, (placement.host - self.bitmap_size) // SECTOR)
            self.known[block] = _WHOLE

    def cancel(self, placements: Sequence[Placement]) -> None:
        self.free += [placement.host - self.bitmap_size for placement in placements]

    def _set(self, block: int, entry: int) -> None:
        self.table[block] = entry
        self.dirty.add(block * 4 // _PAGE)

    # -- zeroes and discards ----------------------------------------------------------------------

    def unmap(self, offset: int, length: int, kind: int, keep: bool) -> int:
        """Bytes from ``offset`` that are done: zeroed where they lie, or whole blocks given up."""
        start, end = offset, offset + length
        while offset < end and offset - start < _ZERO_STEP:
            block = offset >> self.block_bits
            skip = offset & (self.block_size - 1)
            size = min(self.block_size - skip, end - offset)
            host = self.host(block)
            if host >= 0:
                # The last block of the disk may be cut short.
                if not keep and not skip and (size == self.block_size or offset + size >= self.size):
                    self.drop(block, host)
                elif kind == KIND_ZERO:
                    if not self.is_whole(block, host):
                        self._complete(block, host)
                    self.file.write_zeroes(host + self.bitmap_size + skip, size, 0 if keep else MAY_UNMAP)
            offset += size
        return offset - start

    def drop(self, block: int, host: int) -> None:
        """The block, which lies at ``host``, is given up."""
        self._set(block, NONE)
        self.known[block] = 0
        self.released.append(host)

    # -- the table on disk ------------------------------------------------------------------------

    def write_table(self) -> None:
        """Changed pages of the table; not flushed."""
        for page in sorted(self.dirty):
            words = self.table[page * _PAGE // 4 : (page + 1) * _PAGE // 4]
            self.file.write_from(self.table_offset + page * _PAGE, memoryview(encode_table(words)))
        self.dirty.clear()

    def settled_end(self) -> int:
        """Where the next block goes: behind all others, even if one lies where the footer should be."""
        if not self._end_settled:
            last = max((entry for entry in self.table if entry != NONE), default=0)
            blocks = last * SECTOR + self.bitmap_size + self.block_size if last else 0
            self.end = align_up(max(self.end, blocks, *(stop for _, stop in self.reserved)), SECTOR)
            self._end_settled = True
        return self.end


def decode_table(data: bytes | bytearray) -> array[int]:
    """Entries of a block table, in host byte order."""
    words = array("I")
    words.frombytes(data[: len(data) // 4 * 4])
    if sys.byteorder == "little":
        words.byteswap()
    return words


def encode_table(words: array[int]) -> bytes:
    """The inverse of :func:`decode_table`."""
    if sys.byteorder == "little":
        words = words[:]
        words.byteswap()
    return words.tobytes()
