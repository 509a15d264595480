"""The walk of a qcow2 check: every reference an image makes to clusters of its file, and what is wrong with each.

Header, L1 and L2 tables of the active layer and of all snapshots, snapshot table, refcount table, encryption
header, bitmaps (docs/interop/qcow2). A table is read once for each place it lies at, however many entries point to
it; they are counted by weight. References go to a :class:`Tally`; :mod:`.check_counts` adds them up.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from ...errors import ImageError
from . import entries, layout
from .check_findings import beyond_end
from .check_l2 import L2Scan
from .check_reader import MARK_COPIED, MARK_NONE, MARK_PLAIN, Segment, Subject, segments

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from ...jobs.job import Control
    from .check_findings import Findings
    from .check_reader import Keys, Tally, Words
    from .check_snapshots import SnapshotTable

__all__ = ["Walk", "l2_groups", "limit_unaligned", "unaligned_limit"]

GROUP: Final = 1 << 18
"""L1 entries whose L2 tables are brought together before these are read."""
UNALIGNED_BYTES: Final = 64 << 20
"""Bytes of L2 tables at unaligned offsets that are read: each may overlap 4,095 others."""


class L2Group:
    """L2 tables to read, in the order of reading.

    :ivar offsets: where they lie, distinct
    :ivar active: how many entries of the active L1 table point to each
    :ivar total: how many of all L1 tables
    """

    def __init__(self, offsets: Keys, active: Keys, total: Keys) -> None:
        order = np.argsort(offsets, kind="stable")
        offsets, active, total = offsets[order], active[order], total[order]
        first = np.flatnonzero(np.concatenate(([True], offsets[1:] != offsets[:-1])))
        if len(first) < len(offsets):
            offsets = offsets[first]
            active, total = np.add.reduceat(active, first), np.add.reduceat(total, first)
        if int(total.max()) != int(total.min()) or int(active.max()) != int(active.min()):
            # Tables of the same weights go together, so that a batch has one weight.
            order = np.lexsort((offsets, active, total))
            offsets, active, total = offsets[order], active[order], total[order]
        self.offsets, self.active, self.total = offsets, active, total

    def runs(self) -> Iterator[tuple[Keys, int, int]]:
        """(ascending offsets, active, total) of tables with the same weights."""
        cuts = (np.flatnonzero((np.diff(self.active) != 0) | (np.diff(self.total) != 0)) + 1).tolist()
        for first, end in zip([0, *cuts], [*cuts, len(self.offsets)], strict=True):
            yield self.offsets[first:end], int(self.active[first]), int(self.total[first])


def l2_groups(parts: Iterator[tuple[Keys, int, int]]) -> Iterator[L2Group]:
    """Groups of the tables at ``parts`` (offsets, active, total), at most about ``GROUP`` distinct ones each."""
    pending: list[tuple[Keys, Keys, Keys]] = []
    count = 0
    for offsets, active, total in parts:
        size = len(offsets)
        pending.append((offsets, np.full(size, active, np.int64), np.full(size, total, np.int64)))
        count += size
        if count < GROUP:
            continue
        group = _merged(pending)
        if len(group.offsets) < GROUP // 2:
            # Mostly repeats: they need not be read again for that.
            pending, count = [(group.offsets, group.active, group.total)], len(group.offsets)
            continue
        yield group
        pending, count = [], 0
    if count:
        yield _merged(pending)


def _merged(pending: list[tuple[Keys, Keys, Keys]]) -> L2Group:
    offsets, active, total = zip(*pending, strict=True)
    return L2Group(np.concatenate(offsets), np.concatenate(active), np.concatenate(total))


def unaligned_limit(subject: Subject) -> int:
    """How many L2 tables at unaligned offsets are read."""
    return UNALIGNED_BYTES >> subject.cluster_bits


def limit_unaligned(offsets: Keys, subject: Subject, left: int) -> tuple[Keys, int]:
    """(``offsets`` with at most ``left`` unaligned ones, how many may follow)."""
    unaligned = offsets & (subject.cluster_size - 1) != 0
    count = int(np.count_nonzero(unaligned))
    if count > left:
        offsets = offsets[~unaligned | (np.cumsum(unaligned) <= left)]
    return offsets, max(0, left - count)


class Walk:
    """Visits all references of an image, as often as asked; the order is the same each time.

    :param structures: whether the refcount table and blocks count as references
    """

    def __init__(self, subject: Subject, snapshots: SnapshotTable, control: Control | None, *,
                 structures: bool = True, snapshot_table: bool = True) -> None:  # fmt: skip
        self.subject = subject
        self.snapshots = snapshots
        self.control = control
        self.structures = structures
        self.snapshot_table = snapshot_table
        self._spans: list[tuple[int, int]] | None = None

    def run(self, tally: Tally, findings: Findings) -> None:
        """One visit of everything.

        :raises Aborted: the check cannot go on
        """
        subject, header = self.subject, self.subject.header
        self._region(0, subject.cluster_size, tally, findings)
        self._mappings(tally, findings)
        if self.snapshot_table:
            self._region(header.snapshots_offset, self.snapshots.size, tally, findings)
        if self.structures:
            self._region(header.refcount_table_offset, header.refcount_table_clusters << subject.cluster_bits,
                         tally, findings)  # fmt: skip
        if subject.crypto is not None:
            self._region(subject.crypto.offset, subject.crypto.length, tally, findings)
        if subject.bitmaps is not None:
            self._bitmaps(subject.bitmaps, tally, findings)
        if self.structures:
            tally.add(self._refcount_blocks(findings)[1], 1, MARK_NONE)

    def _region(self, offset: int, length: int, tally: Tally, findings: Findings) -> None:
        if length > 0 and self._inside(offset, length, findings):
            bits = self.subject.cluster_bits
            tally.add_range(offset >> bits, (offset + length - 1 >> bits) + 1, 1)

    def _inside(self, offset: int, length: int, findings: Findings) -> bool:
        """Whether a region ends less than a cluster after the file."""
        if offset + length - self.subject.file_length < self.subject.cluster_size:
            return True
        findings.suspect = True
        findings.corrupt(beyond_end(offset, length))
        return False

    def _regions(self, rows: list[tuple[int, int]], tally: Tally, findings: Findings) -> None:
        """Many regions (offset, length), which may overlap."""
        bits = self.subject.cluster_bits
        found = []
        for offset, length in rows:
            if length > 0 and self._inside(offset, length, findings):
                first = offset >> bits
                found.append((first, (offset + length - 1 >> bits) + 1 - first, False))
        for segment in segments(found):
            tally.add_range(segment.start, segment.end, segment.total)

    # -- L1 and L2 tables -------------------------------------------------------------------------

    def _mappings(self, tally: Tally, findings: Findings) -> None:
        header = self.subject.header
        tables = [(header.l1_table_offset, header.l1_size * 8, True)]
        if header.has_data_file and self.snapshots.rows:
            findings.corrupt(f"ERROR {len(self.snapshots.rows)} snapshots in image with data file")
        for row in self.snapshots.rows:
            wrong = self.snapshots.l1_problem(row)
            if wrong:
                findings.corrupt(wrong)
                continue
            tables.append((row.l1_offset, row.l1_size * 8, False))
            if row.l1_size and row.l1_offset >= 1 << 62:
                findings.corrupt(beyond_end(row.l1_offset, row.l1_size * 8))
                raise findings.abort("ERROR: I/O error in check_refcounts_l1")
        self._regions([(offset, length) for offset, length, _ in tables], tally, findings)
        scan = L2Scan(self.subject, self.control)
        left = unaligned_limit(self.subject)
        parts = self._l1_tables([row for row in segments(tables) if row.start < row.end], tally, findings)
        record = self._spans is None
        spans: list[tuple[int, int]] = [] if self._spans is None else self._spans
        number = 0
        for group in l2_groups(parts):
            for offsets, active, total in group.runs():
                count = len(offsets)
                offsets, left = limit_unaligned(offsets, self.subject, left)
                if len(offsets) < count:
                    findings.say(f"ERROR {count - len(offsets)} L2 tables that are not cluster aligned are not read")
                for batch in scan.batches(offsets):
                    if record:
                        spans.append(scan.read(batch, tally, findings, active, total))
                    elif tally.covers(*spans[number]):
                        scan.read(batch, tally, findings, active, total)
                    number += 1
        self._spans = spans

    def _l1_tables(self, rows: list[Segment], tally: Tally, findings: Findings) -> Iterator[tuple[Keys, int, int]]:
        for row in rows:
            for words in self.subject.words(row.start, row.end):
                words = words[words != 0]
                if len(words):
                    yield self._l1_words(words, row.active, row.total, tally, findings), row.active, row.total

    def _l1_words(self, words: Words, active: int, total: int, tally: Tally, findings: Findings) -> Keys:
        """Count the L2 tables of some L1 entries (none of them 0) and judge these; where the tables lie."""
        subject = self.subject
        if int(np.bitwise_or.reduce(words)) & entries.L1_RESERVED:
            for word in _listed(words, words & np.uint64(entries.L1_RESERVED) != 0, total, findings):
                findings.say(f"ERROR found L1 entry with reserved bits set: {word:x}", total)
        offsets = (words & np.uint64(entries.OFFSET_MASK)).view(np.int64)
        findings.nowhere |= bool(active and (offsets < subject.cluster_size).any())
        beyond = offsets >= subject.file_length
        if beyond.any():
            findings.suspect = True
            for offset in _listed(offsets, beyond, total, findings):
                findings.say(beyond_end(offset, subject.cluster_size), total)
        unaligned = offsets & (subject.cluster_size - 1) != 0
        if unaligned.any():
            for offset in _listed(offsets, unaligned, total, findings):
                findings.say(f"ERROR l2_offset={offset:x}: Table is not cluster aligned; L1 entry corrupted", total)
            tally.add((offsets[unaligned & ~beyond] >> subject.cluster_bits) + 1, total, MARK_NONE)
        offsets, words = offsets[~beyond], words[~beyond]
        keys = offsets >> subject.cluster_bits
        if not active:
            tally.add(keys, total, MARK_NONE)
            return offsets
        copied = words & np.uint64(entries.COPIED) != 0
        # Entries without an offset are references to the header here, but no COPIED flag is looked for there.
        nowhere = offsets == 0
        tally.add(keys[nowhere], total, MARK_NONE)
        tally.add(keys[copied & ~nowhere], total, MARK_COPIED)
        tally.add(keys[~copied & ~nowhere], total, MARK_PLAIN)
        return offsets

    # -- bitmaps ----------------------------------------------------------------------------------

    def _bitmaps(self, pointer: layout.BitmapsExtension, tally: Tally, findings: Findings) -> None:
        subject = self.subject
        self._region(pointer.directory_offset, pointer.directory_size, tally, findings)
        data = subject.read(pointer.directory_offset, pointer.directory_size)
        try:
            directory = layout.decode_bitmap_directory(data.data, pointer.nb_bitmaps, subject.cluster_bits)
        except ImageError as error:
            findings.corruptions += 1
            raise findings.abort(f"ERROR failed to read the bitmap directory: {error}") from None
        tables = [(row.table_offset, row.table_size * 8) for row in directory]
        self._regions(tables, tally, findings)
        bad_mask = np.uint64(0xFF00_0000_0000_01FE | (subject.cluster_size - 1 & ~0x1FF))
        for row in segments((offset, length, False) for offset, length in tables):
            for words in subject.words(row.start, row.end):
                offsets = words & np.uint64(entries.OFFSET_MASK)
                bad = (words & bad_mask != 0) | ((offsets != 0) & (words & np.uint64(1) != 0))
                if bad.any():
                    findings.corruptions += 1
                    raise findings.abort(f"ERROR bitmap table entry {int(words[int(np.argmax(bad))]):#x} is invalid")
                found = offsets[offsets != 0].view(np.int64)
                beyond = found >= subject.file_length
                for offset in _listed(found, beyond, row.total, findings):
                    findings.say(beyond_end(offset, subject.cluster_size), row.total)
                tally.add(found[~beyond] >> subject.cluster_bits, row.total, MARK_NONE)

    # -- refcount blocks --------------------------------------------------------------------------

    def refcount_blocks(self) -> tuple[Keys, Keys]:
        """(table index, cluster) of each refcount block that lies inside the file and is aligned."""
        from .check_findings import Findings

        return self._refcount_blocks(Findings())

    def _refcount_blocks(self, findings: Findings) -> tuple[Keys, Keys]:
        subject = self.subject
        index = np.flatnonzero(subject.table)
        words = subject.table[index]
        reserved = words & np.uint64(entries.REFCOUNT_RESERVED) != 0
        unaligned = ~reserved & (words & np.uint64(subject.cluster_size - 1) != 0)
        # One that begins in the last, incomplete cluster is inside.
        beyond = ~reserved & ~unaligned & (words >> np.uint64(subject.cluster_bits) >= np.uint64(subject.cluster_count))
        for number in _listed(index, reserved, 1, findings):
            findings.say(f"ERROR refcount table entry {number} has reserved bits set")
        for number in _listed(index, unaligned, 1, findings):
            findings.say(f"ERROR refcount block {number} is not cluster aligned; refcount table entry corrupted")
        for number in _listed(index, beyond, 1, findings):
            findings.say(f"ERROR refcount block {number} is outside image")
        findings.outside |= bool(beyond.any())
        if (reserved | unaligned).any():
            findings.rebuild = findings.suspect = True
        good = ~(reserved | unaligned | beyond)
        return index[good].astype(np.int64), words[good].view(np.int64) >> subject.cluster_bits


def _listed(values: NDArray[np.generic], chosen: NDArray[np.bool_], times: int, findings: Findings) -> list[int]:
    """The chosen values to write a message for; all of them are counted as ``times`` corruptions each."""
    count = int(np.count_nonzero(chosen))
    if not count:
        return []
    findings.corruptions += count * times
    kept = min(count, findings.room + 1)
    findings.left_out += (count - kept) * times
    listed: list[int] = values[np.flatnonzero(chosen)[:kept]].tolist()
    return listed
