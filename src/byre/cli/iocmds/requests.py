"""Requests that run beside the shell: one thread each, their results printed by the shell's own thread.

A request may be held at a breakpoint, or wait for one that is; the shell goes on meanwhile. Nothing
here waits for ever: when all that is left stands at a breakpoint, waiting ends with an error.
"""

from __future__ import annotations

import threading
from collections import deque
from time import monotonic, perf_counter

from ...errors import Busy
from ...typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Request", "Requests"]


class Request:
    """One request.

    :ivar error: what it failed with; ``None`` while it runs and after success
    :ivar seconds: how long it took
    """

    def __init__(self, action: Callable[[], None], completed: Callable[[Request], None]) -> None:
        self.action = action
        self.completed = completed
        self.error: BaseException | None = None
        self.seconds = 0.0
        self.finished = False
        self.started = perf_counter()


class Requests:
    """All requests of one shell.

    Guarded by ``_changed``: ``_running``, ``_finished``, ``_count``. ``watch`` and the ``completed``
    functions are called by the shell's thread only.

    :param watch: looks at the breakpoints; true if a request is held at one now
    """

    LIMIT: Final = 64
    """Requests in flight at once; one more waits for another to end."""
    HEAD_START: Final = 0.02
    """Seconds a new request has before the shell goes on, so that requests begin in the order they were typed."""
    TICK: Final = 0.002
    """Seconds between looks at a breakpoint that is waited for."""
    PATIENCE: Final = 1.0
    """Seconds without progress after which waiting for a request held at a breakpoint is given up."""

    def __init__(self, watch: Callable[[], bool]) -> None:
        self._watch = watch
        self._changed = threading.Condition()
        self._running = 0
        self._count = 0
        self._finished: deque[Request] = deque()

    @property
    def running(self) -> int:
        with self._changed:
            return self._running

    def start(self, action: Callable[[], None], completed: Callable[[Request], None]) -> Request:
        """Run ``action`` in a thread; ``completed`` is called later, by :meth:`reap`.

        :raises Busy: too many requests are held at breakpoints
        """
        if self.running >= self.LIMIT:
            self._wait(lambda: self._running < self.LIMIT)
        request = Request(action, completed)
        with self._changed:
            self._running += 1
        threading.Thread(target=self._work, args=(request,), daemon=True).start()
        return request

    def _work(self, request: Request) -> None:
        request.started = perf_counter()
        try:
            request.action()
        except BaseException as error:
            request.error = error
        request.seconds = perf_counter() - request.started
        with self._changed:
            request.finished = True
            self._running -= 1
            self._count += 1
            self._finished.append(request)
            self._changed.notify_all()

    def reap(self) -> None:
        """Report what has ended, in the order it did."""
        while True:
            with self._changed:
                if not self._finished:
                    return
                request = self._finished.popleft()
            request.completed(request)

    def settle(self, request: Request | None = None) -> None:
        """Let requests run until all have ended, or none has for the time of a head start.

        :param request: stop waiting as soon as this one has ended
        """
        with self._changed:
            while self._running and not (request and request.finished):
                before = self._count
                self._changed.wait(self.HEAD_START)
                if self._count == before:
                    break
        self._watch()

    def wait(self, request: Request) -> None:
        """Wait for one request.

        :raises Busy: it cannot end, because requests are held at breakpoints
        """
        self._wait(lambda: request.finished)

    def drain(self) -> None:
        """Wait for all requests and report them.

        :raises Busy: some cannot end, because they are held at breakpoints; the others are reported
        """
        try:
            self._wait(lambda: not self._running)
        finally:
            self.reap()

    def until(self, condition: Callable[[], bool]) -> bool:
        """Wait until ``condition``; false if it will not come true, as all requests have ended or are held."""
        try:
            self._wait(lambda: not self._running, condition)
        except Busy:
            return False
        return condition()

    def _wait(self, over: Callable[[], bool], condition: Callable[[], bool] | None = None) -> None:
        """Wait until ``over`` (called under the lock) or ``condition`` (called without it).

        :raises Busy: there was no progress for a while, and a request is held
        """
        count, since = -1, monotonic()
        while condition is None or not condition():
            with self._changed:
                if over():
                    return
                self._changed.wait(self.HEAD_START if condition is None else self.TICK)
                if self._count != count:
                    count, since = self._count, monotonic()
                if over():
                    return
            if self._watch() and monotonic() - since > self.PATIENCE:
                raise Busy("requests are held at a breakpoint", hint="use resume first")
