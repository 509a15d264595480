"""Overlap checks: nothing is written over metadata because a damaged table says that something else lies there.

Asked before a cluster is given away, before guest data is written in place, before a table is changed or written, and
before a cluster is let go. Which structures are looked at is the ``overlap-check`` option, with the peers' classes and
levels; the header's cluster is looked at always. What is found marks the image corrupt and takes it out of service,
which is for the caller.

A question costs two or three binary searches, whatever the size of the image: clusters of L2 tables and refcount
blocks are kept sorted, made at the first question and then kept up.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, insort

from ...errors import Corrupt
from ...typing import TYPE_CHECKING, Final
from . import layout
from .entries import OFFSET_MASK, REFCOUNT_OFFSET_MASK

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from ...options import OptionValues
    from .directories import Snapshot
    from .image import Qcow2Node

__all__ = ["CLASSES", "TEMPLATES", "Guard", "chosen_classes"]

HEADER: Final = "main-header"
ACTIVE_L1: Final = "active-l1"
ACTIVE_L2: Final = "active-l2"
REFCOUNT_TABLE: Final = "refcount-table"
REFCOUNT_BLOCK: Final = "refcount-block"
SNAPSHOT_TABLE: Final = "snapshot-table"
INACTIVE_L1: Final = "inactive-l1"
INACTIVE_L2: Final = "inactive-l2"
BITMAP_DIRECTORY: Final = "bitmap-directory"

CLASSES: Final = {
    HEADER: "qcow2_header",
    ACTIVE_L1: "active L1 table",
    ACTIVE_L2: "active L2 table",
    REFCOUNT_TABLE: "refcount table",
    REFCOUNT_BLOCK: "refcount block",
    SNAPSHOT_TABLE: "snapshot table",
    INACTIVE_L1: "inactive L1 table",
    INACTIVE_L2: "inactive L2 table",
    BITMAP_DIRECTORY: "bitmap directory",
}
"""Name of the option to what messages call it; scripts look for these words."""

_CONSTANT: Final = frozenset((HEADER, ACTIVE_L1, REFCOUNT_TABLE, SNAPSHOT_TABLE, BITMAP_DIRECTORY))
_CACHED: Final = _CONSTANT | {ACTIVE_L2, REFCOUNT_BLOCK, INACTIVE_L1}
TEMPLATES: Final = {
    "none": frozenset[str](),
    "constant": _CONSTANT,
    "cached": _CACHED,
    "all": frozenset(CLASSES),
}
"""Levels: what can be known at once; what is in memory; everything, which reads the L1 tables of snapshots."""

_BULK: Final = 1 << 16
"""From this many table entries on, numpy is worth its import."""


def chosen_classes(options: OptionValues) -> frozenset[str]:
    """The classes that the options ask for: a level, and single ones on top of it."""
    level = options.text("overlap-check") or options.text("overlap-check.template") or "cached"
    found = []
    for name in CLASSES:
        option = f"overlap-check.{name}"
        if options.flag(option) if option in options else name in TEMPLATES[level]:
            found.append(name)
    return frozenset(found)


class _Ranges:
    """Runs of clusters, some of which may overlap, to be searched."""

    def __init__(self, rows: Iterable[tuple[int, int, str]]) -> None:
        self._rows = sorted(rows)
        self._starts = [start for start, _, _ in self._rows]
        self._reach: list[int] = []
        furthest = 0
        for _, end, _ in self._rows:
            furthest = max(furthest, end)
            self._reach.append(furthest)

    def find(self, first: int, end: int, ignore: str) -> str:
        """The class of one that has clusters in ``[first, end)``; "" for none."""
        index = bisect_left(self._starts, end)
        while index and self._reach[index - 1] > first:
            index -= 1
            _, last, name = self._rows[index]
            if last > first and name != ignore:
                return name
        return ""


class Guard:
    """What known metadata of one image lies where. Guarded by the node's lock.

    :ivar classes: what is looked for
    """

    def __init__(self, node: Qcow2Node, classes: frozenset[str]) -> None:
        self.node = node
        self.bits = node.header.cluster_bits
        self.classes = classes
        self._ranges = _Ranges(())
        self._ranges_of: tuple[object, object, object] = (None, None, None)
        self._l2: array[int] = array("Q")
        self._l2_of: object = None
        self._blocks: array[int] = array("Q")
        self._blocks_of: object = None
        self._inactive: array[int] = array("Q")
        self._inactive_of: object = None

    # -- the question -----------------------------------------------------------------------------

    def at(self, first: int, count: int, ignore: str = "") -> str:
        """What known metadata lies in ``count`` clusters from ``first``, "" if none.

        :param ignore: the class of what is about to be written there
        """
        found = self._class_at(first, first + count, ignore)
        return CLASSES[found] if found else ""

    def check(self, first: int, count: int, what: str, ignore: str = "") -> None:
        """:raises Corrupt: writing ``what`` there would overwrite metadata"""
        found = self._class_at(first, first + count, ignore)
        if found:
            raise Corrupt(f"Preventing invalid write on metadata (overlaps with {CLASSES[found]})",
                          where=self.node.filename,
                          hint=f'{what} would lie at {first << self.bits:#x}; run "byre check -r all"')  # fmt: skip

    def check_l2(self, host: int) -> None:
        """:raises Corrupt: other metadata lies where an L2 table of the active layer is said to be"""
        self.check(host >> self.bits, 1, "an L2 table", ACTIVE_L2)

    def check_block(self, host: int) -> None:
        """:raises Corrupt: other metadata lies where a refcount block is said to be"""
        self.check(host >> self.bits, 1, "a refcount block", REFCOUNT_BLOCK)

    def check_table(self, offset: int, length: int, name: str) -> None:
        """:raises Corrupt: other metadata lies where the table of class ``name`` is said to be"""
        first = offset >> self.bits
        self.check(first, ((offset + length - 1) >> self.bits) + 1 - first, CLASSES[name], name)

    def _class_at(self, first: int, end: int, ignore: str) -> str:
        if first <= 0:
            return HEADER
        classes = self.classes
        if not classes:
            return ""
        header, extensions, snapshots = self._ranges_of
        node = self.node
        if header is not node.header or extensions is not node.extensions or snapshots is not node._snapshots:
            self._note_ranges()
        found = self._ranges.find(first, end, ignore)
        if found:
            return found
        if ACTIVE_L2 in classes and ignore != ACTIVE_L2 and _holds(self._active_tables(), first, end):
            return ACTIVE_L2
        if REFCOUNT_BLOCK in classes and ignore != REFCOUNT_BLOCK and _holds(self._refcount_blocks(), first, end):
            return REFCOUNT_BLOCK
        if INACTIVE_L2 in classes and _holds(self._inactive_tables(), first, end):
            return INACTIVE_L2
        return ""

    # -- what lies in one piece -------------------------------------------------------------------

    def _note_ranges(self) -> None:
        node, header = self.node, self.node.header
        bits, rows = self.bits, []

        def add(name: str, offset: int, length: int) -> None:
            if offset and length and name in self.classes:
                rows.append((offset >> bits, ((offset + length - 1) >> bits) + 1, name))

        add(ACTIVE_L1, header.l1_table_offset, header.l1_size * 8)
        add(REFCOUNT_TABLE, header.refcount_table_offset, header.refcount_table_clusters << bits)
        snapshots: Sequence[Snapshot] = node.snapshots if header.nb_snapshots else ()
        if snapshots:
            add(SNAPSHOT_TABLE, header.snapshots_offset, len(layout.encode_snapshot_table(snapshots)))
        for shot in snapshots:
            add(INACTIVE_L1, shot.l1_table_offset, shot.l1_size * 8)
        bitmaps = layout.find_extension(node.extensions, layout.EXTENSION_BITMAPS)
        if bitmaps is not None and header.autoclear_features & layout.AUTOCLEAR_BITMAPS:
            record = layout.decode_bitmaps_extension(bitmaps, bits)
            add(BITMAP_DIRECTORY, record.directory_offset, record.directory_size)
        self._ranges = _Ranges(rows)
        self._ranges_of = header, node.extensions, node._snapshots

    # -- single clusters --------------------------------------------------------------------------

    def _active_tables(self) -> array[int]:
        l1 = self.node.mapping.l1
        if self._l2_of is not l1:
            self._l2, self._l2_of = self._sorted(l1, OFFSET_MASK), l1
        return self._l2

    def _refcount_blocks(self) -> array[int]:
        refcounts = self.node.refcounts
        assert refcounts is not None
        if self._blocks_of is not refcounts.table:
            self._blocks, self._blocks_of = self._sorted(refcounts.table, REFCOUNT_OFFSET_MASK), refcounts.table
        return self._blocks

    def _inactive_tables(self) -> array[int]:
        node = self.node
        if not node.header.nb_snapshots:
            return array("Q")
        if self._inactive_of is not node.snapshots:
            import numpy as np

            from .snapshot_refs import read_l1

            hosts = [np.zeros(0, np.uint64)]
            for shot in node.snapshots:
                entries = read_l1(node, shot.l1_table_offset, shot.l1_size) & np.uint64(OFFSET_MASK)
                hosts.append(np.unique(entries >> np.uint64(self.bits)))
            found = np.unique(np.concatenate(hosts))
            self._inactive = array("Q", found[found != 0].tobytes())
            self._inactive_of = node.snapshots
        return self._inactive

    def _sorted(self, table: array[int], mask: int) -> array[int]:
        """The clusters that a table's entries point to, ascending."""
        if len(table) < _BULK:
            return array("Q", sorted({(entry & mask) >> self.bits for entry in table if entry & mask}))
        import numpy as np

        hosts = np.unique((np.frombuffer(table, np.uint64) & np.uint64(mask)) >> np.uint64(self.bits))
        return array("Q", hosts[hosts != 0].tobytes())

    # -- keeping up -------------------------------------------------------------------------------

    def l2_moved(self, old: int, new: int) -> None:
        """An L1 entry points from now on to the L2 table at ``new`` instead of ``old``; 0 for none."""
        if self._l2_of is self.node.mapping.l1:
            _replace(self._l2, old >> self.bits, new >> self.bits)

    def block_made(self, host: int) -> None:
        """The refcount table has another block."""
        if self.node.refcounts is not None and self._blocks_of is self.node.refcounts.table:
            _replace(self._blocks, 0, host >> self.bits)


def _holds(clusters: array[int], first: int, end: int) -> bool:
    """Whether one of ``clusters`` (ascending) lies in ``[first, end)``."""
    index = bisect_left(clusters, first)
    return index < len(clusters) and clusters[index] < end


def _replace(clusters: array[int], old: int, new: int) -> None:
    index = bisect_left(clusters, old)
    if old and index < len(clusters) and clusters[index] == old:
        del clusters[index]
    if new:
        insort(clusters, new)
