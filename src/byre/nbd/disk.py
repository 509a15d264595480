"""What the NBD server needs of an export. ``exports/nbd.py`` has it of an image; the server knows no image.

Methods may be called by several threads at once, and raise :class:`byre.errors.ByreError`. Offsets and lengths are
bytes, and lie inside the export: the server has checked them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable

    from .server_negotiation import Offer

__all__ = ["IN_FILE", "READ", "ZERO", "Batch", "DirectRange", "Disk", "Piece"]

READ: Final = 0
"""The bytes must be read through the disk."""
ZERO: Final = 1
"""The bytes are zeroes."""
IN_FILE: Final = 2
"""The bytes lie as they are at ``offset`` of the descriptor ``fd``."""


class Piece(NamedTuple):
    """``length`` bytes of a range, and how to come by them.

    :ivar fd: the receiver's own: it closes it
    """

    length: int
    kind: int = READ
    fd: int = -1
    offset: int = 0


class DirectRange(NamedTuple):
    """A range in a file opened for direct I/O; it, and memory at multiples of 4 KiB, are aligned as the file needs.

    :ivar release: called once when the read has ended, by any thread, with the bytes that were read
    """

    fd: int
    offset: int
    release: Callable[[int], None]


class Batch(NamedTuple):
    """Between ``begin`` and ``end``: what answers small requests at once.

    :ivar size: of the disk now
    :ivar read_cached: fills a buffer from an offset if that takes no waiting; False if it does
    :ivar write: writes a buffer at an offset; ``None`` where that may wait for a disk
    """

    size: int
    read_cached: Callable[[int, memoryview], bool]
    write: Callable[[int, memoryview], None] | None


class Disk(Protocol):
    """An export, as one client uses it.

    :ivar writable: writes are not refused
    :ivar connections: most clients at a time, 0 for any number
    """

    writable: bool
    connections: int

    @property
    def offer(self) -> Offer:
        """What clients are told."""

    def in_file(self) -> bool:
        """Whether what is read lies in a file as it is, so that :meth:`pieces` are worthwhile."""

    def begin(self) -> Batch:
        """Several short requests follow; nothing in between may wait for a client."""

    def end(self, reads: int, bytes_read: int, writes: int, bytes_written: int, started: int) -> None:
        """They are done, and counted; ``started`` is the ``perf_counter_ns()`` of their beginning."""

    def past_cache(self) -> bool:
        """Whether reads go past the page cache, so that :meth:`direct` is worth asking."""

    def direct(self, offset: int, length: int) -> DirectRange | None:
        """Where a range can be read past the page cache; the request is under way until ``release`` is called."""

    def read_into(self, offset: int, view: memoryview) -> None: ...

    def write(self, offset: int, view: memoryview, fua: bool) -> None: ...

    def write_zeroes(self, offset: int, length: int, *, may_unmap: bool, fast: bool) -> None:
        """:raises NotSupported: ``fast``, and zeroes would have to be written"""

    def trim(self, offset: int, length: int) -> None: ...

    def flush(self) -> None:
        """What any client was told is written is durable when this returns."""

    def pieces(self, offset: int, length: int, *, in_file: bool, holes: bool) -> list[Piece]:
        """How to come by a range, in order.

        :param in_file: pieces may lie in a file
        :param holes: pieces may be zeroes
        """

    def status(self, context: str, offset: int, length: int, limit: int) -> list[tuple[int, int]]:
        """(length, flags) of the extents from ``offset`` in a metadata context: at least one, ``limit`` at most, not
        beyond the range; as many as there are, or fewer.
        """
