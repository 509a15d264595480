"""VHDX mapping as a whole: block table entries to an ExtentMap (numpy). The same rules as :mod:`.mapping`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np

from ...io.extent import DATA, NO_HOST, UNALLOCATED
from ...io.extent import ZERO as KIND_ZERO
from ...io.extentmap import ExtentMap
from ...units import MIB
from . import layout

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from .mapping import Mapping

__all__ = ["extents", "payload_entries"]

_WINDOW: Final = 1 << 17
"""Blocks looked at together."""


def payload_entries(mapping: Mapping, first: int, count: int) -> NDArray[np.uint64]:
    """Entries of ``count`` payload blocks from ``first``, those of sector bitmaps left out."""
    ratio = mapping.ratio
    index = np.arange(first, first + count, dtype=np.int64)
    index += index // ratio
    if not count:
        return np.empty(0, np.uint64)
    entries = mapping.table.bulk(int(index[0]), int(index[-1] - index[0]) + 1)
    chosen: NDArray[np.uint64] = entries[index - index[0]]
    return chosen


def extents(mapping: Mapping, offset: int, length: int) -> ExtentMap:
    """What the range is.

    :raises Corrupt: an entry makes no sense
    """
    first, last = offset >> mapping.block_bits, (offset + length - 1) >> mapping.block_bits
    parts: list[ExtentMap] = []
    while first <= last:
        count = min(last - first + 1, _WINDOW)
        parts += _window(mapping, first, count)
        first += count
    return ExtentMap.concatenate(parts).clip(offset, length).coalesced()


def _window(mapping: Mapping, first: int, count: int) -> list[ExtentMap]:
    entries = payload_entries(mapping, first, count)
    state = (entries & np.uint64(layout.STATE_MASK)).astype(np.uint8)
    host = (entries & np.uint64(layout.OFFSET_MASK)).view(np.int64)
    start = np.arange(first, first + count, dtype=np.int64) << mapping.block_bits
    kind = np.full(count, UNALLOCATED, np.uint8)
    kind[state == layout.FULLY_PRESENT] = DATA
    kind[state == layout.ZERO] = KIND_ZERO
    if mapping.has_parent:
        kind[(state == layout.UNDEFINED) | (state == layout.UNMAPPED) | (state == layout.UNMAPPED_DRAFT)] = KIND_ZERO
    _check(mapping, entries, state, host, start)
    rows = ExtentMap(start, np.full(count, mapping.block_size, np.int64), kind, np.where(kind == DATA, host, NO_HOST))
    partial = np.flatnonzero(state == layout.PARTIALLY_PRESENT)
    if not len(partial):
        return [rows]
    parts: list[ExtentMap] = []
    done = 0
    for row in partial.tolist():
        if row > done:
            parts.append(rows.take(slice(done, row)))
        parts.append(_partial(mapping, int(entries[row]), first + row))
        done = row + 1
    if done < count:
        parts.append(rows.take(slice(done, count)))
    return parts


def _check(mapping: Mapping, entries: NDArray[np.uint64], state: NDArray[np.uint8], host: NDArray[np.int64],
           start: NDArray[np.int64]) -> None:  # fmt: skip
    """:raises Corrupt: as :mod:`.mapping` does for the first entry that makes no sense"""
    bad = suspects(mapping, state, host, start)
    if bad.any():
        row = int(np.argmax(bad))
        block = int(start[row]) >> mapping.block_bits
        entry = int(entries[row])
        if state[row] == layout.FULLY_PRESENT or (state[row] == layout.PARTIALLY_PRESENT and mapping.has_parent):
            mapping.host(entry, block)
        mapping._absent_kind(int(state[row]), block, entry)


def suspects(mapping: Mapping, state: NDArray[np.uint8], host: NDArray[np.int64], start: NDArray[np.int64]) -> Any:
    """Per row, whether its state is none for this disk, or the block lies where it must not."""
    held = (state == layout.FULLY_PRESENT) | (state == layout.PARTIALLY_PRESENT)
    bad = state == 4
    if not mapping.has_parent:
        bad |= state == layout.PARTIALLY_PRESENT
    end = host + np.minimum(mapping.block_size, mapping.size - start)
    # Offsets of 2^63 and above are negative here.
    outside = (host < MIB) | (end > mapping.file.size)
    starts, ends = np.array(mapping.region_starts, np.int64), np.array(mapping.region_ends, np.int64)
    number = np.searchsorted(starts, end - 1, "right") - 1
    outside |= (number >= 0) & (ends[np.maximum(number, 0)] > host)
    return bad | (held & outside)


def _partial(mapping: Mapping, entry: int, block: int) -> ExtentMap:
    """A partially present block, by its sector bitmap."""
    sector = 1 << mapping.sector_bits
    data = bytearray(mapping.block_size >> mapping.sector_bits + 3)
    mapping.file.read_into(mapping._bitmap_host(block), memoryview(data))
    bits = np.unpackbits(np.frombuffer(data, np.uint8), bitorder="little")
    first = np.flatnonzero(np.append(True, bits[1:] != bits[:-1]))
    length = np.diff(np.append(first, len(bits))) * sector
    here = bits[first] == 1
    begin = first * sector
    host = np.where(here, begin + mapping.host(entry, block), NO_HOST)
    return ExtentMap(begin + (block << mapping.block_bits), length, np.where(here, DATA, UNALLOCATED).astype(np.uint8),
                     host)  # fmt: skip
