"""Holes below a format: data clusters whose place in the file was never written read as zeroes.

Preallocated and copied images are full of them. Looking costs one walk over the file's extents, so it is done only
where the file occupies less than its length.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..graph import chain
from ..io.extent import DATA, ZERO

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy as np
    from numpy.typing import NDArray

    from ..graph.node import Node
    from ..io.extentmap import ExtentMap

__all__ = ["split_at_holes"]


def split_at_holes(top: Node, found: ExtentMap) -> tuple[ExtentMap, NDArray[np.bool_]]:
    """``found``, extents of the chain below ``top``, cut at holes of the files; and which rows are DATA in a hole."""
    import numpy as np

    holes = list(_sparse_sources(top, found))
    for level, source, edges in holes:
        found = _cut(found, _rows(found, level, source), edges)
    in_hole = np.zeros(len(found), np.bool_)
    for level, source, edges in holes:
        rows = _rows(found, level, source)
        # Edges alternate: a hole begins, a hole ends. Inside a hole the count of edges passed is odd.
        in_hole[rows] = np.searchsorted(edges, found.host[rows], "right") % 2 == 1
    return found, in_hole


def _rows(found: ExtentMap, level: int, source: int) -> NDArray[np.bool_]:
    rows: NDArray[np.bool_] = (found.kind == DATA) & (found.depth == level)
    rows &= (found.source == source) & (found.host >= 0)
    return rows


def _sparse_sources(top: Node, found: ExtentMap) -> Iterator[tuple[int, int, NDArray[np.int64]]]:
    """``(depth, source, hole edges)`` of the files that have holes where ``found`` has data."""
    layers = chain.layers(top)
    for level in sorted(set(found.depth.tolist())):
        layer = layers[level]
        if layer.driver == "raw" or getattr(layer, "cipher", None) is not None:
            continue  # raw looks for holes itself; an encrypted hole does not read as zeroes
        for source, child in enumerate(getattr(layer, "sources", ())):
            rows = _rows(found, level, source)
            if rows.any() and 0 <= child.node.allocated_size() < child.node.size:
                yield level, source, _hole_edges(child.node, found, rows)


def _hole_edges(file: Node, found: ExtentMap, rows: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Where holes begin and end, alternating, over the part of ``file`` that the rows use."""
    import numpy as np

    low = int(found.host[rows].min())
    high = int((found.host[rows] + found.length[rows]).max())
    extents = file.extents(low, high - low)
    holes = extents.kind == ZERO
    edges = np.empty(2 * int(holes.sum()), np.int64)
    edges[::2] = extents.offset[holes]
    edges[1::2] = extents.offset[holes] + extents.length[holes]
    return edges


def _cut(found: ExtentMap, rows: NDArray[np.bool_], edges: NDArray[np.int64]) -> ExtentMap:
    """``found`` with a cut wherever an edge falls inside one of the rows."""
    import numpy as np

    host, length, offset = found.host[rows], found.length[rows], found.offset[rows]
    first = np.searchsorted(edges, host, "right")
    count = np.searchsorted(edges, host + length, "left") - first
    count = np.maximum(count, 0)
    total = int(count.sum())
    if not total:
        return found
    owner = np.repeat(np.arange(len(host)), count)
    within = np.arange(total) - np.repeat(np.cumsum(count) - count, count)
    points = offset[owner] + edges[first[owner] + within] - host[owner]
    return found.split_at(np.unique(points))
