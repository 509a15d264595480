"""The extents of a disk: which bytes of which file hold a range of it.

Four kinds: plain (FLAT, VMFS), of zeroes (ZERO), sparse (hosted and ESX, 32-bit grain tables) and space-efficient
sparse (64-bit entries). Each answers for its own range of the disk; writing into sparse ones is :mod:`.allocation`.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right

from ...errors import Corrupt
from ...io.extent import COMPRESSED, DATA, NO_HOST, UNALLOCATED, ZERO, Extent
from ...typing import TYPE_CHECKING, Final
from ...units import SECTOR
from .layout import SESPARSE_GRAIN, SESPARSE_TABLE_ENTRIES, ZERO_GRAIN
from .tables import GrainTables

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ...graph.node import Node
    from .allocation import Allocator
    from .layout import SeSparseHeader

__all__ = ["DiskExtent", "PlainExtent", "SeSparseExtent", "SeSparseTables", "SparseExtent", "find_extent"]


class DiskExtent:
    """One extent, and the base of all kinds: a range of zeroes.

    :ivar start: where it begins on the disk, bytes
    :ivar size: bytes
    :ivar type: as the descriptor has it; "" for an extent that has no descriptor of its own
    :ivar file: ``None`` for ZERO extents, and where it was not opened
    :ivar source: index of the file among the node's sources
    :ivar grain: unit of allocation, bytes; 0 where there is none
    :ivar writable: whether it may be written at all
    """

    grain = 0
    compressed = False

    def __init__(self, start: int, size: int, type: str, file: Node | None = None, *, name: str = "",
                 source: int = 0, writable: bool = True) -> None:  # fmt: skip
        self.start = start
        self.size = size
        self.end = start + size
        self.type = type
        self.file = file
        self.name = name
        self.source = source
        self.writable = writable

    def lookup(self, offset: int, length: int) -> list[Extent]:
        """As :meth:`byre.formats.base.FormatNode.lookup`, for a range inside this extent."""
        return [Extent(offset, length, ZERO)]

    def classify(self, entry: int) -> tuple[int, int]:
        """(kind, host) of a grain table entry."""
        raise NotImplementedError


def find_extent(starts: Sequence[int], offset: int) -> int:
    """Index of the extent that holds ``offset``, by where they begin."""
    return bisect_right(starts, offset) - 1


class PlainExtent(DiskExtent):
    """A range of a file, as it is.

    :ivar base: where it begins in the file, bytes
    """

    def __init__(self, start: int, size: int, type: str, file: Node | None, base: int, *, name: str = "",
                 source: int = 0, writable: bool = True) -> None:  # fmt: skip
        super().__init__(start, size, type, file, name=name, source=source, writable=writable)
        self.base = base

    def lookup(self, offset: int, length: int) -> list[Extent]:
        return [Extent(offset, length, DATA, self.base + offset - self.start, self.source)]


class SparseExtent(DiskExtent):
    """Grains, found through grain tables. Guarded by the lock of the node that owns it.

    :ivar span: bytes of the disk that one table covers
    :ivar allocator: where new grains go; ``None`` while the extent is not written
    """

    def __init__(self, start: int, size: int, type: str, file: Node, grain: int, tables: GrainTables, *,
                 compressed: bool = False, zero_grains: bool = False, name: str = "", source: int = 0,
                 writable: bool = True) -> None:  # fmt: skip
        super().__init__(start, size, type, file, name=name, source=source, writable=writable)
        self.grain = grain
        self.tables = tables
        self.span = grain * tables.per_table
        self.compressed = compressed
        self.zero_grains = zero_grains
        self.allocator: Allocator | None = None
        self._used = COMPRESSED if compressed else DATA

    def classify(self, entry: int) -> tuple[int, int]:
        if not entry:
            return UNALLOCATED, NO_HOST
        if entry == ZERO_GRAIN and self.zero_grains:
            return ZERO, NO_HOST
        return self._used, entry * SECTOR

    def lookup(self, offset: int, length: int) -> list[Extent]:
        """Up to the end of one grain table at most."""
        at = offset - self.start
        index = at // self.span
        stop = min(at + length, (index + 1) * self.span)
        table = self.tables.get(index)
        if table is None:
            return [Extent(offset, stop - at, UNALLOCATED, NO_HOST, self.source)]
        return self._rows(table, at, stop, index * self.span)

    def _rows(self, table: array[int], at: int, stop: int, base: int) -> list[Extent]:
        """Rows for ``[at, stop)`` of the extent; ``table`` begins at ``base``."""
        grain, rows = self.grain, []
        number, last = (at - base) // grain, (stop - base - 1) // grain
        while at < stop:
            kind, host = self.classify(table[number])
            count = 1
            if kind == DATA:
                while number + count <= last and self.classify(table[number + count]) == (kind, host + count * grain):
                    count += 1
                host += (at - base) % grain
            elif kind != COMPRESSED:
                while number + count <= last and table[number + count] == table[number]:
                    count += 1
            number += count
            end = min(base + number * grain, stop)
            rows.append(Extent(self.start + at, end - at, kind, host, self.source))
            at = end
        return rows

    def free_run(self, offset: int, length: int) -> int:
        """Bytes from ``offset`` whose grains hold nothing, up to the end of a table."""
        done = 0
        for row in self.lookup(offset, length):
            if row.kind not in (ZERO, UNALLOCATED):
                break
            done += row.length
        return done

    def in_place(self, offset: int, length: int) -> int:
        """Where a range inside one allocated grain lies in the file, -1 if it is not that."""
        at = offset - self.start
        within = at % self.grain
        if within + length > self.grain:
            return -1
        index = at // self.span
        table = self.tables.get(index)
        if table is None:
            return -1
        kind, host = self.classify(table[(at - index * self.span) // self.grain])
        return host + within if kind == DATA else -1


# -- space-efficient sparse extents ---------------------------------------------------------------

_TYPE: Final = 0xF << 60
_TABLE_TYPE: Final = 0x10000000 << 32
_UNMAPPED: Final = 1 << 60
_ZERO: Final = 2 << 60
_DATA: Final = 3 << 60
NUMBER_BITS: Final = 49
"""Of a grain's number: more would be past any file's end."""


class SeSparseTables(GrainTables):
    """Tables of 64-bit entries; the directory has their numbers, not their places.

    :param base: where table 0 lies in the file, bytes
    """

    def __init__(self, file: Node, directory: array[int], header: SeSparseHeader, capacity: int,
                 relieve: Callable[[], None]) -> None:  # fmt: skip
        super().__init__(file, directory, header.directory * SECTOR, SESPARSE_TABLE_ENTRIES, 8, capacity, relieve)
        self._base = header.tables * SECTOR

    def host(self, index: int, copy: int = 0) -> int:
        entry = self.copies[copy][index]
        if not entry:
            return 0
        host = self._base + (entry & 0xFFFFFFFF) * self.table_size
        if entry & ~0xFFFFFFFF != _TABLE_TYPE or not host <= self.file.size - self.table_size:
            raise self._misplaced(index, host)
        return host


class SeSparseExtent(SparseExtent):
    """As ESXi 6.5 and later write; read-only.

    :param header: says where the grains are
    """

    def __init__(self, start: int, size: int, type: str, file: Node, tables: SeSparseTables, header: SeSparseHeader, *,
                 name: str = "", source: int = 0) -> None:  # fmt: skip
        super().__init__(start, size, type, file, SESPARSE_GRAIN * SECTOR, tables, zero_grains=True, name=name,
                         source=source, writable=False)  # fmt: skip
        self.grains = header.grains * SECTOR

    def classify(self, entry: int) -> tuple[int, int]:
        kind = entry & _TYPE
        if kind == _DATA:
            # The number of the grain: its lowest 12 bits are stored above its upper 48.
            number = (entry >> 48 & 0xFFF) | (entry & 0xFFFFFFFFFFFF) << 12
            if not number >> NUMBER_BITS:
                return DATA, self.grains + number * self.grain
        elif kind in (_UNMAPPED, _ZERO):
            return ZERO, NO_HOST
        elif not entry:
            return UNALLOCATED, NO_HOST
        assert self.file is not None
        raise Corrupt(f"grain table entry {entry:#018x} makes no sense", where=self.file.filename)
