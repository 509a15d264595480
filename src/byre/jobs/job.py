"""Job: everything that takes longer than one request.

A job's ``run(control)`` is plain code. It calls ``control.advance(n)``, which counts, and is also where the job
pauses, is cancelled and keeps to its speed. The command line runs jobs in its own thread (``execute``), the
monitor on another one (``start``); a progress bar and the monitor read the same counters.

Which state follows which and which verb is legal when is data: ``jobs/states.py``.
"""

from __future__ import annotations

import threading
from collections import deque
from time import monotonic
from typing import TYPE_CHECKING, Final, NamedTuple

from ..errors import Cancelled, InvalidArgument, NoSpace
from .errors_policy import IGNORE, REPORT, RETRY, STOP, decide
from .states import FINISHED, State, check_transition, check_verb

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..errors import ByreError
    from .registry import JobRegistry
    from .transaction import Transaction

__all__ = ["Control", "Job", "Progress"]

_SLICE: Final = 0.1
"""Seconds of work that a limited job may do at once."""

_RATE_WINDOW: Final = 5.0


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
        self._total = total
        self._speed = speed
        self._busy_until = 0.0
        self._pauses = 0
        self._resting = 0
        self._cancelled = False
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
            if self._speed:
                self._spend(count if moved is None else moved, now)

    def _spend(self, moved: int, now: float) -> None:
        """Wait until ``moved`` bytes fit the speed; called with the lock held, which the waiting gives up."""
        self._busy_until = max(self._busy_until, now - _SLICE) + moved / self._speed
        while self._speed and not self._cancelled:
            delay = self._busy_until - monotonic()
            if delay <= 0:
                return
            self._changed.wait(min(delay, 1.0))
        if self._cancelled:
            raise Cancelled("the job was cancelled")

    def checkpoint(self) -> None:
        """A place where nothing is in flight: pauses and cancellations happen here.

        :raises Cancelled: the job was cancelled
        """
        with self._lock:
            if self._cancelled:
                raise Cancelled("the job was cancelled")
            if not self._pauses:
                return
            self._resting += 1
        self._tell_pause()
        with self._lock:
            while self._pauses and not self._cancelled:
                self._changed.wait()
            cancelled = self._cancelled
            self._resting -= 1
        self._tell_pause()
        if cancelled:
            raise Cancelled("the job was cancelled")

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

    def wait(self, seconds: float) -> None:
        """Sleep; a verb on the job ends it early. A pause point.

        :raises Cancelled: the job was cancelled
        """
        end = monotonic() + seconds
        with self._lock:
            while not (self._pauses or self._cancelled or self._completing):
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

    # -- for those who watch ----------------------------------------------------------------------

    def progress(self) -> Progress:
        """The counters now."""
        now = monotonic()
        with self._lock:
            done, total = self.done, self._total
            while len(self._samples) > 2 and now - self._samples[1][0] > _RATE_WINDOW:
                self._samples.popleft()
            first = self._samples[0] if self._samples else (now, done)
        elapsed = now - first[0]
        rate = (done - first[1]) / elapsed if elapsed > 0.05 else 0.0
        eta = (total - done) / rate if rate > 0 and total else None
        return Progress(done, total, rate, eta)

    # -- for those who steer ----------------------------------------------------------------------

    @property
    def speed(self) -> int:
        """Bytes per second, 0 for no limit."""
        return self._speed

    def set_speed(self, speed: int) -> None:
        """:raises InvalidArgument: negative"""
        if speed < 0:
            raise InvalidArgument(f"speed is {speed}: expected bytes per second, or 0 for no limit")
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

    def complete(self) -> None:
        with self._lock:
            self._completing = True
            self._changed.notify_all()

    @property
    def cancelled(self) -> bool:
        return self._cancelled


class Job:
    """One long operation. Subclasses write :meth:`run` and, where the graph changes at the end, the four hooks.

    Guarded by the job's lock, a leaf (never held while anything is called): ``state``, ``error``.

    :ivar kind: "convert", "mirror", ... as QMP's ``JobType``
    :ivar on_change: called as ``on_change(job, state)`` after each change of state, with no lock held
    :ivar on_error_event: called as ``on_error_event(job, operation, action, error)`` when a request of the job failed
        and a policy handled it; operation is "read" or "write", action "report", "ignore" or "stop"
    :ivar io_status: "ok"; "failed" or "nospace" while the job is stopped by an error
    :ivar soft_cancelled: cancelled while READY without force: finished early, but not failed
    """

    kind = ""

    def __init__(self, *, id: str = "", speed: int = 0, auto_finalize: bool = True, auto_dismiss: bool = True,
                 measure: bool = False) -> None:  # fmt: skip
        self.id = id or self.kind
        self.auto_finalize = auto_finalize
        self.auto_dismiss = auto_dismiss
        self.control = Control(speed=speed, measure=measure)
        self.control._on_pause = self._paused
        self.control._on_ready = self._ready
        self.control._on_stop = self._stopped
        self.control.on_error_event = self._error_handled
        self.on_error_event: Callable[[Job, str, str, ByreError], None] | None = None
        self.io_status = "ok"
        self._registry: JobRegistry | None = None
        self._transaction: Transaction | None = None
        self.on_change: Callable[[Job, State], None] | None = None
        self.error: BaseException | None = None
        self.soft_cancelled = False
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._state = State.CREATED
        self._finalize = False
        self._user_paused = False
        self._thread: threading.Thread | None = None

    # -- what a job is made of --------------------------------------------------------------------

    def run(self, control: Control) -> None:
        """The work. Returns when it is done, raises when it failed."""
        raise NotImplementedError

    def prepare(self) -> None:
        """Before finalizing: may still fail."""

    def commit(self) -> None:
        """All is well: make the result visible. Must not fail."""

    def abort(self) -> None:
        """Failed or cancelled: undo. Must not fail."""

    def clean(self) -> None:
        """Either way: let go."""

    # -- running ----------------------------------------------------------------------------------

    @property
    def state(self) -> State:
        return self._state

    def execute(self) -> None:
        """Run in this thread to the end.

        :raises BaseException: what :meth:`run` or :meth:`prepare` raised
        """
        self._main()
        if self.error is not None:
            raise self.error

    def start(self) -> None:
        """Run on a thread of its own; the result is in :attr:`error` once :meth:`join` returned.

        :raises InvalidArgument: started already
        """
        from ..io.workers import spawn

        with self._lock:
            if self._thread is not None or self._state is not State.CREATED:
                raise InvalidArgument(f"job {self.id!r} was started already")
            self._thread = spawn(self._main, f"job {self.id}")

    def join(self, timeout: float | None = None) -> bool:
        """Wait for the end (for PENDING jobs: someone must finalize them); False if ``timeout`` seconds passed."""
        with self._lock:
            done = self._changed.wait_for(lambda: self._state in FINISHED, timeout)
        if done and self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()
        return done

    def _main(self) -> None:
        try:
            self._move(State.RUNNING)
            if self._transaction is not None:
                self._transaction.await_all(self, "start")
            self.control.checkpoint()
            self.run(self.control)
            self._move(State.WAITING)
            if self._transaction is not None:
                self._transaction.await_all(self, "run")
            self._move(State.PENDING)
            self._await_finalize()
            self.prepare()
            if self._transaction is not None:
                self._transaction.await_all(self, "prepare")
        except BaseException as error:
            if self._transaction is not None:
                self._transaction.fail(self)
            self._end_failed(error)
        else:
            self._end_well()
        if self.auto_dismiss:
            self._move(State.NULL)

    def _end_well(self) -> None:
        self._finish(self.commit, self.clean)

    def _end_failed(self, error: BaseException) -> None:
        self.error = error
        self._move(State.ABORTING)
        self._finish(self.abort, self.clean)

    def _finish(self, *steps: Callable[[], None]) -> None:
        """The last hooks must not fail; if one does all the same, the others are called and the job ends."""
        for step in steps:
            try:
                step()
            except BaseException as error:
                self.error = self.error or error
        self._move(State.CONCLUDED)

    def _await_finalize(self) -> None:
        jobs = (self,) if self._transaction is None else self._transaction.jobs
        if all(job.auto_finalize for job in jobs):
            return
        with self._lock:
            self._changed.wait_for(lambda: self._finalize or self.control.cancelled)
        if self.control.cancelled:
            raise Cancelled("the job was cancelled")

    def _move(self, after: State) -> None:
        with self._lock:
            check_transition(self.id, self._state, after)
            self._state = after
            self._changed.notify_all()
        if after is State.NULL and self._registry is not None:
            self._registry.forget(self)
        if self.on_change is not None:
            self.on_change(self, after)

    def _stopped(self, error: ByreError) -> None:
        """Pause as the user would, so that the user can resume."""
        with self._lock:
            if self.io_status == "ok":
                self.io_status = "nospace" if isinstance(error, NoSpace) else "failed"
            if self._user_paused:
                return
            self._user_paused = True
        self.control.pause()

    def _error_handled(self, error: ByreError, source: bool, action: str) -> None:
        if self.on_error_event is not None:
            self.on_error_event(self, "read" if source else "write", action, error)

    def _paused(self, paused: bool) -> None:
        if paused:
            self._move(State.STANDBY if self._state is State.READY else State.PAUSED)
        else:
            self._move(State.READY if self._state is State.STANDBY else State.RUNNING)

    def _ready(self) -> None:
        self._move(State.READY)

    # -- verbs ------------------------------------------------------------------------------------

    def _check(self, verb: str) -> None:
        check_verb(self.id, verb, self._state)

    def pause(self) -> None:
        """Stop at the next checkpoint, until :meth:`resume`.

        :raises Busy: not in this state
        :raises InvalidArgument: the user paused it already
        """
        with self._lock:
            self._check("pause")
            if self._user_paused:
                raise InvalidArgument(f"job {self.id!r} is paused already")
            self._user_paused = True
        self.control.pause()

    def resume(self) -> None:
        """:raises InvalidArgument: it is not paused"""
        with self._lock:
            self._check("resume")
            if not self._user_paused:
                raise InvalidArgument(f"job {self.id!r} is not paused")
            self._user_paused = False
            self.io_status = "ok"
        self.control.resume()

    def cancel(self, *, force: bool = False) -> None:
        """End without a result. A READY job is only told to finish early, unless ``force``."""
        with self._lock:
            self._check("cancel")
            state = self._state
            soft = not force and state in (State.READY, State.STANDBY)
            self.soft_cancelled = self.soft_cancelled or soft
        if soft:
            self.control.complete()
            return
        self.control.cancel()
        with self._lock:
            self._changed.notify_all()
        if state is State.CREATED and self._thread is None:
            self._main()

    def complete(self) -> None:
        """A READY job: finish and take effect."""
        with self._lock:
            self._check("complete")
        self.control.complete()

    def finalize(self) -> None:
        """A PENDING job: take effect; with it all jobs of its transaction."""
        with self._lock:
            self._check("finalize")
        for job in (self,) if self._transaction is None else self._transaction.jobs:
            job._let_finalize()

    def _let_finalize(self) -> None:
        with self._lock:
            self._finalize = True
            self._changed.notify_all()

    def dismiss(self) -> None:
        """A CONCLUDED job: forget it."""
        with self._lock:
            self._check("dismiss")
        self._move(State.NULL)

    def set_speed(self, speed: int) -> None:
        """:param speed: bytes per second, 0 for no limit"""
        with self._lock:
            self._check("set-speed")
        self.control.set_speed(speed)

    def progress(self) -> Progress:
        return self.control.progress()
