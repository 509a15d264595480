"""A leaky bucket: how long to wait so that a rate is kept, with bursts above it. Arithmetic only, no clock, no lock.

What was done fills the bucket; it leaks at the rate. While it is not over-full, more may be done at once, so a request
of any size passes and those after it pay. Without a burst limit the bucket holds a tenth of a second, enough that not
every other request has to wait. With one it holds ``burst`` times ``burst_seconds``, and while it fills up, a second
bucket keeps to the burst rate.
"""

from __future__ import annotations

from typing import Final, NamedTuple

__all__ = ["LeakyBucket", "Rate"]

_SLACK: Final = 10
"""Buckets that smooth hold what fits in one n-th of a second."""


class Rate(NamedTuple):
    """A limit in units per second.

    :ivar rate: in the long run; 0 for no limit
    :ivar burst: while a burst lasts; 0 for no bursts
    :ivar burst_seconds: how long a burst at the full burst rate lasts
    """

    rate: int = 0
    burst: int = 0
    burst_seconds: int = 1


class LeakyBucket:
    """Guarded by: whoever owns it."""

    __slots__ = ("_burst_level", "_level", "limit")

    def __init__(self, limit: Rate) -> None:
        self.limit = limit
        self._level = 0.0
        self._burst_level = 0.0

    def add(self, units: float) -> None:
        """So much was done."""
        self._level += units
        self._burst_level += units

    def leak(self, seconds: float) -> None:
        """So much time went by."""
        self._level = max(self._level - self.limit.rate * seconds, 0.0)
        self._burst_level = max(self._burst_level - self.limit.burst * seconds, 0.0)

    def wait(self) -> float:
        """Seconds until more may be done; 0 for now."""
        rate, burst, burst_seconds = self.limit
        if not rate:
            return 0.0
        room = burst * burst_seconds if burst else rate / _SLACK
        if self._level > room:
            return (self._level - room) / rate
        if burst_seconds > 1 and self._burst_level > burst / _SLACK:
            return (self._burst_level - burst / _SLACK) / burst
        return 0.0
