"""Bytes in memory: a disk that costs what was written to it, and that other code can look into."""

from __future__ import annotations

import threading
from time import perf_counter_ns
from typing import TYPE_CHECKING, Final

from ..errors import InvalidArgument, NoSpace, NotSupported, ReadOnly
from ..graph.node import Node, Stats
from ..io.buffers import is_zero, zero_fill
from ..io.extent import DATA, MAY_UNMAP, ZERO, Extent
from ..options import Option, OptionSet

if TYPE_CHECKING:
    from ..graph.opening import OpenRequest

__all__ = ["OPTIONS", "MemoryNode", "open_node"]

OPTIONS: Final = OptionSet(
    Option("filename", "str", "name to show in messages"),
    Option("size", "size", "size in bytes", 0),
)

PAGE: Final = 1 << 16
_SIZE_LIMIT: Final = 1 << 63


class MemoryNode(Node):
    """Pages of 64 KiB in a dict; a missing page is a hole and reads as zeroes.

    Guarded by ``_lock``: pages and size.

    :param data: initial content
    :param size: length in bytes; that of ``data`` if left out
    """

    kind = "protocol"
    driver = "memory"

    def __init__(
        self,
        data: bytes | bytearray = b"",
        size: int | None = None,
        *,
        name: str = "",
        filename: str = "memory",
        read_only: bool = False,
    ) -> None:
        super().__init__(name=name, filename=filename, read_only=read_only)
        self._lock = threading.Lock()
        self._pages: dict[int, bytearray] = {}
        self._size = len(data) if size is None else size
        if data:
            with self._lock:
                self._store_locked(0, memoryview(data)[: self._size])

    @property
    def size(self) -> int:
        return self._size

    @property
    def has_zero_init(self) -> bool:
        return True

    def allocated_size(self) -> int:
        with self._lock:
            return len(self._pages) * PAGE

    def to_bytes(self) -> bytes:
        """All of it, as of one moment."""
        with self._lock:
            content = bytearray(self._size)
            for index, page in self._pages.items():
                part = content[index * PAGE : (index + 1) * PAGE]
                content[index * PAGE : index * PAGE + len(part)] = page[: len(part)]
        return bytes(content)

    # -- requests ---------------------------------------------------------------------------------

    def read_into(self, offset: int, buffer: memoryview) -> None:
        started = perf_counter_ns()
        length = len(buffer)
        with self._lock:
            done = 0
            while done < length:
                index, at = divmod(offset + done, PAGE)
                step = min(PAGE - at, length - done)
                page = self._pages.get(index)
                if page is None:
                    zero_fill(buffer[done : done + step])
                else:
                    buffer[done : done + step] = memoryview(page)[at : at + step]
                done += step
        self.stats.done(Stats.READ, length, started)

    buffered = True

    def read_cached(self, offset: int, buffer: memoryview) -> bool:
        self.read_into(offset, buffer)
        return True

    def write_from(self, offset: int, buffer: memoryview, flags: int = 0) -> None:
        started = perf_counter_ns()
        self._check_write(offset, len(buffer))
        with self._lock:
            self._store_locked(offset, buffer)
            if buffer:
                self._size = max(self._size, offset + len(buffer))
        self.stats.done(Stats.WRITE, len(buffer), started)
        self.stats.wrote(offset + len(buffer))

    def _check_write(self, offset: int, length: int) -> None:
        if self.read_only:
            raise ReadOnly("the memory is open read-only", where=self.filename)
        if offset + length >= _SIZE_LIMIT:
            raise NoSpace(f"cannot write {length} bytes at {offset:#x}: beyond 2^63", where=self.filename)

    def _store_locked(self, offset: int, buffer: memoryview) -> None:
        done, length = 0, len(buffer)
        while done < length:
            index, at = divmod(offset + done, PAGE)
            step = min(PAGE - at, length - done)
            page = self._pages.get(index)
            if page is None:
                page = self._pages[index] = bytearray(PAGE)
            page[at : at + step] = buffer[done : done + step]
            done += step

    def write_zeroes(self, offset: int, length: int, flags: int = 0) -> None:
        started = perf_counter_ns()
        self._check_write(offset, length)
        with self._lock:
            self._zero_locked(offset, length, drop=bool(flags & MAY_UNMAP))
            if length:
                self._size = max(self._size, offset + length)
        self.stats.done(Stats.ZEROES, length, started)
        self.stats.wrote(offset + length)

    def discard(self, offset: int, length: int) -> None:
        started = perf_counter_ns()
        self._check_write(offset, 0)
        with self._lock:
            self._zero_locked(offset, min(length, self._size - offset), drop=True)
        self.stats.done(Stats.DISCARD, length, started)

    def flush(self) -> None:
        self.stats.done(Stats.FLUSH, 0, perf_counter_ns())

    def _zero_locked(self, offset: int, length: int, *, drop: bool) -> None:
        """Zero a range; ``drop`` gives back pages that are all zero then."""
        end = offset + length
        if length <= 0:
            return
        for index in self._pages_between_locked(offset, end):
            start = max(offset - index * PAGE, 0)
            stop = min(end - index * PAGE, PAGE)
            page = self._pages[index]
            if stop - start == PAGE and drop:
                del self._pages[index]
                continue
            page[start:stop] = bytes(stop - start)
            if drop and is_zero(page):
                del self._pages[index]

    def _pages_between_locked(self, offset: int, end: int) -> list[int]:
        """Indexes of the pages there are that overlap ``[offset, end)``, ascending."""
        first, last = offset // PAGE, (end - 1) // PAGE
        if last - first < len(self._pages):
            return [index for index in range(first, last + 1) if index in self._pages]
        return sorted(index for index in self._pages if first <= index <= last)

    # -- where and how much -----------------------------------------------------------------------

    def block_status(self, offset: int, length: int) -> Extent:
        """DATA for pages that were written, ZERO for holes (host = offset) and past the end (no host)."""
        with self._lock:
            if offset >= self._size:
                return Extent(offset, length, ZERO)
            end = min(offset + length, self._size)
            index = offset // PAGE
            if index in self._pages:
                while index * PAGE < end and index in self._pages:
                    index += 1
                return Extent(offset, min(index * PAGE, end) - offset, DATA, offset)
            following = self._pages_between_locked(offset, end)
            stop = following[0] * PAGE if following else end
            return Extent(offset, min(stop, end) - offset, ZERO, offset)

    def resize(self, size: int, *, preallocation: str = "off", exact: bool = True) -> None:
        if self.read_only:
            raise ReadOnly("the memory is open read-only", where=self.filename)
        if preallocation not in ("off", "falloc", "full"):
            raise NotSupported(f"preallocation {preallocation!r} is not for memory", where=self.filename)
        if not 0 <= size < _SIZE_LIMIT:
            raise InvalidArgument(f"cannot resize to {size} bytes", where=self.filename)
        with self._lock:
            if size < self._size:
                self._zero_locked(size, self._size - size, drop=True)
            self._size = size


def open_node(request: OpenRequest) -> MemoryNode:
    return MemoryNode(size=request.options.number("size"), name=request.name,
                      filename=request.options.text("filename") or "memory",
                      read_only=request.flags.read_only)  # fmt: skip
