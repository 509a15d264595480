"""Transactions: several jobs that take effect together, or none does.

Each job runs on a thread of its own. A job that has done its work waits for the others; then all prepare, and only
when every one has is the first committed. If one fails or is cancelled, all the others are.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from ..errors import Busy, Cancelled, InvalidArgument
from .states import State

if TYPE_CHECKING:
    from collections.abc import Iterable

    from .job import Job

__all__ = ["Transaction", "start_all"]


class Transaction:
    """Grouped completion of ``jobs``, which have not been started.

    Guarded by its own lock, a leaf: who arrived where, and whether one failed.

    :ivar jobs: in the order given
    """

    def __init__(self, jobs: Iterable[Job]) -> None:
        self.jobs = tuple(jobs)
        self._changed = threading.Condition()
        self._arrived: dict[str, set[Job]] = {"start": set(), "run": set(), "prepare": set()}
        self._failed: Job | None = None
        for job in self.jobs:
            if job.state is not State.CREATED or job._transaction is not None:
                raise InvalidArgument(f"job {job.id!r} was started already, or is in another transaction")
        for job in self.jobs:
            job._transaction = self

    def await_all(self, job: Job, stage: str) -> None:
        """``job`` has reached the end of ``stage`` ("start", "run" or "prepare"); wait for the others.

        :raises Cancelled: one of them failed, or this one was cancelled
        """
        with self._changed:
            self._arrived[stage].add(job)
            self._changed.notify_all()
            while len(self._arrived[stage]) < len(self.jobs) and not self._failed and not job.control.cancelled:
                # Cancelling wakes the job's own condition, not this one.
                self._changed.wait(0.05)
            failed = self._failed
            if failed is None and len(self._arrived[stage]) == len(self.jobs):
                return
        if failed is None or failed is job:
            raise Cancelled("the job was cancelled")
        raise Cancelled(f"job {failed.id!r} of the same transaction failed")

    def fail(self, job: Job) -> None:
        """``job`` failed or was cancelled: so do the others."""
        with self._changed:
            if self._failed is not None:
                return
            self._failed = job
            self._changed.notify_all()
        for other in self.jobs:
            if other is not job:
                try:
                    other.cancel(force=True)
                except Busy:
                    pass  # it is about to end by itself


def start_all(jobs: Iterable[Job], *, grouped: bool = False) -> None:
    """Start jobs together.

    :param grouped: they take effect together or not at all (completion-mode ``grouped``); otherwise each by itself
    """
    jobs = tuple(jobs)
    if grouped and len(jobs) > 1:
        Transaction(jobs)
    for job in jobs:
        job.start()
