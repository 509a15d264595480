"""VHDX mapping: guest offset -> block table entry -> extents, and the changes to it ([MS-VHDX] 2.5).

A block is the unit of allocation. In a differencing disk a block can be partially present; then the bits of its
sector bitmap say which logical sectors are here, bit by bit. Knows entries and free space, not bytes of the disk.
"""

from __future__ import annotations

from bisect import bisect_right

from ...errors import Corrupt
from ...io.extent import DATA, MAY_UNMAP, NO_HOST, UNALLOCATED, Extent
from ...io.extent import ZERO as KIND_ZERO
from ...typing import TYPE_CHECKING, Final
from ...units import MIB, align_up
from ..base import Placement
from .bat import BlockTable
from .layout import (
    BLOCK_NAMES,
    FULLY_PRESENT,
    NOT_PRESENT,
    OFFSET_MASK,
    PARTIALLY_PRESENT,
    STATE_MASK,
    UNDEFINED,
    UNMAPPED,
    UNMAPPED_DRAFT,
    ZERO,
    bat_entries,
    chunk_ratio,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ...graph.node import Node
    from ...io.extentmap import ExtentMap
    from .layout import Parameters, Region

__all__ = ["Mapping"]

_ROWS: Final = 64
"""Extents that one lookup answers at most."""
_BITMAP_PART: Final = 512
"""Bytes of a sector bitmap that are looked at in one go: 4096 sectors."""
_ALLOCATE: Final = 64 * MIB
"""New space is asked for in runs of up to this many bytes, or one block."""
_ZERO_STEP: Final = 1 << 30
"""Bytes of allocated space that are zeroed with the lock held."""

_ABSENT: Final = (NOT_PRESENT, UNDEFINED, UNMAPPED, UNMAPPED_DRAFT, ZERO)


class Mapping:
    """Guarded by the node's lock.

    :param view: the file, with the log replayed
    :param regions: where no block may lie
    :param relieve: writes changed pages of the block table back
    :ivar released: blocks that no entry names any more, though one on disk may
    :ivar free: blocks that nothing names; what they hold is of no interest
    """

    def __init__(self, view: Node, parameters: Parameters, table_offset: int, regions: Sequence[Region], where: str,
                 relieve: Callable[[], None]) -> None:  # fmt: skip
        self.file = view
        self.where = where
        self.size = parameters.size
        self.block_size = parameters.block_size
        self.block_bits = parameters.block_size.bit_length() - 1
        self.sector_bits = parameters.logical_sector.bit_length() - 1
        self.ratio = chunk_ratio(parameters.block_size, parameters.logical_sector)
        self.has_parent = parameters.has_parent
        self.fixed = parameters.fixed
        count = bat_entries(parameters.size, parameters.block_size, parameters.logical_sector,
                            has_parent=parameters.has_parent)  # fmt: skip
        self.table = BlockTable(view, table_offset, count, relieve)
        self.use_regions(regions)
        self.released: list[int] = []
        self.free: list[int] = []

    def use_regions(self, regions: Sequence[Region]) -> None:
        ordered = sorted((region for region in regions if region.length), key=lambda region: region.offset)
        self.region_starts = [region.offset for region in ordered]
        self.region_ends = [region.end for region in ordered]

    # -- looking ----------------------------------------------------------------------------------

    def entry(self, block: int) -> int:
        return self.table[block + block // self.ratio]

    def host(self, entry: int, block: int) -> int:
        """Where a present block lies.

        :raises Corrupt: outside the file, or where something else lies
        """
        host = entry & OFFSET_MASK
        length = min(self.block_size, self.size - (block << self.block_bits))
        number = bisect_right(self.region_starts, host + length - 1) - 1
        if host < MIB or (number >= 0 and self.region_ends[number] > host):
            raise self._corrupt(entry, block, "where headers, log or tables lie")
        if host + length > self.file.size:
            raise self._corrupt(entry, block, f"past the end of the file at {self.file.size:#x}")
        return host

    def _corrupt(self, entry: int, block: int, why: str) -> Corrupt:
        return Corrupt(f"cannot map guest offset {block << self.block_bits:#x}: block table entry {entry:#018x} "
                       f"points {why}", where=self.where, hint='run "byre check"')  # fmt: skip

    def _absent_kind(self, state: int, block: int, entry: int) -> int:
        """The kind of extent of a block that holds nothing.

        :raises Corrupt: a state the specification does not have
        """
        if state not in _ABSENT:
            raise Corrupt(f"cannot map guest offset {block << self.block_bits:#x}: block table entry {entry:#018x} has "
                          f"state {state} ({BLOCK_NAMES[state]}), which is not for this disk",
                          where=self.where, hint='run "byre check"')  # fmt: skip
        if state == NOT_PRESENT or (state != ZERO and not self.has_parent):
            return UNALLOCATED
        return KIND_ZERO

    def lookup(self, offset: int, length: int) -> list[Extent]:
        rows: list[Extent] = []
        end = offset + length
        while offset < end and len(rows) < _ROWS:
            block = offset >> self.block_bits
            skip = offset & (self.block_size - 1)
            size = min(self.block_size - skip, end - offset)
            entry = self.entry(block)
            state = entry & STATE_MASK
            if state == FULLY_PRESENT:
                row = Extent(offset, size, DATA, self.host(entry, block) + skip)
            elif state == PARTIALLY_PRESENT and self.has_parent:
                row = self._partial(entry, block, offset, size)
            else:
                row = Extent(offset, size, self._absent_kind(state, block, entry))
            if rows and _continues(rows[-1], row):
                rows[-1] = rows[-1]._replace(length=rows[-1].length + row.length)
            else:
                rows.append(row)
            offset = row.end
        return rows

    def _partial(self, entry: int, block: int, offset: int, length: int) -> Extent:
        """The first run of sectors of a partially present block that are alike."""
        bits = self.sector_bits
        skip = offset & (self.block_size - 1)
        first, last = skip >> bits, (skip + length - 1) >> bits
        start, stop = first // 8, min(last // 8 + 1, first // 8 + _BITMAP_PART)
        data = bytearray(stop - start)
        self.file.read_into(self._bitmap_host(block) + start, memoryview(data))
        word = int.from_bytes(data, "little") >> first % 8
        here = word & 1
        if here:
            word ^= (1 << 8 * len(data)) - 1  # the run ends at the first bit that differs
        known = 8 * (stop - start) - first % 8
        run = min((word & -word).bit_length() - 1 if word else known, known)
        end = min((first + run) << bits, skip + length)
        if here:
            return Extent(offset, end - skip, DATA, self.host(entry, block) + skip)
        return Extent(offset, end - skip, UNALLOCATED)

    def _bitmap_host(self, block: int) -> int:
        """Where the bits of a block begin; each block's share is a whole number of bytes.

        :raises Corrupt: the sector bitmap block is not there
        """
        chunk, number = divmod(block, self.ratio)
        entry = self.table[chunk * (self.ratio + 1) + self.ratio]
        host = entry & OFFSET_MASK
        share = self.block_size >> self.sector_bits + 3
        if entry & STATE_MASK != FULLY_PRESENT or host < MIB or host + (number + 1) * share > self.file.size:
            raise self._corrupt(entry, block, "to no sector bitmap, though the block is partially present")
        return host + number * share

    def lookup_all(self, offset: int, length: int) -> ExtentMap:
        from .mapping_bulk import extents

        return extents(self, offset, length)

    # -- space ------------------------------------------------------------------------------------

    def in_place(self, offset: int, length: int) -> int:
        skip = offset & (self.block_size - 1)
        if skip + length > self.block_size:
            return -1
        block = offset >> self.block_bits
        entry = self.entry(block)
        return self.host(entry, block) + skip if entry & STATE_MASK == FULLY_PRESENT else -1

    def reserve(self, offset: int, length: int) -> list[Placement]:
        placements: list[Placement] = []
        end = offset + length
        while offset < end and len(placements) < _ROWS:
            block = offset >> self.block_bits
            entry = self.entry(block)
            state = entry & STATE_MASK
            if state == FULLY_PRESENT:
                skip = offset & (self.block_size - 1)
                size = min(self.block_size - skip, end - offset)
                placement = Placement(offset, size, self.host(entry, block) + skip)
            else:
                self._absent_kind(state, block, entry)
                if any(placement.fresh for placement in placements):
                    break  # one run of new blocks at a time: what fails gives all of it back
                placement = self.allocate(block, (end - 1) >> self.block_bits)
            placements.append(placement)
            offset = placement.offset + placement.length
        return placements

    def allocate(self, block: int, last: int) -> Placement:
        """Space for ``block`` and those behind it, up to ``last``, that have none; it reads as zeroes."""
        start = block << self.block_bits
        if self.free:
            host = self.free[-1]
            self.file.write_zeroes(host, self.block_size, MAY_UNMAP)
            self.free.pop()
            return Placement(start, self.block_size, host, fresh=True, zeroed=True, blank=True)
        count, most = 1, max(_ALLOCATE >> self.block_bits, 1)
        while count < most and block + count <= last and self.entry(block + count) & STATE_MASK in _ABSENT:
            count += 1
        length = count << self.block_bits
        host = align_up(self.file.size, MIB)
        self.file.resize(host + length, exact=False)
        if not self.file.has_zero_init:
            self.file.write_zeroes(host, length)
        return Placement(start, length, host, fresh=True, zeroed=True, blank=True)

    def publish(self, placements: Sequence[Placement]) -> None:
        for placement in placements:
            first, host = placement.offset >> self.block_bits, placement.host
            for block in range(first, first + (placement.length >> self.block_bits)):
                self._set(block, host | FULLY_PRESENT)
                host += self.block_size

    def cancel(self, placements: Sequence[Placement]) -> None:
        for placement in placements:
            self.free += range(placement.host, placement.host + placement.length, self.block_size)

    def _set(self, block: int, entry: int) -> None:
        self.table[block + block // self.ratio] = entry

    # -- zeroes and discards ----------------------------------------------------------------------

    def unmap(self, offset: int, length: int, kind: int, keep: bool) -> int:
        """Bytes from ``offset`` that are done: zeroed where they lie, or whole blocks given up."""
        start, end = offset, offset + length
        while offset < end and offset - start < _ZERO_STEP:
            block = offset >> self.block_bits
            skip = offset & (self.block_size - 1)
            size = min(self.block_size - skip, end - offset)
            entry = self.entry(block)
            state = entry & STATE_MASK
            if state == FULLY_PRESENT:
                host = self.host(entry, block)
                # The last block of the disk may be cut short.
                whole = not skip and (size == self.block_size or offset + size >= self.size)
                if whole and not keep and not self.fixed:
                    self._set(block, ZERO if kind == KIND_ZERO else UNMAPPED)
                    self.released.append(host)
                elif kind == KIND_ZERO:
                    self.file.write_zeroes(host + skip, size, 0 if keep else MAY_UNMAP)
                else:
                    self.file.discard(host + skip, size)
            else:
                self._absent_kind(state, block, entry)
            offset += size
        return offset - start

    def drop(self, first: int, count: int) -> None:
        """Blocks behind the end of the disk hold nothing any more (shrinking)."""
        for block in range(first, first + count):
            entry = self.entry(block)
            if entry & STATE_MASK == FULLY_PRESENT:
                self.released.append(self.host(entry, block))
            if entry:
                self._set(block, 0)


def _continues(before: Extent, row: Extent) -> bool:
    if row.kind != before.kind:
        return False
    return row.host == (before.host + before.length if before.host >= 0 else NO_HOST)
