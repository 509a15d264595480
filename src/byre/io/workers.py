"""Workers: windows of work and the threads that take them. The core library starts threads only here.

:func:`run` is a pipeline of two steps. ``work`` runs on several threads at once (read, compress, compare);
``deliver`` takes the results, one at a time in the order of the items if asked (write). The calling thread is one
of the workers. Whoever finds the next result ready delivers it, so that no thread waits for a particular other.
"""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING, Final, Generic, Protocol, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

__all__ = ["Gate", "default_threads", "run", "spare_threads", "spawn"]

Item = TypeVar("Item")
Result = TypeVar("Result")

_NOTHING: Final = 0
_TAKE: Final = 1
_DELIVER: Final = 2


class Gate(Protocol):
    """Asked before each item is taken; :class:`byre.jobs.job.Control` is one."""

    attention: bool

    def checkpoint(self) -> None:
        """Called with nothing in flight while ``attention`` is set; may wait, may raise."""

    def abandon(self) -> None:
        """One thread failed: no other is to wait for anything any more."""


def default_threads() -> int:
    """2 to 4: reading and writing overlap even on one processor, and more than 4 gain nothing in one process."""
    return max(2, min(4, len(os.sched_getaffinity(0))))


def spare_threads() -> int:
    """One processor less than there are, 1 to 4: for bulk work in memory beside users who want short answers."""
    return max(1, min(4, len(os.sched_getaffinity(0)) - 1))


def spawn(target: Callable[[], None], name: str) -> threading.Thread:
    """A started thread that does not keep the program alive."""
    thread = threading.Thread(target=target, name=name, daemon=True)
    thread.start()
    return thread


def run(
    items: Iterable[Item],
    work: Callable[[Item], Result],
    deliver: Callable[[Item, Result], None],
    *,
    threads: int = 0,
    ahead: int = 0,
    in_order: bool = True,
    gate: Gate | None = None,
) -> None:
    """``work`` each of ``items`` on several threads and ``deliver`` the results.

    ``items`` is advanced by one thread at a time. With ``in_order`` results are delivered one at a time in the
    order of the items, and the error raised is the one of the earliest item that failed; without it each
    is delivered at once by the thread that worked it, several at a time.

    :param threads: the caller included; 0 for :func:`default_threads`
    :param ahead: items taken but not yet delivered, at most (the bound on buffers); 0 for ``threads`` + 1
    :param gate: where to pause, with nothing in flight
    :raises BaseException: the first error; the rest was stopped, and no thread is left
    """
    threads = threads or default_threads()
    pipeline = _Pipeline(items, work, deliver, max(ahead or threads + 1, 1), in_order, gate)
    others = [spawn(pipeline.loop, f"worker {index}") for index in range(1, threads)]
    try:
        pipeline.loop()
    finally:
        for thread in others:
            thread.join()
    if pipeline.error is not None:
        raise pipeline.error


class _Pipeline(Generic[Item, Result]):
    """The state the threads of one :func:`run` share.

    Guarded by ``_changed``: everything but ``work`` and ``deliver``. ``_iterator`` is used by the thread that set
    ``_taking``.
    """

    def __init__(
        self,
        items: Iterable[Item],
        work: Callable[[Item], Result],
        deliver: Callable[[Item, Result], None],
        ahead: int,
        in_order: bool,
        gate: Gate | None,
    ) -> None:
        self._iterator = iter(items)
        self._work = work
        self._deliver = deliver
        self._ahead = ahead
        self._in_order = in_order
        self._gate = gate
        self._changed = threading.Condition(threading.Lock())
        self._taking = False
        self._delivering = False
        self._exhausted = False
        self._taken = 0
        self._delivered = 0
        self._ready: dict[int, tuple[Item, Result | None, BaseException | None]] = {}
        self.error: BaseException | None = None

    def loop(self) -> None:
        """Take, work and deliver until there is nothing left or something failed."""
        try:
            while True:
                step = self._choose()
                if step == _DELIVER:
                    self._deliver_next()
                elif step == _TAKE:
                    self._take_one()
                else:
                    return
        except BaseException as error:
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        with self._changed:
            if self.error is None:
                self.error = error
            self._changed.notify_all()
        if self._gate is not None:
            self._gate.abandon()

    def _choose(self) -> int:
        with self._changed:
            while self.error is None:
                if self._in_order and not self._delivering and self._delivered in self._ready:
                    self._delivering = True
                    return _DELIVER
                outstanding = self._taken - self._delivered
                if not self._taking and not self._exhausted and outstanding < self._ahead:
                    self._taking = True
                    return _TAKE
                if self._exhausted and not outstanding:
                    self._changed.notify_all()
                    return _NOTHING
                self._changed.wait()
            return _NOTHING

    def _take_one(self) -> None:
        if self._gate is not None and self._gate.attention:
            self._pause(self._gate)
        try:
            item = next(self._iterator)
        except StopIteration:
            with self._changed:
                self._exhausted = True
                self._taking = False
                self._changed.notify_all()
            return
        with self._changed:
            index = self._taken
            self._taken += 1
            self._taking = False
            self._changed.notify_all()
        if self._in_order:
            self._work_in_order(index, item)
            return
        self._deliver(item, self._work(item))
        with self._changed:
            self._delivered += 1
            self._changed.notify_all()

    def _work_in_order(self, index: int, item: Item) -> None:
        result: Result | None = None
        error: BaseException | None = None
        try:
            result = self._work(item)
        except Exception as failed:
            error = failed
        with self._changed:
            self._ready[index] = (item, result, error)
            if index == self._delivered and not self._delivering:
                self._changed.notify_all()

    def _deliver_next(self) -> None:
        with self._changed:
            item, result, error = self._ready.pop(self._delivered)
        if error is not None:
            raise error
        self._deliver(item, result)  # type: ignore[arg-type]
        with self._changed:
            self._delivered += 1
            self._delivering = False
            self._changed.notify_all()

    def _pause(self, gate: Gate) -> None:
        """Wait until all that was taken is delivered, then let the gate decide.

        This thread has the right to take, so that nothing new begins; it delivers what the others leave.
        """
        while True:
            with self._changed:
                while True:
                    if self.error is not None or self._taken == self._delivered:
                        break
                    if self._in_order and not self._delivering and self._delivered in self._ready:
                        self._delivering = True
                        break
                    self._changed.wait()
                if self.error is not None or self._taken == self._delivered:
                    break
            self._deliver_next()
        if self.error is None:
            gate.checkpoint()
