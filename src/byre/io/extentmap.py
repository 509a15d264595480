"""ExtentMap: many extents at once, as numpy columns.

The only module on a request's path that needs numpy; loaded by bulk work alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .extent import DATA, NO_HOST, UNALLOCATED, ZERO, Extent

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

__all__ = ["ExtentMap"]


class ExtentMap:
    """Consecutive extents without gaps, in ascending order.

    :ivar offset: guest offsets, int64, shape (n,)
    :ivar length: lengths in bytes, int64, shape (n,)
    :ivar kind: DATA, ZERO, UNALLOCATED or COMPRESSED, uint8, shape (n,)
    :ivar host: host offsets or -1, int64, shape (n,)
    :ivar source: data child index, int16, shape (n,)
    :ivar depth: layer that answers, 0 is the top, int16, shape (n,)
    """

    __slots__ = ("depth", "host", "kind", "length", "offset", "source")

    def __init__(
        self,
        offset: NDArray[np.int64],
        length: NDArray[np.int64],
        kind: NDArray[np.uint8],
        host: NDArray[np.int64],
        source: NDArray[np.int16] | None = None,
        depth: NDArray[np.int16] | None = None,
    ) -> None:
        self.offset = offset
        self.length = length
        self.kind = kind
        self.host = host
        self.source = np.zeros(len(offset), np.int16) if source is None else source
        self.depth = np.zeros(len(offset), np.int16) if depth is None else depth

    @classmethod
    def from_extents(cls, rows: Sequence[Extent], depth: int = 0) -> ExtentMap:
        n = len(rows)
        table = np.array(rows, np.int64).reshape(n, 5)
        return cls(
            np.ascontiguousarray(table[:, 0]),
            np.ascontiguousarray(table[:, 1]),
            table[:, 2].astype(np.uint8),
            np.ascontiguousarray(table[:, 3]),
            table[:, 4].astype(np.int16),
            np.full(n, depth, np.int16),
        )

    @classmethod
    def single(cls, offset: int, length: int, kind: int, host: int = NO_HOST, depth: int = 0) -> ExtentMap:
        return cls.from_extents([Extent(offset, length, kind, host)] if length else [], depth)

    @classmethod
    def concatenate(cls, parts: Sequence[ExtentMap]) -> ExtentMap:
        """The parts one behind the other; they must be in ascending order."""
        if len(parts) == 1:
            return parts[0]
        if not parts:
            return cls.from_extents([])
        return cls(*(np.concatenate([getattr(part, name) for part in parts])
                     for name in ("offset", "length", "kind", "host", "source", "depth")))  # fmt: skip

    def __len__(self) -> int:
        return len(self.offset)

    def __iter__(self) -> Iterator[Extent]:
        columns = (self.offset, self.length, self.kind, self.host, self.source)
        return map(Extent._make, zip(*(column.tolist() for column in columns), strict=True))

    @property
    def end(self) -> int:
        """Guest offset behind the last extent; 0 for an empty map."""
        return int(self.offset[-1] + self.length[-1]) if len(self) else 0

    def take(self, index: NDArray[np.intp] | NDArray[np.bool_] | slice) -> ExtentMap:
        """The rows chosen by ``index``."""
        return ExtentMap(self.offset[index], self.length[index], self.kind[index], self.host[index],
                         self.source[index], self.depth[index])  # fmt: skip

    def with_depth(self, depth: int) -> ExtentMap:
        return ExtentMap(self.offset, self.length, self.kind, self.host, self.source,
                         np.full(len(self), depth, np.int16))  # fmt: skip

    def coalesced(self) -> ExtentMap:
        """Neighbours joined where kind, source and depth agree and the host continues. COMPRESSED rows stay apart."""
        if len(self) < 2:
            return self
        same = self.kind[1:] == self.kind[:-1]
        same &= self.kind[1:] <= UNALLOCATED
        same &= self.source[1:] == self.source[:-1]
        same &= self.depth[1:] == self.depth[:-1]
        before, after = self.host[:-1], self.host[1:]
        same &= np.where(before >= 0, after == before + self.length[:-1], after < 0)
        if not same.any():
            return self
        starts = np.flatnonzero(np.concatenate(([True], ~same)))
        joined = self.take(starts)
        joined.length = np.add.reduceat(self.length, starts)
        return joined

    def clip(self, offset: int, length: int) -> ExtentMap:
        """Only what lies in the range, cut at its ends. COMPRESSED hosts stay as they are."""
        end = offset + length
        if length <= 0:
            return ExtentMap.from_extents([])
        if not len(self) or (int(self.offset[0]) >= offset and self.end <= end):
            return self
        first = int(np.searchsorted(self.offset + self.length, offset, "right"))
        last = int(np.searchsorted(self.offset, end, "left"))
        if first >= last:
            return ExtentMap.from_extents([])
        part = self.take(slice(first, last))
        start = np.maximum(part.offset, offset)
        stop = np.minimum(part.offset + part.length, end)
        movable = (part.kind <= UNALLOCATED) & (part.host >= 0)
        part.host = np.where(movable, part.host + (start - part.offset), part.host)
        part.offset, part.length = start, stop - start
        return part

    def split_at(self, points: NDArray[np.int64]) -> ExtentMap:
        """The same ranges with a cut at each of ``points`` (ascending, unique) that falls inside an extent."""
        if not len(points) or not len(self):
            return self
        starts = np.union1d(self.offset, points[(points > self.offset[0]) & (points < self.end)])
        owner = np.searchsorted(self.offset, starts, "right") - 1
        part = self.take(owner)
        movable = (part.kind <= UNALLOCATED) & (part.host >= 0)
        part.host = np.where(movable, part.host + (starts - part.offset), part.host)
        part.offset = starts
        part.length = np.diff(np.append(starts, self.end))
        return part

    def overlay(self, lower: ExtentMap) -> ExtentMap:
        """This map with its UNALLOCATED ranges replaced by what ``lower`` says there.

        ``lower`` must cover the same range. What is UNALLOCATED in both stays so.
        """
        open_rows = self.kind == UNALLOCATED
        if not open_rows.any():
            return self
        edges = np.union1d(self.offset, self.offset + self.length)
        upper = self.split_at(np.union1d(lower.offset, lower.offset + lower.length))
        below = lower.split_at(edges)
        index = np.searchsorted(below.offset, upper.offset)
        use = upper.kind == UNALLOCATED
        merged = below.take(np.minimum(index, len(below) - 1))

        return ExtentMap(
            upper.offset,
            upper.length,
            np.where(use, merged.kind, upper.kind),
            np.where(use, merged.host, upper.host),
            np.where(use, merged.source, upper.source),
            np.where(use, merged.depth, upper.depth),
        )

    def bytes_of(self, *kinds: int) -> int:
        """Total length of the extents of these kinds."""
        return int(self.length[np.isin(self.kind, kinds)].sum())

    def allocated(self) -> NDArray[np.bool_]:
        """Per row: whether some layer holds it (not UNALLOCATED)."""
        return np.not_equal(self.kind, UNALLOCATED)

    def reads_zero(self) -> NDArray[np.bool_]:
        """Per row: whether it is known to read as zeroes once resolved over the whole chain."""
        return np.isin(self.kind, (ZERO, UNALLOCATED))

    def data_rows(self) -> NDArray[np.bool_]:
        return np.equal(self.kind, DATA)
