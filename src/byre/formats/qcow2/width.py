"""Another width of reference counts (amend ``refcount_bits``): new table and blocks, one header write, old ones freed.

The new structures are complete, and count themselves and the old ones, before the header names them; width and place
change in one sector. Until then a cancellation gives back what was allocated; a crash leaks clusters at worst.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ...errors import InvalidArgument, NoSpace
from ...io.tables import encode_words
from . import layout
from .entries import REFCOUNT_OFFSET_MASK
from .entries_bulk import pack_refcounts, unpack_refcounts
from .exclusive import exclusive

if TYPE_CHECKING:
    from array import array
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from ...jobs.job import Control
    from .image import Qcow2Node
    from .refcounts import Refcounts

    Counts = NDArray[Any]

__all__ = ["change_width", "check_width", "steps_of"]

_FIELDS_AT = 48
_FIELDS_END = 100


def steps_of(node: Qcow2Node) -> int:
    """What :func:`change_width` will advance a job by."""
    assert node.refcounts is not None
    return sum(1 for entry in node.refcounts.table if entry)


def check_width(node: Qcow2Node, order: int) -> None:
    """:raises InvalidArgument: a count is too large for ``2**order`` bits"""
    with node.lock:
        node._guarded(node.settle)
        assert node.refcounts is not None
        _check(node.refcounts, order)


def change_width(node: Qcow2Node, order: int, control: Control) -> None:
    """Let reference counts have ``2**order`` bits.

    :raises InvalidArgument: a count does not fit; nothing has changed
    :raises NoSpace: the new table would be too large
    """
    with exclusive(node):
        assert node.refcounts is not None
        _check(node.refcounts, order)
        change = _Change(node, node.refcounts, order)
        try:
            change.place()
            change.write(control)
        except BaseException:
            if node.failure is None:
                node.refcounts.release(change.host, change.count)
            raise
        node._guarded(change.switch)


def _check(refcounts: Refcounts, order: int) -> None:
    if order >= refcounts.order:
        return
    limit = (1 << (1 << order)) - 1
    for index, counts in _old_blocks(refcounts):
        if int(counts.max()) > limit:
            cluster = (index << refcounts.block_bits) + int(np.argmax(counts > limit))
            raise InvalidArgument(
                f"cannot decrease refcount_bits to {1 << order}: the refcount of host cluster {cluster} is "
                f"{int(counts.max())}, allowed are {limit}", where=refcounts.where)  # fmt: skip


def _old_blocks(refcounts: Refcounts) -> Iterator[tuple[int, NDArray[np.unsignedinteger]]]:
    """(index, counts) of every block there is, as it is in memory."""
    for index, entry in enumerate(refcounts.table):
        if entry & REFCOUNT_OFFSET_MASK:
            block = refcounts._block(index)
            if block is not None and block.data is not None:
                yield index, unpack_refcounts(bytes(block.data), refcounts.order)


class _Change:
    """New structures for one image. The node's lock is held, and nothing else happens in it.

    :ivar host: where they are: the table, then the blocks
    :ivar count: clusters
    :ivar blocks: which blocks there will be, ascending
    """

    def __init__(self, node: Qcow2Node, refcounts: Refcounts, order: int) -> None:
        self.node = node
        self.old = refcounts
        self.order = order
        self.block_bits = refcounts.cluster_bits + 3 - order
        self.host = self.count = self.table_clusters = 0
        self.blocks: list[int] = []

    def place(self) -> None:
        """Allocate until the structures also count themselves, and the old ones as they are by then.

        :raises NoSpace: the table would exceed the limit
        """
        self._plan()
        while True:
            count = self.table_clusters + len(self.blocks)
            self.host, self.count = self.old.allocate(count), count
            self._plan()
            if self.table_clusters + len(self.blocks) <= count:
                return
            self.old.release(self.host, count)
            self.count = 0

    def _plan(self) -> None:
        """Blocks and table for what is counted now."""
        used = {
            (index << self.old.block_bits) + int(at) >> self.block_bits
            for index, counts in _old_blocks(self.old)
            for at in self._firsts(counts)
        }
        self.blocks = sorted(used)
        entries = self.blocks[-1] + 1
        self.table_clusters = max(-(-entries * 8 >> self.old.cluster_bits), 1)
        if self.table_clusters << self.old.cluster_bits > layout.MAX_REFCOUNT_TABLE_SIZE:
            raise NoSpace(f"refcount_bits={1 << self.order} needs a refcount table of more than "
                          f"{layout.MAX_REFCOUNT_TABLE_SIZE} bytes", where=self.old.where)  # fmt: skip

    def _firsts(self, counts: Counts) -> NDArray[np.intp]:
        """A counted cluster in each range of the new block size."""
        step = min(len(counts), 1 << self.block_bits)
        rows = np.asarray(counts).reshape(-1, step).any(axis=1)
        found: NDArray[np.intp] = np.flatnonzero(rows) * step
        return found

    def write(self, control: Control) -> None:
        """Blocks and table, durable."""
        file, size = self.node.file, self.node.cluster_size
        table: array[int] = _words(self.table_clusters * size // 8)
        place = self.host + self.table_clusters * size
        for number, index in enumerate(self.blocks):
            table[index] = place + number * size
            file.write_from(table[index], memoryview(pack_refcounts(self._counts(index), self.order)))
            # One step for each old block that is dealt with.
            low, high = index << self.block_bits, (index + 1) << self.block_bits
            control.advance(sum(
                1 for old in range(-(-low >> self.old.block_bits), -(-high >> self.old.block_bits))
                if old < len(self.old.table) and self.old.table[old]
            ))  # fmt: skip
        file.write_from(self.host, memoryview(encode_words(table)))
        # Until the switch the old counts are what counts.
        self.old.write_back()
        file.flush()

    def _counts(self, index: int) -> Counts:
        """The counts of new block ``index``."""
        counts = np.zeros(1 << self.block_bits, f"=u{max(1, 1 << self.order >> 3)}")
        position, end = index << self.block_bits, (index + 1) << self.block_bits
        start = position
        while position < end:
            block = self.old._block(position >> self.old.block_bits)
            low = position & (self.old.block_entries - 1)
            step = min(self.old.block_entries - low, end - position)
            if block is not None and block.data is not None:
                old = unpack_refcounts(bytes(block.data), self.old.order)
                counts[position - start : position - start + step] = old[low : low + step]
            position += step
        return counts

    def switch(self) -> None:
        """Header bytes 48 to 59 and 96 to 99, in one sector; then the old structures are let go."""
        node, old = self.node, self.old
        header = node.header._replace(
            refcount_table_offset=self.host, refcount_table_clusters=self.table_clusters, refcount_order=self.order
        )
        node.file.write_from(_FIELDS_AT, memoryview(layout.encode_header(header)[_FIELDS_AT:_FIELDS_END]))
        node.file.flush()
        node.header = header
        gone = [(entry & REFCOUNT_OFFSET_MASK) >> old.cluster_bits for entry in old.table if entry]
        node.load_refcounts()
        refcounts = node.refcounts
        assert refcounts is not None
        runs = [(cluster, 1) for cluster in gone]
        runs.append((old.table_offset >> old.cluster_bits, old.table_clusters))
        # The allocation may have been for more blocks than there are.
        used = self.table_clusters + len(self.blocks)
        if used < self.count:
            runs.append(((self.host >> old.cluster_bits) + used, self.count - used))
        for host, length in refcounts.lower(runs):
            if node._punches("other"):
                node.file.discard(host, length)
        refcounts.write_back()
        node.file.flush()


def _words(count: int) -> array[int]:
    from array import array

    return array("Q", bytes(count * 8))
