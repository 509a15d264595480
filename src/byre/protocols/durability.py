"""Flushing a file: only when something changed, and never again trusted once it failed."""

from __future__ import annotations

import errno
import os
import threading
from time import perf_counter_ns

from ..errors import OutOfService, from_oserror
from ..graph.node import Stats
from ..typing import Final

__all__ = ["FlushState", "start_write_back"]

_CHANGES: Final = (Stats.WRITE, Stats.ZEROES, Stats.DISCARD)
_SYNC_FILE_RANGE_WRITE: Final = 2


def start_write_back(fd: int) -> None:
    """Have the system begin to write what it holds back of a file, without waiting; nothing where it cannot.

    Says nothing about durability: errors are left for the flush.
    """
    import ctypes

    function = getattr(ctypes.CDLL(None), "sync_file_range", None)
    if function is not None:
        function.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
        function(fd, 0, 0, _SYNC_FILE_RANGE_WRITE)


class FlushState:
    """What of a node's changes is known to be on the disk.

    Guarded by its lock: all attributes. It is held during the system call, which reports a failure to one caller
    only: two at once, and the other would be told that all is well. Who waits mostly finds its work done.

    :param stats: of the node; they count every change before the request that made it returns
    """

    __slots__ = ("_failure", "_fd", "_flushed", "_lock", "_other_changes", "_stats", "_where")

    def __init__(self, stats: Stats, where: str, fd: int) -> None:
        self._stats = stats
        self._fd = fd
        self._where = where
        self._lock = threading.Lock()
        self._other_changes = 0
        self._flushed = 0
        self._failure = ""

    def changed(self) -> None:
        """Something changed that statistics do not count; called with requests that change the length held back."""
        self._other_changes += 1

    def move(self, fd: int) -> None:
        """From now on the file is open as ``fd`` (-1: closed); no flush is under way through the descriptor before.

        Not every flush is a request that a change of the graph waits for: jobs flush ahead of one.
        """
        with self._lock:
            self._fd = fd

    def _count(self) -> int:
        """Grows with every change, failed ones included."""
        done, failed = self._stats.operation_count, self._stats.failed_count
        return self._other_changes + sum(done[kind] + failed[kind] for kind in _CHANGES)

    def flush(self) -> None:
        """:raises IOFailure: this flush failed, or one before: what was written since the last good one may be lost"""
        with self._lock:
            self._check_locked()
            count = self._count()
            if count == self._flushed:
                return
            started = perf_counter_ns()
            try:
                os.fdatasync(self._fd)
            except OSError as error:
                # The system may have marked the pages clean: a later flush that succeeds would prove nothing.
                self._failure = os.strerror(error.errno or errno.EIO)
                self._stats.failed(Stats.FLUSH)
                raise from_oserror(error, "cannot flush", self._where) from None
            self._flushed = count
        self._stats.done(Stats.FLUSH, 0, started)

    def _check_locked(self) -> None:
        if self._failure:
            raise OutOfService(
                f"an earlier flush failed ({self._failure}), so data written before it may be lost",
                where=self._where,
                hint="close the file and check what it holds",
            )
