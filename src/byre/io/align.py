"""Alignment: any byte range for something that only takes aligned ones.

:class:`AlignedAccess` stands between a node and calls that need offset, length and memory aligned
(direct I/O). It bounces through aligned memory and does read-modify-write under a claim; nobody above
knows. What the calls do, and whose they are, is left to the node.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Final, NamedTuple

from ..units import align_down, align_up
from .buffers import address_of, aligned_buffer

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import TracebackType

__all__ = ["AlignedAccess"]

BOUNCE_SIZE: Final = 1 << 20
_POOL_LIMIT: Final = 4


class _Range(NamedTuple):
    start: int
    end: int
    exclusive: bool


class _Claim:
    """Holds a range for the length of a ``with`` block."""

    __slots__ = ("_access", "_range")

    def __init__(self, access: AlignedAccess, wanted: _Range) -> None:
        self._access = access
        self._range = wanted

    def __enter__(self) -> None:
        self._access._acquire(self._range)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._access._release(self._range)


class AlignedAccess:
    """Byte-granular reads and writes over aligned ones.

    Writes that are aligned go on side by side; one that has to read first excludes everything that
    overlaps its blocks, because it writes bytes back that are not its own.

    Guarded by its condition: claims and idle bounce buffers.

    :param alignment: of offsets and lengths, bytes, a power of two
    :param memory_alignment: of buffer addresses; 1 if any will do
    :param read: fills an aligned buffer from an aligned offset; zeroes past the end
    :param write: writes aligned buffers to consecutive bytes from an aligned offset
    :param end: length of the thing in bytes, which need not be aligned
    :param write_tail: writes bytes as they are, for a block that the end cuts; without it the thing
        may grow to a multiple of ``alignment``
    """

    def __init__(
        self,
        alignment: int,
        memory_alignment: int,
        read: Callable[[int, memoryview], None],
        write: Callable[[int, Sequence[memoryview]], None],
        *,
        end: Callable[[], int] | None = None,
        write_tail: Callable[[int, Sequence[memoryview]], None] | None = None,
    ) -> None:
        self.alignment = alignment
        self.memory_alignment = memory_alignment
        self._read = read
        self._write = write
        self._end = end
        self._write_tail = write_tail
        self._changed = threading.Condition(threading.Lock())
        self._claims: list[_Range] = []
        self._pool: list[memoryview] = []
        self._bounce_size = max(BOUNCE_SIZE, alignment)

    # -- claims -----------------------------------------------------------------------------------

    def claim(self, offset: int, length: int, *, exclusive: bool = False) -> _Claim:
        """A context that keeps read-modify-write (with ``exclusive``: every write) out of the range."""
        return _Claim(self, _Range(offset, offset + length, exclusive))

    def _acquire(self, wanted: _Range) -> None:
        with self._changed:
            while any(
                held.start < wanted.end and wanted.start < held.end and (held.exclusive or wanted.exclusive)
                for held in self._claims
            ):
                self._changed.wait()
            self._claims.append(wanted)

    def _release(self, held: _Range) -> None:
        with self._changed:
            self._claims.remove(held)
            self._changed.notify_all()

    # -- bounce buffers ---------------------------------------------------------------------------

    def _take_buffer(self) -> memoryview:
        with self._changed:
            if self._pool:
                return self._pool.pop()
        return aligned_buffer(self._bounce_size, max(self.memory_alignment, self.alignment))

    def _give_back(self, buffer: memoryview) -> None:
        with self._changed:
            if len(self._pool) < _POOL_LIMIT:
                self._pool.append(buffer)

    def _memory_fits(self, buffers: Sequence[memoryview]) -> bool:
        for buffer in buffers:
            if len(buffer) % self.alignment:
                return False
            if self.memory_alignment > 1 and address_of(buffer) % self.memory_alignment:
                return False
        return True

    # -- requests ---------------------------------------------------------------------------------

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill ``buffer`` from ``offset``, any alignment."""
        length = len(buffer)
        if length == 0:
            return
        if (offset | length) % self.alignment == 0 and self._memory_fits((buffer,)):
            self._read(offset, buffer)
            return
        bounce = self._take_buffer()
        try:
            done = 0
            while done < length:
                start = align_down(offset + done, self.alignment)
                skip = offset + done - start
                step = min(length - done, len(bounce) - skip)
                self._read(start, bounce[: align_up(skip + step, self.alignment)])
                buffer[done : done + step] = bounce[skip : skip + step]
                done += step
        finally:
            self._give_back(bounce)

    def writev_from(self, offset: int, buffers: Sequence[memoryview]) -> None:
        """Write ``buffers`` to consecutive bytes from ``offset``, any alignment."""
        length = sum(map(len, buffers))
        if length == 0:
            return
        if (offset | length) % self.alignment == 0:
            with self.claim(offset, length):
                if self._memory_fits(buffers):
                    self._write(offset, buffers)
                else:
                    self._write_bounced(offset, buffers, length)
            return
        start, end = align_down(offset, self.alignment), align_up(offset + length, self.alignment)
        with self.claim(start, end - start, exclusive=True):
            body = self._body_length(offset, length)
            if body:
                self._write_bounced(offset, buffers, body)
            if body < length and self._write_tail is not None:
                self._write_tail(offset + body, _cut(buffers, body))

    def _body_length(self, offset: int, length: int) -> int:
        """How much of an unaligned write goes as whole blocks: all, unless its last block reaches past the end."""
        end = offset + length
        if self._write_tail is None or self._end is None or end % self.alignment == 0:
            return length
        if align_up(end, self.alignment) <= self._end():
            return length
        return max(0, align_down(end, self.alignment) - offset)

    def _write_bounced(self, offset: int, buffers: Sequence[memoryview], length: int) -> None:
        """Write the first ``length`` bytes through aligned memory; blocks at the ends keep their other bytes."""
        source = _Source(buffers)
        bounce = self._take_buffer()
        try:
            done = 0
            while done < length:
                start = align_down(offset + done, self.alignment)
                skip = offset + done - start
                step = min(length - done, len(bounce) - skip)
                block = bounce[: align_up(skip + step, self.alignment)]
                if skip:
                    self._read(start, block[: self.alignment])
                if (skip + step) % self.alignment and not (skip and len(block) == self.alignment):
                    last = len(block) - self.alignment
                    self._read(start + last, block[last:])
                source.copy_to(block[skip : skip + step])
                self._write(start, (block,))
                done += step
        finally:
            self._give_back(bounce)


class _Source:
    """Reads a list of buffers from front to back."""

    __slots__ = ("_at", "_buffers", "_index")

    def __init__(self, buffers: Sequence[memoryview]) -> None:
        self._buffers = buffers
        self._index = 0
        self._at = 0

    def copy_to(self, target: memoryview) -> None:
        done, length = 0, len(target)
        while done < length:
            here = self._buffers[self._index]
            step = min(length - done, len(here) - self._at)
            target[done : done + step] = here[self._at : self._at + step]
            done += step
            self._at += step
            if self._at == len(here):
                self._index += 1
                self._at = 0


def _cut(buffers: Sequence[memoryview], skip: int) -> list[memoryview]:
    """The buffers without their first ``skip`` bytes."""
    rest: list[memoryview] = []
    for buffer in buffers:
        if skip >= len(buffer):
            skip -= len(buffer)
            continue
        rest.append(buffer[skip:])
        skip = 0
    return rest
