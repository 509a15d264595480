"""Space for new clusters in a file without reference counts: holes known to be free, then the end of the file.

What is freed is known only while the image is open; a format that can tell free clusters from its tables says so when
it is opened (:meth:`Space.release`).
"""

from __future__ import annotations

from bisect import insort

from ..typing import TYPE_CHECKING, Final
from ..units import align_up

if TYPE_CHECKING:
    from collections.abc import Iterable

    import numpy as np
    from numpy.typing import NDArray

__all__ = ["Space"]

_GAPS: Final = 1 << 14
"""Runs of free clusters that opening looks for; further ones stay unused until the next time."""


class Space:
    """Clusters at ``base``, ``base + unit``, ... Guarded by the lock of the node that owns it.

    :ivar end: behind the last cluster that is in use, free in the middle, or was handed out
    :ivar clean: from here on nothing was ever written: a file that has grown so far reads as zeroes
    """

    def __init__(self, base: int, unit: int, end: int) -> None:
        self.base = base
        self.unit = unit
        self.end = base + align_up(max(end - base, 0), unit)
        self.clean = self.end
        self._free: list[tuple[int, int]] = []
        self._packed = 0

    def allocate(self, count: int) -> tuple[int, int, bool]:
        """(host offset, clusters there, whether they read as zeroes): up to ``count`` neighbours, at least one."""
        if self._free:
            host, length = self._free.pop(0)
            if length > count:
                self._free.insert(0, (host + count * self.unit, length - count))
            return host, min(length, count), False
        return self.append(count)

    def append(self, count: int) -> tuple[int, int, bool]:
        """As :meth:`allocate`, at the end of the file: all of ``count``."""
        host = self.end
        self.end += count * self.unit
        clean = host >= self.clean
        self.clean = max(self.clean, self.end)
        return host, count, clean

    def pack(self, length: int) -> int:
        """Host offset for ``length`` bytes that need no alignment, behind the last such if nothing came between."""
        follows = self._packed > self.end - self.unit
        host = self._packed if follows else self.end
        self._packed = host + length
        self.end = self.base + align_up(self._packed - self.base, self.unit)
        self.clean = max(self.clean, self.end)
        return host

    def release(self, host: int, count: int) -> None:
        """These clusters are free: nothing on disk refers to them, and no request uses them."""
        insort(self._free, (host, count))
        index = self._free.index((host, count))
        if index + 1 < len(self._free) and self._free[index + 1][0] == host + count * self.unit:
            count += self._free.pop(index + 1)[1]
        if index and self._free[index - 1][0] + self._free[index - 1][1] * self.unit == host:
            host, before = self._free.pop(index - 1)
            index, count = index - 1, before + count
        self._free[index] = (host, count)
        if host + count * self.unit == self.end:
            self._free.pop()
            self.end = host

    def use_gaps(self, parts: Iterable[NDArray[np.int64]]) -> None:
        """What lies between these clusters is free, and so is what follows them.

        :param parts: numbers of clusters from ``base``, ascending; all of them lie before ``end``
        """
        import numpy as np

        before = -1
        for used in parts:
            edges = np.concatenate((np.array([before], np.int64), used))
            where = np.flatnonzero(np.diff(edges) > 1)[: _GAPS - len(self._free)]
            starts, ends = edges[where] + 1, edges[where + 1]
            hosts = (self.base + starts * self.unit).tolist()
            self._free += zip(hosts, (ends - starts).tolist(), strict=True)
            before = int(edges[-1])
        self.end = self.base + (before + 1) * self.unit

    @property
    def free_count(self) -> int:
        """Free clusters in the middle."""
        return sum(count for _, count in self._free)
