"""qcow2 unmapping of many standard entries at once (numpy). The same rules as :mod:`.unmapping`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ...io.extent import ZERO as KIND_ZERO
from .entries import COMPRESSED, COPIED, OFFSET_MASK, ZERO

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ...io.tables import Table
    from .mapping import Mapping

    Words = NDArray[np.uint64]

__all__ = ["unmap_many"]

_COMPRESSED, _COPIED, _OFFSET, _ZERO = (np.uint64(mask) for mask in (COMPRESSED, COPIED, OFFSET_MASK, ZERO))


def unmap_many(mapping: Mapping, table: Table, first: int, count: int, kind: int, keep: bool, full: bool) -> None:
    """Entries ``[first, first + count)`` of ``table``, none of which is to hold its space.

    :raises Corrupt: one refers to no cluster; nothing has changed then
    """
    assert table.words is not None
    words = np.frombuffer(table.words, np.uint64)[first : first + count]
    old = words.copy()
    new = _unmapped(mapping, old, kind, keep, full)
    changed = np.flatnonzero(new != old)
    if not len(changed):
        return
    dropped = old[changed][new[changed] & _OFFSET == 0]
    runs = _runs(mapping, dropped)
    words[:] = new
    mapping.l2.mark(table, (first + int(changed[0])) * 8, (first + int(changed[-1])) * 8 + 7)
    for start, length in runs:
        mapping.free_run(start, length)
    for word in dropped[dropped & _COMPRESSED != 0].tolist():
        mapping.drop(word)


def _unmapped(mapping: Mapping, old: Words, kind: int, keep: bool, full: bool) -> Words:
    """What the entries become."""
    compressed, placed = old & _COMPRESSED != 0, old & _OFFSET != 0
    if kind == KIND_ZERO:
        kept = ~compressed & ((old & _COPIED != 0) | ~placed) if keep else np.zeros(len(old), bool)
        return np.where(kept, old | _ZERO, _ZERO)
    if full:
        return np.zeros_like(old)
    if mapping.version < 3 and mapping.has_backing:
        return old
    goes = compressed | placed
    if mapping.data_file:
        goes |= old & _COPIED != 0
    if mapping.has_backing:
        goes |= old & _ZERO == 0
    return np.where(goes, _ZERO if mapping.version >= 3 else np.uint64(0), old)


def _runs(mapping: Mapping, dropped: Words) -> list[tuple[int, int]]:
    """(first host cluster, count) of the plain clusters among them that lie one behind the other."""
    plain = dropped[dropped & _COMPRESSED == 0] & _OFFSET
    bad = np.flatnonzero(plain & np.uint64(mapping.cluster_size - 1))
    if len(bad):
        mapping.drop(int(plain[bad[0]]))  # raises
    if mapping.data_file:
        if len(plain) < len(dropped):
            mapping.drop(int(dropped[dropped & _COMPRESSED != 0][0]))  # raises
        return []
    clusters = (plain[plain != 0] >> np.uint64(mapping.cluster_bits)).astype(np.int64)
    if not len(clusters):
        return []
    starts = np.flatnonzero(np.append(True, np.diff(clusters) != 1))
    lengths = np.diff(np.append(starts, len(clusters)))
    return list(zip(clusters[starts].tolist(), lengths.tolist(), strict=True))
