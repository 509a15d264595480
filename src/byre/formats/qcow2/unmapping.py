"""qcow2 unmapping: whole clusters and subclusters that become ZERO or UNALLOCATED, and let go of their space."""

from __future__ import annotations

from ...io.extent import UNALLOCATED
from ...io.extent import ZERO as KIND_ZERO
from ...typing import TYPE_CHECKING, Final
from . import entries
from .entries import ALL_ZERO, COMPRESSED, COPIED, OFFSET_MASK, ZERO

if TYPE_CHECKING:
    from ...io.tables import Table
    from .mapping import Mapping

__all__ = ["unmap"]

_BULK: Final = 256
"""From this many entries on, numpy is quicker than a loop."""


def unmap(mapping: Mapping, offset: int, length: int, kind: int, keep: bool, *, full: bool = False) -> int:
    """Whole clusters (subclusters for ZERO with extended entries) become ZERO or UNALLOCATED.

    A discarded cluster reads as zeroes afterwards (version 3) rather than as the backing file, unless ``full``.

    :returns: bytes done, up to the end of the L2 table; 0 if version 2 cannot
    """
    l1_index = offset >> mapping.span_bits
    if kind == KIND_ZERO and mapping.version < 3:
        # Version 2 has no zero clusters; without a backing file, what is not allocated reads as zeroes.
        if mapping.has_backing or (keep and mapping.l1[l1_index] & OFFSET_MASK):
            return 0
        kind, full = UNALLOCATED, True
    end = min(offset + length, (l1_index + 1) << mapping.span_bits)
    if not mapping.l1[l1_index] & OFFSET_MASK and kind == UNALLOCATED and (full or not mapping.has_backing):
        stop = mapping.empty_run(l1_index, len(mapping.l1)) << mapping.span_bits
        return min(stop, offset + length) - offset
    table = mapping.table_for_write(l1_index)
    if mapping.extended:
        return _unmap_extended(mapping, table, offset, end, kind, keep, full) - offset
    _unmap_plain(mapping, table, offset, end, kind, keep, full)
    return end - offset


def _unmap_plain(mapping: Mapping, table: Table, offset: int, end: int, kind: int, keep: bool, full: bool) -> None:
    words = table.words
    assert words is not None
    bits = mapping.cluster_bits
    hold = _holds(mapping, keep, full)
    first = offset >> bits & mapping.l2_mask
    count = ((end - 1) >> bits) - (offset >> bits) + 1
    if count >= _BULK and not hold:
        from .unmapping_bulk import unmap_many

        unmap_many(mapping, table, first, count, kind, keep, full)
        return
    changed_low = changed_high = -1
    for index in range(first, first + count):
        old = words[index]
        new = old | ZERO if hold and mapping.owned(old) else _unmapped(mapping, old, kind, keep, full)
        if new == old:
            continue
        if hold and new & OFFSET_MASK:
            mapping.kept.append(new & OFFSET_MASK)
        words[index] = new
        changed_low = index if changed_low < 0 else changed_low
        changed_high = index
        if not new & OFFSET_MASK:
            mapping.drop(old)
    if changed_low >= 0:
        mapping.l2.mark(table, changed_low * 8, changed_high * 8 + 7)


def _holds(mapping: Mapping, keep: bool, full: bool) -> bool:
    """Whether clusters keep their place although they need not."""
    return mapping.keep_discarded and not keep and not full and not mapping.data_file


def _unmapped(mapping: Mapping, old: int, kind: int, keep: bool, full: bool) -> int:
    """What a standard entry becomes."""
    if kind == KIND_ZERO:
        if keep and not old & COMPRESSED and (old & COPIED or not old & OFFSET_MASK):
            return old | ZERO
        return ZERO
    if full:
        return 0
    if mapping.version < 3 and mapping.has_backing:
        return old  # version 2 has no zero clusters, and the backing file must not show through
    # The COPIED flag alone tells offset 0 of an external data file from "unallocated".
    held = old & (COMPRESSED | OFFSET_MASK) or (mapping.data_file and old & COPIED)
    if held or (mapping.has_backing and not old & ZERO):
        return ZERO if mapping.version >= 3 else 0
    return old


def _unmap_extended(mapping: Mapping, table: Table, offset: int, end: int, kind: int, keep: bool, full: bool) -> int:
    """The guest offset reached: part of a compressed cluster can only be zeroed by writing it as data."""
    words = table.words
    assert words is not None
    bits, size, sub_bits = mapping.cluster_bits, mapping.cluster_size, mapping.sub_bits
    while offset < end:
        guest = offset >> bits << bits
        stop = min(end, guest + size)
        index = (guest >> bits & mapping.l2_mask) * 2
        word, bitmap = words[index], words[index + 1]
        first, last = (offset - guest) >> sub_bits, ((stop - guest - 1) >> sub_bits) + 1
        if first == 0 and last == entries.SUBCLUSTERS:
            held = _holds(mapping, keep, full) and mapping.owned(word)
            new = (word, ALL_ZERO) if held else _unmapped_extended(mapping, word, bitmap, kind, keep, full)
            if held and bitmap != ALL_ZERO:
                mapping.kept.append(word & OFFSET_MASK)
        elif word & COMPRESSED:
            return offset
        else:
            mask = entries.zero_bits(first, last)
            new = (word, (bitmap | mask) & ~(mask >> 32))
        if new != (word, bitmap):
            words[index], words[index + 1] = new
            mapping.l2.mark(table, index * 8, index * 8 + 15)
            if not new[0] & OFFSET_MASK:
                mapping.drop(word)
        offset = stop
    return offset


def _unmapped_extended(mapping: Mapping, word: int, bitmap: int, kind: int, keep: bool, full: bool) -> tuple[int, int]:
    if kind == KIND_ZERO:
        if keep and not word & COMPRESSED and word & OFFSET_MASK and word & COPIED:
            return word, ALL_ZERO
        return 0, ALL_ZERO
    if full:
        return 0, 0
    if word & (COMPRESSED | OFFSET_MASK) or (mapping.has_backing and bitmap != ALL_ZERO):
        return 0, ALL_ZERO
    return word, bitmap
