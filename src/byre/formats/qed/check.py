"""Checking QED images: every entry points to a cluster of the file, and no two to the same.

There are no counts to compare with: a cluster that no table names is leaked. Those at the end of the file can be cut
off; those between others stay.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from ...errors import ImageError
from ...units import align_down
from ..abilities import CheckResult
from ..clusterset import ClusterSet

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ...jobs.job import Control
    from .image import QedNode

__all__ = ["check_qed"]

_MESSAGES: Final = 1000


def check_qed(node: QedNode, control: Control | None, fix: str) -> CheckResult:
    """What is wrong with the tables; with ``fix`` "all", entries that point nowhere are dropped.

    :param fix: "", "leaks" or "all"
    """
    with node.lock:
        node.check_failure()
        if not node.read_only:
            node.write_back()
        walk = _Walk(node, control, mend=fix == "all")
        try:
            walk.run()
        except ImageError as error:
            error.where = error.where or node.filename
            raise
        leaks = max(0, walk.end // node.cluster_size - node.header.header_size - walk.used.count)
        fixed = 0
        if fix and not walk.corruptions:
            node.guarded(lambda: _finish(node))
            fixed = _cut_off(node, walk)
        if leaks > fixed:
            walk.say(f"Leaked {leaks - fixed} clusters")
        size = node.cluster_size
        return CheckResult(
            corruptions=walk.corruptions, leaks=leaks - fixed, corruptions_fixed=walk.fixed, leaks_fixed=fixed,
            total_clusters=-(-node.header.size // size), allocated_clusters=walk.allocated,
            fragmented_clusters=walk.fragmented, messages=tuple(walk.messages),
        )  # fmt: skip


def _finish(node: QedNode) -> None:
    """What was mended is on disk; then the image needs no check any more."""
    node.write_back()
    node.settle()


def _cut_off(node: QedNode, walk: _Walk) -> int:
    """Shorten the file to what is used; how many whole clusters went."""
    end = (walk.used.highest + 1) * node.cluster_size
    if node.file.size <= end:
        return 0
    node.guarded(lambda: node.file.resize(end, exact=False))
    node.map.space.end = node.map.space.clean = max(end, node.map.space.base)
    return max(0, walk.end - end) // node.cluster_size


class _Walk:
    """One look at all tables.

    :ivar end: behind the last whole cluster of the file
    """

    def __init__(self, node: QedNode, control: Control | None, *, mend: bool) -> None:
        self.node = node
        self.control = control
        self.mend = mend
        self.used = ClusterSet()
        self.end = align_down(node.file.size, node.cluster_size)
        self.first = node.header.header_size * node.cluster_size
        self.corruptions = self.fixed = self.allocated = self.fragmented = 0
        self.messages: list[str] = []
        self._last = 0

    def say(self, text: str) -> None:
        if len(self.messages) < _MESSAGES:
            self.messages.append(text)

    def bad(self, what: str) -> None:
        """An entry that points nowhere; the caller drops it when mending."""
        if self.mend:
            self.fixed += 1
        else:
            self.corruptions += 1
        self.say(f"{'Repairing' if self.mend else 'ERROR'} {what}")

    def run(self) -> None:
        node, found = self.node, self.node.map
        self._claim(node.header.l1_offset, "the L1 table")
        tables = np.flatnonzero(np.frombuffer(found.l1, np.uint64)).tolist()
        if self.control is not None:
            self.control.total = len(tables)
        for index in tables:
            host = found.l1[index]
            if host % node.cluster_size or host < self.first or host + node.header.table_bytes > self.end:
                self.bad(f"L1 entry {index} points to {host:#x}, where no table can be")
                if self.mend:
                    found.set_l1(index, 0)
            elif self._claim(host, f"the L2 table of L1 entry {index}"):
                self._last = 0
                for at in range(0, node.header.table_bytes, found.l2.length):
                    self._slice(host + at, index, at // 8)
            if self.control is not None:
                self.control.advance(1)

    def _claim(self, host: int, what: str) -> bool:
        """Whether the clusters of a table belong to nobody else."""
        first = host // self.node.cluster_size
        again = self.used.add(np.arange(first, first + self.node.header.table_size, dtype=np.int64))
        if len(again):
            self.corruptions += len(again)
            self.say(f"ERROR {what} at {host:#x} shares clusters with something else")
        return not len(again)

    def _slice(self, host: int, l1_index: int, first: int) -> None:
        """Entries ``first`` and on of an L2 table."""
        node, size = self.node, self.node.cluster_size
        table = node.map.l2.get(host)
        assert table.words is not None
        words = np.frombuffer(table.words, np.uint64)
        where = np.flatnonzero(words > 1)
        entries = words[where]
        invalid = (entries % np.uint64(size) != 0) | (entries < self.first) | (entries >= self.end)
        for index, entry in zip(where[invalid].tolist(), entries[invalid].tolist(), strict=True):
            self.bad(f"L2 entry {first + index} of table {l1_index} points to {entry:#x}, where no cluster can be")
            if self.mend:
                table.words[index] = 0
                node.map.l2.mark(table, 8 * index, 8 * index + 7)
        self._count(entries.astype(np.int64), entries[~invalid].astype(np.int64), l1_index)

    def _count(self, every: NDArray[np.int64], good: NDArray[np.int64], l1_index: int) -> None:
        size = self.node.cluster_size
        self.allocated += len(every)
        if len(every):
            before = np.append(self._last, every[:-1])
            self.fragmented += int(np.count_nonzero((before != 0) & (before + size != every)))
            self._last = int(every[-1])
        again = self.used.add(good // size)
        self.corruptions += len(again)
        for cluster in again[:_MESSAGES].tolist():
            self.say(f"ERROR cluster at {cluster * size:#x} is used more than once, also in L2 table {l1_index}")
