"""The threads of one connection that carry out what would make the receiving thread wait."""

from __future__ import annotations

import threading
from collections import deque
from time import monotonic
from typing import TYPE_CHECKING, Final, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Flight", "Workers"]

Task = TypeVar("Task")
Tool = TypeVar("Tool")

_IDLE: Final = 5.0
"""Seconds after which a thread that has nothing to do ends."""


class Flight:
    """Counts the requests of one connection that others than the receiving thread carry out. Guarded by its lock.

    :param depth: how many may be under way or wait
    :ivar pending: how many do; may be read without the lock
    """

    def __init__(self, depth: int) -> None:
        self._depth = depth
        self._less = threading.Condition(threading.Lock())
        self.pending = 0

    def enter(self) -> None:
        """One more; waits until there is room."""
        with self._less:
            while self.pending >= self._depth:
                self._less.wait()
            self.pending += 1

    def leave(self, count: int = 1) -> None:
        with self._less:
            self.pending -= count
            self._less.notify_all()

    def wait(self, timeout: float) -> bool:
        """Wait until none is left; False if that took too long."""
        with self._less:
            return self._less.wait_for(lambda: not self.pending, timeout)


class Workers(Generic[Task, Tool]):
    """Starts threads when they are needed, and no more than ``count``.

    Guarded by its lock: everything.

    :param perform: carries out one task with its thread's tool; must not raise
    :param equip: makes the tool of a thread, which lives as long as the thread
    :param flight: counts the tasks that are under way or wait; :meth:`submit` waits for room in it
    """

    def __init__(
        self,
        perform: Callable[[Task, Tool], None],
        equip: Callable[[], Tool],
        flight: Flight,
        name: str,
        count: int = 4,
    ) -> None:
        self._perform = perform
        self._equip = equip
        self._flight = flight
        self._name = name
        self._count = count
        self._work = threading.Condition(threading.Lock())
        self._waiting: deque[Task] = deque()
        self._threads = 0
        self._idle = 0
        self._closed = False

    def submit(self, task: Task) -> None:
        self._flight.enter()
        with self._work:
            self._waiting.append(task)
            if self._idle:
                self._work.notify()
            if len(self._waiting) <= self._idle or self._threads >= self._count:
                return
            self._threads += 1
        try:
            threading.Thread(target=self._run, name=self._name, daemon=True).start()
        except RuntimeError:  # the system has no more threads: the task waits for one of ours, or is done here
            with self._work:
                self._threads -= 1
                mine = self._waiting.pop() if not self._threads and self._waiting else None
            if mine is not None:
                self._finish(mine, self._equip())

    def _run(self) -> None:
        tool = self._equip()
        while True:
            with self._work:
                if not self._waiting and not self._wait():
                    self._threads -= 1
                    return
                task = self._waiting.popleft()
            self._finish(task, tool)

    def _wait(self) -> bool:
        """Wait for a task, lock held; False if none came for a while."""
        until = monotonic() + _IDLE
        while not self._waiting:
            if self._closed:
                return False
            self._idle += 1
            told = self._work.wait(max(until - monotonic(), 0))
            self._idle -= 1
            if not told and not self._waiting:
                return False
        return True

    def _finish(self, task: Task, tool: Tool) -> None:
        try:
            self._perform(task, tool)
        finally:
            self._flight.leave()

    def close(self) -> None:
        """No task follows: threads end when they have nothing left to do."""
        with self._work:
            self._closed = True
            self._work.notify_all()

    def drop(self) -> list[Task]:
        """Take back the tasks that nobody has begun."""
        with self._work:
            dropped = list(self._waiting)
            self._waiting.clear()
        self._flight.leave(len(dropped))
        return dropped
