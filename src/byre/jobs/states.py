"""The life of a job as two tables of data: which state follows which, and which verb is legal when.

Names are those of QMP (``JobStatus``, ``JobVerb``). ``jobs/job.py`` drives jobs through these tables and holds
no rule of its own.
"""

from __future__ import annotations

from enum import Enum
from typing import Final

from ..errors import Busy, InvalidArgument

__all__ = ["FINISHED", "TRANSITIONS", "VERBS", "State", "check_transition", "check_verb"]


class State(Enum):
    """Where a job stands."""

    CREATED = "created"
    """Made, not started."""
    RUNNING = "running"
    PAUSED = "paused"
    """Stopped on request, from RUNNING; nothing is in flight."""
    READY = "ready"
    """The first phase is over; the job follows changes until it is told to complete."""
    STANDBY = "standby"
    """Stopped on request, from READY."""
    WAITING = "waiting"
    """The work is done; other jobs of the transaction are not."""
    PENDING = "pending"
    """All work is done; waits to be finalized."""
    ABORTING = "aborting"
    """Failed or cancelled; undoing what it did to the graph."""
    CONCLUDED = "concluded"
    """Over; its result can be asked for until it is dismissed."""
    NULL = "null"
    """Dismissed."""


TRANSITIONS: Final[dict[State, frozenset[State]]] = {
    State.CREATED: frozenset({State.RUNNING, State.ABORTING, State.NULL}),
    State.RUNNING: frozenset({State.PAUSED, State.READY, State.WAITING, State.ABORTING}),
    State.PAUSED: frozenset({State.RUNNING}),
    State.READY: frozenset({State.STANDBY, State.WAITING, State.ABORTING}),
    State.STANDBY: frozenset({State.READY}),
    State.WAITING: frozenset({State.PENDING, State.ABORTING}),
    State.PENDING: frozenset({State.CONCLUDED, State.ABORTING}),
    State.ABORTING: frozenset({State.ABORTING, State.CONCLUDED}),
    State.CONCLUDED: frozenset({State.NULL}),
    State.NULL: frozenset(),
}

_ACTIVE = frozenset({State.CREATED, State.RUNNING, State.PAUSED, State.READY, State.STANDBY})

VERBS: Final[dict[str, frozenset[State]]] = {
    "cancel": _ACTIVE | {State.WAITING, State.PENDING},
    "pause": _ACTIVE,
    "resume": _ACTIVE,
    "set-speed": _ACTIVE,
    "change": _ACTIVE,
    "complete": frozenset({State.READY}),
    "finalize": frozenset({State.PENDING}),
    "dismiss": frozenset({State.CONCLUDED}),
}

FINISHED: Final = frozenset({State.CONCLUDED, State.NULL})


def check_transition(job: str, before: State, after: State) -> None:
    """:raises InvalidArgument: ``after`` may not follow ``before``"""
    if after not in TRANSITIONS[before]:
        raise InvalidArgument(f"job {job!r} cannot go from state {before.value!r} to {after.value!r}")


def check_verb(job: str, verb: str, state: State) -> None:
    """:raises Busy: ``verb`` is not for a job in ``state``; the message names the states it is for"""
    allowed = VERBS[verb]
    if state not in allowed:
        names = ", ".join(sorted(each.value for each in allowed))
        raise Busy(f"job {job!r} in state {state.value!r} cannot accept verb {verb!r}; it is for the states {names}")
