"""Which parts of a disk's earlier state are still where they were, which are copied away, and who is at it.

Shared by the copy-before-write filter (a guest is about to write), the backup job (copies in the background) and
snapshot access (reads the earlier state). Moves no bytes itself: it says what to copy and waits for those who do.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, NamedTuple, Protocol, runtime_checkable

from ..bitmaps.bitmap import Bitmap
from ..errors import AccessDenied, ByreError, InvalidArgument, IOFailure
from ..units import align_down, align_up

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from ..graph.node import Node

__all__ = ["KeepsSnapshot", "Piece", "PointInTime"]


class Piece(NamedTuple):
    """``length`` bytes of the earlier state from ``offset``: in the target, or in place still (``copied`` false)."""

    offset: int
    length: int
    copied: bool


class PointInTime:
    """The state of a disk of ``size`` bytes at the moment of construction, kept cluster by cluster.

    Guarded by ``_changed``: the three bitmaps (which nobody else changes), claims, ``failure``.

    :param cluster: bytes, a power of two: what is copied at a time
    :param wanted: only its dirty parts belong to the state; ``None`` for the whole disk
    :raises InvalidArgument: ``wanted`` has another size
    :ivar failure: why the state is lost; ``None`` while it is whole
    """

    def __init__(self, size: int, cluster: int, wanted: Bitmap | None = None) -> None:
        if wanted is not None and wanted.size != size:
            raise InvalidArgument(f"bitmap {wanted.name!r} is for {wanted.size} bytes, the disk has {size}")
        self.size = size
        self.cluster = cluster
        self.failure: ByreError | None = None
        self._changed = threading.Condition(threading.Lock())
        self._todo, self._done, self._access = (Bitmap(size, cluster) for _ in range(3))
        self._copies: list[tuple[int, int]] = []
        self._reads: list[tuple[int, int]] = []
        for bitmap in (self._todo, self._access):
            if wanted is None:
                bitmap.set(0, size)
            else:
                bitmap.set_from(wanted)

    @property
    def left(self) -> int:
        """Bytes that still have to be copied before they may be overwritten, or are being copied."""
        with self._changed:
            return self._todo.dirty_bytes + sum(end - start for start, end in self._copies)

    @property
    def todo(self) -> Bitmap:
        """What still has to be copied; to look at only."""
        return self._todo

    # -- copying ----------------------------------------------------------------------------------

    def claim(self, offset: int, end: int, most: int) -> tuple[int, int] | None:
        """The first range in ``[offset, end)`` to be copied, now, by the caller, who calls :meth:`settle` afterwards.

        :param most: bytes at most, a multiple of the cluster
        :returns: (offset, length) of whole clusters, ``None`` if nobody needs to begin with anything there
        :raises ByreError: the state is lost
        """
        with self._changed:
            self._check()
            return self._claim_locked(offset, end, most)

    def _claim_locked(self, offset: int, end: int, most: int) -> tuple[int, int] | None:
        found = self._todo.next_dirty(align_down(offset, self.cluster), align_up(end, self.cluster), most)
        if found is not None:
            self._todo.clear(*found)
            self._copies.append((found[0], found[0] + found[1]))
        return found

    def settle(self, claim: tuple[int, int], *, copied: bool) -> None:
        """The claimed range is in the target now; or it is not, and still has to be copied."""
        offset, length = claim
        with self._changed:
            self._copies.remove((offset, offset + length))
            (self._done if copied else self._todo).set(offset, length)
            self._changed.notify_all()

    def wait_settled(self) -> None:
        """Wait until nobody copies."""
        with self._changed:
            while self._copies and self.failure is None:
                self._changed.wait()

    def skip(self, ranges: Iterable[tuple[int, int]]) -> int:
        """The target has these (offset, length) already: whole clusters of them need not be copied; bytes gained."""
        gained = 0
        with self._changed:
            for offset, length in ranges:
                for start, size in self._todo.take(offset, length):
                    self._done.set(start, size)
                    gained += size
        return gained

    # -- writers ----------------------------------------------------------------------------------

    def hold_back(self, offset: int, length: int, most: int) -> tuple[int, int] | None:
        """For a writer to the range: what it must copy (as :meth:`claim`) before it asks again; ``None``: go ahead.

        Waits for those who copy or read the earlier state there.

        :raises ByreError: the state is lost
        """
        start, end = align_down(offset, self.cluster), align_up(offset + length, self.cluster)
        with self._changed:
            while True:
                self._check()
                if self._todo.dirty_bits:
                    found = self._claim_locked(start, end, most)
                    if found is not None:
                        return found
                if not self._in_use_locked(start, end):
                    return None
                self._changed.wait()

    def _in_use_locked(self, start: int, end: int) -> bool:
        return any(first < end and start < last for claims in (self._copies, self._reads) for first, last in claims)

    def give_up(self, reason: ByreError) -> None:
        """The earlier state is lost: writers are free, everybody else is refused."""
        with self._changed:
            self.failure = self.failure or reason
            self._changed.notify_all()

    def check(self) -> None:
        """:raises IOFailure: the state is lost"""
        with self._changed:
            self._check()

    def _check(self) -> None:
        if self.failure is not None:
            raise IOFailure(f"the snapshot is lost: {self.failure}", errno=self.failure.errno)

    # -- readers ----------------------------------------------------------------------------------

    def begin_read(self, offset: int, length: int, *, looking: bool = False) -> tuple[tuple[int, int], list[Piece]]:
        """(claim for :meth:`end_read`, pieces that make up the range); what is in place stays so until then.

        :param looking: at metadata, which nobody is refused
        :raises AccessDenied: part of the range does not belong to the state, or was let go
        :raises ByreError: the state is lost
        """
        with self._changed:
            self._check()
            missing = self._access.next_clean(offset, offset + length)
            if missing is not None and not looking:
                raise AccessDenied(f"byte {missing:#x} is not part of the snapshot")
            claim = (offset, offset + length)
            self._reads.append(claim)
            return claim, list(self._pieces_locked(offset, offset + length))

    def _pieces_locked(self, offset: int, end: int) -> Iterator[Piece]:
        while offset < end:
            run = self._done.next_dirty(offset, end)
            stop = end if run is None else run[0]
            if offset < stop:
                yield Piece(offset, stop - offset, False)
            if run is not None:
                yield Piece(*run, True)
                stop = run[0] + run[1]
            offset = stop

    def end_read(self, claim: tuple[int, int]) -> None:
        with self._changed:
            self._reads.remove(claim)
            self._changed.notify_all()

    def let_go(self, offset: int, length: int) -> tuple[int, int]:
        """Nobody wants the whole clusters in this range any more: they need no copying, and reading them is refused.

        :returns: (offset, length) of these clusters
        """
        first = align_up(offset, self.cluster)
        end = offset + length
        last = self.size if end >= self.size else align_down(end, self.cluster)
        if first >= last:
            return first, 0
        with self._changed:
            self._access.clear(first, last - first)
            self._todo.clear(first, last - first)
            while self._in_use_locked(first, last):
                self._changed.wait()
            self._todo.clear(first, last - first)  # a copy that failed meanwhile
        return first, last - first


@runtime_checkable
class KeepsSnapshot(Protocol):
    """A filter that keeps an earlier state of the disk below it."""

    @property
    def state(self) -> PointInTime: ...
    @property
    def below(self) -> Node: ...
    @property
    def target(self) -> Node:
        """Where the earlier state is of what has been copied; of the rest it is ``below``."""

    def read_snapshot(self, offset: int, buffer: memoryview) -> None:
        """Fill ``buffer`` with the earlier state from ``offset``.

        :raises AccessDenied: part of it does not belong to the state, or was let go
        """

    def discard_snapshot(self, offset: int, length: int) -> None:
        """Nobody wants the earlier state of the whole clusters in this range any more."""
