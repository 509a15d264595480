"""compare: do two images hold the same bytes?

Both are walked in windows. Where both are known to read as zeroes nothing is read; elsewhere data is read and
compared in bulk by several threads, outside the interpreter lock. Differences are found to the sector.
"""

from __future__ import annotations

import threading
from collections import deque
from typing import TYPE_CHECKING, Final, NamedTuple

from ..errors import ByreError
from ..io import workers
from ..io.buffers import address_of, aligned_buffer
from ..io.extent import COMPRESSED, UNALLOCATED
from ..io.extent import DATA as KIND_DATA
from ..io.extent import ZERO as KIND_ZERO
from ..units import MIB, SECTOR
from .blockcopy import SourceDisk
from .holes import split_at_holes
from .job import Job
from .stride import Stride

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import numpy as np
    from numpy.typing import NDArray

    from ..image import Image
    from .job import Control

__all__ = ["CompareJob", "Result", "StatusError"]

CHUNK: Final = 2 * MIB
_TASK_PIECES: Final = 256

_BOTH: Final = 0
_FIRST: Final = 1
_SECOND: Final = 2

_ZERO_BIT: Final = 1


class StatusError(ByreError):
    """An image could not tell what a range holds."""


class Result(NamedTuple):
    """What came out.

    :ivar equal: the images are the same
    :ivar offset: where they first differ, bytes; -1 if they do not, or differ in size only
    :ivar by_status: strict mode: they differ in what is allocated, not in content
    :ivar sizes_differ: one is longer
    """

    equal: bool
    offset: int = -1
    by_status: bool = False
    sizes_differ: bool = False


class _Piece(NamedTuple):
    """A range to look at: in both images, or in one that must be all zeroes there. Or a finding: by_status."""

    offset: int
    length: int
    which: int
    by_status: bool = False


class _Found(Exception):
    def __init__(self, offset: int, by_status: bool) -> None:
        self.offset = offset
        self.by_status = by_status


class CompareJob(Job):
    """Compare two images; the answer is in :attr:`result`.

    :param strict: what is allocated must agree as well, and so must the sizes
    :param on_size: called when the common part is equal and one image is longer, before the rest is looked at
    """

    kind = "compare"

    def __init__(self, first: Image, second: Image, *, strict: bool = False, measure: bool = False,
                 on_size: Callable[[], None] | None = None) -> None:  # fmt: skip
        super().__init__(measure=measure)
        self.disks = (SourceDisk([first]), SourceDisk([second]))
        self.strict = strict
        self.on_size = on_size
        self.result = Result(False)
        self._memcmp = _memory_compare()
        self._lock_buffers = threading.Lock()
        self._buffers: deque[tuple[_Buffer, _Buffer]] = deque()

    def run(self, control: Control) -> None:
        sizes = self.disks[0].size, self.disks[1].size
        differ = sizes[0] != sizes[1]
        control.total = max(sizes)
        if differ and self.strict:
            self.result = Result(False, sizes_differ=True)
            return
        try:
            self._compare(control, 0, min(sizes))
            if differ:
                if self.on_size is not None:
                    self.on_size()
                self._compare(control, min(sizes), max(sizes))
            self.result = Result(True, sizes_differ=differ)
        except _Found as found:
            self.result = Result(False, found.offset, found.by_status, differ)

    def _compare(self, control: Control, start: int, end: int) -> None:
        reached = start

        def deliver(task: list[_Piece], found: int) -> None:
            nonlocal reached
            if found >= 0:
                raise _Found(found, task[-1].by_status and found == task[-1].offset)
            stop = task[-1].offset + task[-1].length
            control.count(stop - reached)
            reached = stop

        workers.run(self._tasks(start, end), self._look, deliver, gate=control)
        control.count(end - reached)

    # -- what must be looked at -------------------------------------------------------------------

    def _tasks(self, start: int, end: int) -> Iterator[list[_Piece]]:
        batch: list[_Piece] = []
        data = 0
        for piece in self._pieces(start, end):
            if batch and (data + piece.length > CHUNK or len(batch) >= _TASK_PIECES):
                yield batch
                batch, data = [], 0
            batch.append(piece)
            data += piece.length
        if batch:
            yield batch

    def _pieces(self, start: int, end: int) -> Iterator[_Piece]:
        """Ranges of at most CHUNK bytes; the first disagreement of the allocation ends them in strict mode."""
        stride = Stride(image.node for disk in self.disks for image in disk.images)
        for offset, length in stride.windows(start, end):
            starts, one, two = self._status(offset, length, stride)
            stops = _ends(starts, offset + length)
            limit = offset + length
            if self.strict:
                clash = (one != two).nonzero()[0]
                if len(clash):
                    limit = int(starts[clash[0]])
            zero_one, zero_two = one & _ZERO_BIT > 0, two & _ZERO_BIT > 0
            wanted = ~(zero_one & zero_two) & (starts < limit)
            which = zero_one * _SECOND + zero_two * _FIRST
            for first, last, kind in zip(starts[wanted].tolist(), stops[wanted].tolist(), which[wanted].tolist(),
                                         strict=True):  # fmt: skip
                for at in range(first, last, CHUNK):
                    yield _Piece(at, min(CHUNK, last - at), kind)
            if limit < offset + length:
                yield _Piece(limit, 0, _BOTH, True)
                return

    def _status(
        self, offset: int, length: int, stride: Stride
    ) -> tuple[NDArray[np.int64], NDArray[np.uint8], NDArray[np.uint8]]:
        """(row starts, status in the first, status in the second); rows end where either changes."""
        import numpy as np

        maps = [_statuses(disk, offset, length) for disk in self.disks]
        stride.saw(len(maps[0][0]) + len(maps[1][0]))
        starts = np.union1d(maps[0][0], maps[1][0])
        one, two = (status[np.searchsorted(begin, starts, "right") - 1] for begin, status in maps)
        keep = np.concatenate(([True], (one[1:] != one[:-1]) | (two[1:] != two[:-1])))
        return starts[keep], one[keep], two[keep]

    # -- looking ----------------------------------------------------------------------------------

    def _look(self, task: list[_Piece]) -> int:
        """The offset of the first difference in ``task``, -1 if there is none."""
        with self._lock_buffers:
            pair = self._buffers.pop() if self._buffers else None
        one, two = pair or (_Buffer(CHUNK), _Buffer(CHUNK))
        found = -1
        for offset, length, which, by_status in task:
            if by_status:
                found = offset
                break
            differs = -1
            if which != _SECOND:
                self._read(0, offset, one.view[:length])
            if which != _FIRST:
                self._read(1, offset, two.view[:length])
            if which == _BOTH:
                if self._memcmp(one.address, two.address, length):
                    differs = _first_difference(one, two, length)
            else:
                differs = _first_nonzero(one if which == _FIRST else two, length)
            if differs >= 0:
                found = offset + differs
                break
        with self._lock_buffers:
            self._buffers.append((one, two))
        return found

    def _read(self, index: int, offset: int, view: memoryview) -> None:
        try:
            self.disks[index].read_into(offset, view)
        except ByreError as error:
            error.message = f"error while reading offset {offset}: {error.message}"
            raise


class _Buffer:
    """Memory with its address, for comparing outside the interpreter lock."""

    def __init__(self, size: int) -> None:
        self.view = aligned_buffer(size)
        self.address = address_of(self.view)


def _first_difference(one: _Buffer, two: _Buffer, length: int) -> int:
    """Offset of the first sector that differs; there is a difference."""
    import numpy as np

    unequal = np.frombuffer(one.view[:length], np.uint8) != np.frombuffer(two.view[:length], np.uint8)
    return int(unequal.argmax()) // SECTOR * SECTOR


def _first_nonzero(buffer: _Buffer, length: int) -> int:
    """Offset of the first sector that is not all zeroes, -1 if none."""
    import numpy as np

    whole = length // 8 * 8
    words = np.frombuffer(buffer.view[:whole], np.uint64)
    rest = buffer.view[whole:length]
    if not np.bitwise_or.reduce(words) and not any(rest):
        return -1
    return int((np.frombuffer(buffer.view[:length], np.uint8) != 0).argmax()) // SECTOR * SECTOR


def _memory_compare() -> Callable[[int, int, int], int]:
    """The C library's memcmp: by address, outside the interpreter lock."""
    import ctypes

    function = ctypes.CDLL(None).memcmp
    function.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
    function.restype = ctypes.c_int
    return function


# -- status ---------------------------------------------------------------------------------------


def _ends(starts: NDArray[np.int64], end: int) -> NDArray[np.int64]:
    import numpy as np

    return np.append(starts[1:], end)


def _statuses(disk: SourceDisk, offset: int, length: int) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
    """(row starts, status): bit 0 reads as zeroes, bit 1 has data, bit 2 in some layer, bit 3 has a place of its own.

    :raises StatusError: the image cannot tell
    """
    import numpy as np

    image = disk.images[0]
    inside = max(0, min(length, image.size - offset))
    if not inside:
        return np.array([offset], np.int64), np.array([_ZERO_BIT], np.uint8)
    try:
        found, in_hole = split_at_holes(image.node, image.extents(offset, inside))
    except ByreError as error:
        raise StatusError(f"sector allocation test failed: {error.message}", where=error.where) from error
    table = np.zeros(4, np.uint8)
    table[[KIND_DATA, KIND_ZERO, UNALLOCATED, COMPRESSED]] = (2 | 4, 1 | 4, 1, 2 | 4)
    placed = (found.host >= 0) & (found.kind != COMPRESSED) & (found.kind != UNALLOCATED)
    return found.offset, (table[found.kind] | placed * np.uint8(8) | in_hole * np.uint8(1)).astype(np.uint8)
