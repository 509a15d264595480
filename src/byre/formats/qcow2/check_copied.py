"""The COPIED flags of the active layer: set exactly where the reference count is 1.

docs/interop/qcow2, "L1 table entry" and "L2 table entry", bit 63. This pass reads the active tables once more; the
check runs it only where its first pass saw a sign that a flag is wrong.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from . import entries
from .check_l2 import Batch, L2Scan
from .check_reader import segments
from .check_tables import l2_groups, limit_unaligned, unaligned_limit

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from ...jobs.job import Control
    from .check_findings import Findings
    from .check_reader import Keys, Subject, Words
    from .check_tables import Walk

__all__ = ["Protected", "check_copied"]

L1_STEP: Final = 1 << 17
"""Entries of the L1 table looked at together."""
_COPIED = np.uint64(entries.COPIED)
_OFFSET = np.uint64(entries.OFFSET_MASK)


class Protected:
    """Bytes an L2 table must not overlap if it is to be written: everything else that is metadata."""

    def __init__(self, walk: Walk, *, l1: bool = True) -> None:
        subject, header = walk.subject, walk.subject.header
        size = subject.cluster_size
        rows = [(0, size), (header.refcount_table_offset, header.refcount_table_clusters << header.cluster_bits)]
        if l1:
            rows.append((header.l1_table_offset, header.l1_size * 8))
        rows.append((header.snapshots_offset, walk.snapshots.size))
        rows += [(row.l1_offset, row.l1_size * 8) for row in walk.snapshots.rows]
        if subject.bitmaps is not None:
            rows.append((subject.bitmaps.directory_offset, subject.bitmaps.directory_size))
        rows += [(key << subject.cluster_bits, size) for key in walk.refcount_blocks()[1].tolist()]
        found = segments((offset, length, False) for offset, length in rows if length)
        self._starts = np.array([row.start for row in found], np.uint64)
        self._ends = np.array([row.end for row in found], np.uint64)

    def overlaps(self, offset: int, length: int) -> bool:
        at = int(np.searchsorted(self._ends, np.uint64(offset), "right"))
        return at < len(self._starts) and int(self._starts[at]) < offset + length


def check_copied(walk: Walk, findings: Findings, control: Control | None, *, mend: bool) -> None:
    """Count flags that are wrong as corruptions; with ``mend``, set them right.

    :raises Aborted: a flag cannot be written, because its table overlaps other metadata
    """
    _Flags(walk, findings, control, mend).run()


class _Flags:
    def __init__(self, walk: Walk, findings: Findings, control: Control | None, mend: bool) -> None:
        self.walk = walk
        self.subject: Subject = walk.subject
        self.findings = findings
        self.scan = L2Scan(walk.subject, control)
        self.mend = mend
        self.word = "Repairing" if mend else "ERROR"
        self.protected = Protected(walk) if mend else None

    def run(self) -> None:
        left = unaligned_limit(self.subject)
        for group in l2_groups(self._l1()):
            for offsets, times, _ in group.runs():
                offsets, left = limit_unaligned(offsets, self.subject, left)
                for batch in self.scan.batches(offsets):
                    self._l2(batch, 1 if self.mend else times)
        if self.mend:
            self.subject.file.flush()

    def _l1(self) -> Iterator[tuple[Keys, int, int]]:
        """Check the L1 table, a piece at a time; where the L2 tables lie that are to be read."""
        header = self.subject.header
        for first in range(0, header.l1_size, L1_STEP):
            length = min(L1_STEP, header.l1_size - first) * 8
            raw = self.subject.read(header.l1_table_offset + first * 8, length)
            yield self._l1_piece(first, raw.view(">u8").astype(np.uint64)), 1, 1

    def _l1_piece(self, first: int, words: Words) -> Keys:
        subject, findings = self.subject, self.findings
        index = np.flatnonzero(words & _OFFSET)
        offsets = (words[index] & _OFFSET).view(np.int64)
        counts, failed = subject.gather(offsets >> subject.cluster_bits)
        wrong = ~failed & ((counts == 1) != (words[index] & _COPIED != 0))
        rows = np.flatnonzero(wrong)
        self._count(len(rows))
        for row in rows[: findings.room].tolist():
            number = int(index[row])
            findings.say(f"{self.word} OFLAG_COPIED L2 cluster: l1_index={first + number} "
                         f"l1_entry={int(words[number]):x} refcount={int(counts[row])}")  # fmt: skip
        if self.mend and len(rows):
            self._write_l1(first, words, index[rows])
        return offsets[~failed & (offsets < subject.file_length)]

    def _count(self, count: int) -> None:
        if self.mend:
            self.findings.corruptions_fixed += count
        else:
            self.findings.corruptions += count

    def _write_l1(self, first: int, words: Words, index: NDArray[np.intp]) -> None:
        header = self.subject.header
        if Protected(self.walk, l1=False).overlaps(header.l1_table_offset, header.l1_size * 8):
            raise self.findings.abort("ERROR: Could not write L1 table; it overlaps other metadata")
        words[index] ^= _COPIED
        data = memoryview(words.astype(">u8").tobytes())
        for page in np.unique(index >> 6).tolist():
            part = data[page << 9 : (page + 1) << 9]
            self.subject.file.write_from(header.l1_table_offset + first * 8 + (page << 9), part)

    def _l2(self, batch: Batch, times: int) -> None:
        subject, findings = self.subject, self.findings
        found = self.scan.load(batch)
        rows = np.flatnonzero(found.present)
        words = found.standard[rows]
        if subject.header.has_data_file:
            counts, failed = np.ones(len(rows), np.uint64), np.zeros(len(rows), bool)
        else:
            counts, failed = subject.gather(found.hosts[rows].view(np.int64) >> subject.cluster_bits)
        wrong = np.flatnonzero(~failed & ((counts == 1) != (words & _COPIED != 0)))
        if not len(wrong):
            return
        self._count(len(wrong) * times)
        for row in wrong[: findings.room + 1].tolist():
            findings.say(f"{self.word} OFLAG_COPIED data cluster: l2_entry={int(words[row]):x} "
                         f"refcount={int(counts[row])}", times)  # fmt: skip
        if self.mend:
            self._write_l2(batch, rows[wrong])

    def _write_l2(self, batch: Batch, rows: NDArray[np.intp]) -> None:
        per_table = self.scan.per_table
        stride = 2 if self.scan.extended else 1
        for table in np.unique(rows // per_table).tolist():
            offset = int(batch.offsets[table])
            if self.protected is not None and self.protected.overlaps(offset, self.subject.cluster_size):
                self.findings.corruptions_fixed -= int(np.count_nonzero(rows // per_table >= table))
                self.findings.corruptions += int(np.count_nonzero(rows // per_table >= table))
                raise self.findings.abort("ERROR: Could not write L2 table; metadata overlap check failed")
            raw = self.subject.read(offset, self.subject.cluster_size)
            raw.view(">u8")[rows[rows // per_table == table] % per_table * stride] ^= _COPIED
            self.subject.file.write_from(offset, raw.data)
