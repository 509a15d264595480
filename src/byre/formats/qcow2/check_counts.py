"""Reference counts of a qcow2 check: adding references up, and comparing the sums with the counts on disk.

Cluster numbers are handled in windows. A *dense* window has one counter for each of its clusters (untouched ones
cost no memory), a *sparse* one a counter for each cluster that is referred to. An image whose file has at most
``DENSE_BYTES`` clusters takes one window and one walk. Longer ones take a walk that counts how references are
spread, and then windows that fit; memory stays below about 200 MiB whatever the length of the file.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np

from .check_reader import MARK_COPIED, MARK_NONE, MARK_PLAIN, slices

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

    from .check_findings import Findings
    from .check_reader import Keys
    from .check_tables import Walk

    Counts = NDArray[Any]

__all__ = ["TooNarrow", "Window", "each_window"]

DENSE_BYTES: Final = 1 << 27
"""Bytes of counters in a dense window."""
SPARSE_KEYS: Final = 1 << 21
"""References to a sparse window."""
BINS: Final = 1 << 16
RANGE_STEP: Final = 1 << 16


class TooNarrow(Exception):
    """A counter would overflow: count again with wider ones."""


class Window:
    """Counters of the clusters ``[low, high)``.

    The two highest bits of a counter say that the active layer refers to the cluster with the COPIED flag, and
    without it.

    :param width: bytes of a counter
    :param keys: for a sparse window, the clusters it has counters for, ascending
    """

    def __init__(self, low: int, high: int, width: int, keys: Keys | None = None) -> None:
        self.low, self.high, self.keys = low, high, keys
        self.dtype = np.dtype(f"u{width}")
        self.counters: Counts = np.zeros(high - low if keys is None else len(keys), self.dtype)
        bits = 8 * width
        self.limit = (1 << (bits - 2)) - 1
        one = self.dtype.type
        self.mask = one(self.limit)
        self.copied, self.plain = one(1 << (bits - 1)), one(1 << (bits - 2))
        self._scratch = np.empty(0, np.int64)
        self.marks = {MARK_NONE: one(0), MARK_COPIED: self.copied, MARK_PLAIN: self.plain}

    def covers(self, lowest: int, highest: int) -> bool:
        return lowest < self.high and highest >= self.low

    def add(self, keys: Keys, weight: int, mark: int) -> None:
        """:raises TooNarrow: a counter would overflow"""
        if not len(keys):
            return
        steps = self._differences(keys)
        if len(steps) and int(steps.min()) <= 0:
            keys = np.sort(keys)
            steps = self._differences(keys)
        if keys[0] < self.low or keys[-1] >= self.high:
            keys = keys[np.searchsorted(keys, self.low) : np.searchsorted(keys, self.high)]
            if not len(keys):
                return
            steps = self._differences(keys)
        weights: Any = weight
        if len(steps) and int(steps.min()) == 0:
            first = np.flatnonzero(np.concatenate(([True], steps != 0)))
            weights = np.diff(np.append(first, len(keys))) * weight
            keys = keys[first]
        if self.keys is not None:
            self._bump(np.searchsorted(self.keys, keys), weights, mark)
        elif isinstance(weights, int) and int(np.count_nonzero(steps != 1)) <= len(keys) >> 8:
            for begin, end in slices(keys):
                start = int(keys[begin]) - self.low
                self._bump(slice(start, start + end - begin), weight, mark)
        else:
            self._bump(keys - self.low, weights, mark)

    def _differences(self, keys: Keys) -> Keys:
        if len(self._scratch) < len(keys):
            self._scratch = np.empty(len(keys), np.int64)
        return np.subtract(keys[1:], keys[:-1], out=self._scratch[: len(keys) - 1])

    def add_range(self, first: int, end: int, weight: int) -> None:
        """:raises TooNarrow: a counter would overflow"""
        first, end = max(first, self.low), min(end, self.high)
        if first >= end:
            return
        if self.keys is None:
            self._bump(slice(first - self.low, end - self.low), weight, MARK_NONE)
        else:
            begin, stop = np.searchsorted(self.keys, (first, end)).tolist()
            self._bump(slice(begin, stop), weight, MARK_NONE)

    def _bump(self, where: Any, weight: Any, mark: int) -> None:
        part = self.counters[where]
        if not len(part):
            return
        highest = int(np.max(weight))
        # Sums are below 2^62: 65,537 tables of 4 million entries at most refer to a cluster.
        if highest > self.limit or int((part & self.mask).max()) > self.limit - highest:
            raise TooNarrow
        part += self.dtype.type(weight) if isinstance(weight, int) else weight.astype(self.dtype)
        if mark:
            part |= self.marks[mark]
        if not isinstance(where, slice):
            self.counters[where] = part

    def values(self, keys: Keys) -> Counts:
        """Counts of clusters in the window that have counters."""
        where = keys - self.low if self.keys is None else np.searchsorted(self.keys, keys)
        values: Counts = self.counters[where] & self.mask
        return values

    def referred(self, first: int, end: int) -> Keys:
        """Clusters of ``[first, end)`` that are referred to, ascending."""
        first, end = max(first, self.low), min(end, self.high)
        if self.keys is not None:
            begin, stop = np.searchsorted(self.keys, (first, end)).tolist()
            keys: Keys = self.keys[begin:stop]
            keys = keys[self.counters[begin:stop] != 0]
        else:
            keys = np.flatnonzero(self.counters[first - self.low : max(first, end) - self.low]) + first
        return keys


class _Spread:
    """A tally of how references spread over ``[low, high)``: their number in each of up to ``BINS`` parts.

    :param least: log2 of the smallest part; windows then hold whole refcount blocks
    """

    def __init__(self, low: int, high: int, least: int) -> None:
        self.low, self.high, self.least = low, high, least
        self.shift = max(least, (high - low - 1).bit_length() - (BINS.bit_length() - 1))
        self.bins = np.zeros(BINS, np.int64)

    def covers(self, lowest: int, highest: int) -> bool:
        return lowest < self.high and highest >= self.low

    def add(self, keys: Keys, weight: int, mark: int) -> None:
        keys = keys[(keys >= self.low) & (keys < self.high)]
        if len(keys):
            part = (keys - self.low) >> self.shift
            lowest = int(part.min())
            found = np.bincount(part - lowest)
            self.bins[lowest : lowest + len(found)] += found

    def add_range(self, first: int, end: int, weight: int) -> None:
        first, end = max(first, self.low) - self.low, min(end, self.high) - self.low
        while first < end:
            stop = min(end, ((first >> self.shift) + 1) << self.shift)
            self.bins[first >> self.shift] += stop - first
            first = stop


class _Collect:
    """A tally of which clusters of ``[low, high)`` are referred to."""

    def __init__(self, low: int, high: int) -> None:
        self.low, self.high = low, high
        self.parts: list[Keys] = []

    def covers(self, lowest: int, highest: int) -> bool:
        return lowest < self.high and highest >= self.low

    def add(self, keys: Keys, weight: int, mark: int) -> None:
        keys = keys[(keys >= self.low) & (keys < self.high)]
        if len(keys):
            self.parts.append(np.unique(keys))

    def add_range(self, first: int, end: int, weight: int) -> None:
        first, end = max(first, self.low), min(end, self.high)
        if first < end:
            self.parts.append(np.arange(first, end, dtype=np.int64))

    def keys(self) -> Keys:
        return np.unique(np.concatenate([np.zeros(0, np.int64), *self.parts]))


def each_window(walk: Walk, width: int, findings: Findings) -> Iterator[Window]:
    """Windows with all references counted, ascending, together all clusters of the file (and one more).

    :param findings: gets what the walk finds, once
    :raises TooNarrow: counters of ``width`` bytes do not do
    """
    # A reference that is not aligned may reach one cluster further than the file.
    count = walk.subject.cluster_count + 1
    if count * width <= DENSE_BYTES:
        window = Window(0, count, width)
        walk.run(window, findings)
        yield window
        return
    spread = _Spread(0, count, walk.subject.block_bits)
    walk.run(spread, findings)
    yield from _windows(walk, spread, width)


def _windows(walk: Walk, spread: _Spread, width: int) -> Iterator[Window]:
    """Windows over the range of ``spread``, each small enough."""
    # The clusters of one refcount block always fit: there are at most 2^24.
    dense = max(DENSE_BYTES // width, 1 << spread.least)
    bins = -(-(spread.high - spread.low) >> spread.shift)
    sums = np.concatenate(([0], np.cumsum(spread.bins)))
    first = 0
    while first < bins:
        few = int(np.searchsorted(sums, sums[first] + SPARSE_KEYS, "right")) - 1
        end = min(bins, max(few, first + (dense >> spread.shift)))
        if end <= first:
            # Too much for a sparse window and too long for a dense one: look closer.
            end = first + 1
            low, high = _bounds(spread, first, end)
            closer = _Spread(low, high, spread.least)
            walk.run(closer, _nothing())
            yield from _windows(walk, closer, width)
        else:
            low, high = _bounds(spread, first, end)
            yield _counted(walk, low, high, width, high - low <= dense)
        first = end


def _bounds(spread: _Spread, first: int, end: int) -> tuple[int, int]:
    return spread.low + (first << spread.shift), min(spread.high, spread.low + (end << spread.shift))


def _counted(walk: Walk, low: int, high: int, width: int, dense: bool) -> Window:
    keys = None
    if not dense:
        collect = _Collect(low, high)
        walk.run(collect, _nothing())
        keys = collect.keys()
    window = Window(low, high, width, keys)
    walk.run(window, _nothing())
    return window


def _nothing() -> Findings:
    from .check_findings import Findings

    return Findings()


def with_counters(snapshot_count: int, count: Callable[[int], Any], narrowest: int = 0) -> Any:
    """What ``count(width)`` gives, with the narrowest counters that do.

    :param narrowest: bytes; narrower ones are not tried
    """
    for width in (1, 2, 4) if snapshot_count < 60 else (2, 4):
        if width < narrowest:
            continue
        try:
            return count(width)
        except TooNarrow:
            continue
    return count(8)
