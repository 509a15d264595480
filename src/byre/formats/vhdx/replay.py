"""Replaying the log of a VHDX file: into the file, or for reading only, in memory ([MS-VHDX] 2.3.3)."""

from __future__ import annotations

from bisect import bisect_left, bisect_right

from ...errors import ImageError
from ...graph.node import Node
from ...io.extent import DATA, Extent
from ...typing import TYPE_CHECKING, Final
from ...units import MIB, align_up
from . import layout
from .log import LOG_LIMIT, PAGE, find_sequence

if TYPE_CHECKING:
    from ...io.extentmap import ExtentMap
    from .log import Entry

__all__ = ["ReplayedFile", "pending", "replay"]

_ZEROED_LIMIT: Final = 1024
"""Ranges of zeroes that may be laid over a file in memory."""


def pending(file: Node, header: layout.Header) -> list[Entry]:
    """The entries of the log that must be replayed before the file is used; empty after a clean shutdown.

    :raises ImageError: the log is too long, or the file was cut short since it was written
    """
    if header.log_guid == layout.NO_GUID or not header.log_length:
        return []
    if header.log_length > LOG_LIMIT:
        raise ImageError(f"a log of {header.log_length} bytes would have to be replayed, allowed are {LOG_LIMIT}")
    if header.log_offset + header.log_length > align_up(file.size, MIB):
        raise ImageError(f"the log of {header.log_length} bytes at {header.log_offset:#x} reaches past the end of the "
                         f"file ({file.size:#x})", hint="the file seems to be cut short")  # fmt: skip
    data = bytearray(header.log_length)
    file.read_into(header.log_offset, memoryview(data))
    entries = find_sequence(data, header.log_guid)
    for entry in entries:
        if entry.flushed_file_offset > file.size:
            raise ImageError(
                f"the file has {file.size} bytes, but had {entry.flushed_file_offset} when its log was written",
                hint="the file was cut short",
            )
        end = align_up(max(entry.last_file_offset, file.size), MIB)
        beyond = next((write for write in entry.writes if write.offset + write.length > end), None)
        if beyond is not None:
            raise ImageError(f"the log writes {beyond.length} bytes at {beyond.offset:#x}, past the end of the file")
    return entries


def replay(file: Node, entries: list[Entry]) -> None:
    """Write what the entries hold where it belongs. Durable on return; the log is then as good as empty."""
    for entry in entries:
        for write in entry.writes:
            if write.data is None:
                file.write_zeroes(write.offset, write.length)
            else:
                file.write_from(write.offset, memoryview(write.data))
        if entry.last_file_offset > file.size:
            file.resize(align_up(entry.last_file_offset, MIB), exact=False)
    file.flush()


class ReplayedFile(Node):
    """A file as it will be once its log is replayed; the file itself is not changed. Guarded by: nothing, it is fixed.

    Memory: the pages of the log, ``LOG_LIMIT`` at most.
    """

    kind = "filter"

    def __init__(self, below: Node, entries: list[Entry]) -> None:
        super().__init__(filename=below.filename, read_only=True)
        self.driver = below.driver
        self.file = below
        self._pages: dict[int, tuple[int, bytes]] = {}
        self._zeroed: list[tuple[int, int, int]] = []
        end = below.size
        writes = [write for entry in entries for write in entry.writes]
        for order, (offset, length, data) in enumerate(writes):
            if data is not None:
                self._pages[offset] = order, data
            elif length:
                self._zeroed.append((offset, offset + length, order))
            end = max(end, offset + length)
        if len(self._zeroed) > _ZEROED_LIMIT:
            raise ImageError(f"the log zeroes {len(self._zeroed)} ranges, allowed are {_ZEROED_LIMIT} for reading only",
                             where=below.filename, hint='run "byre check -r all"')  # fmt: skip
        self._offsets = sorted(self._pages)
        self._size = max([end, *(align_up(entry.last_file_offset, MIB) for entry in entries)])

    @property
    def size(self) -> int:
        return self._size

    def read_into(self, offset: int, buffer: memoryview) -> None:
        self.file.read_into(offset, buffer)
        end = offset + len(buffer)
        for start, stop, _ in self._zeroed:
            first, last = max(start, offset), min(stop, end)
            if first < last:
                buffer[first - offset : last - offset] = bytes(last - first)
        low = bisect_right(self._offsets, offset - PAGE)
        for page in self._offsets[low : bisect_left(self._offsets, end)]:
            order, data = self._pages[page]
            if any(start <= page < stop and order < later for start, stop, later in self._zeroed):
                continue
            first, last = max(page, offset), min(page + PAGE, end)
            buffer[first - offset : last - offset] = data[first - page : last - page]

    def _is_changed(self, offset: int, end: int) -> bool:
        low, high = bisect_right(self._offsets, offset - PAGE), bisect_left(self._offsets, end)
        return low < high or any(start < end and offset < stop for start, stop, _ in self._zeroed)

    def block_status(self, offset: int, length: int) -> Extent:
        if self._is_changed(offset, offset + length):
            return Extent(offset, length, DATA, offset)
        return self.file.block_status(offset, length)

    def extents(self, offset: int, length: int) -> ExtentMap:
        from ...io.extentmap import ExtentMap

        if self._is_changed(offset, offset + length):
            return ExtentMap.single(offset, length, DATA, offset)
        return self.file.extents(offset, length)

    def allocated_size(self) -> int:
        return self.file.allocated_size()
