"""Whether clusters that count as data may lie in holes of the file, as after preallocation of metadata."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ...units import align_up
from . import entries_bulk

if TYPE_CHECKING:
    from .image import Qcow2Node

__all__ = ["has_holes"]

_OFFSET_MASK = 0xFFFFFFFFFFFFFE00


def has_holes(node: Qcow2Node) -> bool:
    """Whether clearly more clusters are allocated (specification, "Host cluster management") than the file occupies.

    The peer's rule: by a ninth, and by two clusters at least. Reads each refcount block once, and stops early.
    """
    header, file = node.header, node.file
    occupied = file.allocated_size() >> header.cluster_bits
    threshold = max(occupied * 10 // 9, occupied + 2)
    clusters = align_up(file.size, header.cluster_size) >> header.cluster_bits
    if occupied < 0 or clusters < threshold:
        return False
    per_block = header.cluster_size * 8 >> header.refcount_order
    length = min(header.refcount_table_clusters << header.cluster_bits, -(-clusters // per_block) * 8)
    table = bytearray(length)
    file.read_into(header.refcount_table_offset, memoryview(table))
    blocks, repeats = np.unique(np.frombuffer(table, ">u8") & np.uint64(_OFFSET_MASK), return_counts=True)
    found = 0
    data = bytearray(header.cluster_size)
    for offset, times in zip(blocks.tolist(), repeats.tolist(), strict=True):
        if offset:
            file.read_into(offset, memoryview(data))
            found += times * int(np.count_nonzero(entries_bulk.unpack_refcounts(data, header.refcount_order)))
            if found >= threshold:
                return True
    return False
