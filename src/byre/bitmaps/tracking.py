"""Who marks dirty bitmaps: every write path of a node, through its :class:`Tracker`.

A node without bitmaps has no tracker (``node.tracker is None``), which is all a write looks at then. Marks are made
when the bytes are written (or may have been), before the caller is told.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Protocol

from ..errors import AlreadyExists

if TYPE_CHECKING:
    from .bitmap import Bitmap

__all__ = ["Tracker", "attach", "detach"]


class Tracker:
    """The bitmaps of one node that are in memory.

    Guarded by its own lock: additions and removals. :meth:`mark` takes only the locks of the bitmaps.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._bitmaps: tuple[Bitmap, ...] = ()

    @property
    def bitmaps(self) -> tuple[Bitmap, ...]:
        return self._bitmaps

    def mark(self, offset: int, length: int) -> None:
        """The guest wrote to this range of the node."""
        if length > 0:
            for bitmap in self._bitmaps:
                bitmap.mark(offset, length)

    def find(self, name: str) -> Bitmap | None:
        return next((bitmap for bitmap in self._bitmaps if bitmap.name == name), None)

    def add(self, bitmap: Bitmap) -> None:
        """:raises AlreadyExists: one of that name is there"""
        with self._lock:
            if bitmap.name and self.find(bitmap.name) is not None:
                raise AlreadyExists(f"Bitmap already exists: {bitmap.name}")
            self._bitmaps = (*self._bitmaps, bitmap)

    def remove(self, bitmap: Bitmap) -> None:
        with self._lock:
            self._bitmaps = tuple(other for other in self._bitmaps if other is not bitmap)

    def resize(self, size: int) -> None:
        """The node has ``size`` bytes from now on."""
        for bitmap in self._bitmaps:
            bitmap.resize(size)


class Tracked(Protocol):
    """A node that marks bitmaps. ``lock`` guards the making of the tracker."""

    lock: threading.Lock
    tracker: Tracker | None


def attach(node: Tracked, bitmap: Bitmap) -> None:
    """From now on ``bitmap``, which is not persistent, follows the writes to ``node``.

    :raises AlreadyExists: one of its name does
    """
    with node.lock:
        if node.tracker is None:
            node.tracker = Tracker()
    node.tracker.add(bitmap)


def detach(node: Tracked, bitmap: Bitmap) -> None:
    """``bitmap`` follows ``node`` no longer."""
    if node.tracker is not None:
        node.tracker.remove(bitmap)
