"""Memory that clients can make the server hold: a sum for all, a share for each, and buffers that shrink when idle."""

from __future__ import annotations

import mmap
import threading
from typing import TYPE_CHECKING

from ..errors import ByreError

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Arena", "Budget", "Share"]


class Budget:
    """Bytes of buffers that all clients together may occupy. Guarded by its condition."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.changed = threading.Condition(threading.Lock())
        self.used = 0


class Share:
    """One client's part of a :class:`Budget`.

    :param limit: bytes for this client
    :param stopped: whether nobody should wait any longer
    """

    def __init__(self, budget: Budget, limit: int, stopped: Callable[[], bool]) -> None:
        self._budget = budget
        self._limit = limit
        self._stopped = stopped
        self._used = 0

    def take(self, size: int) -> None:
        """Wait until ``size`` bytes may be allocated.

        :raises ByreError: the server stops
        """
        with self._budget.changed:
            while not self._fits(size):
                if self._stopped():
                    raise ByreError("the server stops")
                self._budget.changed.wait(0.5)
            self._add(size)

    def try_take(self, size: int) -> bool:
        """The same without waiting; whether there was room."""
        with self._budget.changed:
            if not self._fits(size):
                return False
            self._add(size)
            return True

    def give_back(self, size: int) -> None:
        with self._budget.changed:
            self._add(-size)
            self._budget.changed.notify_all()

    def _fits(self, size: int) -> bool:
        return self._used + size <= self._limit and self._budget.used + size <= self._budget.limit

    def _add(self, size: int) -> None:
        self._used += size
        self._budget.used += size


class Arena:
    """Zeroed, page-aligned memory that takes no space until it is used, and none again after :meth:`shrink`.

    :ivar view: all of it
    """

    def __init__(self, size: int) -> None:
        self._map = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.view = memoryview(self._map)
        self._used = True

    def __len__(self) -> int:
        return len(self.view)

    def shrink(self) -> None:
        """Its content is no longer needed: give the memory back to the system."""
        self._map.madvise(mmap.MADV_DONTNEED)
