"""VHD mapping as a whole: block table entries to an ExtentMap (numpy). The same rules as :mod:`.mapping`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ...io.extent import DATA, NO_HOST
from ...io.extentmap import ExtentMap
from ...units import SECTOR
from .layout import NONE

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from .mapping import DynamicMapping

__all__ = ["extents", "hosts", "suspects"]


def hosts(mapping: DynamicMapping, first: int, count: int) -> NDArray[np.int64]:
    """Where the bitmaps of ``count`` blocks from ``first`` lie, -1 for those that are not there."""
    entries = np.frombuffer(mapping.table[first : first + count], np.uint32)
    return np.where(entries == NONE, NO_HOST, entries.astype(np.int64) * SECTOR)


def suspects(mapping: DynamicMapping, first: int, host: NDArray[np.int64]) -> Any:
    """Per row, whether the block lies where it must not."""
    start = np.arange(first, first + len(host), dtype=np.int64) << mapping.block_bits
    end = host + mapping.bitmap_size + np.minimum(mapping.block_size, mapping.size - start)
    bad = end > mapping.file.size
    for begin, stop in mapping.reserved:
        bad |= (host < stop) & (begin < end)
    return bad & (host >= 0)


def extents(mapping: DynamicMapping, offset: int, length: int) -> ExtentMap:
    """What the range is.

    :raises Corrupt: an entry makes no sense
    """
    first, last = offset >> mapping.block_bits, (offset + length - 1) >> mapping.block_bits
    host = hosts(mapping, first, last - first + 1)
    bad = suspects(mapping, first, host)
    if bad.any():
        mapping.host(first + int(np.argmax(bad)))
    there = host >= 0
    partial = [row for row in np.flatnonzero(there).tolist() if not mapping.is_whole(first + row, int(host[row]))]
    start = np.arange(first, last + 1, dtype=np.int64) << mapping.block_bits
    rows = ExtentMap(start, np.full(len(host), mapping.block_size, np.int64),
                     np.where(there, DATA, mapping.hole).astype(np.uint8),
                     np.where(there, host + mapping.bitmap_size, NO_HOST))  # fmt: skip
    parts: list[ExtentMap] = []
    done = 0
    for row in partial:
        if row > done:
            parts.append(rows.take(slice(done, row)))
        parts.append(_partial(mapping, first + row, int(host[row])))
        done = row + 1
    if done < len(host):
        parts.append(rows.take(slice(done, len(host))))
    return ExtentMap.concatenate(parts).clip(offset, length).coalesced()


def _partial(mapping: DynamicMapping, block: int, host: int) -> ExtentMap:
    """A block that is there in part, by its bitmap."""
    data = bytearray(-(-mapping.block_size // (8 * SECTOR)))
    mapping.file.read_into(host, memoryview(data))
    bits = np.unpackbits(np.frombuffer(data, np.uint8))[: mapping.block_size // SECTOR]
    first = np.flatnonzero(np.append(True, bits[1:] != bits[:-1]))
    length = np.diff(np.append(first, len(bits))) * SECTOR
    here = bits[first] == 1
    begin = first * SECTOR
    return ExtentMap(begin + (block << mapping.block_bits), length, np.where(here, DATA, mapping.hole).astype(np.uint8),
                     np.where(here, begin + host + mapping.bitmap_size, NO_HOST))  # fmt: skip
