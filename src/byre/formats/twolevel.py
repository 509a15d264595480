"""Two levels of tables with 64-bit entries and no reference counts: QED, and the first version of qcow.

The L1 table is kept in memory (its size is limited), L2 tables are cached in slices of up to 64 KiB. Order
(RELIABILITY 2.3): what is in new clusters | L2 tables | L1 table.
"""

from __future__ import annotations

from array import array

from ..errors import Corrupt, ImageError
from ..io.extent import COMPRESSED, DATA, MAY_UNMAP, UNALLOCATED, ZERO, Extent
from ..io.tables import PAGE, TableCache, decode_words, encode_words, page_runs
from ..typing import TYPE_CHECKING, Final, NamedTuple
from .base import Placement
from .opening import read_exactly

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from ..graph.node import Node
    from ..io.extentmap import ExtentMap
    from ..io.tables import Table
    from .space import Space

__all__ = ["MAX_L1_SIZE", "Shape", "TwoLevelMap"]

MAX_L1_SIZE: Final = 32 << 20
"""Bytes of the L1 table."""

_SLICE: Final = 64 << 10
_CACHE: Final = 8 << 20
_ROWS: Final = 64
"""After so many extents a lookup stops: most callers want the first."""
_ZEROED_AT_ONCE: Final = 64 << 20


class Shape(NamedTuple):
    """How a format has its tables.

    :ivar table_size: of an L2 table, bytes
    :ivar order: of words, "big" or "little"
    :ivar alignment: of clusters in the file
    :ivar zero: the entry of a cluster that reads as zeroes, -1 if there is none
    :ivar compressed: the bit that marks compressed clusters, 0 if there is none
    """

    cluster_size: int
    table_size: int
    order: str
    alignment: int
    zero: int = -1
    compressed: int = 0

    @property
    def span(self) -> int:
        """Guest bytes that one L2 table describes."""
        return self.table_size // 8 * self.cluster_size


class TwoLevelMap:
    """The tables and their changes. Guarded by the node's lock.

    :ivar l1: in host byte order
    :ivar plain: clusters hold guest bytes as they are, so zeroes may be put in without the engine
    :ivar report: told what is about to happen, for fault injection
    """

    def __init__(self, file: Node, shape: Shape, l1_offset: int, l1_count: int, space: Space,
                 relieve: Callable[[], None], report: Callable[[str], None] | None = None) -> None:  # fmt: skip
        self.file = file
        self.shape = shape
        self.l1_offset = l1_offset
        self.l1_count = l1_count
        self.space = space
        self.backed = False
        self.plain = True
        self.report = report
        self.l1: array[int] = array("Q")
        self.freed: list[tuple[int, int]] = []
        self._l1_dirty: set[int] = set()
        length = min(shape.table_size, _SLICE)
        self.l2 = TableCache(file, length, _CACHE // length, True, relieve, shape.order)
        self.l2.report, self.l2.load_event, self.l2.update_event = report, "l2_load", "l2_update"
        self._per_slice = length // 8
        self._slice_span = self._per_slice * shape.cluster_size

    def holders(self) -> tuple[object, ...]:
        """As :meth:`byre.formats.base.FormatNode.holders`."""
        return self, self.l2

    def load(self) -> None:
        """:raises ImageError: the L1 table does not lie within the file"""
        self.l1 = decode_words(read_exactly(self.file, self.l1_offset, 8 * self.l1_count, "L1 table"), self.shape.order)

    @property
    def dirty(self) -> bool:
        return bool(self._l1_dirty or self.l2.dirty)

    # -- tables -----------------------------------------------------------------------------------

    def check_table(self, index: int) -> int:
        """Where the L2 table of L1 entry ``index`` lies.

        :raises Corrupt: it cannot lie there
        """
        host = self.l1[index]
        if host % self.shape.alignment or not 0 < host <= self.space.end - self.shape.table_size or host & 1 << 63:
            raise Corrupt(f"L1 entry {index} at {self.l1_offset + 8 * index:#x} points to {host:#x}, where no L2 table "
                          f"of {self.shape.table_size} bytes can be (the file ends at {self.space.end:#x})",
                          where=self.file.filename, hint="run check")  # fmt: skip
        return host

    def slice_at(self, offset: int) -> Table | None:
        """The part of an L2 table that describes guest ``offset``; ``None`` if there is no table."""
        index, within = divmod(offset, self.shape.span)
        if not self.l1[index]:
            return None
        return self.l2.get(self.check_table(index) + within // self._slice_span * self.l2.length)

    def _slice_for_write(self, offset: int) -> Table:
        found = self.slice_at(offset)
        if found is not None:
            return found
        index, within = divmod(offset, self.shape.span)
        count = -(-self.shape.table_size // self.space.unit)
        host, _, clean = self.space.allocate(1) if count == 1 else self.space.append(count)
        if not clean:
            self.file.write_zeroes(host, count * self.space.unit)
        if self.report is not None:
            self.report("l2_alloc_write")
        table = self.l2.create(host + within // self._slice_span * self.l2.length)
        self.set_l1(index, host)
        return table

    def set_l1(self, index: int, host: int) -> None:
        self.l1[index] = host
        self._l1_dirty.add(8 * index // PAGE)

    def _position(self, offset: int) -> int:
        """Index within its slice."""
        return offset // self.shape.cluster_size % self._per_slice

    def set_entries(self, offset: int, words: Sequence[int]) -> None:
        """Entries of consecutive clusters from guest ``offset``, within one slice."""
        table = self._slice_for_write(offset)
        assert table.words is not None
        first = self._position(offset)
        table.words[first : first + len(words)] = array("Q", words)
        self.l2.mark(table, 8 * first, 8 * (first + len(words)) - 1)

    # -- looking ----------------------------------------------------------------------------------

    def _meaning(self, word: int, guest: int) -> tuple[int, int]:
        """(kind, host) of an entry. :raises Corrupt: it points to where no cluster can be"""
        if not word:
            return UNALLOCATED, -1
        if word == self.shape.zero:
            return ZERO, -1
        if word & self.shape.compressed:
            return COMPRESSED, word & ~self.shape.compressed
        if (word % self.shape.alignment or not self.space.base <= word < self.space.end
                or self.l1_offset - self.shape.cluster_size < word < self.l1_offset + 8 * self.l1_count):  # fmt: skip
            raise self._outside(word, guest)
        return DATA, word

    def _outside(self, word: int, guest: int) -> Corrupt:
        return Corrupt(f"the L2 entry of guest offset {guest:#x} is {word:#x}, where no cluster can be (the file ends "
                       f"at {self.space.end:#x})", where=self.file.filename, hint="run check")  # fmt: skip

    def lookup(self, offset: int, length: int) -> list[Extent]:
        """Up to the end of a slice, or of a run without tables."""
        table = self.slice_at(offset)
        if table is None:
            return [Extent(offset, min(length, self._empty_run(offset, length)), UNALLOCATED)]
        size, words = self.shape.cluster_size, table.words
        assert words is not None
        first = self._position(offset)
        base = offset - offset % size - first * size
        end = min(offset + length, base + self._slice_span)
        rows: list[Extent] = []
        for index in range(first, -(-(end - base) // size)):
            start = max(offset, base + index * size)
            stop = min(end, base + (index + 1) * size)
            kind, host = self._meaning(words[index], base + index * size)
            if kind == DATA:
                host += start % size
            last = rows[-1] if rows else None
            if (last and last.kind == kind <= UNALLOCATED
                    and host == (last.host + last.length if last.host >= 0 else -1)):  # fmt: skip
                rows[-1] = last._replace(length=last.length + stop - start)
            elif len(rows) == _ROWS:
                break
            else:
                rows.append(Extent(start, stop - start, kind, host))
        return rows

    def _empty_run(self, offset: int, length: int) -> int:
        """Bytes from ``offset`` to the next L2 table, or to behind ``length``."""
        span = self.shape.span
        index = offset // span + 1
        while index * span < offset + length and not self.l1[index]:
            index += 1
        return index * span - offset

    def lookup_all(self, offset: int, length: int) -> ExtentMap:
        import numpy as np

        from ..io.extentmap import ExtentMap

        end, span = offset + length, self.shape.span
        first, last = offset // span, -(-end // span)
        tables = np.flatnonzero(np.frombuffer(self.l1, np.uint64)[first:last]) + first
        parts: list[ExtentMap] = []
        at = offset
        for index in tables.tolist():
            if index * span > at:
                parts.append(ExtentMap.single(at, index * span - at, UNALLOCATED))
                at = index * span
            stop = min(end, (index + 1) * span)
            while at < stop:
                table = self.slice_at(at)
                assert table is not None
                assert table.words is not None
                part_end = min(stop, at - at % self._slice_span + self._slice_span)
                parts.append(self._slice_map(np.frombuffer(table.words, np.uint64), at, part_end))
                at = part_end
        if at < end:
            parts.append(ExtentMap.single(at, end - at, UNALLOCATED))
        return ExtentMap.concatenate(parts).coalesced()

    def _slice_map(self, words: NDArray[np.uint64], start: int, end: int) -> ExtentMap:
        """What one slice says of ``[start, end)``."""
        import numpy as np

        from ..io.extentmap import ExtentMap

        shape, size = self.shape, self.shape.cluster_size
        first = self._position(start)
        base = start - start % size
        words = words[first : first + -(-(end - base) // size)]
        kind = np.zeros(len(words), np.uint8)
        kind[words == 0] = UNALLOCATED
        if shape.zero >= 0:
            kind[words == shape.zero] = ZERO
        if shape.compressed:
            kind[words & np.uint64(shape.compressed) != 0] = COMPRESSED
        host = np.where((kind == DATA) | (kind == COMPRESSED), words & np.uint64((1 << 63) - 1), 0).astype(np.int64)
        data = kind == DATA
        bad = data & ((words % np.uint64(shape.alignment) != 0) | (host < self.space.base) | (host >= self.space.end))
        bad |= data & (words >= np.uint64(1 << 63))
        bad |= data & (host > self.l1_offset - size) & (host < self.l1_offset + 8 * self.l1_count)
        if bad.any():
            index = int(np.flatnonzero(bad)[0])
            raise self._outside(int(words[index]), base + index * size)
        host[(kind == UNALLOCATED) | (kind == ZERO)] = -1
        starts = base + np.arange(len(words), dtype=np.int64) * size
        found = ExtentMap(starts, np.full(len(words), size, np.int64), kind, host)
        return found.coalesced().clip(start, end - start)

    # -- writing ----------------------------------------------------------------------------------

    def in_place(self, offset: int, length: int) -> int:
        size = self.shape.cluster_size
        if offset % size + length > size:
            return -1
        table = self.slice_at(offset)
        if table is None or table.words is None:
            return -1
        kind, host = self._meaning(table.words[self._position(offset)], offset)
        return host + offset % size if kind == DATA else -1

    def _blank(self, kind: int) -> bool:
        return kind == ZERO or (kind == UNALLOCATED and not self.backed)

    def reserve(self, offset: int, length: int) -> list[Placement]:
        size = self.shape.cluster_size
        table = self.slice_at(offset)
        words = table.words if table is not None else None
        first = self._position(offset)
        start = offset - offset % size
        count = min(self._per_slice - first, -(-(offset + length - start) // size))
        kind = self._meaning(words[first], start)[0] if words is not None else UNALLOCATED
        if kind == DATA:
            row = self.lookup(offset, length)[0]
            return [Placement(offset, row.length, row.host)]
        run = count
        if words is not None:
            run = 1
            while run < count:
                other = self._meaning(words[first + run], start + run * size)[0]
                if other == DATA or self._blank(other) != self._blank(kind):
                    break
                run += 1
        if self.report is not None:
            self.report("cluster_alloc")
        host, run, clean = self.space.allocate(run)
        return [Placement(start, run * size, host, fresh=True, zeroed=clean, blank=self._blank(kind))]

    def publish(self, placements: Sequence[Placement]) -> None:
        size = self.shape.cluster_size
        for placement in placements:
            hosts = range(placement.host, placement.host + placement.length, size)
            self.set_entries(placement.offset, hosts)

    def cancel(self, placements: Sequence[Placement]) -> None:
        for placement in placements:
            self.space.release(placement.host, placement.length // self.shape.cluster_size)

    def release(self, host: int, count: int) -> None:
        self.space.release(host, count)

    def unmap(self, offset: int, length: int, zero: bool, keep: bool) -> int:
        """One run of clusters that are alike; see :meth:`FormatNode.unmap`. ``zero``: they must read as zeroes."""
        shape, size = self.shape, self.shape.cluster_size
        row = self.lookup(offset, min(length, max(_ZEROED_AT_ONCE // size, 1) * size))[0]
        kind = row.kind
        if kind == DATA:
            if not self.plain:
                return 0 if zero else row.length
            self.file.write_zeroes(row.host, row.length, 0 if keep else MAY_UNMAP)
            return row.length
        if kind == ZERO or not zero:
            return row.length
        if shape.zero >= 0:
            done = min(row.length, self._slice_span - offset % self._slice_span)
            self.set_entries(offset, [shape.zero] * (done // size))
            return done
        if self.backed:
            return 0
        if kind == COMPRESSED:
            self.set_entries(offset, [0])
        return row.length

    # -- compressed clusters ----------------------------------------------------------------------

    def publish_compressed(self, offset: int, words: Sequence[int]) -> None:
        """Entries of consecutive clusters; the clusters they take the place of are let go."""
        size = self.shape.cluster_size
        for index, word in enumerate(words):
            guest = offset + index * size
            before = self.lookup(guest, size)[0]
            self.set_entries(guest, [word])
            if before.kind == DATA:
                self.freed.append((before.host, 1))

    # -- write-back -------------------------------------------------------------------------------

    def write_back(self) -> None:
        """Data | L2 tables | L1 table. The file is as long as what the tables name."""
        if self.file.size < self.space.end:
            self.file.resize(self.space.end, exact=False)
        self.file.flush()
        self.l2.write_dirty()
        if self._l1_dirty:
            self.file.flush()
            if self.report is not None:
                self.report("l1_update")
            for start, end in page_runs(self._l1_dirty, 8 * self.l1_count):
                part = encode_words(self.l1[start // 8 : end // 8], self.shape.order)
                self.file.write_from(self.l1_offset + start, memoryview(part))
            self._l1_dirty.clear()


def check_l1_size(count: int) -> None:
    """:raises ImageError: more entries than are allowed"""
    if 8 * count > MAX_L1_SIZE:
        raise ImageError(f"the L1 table takes {8 * count} bytes, allowed are {MAX_L1_SIZE}")
