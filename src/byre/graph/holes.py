"""Data that lies in holes: what a format calls data may read as zeroes, because the file below was never written there.

So it is after metadata was preallocated. Looking costs a system call per hole, so a format says first whether
it is worthwhile (:class:`byre.formats.abilities.HasHoles`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..io.extent import DATA
from ..io.extentmap import ExtentMap

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from .node import Node

__all__ = ["Holes"]


class Holes:
    """The holes of one file, looked up once, when first needed."""

    def __init__(self, file: Node) -> None:
        self._file = file
        self._edges: tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]] | None = None

    def __len__(self) -> int:
        """How many pieces, data and holes, the file is in."""
        return len(self._pieces()[0])

    def _pieces(self) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]:
        """(starts, ends, whether it is a hole) of pieces that cover every offset; behind the end there is a hole."""
        if self._edges is None:
            size = self._file.size
            found = self._file.extents(0, size) if size else ExtentMap.from_extents([])
            behind = np.array([size, np.iinfo(np.int64).max], np.int64)
            starts = np.concatenate((found.offset, behind[:1]))
            ends = np.concatenate((found.offset + found.length, behind[1:]))
            self._edges = starts, ends, np.concatenate((found.kind != DATA, [True]))
        return self._edges

    def split(self, extents: ExtentMap, rows: NDArray[np.bool_]) -> tuple[ExtentMap, NDArray[np.bool_]]:
        """``extents`` with the chosen ``rows`` (bytes at ``host`` in this file) cut where holes begin and end.

        :returns: (the rows after cutting, which of them lie in holes)
        """
        if not rows.any():
            return extents, np.zeros(len(extents), np.bool_)
        starts, ends, hole = self._pieces()
        first = np.where(rows, np.searchsorted(ends, extents.host, "right"), 0)
        last = np.where(rows, np.searchsorted(starts, extents.host + extents.length, "left"), 1)
        count = last - first
        owner = np.repeat(np.arange(len(extents)), count)
        piece = first[owner] + np.arange(len(owner)) - np.repeat(np.cumsum(count) - count, count)
        cut = extents.take(owner)
        chosen = rows[owner]
        before, behind = cut.host, cut.host + cut.length
        begin: NDArray[np.int64] = np.where(chosen, np.maximum(before, starts[piece]), before)
        cut.offset = cut.offset + (begin - before)
        cut.host = begin
        cut.length = np.where(chosen, np.minimum(behind, ends[piece]), behind) - begin
        return cut, chosen & hole[piece]
