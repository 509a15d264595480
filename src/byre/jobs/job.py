"""Job: everything that takes longer than one request.

A job's ``run(control)`` is plain code. It calls ``control.advance(n)``, which counts, and is also where the job
pauses, is cancelled and keeps to its speed. The command line runs jobs in its own thread (``execute``), the
monitor on another one (``start``); a progress bar and the monitor read the same counters.

Which state follows which and which verb is legal when is data: ``jobs/states.py``.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from ..errors import Cancelled, InvalidArgument, NoSpace
from .control import Control, Progress
from .states import FINISHED, State, check_transition, check_verb

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..errors import ByreError
    from .registry import JobRegistry
    from .transaction import Transaction

__all__ = ["Control", "Job", "Progress"]


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
