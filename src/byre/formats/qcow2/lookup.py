"""qcow2 lookup: guest offset -> L1 -> cached L2 table -> extents.

"Cluster mapping" in the specification. The half of the mapping that changes nothing; :mod:`.mapping` changes it.
"""

from __future__ import annotations

import sys

from ...errors import Corrupt
from ...io.extent import COMPRESSED as KIND_COMPRESSED
from ...io.extent import DATA, NO_HOST, UNALLOCATED, Extent
from ...io.tables import TableCache, decode_words
from ...typing import TYPE_CHECKING, Final
from . import entries
from .entries import COMPRESSED, OFFSET_MASK, ZERO

if TYPE_CHECKING:
    from array import array
    from collections.abc import Callable

    from ...graph.node import Node
    from ...io.extentmap import ExtentMap
    from .layout import Header

__all__ = ["PART_BYTES", "Lookup"]

_CACHE_BYTES: Final = 32 << 20
PART_BYTES: Final = 4096
"""Where the cache does not hold all tables, what is read of them is kept in parts of this size."""
_BULK: Final = 150
"""From this many entries on, numpy is quicker than a loop."""
_IMPORT_AFTER: Final = 16
"""Loading numpy takes as long as so many loops over a table: a program that asks now and then does without."""


class Lookup:
    """Guarded by the node's lock.

    :param relieve: called when too many tables are dirty; writes them back
    """

    def __init__(self, file: Node, header: Header, l1: array[int], where: str, relieve: Callable[[], None]) -> None:
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
        self.l2 = TableCache(file, self.cluster_size, _CACHE_BYTES >> header.cluster_bits, True, relieve)
        if (-(-header.size >> header.cluster_bits) << (4 if self.extended else 3)) > _CACHE_BYTES:
            self.l2.use_parts(PART_BYTES)
        self._report = file.debug_event if file.takes_events else None
        self.l2.report = self._report
        self.l2.load_event, self.l2.update_event = "l2_load", "l2_update"
        self._long_loops = 0

    def l2_host(self, l1_index: int) -> int:
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
            host = self.l2_host(l1_index)
            if self.l2.part_length:
                return self._lookup_part(host, offset, length)
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
        if self._is_bulk(count):
            return list(self._bulk(words[index : index + count], offset - skip).clip(offset, length))
        return self._runs(words, index, count, offset, length)

    def _is_bulk(self, count: int) -> bool:
        if count < _BULK or "numpy" in sys.modules:
            return count >= _BULK
        self._long_loops += 1
        return self._long_loops > _IMPORT_AFTER

    def _lookup_part(self, host: int, offset: int, length: int) -> list[Extent]:
        """Extents up to the end of the part of the table at ``host`` that ``offset`` belongs to."""
        width = 16 if self.extended else 8
        index = offset >> self.cluster_bits & self.l2_mask
        words = self.l2.part(host, index * width)
        count = self.l2.part_length // width
        first = index & ~(count - 1)
        skip = offset & (self.cluster_size - 1)
        length = min(length, (first + count - index << self.cluster_bits) - skip)
        if self.extended:
            return self._lookup_extended(words, offset, length, first)
        index, count = index - first, (skip + length - 1 >> self.cluster_bits) + 1
        if self._is_bulk(count):
            return list(self._bulk(words[index : index + count], offset - skip).clip(offset, length))
        return self._runs(words, index, count, offset, length)

    def cached_host(self, offset: int, length: int) -> int:
        """Where a range lies in the data file, in one piece, as tables in memory say: -1 if not, -2 if nowhere."""
        l1_index = offset >> self.span_bits
        skip = offset & (self.cluster_size - 1)
        count = (skip + length - 1 >> self.cluster_bits) + 1
        index = offset >> self.cluster_bits & self.l2_mask
        if l1_index >= len(self.l1) or index + count > self.l2_mask + 1 or self.extended:
            return -1
        entry = self.l1[l1_index] & OFFSET_MASK
        table = self.l2.tables.get(entry)
        if table is not None and table.words is not None:
            table.used = True
            words = table.words
        elif not entry:
            return -2
        else:
            length = self.l2.part_length
            part = self.l2.parts.get(entry + (index * 8 & -length)) if length else None
            index &= (length >> 3) - 1
            if part is None or index + count > len(part):
                return -1
            words = part
        word = words[index]
        if not word and not self.data_file:
            return -2 if count == 1 or not any(words[index : index + count]) else -1
        host = word & OFFSET_MASK
        if word & (COMPRESSED | ZERO) or not host or host & (self.cluster_size - 1):
            return -1
        if count > 1:
            flags = word & ~OFFSET_MASK
            for number in range(1, count):
                if words[index + number] != flags | host + (number << self.cluster_bits):
                    return -1
        return host + skip

    def _runs(self, words: array[int], index: int, count: int, offset: int, length: int) -> list[Extent]:
        """Coalesced extents of ``count`` entries, clipped to the range."""
        size = self.cluster_size
        end = offset + length
        guest = offset - (offset & (size - 1))
        rows: list[Extent] = []
        at, kind, host = offset, -1, NO_HOST
        number, stop = index, index + count
        while number < stop:
            word = words[number]
            new_kind, new_host = self._classify(word, guest)
            if new_host >= 0 and new_kind != KIND_COMPRESSED and guest < offset:
                new_host += offset - guest
            start = max(guest, offset)
            expected = host + (start - at) if host >= 0 else host
            if kind != new_kind or new_kind == KIND_COMPRESSED or new_host != expected:
                if kind >= 0:
                    rows.append(Extent(at, start - at, kind, host))
                at, kind, host = start, new_kind, new_host
            number += 1
            guest += size
            if not word or new_kind == DATA:
                # Most entries go on where the one before ends: the same flags, the next cluster; or no cluster at all.
                step = size if word else 0
                last = min(stop, number + (OFFSET_MASK - (word & OFFSET_MASK) >> self.cluster_bits))
                while number < last and words[number] == word + step:
                    word += step
                    number += 1
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

    def _lookup_extended(self, words: array[int], offset: int, length: int, first: int = 0) -> list[Extent]:
        """:param first: the table's entry that ``words`` begin with"""
        bits, sub_bits = self.cluster_bits, self.sub_bits
        end = min(offset + length, ((offset >> self.span_bits) + 1) << self.span_bits)
        rows: list[Extent] = []
        while offset < end:
            index = ((offset >> bits & self.l2_mask) - first) * 2
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
            stop = self.empty_run(l1_index, last + 1)
            if stop > l1_index:
                start = l1_index << self.span_bits
                parts.append(ExtentMap.single(start, (stop - l1_index) << self.span_bits, UNALLOCATED))
                l1_index = stop
                continue
            words, count = self._words_of(l1_index, last + 1)
            parts.append(self._bulk(words, l1_index << self.span_bits))
            l1_index += count
        return ExtentMap.concatenate(parts).clip(offset, length).coalesced()

    def empty_run(self, start: int, stop: int) -> int:
        """The first L1 index from ``start`` whose entry is not 0, at most ``stop``."""
        l1 = self.l1
        end = min(stop, len(l1))
        while start < end and not l1[start]:
            start += 1
        return stop if start >= end else start

    def _words_of(self, l1_index: int, stop: int) -> tuple[array[int], int]:
        """Entries of consecutive L2 tables from ``l1_index``: the cached one, or a run that lies together on disk."""
        host = self.l2_host(l1_index)
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
