"""Throttle groups: limits in bytes and operations per second that several nodes share, member by member in turn.

Limits are given by the field's names: ``iops-total``, ``bps-read``, ... each with ``-max`` (the rate of bursts) and
``-max-length`` (their seconds), and ``iops-size``: larger requests count as several. A group is made in Python or with
``--object throttle-group,id=...``; nodes find it by name in :attr:`byre.graph.graph.Graph.throttle_groups`.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from typing import TYPE_CHECKING, Final, NamedTuple

from ..errors import InvalidArgument
from ..io.leaky_bucket import LeakyBucket, Rate
from ..options import Option, OptionSet, flatten, parse_json, parse_keyval

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ["LIMIT_OPTIONS", "READ", "WRITE", "Limits", "Member", "ThrottleGroup", "parse_limits"]

READ: Final = 0
WRITE: Final = 1

_KINDS: Final = ("iops-total", "iops-read", "iops-write", "bps-total", "bps-read", "bps-write")
_CONCERNED: Final = (("iops-total", "iops-read", "bps-total", "bps-read"),
                     ("iops-total", "iops-write", "bps-total", "bps-write"))  # fmt: skip
_MOST: Final = 10**15


def _limit_options() -> list[Option]:
    options: list[Option] = []
    for kind in _KINDS:
        what = {"iops": "operations", "bps": "bytes"}[kind.partition("-")[0]]
        which = {"total": "", "read": " read", "write": " written"}[kind.partition("-")[2]]
        type = "size" if what == "bytes" else "int"
        options += [
            Option(kind, type, f"{what}{which} per second", 0),
            Option(f"{kind}-max", type, f"{what}{which} per second in bursts", 0),
            Option(f"{kind}-max-length", "int", f"seconds that a burst of {kind}-max may last", 1),
        ]
    return [*options, Option("iops-size", "size", "bytes that count as one operation", 0)]


LIMIT_OPTIONS: Final = OptionSet(*_limit_options())


class Limits(NamedTuple):
    """Checked limits.

    :ivar rates: by kind
    :ivar iops_size: a longer request counts as several operations, bytes; 0 counts each as one
    """

    rates: dict[str, Rate]
    iops_size: int = 0

    @property
    def limited(self) -> bool:
        return any(rate.rate for rate in self.rates.values())

    def given(self) -> dict[str, int]:
        """By option name, those that are not at their default."""
        values: dict[str, int] = {}
        for kind, rate in self.rates.items():
            if rate.rate:
                values[kind] = rate.rate
            if rate.burst:
                values[f"{kind}-max"], values[f"{kind}-max-length"] = rate.burst, rate.burst_seconds
        return {**values, **({"iops-size": self.iops_size} if self.iops_size else {})}


def parse_limits(given: Mapping[str, object]) -> Limits:
    """:param given: by option name; what is missing is unlimited
    :raises InvalidArgument: an unknown name, or values that contradict each other
    """
    values = LIMIT_OPTIONS.parse(given, what="a throttle group")
    rates = {
        kind: Rate(values.number(kind), values.number(f"{kind}-max"), values.number(f"{kind}-max-length"))
        for kind in _KINDS
    }
    limits = Limits(rates, values.number("iops-size"))
    for unit in ("iops", "bps"):
        parts = (rates[f"{unit}-read"], rates[f"{unit}-write"])
        total = rates[f"{unit}-total"]
        if (total.rate and any(part.rate for part in parts)) or (total.burst and any(part.burst for part in parts)):
            raise InvalidArgument(f"{unit}-total and {unit}-read or {unit}-write cannot be limited at the same time")
    if limits.iops_size and not any(rates[kind].rate for kind in _KINDS[:3]):
        raise InvalidArgument("iops-size is of no use without a limit of iops")
    for kind, rate in rates.items():
        _check_rate(kind, rate)
    return limits


def _check_rate(kind: str, rate: Rate) -> None:
    if max(rate.rate, rate.burst) > _MOST:
        raise InvalidArgument(f"{kind} and {kind}-max must be between 0 and {_MOST}")
    if not rate.burst_seconds:
        raise InvalidArgument(f"{kind}-max-length cannot be 0")
    if rate.burst_seconds > 1 and not rate.burst:
        raise InvalidArgument(f"{kind}-max-length is given without {kind}-max")
    if rate.burst * rate.burst_seconds > _MOST:
        raise InvalidArgument(f"{kind}-max-length is too long for this {kind}-max")
    if rate.burst and not rate.rate:
        raise InvalidArgument(f"{kind}-max is given without {kind}")
    if rate.burst and rate.burst < rate.rate:
        raise InvalidArgument(f"{kind}-max cannot be lower than {kind}")


class Member:
    """A node's place in a group: its requests that wait, in order of arrival, reads and writes apart.

    Guarded by: the group's lock.
    """

    __slots__ = ("free", "waiting")

    def __init__(self) -> None:
        self.waiting: tuple[deque[threading.Condition], deque[threading.Condition]] = (deque(), deque())
        self.free = 0


class ThrottleGroup:
    """Limits shared by its members. A request of a member waits in its own thread until it may go.

    Members with waiting requests take turns, one request each; reads and writes are two queues.
    Guarded by ``_lock``: everything.

    :param clock: seconds, monotonic
    """

    def __init__(
        self, name: str, limits: Mapping[str, object] | None = None, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.name = name
        self._clock = clock
        self._lock = threading.Lock()
        self._members: list[Member] = []
        self._served: list[Member | None] = [None, None]
        self._set(parse_limits(limits or {}))

    @classmethod
    def parse(cls, text: str) -> ThrottleGroup:
        """The group that ``--object`` defines: ``throttle-group,id=ID,x-iops-total=N,...``, ``limits.iops-total=N``,
        or the same in JSON.

        :raises InvalidArgument: malformed
        """
        given = flatten(parse_json(text, "object")) if text.startswith("{") else parse_keyval(text, implied="qom-type")
        values = dict(given)
        values.pop("qom-type", None)
        name = values.pop("id", "")
        if not isinstance(name, str) or not name:
            raise InvalidArgument("a throttle group needs an id")
        limits: dict[str, object] = {}
        for key, value in values.items():
            short = next((key[len(prefix) :] for prefix in ("limits.", "x-") if key.startswith(prefix)), "")
            if short not in LIMIT_OPTIONS:
                raise InvalidArgument(f"a throttle group has no property {key!r}")
            limits[short] = value
        return cls(name, limits)

    # -- limits -----------------------------------------------------------------------------------

    @property
    def limits(self) -> Limits:
        with self._lock:
            return self._limits

    def set_limits(self, limits: Mapping[str, object]) -> None:
        """Other limits from now on, for requests that wait as well; what is missing is unlimited.

        :raises InvalidArgument: and nothing has changed
        """
        checked = parse_limits(limits)
        with self._lock:
            self._set(checked)
            for direction in (READ, WRITE):
                self._wake(direction)

    def _set(self, limits: Limits) -> None:
        self._limits = limits
        buckets = {kind: LeakyBucket(rate) for kind, rate in limits.rates.items() if rate.rate}
        self._buckets = tuple([buckets[kind] for kind in kinds if kind in buckets] for kinds in _CONCERNED)
        self._all = list(buckets.values())
        self._leaked = self._clock()

    # -- members ----------------------------------------------------------------------------------

    def join(self, member: Member) -> None:
        with self._lock:
            self._members.append(member)

    def leave(self, member: Member) -> None:
        """``member`` has no requests any more. Leaving twice is fine."""
        with self._lock:
            if member in self._members:
                self._members.remove(member)
            self._served = [None if one is member else one for one in self._served]

    def set_free(self, member: Member, free: bool) -> None:
        """While it is free (it nests), no request of ``member`` waits; they count all the same."""
        with self._lock:
            member.free += 1 if free else -1
            for queue in member.waiting:
                for waiter in queue:
                    waiter.notify_all()

    @property
    def waiting(self) -> int:
        """Requests that are held back now."""
        with self._lock:
            return sum(len(queue) for member in self._members for queue in member.waiting)

    # -- requests ---------------------------------------------------------------------------------

    def admit(self, member: Member, direction: int, length: int) -> None:
        """Wait until a request of ``length`` bytes may go, and count it.

        :param direction: READ, or WRITE for everything that changes something
        """
        with self._lock:
            if not self._buckets[direction]:
                return
            if not member.free and (self._head(direction) is not None or self._delay(direction) > 0):
                self._wait(member, direction)
            self._count(direction, length)

    def _wait(self, member: Member, direction: int) -> None:
        """Until it is the turn of this request, and the time has come."""
        waiter = threading.Condition(self._lock)
        member.waiting[direction].append(waiter)
        try:
            while not member.free:
                if self._head(direction) is not waiter:
                    waiter.wait()
                    continue
                delay = self._delay(direction)
                if delay <= 0:
                    self._served[direction] = member
                    break
                waiter.wait(delay)
        finally:
            member.waiting[direction].remove(waiter)
            self._wake(direction)

    def _head(self, direction: int) -> threading.Condition | None:
        """The request whose turn it is: the first of the next member, after the one served last, that has any."""
        members, served = self._members, self._served[direction]
        start = members.index(served) + 1 if served is not None else 0
        for index in range(len(members)):
            queue = members[(start + index) % len(members)].waiting[direction]
            if queue:
                return queue[0]
        return None

    def _wake(self, direction: int) -> None:
        head = self._head(direction)
        if head is not None:
            head.notify_all()

    def _delay(self, direction: int) -> float:
        now = self._clock()
        elapsed, self._leaked = max(now - self._leaked, 0.0), now
        for bucket in self._all:
            bucket.leak(elapsed)
        return max((bucket.wait() for bucket in self._buckets[direction]), default=0.0)

    def _count(self, direction: int, length: int) -> None:
        size = self._limits.iops_size
        operations = length / size if size and length > size else 1.0
        for kind, bucket in zip(self._kinds(direction), self._buckets[direction], strict=True):
            bucket.add(operations if kind.startswith("iops") else length)

    def _kinds(self, direction: int) -> list[str]:
        return [kind for kind in _CONCERNED[direction] if self._limits.rates[kind].rate]
