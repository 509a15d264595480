"""Pace: how fast a disk is written to, and how fast a job that follows it copies; whether it will ever catch up."""

from __future__ import annotations

import math
import threading
from time import monotonic
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from ..bitmaps.bitmap import Bitmap
    from .control import Control

__all__ = ["Pace"]

_MEMORY: Final = 1.0
"""Seconds that count most."""
_LEAST_TIME: Final = 1e-4


class Pace:
    """Counts what becomes dirty and what is copied. Thread-safe; guarded by its lock, a leaf: everything.

    What becomes dirty is counted all the time, for writers do not wait for sweeps; what is copied while there is
    something to copy and the job is not paused.

    :param dirty: what still has to be copied; what is being copied is not in it
    """

    def __init__(self, dirty: Bitmap, control: Control) -> None:
        self._dirty = dirty
        self._control = control
        self._lock = threading.Lock()
        self._in_flight = 0
        self._copied = 0
        self._arrived = 0
        self._since = monotonic()
        self._sweep: tuple[int, float] | None = None
        self._rate_in = _Rate()
        self._rate_out = _Rate()

    @property
    def left(self) -> int:
        """Bytes that are dirty, or being copied."""
        with self._lock:
            return self._dirty.dirty_bytes + self._in_flight

    def begin(self, size: int) -> None:
        """So many bytes, not dirty any more, are being copied; to be ended with :meth:`end`."""
        with self._lock:
            self._in_flight += size

    def end(self, size: int, *, copied: bool) -> None:
        with self._lock:
            self._in_flight -= size
            self._copied += size if copied else 0

    # -- rates ------------------------------------------------------------------------------------

    def start(self) -> None:
        """What is dirty by now was not written meanwhile."""
        with self._lock:
            self._arrived, self._since = self._arrivals(), monotonic()

    def begin_sweep(self) -> None:
        with self._lock:
            self._sweep = self._copied, self._working_time()

    def end_sweep(self) -> None:
        with self._lock:
            arrived, now = self._arrivals(), monotonic()
            self._rate_in.add(arrived - self._arrived, now - self._since)
            self._arrived, self._since = arrived, now
            if self._sweep is not None:
                copied, started = self._sweep
                if self._copied > copied:
                    self._rate_out.add(self._copied - copied, self._working_time() - started)
                self._sweep = None

    def rates(self) -> tuple[float, float]:
        """Bytes per second that become dirty, and that are copied while there is something to copy.

        Of the last sweeps; a sweep may take hours, so of one that takes long as far as it is.
        """
        with self._lock:
            came, went = self._rate_in.value, self._rate_out.value
            seconds = monotonic() - self._since
            if seconds > _MEMORY:
                came = max(0, self._arrivals() - self._arrived) / seconds
            if self._sweep is not None:
                copied, started = self._sweep
                seconds = self._working_time() - started
                if seconds > _MEMORY or not went:
                    went = (self._copied - copied) / max(seconds, _LEAST_TIME)
            return came, went

    def _arrivals(self) -> int:
        """Bytes that ever became dirty."""
        return self._dirty.dirty_bytes + self._in_flight + self._copied

    def _working_time(self) -> float:
        """Seconds; stands still while the job is paused."""
        return monotonic() - self._control.rested


class _Rate:
    """Units per second over about the last second, or as long as there was."""

    def __init__(self) -> None:
        self._sum = 0.0
        self._weight = 0.0

    def add(self, count: int, seconds: float) -> None:
        seconds = max(seconds, _LEAST_TIME)
        share = 1.0 - math.exp(-seconds / _MEMORY)
        self._sum += share * (max(0, count) / seconds - self._sum)
        self._weight += share * (1.0 - self._weight)

    @property
    def value(self) -> float:
        return self._sum / self._weight if self._weight else 0.0
