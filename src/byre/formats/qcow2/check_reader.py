"""What a qcow2 check reads: the file below, refcount blocks, and what the header says about both.

Owns :class:`Subject`, the image as the check sees it: numbers from the header and plain access to the file. Nothing
here trusts a table; nothing here judges one (that is :mod:`.check_tables` and :mod:`.check_counts`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, NamedTuple, Protocol

import numpy as np

from ...io.extent import ZERO
from . import layout
from .entries import REFCOUNT_OFFSET_MASK
from .entries_bulk import unpack_refcounts

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from numpy.typing import NDArray

    from ...graph.node import Node

    Words = NDArray[np.uint64]
    Keys = NDArray[np.int64]

__all__ = ["MARK_COPIED", "MARK_NONE", "MARK_PLAIN", "Segment", "Subject", "Tally", "segments", "slices"]

WORDS_STEP: Final = 1 << 19
"""Bytes of a table read at a time."""
BLOCK_CACHE: Final = 24 << 20
"""Bytes of refcount blocks kept for random access."""


MARK_NONE: Final = 0
"""The reference has no COPIED flag to compare with the count."""
MARK_COPIED: Final = 1
MARK_PLAIN: Final = 2
"""The active layer refers to the cluster with the COPIED flag, without it."""


class Tally(Protocol):
    """Adds up references; clusters beyond the end of the file never get here."""

    def add(self, keys: Keys, weight: int, mark: int) -> None:
        """Each of ``keys`` (cluster numbers, repeats allowed) is referred to ``weight`` times."""

    def add_range(self, first: int, end: int, weight: int) -> None:
        """Clusters ``[first, end)`` are referred to ``weight`` times."""

    def covers(self, lowest: int, highest: int) -> bool:
        """Whether any of these clusters is of interest."""


class Segment(NamedTuple):
    """Bytes that belong to ``total`` tables, ``active`` of which the active layer uses."""

    start: int
    end: int
    active: int
    total: int


def segments(rows: Iterable[tuple[int, int, bool]]) -> list[Segment]:
    """Disjoint segments of tables that may repeat or overlap, ascending.

    A hostile image can make 65,536 snapshots share one table of 32 MiB, each from another offset: cut at every
    beginning and end, each byte is read once whatever the number of tables that hold it.

    :param rows: (offset, length, whether the active layer uses it)
    """
    changes: dict[int, list[int]] = {}
    for offset, length, active in rows:
        for position, sign in ((offset, 1), (offset + length, -1)):
            change = changes.setdefault(position, [0, 0])
            change[0] += sign * active
            change[1] += sign
    result = []
    used = total = start = 0
    for position in sorted(changes):
        if total and position > start:
            result.append(Segment(start, position, used, total))
        used += changes[position][0]
        total += changes[position][1]
        start = position
    return result


def slices(keys: Keys) -> list[tuple[int, int]]:
    """[first, end) of the runs of consecutive numbers in ``keys``."""
    cuts = (np.flatnonzero(np.diff(keys) != 1) + 1).tolist()
    return list(zip([0, *cuts], [*cuts, len(keys)], strict=True)) if len(keys) else []


class Subject:
    """A qcow2 image under check: header numbers, the file, the refcount table.

    One check owns it; not shared between threads.

    :ivar file_length: bytes, rounded up to a sector
    :ivar cluster_count: clusters of the file, the last one perhaps incomplete
    :ivar table: refcount table entries in host order
    """

    def __init__(self, file: Node, header: layout.Header, extensions: tuple[layout.Extension, ...],
                 where: str = "") -> None:  # fmt: skip
        self.file = file
        self.header = header
        self.where = where or file.filename
        self.cluster_bits = header.cluster_bits
        self.cluster_size = header.cluster_size
        self.order = header.refcount_order
        self.refcount_max = (1 << (1 << self.order)) - 1
        self.block_bits = header.refcount_block_bits
        self.refresh_length()
        self.bitmaps = self._bitmaps(extensions)
        crypto = layout.find_extension(extensions, layout.EXTENSION_CRYPTO)
        self.crypto = layout.decode_crypto_pointer(crypto, self.cluster_bits) if crypto is not None else None
        self.table: Words = self._read_table()
        self._cache: dict[int, NDArray[np.uint8]] = {}
        self._cached = 0

    def refresh_length(self) -> None:
        self.file_length = -(-self.file.size // 512) * 512
        self.cluster_count = -(-self.file_length // self.cluster_size)

    def _bitmaps(self, extensions: tuple[layout.Extension, ...]) -> layout.BitmapsExtension | None:
        """The bitmaps extension, if the autoclear bit says that it is to be believed."""
        data = layout.find_extension(extensions, layout.EXTENSION_BITMAPS)
        if data is None or not self.header.autoclear_features & layout.AUTOCLEAR_BITMAPS:
            return None
        return layout.decode_bitmaps_extension(data, self.cluster_bits)

    # -- the file ---------------------------------------------------------------------------------

    def read(self, offset: int, length: int) -> NDArray[np.uint8]:
        """``length`` bytes; what lies past the end of the file is zeroes."""
        data = np.zeros(length, np.uint8)
        self.read_into(offset, data)
        return data

    def read_into(self, offset: int, data: NDArray[np.uint8]) -> None:
        """Fill ``data``; what lies past the end of the file is zeroes."""
        length = max(0, min(len(data), self.file_length - offset))
        if length:
            self.file.read_into(offset, data.data[:length])
        if length < len(data):
            data[length:] = 0

    def words(self, start: int, end: int) -> Iterator[Words]:
        """The 64-bit entries of ``[start, end)`` in host order, in pieces; pieces of zeroes may be left out."""
        for first, last in self.data_ranges(start, min(end, self.file_length), 8):
            for offset in range(first, last, WORDS_STEP):
                raw = self.read(offset, min(WORDS_STEP, last - offset))
                yield raw.view(">u8").astype(np.uint64)

    def data_ranges(self, start: int, end: int, unit: int) -> Iterator[tuple[int, int]]:
        """The parts of ``[start, end)`` that are no holes of the file, cut at ``unit`` from ``start``."""
        if end - start <= 1 << 20:
            if start < end:
                yield start, end
            return
        position = start
        while position < end:
            status = self.file.block_status(position, end - position)
            stop = min(end, max(status.end, position + 1))
            if status.kind != ZERO:
                stop = min(end, start + -(-(stop - start) // unit) * unit)
                yield position, stop
            elif stop < end:
                # A piece that is a hole only in part is read.
                stop = max(position + 1, start + (stop - start) // unit * unit)
                if stop <= position:
                    stop = min(end, position + unit)
                    yield position, stop
            position = stop

    def without_holes(self, offsets: Keys, length: int) -> Keys:
        """``offsets`` (ascending) of tables of ``length`` bytes, without those in holes of the file.

        Only where the tables are more than the file can hold: then an image of some megabytes may ask for
        terabytes of zeroes.
        """
        allocated = self.file.allocated_size()
        if allocated < 0 or len(offsets) * length <= allocated + (64 << 20):
            return offsets
        keep = np.ones(len(offsets), bool)
        at = 0
        while at < len(offsets):
            offset = int(offsets[at])
            status = self.file.block_status(offset, max(1, self.file_length - offset))
            until = int(np.searchsorted(offsets, status.end - (length - 1 if status.kind == ZERO else 0)))
            if status.kind == ZERO:
                keep[at:until] = False
            at = max(until, at + 1)
        return offsets[keep]

    # -- reference counts on disk -----------------------------------------------------------------

    def _read_table(self) -> Words:
        header = self.header
        parts = [np.zeros(0, np.uint64)]
        if header.refcount_table_clusters:
            length = header.refcount_table_clusters << self.cluster_bits
            parts.append(self.read(header.refcount_table_offset, length).view(">u8").astype(np.uint64))
        table = np.concatenate(parts)
        used = np.flatnonzero(table)
        return table[: int(used[-1]) + 1 if len(used) else 0]

    def block_offset(self, index: int) -> int:
        """Where the refcount block of table entry ``index`` lies; 0: none, -1: nowhere it could be read from."""
        if index >= len(self.table):
            return 0
        offset = int(self.table[index]) & REFCOUNT_OFFSET_MASK
        return -1 if offset & (self.cluster_size - 1) or offset >= 1 << 63 else offset

    def refcounts(self, first: int, end: int) -> NDArray[Any]:
        """The counts of the blocks of table entries ``[first, end)``, all of which must be readable, as on disk."""
        data = np.zeros((end - first) << self.cluster_bits, np.uint8)
        for row, index in enumerate(range(first, end)):
            offset = self.block_offset(index)
            if offset > 0:
                self.read_into(offset, data[row << self.cluster_bits : (row + 1) << self.cluster_bits])
        return unpack_refcounts(data.data, self.order)

    def gather(self, keys: Keys) -> tuple[Words, NDArray[np.bool_]]:
        """(refcounts on disk of the clusters ``keys``, which of them could not be looked up)."""
        counts = np.zeros(len(keys), np.uint64)
        failed = np.zeros(len(keys), bool)
        index = keys >> self.block_bits
        known = np.flatnonzero(index < len(self.table))
        known = known[self.table[index[known]] != 0]
        order = known[np.argsort(index[known], kind="stable")]
        cuts = (np.flatnonzero(np.diff(index[order])) + 1).tolist()
        for first, end in zip([0, *cuts], [*cuts, len(order)], strict=True):
            rows = order[first:end]
            if not len(rows):
                continue
            offset = self.block_offset(int(index[rows[0]]))
            if offset < 0:
                failed[rows] = True
            elif offset:
                counts[rows] = self.pick(self._block(offset), keys[rows] & ((1 << self.block_bits) - 1))
        return counts, failed

    def pick(self, block: NDArray[np.uint8], index: Keys) -> Words:
        """Entries ``index`` of a refcount block given as bytes."""
        if self.order >= 3:
            picked: Words = block.view(f">u{1 << (self.order - 3)}")[index].astype(np.uint64)
            return picked
        per_byte = 3 - self.order
        shift = (index & ((1 << per_byte) - 1)) << self.order
        small: Words = block[index >> per_byte].astype(np.uint64) >> shift.astype(np.uint64)
        return small & np.uint64(self.refcount_max)

    def pick_all(self, offset: int) -> NDArray[Any]:
        """All entries of the refcount block at ``offset``."""
        return unpack_refcounts(self._block(offset).data, self.order)

    def _block(self, offset: int) -> NDArray[np.uint8]:
        block = self._cache.get(offset)
        if block is None:
            while self._cache and self._cached + self.cluster_size > BLOCK_CACHE:
                self._cached -= len(self._cache.pop(next(iter(self._cache))))
            block = self._cache[offset] = self.read(offset, self.cluster_size)
            self._cached += self.cluster_size
        return block

    def forget(self) -> None:
        """Refcount blocks may have changed on disk."""
        self._cache.clear()
        self._cached = 0
