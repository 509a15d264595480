"""Progress of a job on the terminal, as lines for programs, and on request (SIGUSR1).

Shows the counters of :class:`byre.jobs.job.Control`; the job itself knows nothing of it. rich is imported only
where there is a terminal to draw on.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections import deque
from time import monotonic
from typing import TYPE_CHECKING, Final, Protocol

from ..io.workers import spawn

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType, TracebackType

    from ..jobs.job import Control

__all__ = ["Display", "mode_for"]

_PERIOD: Final = 0.1
_JSON_PERIOD: Final = 1.0
"""Seconds between JSON lines; so a line comes even where nothing moves."""


def mode_for(wanted: bool, kind: str, quiet: bool) -> str:
    """ "none", "bar", "text" (as qemu-img prints it) or "json".

    :param wanted: ``-p`` was given
    :param kind: the argument of ``--progress``, "" without one
    """
    if quiet:
        return "none"
    if kind:
        return kind
    if not wanted:
        return "none"
    from .common import as_peer

    return "bar" if sys.stdout.isatty() and not as_peer() else "text"


class _Printer(Protocol):
    def update(self, final: bool) -> None: ...
    def close(self) -> None: ...


class Display:
    """Shows a job's counters while the block runs; at its end once more, if nothing failed.

    :param mode: as :func:`mode_for` says
    :param least: percents between two prints of the "text" mode
    :param closing: the "text" mode says at the end that all is done, also where the last step has said so
    """

    def __init__(self, control: Control, job: str, mode: str, *, least: float = 1.0, closing: bool = True) -> None:
        self._control = control
        self._stopped = False
        #: There is a step to show, or nothing more.
        self._news = threading.Event()
        self._thread: threading.Thread | None = None
        self._before: object = None
        self._printer: _Printer | None = None
        if mode == "bar":
            self._printer = _Bar(control, job)
        elif mode == "text":
            self._printer = _Text(control, least, closing, self._news.set)
        elif mode == "json":
            self._printer = _Json(control, job)

    def __enter__(self) -> Display:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGUSR1, self._asked)
        if self._printer is not None:
            self._printer.update(False)
            self._thread = spawn(self._loop, "progress")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:  # fmt: skip
        self._stopped = True
        self._news.set()
        if self._thread is not None:
            self._thread.join()
        if self._printer is not None:
            if kind is None:
                self._printer.update(True)
            self._printer.close()
        if self._before is not None:
            signal.signal(signal.SIGUSR1, self._before)  # type: ignore[arg-type]

    def _loop(self) -> None:
        assert self._printer is not None
        while not self._stopped:
            if self._news.wait(_PERIOD):
                self._news.clear()
            self._printer.update(False)

    def _asked(self, _number: int, _frame: FrameType | None) -> None:
        """SIGUSR1: a line on stderr, or on stdout among the others."""
        if isinstance(self._printer, _Text):
            self._printer.force()
        elif self._printer is None:
            sys.stderr.write(f"    ({_percent(self._control):3.2f}/100%)\n")
            sys.stderr.flush()


def _percent(control: Control) -> float:
    total = control.total
    return 100.0 * min(control.done, total) / total if total else 0.0


class _Text:
    """``    (12.34/100%)`` and a carriage return, as qemu-img prints it: for each step that is longer than ``least``
    percent, at 100, and at the end.

    The job hands its steps over and goes on; they are printed as fast as whoever reads them takes them.
    """

    def __init__(self, control: Control, least: float, closing: bool, wake: Callable[[], None]) -> None:
        self._control = control
        self._least = least
        self._closing = closing
        self._wake = wake
        self._shown = -100.0
        self._steps: deque[float] = deque()
        control.tell_steps(least, self._step)

    def _step(self, percent: float) -> None:
        self._steps.append(percent)
        self._wake()

    def update(self, final: bool) -> None:
        while self._steps:
            self._show(self._steps.popleft())
        if final and self._closing:
            self.force(100.0)
        else:
            self._show(_percent(self._control))  # the total may have changed

    def _show(self, percent: float) -> None:
        if percent - self._shown > self._least or self._shown < percent == 100.0:
            self._shown = percent
            self.force(percent)

    def force(self, percent: float | None = None) -> None:
        sys.stdout.write(f"    ({_percent(self._control) if percent is None else percent:3.2f}/100%)\r")
        sys.stdout.flush()

    def close(self) -> None:
        sys.stdout.write("\n")
        sys.stdout.flush()


class _Json:
    """One JSON object per line on stdout: job, offset, total, rate (per second), eta (seconds or null)."""

    def __init__(self, control: Control, job: str) -> None:
        self._control = control
        self._job = job
        self._next = 0.0

    def update(self, final: bool) -> None:
        now = monotonic()
        if not final and now < self._next:
            return
        self._next = now + _JSON_PERIOD
        import json

        found = self._control.progress()
        eta = 0.0 if final else found.eta
        line = {"job": self._job, "offset": found.total if final else found.offset, "total": found.total,
                "rate": round(found.rate), "eta": None if eta is None else round(eta, 1)}  # fmt: skip
        sys.stdout.write(json.dumps(line) + "\n")
        sys.stdout.flush()

    def close(self) -> None:
        pass


class _Bar:
    """A bar with bytes, rate and time left."""

    def __init__(self, control: Control, job: str) -> None:
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            Progress,
            TaskProgressColumn,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )

        self._control = control
        self._progress = Progress(TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(),
                                  DownloadColumn(binary_units=True), TransferSpeedColumn(),
                                  TimeRemainingColumn(), auto_refresh=False)  # fmt: skip
        self._task = self._progress.add_task(job, total=None)
        self._progress.start()

    def update(self, final: bool) -> None:
        total = self._control.total
        done = total if final else min(self._control.done, total)
        self._progress.update(self._task, total=total or None, completed=done, refresh=True)

    def close(self) -> None:
        self._progress.stop()
