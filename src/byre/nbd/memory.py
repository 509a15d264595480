"""Memory that clients can make the server hold: a sum for all, a share for each, and buffers that shrink when idle.

Payloads of long writes are received whole before anything of them is applied, and a client decides when its bytes
come. So that nobody can keep the others waiting: longer payloads leave room for shorter ones, and when there is none
left, a client whose payload has stopped coming loses its connection.
"""

from __future__ import annotations

import mmap
import threading
from time import monotonic
from typing import TYPE_CHECKING, Final

from ..errors import ByreError

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["STALL_SECONDS", "Arena", "Budget", "Reception", "Share"]

STALL_SECONDS: Final = 0.25
"""A payload of which no further piece (128 KiB) has come for so long makes way when others need memory."""
_LONG: Final = 4 << 20
_MIDDLING: Final = 1 << 20
_KEPT_SIZES: Final = (256 << 10, 512 << 10, 1 << 20, 2 << 20, 4 << 20)
_KEPT: Final = 16 << 20
"""Bytes of buffers that are kept for the next payload, whosever it is."""
_LOOK: Final = 0.05


class Budget:
    """Bytes of buffers that all clients together may occupy, and buffers that are kept for reuse.

    Guarded by its condition: everything.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.changed = threading.Condition(threading.Lock())
        self.used = 0
        self._receptions: set[Reception] = set()
        self._kept: dict[int, list[Arena]] = {size: [] for size in _KEPT_SIZES}
        self._kept_bytes = 0

    def room_for(self, size: int) -> int:
        """Bytes that may be in use once a payload of ``size`` bytes is: the longer it is, the fewer."""
        if size > _LONG:
            return self.limit * 3 // 4
        return self.limit * 7 // 8 if size > _MIDDLING else self.limit

    def begun_locked(self, reception: Reception) -> None:
        self._receptions.add(reception)

    def ended_locked(self, reception: Reception) -> None:
        self._receptions.discard(reception)

    def make_room_locked(self, size: int) -> None:
        """Turn out clients whose payload has stopped coming, those that have waited longest first, as far as needed."""
        missing = self.used + size - self.room_for(size)
        missing -= sum(each.size for each in self._receptions if each.evicted)
        since = monotonic() - STALL_SECONDS
        for each in sorted(self._receptions, key=lambda reception: reception.moved_at):
            if missing <= 0 or each.moved_at > since:
                return
            if not each.evicted:
                missing -= each.size
                each.evict()

    # -- buffers ----------------------------------------------------------------------------------

    def arena(self, size: int) -> Arena:
        """A buffer of at least ``size`` bytes with any content; accounting for it is the caller's."""
        fitting = next((each for each in _KEPT_SIZES if each >= size), 0)
        if fitting:
            with self.changed:
                if self._kept[fitting]:
                    self._kept_bytes -= fitting
                    return self._kept[fitting].pop()
        return Arena(fitting or size)

    def keep(self, arena: Arena) -> None:
        """Its user needs it no longer."""
        size = len(arena)
        with self.changed:
            if size in self._kept and self._kept_bytes + size <= _KEPT:
                self._kept[size].append(arena)
                self._kept_bytes += size

    def drop_kept(self) -> None:
        """Give the memory of buffers that nobody uses back to the system."""
        with self.changed:
            if self._kept_bytes:
                self._kept = {size: [] for size in _KEPT_SIZES}
                self._kept_bytes = 0


class Share:
    """One client's part of a :class:`Budget`.

    :param limit: bytes for this client
    :param stopped: whether nobody should wait any longer
    :param interrupt: ends what the client sends, from any thread
    """

    def __init__(self, budget: Budget, limit: int, stopped: Callable[[], bool], interrupt: Callable[[], None]) -> None:
        self.budget = budget
        self._limit = limit
        self._stopped = stopped
        self._interrupt = interrupt
        self._used = 0

    def receive(self, size: int) -> Reception:
        """Wait until ``size`` bytes may be allocated for a payload that is about to come.

        :raises ByreError: the server stops
        """
        budget = self.budget
        with budget.changed:
            while not self._fits(size, budget.room_for(size)):
                if self._stopped():
                    raise ByreError("the server stops")
                if self._used + size <= self._limit:
                    budget.make_room_locked(size)
                budget.changed.wait(_LOOK)
            self._add(size)
            reception = Reception(self, size, self._interrupt)
            budget.begun_locked(reception)
        return reception

    def try_take(self, size: int, *, part: int = 1) -> bool:
        """The same without waiting, for other buffers; whether there was room.

        :param part: only one in so many bytes of all may be in use then
        """
        with self.budget.changed:
            if not self._fits(size, self.budget.limit // part):
                return False
            self._add(size)
            return True

    def give_back(self, size: int) -> None:
        with self.budget.changed:
            self._add(-size)
            self.budget.changed.notify_all()

    def _fits(self, size: int, room: int) -> bool:
        return self._used + size <= self._limit and self.budget.used + size <= room

    def _add(self, size: int) -> None:
        self._used += size
        self.budget.used += size


class Reception:
    """A payload on its way, and the memory it occupies, which is the receiver's until it gives it back.

    :ivar size: bytes
    :ivar moved_at: when a piece of it came last, on the clock of ``monotonic()``; set by who receives
    :ivar evicted: it was in the way of others, and nothing more will come
    """

    __slots__ = ("_interrupt", "_share", "evicted", "moved_at", "size")

    def __init__(self, share: Share, size: int, interrupt: Callable[[], None]) -> None:
        self._share = share
        self._interrupt = interrupt
        self.size = size
        self.moved_at = monotonic()
        self.evicted = False

    def evict(self) -> None:
        self.evicted = True
        self._interrupt()

    def end(self) -> bool:
        """All has come, or nothing more will; False if it was evicted."""
        budget = self._share.budget
        with budget.changed:
            budget.ended_locked(self)
        return not self.evicted


class Arena:
    """Zeroed, page-aligned memory that takes no space until it is used, and none again after :meth:`shrink`.

    :ivar view: all of it
    """

    def __init__(self, size: int) -> None:
        self._map = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.view = memoryview(self._map)

    def __len__(self) -> int:
        return len(self.view)

    def shrink(self) -> None:
        """Its content is no longer needed: give the memory back to the system."""
        self._map.madvise(mmap.MADV_DONTNEED)
