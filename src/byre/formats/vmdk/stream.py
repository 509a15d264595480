"""A stream-optimized disk written from beginning to end, without going back: into a pipe, for instance.

Header, descriptor, compressed grains in the order of the disk, each grain table behind its grains, then directory and
footer ("Stream-Optimized Compressed Sparse Extents"). Memory: one grain table, and four bytes for each 32 MiB of disk.
"""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING, Final, cast

from ...errors import InvalidArgument, NotSupported
from ...graph.node import PERM_ALL, PERM_READ, Node
from ...units import SECTOR
from . import layout
from .compression import compressor, framed
from .creation import GRAIN_SECTORS, TABLE_ENTRIES, new_descriptor, plan
from .tables import encode_entries

if TYPE_CHECKING:
    from collections.abc import Callable

    from ...graph.child import Child
    from ...options import OptionValues

__all__ = ["StreamNode"]

_OVERHEAD: Final = 128
"""Sectors before the first grain, as VMware leaves them."""
_GRAIN: Final = GRAIN_SECTORS * SECTOR
_SPAN: Final = TABLE_ENTRIES * _GRAIN


class StreamNode(Node):
    """The target of a copy; takes compressed grains in ascending order, and nothing else.

    Guarded by: nothing; a copy in order delivers one piece at a time.

    :param write: takes the next bytes of the stream
    :param options: of the format's creation; "size" among them
    :raises InvalidArgument: options that a stream cannot have
    """

    kind = "format"
    driver = "vmdk"
    cluster_size = _GRAIN
    needs_compressed_writes = True

    def __init__(self, write: Callable[[bytes], None], options: OptionValues, filename: str) -> None:
        super().__init__(filename=filename)
        made = plan(options)
        if not made.compressed:
            raise InvalidArgument("only a disk with subformat=streamOptimized can be written to a pipe", where=filename)
        if made.parent_name:
            raise NotSupported("a disk that is written to a pipe cannot have a backing file", where=filename)
        self._size = made.size
        self._write = write
        self._at = 0
        self._next = 0
        self.compression_level: int | None = None
        self._compress: Callable[[memoryview], bytes] | None = None
        self._table = array("I", bytes(4 * TABLE_ENTRIES))
        self._directory: array[int] = array("I", bytes(4 * -(-made.size // _SPAN)))
        flags = layout.FLAG_NEWLINES | layout.FLAG_COMPRESSED | layout.FLAG_MARKERS
        self._header = layout.SparseHeader(3, flags, made.size // SECTOR, GRAIN_SECTORS, 1, 20, TABLE_ENTRIES, 0,
                                           layout.GD_AT_END, _OVERHEAD, 0, layout.DEFLATE)  # fmt: skip
        text = new_descriptor(made, filename)
        self._put((layout.encode_header(self._header) + text).ljust(_OVERHEAD * SECTOR, b"\0"))

    @property
    def size(self) -> int:
        return self._size

    @property
    def has_zero_init(self) -> bool:
        return True

    def child_permissions(self, child: Child, used: int, shared: int) -> tuple[int, int]:
        return used & PERM_READ, PERM_ALL

    def read_into(self, offset: int, buffer: memoryview) -> None:
        raise NotSupported("a stream cannot be read while it is written", where=self.filename)

    def write_zeroes(self, offset: int, length: int, flags: int = 0) -> None:
        """What is not written reads as zeroes."""

    # -- grains -----------------------------------------------------------------------------------

    def compress(self, buffer: memoryview) -> bytes | None:
        """One grain compressed. No lock; thread-safe."""
        if self._compress is None:
            self._compress = compressor(self.compression_level)
        return self._compress(buffer)

    def write_compressed(self, offset: int, buffer: memoryview) -> None:
        self.write_compressed_clusters(offset, [cast("bytes", self.compress(buffer))])

    def write_compressed_clusters(self, offset: int, payloads: list[bytes]) -> None:
        """The next grains of the disk.

        :raises NotSupported: an earlier one
        """
        for payload in payloads:
            if offset < self._next or offset % _GRAIN:
                raise NotSupported(f"a stream is written in order: {offset:#x} is not at or behind {self._next:#x}",
                                   where=self.filename)  # fmt: skip
            if offset // _SPAN != max(self._next - 1, 0) // _SPAN:
                self._finish_table()
            self._table[offset % _SPAN // _GRAIN] = self._at // SECTOR
            self._put(framed(offset // SECTOR, payload))
            offset = self._next = offset + _GRAIN

    def _put(self, data: bytes) -> None:
        self._write(data)
        self._at += len(data)

    def _finish_table(self) -> None:
        """The table of the grains that were written last, if there are any."""
        if not any(self._table):
            return
        sectors = TABLE_ENTRIES * 4 // SECTOR
        self._put(layout.encode_marker(layout.Marker(sectors, 0, layout.MARKER_TABLE)))
        self._directory[(self._next - 1) // _SPAN] = self._at // SECTOR
        self._put(encode_entries(self._table))
        self._table = array("I", bytes(4 * TABLE_ENTRIES))

    def finish(self) -> None:
        """The end of the stream. Without it, nobody takes what was written for a whole disk."""
        self._finish_table()
        entries = encode_entries(self._directory)
        sectors = -(-len(entries) // SECTOR)
        self._put(layout.encode_marker(layout.Marker(sectors, 0, layout.MARKER_DIRECTORY)))
        place = self._at // SECTOR
        self._put(entries.ljust(sectors * SECTOR, b"\0"))
        self._put(layout.encode_footer(self._header._replace(directory=place)))
