"""Reads past the page cache, many at once: given to the kernel by the thread that receives, answered by one that waits.

Only for files opened for direct I/O (``cache=none``), and for reads that are aligned as those need; all others go the
usual way. A request for which no memory is free waits until one is answered.
"""

from __future__ import annotations

import ctypes
import threading
from typing import TYPE_CHECKING, Final

from ..io.kernelaio import KernelAio
from .disk import DirectRange
from .memory import Arena

if TYPE_CHECKING:
    from collections.abc import Callable

    from .disk import Disk
    from .link import Buffer, Link
    from .replies import Replies
    from .wire import Request
    from .workers import Flight

__all__ = ["DIRECT_LIMIT", "DirectReads"]

DIRECT_LIMIT: Final = 64 << 10
"""The longest read, bytes."""
_IDLE: Final = 5.0


class DirectReads:
    """The direct reads of one connection.

    Guarded by its lock: free slots, what is under way, the thread.

    :param otherwise: answers a read in the usual way, for one that failed or fell short
    :raises OSError: the system has no asynchronous I/O for us
    """

    def __init__(
        self,
        link: Link,
        disk: Disk,
        replies: Replies,
        flight: Flight,
        depth: int,
        otherwise: Callable[[Request], None],
        name: str,
    ) -> None:
        self._link = link
        self._disk = disk
        self._replies = replies
        self._flight = flight
        self._otherwise = otherwise
        self._name = name
        self._aio = KernelAio(depth)
        self._arena = Arena(DIRECT_LIMIT * depth)
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._arena.view))
        self._lock = threading.Lock()
        self._free = list(range(depth))
        self._under_way: dict[int, tuple[Request, DirectRange]] = {}
        self._thread: threading.Thread | None = None
        self._batch: list[tuple[int, int, int, int, int]] = []
        self._closed = False

    # -- the receiving thread ---------------------------------------------------------------------

    def take(self, request: Request) -> bool:
        """Take a read over, to begin with :meth:`submit`; whether it can be read like this."""
        place = self._disk.direct(request.offset, request.length)
        if place is None:
            return False
        if self._flight.is_full():
            self.submit()  # room comes only from what has begun
        self._flight.enter()
        with self._lock:
            slot = self._free.pop()
            self._under_way[slot] = request, place
        self._batch.append((slot, place.fd, place.offset, self._address + slot * DIRECT_LIMIT, request.length))
        return True

    def submit(self) -> None:
        """Begin what was taken."""
        if not self._batch:
            return
        batch, self._batch = self._batch, []
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._wait, name=self._name, daemon=True)
                self._thread.start()
        begun = self._aio.submit(batch)
        for slot, *_ in batch[begun:]:
            self._answer([(slot, -1)])

    def close(self) -> None:
        """Nothing is under way any more: let go."""
        with self._lock:
            self._closed = True
            thread = self._thread
        self._aio.close()  # which wakes the thread
        if thread is not None:
            thread.join(_IDLE)

    # -- the thread that waits --------------------------------------------------------------------

    def _wait(self) -> None:
        while True:
            ended = self._aio.ended(_IDLE)
            if ended:
                self._answer(ended)
                continue
            with self._lock:
                if not self._under_way or self._closed:
                    self._thread = None
                    self._arena.shrink()
                    return

    def _answer(self, ended: list[tuple[int, int]]) -> None:
        """Answer reads that have ended: (slot, bytes read or negative errno) of each."""
        answers: list[Buffer] = []
        others: list[Request] = []
        with self._lock:
            found = [(slot, result, *self._under_way.pop(slot)) for slot, result in ended]
        for slot, result, request, place in found:
            place.release(result if result == request.length else 0)
            if result != request.length:
                others.append(request)
                continue
            start = slot * DIRECT_LIMIT
            _, _, cookie, offset, length = request
            answers.append(self._replies.data_chunk(cookie, offset, offset, length, last=True))
            answers.append(self._arena.view[start : start + length])
        try:
            if answers:
                self._link.send(answers)
            for request in others:
                self._otherwise(request)
        except OSError:
            pass  # the connection is gone; the receiving thread finds out as well
        with self._lock:
            self._free += [slot for slot, *_ in found]
        self._flight.leave(len(found))
