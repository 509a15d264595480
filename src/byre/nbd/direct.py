"""Reads past the page cache, many at once: begun by the thread that receives, answered by one that waits for the disk.

Only for files opened for direct I/O (``cache=none``), and for reads that are aligned as those need; all others go the
usual way. What cannot begin yet waits in line, and begins when another has ended, so the disk is never without work.
"""

from __future__ import annotations

import ctypes
import threading
from collections import deque
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

__all__ = ["DIRECT_LIMIT", "DirectReads"]

DIRECT_LIMIT: Final = 64 << 10
"""The longest read, bytes."""
_LINE: Final = 64
"""Requests that may wait in line: no more than their headers."""
_IDLE: Final = 5.0


class DirectReads:
    """The direct reads of one connection.

    Guarded by its lock: everything.

    :param depth: reads that are under way at once
    :param otherwise: answers a read in the usual way, for one that failed or fell short
    :ivar pending: reads that are not answered yet; may be read without the lock
    :raises OSError: the system has no asynchronous I/O for us
    """

    def __init__(
        self,
        link: Link,
        disk: Disk,
        replies: Replies,
        depth: int,
        otherwise: Callable[[Request], None],
        name: str,
    ) -> None:
        self._link = link
        self._disk = disk
        self._replies = replies
        self._depth = depth
        self._otherwise = otherwise
        self._name = name
        self._aio = KernelAio(depth)
        # While the answers of some reads are sent from their slots, as many others are under way.
        self._arena = Arena(DIRECT_LIMIT * depth * 2)
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._arena.view))
        self._changed = threading.Condition(threading.Lock())
        self._free = list(range(depth * 2))
        self._line: deque[tuple[Request, DirectRange]] = deque()
        self._begun: dict[int, tuple[Request, DirectRange]] = {}
        self._thread: threading.Thread | None = None
        self._closed = False
        self.pending = 0

    # -- the receiving thread ---------------------------------------------------------------------

    def take(self, request: Request) -> bool:
        """Take a read over, to begin with :meth:`submit`; whether it can be read like this."""
        place = self._disk.direct(request.offset, request.length)
        if place is None:
            return False
        with self._changed:
            if len(self._line) >= _LINE:
                self._begin_locked()  # room comes only from what has begun
                while len(self._line) >= _LINE:
                    self._changed.wait()
            self._line.append((request, place))
            self.pending += 1
        return True

    def submit(self) -> None:
        """Begin what was taken, as far as it may."""
        if self._line:
            with self._changed:
                self._begin_locked()

    def wait(self, timeout: float, most: int = 0) -> bool:
        """Wait until at most ``most`` reads are not answered; False if that took too long."""
        with self._changed:
            return self._changed.wait_for(lambda: self.pending <= most, timeout)

    def drop(self) -> None:
        """Forget those that have not begun."""
        with self._changed:
            dropped = list(self._line)
            self._line.clear()
            self.pending -= len(dropped)
            self._changed.notify_all()
        for _, place in dropped:
            place.release(0)

    def close(self) -> None:
        """Nothing is under way any more: let go."""
        with self._changed:
            self._closed = True
            thread = self._thread
        self._aio.close()  # which wakes the thread
        if thread is not None:
            thread.join(_IDLE)

    def _begin_locked(self) -> None:
        batch = []
        while self._line and self._free and len(self._begun) < self._depth:
            request, place = self._line.popleft()
            slot = self._free.pop()
            self._begun[slot] = request, place
            batch.append((slot, place.fd, place.offset, self._address + slot * DIRECT_LIMIT, request.length))
        if not batch:
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._wait, name=self._name, daemon=True)
            self._thread.start()
        begun = self._aio.submit(batch)
        if begun < len(batch):
            refused = [(slot, -1) for slot, *_ in batch[begun:]]
            threading.Thread(target=self._answer, args=(refused,), name=self._name, daemon=True).start()

    # -- the thread that waits --------------------------------------------------------------------

    def _wait(self) -> None:
        while True:
            ended = self._aio.ended(_IDLE)
            if ended:
                self._answer(ended)
                continue
            with self._changed:
                if not self._begun or self._closed:
                    self._thread = None
                    self._arena.shrink()
                    return

    def _answer(self, ended: list[tuple[int, int]]) -> None:
        """Answer reads that have ended: (slot, bytes read or negative errno) of each; others begin in their place."""
        with self._changed:
            found = [(slot, result, *self._begun.pop(slot)) for slot, result in ended]
            if self._line:
                self._begin_locked()
        answers: list[Buffer] = []
        others: list[Request] = []
        for slot, result, request, place in found:
            _, _, cookie, offset, length = request
            place.release(length if result == length else 0)
            if result == length:
                start = slot * DIRECT_LIMIT
                answers.append(self._replies.data_chunk(cookie, offset, offset, length, last=True))
                answers.append(self._arena.view[start : start + length])
            else:
                others.append(request)
        try:
            if answers:
                self._link.send(answers)
            for request in others:
                self._otherwise(request)
        except OSError:
            pass  # the connection is gone; the receiving thread finds out as well
        with self._changed:
            self._free += [slot for slot, *_ in found]
            self.pending -= len(found)
            if self._line:
                self._begin_locked()
            self._changed.notify_all()
