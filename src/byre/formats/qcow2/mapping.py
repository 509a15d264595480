"""qcow2 mapping: guest offset -> L1 -> cached L2 table -> extents, and the changes to it.

"Cluster mapping" in the specification. Knows entries, not bytes of the disk; which clusters are free is
:mod:`.refcounts`' business.
"""

from __future__ import annotations

from array import array

from ...errors import Corrupt
from ...io.extent import COMPRESSED as KIND_COMPRESSED
from ...io.extent import DATA, NO_HOST, UNALLOCATED, Extent
from ...io.extent import ZERO as KIND_ZERO
from ...io.tables import PAGE, Table, TableCache, decode_words, encode_words, page_runs
from ...typing import TYPE_CHECKING, Final
from ..base import Placement
from . import entries
from .entries import ALL_ALLOCATED, ALL_ZERO, COMPRESSED, COPIED, OFFSET_MASK, ZERO

if TYPE_CHECKING:
    from collections.abc import Callable

    from ...graph.node import Node
    from ...io.extentmap import ExtentMap
    from .layout import Header
    from .overlap import Guard
    from .refcounts import Refcounts

__all__ = ["Mapping"]

_CACHE_BYTES: Final = 32 << 20
_HARMLESS_LIMIT: Final = 1 << 16
_BULK: Final = 150
"""From this many entries on, numpy is quicker than a loop."""

NEW: Final = "new"
"""Token of a placement whose host clusters were just allocated."""
SAME: Final = "same"
"""Token of a placement in space the cluster owned before (an allocated zero cluster, another subcluster)."""


class Mapping:
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
        self.file = file
        self.where = where
        self.version = header.version
        self.cluster_bits = header.cluster_bits
        self.cluster_size = 1 << header.cluster_bits
        self.extended = header.extended_l2
        self.sub_bits = header.subcluster_bits
        self.l2_bits = header.l2_bits
        self.l2_mask = (1 << self.l2_bits) - 1
        self.span_bits = self.l2_bits + header.cluster_bits
        self.data_file = header.has_data_file
        self.l1 = l1
        self.l1_offset = header.l1_table_offset
        self._l1_dirty: set[int] = set()
        self.l2 = TableCache(file, self.cluster_size, _CACHE_BYTES >> header.cluster_bits, True, relieve)
        self._report = file.debug_event if file.takes_events else None
        self.l2.report = self._report
        self.l2.load_event, self.l2.update_event = "l2_load", "l2_update"
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

    # -- looking ----------------------------------------------------------------------------------

    def _l2_host(self, l1_index: int) -> int:
        """Host offset of an L2 table, 0 if there is none.

        :raises Corrupt: the L1 entry is no cluster offset
        """
        entry = self.l1[l1_index] if l1_index < len(self.l1) else 0
        host = entry & OFFSET_MASK
        if host & (self.cluster_size - 1):
            raise Corrupt(f"L1 entry {l1_index} is {entry:#018x}, which points to no cluster", where=self.where,
                          hint='run "byre check"')  # fmt: skip
        return host

    def lookup(self, offset: int, length: int) -> list[Extent]:
        """Extents from ``offset`` up to the end of its L2 table at most."""
        bits = self.cluster_bits
        l1_index = offset >> self.span_bits
        entry = self.l1[l1_index] if l1_index < len(self.l1) else 0
        if not entry:
            span_end = (l1_index + 1) << self.span_bits
            return [Extent(offset, min(length, span_end - offset), UNALLOCATED)]
        host = entry & OFFSET_MASK
        table = self.l2.tables.get(host)
        if table is None:
            host = self._l2_host(l1_index)
            table = self.l2.get(host)
        table.used = True
        words = table.words
        assert words is not None
        if self.extended:
            return self._lookup_extended(words, offset, length)
        index = offset >> bits & self.l2_mask
        skip = offset & (self.cluster_size - 1)
        word = words[index]
        if skip + length <= self.cluster_size and not word & (COMPRESSED | ZERO) and word & OFFSET_MASK:
            # One plain cluster: what most small requests meet.
            start = word & OFFSET_MASK
            if not start & (self.cluster_size - 1):
                return [Extent(offset, length, DATA, start + skip)]
        count = min((skip + length - 1 >> bits) + 1, self.l2_mask + 1 - index)
        if count >= _BULK:
            return list(self._bulk(words[index : index + count], offset - skip).clip(offset, length))
        return self._runs(words, index, count, offset, length)

    def _runs(self, words: array[int], index: int, count: int, offset: int, length: int) -> list[Extent]:
        """Coalesced extents of ``count`` entries, clipped to the range."""
        size = self.cluster_size
        end = offset + length
        guest = offset - (offset & (size - 1))
        rows: list[Extent] = []
        at, kind, host = offset, -1, NO_HOST
        for number in range(index, index + count):
            new_kind, new_host = self._classify(words[number], guest)
            if new_host >= 0 and new_kind != KIND_COMPRESSED and guest < offset:
                new_host += offset - guest
            start = max(guest, offset)
            expected = host + (start - at) if host >= 0 else host
            if kind != new_kind or new_kind == KIND_COMPRESSED or new_host != expected:
                if kind >= 0:
                    rows.append(Extent(at, start - at, kind, host))
                at, kind, host = start, new_kind, new_host
            guest += size
        rows.append(Extent(at, min(guest, end) - at, kind, host))
        return rows

    def _classify(self, word: int, guest: int) -> tuple[int, int]:
        try:
            return entries.classify(word, self.cluster_bits, self.version, data_file=self.data_file)
        except Corrupt as error:
            raise self._located(error, guest) from None

    def _located(self, error: Corrupt, guest: int) -> Corrupt:
        return Corrupt(f"cannot map guest offset {guest:#x}: {error.message}", where=self.where,
                       hint='run "byre check"')  # fmt: skip

    def _lookup_extended(self, words: array[int], offset: int, length: int) -> list[Extent]:
        bits, sub_bits = self.cluster_bits, self.sub_bits
        end = min(offset + length, ((offset >> self.span_bits) + 1) << self.span_bits)
        rows: list[Extent] = []
        while offset < end:
            index = (offset >> bits & self.l2_mask) * 2
            guest = offset >> bits << bits
            sub = (offset - guest) >> sub_bits
            word, bitmap = words[index], words[index + 1]
            try:
                kind, host = entries.classify_subcluster(word, bitmap, sub, bits, data_file=self.data_file)
            except Corrupt as error:
                raise self._located(error, guest) from None
            if kind == KIND_COMPRESSED:
                stop = min(guest + self.cluster_size, end)
            else:
                stop = min(guest + (sub + entries.subcluster_run(bitmap, sub) << sub_bits), end)
                if host >= 0:
                    host += offset - guest - (sub << sub_bits)
            last = rows[-1] if rows else None
            if (
                last
                and last.kind == kind < KIND_COMPRESSED
                and host == (last.host + last.length if last.host >= 0 else -1)
            ):
                rows[-1] = last._replace(length=stop - last.offset)
            else:
                rows.append(Extent(offset, stop - offset, kind, host))
            offset = stop
        return rows

    def lookup_all(self, offset: int, length: int) -> ExtentMap:
        """The whole range at once; tables that are not cached are read past the cache."""
        from ...io.extentmap import ExtentMap

        parts: list[ExtentMap] = []
        end = offset + length
        first, last = offset >> self.span_bits, (end - 1) >> self.span_bits
        l1_index = first
        while l1_index <= last:
            stop = self._empty_run(l1_index, last + 1)
            if stop > l1_index:
                start = l1_index << self.span_bits
                parts.append(ExtentMap.single(start, (stop - l1_index) << self.span_bits, UNALLOCATED))
                l1_index = stop
                continue
            words, count = self._words_of(l1_index, last + 1)
            parts.append(self._bulk(words, l1_index << self.span_bits))
            l1_index += count
        return ExtentMap.concatenate(parts).clip(offset, length).coalesced()

    def _empty_run(self, start: int, stop: int) -> int:
        """The first L1 index from ``start`` whose entry is not 0, at most ``stop``."""
        l1 = self.l1
        end = min(stop, len(l1))
        while start < end and not l1[start]:
            start += 1
        return stop if start >= end else start

    def _words_of(self, l1_index: int, stop: int) -> tuple[array[int], int]:
        """Entries of consecutive L2 tables from ``l1_index``: the cached one, or a run that lies together on disk."""
        host = self._l2_host(l1_index)
        cached = self.l2.tables.get(host)
        if cached is not None and cached.words is not None:
            return cached.words, 1
        limit = max(1, (1 << 20) >> self.cluster_bits)
        count = 1
        while count < limit and l1_index + count < min(stop, len(self.l1)):
            following = self.l1[l1_index + count] & OFFSET_MASK
            if following != host + (count << self.cluster_bits) or following in self.l2.tables:
                break
            count += 1
        data = bytearray(count << self.cluster_bits)
        self.file.read_into(host, memoryview(data))
        return decode_words(data), count

    def _bulk(self, words: array[int], guest: int) -> ExtentMap:
        import numpy as np

        from ...io.extentmap import ExtentMap
        from . import entries_bulk

        table = np.frombuffer(words, np.uint64)
        bitmaps = None
        if self.extended:
            table, bitmaps = np.ascontiguousarray(table[0::2]), np.ascontiguousarray(table[1::2])
        try:
            length, kind, host = entries_bulk.classify(table, guest, self.cluster_bits, self.version, bitmaps=bitmaps,
                                                       data_file=self.data_file)  # fmt: skip
        except Corrupt as error:
            raise Corrupt(error.message, where=self.where, hint='run "byre check"') from None
        start = np.cumsum(length) - length + guest
        return ExtentMap(start, length, kind.astype(np.uint8), host)

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
        host = self._l2_host(l1_index)
        if host and entry & COPIED:
            if self._guard is not None:
                self._guard.check_l2(host)
            return self.l2.get(host)
        assert self.refcounts is not None
        if self._report is not None:
            self._report("l2_alloc_write")
        old = self.l2.get(host) if host else None
        new_host = self.refcounts.allocate(1, "L2 table")
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
        """Where a range inside one plain cluster, owned by the active layer alone, lies; -1 otherwise."""
        skip = offset & (self.cluster_size - 1)
        if self.extended or skip + length > self.cluster_size:
            return -1
        l1_index = offset >> self.span_bits
        entry = self.l1[l1_index] if l1_index < len(self.l1) else 0
        table = self.l2.tables.get(entry & OFFSET_MASK)
        if not entry & COPIED or table is None or table.words is None:
            return -1
        table.used = True
        word = table.words[offset >> self.cluster_bits & self.l2_mask]
        host = word & OFFSET_MASK
        if not word & COPIED or word & (COMPRESSED | ZERO) or not host or host & (self.cluster_size - 1):
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

    def _owned(self, word: int) -> bool:
        """Whether the cluster has a host cluster that nobody else refers to."""
        return bool(word & COPIED and (word & OFFSET_MASK or self.data_file)) and not word & COMPRESSED

    def _reserve_owned(self, words: array[int], index: int, count: int, offset: int, end: int) -> Placement:
        """A run in space the clusters own: written in place, and linked anew if zero clusters are among them."""
        size = self.cluster_size
        guest = offset - (offset & (size - 1))
        host = words[index] & OFFSET_MASK
        run = 1
        while run < count and self._owned(words[index + run]) and words[index + run] & OFFSET_MASK == host + run * size:
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
        if self._owned(word):
            return self._reserve_owned(words, index, count, offset, end)
        run = 1
        while run < count and self._needs_space(words[index + run]):
            run += 1
        blank = self._blank(word) and self._blank(words[index + run - 1])
        return self._allocated(guest, run, blank)

    def _needs_space(self, word: int) -> bool:
        return not word & COPIED or bool(word & COMPRESSED)

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

    def publish_compressed(self, offset: int, hosts: list[int], lengths: list[int]) -> None:
        """Link compressed clusters from guest ``offset``."""
        step = 2 if self.extended else 1
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

    # -- unmap ------------------------------------------------------------------------------------

    def unmap(self, offset: int, length: int, kind: int, keep: bool, *, full: bool = False) -> int:
        """Whole clusters (subclusters for ZERO with extended entries) become ZERO or UNALLOCATED.

        A discarded cluster reads as zeroes afterwards (version 3) rather than as the backing file, unless ``full``.

        :returns: bytes done, up to the end of the L2 table; 0 if version 2 cannot
        """
        l1_index = offset >> self.span_bits
        if kind == KIND_ZERO and self.version < 3:
            # Version 2 has no zero clusters; without a backing file, what is not allocated reads as zeroes.
            if self.has_backing or (keep and self.l1[l1_index] & OFFSET_MASK):
                return 0
            kind, full = UNALLOCATED, True
        end = min(offset + length, (l1_index + 1) << self.span_bits)
        if not self.l1[l1_index] & OFFSET_MASK and kind == UNALLOCATED and (full or not self.has_backing):
            stop = self._empty_run(l1_index, len(self.l1)) << self.span_bits
            return min(stop, offset + length) - offset
        table = self.table_for_write(l1_index)
        if self.extended:
            return self._unmap_extended(table, offset, end, kind, keep, full) - offset
        self._unmap_plain(table, offset, end, kind, keep, full)
        return end - offset

    def _unmap_plain(self, table: Table, offset: int, end: int, kind: int, keep: bool, full: bool) -> None:
        words = table.words
        assert words is not None
        bits = self.cluster_bits
        hold = self._holds(keep, full)
        first = offset >> bits & self.l2_mask
        count = ((end - 1) >> bits) - (offset >> bits) + 1
        changed_low = changed_high = -1
        for index in range(first, first + count):
            old = words[index]
            new = old | ZERO if hold and self._owned(old) else self._unmapped(old, kind, keep, full)
            if new == old:
                continue
            if hold and new & OFFSET_MASK:
                self.kept.append(new & OFFSET_MASK)
            words[index] = new
            changed_low = index if changed_low < 0 else changed_low
            changed_high = index
            if not new & OFFSET_MASK:
                self.drop(old)
        if changed_low >= 0:
            self.l2.mark(table, changed_low * 8, changed_high * 8 + 7)

    def _holds(self, keep: bool, full: bool) -> bool:
        """Whether clusters keep their place although they need not."""
        return self.keep_discarded and not keep and not full and not self.data_file

    def _unmapped(self, old: int, kind: int, keep: bool, full: bool) -> int:
        """What a standard entry becomes."""
        if kind == KIND_ZERO:
            if keep and not old & COMPRESSED and (old & COPIED or not old & OFFSET_MASK):
                return old | ZERO
            return ZERO
        if full:
            return 0
        if self.version < 3 and self.has_backing:
            return old  # version 2 has no zero clusters, and the backing file must not show through
        # The COPIED flag alone tells offset 0 of an external data file from "unallocated".
        held = old & (COMPRESSED | OFFSET_MASK) or (self.data_file and old & COPIED)
        if held or (self.has_backing and not old & ZERO):
            return ZERO if self.version >= 3 else 0
        return old

    def _unmap_extended(self, table: Table, offset: int, end: int, kind: int, keep: bool, full: bool) -> int:
        """The guest offset reached: part of a compressed cluster can only be zeroed by writing it as data."""
        words = table.words
        assert words is not None
        bits, size, sub_bits = self.cluster_bits, self.cluster_size, self.sub_bits
        while offset < end:
            guest = offset >> bits << bits
            stop = min(end, guest + size)
            index = (guest >> bits & self.l2_mask) * 2
            word, bitmap = words[index], words[index + 1]
            first, last = (offset - guest) >> sub_bits, ((stop - guest - 1) >> sub_bits) + 1
            if first == 0 and last == entries.SUBCLUSTERS:
                held = self._holds(keep, full) and self._owned(word)
                new = (word, ALL_ZERO) if held else self._unmapped_extended(word, bitmap, kind, keep, full)
                if held and bitmap != ALL_ZERO:
                    self.kept.append(word & OFFSET_MASK)
            elif word & COMPRESSED:
                return offset
            else:
                mask = entries.zero_bits(first, last)
                new = (word, (bitmap | mask) & ~(mask >> 32))
            if new != (word, bitmap):
                words[index], words[index + 1] = new
                self.l2.mark(table, index * 8, index * 8 + 15)
                if not new[0] & OFFSET_MASK:
                    self.drop(word)
            offset = stop
        return offset

    def _unmapped_extended(self, word: int, bitmap: int, kind: int, keep: bool, full: bool) -> tuple[int, int]:
        if kind == KIND_ZERO:
            if keep and not word & COMPRESSED and word & OFFSET_MASK and word & COPIED:
                return word, ALL_ZERO
            return 0, ALL_ZERO
        if full:
            return 0, 0
        if word & (COMPRESSED | OFFSET_MASK) or (self.has_backing and bitmap != ALL_ZERO):
            return 0, ALL_ZERO
        return word, bitmap

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
