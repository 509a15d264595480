"""What a job does about a request that failed: policies for its source and its target, as ``on-error`` has them."""

from __future__ import annotations

from typing import Final

from ..errors import ByreError, InvalidArgument, NoSpace, OutOfService

__all__ = ["IGNORE", "POLICIES", "REPORT", "RETRY", "STOP", "check_policy", "decide"]

REPORT: Final = "report"
IGNORE: Final = "ignore"
STOP: Final = "stop"
RETRY: Final = "retry"

POLICIES: Final = ("report", "ignore", "stop", "enospc", "auto")
"""report: the job fails; ignore: it goes on; stop: it pauses until it is resumed, then tries again; enospc: stop if
there was no space, else report; auto: as enospc."""


def check_policy(policy: str) -> str:
    """:raises InvalidArgument: no such policy"""
    if policy not in POLICIES:
        raise InvalidArgument(f"unknown error policy {policy!r}: expected one of {', '.join(POLICIES)}")
    return policy


def decide(error: ByreError, policy: str) -> str:
    """REPORT, IGNORE or STOP. To go on where nothing can succeed any more would never end: that is reported."""
    if check_policy(policy) == IGNORE and isinstance(error, OutOfService):
        return REPORT
    if policy in (REPORT, IGNORE, STOP):
        return policy
    return STOP if isinstance(error, NoSpace) else REPORT
