"""The order in which a qcow2 image's tables reach the disk (RELIABILITY 2.3), and lazy reference counts.

With lazy reference counts a flush leaves the counts in memory: the dirty bit says so on disk, durable before the first
table that relies on them, and goes once they are written (closing, reopening, checking). A crash in between costs a
rebuild of the counts when the image is next opened for writing, and nothing else. Everything here but
``write_back_apart`` is called with the node's lock held.
"""

from __future__ import annotations

from bisect import bisect_right

from ...errors import ByreError
from ...typing import TYPE_CHECKING
from ...units import SECTOR, align_up
from . import layout

if TYPE_CHECKING:
    from .image import Qcow2Node

__all__ = ["mark_clean", "punch_kept", "set_features", "settle", "write_back", "write_back_apart"]

_FEATURES_AT = 72


def write_back(node: Qcow2Node, *, counts: bool = False) -> None:
    """Refcounts | L2 tables | L1 table | lowered refcounts, with a flush at each ``|`` that something precedes.

    :param counts: also write reference counts that may wait
    """
    refcounts, mapping = node.refcounts, node.mapping
    if refcounts is None:
        return
    frees, refcounts.ready = refcounts.ready, []
    _write_counts(node, wait=node.lazy_refcounts and not counts)
    # A flush with nothing to flush costs nothing; what an earlier round wrote may still be on its way.
    if mapping.dirty:
        _flush_data(node)
        if mapping.l2.write_dirty() and mapping.l1_dirty:
            node.file.flush()
        if mapping.l1_dirty:
            mapping.write_l1()
    if frees:
        node.file.flush()
        _lower(node, frees)
        _write_counts(node, wait=node.lazy_refcounts and not counts)
    mapping.l2.clean()
    refcounts.blocks.clean()


def write_back_apart(node: Qcow2Node) -> bool:
    """Refcounts | L2 tables, with the node's lock let go during the flush: who looks something up waits for no disk.

    Called without the lock. What goes to the tables on disk was copied before the flush, so that it names nothing that
    the flush does not cover; what was published meanwhile stays to be written.

    :returns: False if there is more to write than that, which :func:`write_back` can
    """
    if node.report is not None or not node.mapping.l2.dirty:
        return False
    with node.writing_back:
        with node.lock:
            node.check_failure()
            mapping, refcounts = node.mapping, node.refcounts
            if refcounts is None or refcounts.ready or mapping.l1_dirty:
                return False
            node._guarded(lambda: _write_counts(node, wait=node.lazy_refcounts))
            l2 = mapping.l2
            rounds, copies = l2.rounds, l2.copies()
        if not copies:
            return True
        try:
            _flush_data(node)
        except BaseException as error:
            with node.lock:
                node.fail_stop(error)
            raise
        with node.lock:
            node.check_failure()
            # Whoever wrote all tables meanwhile wrote these as well, and clusters may have been reused since.
            if node.mapping is mapping and l2.rounds == rounds:
                node._guarded(lambda: l2.write_copies(copies))
            l2.clean()
            refcounts.blocks.clean()
    return True


def settle(node: Qcow2Node) -> None:
    """Everything there is to write, counts included; then the image is as clean as it was when it was opened.

    Durable on return, if the dirty bit had been set.
    """
    write_back(node, counts=True)
    _complete_last_cluster(node)
    if node.marked_dirty:
        mark_clean(node)


def _complete_last_cluster(node: Qcow2Node) -> None:
    """The file ends where its last cluster does, as readers expect that look at its length; a hole does it.

    Behind compressed clusters it ends with a sector, the unit of their lengths. An image that was not written to
    stays as it is. Nothing depends on it, so that a refusal is none.
    """
    refcounts = node.refcounts
    if refcounts is None or not refcounts.allocated:
        return
    size = node.file.size
    end = align_up(size, SECTOR if align_up(refcounts._packed_at, SECTOR) == align_up(size, SECTOR)
                   else node.cluster_size)  # fmt: skip
    if end != size:
        try:
            node.file.resize(end, exact=False)
        except ByreError:
            pass


def punch_kept(node: Qcow2Node) -> None:
    """Discarded clusters that keep their place in the file ("discard-no-unref") give up what they hold.

    At once, behind a flush of the table that makes them zero clusters: later they might hold data again.
    """
    kept, node.mapping.kept = node.mapping.kept, []
    if not node._punches("request"):
        return
    write_back(node)
    node.file.flush()
    for host in kept:
        node.file.discard(host, node.cluster_size)


def mark_clean(node: Qcow2Node) -> None:
    """The dirty bit goes, once everything else is on disk."""
    _flush_data(node)
    set_features(node, node.header.incompatible_features & ~layout.INCOMPATIBLE_DIRTY)
    node.file.flush()
    node.marked_dirty = False


def set_features(node: Qcow2Node, incompatible: int) -> None:
    """Header bytes 72 to 79 (version 3), not flushed."""
    node.header = node.header._replace(incompatible_features=incompatible)
    node.file.write_from(_FEATURES_AT, memoryview(incompatible.to_bytes(8, "big")))


def _write_counts(node: Qcow2Node, *, wait: bool) -> None:
    """Write the counts, or say on disk that they are not to be believed; the flush that follows is the caller's."""
    refcounts = node.refcounts
    assert refcounts is not None
    if not wait:
        refcounts.write_back()
    elif refcounts.dirty and not node.dirty:
        node.marked_dirty = True
        set_features(node, node.header.incompatible_features | layout.INCOMPATIBLE_DIRTY)


def _flush_data(node: Qcow2Node) -> None:
    """Everything L2 tables are about to name is on disk: refcounts, and data in new clusters."""
    if node.data_file is not None:
        node.data_file.flush()
    node.file.flush()


def _lower(node: Qcow2Node, frees: list[tuple[int, int, str]]) -> None:
    refcounts = node.refcounts
    assert refcounts is not None
    holes: list[tuple[int, int]] = []
    for reason in ("request", "other"):
        freed = refcounts.lower([(first, count) for first, count, why in frees if why == reason])
        _forget(node, freed)
        if node._punches(reason):
            holes += freed
    # A hole may be there before the count is lowered on disk, but never before the mapping is gone.
    for host, length in holes:
        node.file.discard(host, length)


def _forget(node: Qcow2Node, freed: list[tuple[int, int]]) -> None:
    """No cached table lies in clusters that are free."""
    assert node.refcounts is not None
    runs = sorted(freed)
    starts = [start for start, _ in runs]
    for cache in (node.mapping.l2, node.refcounts.blocks):
        for host in [*cache.tables, *cache.parts]:
            index = bisect_right(starts, host) - 1
            if index >= 0 and host < sum(runs[index]):
                cache.forget(host & -cache.length)
