"""Looking up many grains at once, with numpy. Memory is bounded by what one step covers, not by the disk."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from ...errors import Corrupt
from ...io.extent import COMPRESSED, DATA, NO_HOST, UNALLOCATED, ZERO
from ...io.extentmap import ExtentMap
from ...units import SECTOR
from .extents import NUMBER_BITS, SeSparseExtent, SparseExtent
from .layout import ZERO_GRAIN

if TYPE_CHECKING:
    from array import array
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from .extents import DiskExtent

__all__ = ["classify", "has_repeats", "lookup_all", "table_entries"]

_STEP: Final = 1 << 18
"""Grains at once: some 10 MiB of columns."""


def lookup_all(extent: DiskExtent, offset: int, length: int) -> Iterator[ExtentMap]:
    """Maps that cover a range inside ``extent``, one behind the other; the caller holds the node's lock."""
    if not isinstance(extent, SparseExtent):
        row = extent.lookup(offset, length)
        yield ExtentMap.from_extents(row)
        return
    end = offset + length
    step = max(_STEP // extent.tables.per_table, 1) * extent.span
    while offset < end:
        stop = min(end, offset + step - (offset - extent.start) % step)
        yield _piece(extent, offset, stop).coalesced()
        offset = stop


def _piece(extent: SparseExtent, offset: int, stop: int) -> ExtentMap:
    """One row for each grain of ``[offset, stop)``."""
    grain = extent.grain
    at, last = offset - extent.start, stop - extent.start
    first_table = at // extent.span
    entries = table_entries(extent, first_table, -(-last // extent.span))
    first, count = at // grain, -(-last // grain) - at // grain
    skip = first - first_table * extent.tables.per_table
    kind, host = classify(extent, entries[skip : skip + count])
    starts = (np.arange(first, first + count, dtype=np.int64)) * grain + extent.start
    table = ExtentMap(starts, np.full(count, grain, np.int64), kind, host, np.full(count, extent.source, np.int16))
    # A compressed grain's host is where its marker lies, also for a part of it.
    return table.clip(offset, stop - offset)


def table_entries(extent: SparseExtent, first: int, last: int) -> NDArray[Any]:
    """The entries of tables ``first`` to ``last``, zeroes for tables that are not there."""
    tables = extent.tables
    dtype = np.dtype("<u4" if tables.width == 4 else "<u8")
    parts = [
        np.zeros(count * tables.per_table, dtype) if data is None else np.frombuffer(data, dtype)
        for count, data in tables.bulk(first, last)
    ]
    joined = np.concatenate(parts) if parts else np.zeros(0, dtype)
    return joined if sys.byteorder == "little" else joined.astype(dtype.newbyteorder("="))


def classify(extent: SparseExtent, entries: NDArray[Any]) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """(kinds, hosts) of grain table entries; the same as :meth:`.SparseExtent.classify` of each."""
    if isinstance(extent, SeSparseExtent):
        return _classify_sesparse(extent, entries)
    used = COMPRESSED if extent.compressed else DATA
    kind = np.where(entries == 0, np.uint8(UNALLOCATED), np.uint8(used))
    host = entries.astype(np.int64) * SECTOR
    if extent.zero_grains:
        kind[entries == ZERO_GRAIN] = ZERO
    host[(kind == UNALLOCATED) | (kind == ZERO)] = NO_HOST
    return kind, host


def _classify_sesparse(extent: SeSparseExtent, entries: NDArray[Any]) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    type_of = (entries >> np.uint64(60)).astype(np.uint8)
    number = (entries >> np.uint64(48) & np.uint64(0xFFF)) | (entries & np.uint64(0xFFFFFFFFFFFF)) << np.uint64(12)
    bad = ((type_of == 0) & (entries != 0)) | (type_of > 3) | ((type_of == 3) & (number >> np.uint64(NUMBER_BITS) > 0))
    if bad.any():
        raise Corrupt(f"grain table entry {int(entries[bad][0]):#018x} makes no sense", where=extent.name)
    kind = np.array((UNALLOCATED, ZERO, ZERO, DATA), np.uint8)[type_of]
    host = np.where(kind == DATA, number.astype(np.int64) * extent.grain + extent.grains, NO_HOST)
    return kind, host


def has_repeats(*directories: array[int]) -> bool:
    """Whether two entries of grain directories name the same place."""
    used = np.concatenate([np.frombuffer(directory, f"u{directory.itemsize}") for directory in directories])
    used = np.sort(used[used > 1])
    return bool((used[1:] == used[:-1]).any())
