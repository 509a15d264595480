"""L1 tables that are longer than what they map needs, and reach into other metadata or past the end of the file.

A size that is damaged upwards turns whatever lies behind the table into L1 entries: guest data and L2 tables would be
"corrected" as if they were entries, and clusters of the table itself would be leaks. The part of the table that maps
the disk (docs/interop/qcow2, "l1_size") is as good as ever, so a repair cuts the table to it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from . import layout
from .entries import L1_RESERVED, OFFSET_MASK

if TYPE_CHECKING:
    from .check_reader import Keys, Subject
    from .check_snapshots import SnapshotRow

__all__ = ["Fit", "TableFits"]


class Fit(NamedTuple):
    """How an L1 table lies in the file.

    :ivar needed: entries for what it maps
    :ivar overlong: it has more, and these collide with other metadata or lie past the end of the file
    :ivar lost: what is needed of it is not in the file
    """

    needed: int
    overlong: bool
    lost: bool


class TableFits:
    """Judges L1 tables of one image; nothing is read before a table turns out to be longer than needed."""

    def __init__(self, subject: Subject, rows: list[SnapshotRow]) -> None:
        self.subject = subject
        self.rows = rows
        self._places: Keys | None = None

    def active(self) -> Fit:
        header = self.subject.header
        return self._fit(header.l1_table_offset, header.l1_size, self._entries(header.size))

    def snapshot(self, row: SnapshotRow, disk_size: int, state_size: int) -> Fit:
        """:param disk_size, state_size: bytes of the disk and of the state of the machine, which lies behind it"""
        header = self.subject.header
        coverage = header.cluster_size << header.l2_bits
        return self._fit(row.l1_offset, row.l1_size, self._entries(-(-disk_size // coverage) * coverage + state_size))

    def _entries(self, size: int) -> int:
        header = self.subject.header
        return layout.l1_entries_needed(size, header.cluster_bits, extended_l2=header.extended_l2)

    def _fit(self, offset: int, size: int, needed: int) -> Fit:
        subject = self.subject
        enough = offset + min(size, needed) * 8
        if enough - subject.file_length >= subject.cluster_size:
            return Fit(needed, False, True)
        end = offset + size * 8
        if size <= needed or end <= -(-enough // subject.cluster_size) * subject.cluster_size:
            return Fit(needed, False, False)
        if end - subject.file_length >= subject.cluster_size:
            return Fit(needed, True, False)
        return Fit(needed, self.collides(max(enough, offset + 1), end) or self._nonsense(enough, end), False)

    def _nonsense(self, start: int, end: int) -> bool:
        """Whether words there cannot be L1 entries; they map nothing in any case."""
        bad = np.uint64(L1_RESERVED | (self.subject.cluster_size - 1 & OFFSET_MASK))
        return any(bool((words & bad).any()) for words in self.subject.words(start, end))

    def collides(self, start: int, end: int) -> bool:
        """Whether other metadata begin in ``[start, end)``."""
        if self._places is None:
            self._places = self._find_places()
        first, last = np.searchsorted(self._places, (start, end)).tolist()
        return bool(last > first)

    def _find_places(self) -> Keys:
        """Where other metadata begin, ascending: tables, refcount blocks, L2 tables of the active layer."""
        subject, header = self.subject, self.subject.header
        shots = [row.l1_offset for row in self.rows if row.l1_size]
        found = [0, header.l1_table_offset, header.refcount_table_offset, *shots]
        if self.rows:
            found.append(header.snapshots_offset)
        parts = [np.array([place for place in found if place < subject.file_length], np.int64)]
        parts.append((subject.table & np.uint64(OFFSET_MASK)).view(np.int64))
        entries = min(header.l1_size, self._entries(header.size))
        for words in subject.words(header.l1_table_offset, header.l1_table_offset + entries * 8):
            parts.append((words & np.uint64(OFFSET_MASK)).view(np.int64))
        return np.unique(np.concatenate(parts))
