"""What a qcow2 check has found so far: counts, statistics and messages."""

from __future__ import annotations

from typing import Final

from ..abilities import CheckResult

__all__ = ["MESSAGE_LIMIT", "Aborted", "Findings", "beyond_end"]

MESSAGE_LIMIT: Final = 100_000


class Aborted(Exception):
    """The check cannot go on; what it found so far, and why, is in the findings."""


class Findings:
    """Counts as ``qemu-img check`` names them. Messages beyond ``MESSAGE_LIMIT`` are counted, not kept.

    :ivar rebuild: the refcount structures cannot be mended in place
    :ivar outside: a refcount block lies past the end of the file
    :ivar suspect: a COPIED flag may disagree with its reference count
    :ivar nowhere: an entry of the active L1 table points into the header's cluster
    :ivar misaligned: (L2 table offset, entry index, entry) of preallocated clusters that are not aligned
    """

    def __init__(self) -> None:
        self.corruptions = self.leaks = self.check_errors = 0
        self.corruptions_fixed = self.leaks_fixed = 0
        self.total = self.allocated = self.fragmented = self.compressed = 0
        self.image_end = 0
        self.rebuild = self.outside = self.suspect = self.nowhere = False
        self.misaligned: list[tuple[int, int, int]] = []
        self.messages: list[str] = []
        self.left_out = 0

    @property
    def room(self) -> int:
        """How many more messages are kept."""
        return max(0, MESSAGE_LIMIT - len(self.messages))

    def say(self, text: str, times: int = 1) -> None:
        kept = min(times, self.room)
        self.messages.extend([text] * kept)
        self.left_out += times - kept

    def corrupt(self, text: str, times: int = 1) -> None:
        """``times`` corruptions, each with this message."""
        self.corruptions += times
        self.say(text, times)

    def abort(self, text: str) -> Aborted:
        """An internal error that ends the check; raise what this returns."""
        self.check_errors += 1
        self.say(text)
        return Aborted(text)

    def result(self) -> CheckResult:
        messages = self.messages
        if self.left_out:
            messages = [*messages, f"{self.left_out} more messages left out"]
        return CheckResult(self.corruptions, self.leaks, self.check_errors, self.corruptions_fixed, self.leaks_fixed,
                           self.image_end, self.total, self.allocated, self.fragmented, self.compressed,
                           tuple(messages))  # fmt: skip


def beyond_end(offset: int, length: int) -> str:
    return (
        "ERROR: counting reference for region exceeding the end of the file by one cluster or more: "
        f"offset 0x{offset:x} size 0x{length:x}"
    )
