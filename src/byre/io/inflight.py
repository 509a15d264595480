"""Claims and tickets: what keeps concurrent requests of one node from stepping on each other.

A *claim* is a range of guest clusters that is being allocated, zeroed or discarded; a request that
overlaps one waits and looks again. A *ticket* is held while data I/O runs outside the lock: host
space freed meanwhile is not reused before every older ticket is back.
"""

from __future__ import annotations

import threading
from collections import deque

from ..typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["InFlight"]

_EVERYTHING: Final = (0, 1 << 64)


class InFlight:
    """Claims and tickets of one node.

    Guarded by: the node's lock, handed to the constructor; every method is called with it held.
    """

    __slots__ = ("_claims", "_deferred", "_held", "_next", "_out", "changed")

    def __init__(self, lock: threading.Lock) -> None:
        self.changed = threading.Condition(lock)
        self._claims: list[tuple[int, int]] = []
        self._held: dict[int, tuple[int, int]] = {}
        self._next = 0
        self._out: set[int] = set()
        self._deferred: deque[tuple[int, Callable[[], None]]] = deque()

    # -- claims -----------------------------------------------------------------------------------

    def overlaps(self, start: int, end: int) -> bool:
        if self._held and self._holds(start, end):
            return False
        return any(first < end and start < last for first, last in self._claims)

    def _holds(self, start: int, end: int) -> bool:
        """Whether this thread holds the range: nobody else can have come into it since."""
        first, last = self._held.get(threading.get_ident(), (0, 0))
        return first <= start and end <= last

    def wait_clear(self, start: int, end: int) -> bool:
        """Wait until nothing in ``[start, end)`` is claimed; True if it had to wait (state may have changed)."""
        waited = False
        while self._claims and self.overlaps(start, end):
            waited = True
            self.changed.wait()
        return waited

    def claim(self, start: int, end: int) -> tuple[int, int]:
        """Claim ``[start, end)``, which must be clear."""
        claim = (start, end)
        self._claims.append(claim)
        return claim

    def hold(self, start: int, end: int, *, settle: bool = True) -> None:
        """Wait until ``[start, end)`` is clear and claim it for several requests of this thread, which pass.

        Nobody else's request is under way in the range when this returns, nor begins before :meth:`let_go`. A thread
        holds one range at a time.

        :param settle: wait for requests under way; those that write in place hold no claim
        """
        self.wait_clear(start, end)
        claim = self.claim(start, end)
        if not settle:
            self._held[threading.get_ident()] = claim
            return
        settled = False

        def all_back() -> None:
            nonlocal settled
            settled = True
            self.changed.notify_all()

        self.when_clear(all_back)
        while not settled:
            self.changed.wait()
        self._held[threading.get_ident()] = claim

    def let_go(self) -> None:
        """End this thread's :meth:`hold`."""
        self.release(self._held.pop(threading.get_ident()))

    def release(self, claim: tuple[int, int]) -> None:
        self._claims.remove(claim)
        self.changed.notify_all()

    def wait_all(self) -> None:
        """Wait until no claim is left."""
        while self._claims:
            self.changed.wait()

    def wait_idle(self) -> tuple[int, int]:
        """Claim everything and wait until no other claim and no ticket is out.

        New writers wait from now on; release the result with :meth:`release`. Readers are not held back: whoever
        must not wait for a stream of them pauses the Images first.
        """
        while _EVERYTHING in self._claims:
            self.changed.wait()
        claim = self.claim(*_EVERYTHING)
        while len(self._claims) > 1 or self._out:
            if self._out:
                self.when_clear(self.changed.notify_all)
            self.changed.wait()
        return claim

    @property
    def claim_count(self) -> int:
        return len(self._claims)

    # -- tickets ----------------------------------------------------------------------------------

    def take(self) -> int:
        """A ticket for I/O outside the lock."""
        self._next = ticket = self._next + 1
        self._out.add(ticket)
        return ticket

    def give_back(self, ticket: int) -> None:
        self._out.remove(ticket)
        if self._deferred:
            self._run_deferred()

    @property
    def ticket_count(self) -> int:
        return len(self._out)

    def when_clear(self, action: Callable[[], None]) -> None:
        """Run ``action`` (under the lock) once every ticket that is out now is back; at once if none is."""
        if not self._out:
            action()
        else:
            self._deferred.append((self._next, action))

    def _run_deferred(self) -> None:
        oldest = min(self._out, default=self._next + 1)
        while self._deferred and self._deferred[0][0] < oldest:
            self._deferred.popleft()[1]()
