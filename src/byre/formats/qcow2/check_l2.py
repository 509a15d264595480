"""L2 tables as a qcow2 check reads them: batches of whole tables, judged and counted with numpy.

docs/interop/qcow2, sections "Standard Cluster Descriptor", "Compressed Clusters Descriptor", "Extended L2 Entries".
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np

from . import entries
from .check_findings import beyond_end
from .check_reader import MARK_COPIED, MARK_NONE, MARK_PLAIN

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from ...jobs.job import Control
    from .check_findings import Findings
    from .check_reader import Keys, Subject, Tally, Words

    Mask = NDArray[np.bool_]

__all__ = ["Batch", "L2Scan"]

BATCH: Final = 1 << 19
"""Bytes of L2 tables looked at together."""

_COMPRESSED: Final = np.uint64(entries.COMPRESSED)
_COPIED: Final = np.uint64(entries.COPIED)
_OFFSET: Final = np.uint64(entries.OFFSET_MASK)
_ALLOCATED: Final = np.uint64(entries.ALL_ALLOCATED)
_ONE: Final = np.uint64(1)


class Batch(NamedTuple):
    """Some L2 tables.

    :ivar offsets: where they lie
    """

    offsets: Keys


class Entries(NamedTuple):
    """The entries of a batch, flat.

    :ivar words: as on disk
    :ivar bitmaps: subcluster bitmaps, ``None`` without extended L2 entries
    :ivar compressed: which are compressed, ``None`` if none is
    :ivar standard: ``words``, 0 where compressed
    :ivar hosts: host offsets, 0 where compressed
    :ivar present: which have a host cluster
    """

    words: Words
    bitmaps: Words | None
    compressed: Mask | None
    standard: Words
    hosts: Words
    present: Mask


class L2Scan:
    """Reads L2 tables and gives what they refer to to a tally, what is wrong with them to the findings."""

    def __init__(self, subject: Subject, control: Control | None) -> None:
        self.subject = subject
        self.control = control
        self.per_table = 1 << subject.header.l2_bits
        self.data_file = subject.header.has_data_file
        self.extended = subject.header.extended_l2
        # Used for every batch: fresh memory for each would cost more than the work on it.
        self.step = max(1, BATCH >> subject.cluster_bits)
        size = self.step << subject.cluster_bits
        self._data = np.empty(size, np.uint8)
        self._words, self._hosts = np.empty(size // 8, np.uint64), np.empty(size // 8, np.uint64)
        self._steps, self._keys = np.empty(size // 8, np.int64), np.empty(size // 8, np.int64)

    def batches(self, offsets: Keys) -> Iterator[Batch]:
        """The tables at ``offsets`` (ascending), without those that lie in holes of the file."""
        offsets = self.subject.without_holes(offsets, self.subject.cluster_size)
        for first in range(0, len(offsets), self.step):
            yield Batch(offsets[first : first + self.step])

    def load(self, batch: Batch) -> Entries:
        """The entries of a batch; they are overwritten by the next one's."""
        size = self.subject.cluster_size
        data = self._data[: len(batch.offsets) * size]
        # Tables that follow each other are read at once.
        cuts = (np.flatnonzero(np.diff(batch.offsets) != size) + 1).tolist()
        for first, end in zip([0, *cuts], [*cuts, len(batch.offsets)], strict=True):
            self.subject.read_into(int(batch.offsets[first]), data[first * size : end * size])
        if self.control is not None:
            self.control.advance(len(data))
        raw = data.view(">u8")
        bitmaps = None
        if self.extended:
            raw, bitmaps = raw[0::2], raw[1::2].astype(np.uint64)
        words = self._words[: len(raw)]
        np.copyto(words, raw)
        return self._classify(words, bitmaps)

    def _classify(self, words: Words, bitmaps: Words | None) -> Entries:
        compressed = None
        standard = words
        if int(np.bitwise_or.reduce(words)) & entries.COMPRESSED:
            compressed = words & _COMPRESSED != 0
            standard = np.where(compressed, np.uint64(0), words)
        hosts = np.bitwise_and(standard, _OFFSET, out=self._hosts[: len(words)])
        present = hosts != 0
        if self.data_file:
            # Offset 0 is a place in the data file; the COPIED flag tells. A plain zero cluster has none.
            plain = standard & _ONE == 0 if not self.extended else np.ones(len(words), bool)
            present |= (standard & _COPIED != 0) & plain
        return Entries(words, bitmaps, compressed, standard, hosts, present)

    # -- one batch --------------------------------------------------------------------------------

    def read(self, batch: Batch, tally: Tally, findings: Findings, active: int, total: int) -> tuple[int, int]:
        """Count what the tables refer to, judge their entries; the (lowest, highest) cluster referred to.

        :param active: how many entries of the active L1 table point to each of the tables
        :param total: how many entries of any L1 table
        """
        found = self.load(batch)
        union = int(np.bitwise_or.reduce(found.standard))
        if union & entries.L2_RESERVED:
            reserved = found.standard & np.uint64(entries.L2_RESERVED) != 0
            for row in self._rows(reserved, total, findings):
                findings.say(f"ERROR found l2 entry with reserved bits set: {int(found.words[row]):x}", total)
        lowest, highest = 1 << 62, -1
        if found.compressed is not None:
            lowest, highest = self._compressed(found, found.compressed, tally, findings, active, total)
        if found.bitmaps is not None:
            self._subclusters(found, found.bitmaps, total, findings)
        if found.present.any():
            low, high = self._normal(batch, found, tally, findings, active, total)
            lowest, highest = min(lowest, low), max(highest, high)
        return lowest, highest

    @staticmethod
    def _rows(chosen: Mask, total: int, findings: Findings) -> list[int]:
        """Rows to write messages for; all the chosen are counted as corruptions."""
        rows = np.flatnonzero(chosen)
        findings.corruptions += len(rows) * total
        kept = min(len(rows), findings.room + 1)
        findings.left_out += (len(rows) - kept) * total
        listed: list[int] = rows[:kept].tolist()
        return listed

    def _subclusters(self, found: Entries, bitmaps: Words, total: int, findings: Findings) -> None:
        both = found.present & (bitmaps & (bitmaps >> np.uint64(32)) & _ALLOCATED != 0)
        for row in self._rows(both, total, findings):
            findings.say(f"ERROR offset={int(found.hosts[row]):x}: Allocated cluster has corrupted subcluster "
                         "allocation bitmap", total)  # fmt: skip
        nowhere = ~found.present & (bitmaps & _ALLOCATED != 0)
        if found.compressed is not None:
            nowhere &= ~found.compressed
        for _ in self._rows(nowhere, total, findings):
            findings.say("ERROR: Unallocated cluster has non-zero subcluster allocation map", total)

    # -- compressed clusters ----------------------------------------------------------------------

    def _compressed(self, found: Entries, compressed: Mask, tally: Tally, findings: Findings, active: int,
                    total: int) -> tuple[int, int]:  # fmt: skip
        subject = self.subject
        rows = np.flatnonzero(compressed)
        words = found.words[rows]
        shift = 62 - (subject.cluster_bits - 8)
        hosts = words & np.uint64((1 << shift) - 1)
        for row in self._rows(words & _COPIED != 0, total, findings):
            findings.say(f"ERROR: coffset=0x{int(hosts[row]):x}: copied flag must never be set for compressed clusters",
                         total)  # fmt: skip
        good = np.ones(len(rows), bool)
        plain = words & ~_COPIED
        if self.data_file:
            good[:] = False
            for row in self._rows(~good, total, findings):
                findings.say(f"ERROR compressed cluster {int(rows[row]) % self.per_table} with data file, "
                             f"entry=0x{int(plain[row]):x}", total)  # fmt: skip
        elif found.bitmaps is not None:
            good = found.bitmaps[rows] == 0
            for row in self._rows(~good, total, findings):
                findings.say(f"ERROR compressed cluster {int(rows[row]) % self.per_table} with non-zero subcluster "
                             f"allocation bitmap, entry=0x{int(plain[row]):x}", total)  # fmt: skip
        count = int(np.count_nonzero(good))
        findings.allocated += count * active
        findings.compressed += count * active
        findings.fragmented += count * active
        hosts, words = hosts[good], words[good]
        sectors = (words >> np.uint64(shift) & np.uint64((1 << (subject.cluster_bits - 8)) - 1)) + _ONE
        first = hosts.view(np.int64)
        length = (sectors << np.uint64(9)).view(np.int64) - (first & 511)
        return self._spread(first, length, tally, findings, total)

    def _spread(self, first: Keys, length: Keys, tally: Tally, findings: Findings, total: int) -> tuple[int, int]:
        """Count the clusters that compressed data touches."""
        subject = self.subject
        beyond = first + length - subject.file_length >= subject.cluster_size
        for row in self._rows(beyond, total, findings):
            findings.say(beyond_end(int(first[row]), int(length[row])), total)
        first, length = first[~beyond], length[~beyond]
        if not len(first):
            return 1 << 62, -1
        begin, last = first >> subject.cluster_bits, first + length - 1 >> subject.cluster_bits
        keys = begin
        for step in range(1, int((last - begin).max()) + 1):
            keys = np.concatenate((keys, begin[last - begin >= step] + step))
        tally.add(keys, total, MARK_NONE)
        return int(begin.min()), int(last.max())

    # -- standard clusters ------------------------------------------------------------------------

    def _normal(self, batch: Batch, found: Entries, tally: Tally, findings: Findings, active: int,
                total: int) -> tuple[int, int]:  # fmt: skip
        subject = self.subject
        everywhere = bool(found.present.all())
        hosts = (found.hosts if everywhere else found.hosts[found.present]).view(np.int64)
        words = found.standard if everywhere else found.standard[found.present]
        steps = np.subtract(hosts[1:], hosts[:-1], out=self._steps[: len(hosts) - 1])
        if active:
            findings.allocated += len(hosts) * active
            findings.fragmented += self._fragmented(found.present, everywhere, steps) * active
        unaligned = bool(int(np.bitwise_or.reduce(hosts)) & (subject.cluster_size - 1))
        if unaligned:
            self._unaligned(batch, found, total, findings)
        if self.data_file:
            if active and (words & _COPIED == 0).any():
                findings.suspect = True
            return 1 << 62, -1
        if int(hosts.max()) >= subject.file_length:
            hosts, words = self._inside(hosts, words, total, findings)
            if not len(hosts):
                return 1 << 62, -1
        keys = np.right_shift(hosts, subject.cluster_bits, out=self._keys[: len(hosts)])
        if unaligned:
            self._second_clusters(hosts, tally, total)
        self._marked(keys, words, tally, active, total)
        return int(keys.min()), int(keys.max()) + unaligned

    def _fragmented(self, present: Mask, everywhere: bool, steps: Keys) -> int:
        """Clusters that do not follow the one allocated before them in the same table."""
        jumps = steps != self.subject.cluster_size
        count = int(np.count_nonzero(jumps))
        if not count:
            return 0
        if everywhere:
            return count - int(np.count_nonzero(jumps[self.per_table - 1 :: self.per_table]))
        table = np.flatnonzero(present) // self.per_table
        return count - int(np.count_nonzero(jumps & (np.diff(table) != 0)))

    def _unaligned(self, batch: Batch, found: Entries, total: int, findings: Findings) -> None:
        wrong = found.present & (found.hosts & np.uint64(self.subject.cluster_size - 1) != 0)
        if found.bitmaps is not None:
            data = found.bitmaps & _ALLOCATED != 0
        else:
            data = found.standard & _ONE == 0
        findings.suspect = True
        for row in self._rows(wrong & data, total, findings):
            findings.say(f"ERROR offset={int(found.hosts[row]):x}: Data cluster is not properly aligned; "
                         "L2 entry corrupted.", total)  # fmt: skip
        for row in self._rows(wrong & ~data, total, findings):
            findings.say(f"ERROR offset={int(found.hosts[row]):x}: Preallocated cluster is not properly aligned; "
                         "L2 entry corrupted.", total)  # fmt: skip
            if int(found.standard[row]) & entries.L2_RESERVED:
                # No entry was ever written so: this may be guest data that a damaged L1 entry points to.
                continue
            table, index = divmod(row, self.per_table)
            findings.misaligned.append((int(batch.offsets[table]), index, int(found.hosts[row])))

    def _inside(self, hosts: Keys, words: Words, total: int, findings: Findings) -> tuple[Keys, Words]:
        """Without the clusters that lie past the end of the file."""
        beyond = hosts >= self.subject.file_length
        findings.suspect = True
        for row in self._rows(beyond, total, findings):
            findings.say(beyond_end(int(hosts[row]), self.subject.cluster_size), total)
        return hosts[~beyond], words[~beyond]

    def _second_clusters(self, hosts: Keys, tally: Tally, total: int) -> None:
        odd = hosts[hosts & (self.subject.cluster_size - 1) != 0]
        tally.add((odd >> self.subject.cluster_bits) + 1, total, MARK_NONE)

    def _marked(self, keys: Keys, words: Words, tally: Tally, active: int, total: int) -> None:
        if not active:
            tally.add(keys, total, MARK_NONE)
        elif int(np.bitwise_and.reduce(words)) & entries.COPIED:
            tally.add(keys, total, MARK_COPIED)
        elif not int(np.bitwise_or.reduce(words)) & entries.COPIED:
            tally.add(keys, total, MARK_PLAIN)
        else:
            copied = words & _COPIED != 0
            tally.add(keys[copied], total, MARK_COPIED)
            tally.add(keys[~copied], total, MARK_PLAIN)
