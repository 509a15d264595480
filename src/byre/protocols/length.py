"""Length of a file that several threads write, kept without asking the system each time."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["FileLength"]


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

    @contextmanager
    def setting(self) -> Iterator[None]:
        """Nobody grows the file inside; the caller sets ``value``. Not to be entered by a growing write."""
        with self._changed:
            while self._setting or self._growing:
                self._changed.wait()
            self._setting = True
        try:
            yield
        finally:
            with self._changed:
                self._setting = False
                self._changed.notify_all()
