"""Bitmap: which parts of a disk are dirty, at some granularity; its states and what is allowed in each.

Who marks it is in :mod:`.tracking`; where it is kept between runs is for the format. A job that works off a bitmap
freezes it: a successor collects what is written meanwhile, and afterwards either takes its place (``abdicate``) or is
joined to it (``reclaim``).
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Final

from ..errors import Busy, InvalidArgument, NotSupported
from .bits import PAGE_BITS, PAGE_BYTES, Bits, runs_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import numpy as np
    from numpy.typing import NDArray

__all__ = ["DEFAULT_GRANULARITY", "MAX_GRANULARITY", "MIN_GRANULARITY", "Bitmap", "check_granularity"]

MIN_GRANULARITY: Final = 512
MAX_GRANULARITY: Final = 1 << 31
DEFAULT_GRANULARITY: Final = 65536
_RUNS: Final = 1 << 16
"""About how many runs are given at once."""
_FEW_RUNS: Final = 256
"""Runs in a page up to which they are set one by one."""


def check_granularity(granularity: int) -> None:
    """:raises InvalidArgument: no power of two between 512 bytes and 2 GiB"""
    if not MIN_GRANULARITY <= granularity <= MAX_GRANULARITY or granularity & (granularity - 1):
        raise InvalidArgument(
            f"granularity is {granularity} bytes; it must be a power of 2, at least {MIN_GRANULARITY} and at most "
            f"{MAX_GRANULARITY}"
        )


class Bitmap:
    """A dirty bitmap over ``size`` bytes. Offsets and lengths are bytes.

    Guarded by its own lock, a leaf. Ranges are cut at the size. Methods that change it call ``unsync`` first (with no
    lock held), so that a copy on disk is known to be out of date; :meth:`mark` does not, the writer has seen to that.

    :param granularity: bytes of the disk for each bit: a power of two, 512 bytes to 2 GiB
    :param name: "" for one without a name
    :ivar persistent: kept in the image between runs
    :ivar enabled: writes are marked
    :ivar inconsistent: it was not stored when it should have been: nothing but removing it is of use
    :ivar read_only: lies in an image that is not open for writing
    :ivar modified: a bit was changed since it was loaded or stored
    :ivar unsync: called before the first change after that
    """

    def __init__(
        self,
        size: int,
        granularity: int = DEFAULT_GRANULARITY,
        name: str = "",
        *,
        persistent: bool = False,
        enabled: bool = True,
    ) -> None:
        check_granularity(granularity)
        self.name = name
        self.persistent = persistent
        self.inconsistent = False
        self.read_only = False
        self.modified = False
        self.unsync: Callable[[Bitmap], None] | None = None
        self._lock = threading.Lock()
        self._size = size
        self._shift = granularity.bit_length() - 1
        self._bits = Bits(-(-size >> self._shift))
        self._enabled = enabled
        self._busy = False
        self._successor: Bitmap | None = None

    # -- what it is -------------------------------------------------------------------------------

    @property
    def size(self) -> int:
        return self._size

    @property
    def granularity(self) -> int:
        return 1 << self._shift

    @property
    def length(self) -> int:
        """Bits."""
        return self._bits.length

    @property
    def enabled(self) -> bool:
        with self._lock:
            return self._enabled if self._successor is None else self._successor._enabled

    @property
    def busy(self) -> bool:
        """A job works with it, or it has a successor."""
        with self._lock:
            return self._busy or self._successor is not None

    @property
    def frozen(self) -> bool:
        """It has a successor."""
        with self._lock:
            return self._successor is not None

    @property
    def dirty_bits(self) -> int:
        with self._lock:
            return self._bits.count

    @property
    def dirty_bytes(self) -> int:
        """Bytes of the disk that are dirty; the last bit counts for what the disk has of it."""
        with self._lock:
            bits, short = self._bits, -self._size & (self.granularity - 1)
            last = short if short and bits.get(bits.length - 1) else 0
            return (bits.count << self._shift) - last

    def check(self, *, busy: bool = False, read_only: bool = False, inconsistent: bool = False) -> None:
        """Refuse what is not possible now; each flag allows that state.

        :raises Busy: a job works with it
        :raises NotSupported: it is inconsistent, or cannot be changed here
        """
        if self.busy and not busy:
            raise Busy(f"Bitmap {self.name!r} is currently in use by another operation and cannot be used")
        if self.read_only and not read_only:
            raise NotSupported(f"Bitmap {self.name!r} is readonly and cannot be modified")
        if self.inconsistent and not inconsistent:
            raise NotSupported(f"Bitmap {self.name!r} is inconsistent and cannot be used", hint="remove it")

    # -- marking ----------------------------------------------------------------------------------

    def mark(self, offset: int, length: int) -> None:
        """The guest wrote to this range: remember it, if enabled."""
        with self._lock:
            target = self if self._successor is None else self._successor
            if target._enabled:
                first = offset >> target._shift
                if (offset + length - 1) >> target._shift != first:
                    target._set_locked(offset, length)
                elif target._bits.set_one(first):
                    target.modified = True

    def _set_locked(self, offset: int, length: int) -> None:
        if self._bits.set(max(offset, 0) >> self._shift, (offset + length - 1 >> self._shift) + 1):
            self.modified = True

    def _changing(self) -> None:
        if self.unsync is not None:
            self.unsync(self)

    # -- bits -------------------------------------------------------------------------------------

    def set(self, offset: int, length: int) -> None:
        """Every part that the range touches becomes dirty."""
        self._changing()
        with self._lock:
            if length > 0:
                self._set_locked(offset, length)

    def clear(self, offset: int, length: int) -> None:
        """Every part that lies wholly in the range becomes clean."""
        self._changing()
        end = offset + length
        last = self._bits.length if end >= self._size else end >> self._shift
        with self._lock:
            if self._bits.clear(-(-offset >> self._shift), last):
                self.modified = True

    def clear_all(self) -> None:
        self._changing()
        with self._lock:
            if self._bits.clear_all():
                self.modified = True

    def take(self, offset: int, length: int) -> list[tuple[int, int]]:
        """The dirty ranges, cut at the range, which become clean at the same time; as :meth:`clear`."""
        self._changing()
        end = min(offset + length, self._size)
        first = -(-offset >> self._shift)
        last = self._bits.length if end >= self._size else end >> self._shift
        found = []
        with self._lock:
            at = self._bits.next(first, last)
            while at < last:
                stop = self._bits.next(at, last, wanted=False)
                found.append((at << self._shift, min(stop << self._shift, self._size) - (at << self._shift)))
                at = self._bits.next(stop, last)
            if self._bits.clear(first, last):
                self.modified = True
        return found

    def get(self, offset: int) -> bool:
        """Whether the part that byte ``offset`` lies in is dirty."""
        with self._lock:
            return 0 <= offset < self._size and self._bits.get(offset >> self._shift)

    def any(self, offset: int, length: int) -> bool:
        """Whether a part that the range touches is dirty."""
        return self.next_dirty(offset, offset + length) is not None

    def next_dirty(self, offset: int, end: int | None = None, most: int = 1 << 62) -> tuple[int, int] | None:
        """(offset, length) of the first dirty range in ``[offset, end)``, at most ``most`` bytes of it."""
        end = self._size if end is None else min(end, self._size)
        with self._lock:
            last = -(-end >> self._shift)
            first = self._bits.next(offset >> self._shift, last)
            if first >= last:
                return None
            start = max(first << self._shift, offset)
            limit = -(-min(end, start + most) >> self._shift)
            stop = self._bits.next(first, limit, wanted=False)
        return start, min(stop << self._shift, end, start + most) - start

    def next_clean(self, offset: int, end: int | None = None) -> int | None:
        """The first clean byte in ``[offset, end)``."""
        end = self._size if end is None else min(end, self._size)
        with self._lock:
            last = -(-end >> self._shift)
            found = self._bits.next(offset >> self._shift, last, wanted=False)
        return None if found >= last or offset >= end else max(found << self._shift, offset)

    def runs(self, offset: int = 0, end: int | None = None) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
        """Dirty ranges in bulk: (offsets, lengths), some ten thousand at a time, ascending; touching ones may be split.

        What is marked or cleared meanwhile behind the last ones given is seen.
        """
        import numpy as np

        stop = self._size if end is None else min(end, self._size)
        position, last = offset >> self._shift, -(-stop >> self._shift)
        while position < last:
            with self._lock:
                starts, ends, position = self._bits.runs(position, last, _RUNS)
            if len(starts):
                low = np.maximum(starts << self._shift, offset)
                yield low, np.minimum(ends << self._shift, stop) - low

    # -- states -----------------------------------------------------------------------------------

    def enable(self) -> None:
        """Writes from now on are marked."""
        self._switch(True)

    def disable(self) -> None:
        self._switch(False)

    def _switch(self, enabled: bool) -> None:
        if self.enabled == enabled:
            return
        self._changing()
        with self._lock:
            (self if self._successor is None else self._successor)._enabled = enabled

    def occupy(self) -> None:
        """A job begins to work with it.

        :raises ByreError: another one does
        """
        self.check(read_only=True)
        with self._lock:
            if self._busy or self._successor is not None:
                raise Busy(f"Bitmap {self.name!r} is currently in use by another operation and cannot be used")
            self._busy = True

    def vacate(self) -> None:
        """The job that occupied it is done."""
        with self._lock:
            self._busy = False

    # -- successor --------------------------------------------------------------------------------

    def freeze(self) -> None:
        """From now on a successor collects what is written; this one keeps its bits, and no other job may have it.

        :raises Busy: it has a successor
        """
        self.check()
        successor = Bitmap(self._size, self.granularity, enabled=self._enabled)
        with self._lock:
            if self._busy or self._successor is not None:
                raise Busy(f"Bitmap {self.name!r} is currently in use by another operation and cannot be used")
            self._successor = successor

    def abdicate(self) -> None:
        """The successor's bits take the place of these: what was dirty before is dealt with."""
        self._changing()
        with self._lock:
            successor = self._parted_locked()
            self._bits = successor._bits
            self._enabled = successor._enabled
            self.modified = True

    def reclaim(self) -> None:
        """The successor's bits are joined to these: what was dirty before still is."""
        self._changing()
        with self._lock:
            successor = self._parted_locked()
            self._enabled = successor._enabled
            for page in successor._bits.pages():
                if self._bits.join(page * PAGE_BYTES, successor._bits.page(page)[1]):
                    self.modified = True

    def _parted_locked(self) -> Bitmap:
        if self._successor is None:
            raise InvalidArgument(f"bitmap {self.name!r} has no successor")
        successor, self._successor = self._successor, None
        return successor

    # -- whole bitmaps ----------------------------------------------------------------------------

    def merge(self, source: Bitmap) -> None:
        """What is dirty in ``source`` becomes dirty here; granularities may differ.

        :raises InvalidArgument: the sizes differ
        :raises ByreError: one of them cannot be used now
        """
        self.check()
        source.check(read_only=True)
        if source.size != self._size:
            raise InvalidArgument(
                f"Bitmaps are of different sizes (destination size is {self._size}, source size is {source.size}) "
                "and can't be merged"
            )
        if source is not self:
            self.set_from(source)

    def set_from(self, source: Bitmap) -> None:
        """As :meth:`merge`, for two of one size that may be used now."""
        self._changing()
        self._join(source)

    def _join(self, source: Bitmap) -> None:
        with source._lock:
            pages = source._bits.pages()
        for page in pages:
            with source._lock:
                full, data = source._bits.page(page)
            if full:
                start = page * PAGE_BITS << source._shift
                with self._lock:
                    self._set_locked(start, min(PAGE_BITS << source._shift, self._size - start))
            elif source._shift == self._shift:
                with self._lock:
                    self.modified |= self._bits.join(page * PAGE_BYTES, data)
            elif source._shift < self._shift:
                self._join_finer(page * PAGE_BITS, data, self._shift - source._shift)
            else:
                self._join_coarser(page * PAGE_BITS, data, source._shift - self._shift)

    def _join_finer(self, first: int, data: bytes, shift: int) -> None:
        """``data`` holds bits from ``first`` on, of which ``1 << shift`` make one of this bitmap."""
        import numpy as np

        row = np.frombuffer(data, np.uint8)
        # Whole bytes where that is enough; single bits else.
        shrunk, share = (row, shift - 3) if shift >= 3 else (np.unpackbits(row, bitorder="little"), shift)
        while share > 0 and len(shrunk) > 1:
            step = min(share, 3, len(shrunk).bit_length() - 1)
            shrunk = (shrunk.view(f"u{1 << step}") != 0).view(np.uint8)
            share -= step
        at = first >> shift
        with self._lock:
            if len(shrunk) >= 8:
                self.modified |= self._bits.join(at >> 3, np.packbits(shrunk, bitorder="little").tobytes())
                return
            for index in np.flatnonzero(shrunk).tolist():
                self.modified |= self._bits.set(at + index, at + index + 1)

    def _join_coarser(self, first: int, data: bytes, shift: int) -> None:
        """``data`` holds bits from ``first`` on, each of which is ``1 << shift`` of this bitmap."""
        import numpy as np

        starts, ends = runs_of(data)
        if shift >= 5 or len(starts) < _FEW_RUNS:
            with self._lock:
                low, high = ((starts + first) << shift).tolist(), ((ends + first) << shift).tolist()
                for start, end in zip(low, high, strict=True):
                    self.modified |= self._bits.set(start, end)
            return
        flags = np.unpackbits(np.frombuffer(data, np.uint8), bitorder="little")
        spread = np.packbits(np.repeat(flags, 1 << shift), bitorder="little").tobytes()
        with self._lock:
            self.modified |= self._bits.join(first << shift >> 3, spread)

    def resize(self, size: int) -> None:
        """The disk has ``size`` bytes from now on; new parts are clean."""
        self._changing()
        with self._lock:
            if size != self._size:
                self.modified = True
            for one in (self, self._successor):
                if one is not None:
                    one._size = size
                    one._bits.resize(-(-size >> one._shift))

    # -- bytes ------------------------------------------------------------------------------------

    @property
    def byte_length(self) -> int:
        """Bytes the bits take when they are stored: bit ``n`` is bit ``n % 8`` of byte ``n // 8``."""
        return -(-self._bits.length // 8)

    def dump(self, position: int, length: int) -> bytes:
        """Stored bytes ``[position, position + length)``; zeroes behind the end."""
        with self._lock:
            return self._bits.dump(position, length)

    def load(self, position: int, data: bytes | bytearray | memoryview) -> None:
        """Join stored bytes to what is set; bits behind the end are ignored."""
        with self._lock:
            self._bits.join(position, data)

    def load_ones(self, first: int, end: int) -> None:
        """Set bits ``[first, end)``."""
        with self._lock:
            self._bits.set(first, end)

    def __repr__(self) -> str:
        states = [name for name in ("enabled", "busy", "inconsistent", "persistent") if getattr(self, name)]
        return f"<Bitmap {self.name!r} {self._size}/{self.granularity} {' '.join(states)}>"
