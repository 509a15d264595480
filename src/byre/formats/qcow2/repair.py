"""What repairing a qcow2 image writes, besides single counts and flags: new refcount structures, a new snapshot
table, zeroed L1 and L2 entries, the header's feature bits. Bitmaps are in :mod:`.repair_bitmaps`.

Order (a crash leaves the image no worse than it was): everything new is written to clusters nothing refers to, and
flushed; then header bytes 48 to 71, which lie in one sector, switch to it; then that is flushed.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ...errors import ByreError, NoSpace
from . import layout
from .check_copied import L1_STEP, Protected
from .check_counts import DENSE_BYTES, Window, each_window
from .check_findings import Findings
from .check_fit import TableFits
from .check_reader import Subject, segments, slices
from .check_tables import Walk
from .entries import ALL_ALLOCATED, OFFSET_MASK, ZERO
from .entries_bulk import pack_refcounts

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from ...jobs.job import Control
    from .image import Qcow2Node

__all__ = ["cut_l1", "mark_clean", "rebuild", "zero_misaligned", "zero_nowhere"]

_STEP = 1 << 20


# -- single entries -------------------------------------------------------------------------------


def cut_l1(node: Qcow2Node) -> str:
    """Cut the active L1 table to what the disk needs, if it runs into other metadata; what was done, "" if nothing.

    Its size is one field of the header: a crash leaves the old or the new one.
    """
    file = node.children["file"].node
    subject = Subject(file, node.header, node.extensions, node.filename)
    fit = TableFits(subject, []).active()
    if not fit.overlong:
        return ""
    old = node.header.l1_size
    file.write_from(36, memoryview(fit.needed.to_bytes(4, "big")))
    file.flush()
    node.header = node.header._replace(l1_size=fit.needed)
    return f"Repairing L1 table: its {old} entries run into other metadata, the disk needs {fit.needed}"


def zero_misaligned(walk: Walk, findings: Findings) -> int:
    """Make preallocated clusters that are not aligned plain zero clusters; how many were.

    Their offset is useless, and they read as zeroes already.
    """
    subject = walk.subject
    extended = subject.header.extended_l2
    size = 16 if extended else 8
    protected = Protected(walk)
    done = 0
    for table, index, host in dict.fromkeys(findings.misaligned):
        offset = table + index * size
        if protected.overlaps(offset, size):
            continue
        entry = ZERO.to_bytes(8, "big")
        if extended:
            bitmap = int.from_bytes(bytes(subject.read(offset + 8, 8)), "big")
            # Allocated subclusters would be data: there are none, or this would be a data cluster.
            entry = struct.pack(">QQ", 0, bitmap & ~ALL_ALLOCATED)
        subject.file.write_from(offset, memoryview(entry))
        findings.say(f"Repairing offset={host:x}: Preallocated cluster is not properly aligned; L2 entry corrupted.")
        done += 1
    if done:
        subject.file.flush()
    return done


def zero_nowhere(walk: Walk, findings: Findings) -> int:
    """Clear entries of the active L1 table that point into the header's cluster; how many were.

    No L2 table can be there: what such an entry mapped is lost already, and nothing could be written behind it.
    """
    subject, header = walk.subject, walk.subject.header
    start, length = header.l1_table_offset, header.l1_size * 8
    if Protected(walk, l1=False).overlaps(start, length) or _holds_l2(walk, start, start + length):
        return 0
    done = 0
    for first in range(0, header.l1_size, L1_STEP):
        raw = subject.read(start + first * 8, min(L1_STEP, header.l1_size - first) * 8).view(">u8")
        words = raw.astype(np.uint64)
        rows = np.flatnonzero((words != 0) & (words & np.uint64(OFFSET_MASK) < np.uint64(subject.cluster_size)))
        for row in rows[: findings.room].tolist():
            findings.say(f"Repairing L1 entry {first + row}: {int(words[row]):x} points to no L2 table, what it "
                         "mapped is lost")  # fmt: skip
        raw[rows] = 0
        for page in np.unique(rows >> 6).tolist():
            part = raw[page << 6 : (page + 1) << 6].tobytes()
            subject.file.write_from(start + (first + (page << 6)) * 8, memoryview(part))
        done += len(rows)
    if done:
        subject.file.flush()
    return done


def _holds_l2(walk: Walk, start: int, end: int) -> bool:
    """Whether an L2 table of a snapshot lies in ``[start, end)``."""
    low, high = np.uint64(max(0, start - walk.subject.cluster_size + 1)), np.uint64(end)
    for part in segments((row.l1_offset, row.l1_size * 8, False) for row in walk.snapshots.rows):
        for words in walk.subject.words(part.start, part.end):
            places = words & np.uint64(OFFSET_MASK)
            if ((places >= low) & (places < high) & (places != 0)).any():
                return True
    return False


def mark_clean(node: Qcow2Node) -> None:
    """Clear the dirty and the corrupt bit, after everything else is on disk."""
    header = node.header
    kept = header.incompatible_features & ~(layout.INCOMPATIBLE_DIRTY | layout.INCOMPATIBLE_CORRUPT)
    if header.version < 3 or kept == header.incompatible_features:
        return
    file = node.children["file"].node
    file.flush()
    file.write_from(72, memoryview(kept.to_bytes(8, "big")))
    file.flush()
    node.header = header._replace(incompatible_features=kept)


# -- new refcount structures ----------------------------------------------------------------------


class Area(NamedTuple):
    """Where the new structures go: contiguous clusters.

    :ivar first: first cluster: the refcount table
    :ivar table: clusters of the refcount table; the blocks follow
    :ivar blocks: table indexes of the blocks, ascending
    :ivar snapshots: clusters of the snapshot table, behind the blocks
    """

    first: int
    table: int
    blocks: tuple[int, ...]
    snapshots: int

    @property
    def end(self) -> int:
        return self.first + self.table + len(self.blocks) + self.snapshots


def rebuild(walk: Walk, control: Control | None, width: int, *, bad_snapshots: bool = False) -> layout.Header:
    """Write refcount table and blocks anew from what the tables refer to; the header that is now on disk.

    :param width: bytes of a counter that are enough
    :param bad_snapshots: also write the snapshot table anew, without what cannot stay
    :raises NoSpace: the file cannot hold them, or the format cannot address it
    """
    shots = walk.snapshots.corrected() if bad_snapshots else b""
    wanted = Walk(walk.subject, walk.snapshots, control, structures=False, snapshot_table=not bad_snapshots)
    return _Rebuild(wanted, walk, width, shots, bad_snapshots).run()


class _Rebuild:
    def __init__(self, wanted: Walk, old: Walk, width: int, shots: bytes, bad_snapshots: bool) -> None:
        self.subject: Subject = old.subject
        self.wanted = wanted
        self.old = old
        self.width = width
        self.shots = shots
        self.bad_snapshots = bad_snapshots
        self.one: Window | None = None

    def run(self) -> layout.Header:
        subject = self.subject
        needed: set[int] = set()
        for window in self._windows():
            needed |= self._used_blocks(window)
        area = self._at_end(needed)
        size = area.end << subject.cluster_bits
        try:
            if size > subject.file.size:
                subject.file.resize(size)
        except ByreError:
            area = self._in_gap(needed)
        self._write_blocks(area)
        return self._switch(area)

    def _windows(self) -> Iterator[Window]:
        """The windows; a single one is kept."""
        if self.one is not None:
            yield self.one
            return
        for window in each_window(self.wanted, self.width, Findings()):
            if window.low == 0 and window.high > self.subject.cluster_count:
                self.one = window
            yield window

    def _used_blocks(self, window: Window) -> set[int]:
        bits = self.subject.block_bits
        used: set[int] = set()
        if window.keys is not None:
            return set(np.unique(window.keys >> bits).tolist())
        for low in range(window.low, window.high, _STEP):
            keys = window.referred(low, min(window.high, low + _STEP))
            used.update(np.unique(keys >> bits).tolist())
        return used

    def _planned(self, first: int, needed: set[int]) -> Area:
        """The area that begins at ``first``; its blocks describe the area as well."""
        subject = self.subject
        snapshots = -(-len(self.shots) >> subject.cluster_bits)
        area = Area(first, 1, (), snapshots)
        while True:
            covering = range(first >> subject.block_bits, (area.end - 1 >> subject.block_bits) + 1)
            blocks = tuple(sorted(needed.union(covering)))
            planned = Area(first, -(-(blocks[-1] + 1) * 8 >> subject.cluster_bits), blocks, snapshots)
            if planned == area:
                break
            area = planned
        if area.table << subject.cluster_bits > layout.MAX_REFCOUNT_TABLE_SIZE:
            raise NoSpace(f"a refcount table for cluster {area.end} would be larger than "
                          f"{layout.MAX_REFCOUNT_TABLE_SIZE} bytes", where=subject.where)  # fmt: skip
        return area

    def _at_end(self, needed: set[int]) -> Area:
        # One cluster is left out: an entry that is not aligned may reach into it.
        return self._planned(self.subject.cluster_count + 1, needed)

    def _in_gap(self, needed: set[int]) -> Area:
        """An area inside the file that nothing refers to, not even the old structures."""
        subject = self.subject
        none = NoSpace("the file cannot grow and has no room for new refcount structures", where=subject.where)
        if (subject.cluster_count + 1) * self.width > DENSE_BYTES:
            raise none
        (window,) = each_window(self.old, self.width, Findings())
        free = np.flatnonzero(window.counters[: subject.file.size >> subject.cluster_bits] == 0)
        # The longest gaps first.
        for begin, end in sorted(slices(free), key=lambda run: run[0] - run[1])[:64]:
            area = self._planned(int(free[begin]), needed)
            if area.end <= int(free[end - 1]) + 1:
                return area
        raise none

    def _write_blocks(self, area: Area) -> None:
        subject, bits = self.subject, self.subject.block_bits
        left = set(area.blocks)
        place = {index: area.first + area.table + row for row, index in enumerate(area.blocks)}
        for window in self._windows():
            for index in range(window.low >> bits, (window.high - 1 >> bits) + 1) if len(left) else ():
                if index in left:
                    left.discard(index)
                    self._write_block(index, place[index], self._counts(window, index), area)
        for index in left:
            self._write_block(index, place[index], np.zeros(1 << bits, np.uint64), area)
        entries = np.zeros(area.table << (subject.cluster_bits - 3), ">u8")
        for index, cluster in place.items():
            entries[index] = cluster << subject.cluster_bits
        subject.file.write_from(area.first << subject.cluster_bits, memoryview(entries.tobytes()))
        if self.shots:
            self._write_snapshots(area)
        subject.file.flush()

    def _write_snapshots(self, area: Area) -> None:
        subject = self.subject
        data = self.shots.ljust(area.snapshots << subject.cluster_bits, b"\0")
        subject.file.write_from((area.end - area.snapshots) << subject.cluster_bits, memoryview(data))

    def _counts(self, window: Window, index: int) -> NDArray[Any]:
        bits = self.subject.block_bits
        counts = np.zeros(1 << bits, np.uint64)
        keys = window.referred(index << bits, (index + 1) << bits)
        counts[keys - (index << bits)] = window.values(keys)
        return np.minimum(counts, np.uint64(self.subject.refcount_max))

    def _write_block(self, index: int, cluster: int, counts: NDArray[Any], area: Area) -> None:
        subject, base = self.subject, index << self.subject.block_bits
        low, high = max(area.first - base, 0), area.end - base
        if low < len(counts) and high > 0:
            counts[low:high] += 1
        data = pack_refcounts(counts, subject.order)
        subject.file.write_from(cluster << subject.cluster_bits, memoryview(data))

    def _switch(self, area: Area) -> layout.Header:
        """Header bytes 48 to 71: refcount table and snapshot table change in one sector."""
        subject, header = self.subject, self.subject.header
        offset = area.first << subject.cluster_bits
        header = header._replace(refcount_table_offset=offset, refcount_table_clusters=area.table)
        if self.bad_snapshots:
            place = (area.end - area.snapshots) << subject.cluster_bits if self.shots else 0
            header = header._replace(nb_snapshots=len(self.old.snapshots.rows), snapshots_offset=place)
        fields = struct.pack(">QIIQ", header.refcount_table_offset, header.refcount_table_clusters,
                             header.nb_snapshots, header.snapshots_offset)  # fmt: skip
        subject.file.write_from(48, memoryview(fields))
        subject.file.flush()
        return header
