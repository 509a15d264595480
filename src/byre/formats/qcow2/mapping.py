"""qcow2 mapping: where guest bytes may go, and the changes to the L1 and L2 tables that say where they went.

"Cluster mapping" in the specification. Knows entries, not bytes of the disk; which clusters are free is
:mod:`.refcounts`' business, giving up clusters is :mod:`.unmapping`'s.
"""

from __future__ import annotations

from array import array

from ...errors import Corrupt
from ...io.tables import PAGE, Table, encode_words, page_runs
from ...typing import TYPE_CHECKING, Final
from ..base import Placement
from . import entries
from .entries import ALL_ALLOCATED, COMPRESSED, COPIED, OFFSET_MASK, ZERO
from .lookup import Lookup

if TYPE_CHECKING:
    from collections.abc import Callable

    from ...graph.node import Node
    from .layout import Header
    from .overlap import Guard
    from .refcounts import Refcounts

__all__ = ["Mapping"]

_HARMLESS_LIMIT: Final = 1 << 16

NEW: Final = "new"
"""Token of a placement whose host clusters were just allocated."""
SAME: Final = "same"
"""Token of a placement in space the cluster owned before (an allocated zero cluster, another subcluster)."""


class Mapping(Lookup):
    """Guarded by the node's lock.

    :param free: called with a dropped entry's (first host cluster, count) once nothing here refers to it
    :ivar has_backing: whether unallocated clusters may read as something else than zeroes
    """

    def __init__(
        self,
        file: Node,
        header: Header,
        l1: array[int],
        where: str,
        relieve: Callable[[], None],
        free: Callable[[int, int], None],
    ) -> None:
        super().__init__(file, header, l1, where, relieve)
        self._l1_dirty: set[int] = set()
        self._free = free
        self.refcounts: Refcounts | None = None  # set for writing
        self._guard: Guard | None = None
        #: Host clusters that were found to be no metadata.
        self._harmless: set[int] = set()
        #: Counts of new L2 tables are written at once, where other counts wait.
        self.count_tables = False
        #: A discarded cluster keeps its space ("discard-no-unref"); where, is noted for the caller.
        self.keep_discarded = False
        self.kept: list[int] = []
        self.has_backing = False

    # -- overlap checks ---------------------------------------------------------------------------

    def use_guard(self, guard: Guard) -> None:
        """Ask ``guard`` before anything is written."""
        self._guard = guard
        self._harmless.clear()
        self.l2.vet = guard.check_l2

    def _vet(self, host: int, count: int) -> None:
        """:raises Corrupt: metadata lies in ``count`` clusters from ``host``, which guest data is said to have"""
        if self._guard is not None and not self.data_file:
            self._guard.check(host >> self.cluster_bits, count, "guest data")

    def _is_harmless(self, host: int) -> bool:
        if self._guard is None or host in self._harmless:
            return True
        if self._guard.at(host >> self.cluster_bits, 1):
            return False
        if len(self._harmless) >= _HARMLESS_LIMIT:
            self._harmless.clear()
        self._harmless.add(host)
        return True

    # -- tables for writing -----------------------------------------------------------------------

    def table_for_write(self, l1_index: int) -> Table:
        """The L2 table of ``l1_index``, owned by the active layer alone: made or copied if need be."""
        entry = self.l1[l1_index]
        host = self.l2_host(l1_index)
        if host and entry & COPIED:
            if self._guard is not None:
                self._guard.check_l2(host)
            return self.l2.get(host)
        assert self.refcounts is not None
        if self._report is not None:
            if host:
                self._report("l2_alloc_cow_read")
            self._report("l2_alloc_write")
        old = self.l2.get(host) if host else None
        new_host = self.refcounts.allocate(1, "L2 table")
        try:
            # A full disk fails this request, then, and not the table when it is written back.
            self.file.write_from(new_host, memoryview(bytes(self.cluster_size)))
        except BaseException:
            self.refcounts.release(new_host, 1)
            raise
        if self.count_tables:
            self.refcounts.write_back()
        table = self.l2.create(new_host, old)
        self._set_l1(l1_index, new_host | COPIED)
        if host:
            self._free(host >> self.cluster_bits, 1)
        return table

    def _set_l1(self, index: int, entry: int) -> None:
        if self._guard is not None:
            self._guard.l2_moved(self.l1[index] & OFFSET_MASK, entry & OFFSET_MASK)
        self.l1[index] = entry
        self._l1_dirty.add(index * 8 // PAGE)

    # -- reserve ----------------------------------------------------------------------------------

    def in_place(self, offset: int, length: int) -> int:
        """Where a range inside plain clusters in one piece, owned by the active layer alone, lies; -1 otherwise."""
        skip = offset & (self.cluster_size - 1)
        count = (skip + length - 1 >> self.cluster_bits) + 1
        index = offset >> self.cluster_bits & self.l2_mask
        if self.extended or index + count > self.l2_mask + 1:
            return -1
        l1_index = offset >> self.span_bits
        entry = self.l1[l1_index] if l1_index < len(self.l1) else 0
        table = self.l2.tables.get(entry & OFFSET_MASK)
        if not entry & COPIED or table is None or table.words is None:
            return -1
        table.used = True
        word = table.words[index]
        host = word & OFFSET_MASK
        if not word & COPIED or word & (COMPRESSED | ZERO) or not host or host & (self.cluster_size - 1):
            return -1
        for number in range(1, count):
            step = number << self.cluster_bits
            if table.words[index + number] != word + step or not (self.data_file or self._is_harmless(host + step)):
                return -1
        return host + skip if self.data_file or self._is_harmless(host) else -1

    def reserve(self, offset: int, length: int) -> list[Placement]:
        """Placements from ``offset``, up to the end of its L2 table at most."""
        l1_index = offset >> self.span_bits
        end = min(offset + length, (l1_index + 1) << self.span_bits)
        words = self.table_for_write(l1_index).words
        assert words is not None
        placements: list[Placement] = []
        take = self._reserve_extended if self.extended else self._reserve_plain
        try:
            while offset < end:
                placement = take(words, offset, end)
                placements.append(placement)
                offset = placement.offset + placement.length
        except BaseException:
            self.cancel([placement for placement in placements if placement.fresh])
            raise
        return placements

    def owned(self, word: int) -> bool:
        """Whether the cluster has a host cluster that nobody else refers to."""
        return bool(word & COPIED and (word & OFFSET_MASK or self.data_file)) and not word & COMPRESSED

    def _reserveowned(self, words: array[int], index: int, count: int, offset: int, end: int) -> Placement:
        """A run in space the clusters own: written in place, and linked anew if zero clusters are among them."""
        size = self.cluster_size
        guest = offset - (offset & (size - 1))
        host = words[index] & OFFSET_MASK
        run = 1
        while run < count and self.owned(words[index + run]) and words[index + run] & OFFSET_MASK == host + run * size:
            run += 1
        self._vet(host, run)
        stop = min(guest + run * size, end)
        if not any(words[number] & ZERO for number in range(index, index + run)):
            return Placement(offset, stop - offset, host + offset - guest)
        # Around the request, a zero cluster is filled with zeroes; a plain one is left as it is.
        start = guest if words[index] & ZERO else offset
        behind = guest + run * size if words[index + run - 1] & ZERO else stop
        return Placement(start, behind - start, host + start - guest, fresh=True, blank=True, token=SAME)

    def _reserve_plain(self, words: array[int], offset: int, end: int) -> Placement:
        """One run from ``offset``: in place, in its own space again, or freshly allocated."""
        bits = self.cluster_bits
        index = offset >> bits & self.l2_mask
        count = (end - 1 >> bits) - (offset >> bits) + 1
        word = words[index]
        guest = offset >> bits << bits
        self._classify(word, guest)  # refuses what is corrupt before it is written to
        if self.owned(word):
            return self._reserveowned(words, index, count, offset, end)
        run = self._run_without_space(words, index, count)
        blank = self._blank(word) and self._blank(words[index + run - 1])
        return self._allocated(guest, run, blank)

    def _run_without_space(self, words: array[int], index: int, count: int) -> int:
        """How many of ``count`` clusters, the first of which does, need new space."""
        if not any(words[index + 1 : index + count]):  # a long write to an empty disk: no loop
            return count
        run = 1
        while run < count and (not words[index + run] & COPIED or words[index + run] & COMPRESSED):
            run += 1
        return run

    def _blank(self, word: int) -> bool:
        """Whether a cluster that is about to be replaced reads as zeroes."""
        if word & COMPRESSED:
            return False
        return bool(word & ZERO) or (not word & OFFSET_MASK and not self.has_backing)

    def _allocated(self, guest: int, run: int, blank: bool) -> Placement:
        """A placement of ``run`` new clusters for the guest clusters from ``guest``."""
        if self.data_file:
            # With an external data file, guest and host offsets are equal.
            return Placement(guest, run * self.cluster_size, guest, fresh=True, blank=blank, token=SAME)
        assert self.refcounts is not None
        host, zeroed = self.refcounts.allocate_zeroed(run)
        return Placement(guest, run * self.cluster_size, host, fresh=True, zeroed=zeroed, blank=blank, token=NEW)

    def _reserve_extended(self, words: array[int], offset: int, end: int) -> Placement:
        """As :meth:`_reserve_plain`, one cluster at a time unless whole clusters are new."""
        bits, size, sub_bits = self.cluster_bits, self.cluster_size, self.sub_bits
        index = (offset >> bits & self.l2_mask) * 2
        guest = offset >> bits << bits
        word, bitmap = words[index], words[index + 1]
        stop = min(end, guest + size)
        first, last = (offset - guest) >> sub_bits, ((stop - guest - 1) >> sub_bits) + 1
        if not word & COMPRESSED:
            try:
                entries.check_subclusters(word, bitmap, bits, data_file=self.data_file)
            except Corrupt as error:
                raise self._located(error, guest) from None
        low, high = guest + (first << sub_bits), guest + (last << sub_bits)
        blank = not word & COMPRESSED and all(bitmap >> (sub + 32) & 1 or not (self.has_backing or bitmap >> sub & 1)
                                              for sub in (first, last - 1))  # fmt: skip
        if word & COPIED and not word & COMPRESSED and (word & OFFSET_MASK or self.data_file):
            host = word & OFFSET_MASK
            self._vet(host, 1)
            wanted = entries.alloc_bits(first, last)
            if bitmap & wanted == wanted:
                return Placement(offset, stop - offset, host + offset - guest)
            # An edge that is allocated already needs nothing around the request.
            start = offset if bitmap >> first & 1 else low
            behind = stop if bitmap >> (last - 1) & 1 else high
            return Placement(start, behind - start, host + start - guest, fresh=True, blank=blank, token=SAME)
        if word & COMPRESSED or bitmap & ALL_ALLOCATED:
            # Everything the cluster holds moves to the new one.
            return self._allocated(guest, 1, False)
        placement = self._allocated(guest, 1, blank)
        return placement._replace(offset=low, length=high - low, host=placement.host + low - guest)

    # -- publish and cancel -----------------------------------------------------------------------

    def publish(self, placements: list[Placement]) -> None:
        """Link fresh placements; what they replace is let go."""
        for placement in placements:
            l1_index = placement.offset >> self.span_bits
            table = self.table_for_write(l1_index)
            if self.extended:
                self._publish_extended(table, placement)
            else:
                self._publish_plain(table, placement)

    def _publish_plain(self, table: Table, placement: Placement) -> None:
        words, size = table.words, self.cluster_size
        assert words is not None
        index = placement.offset >> self.cluster_bits & self.l2_mask
        if placement.token is SAME:
            behind = ((placement.offset + placement.length - 1) >> self.cluster_bits & self.l2_mask) + 1
            guest = placement.offset - (placement.offset & (size - 1))
            for number in range(index, behind):
                host = guest + (number - index) * size if self.data_file else words[number] & OFFSET_MASK
                words[number] = host | COPIED
            self.l2.mark(table, index * 8, behind * 8 - 1)
            return
        count = placement.length >> self.cluster_bits
        old = words[index : index + count]
        entry = placement.host | COPIED
        words[index : index + count] = array("Q", range(entry, entry + count * size, size))
        self.l2.mark(table, index * 8, (index + count) * 8 - 1)
        if any(old):
            for word in old:
                self.drop(word)

    def _publish_extended(self, table: Table, placement: Placement) -> None:
        words = table.words
        assert words is not None
        bits, sub_bits = self.cluster_bits, self.sub_bits
        start, end = placement.offset, placement.offset + placement.length
        while start < end:
            guest = start >> bits << bits
            stop = min(end, guest + self.cluster_size)
            index = (guest >> bits & self.l2_mask) * 2
            word, bitmap = words[index], words[index + 1]
            first, last = (start - guest) >> sub_bits, ((stop - guest - 1) >> sub_bits) + 1
            if placement.token is NEW and (word & COMPRESSED or bitmap & ALL_ALLOCATED):
                bitmap = 0
            fresh = entries.alloc_bits(first, last)
            words[index] = (placement.host + guest - placement.offset) & OFFSET_MASK | COPIED
            words[index + 1] = (bitmap | fresh) & ~(fresh << 32)
            self.l2.mark(table, index * 8, index * 8 + 15)
            if placement.token is NEW:
                self.drop(word)
            start = stop

    def cancel(self, placements: list[Placement]) -> None:
        """Give back what :meth:`reserve` allocated for these."""
        for placement in placements:
            if placement.token is NEW:
                assert self.refcounts is not None
                first = placement.host >> self.cluster_bits
                last = (placement.host + placement.length - 1) >> self.cluster_bits
                self.refcounts.release(first << self.cluster_bits, last - first + 1)

    def drop(self, word: int) -> None:
        """An L2 entry was replaced: what it referred to is let go.

        :raises Corrupt: it refers to no cluster; letting go of what lies there would take it from its owner
        """
        if (word & (self.cluster_size - 1) & OFFSET_MASK and not word & COMPRESSED) or (
            word & COMPRESSED and self.data_file
        ):
            raise Corrupt(
                f"L2 entry {word:#018x} does not point to a cluster", where=self.where, hint='run "byre check"'
            )
        if word & COMPRESSED:
            host, length = entries.compressed_host(word, self.cluster_bits)
            first = host >> self.cluster_bits
            self._free(first, ((host + length - 1) >> self.cluster_bits) - first + 1)
        elif word & OFFSET_MASK and not self.data_file:
            self._free((word & OFFSET_MASK) >> self.cluster_bits, 1)

    def free_run(self, first: int, count: int) -> None:
        """Entries that referred to these host clusters were replaced."""
        self._free(first, count)

    def publish_compressed(self, offset: int, hosts: list[int], lengths: list[int]) -> None:
        """Link compressed clusters from guest ``offset``."""
        step = 2 if self.extended else 1
        if self._report is not None:
            self._report("l2_update_compressed")
        for host, length in zip(hosts, lengths, strict=True):
            table = self.table_for_write(offset >> self.span_bits)
            assert table.words is not None
            index = (offset >> self.cluster_bits & self.l2_mask) * step
            old = table.words[index]
            table.words[index] = entries.compressed_entry(host, length, self.cluster_bits)
            if self.extended:
                table.words[index + 1] = 0
            self.l2.mark(table, index * 8, index * 8 + 8 * step - 1)
            if old:
                self.drop(old)
            offset += self.cluster_size

    def prepare_tables(self, offset: int, length: int) -> None:
        """Make sure the L2 tables of the range exist, so that linking cannot run out of space."""
        for l1_index in range(offset >> self.span_bits, ((offset + length - 1) >> self.span_bits) + 1):
            self.table_for_write(l1_index)

    # -- writing back -----------------------------------------------------------------------------

    @property
    def dirty(self) -> bool:
        return bool(self.l2.dirty or self._l1_dirty)

    @property
    def l1_dirty(self) -> bool:
        return bool(self._l1_dirty)

    def write_l1(self) -> None:
        if self._guard is not None:
            self._guard.check_table(self.l1_offset, len(self.l1) * 8, "active-l1")
        if self._report is not None:
            self._report("l1_update")
        for start, end in page_runs(self._l1_dirty, len(self.l1) * 8):
            self.file.write_from(self.l1_offset + start, memoryview(encode_words(self.l1[start // 8 : end // 8])))
        self._l1_dirty.clear()
