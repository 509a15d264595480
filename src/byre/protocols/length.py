"""Length of a file: kept without asking the system while several threads write, and set."""

from __future__ import annotations

import os
import threading

from ..errors import InvalidArgument, NotSupported
from ..io.buffers import zero_view
from ..typing import Final
from ..units import SECTOR
from .vectors import pwritev_all

__all__ = ["FileLength", "check_preallocation", "set_length"]

_FIRST_BLOCK: Final = 4096


class FileLength:
    """The current length, and a gate between writes that grow the file and calls that set its length.

    Setting a length (truncate) while another thread writes past it would cut what that thread wrote.
    A write within the length needs nothing; a growing one is bracketed by ``begin`` and ``end``.

    Guarded by its condition: all attributes; ``value`` may be read without it.

    :ivar value: bytes
    """

    __slots__ = ("_changed", "_growing", "_setting", "value")

    def __init__(self, value: int) -> None:
        self.value = value
        self._changed = threading.Condition(threading.Lock())
        self._growing = 0
        self._setting = False

    def begin(self) -> None:
        """A growing write starts."""
        with self._changed:
            while self._setting:
                self._changed.wait()
            self._growing += 1

    def end(self, length: int) -> None:
        """It is over; the file is at least ``length`` bytes long now."""
        with self._changed:
            if length > self.value:
                self.value = length
            self._growing -= 1
            if self._growing == 0:
                self._changed.notify_all()

    def setting(self) -> _Setting:
        """``with`` this nobody grows the file; the caller sets ``value``. Not to be entered by a growing write."""
        return _Setting(self)

    def begin_setting(self) -> None:
        """Wait until nobody grows the file or sets its length, and keep it so."""
        with self._changed:
            while self._setting or self._growing:
                self._changed.wait()
            self._setting = True

    def end_setting(self) -> None:
        with self._changed:
            self._setting = False
            self._changed.notify_all()


class _Setting:
    """A length is being set, from entry to exit."""

    __slots__ = ("_length",)

    def __init__(self, length: FileLength) -> None:
        self._length = length

    def __enter__(self) -> None:
        self._length.begin_setting()

    def __exit__(self, *_error: object) -> None:
        self._length.end_setting()


def check_preallocation(mode: str, before: int, after: int, where: str) -> None:
    """:raises ByreError: the mode is unknown here, or makes no sense for this change of size"""
    if mode not in ("off", "falloc", "full"):
        raise NotSupported(f"preallocation {mode!r} is not for files; they know off, falloc and full", where=where)
    if mode != "off" and after < before:
        raise InvalidArgument(f"preallocation {mode!r} makes no sense when a file shrinks", where=where)


def set_length(fd: int, before: int, after: int, preallocation: str) -> None:
    """Make the file behind ``fd`` ``after`` bytes long; a failed growth leaves the old length.

    An empty file gets its first block written: what direct I/O needs of addresses and lengths cannot be found out by
    reading a hole (see :func:`.descriptor.probe_direct`).

    :raises OSError: the system's
    """
    _set_length(fd, before, after, preallocation)
    if before == 0 and after and preallocation != "full":
        try:
            os.pwrite(fd, zero_view(_FIRST_BLOCK if after >= _FIRST_BLOCK else min(after, SECTOR)), 0)
        except OSError:
            pass  # only probing is the worse for it


def _set_length(fd: int, before: int, after: int, preallocation: str) -> None:
    if preallocation == "off" or after == before:
        os.ftruncate(fd, after)
        return
    try:
        if preallocation == "falloc":
            os.posix_fallocate(fd, before, after - before)
            return
        os.ftruncate(fd, after)
        step = 1 << 20
        for start in range(before, after, step):
            pwritev_all(fd, start, (zero_view(min(step, after - start)),))
        os.fdatasync(fd)
    except BaseException:
        os.ftruncate(fd, before)
        raise
