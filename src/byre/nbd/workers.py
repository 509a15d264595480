"""The threads of one connection that carry out what would make the receiving thread wait."""

from __future__ import annotations

import threading
from collections import deque
from time import monotonic
from typing import TYPE_CHECKING, Final, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Workers"]

Task = TypeVar("Task")
Tool = TypeVar("Tool")

_IDLE: Final = 5.0
"""Seconds after which a thread that has nothing to do ends."""


class Workers(Generic[Task, Tool]):
    """Starts threads when they are needed, and no more than ``count``.

    Guarded by its lock: everything.

    :param perform: carries out one task with its thread's tool; must not raise
    :param equip: makes the tool of a thread, which lives as long as the thread
    :param depth: tasks that may be under way or wait; :meth:`submit` waits beyond
    """

    def __init__(self, perform: Callable[[Task, Tool], None], equip: Callable[[], Tool], name: str, *,
                 count: int = 4, depth: int = 16) -> None:  # fmt: skip
        self._perform = perform
        self._equip = equip
        self._name = name
        self._count = count
        self._depth = depth
        lock = threading.Lock()
        self._work = threading.Condition(lock)
        self._less = threading.Condition(lock)
        self._waiting: deque[Task] = deque()
        self._threads = 0
        self._idle = 0
        self.pending = 0

    def submit(self, task: Task) -> None:
        with self._work:
            while self.pending >= self._depth:
                self._less.wait()
            self.pending += 1
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
            with self._work:
                self.pending -= 1
                if self.pending == self._depth - 1 or not self.pending:
                    self._less.notify_all()

    def drop(self) -> list[Task]:
        """Take back the tasks that nobody has begun."""
        with self._work:
            dropped = list(self._waiting)
            self._waiting.clear()
            self.pending -= len(dropped)
            self._less.notify_all()
            return dropped

    def wait(self, timeout: float) -> bool:
        """Wait until no task is left; False if that took too long."""
        until = monotonic() + timeout
        with self._work:
            while self.pending:
                left = until - monotonic()
                if left <= 0:
                    return False
                self._less.wait(left)
        return True
