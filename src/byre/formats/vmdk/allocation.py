"""Writing into a hosted sparse extent: where new grains go, linking them, letting go of them.

Grains are allocated at the end of the file, aligned to their size, or in the place of grains let go before in the same
session. Order on disk: data, and a file long enough for it | grain tables, both copies | (of new tables) directories;
what was let go is given back behind another flush. Everything here is called with the node's lock held.
"""

from __future__ import annotations

from array import array

from ...errors import ByreError, Corrupt, NoSpace
from ...io.extent import DATA, ZERO
from ...typing import TYPE_CHECKING, Final
from ...units import SECTOR, align_down, align_up
from ..base import Placement
from .layout import UNCLEAN_AT

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from .extents import SparseExtent
    from .layout import SparseHeader

__all__ = ["Allocator"]

_MAX_HOST: Final = (1 << 32) * SECTOR
"""Grain tables hold 32-bit sectors."""


class Allocator:
    """Space in the file of one extent.

    :param header: as it is in the file
    :param defer: runs an action once no request can use what was let go any more
    :param last: nothing of the disk lies behind this extent
    :ivar floor: metadata lies below, in the file
    :ivar next: where the next grain goes, bytes; the file ends there after :meth:`write_back` at least
    """

    def __init__(self, extent: SparseExtent, header: SparseHeader, defer: Callable[[Callable[[], None]], None],
                 *, last: bool) -> None:  # fmt: skip
        assert extent.file is not None
        self.extent = extent
        self.file = extent.file
        self.header = header
        self.next = align_up(max(self.file.size, header.overhead * SECTOR), extent.grain)
        self.floor = header.overhead * SECTOR
        self._fresh_zero = self.file.has_zero_init
        self._defer = defer
        self._last = last
        self._free: list[tuple[int, int]] = []
        self._dropped: list[int] = []
        self._marked = False

    # -- space ------------------------------------------------------------------------------------

    def _take(self, grains: int) -> tuple[int, int, bool]:
        """(where, how many, whether they read as zeroes) for up to ``grains`` grains that follow each other."""
        grain = self.extent.grain
        if self._free:
            host, length = self._free.pop()
            taken = min(length, grains * grain)
            if taken < length:
                self._free.append((host + taken, length - taken))
            return host, taken // grain, False
        return self.append(grains * grain, grain), grains, self._fresh_zero

    def append(self, length: int, alignment: int) -> int:
        """``length`` bytes at the end of the file.

        :raises NoSpace: a grain table cannot name a place so far behind
        """
        host = align_up(self.next, alignment)
        if host + length > _MAX_HOST:
            raise NoSpace(f"the extent's file cannot grow beyond {_MAX_HOST} bytes", where=self.file.filename)
        self.next = host + length
        return host

    def cancel(self, placement: Placement) -> None:
        """A fresh placement is not needed; something may have been written there."""
        self._free.append((placement.host, align_up(placement.length, self.extent.grain)))

    def _drop(self, entry: int) -> None:
        """A grain is no longer linked: once that is on disk and no request uses it, its space is free."""
        kind, host = self.extent.classify(entry)
        if kind == DATA and host >= self.floor:
            self._defer(lambda: self._dropped.append(host))

    # -- placing ----------------------------------------------------------------------------------

    def reserve(self, offset: int, length: int, *, has_backing: bool) -> list[Placement]:
        """Placements from ``offset``, up to the end of its grain table at most."""
        extent = self.extent
        at = offset - extent.start
        index = at // extent.span
        stop = min(at + length, (index + 1) * extent.span, extent.size)
        table = extent.tables.get(index) or array("I", bytes(extent.tables.table_size))
        placements: list[Placement] = []
        try:
            while at < stop:
                placement = self._place(table, index * extent.span, at, stop, has_backing)
                placements.append(placement)
                at = placement.offset + placement.length - extent.start
        except BaseException:
            for placement in placements:
                if placement.fresh:
                    self.cancel(placement)
            raise
        return placements

    def _place(self, table: array[int], base: int, at: int, stop: int, has_backing: bool) -> Placement:
        """One run from ``at``: in place, or freshly allocated."""
        extent, grain = self.extent, self.extent.grain
        number, last = (at - base) // grain, (stop - base - 1) // grain
        kind, host = extent.classify(table[number])
        count = 1
        if kind == DATA:
            self._vet(host)
            while number + count <= last and extent.classify(table[number + count]) == (DATA, host + count * grain):
                count += 1
            end = min(base + (number + count) * grain, stop)
            return Placement(extent.start + at, end - at, host + (at - base) % grain, extent.source)
        while number + count <= last and extent.classify(table[number + count])[0] != DATA:
            count += 1
        host, count, zeroed = self._take(count)
        edges = table[number], table[number + count - 1]
        blank = all(extent.classify(edge)[0] == ZERO or not has_backing for edge in edges)
        start, end = base + number * grain, base + (number + count) * grain
        if not self._last:
            end = min(end, extent.size)  # what lies behind belongs to another extent
        return Placement(extent.start + start, end - start, host, extent.source, fresh=True, zeroed=zeroed, blank=blank)

    def _vet(self, host: int) -> None:
        """:raises Corrupt: a grain lies in the metadata, which must not be written over"""
        if host < self.floor:
            raise Corrupt(f"a grain is said to lie at {host:#x}, inside the metadata, which ends at "
                          f"{self.floor:#x}", where=self.file.filename, hint='run "byre check"')  # fmt: skip

    def publish(self, placement: Placement) -> None:
        """Link the grains of a fresh placement, which lie in one table's range."""
        extent, grain = self.extent, self.extent.grain
        at = placement.offset - extent.start
        count = -(-placement.length // grain)
        first = placement.host // SECTOR
        step = grain // SECTOR
        self._link(at, array("I", range(first, first + count * step, step)))

    def link_all(self, offset: int, hosts: Sequence[int]) -> None:
        """The grains from guest ``offset`` lie at these places."""
        for number, host in enumerate(hosts):
            at = offset - self.extent.start + number * self.extent.grain
            self._link(at, array("I", [host // SECTOR]))

    def _link(self, at: int, entries: array[int]) -> None:
        extent = self.extent
        index, number = at // extent.span, at % extent.span // extent.grain
        table = self._table(index)
        before = table[number : number + len(entries)]
        table[number : number + len(entries)] = entries
        extent.tables.changed(index, table)
        if any(before):
            for entry in before:
                self._drop(entry)

    def _table(self, index: int) -> array[int]:
        """The table to change; a new one where there is none."""
        tables = self.extent.tables
        missing = tables.missing(index)
        if missing:
            return tables.add(index, {copy: self.append(tables.table_size, SECTOR) for copy in missing})
        table = tables.get(index)
        assert table is not None
        return table

    def rewrite_table(self, index: int) -> None:
        """Both copies of a table are to be written as the first reads."""
        self.extent.tables.changed(index, self._table(index))

    # -- unmapping --------------------------------------------------------------------------------

    def unmap(self, offset: int, length: int, entry: int) -> int:
        """Whole grains from ``offset`` get ``entry`` (0 or ``ZERO_GRAIN``); bytes done, up to the end of a table."""
        extent = self.extent
        at = offset - extent.start
        index = at // extent.span
        stop = min(at + length, (index + 1) * extent.span)
        number, count = at % extent.span // extent.grain, -(-(stop - at) // extent.grain)
        table = extent.tables.get(index)
        before = table[number : number + count] if table is not None else array("I", bytes(4 * count))
        if any(old != entry for old in before):
            self._link(at, array("I", [entry]) * count)
        return stop - at

    # -- writing back -----------------------------------------------------------------------------

    def mark_unclean(self, unclean: bool) -> None:
        """Say in the header whether the two copies of the tables may differ; not flushed."""
        if self.header.redundant and self._marked != unclean:
            self.file.write_from(UNCLEAN_AT, memoryview(bytes([unclean])))
            self._marked = unclean

    def write_back(self) -> None:
        """See the module; a second :meth:`Node.flush` is left to the caller."""
        tables = self.extent.tables
        if tables.dirty:
            if self.file.size < self.next:
                # The next session allocates behind the end of the file, which may not lie inside a grain.
                self.file.resize(self.next, exact=False)
            self.file.flush()
            tables.write_back()
        dropped, self._dropped = self._dropped, []
        if dropped:
            self.file.flush()
            self._give_back(dropped)

    def _give_back(self, dropped: list[int]) -> None:
        """Punched, and free for other grains."""
        grain = self.extent.grain
        runs: list[tuple[int, int]] = []
        for host in sorted(set(dropped)):
            if runs and sum(runs[-1]) == host:
                runs[-1] = (runs[-1][0], runs[-1][1] + grain)
            else:
                runs.append((host, grain))
        for host, length in runs:
            try:
                self.file.discard(host, length)
            except ByreError:
                pass  # nothing depends on it
        self._free += runs


def aligned(extent: SparseExtent, offset: int, length: int) -> tuple[int, int]:
    """The whole grains inside a range of the extent, as (offset, length); the extent's last grain may be short."""
    at = align_up(offset - extent.start, extent.grain)
    stop = offset + length - extent.start
    if stop < extent.size:
        stop = align_down(stop, extent.grain)
    return extent.start + at, max(min(stop, extent.size) - at, 0)
