"""Looking for the next request for a moment before going to sleep: being woken takes longer than a short request does.

Only where a processor would be idle meanwhile, and only for the one client that keeps a server busy: every look takes
the interpreter lock, so that others would wait for it. Whether it is worth while shows in how soon requests came
before.
"""

from __future__ import annotations

import os
from time import perf_counter_ns
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

    from .link import Link

__all__ = ["POLL_NANOSECONDS", "Polling", "Receiver"]

POLL_NANOSECONDS: Final = 50_000
"""What a dedicated process may poll: about what sleeping and being woken take."""
_QUICK: Final = 4
"""So many requests in a row came that soon before the next one is polled for."""
_CREDIT: Final = 4
"""So many times may polling be in vain before it ends."""


class Polling:
    """What the clients of one server have in common.

    :param nanoseconds: how long to poll; 0 for never
    :ivar last: who received last; any thread may set it, and whoever finds somebody else there does not poll
    """

    def __init__(self, nanoseconds: int = 0) -> None:
        self.nanoseconds = nanoseconds if len(os.sched_getaffinity(0)) > 1 else 0
        self.last: Receiver | None = None


class Receiver:
    """Receives for one client. One thread."""

    def __init__(self, link: Link, polling: Polling) -> None:
        self._polling = polling
        self._wait: Callable[[memoryview], int] = link.recv_into
        self._wait_all: Callable[[memoryview], int] = link.recv_all_into
        self._look: Callable[[memoryview], int] | None = link.recv_now if polling.nanoseconds else None
        self._quick = 0
        self._credit = 0

    def end(self) -> None:
        """Nothing more is received."""
        if self._polling.last is self:
            self._polling.last = None

    def receive(self, view: memoryview, *, busy: bool = False) -> int:
        """Bytes received; 0 when the other side has ended its half.

        :param busy: other threads work for this client
        :raises BlockingIOError: nothing came for some seconds
        """
        look, polling = self._look, self._polling
        if look is None or busy:
            return self._wait(view)
        if polling.last is not self:
            polling.last = self
            self._quick = self._credit = 0
            return self._wait(view)
        started = perf_counter_ns()
        until = started + polling.nanoseconds
        if self._credit:
            count = self._poll(look, view, until)
            if count >= 0:
                self._credit = _CREDIT
                return count
            self._credit -= 1
            return self._wait(view)
        count = self._wait(view)
        # To sleep and be woken takes as long again as it would have been polled for.
        self._quick = self._quick + 1 if perf_counter_ns() - started < 2 * polling.nanoseconds else 0
        if self._quick >= _QUICK:
            self._quick, self._credit = 0, _CREDIT
        return count

    def receive_rest(self, view: memoryview) -> int:
        """The same for more of a request that was begun, as much as comes before the time limit where that is known."""
        if self._credit and self._look is not None:
            count = self._poll(self._look, view, perf_counter_ns() + self._polling.nanoseconds)
            if count >= 0:
                return count
        return self._wait_all(view)

    def _poll(self, look: Callable[[memoryview], int], view: memoryview, until: int) -> int:
        """Bytes received, -1 if nothing came."""
        polling = self._polling
        while polling.last is self and perf_counter_ns() < until:
            try:
                return look(view)
            except BlockingIOError:
                continue
        return -1
