"""What an L1 table refers to, walked in bulk: the part of snapshot operations that grows with the image.

Goes through L2 tables in the order in which they lie in the file, about 1 MiB at a time, each once however often the
L1 table names it. Reads past the table cache, which must hold nothing that is not on disk.
"""

from __future__ import annotations

from itertools import islice, pairwise
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np

from ...errors import Corrupt
from ...io.tables import decode_words, page_runs
from . import entries
from .refcounts_bulk import RefcountOverflow, add_many, check_many, counted, get_many

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from .image import Qcow2Node

    Words = NDArray[np.uint64]

__all__ = ["References", "read_l1", "with_flags"]

_STEP: Final = 1 << 20
_PAGE: Final = 4096
_OFFSET = np.uint64(entries.OFFSET_MASK)
_COPIED = np.uint64(entries.COPIED)
_COMPRESSED = np.uint64(entries.COMPRESSED)
_PLAIN = np.uint64(~entries.COPIED & (1 << 64) - 1)


def read_l1(node: Qcow2Node, offset: int, count: int) -> Words:
    """``count`` entries of the L1 table at host ``offset``."""
    data = bytearray(count * 8)
    node.file.read_into(offset, memoryview(data))
    return np.frombuffer(decode_words(data), np.uint64)


def with_flags(words: Words, single: NDArray[np.bool_]) -> Words:
    """L1 or L2 entries with the COPIED flag exactly where ``single`` says that the count is 1."""
    return np.where(single, words | _COPIED, words & _PLAIN)


class Batch(NamedTuple):
    """L2 tables that lie behind each other.

    :ivar host: where the first lies
    :ivar words: their entries, both words of each with extended L2
    :ivar tables: their host clusters
    :ivar times: how often the L1 table names each of them
    """

    host: int
    words: Words
    tables: NDArray[np.int64]
    times: int


class References:
    """Every L2 table and cluster that one L1 table refers to.

    Guarded by the node's lock.

    :param what: names the table in messages
    :ivar flagged: whether an L2 table has a COPIED flag; known after :meth:`check`
    :raises Corrupt: an L1 entry is no cluster offset
    """

    def __init__(self, node: Qcow2Node, l1: Words, what: str) -> None:
        assert node.refcounts is not None
        self.node = node
        self.refcounts = node.refcounts
        self.what = what
        self.bits = node.header.cluster_bits
        self.flagged = False
        hosts = (l1 & _OFFSET).view(np.int64)
        if (hosts & (node.cluster_size - 1)).any():
            at = int(np.argmax(hosts & (node.cluster_size - 1) != 0))
            raise self._corrupt(f"L1 entry {at} is {int(l1[at]):#018x}, which points to no cluster")
        self.hosts, times = np.unique(hosts[hosts != 0], return_counts=True)
        self.times = times

    def _corrupt(self, message: str) -> Corrupt:
        return Corrupt(f"{self.what}: {message}", where=self.node.filename, hint='run "byre check -r all"')

    # -- reading ----------------------------------------------------------------------------------

    def batches(self) -> Iterator[Batch]:
        size = self.node.cluster_size
        limit = max(1, _STEP >> self.bits)
        breaks = (self.hosts[1:] != self.hosts[:-1] + size) | (self.times[1:] != self.times[:-1])
        starts = [0, *(np.flatnonzero(breaks) + 1).tolist(), len(self.hosts)]
        for start, end in pairwise(starts):
            for first in range(start, end, limit):
                count = min(limit, end - first)
                host = int(self.hosts[first])
                data = bytearray(count * size)
                self.node.file.read_into(host, memoryview(data))
                words = np.frombuffer(decode_words(data), np.uint64)
                yield Batch(host, words, self.hosts[first : first + count] >> self.bits, int(self.times[first]))

    def _entries(self, batch: Batch) -> Words:
        return batch.words[::2] if self.node.header.extended_l2 else batch.words

    def _clusters(self, batch: Batch) -> NDArray[np.int64]:
        """The host clusters that the tables' entries refer to, as often as they do."""
        words = self._entries(batch)
        packed = words & _COMPRESSED != 0
        plain = (words & _OFFSET).view(np.int64)
        any_packed = bool(packed.any())
        if any_packed:
            plain = plain[~packed]
        plain = plain[plain != 0]
        if (plain & (self.node.cluster_size - 1)).any():
            host = int(plain[np.argmax(plain & (self.node.cluster_size - 1) != 0)])
            raise self._corrupt(f"an L2 entry points to {host:#x}, which is not aligned to a cluster")
        found = plain >> self.bits
        return np.concatenate((found, self._packed_clusters(words[packed]))) if any_packed else found

    def _packed_clusters(self, words: Words) -> NDArray[np.int64]:
        """The host clusters that compressed entries touch (specification, "Compressed Clusters Descriptor")."""
        shift = 62 - (self.bits - 8)
        descriptor = (words & np.uint64(entries.COMPRESSED - 1)).view(np.int64)
        host = descriptor & ((1 << shift) - 1)
        end = (host & ~511) + ((descriptor >> shift) + 1) * 512
        first, last = host >> self.bits, (end - 1) >> self.bits
        counts = last - first + 1
        rows = np.repeat(first - (np.cumsum(counts) - counts), counts)
        return rows + np.arange(len(rows))

    def _counted(self, batch: Batch) -> tuple[NDArray[np.int64], NDArray[np.uint64]]:
        clusters, times = counted(np.concatenate((self._clusters(batch), batch.tables)))
        return clusters, times * np.uint64(batch.times)

    # -- counts -----------------------------------------------------------------------------------

    def check(self, *, down: bool = False) -> None:
        """Whether all counts can be raised (lowered) once per reference; nothing is changed.

        :raises RefcountOverflow: one would become too large
        :raises Corrupt: one is lower than what refers to its cluster; or an entry is unaligned
        """
        for batch in self.batches():
            clusters, times = self._counted(batch)
            check_many(self.refcounts, clusters, times, down=down)
            self.flagged = self.flagged or int(np.bitwise_or.reduce(self._entries(batch))) & entries.COPIED != 0

    def raise_counts(self) -> None:
        """One more reference from everywhere.

        :raises RefcountOverflow: the references of different tables together are too many; all is as before
        """
        done = 0
        try:
            for batch in self.batches():
                add_many(self.refcounts, *self._counted(batch))
                done += 1
        except RefcountOverflow:
            for batch in islice(self.batches(), done):
                add_many(self.refcounts, *self._counted(batch), down=True)
            raise

    def lower_counts(self, *, punch: bool) -> None:
        """One reference less from everywhere; what is free now may be taken at once.

        :param punch: give free space back to the file system
        """
        for batch in self.batches():
            freed = add_many(self.refcounts, *self._counted(batch), down=True)
            if not len(freed):
                continue
            self.refcounts.freed_below(int(freed[0]))
            if punch:
                starts = np.flatnonzero(np.concatenate(([True], freed[1:] != freed[:-1] + 1)))
                ends = np.append(starts[1:], len(freed))
                for first, count in zip(freed[starts].tolist(), (ends - starts).tolist(), strict=True):
                    self.node.file.discard(first << self.bits, count << self.bits)

    # -- COPIED flags -----------------------------------------------------------------------------

    def clear_flags(self) -> None:
        """No entry of the L2 tables has the COPIED flag any more; at least two things refer to each cluster."""
        if not self.flagged:
            return
        for batch in self.batches():
            words = self._entries(batch)
            self._rewrite(batch, words & _PLAIN)

    def correct_flags(self) -> None:
        """The entries of the L2 tables have the COPIED flag exactly where the count is 1."""
        for batch in self.batches():
            words = self._entries(batch)
            plain = (words & _COMPRESSED == 0) & (words & _OFFSET != 0)
            clusters = (words[plain] & _OFFSET).view(np.int64) >> self.bits
            single = np.zeros(len(words), bool)
            single[plain] = self.single(clusters)
            self._rewrite(batch, with_flags(words, single))

    def single(self, clusters: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Whether the count of each of these clusters is 1."""
        if len(clusters) < 2 or bool((clusters[1:] > clusters[:-1]).all()):
            alone: NDArray[np.bool_] = get_many(self.refcounts, clusters) == 1
            return alone
        distinct, back = np.unique(clusters, return_inverse=True)
        one: NDArray[np.bool_] = (get_many(self.refcounts, distinct) == 1)[back]
        return one

    def single_tables(self, l1: Words) -> NDArray[np.bool_]:
        """Whether the count of the L2 table each L1 entry names is 1; of no meaning where it names none."""
        return self.single((l1 & _OFFSET).view(np.int64) >> self.bits)

    def _rewrite(self, batch: Batch, new: Words) -> None:
        """Write the pages in which an entry changes."""
        changed = np.flatnonzero(new != self._entries(batch))
        if not len(changed):
            return
        words = batch.words.copy()
        stride = 2 if self.node.header.extended_l2 else 1
        words[::stride] = new
        data = memoryview(words.astype(">u8").tobytes())
        pages = np.unique(changed * (8 * stride) // _PAGE).tolist()
        for start, end in page_runs(pages, len(data)):
            self.node.file.write_from(batch.host + start, data[start:end])
