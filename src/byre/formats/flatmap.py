"""One table of 32-bit entries over the whole disk: the block map of VDI, the BAT of Parallels images.

The table is kept in memory (its format limits it), changes are written back by pages. Order (RELIABILITY 2.3): what is
in new blocks | whatever the header counts | the table.
"""

from __future__ import annotations

import sys
from array import array

from ..errors import Corrupt
from ..io.extent import DATA, MAY_UNMAP, UNALLOCATED, ZERO, Extent
from ..io.tables import PAGE, page_runs
from ..typing import TYPE_CHECKING, NamedTuple
from .base import Placement
from .opening import read_exactly

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from ..graph.node import Node
    from ..io.extentmap import ExtentMap
    from .space import Space

__all__ = ["EntryCode", "FlatMap", "decode_entries"]

_WINDOW = 1 << 18
_AT_ONCE = 4096
"""Entries that one lookup goes over."""
_ZEROED_AT_ONCE = 64 << 20


class EntryCode(NamedTuple):
    """What an entry means: a block at ``base + entry * scale``, or one of two marks.

    :ivar absent: the entry of a block that was never written
    :ivar zero: the entry of a block that reads as zeroes, -1 where the format has none
    """

    base: int
    scale: int
    absent: int
    zero: int = -1

    def host(self, entry: int) -> int:
        return self.base + entry * self.scale

    def entry(self, host: int) -> int:
        return (host - self.base) // self.scale


def decode_entries(data: bytes | bytearray | memoryview) -> array[int]:
    """Little-endian 32-bit words in host order; what is left of a word at the end is ignored."""
    words = array("I")
    view = memoryview(data).cast("B")
    words.frombytes(view[: len(view) // 4 * 4])
    if sys.byteorder == "big":
        words.byteswap()
    return words


def encode_entries(words: array[int]) -> bytes:
    """The inverse of :func:`decode_entries`."""
    if sys.byteorder == "big":
        words = words[:]
        words.byteswap()
    return words.tobytes()


class FlatMap:
    """The map and its changes. Guarded by the node's lock.

    :ivar entries: in host byte order, one per block
    :ivar hole: the kind of extent that a block which was never written is
    :ivar in_place_zero: zeroes go into blocks that are there; otherwise such blocks are let go, whoever asks, as the
        peers do it with formats that have no mark for zeroes
    :ivar before_table: called between the flush of the data and the first write of the table
    :ivar what: what messages call an entry ("block map entry", "BAT entry")
    """

    def __init__(self, file: Node, table_offset: int, count: int, code: EntryCode, space: Space, *, what: str,
                 hole: int = UNALLOCATED, in_place_zero: bool = True,
                 before_table: Callable[[], None] = lambda: None) -> None:  # fmt: skip
        self.file = file
        self.table_offset = table_offset
        self.count = count
        self.code = code
        self.space = space
        self.what = what
        self.hole = hole
        self.in_place_zero = in_place_zero
        self.before_table = before_table
        self.unit = space.unit
        self.backed = False
        self.entries: array[int] = array("I")
        self.freed: list[tuple[int, int]] = []
        self._dirty: set[int] = set()

    def holders(self) -> tuple[object, ...]:
        """As :meth:`byre.formats.base.FormatNode.holders`."""
        return (self,)

    def load(self) -> None:
        """:raises ImageError: the table does not lie within the file"""
        self.entries = decode_entries(read_exactly(self.file, self.table_offset, 4 * self.count, "block map"))

    @property
    def dirty(self) -> bool:
        return bool(self._dirty)

    # -- looking ----------------------------------------------------------------------------------

    def _host(self, index: int) -> tuple[int, int]:
        """(kind, host offset or -1) of a block.

        :raises Corrupt: its entry points outside the data
        """
        entry = self.entries[index]
        if entry == self.code.absent:
            return self.hole, -1
        if entry == self.code.zero:
            return ZERO, -1
        host = self.code.host(entry)
        if not self.space.base <= host < self.space.end:
            raise self._outside(index, host)
        return DATA, host

    def _outside(self, index: int, host: int) -> Corrupt:
        return Corrupt(
            f"{self.what} {index} points to {host:#x}, outside the data from {self.space.base:#x} to "
            f"{self.space.end:#x}", where=self.file.filename, hint="run check",
        )  # fmt: skip

    def lookup(self, offset: int, length: int) -> list[Extent]:
        unit, end = self.unit, offset + min(length, _AT_ONCE * self.unit)
        rows: list[Extent] = []
        while offset < end:
            index, within = divmod(offset, unit)
            stop = min(end, offset - within + unit)
            kind, host = self._host(index)
            if host >= 0:
                host += within
            last = rows[-1] if rows else None
            if last and last.kind == kind and host == (last.host + last.length if last.host >= 0 else -1):
                rows[-1] = last._replace(length=last.length + stop - offset)
            else:
                rows.append(Extent(offset, stop - offset, kind, host))
            offset = stop
        return rows

    def lookup_all(self, offset: int, length: int) -> ExtentMap:
        import numpy as np

        from ..io.extentmap import ExtentMap

        unit, code = self.unit, self.code
        first, last = offset // unit, -(-(offset + length) // unit)
        entries = np.frombuffer(self.entries, np.uint32)[first:last].astype(np.int64)
        kind = np.zeros(len(entries), np.uint8)
        kind[entries == code.absent] = self.hole
        kind[entries == code.zero] = ZERO
        present = kind == DATA
        host: NDArray[np.int64] = np.where(present, entries * code.scale + code.base, -1)
        outside = present & ((host < self.space.base) | (host >= self.space.end))
        if outside.any():
            bad = int(np.flatnonzero(outside)[0])
            raise self._outside(first + bad, int(host[bad]))
        starts = np.arange(first, last, dtype=np.int64) * unit
        return ExtentMap(starts, np.full(len(starts), unit, np.int64), kind, host).coalesced().clip(offset, length)

    def windows(self, entries: NDArray[np.uint32] | None = None) -> Iterator[tuple[int, NDArray[np.int64]]]:
        """(first index, host offsets from there on): all blocks, 2 MiB of offsets at a time; -1 for those without.

        :param entries: other entries than those of the map
        """
        import numpy as np

        table = np.frombuffer(self.entries, np.uint32) if entries is None else entries
        absent, zero = self.code.absent, self.code.zero
        for first in range(0, len(table), _WINDOW):
            part = table[first : first + _WINDOW].astype(np.int64)
            yield first, np.where((part != absent) & (part != zero), part * self.code.scale + self.code.base, -1)

    # -- writing ----------------------------------------------------------------------------------

    def in_place(self, offset: int, length: int) -> int:
        index, within = divmod(offset, self.unit)
        if within + length > self.unit:
            return -1
        kind, host = self._host(index)
        return host + within if kind == DATA else -1

    def reserve(self, offset: int, length: int) -> list[Placement]:
        unit, end = self.unit, offset + length
        kind, host = self._host(offset // unit)
        if kind == DATA:
            row = self.lookup(offset, length)[0]
            return [Placement(offset, row.length, row.host)]
        first = index = offset // unit
        blank = kind == ZERO or not self.backed
        while index * unit < end:
            kind, _ = self._host(index)
            if kind == DATA or blank != (kind == ZERO or not self.backed):
                break
            index += 1
        host, count, clean = self.space.allocate(index - first)
        return [Placement(first * unit, count * unit, host, fresh=True, zeroed=clean, blank=blank)]

    def publish(self, placements: Sequence[Placement]) -> None:
        for placement in placements:
            first, count = placement.offset // self.unit, placement.length // self.unit
            entry, step = self.code.entry(placement.host), self.unit // self.code.scale
            for index in range(first, first + count):
                self.entries[index] = entry
                entry += step
            self.mark(first, count)

    def mark(self, first: int, count: int) -> None:
        """These entries changed."""
        self._dirty.update(range(first * 4 // PAGE, ((first + count) * 4 - 1) // PAGE + 1))

    def drop(self, indexes: NDArray[np.intp]) -> None:
        """These entries have no block any more; what they had is nobody's."""
        import numpy as np

        np.frombuffer(self.entries, np.uint32)[indexes] = self.code.absent
        self._dirty.update(np.unique(indexes * 4 // PAGE).tolist())

    def cancel(self, placements: Sequence[Placement]) -> None:
        for placement in placements:
            self.space.release(placement.host, placement.length // self.unit)

    def release(self, host: int, count: int) -> None:
        self.space.release(host, count)

    def unmap(self, offset: int, length: int, zero: bool, keep: bool) -> int:
        """One run of blocks that are alike; see :meth:`FormatNode.unmap`. ``zero``: they must read as zeroes."""
        unit = self.unit
        row = self.lookup(offset, min(length, max(_ZEROED_AT_ONCE // unit, 1) * unit))[0]
        first, count = offset // unit, row.length // unit
        if row.kind != DATA:
            if not zero or row.kind == ZERO or not self.backed:
                return row.length
            if self.code.zero < 0:
                return 0
            self.entries[first : first + count] = array("I", [self.code.zero]) * count
            self.mark(first, count)
        elif self.in_place_zero or self.backed:
            self.file.write_zeroes(row.host, row.length, 0 if keep else MAY_UNMAP)
        else:
            self.entries[first : first + count] = array("I", [self.code.absent]) * count
            self.mark(first, count)
            self.freed.append((row.host, count))
        return row.length

    # -- growing ----------------------------------------------------------------------------------

    def zero_tail(self, size: int) -> None:
        """What the last block holds behind the end of a disk of ``size`` bytes: another program may have left it."""
        index, within = divmod(size, self.unit)
        if within:
            kind, host = self._host(index)
            if kind == DATA:
                self.file.write_zeroes(host + within, self.unit - within)

    def extend(self, new: Sequence[int]) -> None:
        """More entries, durable on return; the header does not count them yet."""
        start = self.table_offset + 4 * self.count
        self.entries.extend(new)
        part = encode_entries(self.entries[self.count :])
        self.count = len(self.entries)
        if part:
            self.file.write_from(start, memoryview(part))
        self.file.flush()

    # -- write-back -------------------------------------------------------------------------------

    def write_back(self) -> None:
        """Data | header | table. The file is as long as what the table names."""
        if self.file.size < self.space.end:
            self.file.resize(self.space.end, exact=False)
        self.file.flush()
        self.before_table()
        for start, end in page_runs(self._dirty, 4 * self.count):
            part = encode_entries(self.entries[start // 4 : end // 4])
            self.file.write_from(self.table_offset + start, memoryview(part))
        self._dirty.clear()
