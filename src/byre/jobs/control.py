"""Control: what a running job holds on to: it counts, paces, pauses, is cancelled, and asks what to do about errors.

Usable alone, where nobody wants to steer. States and verbs are the job's (:mod:`.job`).
"""

from __future__ import annotations

import sys
import threading
from collections import deque
from time import monotonic
from typing import TYPE_CHECKING, Final, NamedTuple

from ..errors import Cancelled, InvalidArgument
from .errors_policy import IGNORE, REPORT, RETRY, STOP, decide

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..errors import ByreError

__all__ = ["Control", "Progress"]

_SLICE: Final = 0.1
"""Seconds of work that a limited job may do at once."""

_RATE_WINDOW: Final = 5.0
_PIECE: Final = 0.25
"""Seconds that a piece of the work may take where the speed is low."""


class Progress(NamedTuple):
    """How far a job is.

    :ivar offset: done so far, in the job's unit (bytes, for most)
    :ivar total: all there is to do; 0 while unknown
    :ivar rate: units per second over the last seconds
    :ivar eta: seconds left, ``None`` while unknown
    """

    offset: int
    total: int
    rate: float
    eta: float | None

    @property
    def percent(self) -> float:
        return 100.0 * min(self.offset, self.total) / self.total if self.total else 0.0


class Control:
    """What a running job holds on to; usable alone, where nobody wants to pause or cancel.

    Guarded by its own lock, a leaf: ``done``, ``total``, requests to pause and cancel, the speed. ``attention``
    is a hint that may be read without it.

    :ivar measure: somebody watches: a job may spend time on finding its exact total first
    :ivar attention: a pause or a cancellation is waiting at the next :meth:`checkpoint`
    """

    def __init__(self, total: int = 0, *, speed: int = 0, measure: bool = False) -> None:
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self.measure = measure
        #: Called after each :meth:`advance`, by the thread that does the work.
        self.on_advance: Callable[[], None] | None = None
        self.attention = False
        self.done = 0
        self._rested = 0.0
        self._rest_began = 0.0
        self._total = total
        self._tell_step: Callable[[float], None] | None = None
        self._step = 0.0
        self._stepped = 0.0
        self._next_step = 0
        self._speed = _checked(speed)
        self._busy_until = 0.0
        self._pauses = 0
        self._resting = 0
        self._cancelled = False
        self._abandoned = False
        self._completing = False
        self._samples: deque[tuple[float, int]] = deque(maxlen=64)
        self._on_pause: Callable[[bool], None] | None = None
        self._pause_lock = threading.Lock()
        self._told_pause = False
        #: Called as ``on_stop(error)`` before the job pauses for an error; without it nobody could resume.
        self._on_stop: Callable[[ByreError], None] | None = None
        #: Called as ``on_error_event(error, is_source, action)`` for each error that a policy handled.
        self.on_error_event: Callable[[ByreError, bool, str], None] | None = None
        self._on_ready: Callable[[], None] | None = None

    # -- for the job's own code -------------------------------------------------------------------

    @property
    def total(self) -> int:
        return self._total

    @total.setter
    def total(self, value: int) -> None:
        with self._lock:
            self._total = value
            self._plan_step()

    def advance(self, count: int, moved: int | None = None) -> None:
        """``count`` more is done; pause, cancel and keep to the speed here.

        :param moved: bytes that count against the speed limit; ``count`` if left out
        :raises Cancelled: the job was cancelled
        """
        self.count(count, moved)
        if self.on_advance is not None:
            self.on_advance()
        if self.attention:
            self.checkpoint()

    def count(self, count: int, moved: int | None = None) -> None:
        """As :meth:`advance`, but without pausing: for threads that hold up others of the same job.

        :raises Cancelled: while waiting for the speed limit
        """
        now = monotonic()
        with self._lock:
            self.done += count
            if not self._samples or now - self._samples[-1][0] >= 0.1:
                self._samples.append((now, self.done))
            if self._tell_step is not None and self.done >= self._next_step:
                self._take_step(self._tell_step)
            if self._speed:
                self._spend(count if moved is None else moved, now)

    def _spend(self, moved: int, now: float) -> None:
        """Wait until ``moved`` bytes fit the speed; called with the lock held, which the waiting gives up.

        Who wants the job to pause need not wait for that: what was moved too early is made up for afterwards.
        """
        self._busy_until = max(self._busy_until, now - _SLICE) + moved / self._speed
        while self._speed and not self._cancelled and not self._abandoned and not self._pauses:
            delay = self._busy_until - monotonic()
            if delay <= 0:
                return
            self._changed.wait(min(delay, 1.0))
        self._check()

    def _check(self) -> None:
        if self._cancelled or self._abandoned:
            raise Cancelled("the job was cancelled")

    def checkpoint(self) -> None:
        """A place where nothing is in flight: pauses and cancellations happen here.

        :raises Cancelled: the job was cancelled
        """
        with self._lock:
            self._check()
            if not self._pauses:
                return
            if not self._resting:
                self._rest_began = monotonic()
            self._resting += 1
        self._tell_pause()
        try:
            with self._lock:
                while self._pauses and not self._cancelled and not self._abandoned:
                    self._changed.wait()
        finally:
            with self._lock:
                self._resting -= 1
                if not self._resting:
                    self._rested += monotonic() - self._rest_began
            self._tell_pause()
        self._check()

    def _tell_pause(self) -> None:
        """Several threads may rest at once: what is told is whether any does, each change once."""
        with self._pause_lock:
            resting = self._resting > 0
            if self._on_pause is not None and resting != self._told_pause:
                self._told_pause = resting
                self._on_pause(resting)

    def on_error(self, error: ByreError, policy: str = "report", *, source: bool) -> str:
        """What to do about a request that failed, by a policy of :mod:`byre.jobs.errors_policy`.

        ``stop`` waits here until the job is resumed. Called by any thread of the job.

        :param source: reading failed; else writing to the target
        :returns: RETRY, or IGNORE where the policy says so
        :raises ByreError: ``error``, where it is to be reported, or nobody is there who could resume
        :raises Cancelled: while stopped
        """
        action = decide(error, policy)
        if action == STOP and self._on_stop is None:
            action = REPORT
        if self.on_error_event is not None:
            self.on_error_event(error, source, action)
        if action == IGNORE:
            return IGNORE
        if action == REPORT or self._on_stop is None:
            raise error
        self._on_stop(error)
        self.checkpoint()
        return RETRY

    def wait(self, seconds: float, *, completing: bool = False) -> None:
        """Sleep; a verb on the job ends it early. A pause point.

        :param completing: that it was told to complete is no reason to hurry
        :raises Cancelled: the job was cancelled
        """
        end = monotonic() + seconds
        with self._lock:
            while not (self._pauses or self._cancelled or (self._completing and not completing)):
                left = end - monotonic()
                if left <= 0:
                    return
                self._changed.wait(left)
        self.checkpoint()

    def ready(self) -> None:
        """The first phase is over: the job goes on until :attr:`completing`."""
        if self._on_ready is not None:
            self._on_ready()

    @property
    def completing(self) -> bool:
        """The job was told to complete (or softly cancelled while ready): finish and return."""
        return self._completing

    def at_once(self, most: int, unit: int = 1) -> int:
        """Bytes to do in one piece: ``most``, or where the speed is low so many that progress, pauses and who waits
        for the piece need not wait for seconds. Cheap; the answer changes with the speed.

        :param unit: the least, bytes; less than ``most`` is a power of two times that
        """
        fitting = int(self._speed * _PIECE)
        if not self._speed or fitting >= most:
            return most
        return min(most, unit << max((fitting // unit).bit_length() - 1, 0))

    # -- for those who watch ----------------------------------------------------------------------

    @property
    def rested(self) -> float:
        """Seconds that the job was paused so far."""
        with self._lock:
            return self._rested + (monotonic() - self._rest_began if self._resting else 0.0)

    def tell_steps(self, percent: float, tell: Callable[[float], None]) -> None:
        """Have ``tell`` called with the percentage each time that more than ``percent`` more is done, and at 100.

        By the thread that does the work, and with the lock held: it must do next to nothing.
        """
        with self._lock:
            self._step, self._tell_step = percent, tell
            self._plan_step()

    def _plan_step(self) -> None:
        """Called with the lock held, as is the next."""
        after = int(self._total * (self._stepped + self._step) / 100) + 1
        self._next_step = min(after, self._total) if self._stepped < 100 else sys.maxsize

    def _take_step(self, tell: Callable[[float], None]) -> None:
        if self._total:
            self._stepped = 100.0 * min(self.done, self._total) / self._total
            self._plan_step()
            tell(self._stepped)

    def progress(self) -> Progress:
        """The counters now."""
        now = monotonic()
        with self._lock:
            done, total = self.done, self._total
            while len(self._samples) > 2 and now - self._samples[1][0] > _RATE_WINDOW:
                self._samples.popleft()
            first = self._samples[0] if self._samples else (now, done)
        elapsed = now - first[0]
        # What is done again, after an error, was counted before.
        rate = max(0, done - first[1]) / elapsed if elapsed > 0.05 else 0.0
        eta = (total - done) / rate if rate > 0 and total else None
        return Progress(done, total, rate, eta)

    # -- for those who steer ----------------------------------------------------------------------

    @property
    def speed(self) -> int:
        """Bytes per second, 0 for no limit."""
        return self._speed

    def set_speed(self, speed: int) -> None:
        """:raises InvalidArgument: negative"""
        _checked(speed)
        with self._lock:
            self._speed = speed
            self._busy_until = 0.0
            self._changed.notify_all()

    def pause(self) -> None:
        """Ask to stop at the next checkpoint; nests."""
        with self._lock:
            self._pauses += 1
            self.attention = True
            self._changed.notify_all()

    def resume(self) -> None:
        with self._lock:
            self._pauses = max(0, self._pauses - 1)
            self.attention = self._cancelled or self._pauses > 0
            self._changed.notify_all()

    def cancel(self) -> None:
        """Ask to end at the next checkpoint with :class:`Cancelled`."""
        with self._lock:
            self._cancelled = True
            self.attention = True
            self._changed.notify_all()

    def abandon(self) -> None:
        """Part of the work failed, so that the whole will: whoever waits for the speed or a resume is let go."""
        with self._lock:
            self._abandoned = True
            self._changed.notify_all()

    def complete(self) -> None:
        with self._lock:
            self._completing = True
            self._changed.notify_all()

    @property
    def cancelled(self) -> bool:
        return self._cancelled


def _checked(speed: int) -> int:
    """:raises InvalidArgument: negative"""
    if speed < 0:
        raise InvalidArgument(f"speed is {speed}: expected bytes per second, or 0 for no limit")
    return speed
