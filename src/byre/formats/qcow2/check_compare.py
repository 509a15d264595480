"""Comparing the references a qcow2 check counted with the reference counts on disk, and correcting these in place.

Counts are corrected block by block; a wrong count is never written for a cluster whose references were not all seen.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np

from .entries import REFCOUNT_OFFSET_MASK
from .entries_bulk import pack_refcounts

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from .check_counts import Window
    from .check_findings import Findings
    from .check_reader import Keys, Subject

    Counts = NDArray[Any]

__all__ = ["Comparison"]

BATCH: Final = 1 << 17
"""Clusters compared at once."""
_OFFSET: Final = np.uint64(REFCOUNT_OFFSET_MASK)
GAP_STEP: Final = 1 << 18
FREED_LIMIT: Final = 1 << 14
"""Runs of freed clusters that wait for a flush before their space is given back."""


class Comparison:
    """Compares windows, which must come in ascending order.

    :param blocks: (table index, cluster) of each good refcount block
    :param fix: "" compares; "leaks" lowers counts that are too high, "all" corrects every count
    """

    def __init__(self, subject: Subject, findings: Findings, blocks: tuple[Keys, Keys], fix: str = "") -> None:
        self.subject = subject
        self.findings = findings
        self.blocks = blocks
        self.fix = fix
        self.highest = 0
        #: refcount blocks that hold a reference, as ranges of table indexes: what a rebuild has to write
        self.needed: list[Keys] = []
        self._freed: list[tuple[int, int]] = []

    def window(self, window: Window) -> None:
        subject = self.subject
        # The cluster behind the file counts only if something reaches into it.
        end = min(window.high, subject.cluster_count)
        if window.high > subject.cluster_count and len(window.referred(subject.cluster_count, window.high)):
            end = window.high
        self._overflows(window)
        self._blocks(window)
        if window.keys is None:
            self._dense(window, end)
        else:
            self._sparse(window, end)

    def _overflows(self, window: Window) -> None:
        """References a count of this width cannot hold."""
        limit = self.subject.refcount_max
        if limit >= window.limit:
            return
        over = np.flatnonzero((window.counters & window.mask) > limit)
        for row in over.tolist():
            key = int(row + window.low if window.keys is None else window.keys[row])
            times = int(window.counters[row] & window.mask) - limit
            if self.fix:  # said when it was found; no repair changes it
                self.findings.corruptions += times
                continue
            self.findings.corrupt(
                f"ERROR: overflow cluster offset=0x{key << self.subject.cluster_bits:x}\nUse qemu-img amend to "
                "increase the refcount entry width or qemu-img convert to create a clean copy if the image cannot be "
                "opened for writing",
                times,
            )

    def _blocks(self, window: Window) -> None:
        """A refcount block must be referred to by its one table entry and nothing else."""
        index, keys = self.blocks
        inside = (keys >= window.low) & (keys < window.high)
        index, keys = index[inside], keys[inside]
        if not len(keys):
            return
        sums = window.values(keys).astype(np.int64)
        if not (sums != 1).any():
            return
        # What the count was when an entry was met: refcount blocks come last, in the order of the table.
        order = np.argsort(keys, kind="stable")
        cuts = np.flatnonzero(np.diff(keys[order])) + 1
        repeats = np.diff(np.concatenate(([0], cuts, [len(keys)])))
        earlier = np.arange(len(keys)) - np.repeat(np.append(0, cuts), repeats)
        met = np.empty(len(keys), np.int64)
        met[order] = sums[order] - np.repeat(repeats, repeats) + earlier + 1
        met = np.minimum(met, min(self.subject.refcount_max, 1 << 62))
        rows = np.flatnonzero(met != 1)
        if len(rows):
            self.findings.rebuild = True
        self.findings.corruptions += len(rows)
        for row in rows[: self.findings.room + 1].tolist():
            self.findings.say(f"ERROR refcount block {int(index[row])} refcount={int(met[row])}")

    # -- windows with a counter for each cluster --------------------------------------------------

    def _dense(self, window: Window, end: int) -> None:
        bits = self.subject.block_bits
        table = self.subject.table
        first, last = window.low >> bits, -(-end >> bits)
        at = first
        used = (first + np.flatnonzero(table[first:last] & _OFFSET)).tolist()
        step = max(1, BATCH >> bits)
        row = 0
        while row < len(used):
            index = used[row]
            if index > at:
                self._gap(window, at << bits, min(end, index << bits))
            stop = row + 1
            readable = self.subject.block_offset(index) > 0
            while readable and stop < len(used) and stop - row < step and used[stop] == used[stop - 1] + 1:
                if self.subject.block_offset(used[stop]) < 0:
                    break
                stop += 1
            at = used[stop - 1] + 1
            self._batch(window, index, at, end, readable)
            row = stop
        if at < last:
            self._gap(window, at << bits, end)

    def _batch(self, window: Window, first: int, last: int, end: int, readable: bool) -> None:
        bits = self.subject.block_bits
        low, high = max(window.low, first << bits), min(end, last << bits)
        if low >= high:
            return
        if not readable:
            self._unreadable(low, high)
            return
        counts = self.subject.refcounts(first, last)
        counters = window.counters[low - window.low : high - window.low]
        self._compare(counts, first << bits, low, high, counters, window)

    def _unreadable(self, low: int, high: int) -> None:
        findings = self.findings
        findings.check_errors += high - low
        findings.suspect = True
        kept = min(high - low, findings.room)
        findings.left_out += high - low - kept
        for key in range(low, low + kept):
            findings.say(f"Can't get refcount for cluster {key}: Input/output error")

    def _gap(self, window: Window, low: int, high: int) -> None:
        """Clusters without a refcount block: none of them may be referred to."""
        for first in range(low, high, GAP_STEP if window.keys is None else high - low):
            keys = window.referred(first, min(high, first + GAP_STEP) if window.keys is None else high)
            if len(keys):
                self.highest = max(self.highest, int(keys[-1]))
                self._mismatches(keys, np.zeros(len(keys), np.uint8), self._expected(window, keys))
                # A COPIED flag for a count of 0.
                self.findings.suspect = True

    def _expected(self, window: Window, keys: Keys) -> Counts:
        """What the counts of ``keys`` should be, as far as a count can say it."""
        expected: Counts = np.minimum(window.values(keys).astype(np.uint64), np.uint64(self.subject.refcount_max))
        return expected

    def _compare(self, counts: Counts, base: int, low: int, high: int, counters: Counts, window: Window) -> None:
        """Compare ``[low, high)`` with ``counts``, those of whole blocks from cluster ``base`` on."""
        found = counts[low - base : high - base]
        expected = counters & window.mask
        if self.subject.refcount_max < window.limit:
            expected = np.minimum(expected, self.subject.refcount_max)
        different = found != expected
        if found[-1] or expected[-1]:
            self.highest = high - 1
        else:
            used = np.flatnonzero((found != 0) | (expected != 0))
            if len(used):
                self.highest = low + int(used[-1])
        if different.any():
            rows = np.flatnonzero(different)
            fixed = self._mismatches(rows + low, found[rows], expected[rows])
            if self.fix and fixed.any():
                self._correct(counts, base, rows[fixed] + low, expected[rows[fixed]])
        if not self.findings.suspect:
            single = found == 1
            wrong = (single & (counters & window.plain != 0)) | (~single & (counters >= window.copied))
            self.findings.suspect = bool(wrong.any())

    def _mismatches(self, keys: Keys, found: Counts, expected: Counts) -> NDArray[np.bool_]:
        """Count and report clusters whose count is wrong; which of them are to be corrected."""
        findings = self.findings
        low = found < expected
        if not found.all():
            findings.rebuild = True
        fixed = np.zeros(len(keys), bool)
        if self.fix:
            fixed = (found != 0) & (~low | (self.fix == "all"))
        errors, leaks = int(np.count_nonzero(low & ~fixed)), int(np.count_nonzero(~low & ~fixed))
        findings.corruptions += errors
        findings.leaks += leaks
        findings.corruptions_fixed += int(np.count_nonzero(low & fixed))
        findings.leaks_fixed += int(np.count_nonzero(~low & fixed))
        kept = min(len(keys), findings.room)
        findings.left_out += len(keys) - kept
        columns = (keys[:kept], found[:kept], expected[:kept], low[:kept], fixed[:kept])
        for key, count, wanted, error, mended in zip(*(column.tolist() for column in columns), strict=True):
            word = "Repairing" if mended else "ERROR" if error else "Leaked"
            findings.say(f"{word} cluster {key} refcount={count} reference={wanted}")
        return fixed

    # -- windows with a counter for each cluster referred to --------------------------------------

    def _sparse(self, window: Window, end: int) -> None:
        """Blocks are looked at once for each place they lie at; only those that differ are gone through."""
        subject, bits = self.subject, self.subject.block_bits
        first, last = window.low >> bits, min(-(-end >> bits), len(subject.table))
        index = first + np.flatnonzero(subject.table[first:last] & _OFFSET)
        readable = np.fromiter((subject.block_offset(int(i)) > 0 for i in index), bool, len(index))
        for bad in index[~readable].tolist():
            self._unreadable(max(window.low, bad << bits), min(end, (bad + 1) << bits))
        index = index[readable]
        keys = window.referred(window.low, end)
        found, failed = subject.gather(keys)
        keys, found = keys[~failed], found[~failed]
        expected = self._expected(window, keys)
        self._marks(window, keys, found)
        block = np.searchsorted(index, keys >> bits)
        has_block = (block < len(index)) & (index[np.minimum(block, max(len(index) - 1, 0))] == keys >> bits
                                            if len(index) else np.zeros(len(keys), bool))  # fmt: skip
        if len(keys):
            self.highest = max(self.highest, int(keys[-1]))
        # Leaks of a block: entries that are not 0, without those of clusters referred to.
        unreferred = self._nonzero(index, window.low, end)
        unreferred -= np.bincount(block[has_block & (found != 0)], minlength=len(index))[: len(index)]
        nowhere = ~has_block
        self._mismatches(keys[nowhere], found[nowhere], expected[nowhere])
        keys, found, expected, block = keys[has_block], found[has_block], expected[has_block], block[has_block]
        wrong = np.bincount(block[found != expected], minlength=len(index)) != 0
        for row in np.flatnonzero(wrong | (unreferred != 0)).tolist():
            mine = slice(*np.searchsorted(block, (row, row + 1)).tolist())
            if self.findings.room or self.fix:
                self._one_block(window, int(index[row]), end)
                continue
            bad = found[mine] != expected[mine]
            self._mismatches(keys[mine][bad], found[mine][bad], expected[mine][bad])
            self.findings.leaks += int(unreferred[row])
            self.findings.left_out += int(unreferred[row])

    def _marks(self, window: Window, keys: Keys, found: Counts) -> None:
        marks = window.counters[np.searchsorted(window.keys, keys)] if window.keys is not None else found
        wrong = np.where(found == 1, marks & window.plain, marks & window.copied)
        if wrong.any():
            self.findings.suspect = True

    def _nonzero(self, index: Keys, low: int, end: int) -> NDArray[np.int64]:
        """How many entries of each block are not 0; sets ``highest`` for the last such block."""
        subject, bits = self.subject, self.subject.block_bits
        offsets = np.array([subject.block_offset(int(i)) for i in index], np.int64)
        places, inverse = np.unique(offsets, return_inverse=True)
        counts = np.zeros(len(places), np.int64)
        held = subject.without_holes(places, subject.cluster_size)
        for row in np.searchsorted(places, held).tolist():
            counts[row] = int(np.count_nonzero(subject.pick_all(int(places[row]))))
        result: NDArray[np.int64] = counts[inverse].reshape(-1)
        for row in {0, len(index) - 1} if len(index) else ():
            # The first and the last block may lie in the window only in part.
            base = int(index[row]) << bits
            part = subject.pick_all(int(offsets[row]))[max(low - base, 0) : end - base]
            result[row] = int(np.count_nonzero(part))
        used = np.flatnonzero(result)
        if len(used):
            base = int(index[used[-1]]) << bits
            block = np.flatnonzero(subject.pick_all(int(offsets[used[-1]]))[: end - base])
            self.highest = max(self.highest, base + int(block[-1]))
        return result

    def _one_block(self, window: Window, index: int, end: int) -> None:
        bits = self.subject.block_bits
        low, high = max(window.low, index << bits), min(end, (index + 1) << bits)
        counters = np.zeros(high - low, window.dtype)
        keys = window.referred(low, high)
        counters[keys - low] = window.counters[np.searchsorted(window.keys, keys)] if window.keys is not None else 0
        highest = self.highest
        self._compare(self.subject.refcounts(index, index + 1), index << bits, low, high, counters, window)
        self.highest = max(highest, self.highest)

    # -- correcting -------------------------------------------------------------------------------

    def _correct(self, counts: Counts, base: int, keys: Keys, values: Counts) -> None:
        """Write the blocks of ``keys`` with these counts."""
        subject, bits = self.subject, self.subject.block_bits
        counts[keys - base] = values.astype(counts.dtype)
        for index in np.unique(keys >> bits).tolist():
            start = (index << bits) - base
            data = pack_refcounts(counts[start : start + (1 << bits)], subject.order)
            subject.file.write_from(subject.block_offset(index), memoryview(data))
        free = keys[values == 0]
        if len(free):
            cuts = np.flatnonzero(np.diff(free) != 1) + 1
            self._freed += [(int(run[0]), len(run)) for run in np.split(free, cuts)]
        if len(self._freed) >= FREED_LIMIT:
            self.finish()

    def finish(self) -> None:
        """Corrected counts are on disk on return; the space of freed clusters is given back."""
        if not self.fix:
            return
        self.subject.file.flush()
        bits = self.subject.cluster_bits
        for key, count in self._freed:
            self.subject.file.discard(key << bits, count << bits)
        self._freed.clear()
