"""How far a walk over a disk looks at once: far where there is little, near where there is much."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from ..graph import chain
from ..units import KIB

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from ..graph.node import Node

__all__ = ["Stride"]

_ROW_LIMIT: Final = 1 << 18
"""A window never holds more extents than this, however its disk is fragmented (unless one table maps more)."""
_MANY_ROWS: Final = 1 << 12
_LIMIT: Final = 16 << 30


class Stride:
    """Windows over a disk, cut at multiples of the least window; after each, :meth:`saw` says how much was in it.

    :param tops: the images walked together
    """

    def __init__(self, tops: Iterable[Node]) -> None:
        tops = list(tops)
        self._base = max((chain.window_size(top) for top in tops), default=chain.WINDOW)
        unit = min(
            (getattr(node, "cluster_size", 4 * KIB) for top in tops for node in chain.layers(top)), default=4 * KIB
        )
        self._most = max(self._base, min(unit * _ROW_LIMIT, _LIMIT) // self._base * self._base)
        self._step = self._base

    def windows(self, offset: int, end: int) -> Iterator[tuple[int, int]]:
        """``(offset, length)`` of consecutive windows up to ``end``."""
        while offset < end:
            step = self._step if offset % self._base == 0 else self._base - offset % self._base
            length = min(step, end - offset)
            yield offset, length
            offset += length

    def saw(self, row_count: int) -> None:
        """The last window held so many extents."""
        if row_count > _MANY_ROWS:
            self._step = self._base
        elif row_count * 4 <= _MANY_ROWS:
            self._step = min(self._step * 4, self._most)
