"""Resizing a qcow2 image, in the order RELIABILITY 2.3 gives: cut-off bytes never come back."""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING

from ...errors import InvalidArgument, NotSupported, ReadOnly
from ...io import engine
from ...io.extent import COMPRESSED, DATA, MAY_UNMAP
from ...io.tables import encode_words
from ...units import align_up
from . import layout
from .entries import COPIED
from .refcounts_trim import drop_empty_blocks, used_clusters

if TYPE_CHECKING:
    from .image import Qcow2Node

__all__ = ["grow_l1", "make_empty", "resize"]


def resize(node: Qcow2Node, size: int, preallocation: str) -> None:
    """Change the virtual size to ``size`` bytes.

    :raises InvalidArgument: a size no header can hold
    :raises NotSupported: an image whose snapshots record no size of their own (version 2)
    """
    if not 0 <= size <= layout.MAX_VIRTUAL_SIZE or size % 512:
        raise InvalidArgument(f"the new size is {size}, allowed are multiples of 512 up to {layout.MAX_VIRTUAL_SIZE}",
                              where=node.filename)  # fmt: skip
    if preallocation not in ("off", "metadata", "falloc", "full"):
        raise InvalidArgument(f"unknown preallocation mode {preallocation!r}", where=node.filename)
    header = node.header
    if header.nb_snapshots and header.version < 3:
        raise NotSupported("an image with internal snapshots cannot be resized in version 2", where=node.filename,
                           hint="amend it to compat=1.1")  # fmt: skip
    if size != header.size and any(shot.disk_size is None for shot in node.snapshots):
        raise NotSupported("an image with a snapshot that does not record its size cannot be resized",
                           where=node.filename)  # fmt: skip
    entries = layout.l1_entries_needed(size, header.cluster_bits, extended_l2=header.extended_l2)
    if entries * 8 > layout.MAX_L1_SIZE:
        raise InvalidArgument(f"the new size of {size} bytes needs an L1 table of {entries * 8} bytes, allowed are "
                              f"{layout.MAX_L1_SIZE}", where=node.filename, hint="use larger clusters")  # fmt: skip
    before = header.size
    if size < before and preallocation != "off":
        raise InvalidArgument("preallocation makes no sense when shrinking", where=node.filename)
    if size != before:
        node.resize_bitmaps(size, prepare=True)
        with node.lock:
            node.check_failure()
            node._before_change()
    if size < before:
        _shrink(node, before, size)
        node.resize_bitmaps(size)
    elif size > before:
        # Writes to the new space may come as soon as it is there.
        node.resize_bitmaps(size)
        try:
            _grow(node, before, size, entries)
        except BaseException:
            node.resize_bitmaps(node.size)
            raise
        if preallocation != "off":
            from .preallocate import preallocate

            preallocate(node, before, size, preallocation)


def _set_size(node: Qcow2Node, size: int) -> None:
    """Header bytes 24 to 31, durable; lock held."""
    node.file.write_from(24, memoryview(size.to_bytes(8, "big")))
    node.file.flush()
    node.header = node.header._replace(size=size)
    node._size = size


def _grow(node: Qcow2Node, before: int, size: int, entries: int) -> None:
    with node.lock:
        node.check_failure()
        node.inflight.wait_all()
        _drop_machine_state(node)
        if entries > len(node.mapping.l1):
            node._guarded(lambda: grow_l1(node, entries))
        _drop_beyond(node, align_up(before, node.cluster_size), align_up(size, node.cluster_size))
        # The engine clips at the size; what lies behind the old end must be settled before the header names it.
        node._size = size
    try:
        cluster_end = min(align_up(before, node.cluster_size), size)
        if cluster_end > before and not engine.reads_zero(node, before, cluster_end - before):
            engine.write_zeroes(node, before, cluster_end - before)
        _hide_backing(node, cluster_end, size)
        _grow_data_file(node, before, size)
        with node.lock:
            node._guarded(node.write_back)
            node._guarded(node.file.flush)
            node._guarded(lambda: _set_size(node, size))
    except BaseException:
        with node.lock:
            if node.header.size == before:
                node._size = before
        raise


def _drop_beyond(node: Qcow2Node, start: int, end: int) -> None:
    """A crash while the image shrank may have left in the tables what was cut off; lock held."""
    if start >= end or not _any_entry(node, start, end):
        return
    for extent in node.mapping.lookup_all(start, end - start):
        at = extent.offset
        while extent.kind in (DATA, COMPRESSED) and at < extent.end:
            at += node.unallocate(at, extent.end - at)


def _any_entry(node: Qcow2Node, start: int, end: int) -> bool:
    """Whether any L2 entry for ``[start, end)`` is not 0, which is rare."""
    mapping = node.mapping
    span, width = 1 << mapping.span_bits, 2 if mapping.extended else 1
    index, stop = start >> mapping.span_bits, (end - 1 >> mapping.span_bits) + 1
    while (index := mapping.empty_run(index, stop)) < stop:
        words = mapping.l2.get(mapping.l2_host(index)).words
        assert words is not None
        first = max(start - index * span, 0) >> mapping.cluster_bits
        last = min(end - index * span, span) - 1 >> mapping.cluster_bits
        if any(words[first * width : (last + 1) * width]):
            return True
        index += 1
    return False


def _grow_data_file(node: Qcow2Node, before: int, size: int) -> None:
    data_file = node.data_file
    if data_file is None:
        return
    if node.header.raw_data_file and before < min(size, data_file.size):
        # It is longer than the disk was; the new space reads as zeroes with and without the tables.
        data_file.write_zeroes(before, min(size, data_file.size) - before, MAY_UNMAP)
    if data_file.size < size:
        data_file.resize(size, exact=False)


def _drop_machine_state(node: Qcow2Node) -> None:
    """Machine state lies behind the end: it must not become part of the disk; lock held."""
    from . import vmstate

    node._guarded(lambda: vmstate.drop(node))


def _hide_backing(node: Qcow2Node, start: int, end: int) -> None:
    """A backing file longer than the old size must not show through in the new space."""
    if node.backing is None:
        return
    end = min(end, align_up(node.backing.node.size, node.cluster_size))
    if start < end:
        engine.write_zeroes(node, start, end - start, MAY_UNMAP)


def _no_report(_name: str) -> None:
    """Nobody asked for events."""


def grow_l1(node: Qcow2Node, entries: int) -> None:
    """Move to a larger L1 table: written, published in one sector, then the old one is let go; lock held."""
    refcounts, mapping, header = node.refcounts, node.mapping, node.header
    assert refcounts is not None
    count = max(entries, min(len(mapping.l1) * 3 // 2, layout.MAX_L1_SIZE // 8))
    clusters = -(-count * 8 // node.cluster_size)
    node.write_back()
    grown = mapping.l1[:]
    grown.extend(array("Q", bytes((count - len(grown)) * 8)))
    report = node.report or _no_report
    report("l1_grow_alloc_table")
    offset = refcounts.allocate(clusters)
    report("l1_grow_write_table")
    padded = encode_words(grown).ljust(clusters << header.cluster_bits, b"\0")
    node.file.write_from(offset, memoryview(padded))
    refcounts.write_back()
    node.file.flush()
    report("l1_grow_activate_table")
    # Header bytes 36 to 47: the number of entries and the offset.
    node.file.write_from(36, memoryview(count.to_bytes(4, "big") + offset.to_bytes(8, "big")))
    node.file.flush()
    old_offset, old_clusters = header.l1_table_offset, -(-header.l1_size * 8 // node.cluster_size)
    node.header = header._replace(l1_size=count, l1_table_offset=offset)
    mapping.l1, mapping.l1_offset = grown, offset
    if old_clusters and old_offset:
        refcounts.release(old_offset, old_clusters)


def _shrink(node: Qcow2Node, before: int, size: int) -> None:
    with node.lock:
        node.check_failure()
        node.inflight.wait_all()
        _drop_machine_state(node)
        node._guarded(node.write_back)
        node._guarded(lambda: _set_size(node, size))
        start, end = align_up(size, node.cluster_size), align_up(before, node.cluster_size)
        while start < end:
            done = node.unallocate(start, end - start)
            start += done
        node._guarded(node.write_back)
        node._guarded(node.file.flush)
        _drop_empty_tables(node, align_up(size, node.cluster_size))
    _zero_tail(node, size, min(before, align_up(size, node.cluster_size)))
    if node.file.size > 0:
        _trim(node)
    data_file = node.data_file
    if data_file is not None and data_file.size > size:
        data_file.resize(size, exact=False)
        if data_file.size > size and node.header.raw_data_file:
            # A device keeps its length, but what was cut off must not come back when the image grows again.
            data_file.write_zeroes(size, min(before, data_file.size) - size, MAY_UNMAP)


def _zero_tail(node: Qcow2Node, size: int, end: int) -> None:
    """What the last cluster holds behind the new size is overwritten: not every program that grows images does that."""
    if end <= size:
        return
    with node.lock:
        node._size = end  # the engine clips at the size
    try:
        if not engine.reads_zero(node, size, end - size):
            engine.write_zeroes(node, size, end - size)
        engine.flush(node)
    finally:
        with node.lock:
            node._size = size


def _drop_empty_tables(node: Qcow2Node, end: int) -> None:
    """L2 tables wholly behind the new end are empty now: let them go; durable on return, lock held."""
    mapping, refcounts = node.mapping, node.refcounts
    assert refcounts is not None
    report = node.report or _no_report
    report("l1_shrink_write_table")
    first = -(-end >> mapping.span_bits)
    for index in range(first, len(mapping.l1)):
        entry = mapping.l1[index]
        if entry & COPIED:
            host = entry & ~COPIED
            mapping.l2.forget(host)
            mapping._set_l1(index, 0)
            node._free(host >> node.header.cluster_bits, 1)
    freed, refcounts.ready = refcounts.ready, []
    _settle(node)
    report("l1_shrink_free_l2_clusters")
    refcounts.ready = freed + refcounts.ready
    _settle(node)


def _trim(node: Qcow2Node) -> None:
    """Cut unused clusters off the end of the file."""
    refcounts = node.refcounts
    assert refcounts is not None
    with node.lock:
        bits = node.header.cluster_bits
        node._guarded(lambda: drop_empty_blocks(refcounts))
        last = max(used_clusters(refcounts), 1)
        if last << bits < node.file.size:
            node.file.resize(last << bits)
        refcounts.virgin = min(refcounts.virgin, last) if node.file.has_zero_init else refcounts.virgin


# -- emptying -------------------------------------------------------------------------------------


def make_empty(node: Qcow2Node) -> None:
    """Nothing in the active layer is allocated any more: the backing file shows everywhere. Durable on return.

    What snapshots have stays. A crash in between leaves part of the layer, each cluster as it was or unallocated.

    :raises ReadOnly: the image is open read-only
    """
    if node.read_only:
        raise ReadOnly("cannot empty the image: it is open read-only", where=node.filename)
    end = align_up(node.size, node.cluster_size)
    start = 0
    if node.report is not None:
        node.report("empty_image_prepare")
    while start < end:
        with node.lock:
            node.check_failure()
            node.inflight.wait_clear(start, end)
            node.check_failure()
            start += node.unallocate(start, end - start)
    with node.lock:
        node.check_failure()
        node.inflight.wait_all()
        _drop_machine_state(node)
        _settle(node)
        _drop_empty_tables(node, 0)
    _trim(node)


def _settle(node: Qcow2Node) -> None:
    node._guarded(node.write_back)
    node._guarded(node.file.flush)
