"""What a file occupies: zeroing, discarding and finding ranges without moving bytes.

Owns what was learned about one open file: what its file system cannot do, and where the last data was
found. Raises OSError; :mod:`byre.protocols.file` words it.
"""

from __future__ import annotations

import errno
import os

from ..io.extent import DATA, ZERO, Extent
from ..typing import TYPE_CHECKING
from ..units import align_down, align_up
from . import space

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from ..io.align import AlignedAccess
    from .length import FileLength

__all__ = ["FileSpace"]

_DISCARD = "discard"
_SEEK = "seek"


class FileSpace:
    """The space of one open file or block device.

    ``_cannot``, ``_late`` and ``_data`` are replaced whole by whoever learns something; of two threads that learn at
    once one may be forgotten, which costs a system call later and is never wrong.

    :ivar fd: replaced when the file is reopened
    :ivar direct: present for direct I/O, whose read-modify-write must be kept out
    :param sector: logical block size of a block device; 0 for a regular file
    """

    def __init__(self, fd: int, length: FileLength, sector: int) -> None:
        self.fd = fd
        self.direct: AlignedAccess | None = None
        self._length = length
        self._sector = sector
        self._cannot: frozenset[int | str] = frozenset()
        self._late: bool | None = None
        # Bytes of this run were data a moment ago, so calling them data stays right even if they were zeroed since.
        self._data = (0, 0)

    def forget_data(self) -> None:
        self._data = (0, 0)

    def claim(self, offset: int, length: int) -> AbstractContextManager[None]:
        if self.direct is not None:
            return self.direct.claim(offset, length)
        from contextlib import nullcontext  # too dear for start-up

        return nullcontext()

    def allocate(self, offset: int, length: int) -> None:
        """Allocate blocks for a long write that follows, where that makes it faster (ext4: by a third).

        Best effort: what is wrong, such as a full disk, the write itself will say.
        """
        if self._late is None:
            self._late = not self._sector and self.direct is None and space.allocates_late(self.fd)
        if self._late:
            try:
                self._late = space.fallocate(self.fd, space.KEEP_SIZE, offset, length)
            except OSError:
                self._late = False

    # -- zeroing and discarding -------------------------------------------------------------------

    def zero(self, offset: int, length: int, *, unmap: bool, may_write: bool) -> tuple[int, int]:
        """Make as much of a range read as zeroes as the system can do by itself.

        :param unmap: the space may be given back
        :param may_write: a device may be asked to write the zeroes if it cannot do better
        :returns: ``(start, end)`` of what was done; equal if nothing
        """
        self._data = (0, 0)
        if self._sector:
            return self._zero_device(offset, length, unmap, may_write)
        end = offset + length
        done = (unmap and self._punch_and_grow(offset, end)) or self._zero_and_keep(offset, end)
        return offset, end if done else offset

    def _punch_and_grow(self, offset: int, end: int) -> bool:
        inside = min(end, self._length.value) - offset
        if inside > 0 and not self._fallocate(space.PUNCH, offset, inside):
            return False
        if end > self._length.value:
            with self._length.setting():
                if end > self._length.value:
                    os.ftruncate(self.fd, end)
                    self._length.value = end
        return True

    def _zero_and_keep(self, offset: int, end: int) -> bool:
        if self._fallocate(space.ZERO_RANGE, offset, end - offset):
            return True
        # Without ZERO_RANGE (tmpfs): a hole reads as zeroes, and allocating it keeps the space.
        inside = min(end, self._length.value) - offset
        punched = inside <= 0 or self._fallocate(space.PUNCH, offset, inside)
        return punched and self._fallocate(space.ALLOCATE, offset, end - offset)

    def _zero_device(self, offset: int, length: int, unmap: bool, may_write: bool) -> tuple[int, int]:
        start, end = align_up(offset, self._sector), align_down(offset + length, self._sector)
        if start >= end:
            return offset, offset
        mode = space.PUNCH if unmap else space.ZERO_RANGE | space.KEEP_SIZE
        if self._fallocate(mode, start, end - start):
            return start, end
        if not may_write:
            return offset, offset
        with self.claim(start, end - start):
            done = space.device_zero(self.fd, start, end - start)
        return (start, end) if done else (offset, offset)

    def discard(self, offset: int, length: int) -> None:
        """Give the space of a range back where the system can; whole sectors only on a device."""
        self._data = (0, 0)
        length = min(length, self._length.value - offset)
        if length <= 0:
            return
        if not self._sector:
            self._fallocate(space.PUNCH, offset, length)
            return
        start, end = align_up(offset, self._sector), align_down(offset + length, self._sector)
        if start >= end or _DISCARD in self._cannot:
            return
        with self.claim(start, end - start):
            done = space.device_discard(self.fd, start, end - start)
        if not done:
            self._cannot |= {_DISCARD}

    def _fallocate(self, mode: int, offset: int, length: int) -> bool:
        """fallocate, remembering what this file system cannot do."""
        if mode in self._cannot:
            return False
        end = offset + length
        growing = not mode & space.KEEP_SIZE and end > self._length.value
        if growing:
            self._length.begin()
        reached = 0
        try:
            with self.claim(offset, length):
                done = space.fallocate(self.fd, mode, offset, length)
            reached = end if done else 0
        finally:
            if growing:
                self._length.end(reached)
        if not done:
            self._cannot |= {mode}
        return done

    # -- finding ----------------------------------------------------------------------------------

    def status(self, offset: int, length: int) -> Extent:
        """The first extent of a range: DATA, or ZERO for a hole (with a host) and past the end (without)."""
        size = self._reach()
        if offset >= size:
            return Extent(offset, length, ZERO)
        length = min(length, size - offset)
        start, stop = self._find(offset, size)
        if start > offset:
            return Extent(offset, min(length, start - offset), ZERO, offset)
        return Extent(offset, min(length, stop - offset), DATA, offset)

    def extents(self, offset: int, length: int) -> list[Extent]:
        """All extents of a range, as :meth:`status` would give them."""
        rows: list[Extent] = []
        end = offset + length
        size = self._reach()
        inside = min(end, size)
        while offset < inside:
            start, stop = self._find(offset, size)
            start, stop = min(max(start, offset), inside), min(stop, inside)
            if start > offset:
                rows.append(Extent(offset, start - offset, ZERO, offset))
            if stop > start:
                rows.append(Extent(start, stop - start, DATA, start))
            offset = stop
        if offset < end:
            rows.append(Extent(offset, end - offset, ZERO))
        return rows

    def _reach(self) -> int:
        """Where the file ends; with direct I/O the end of the last unit, because requests are about whole units."""
        size = self._length.value
        return size if self.direct is None else align_up(size, self.direct.alignment)

    def _find(self, offset: int, size: int) -> tuple[int, int]:
        """``(start, stop)`` of the first data at or behind ``offset``; ``(size, size)`` if only a hole follows.

        All of the file where the system cannot tell. ``stop`` lies behind ``offset``. Asking window by window stays
        cheap where finding the end of a long run is not (tmpfs), because the last run is kept.
        """
        start, stop = self._data
        if start <= offset < stop:
            return offset, stop
        if _SEEK in self._cannot:
            return offset, size
        try:
            found = space.next_data(self.fd, min(offset, max(self._length.value - 1, 0)))
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                raise
            self._cannot |= {_SEEK}
            return offset, size
        if found is None:
            return size, size
        start, stop = found
        if stop == self._length.value:
            stop = max(stop, size)
        self._data = found = (start, max(stop, start + 1))  # the same if it was punched between the two calls
        return found
