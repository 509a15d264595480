"""Grain directory and grain tables of one sparse extent: a cache of tables, written back in two copies.

"Grain Directory and Grain Table" in the specification. A hosted sparse extent keeps every table twice; readers use the
first copy, and both are written with the same content. Knows sectors of the file, nothing of the disk.
"""

from __future__ import annotations

import sys
from array import array

from ...errors import Corrupt
from ...io.tables import PAGE, page_runs
from ...typing import TYPE_CHECKING, Final
from ...units import SECTOR

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from ...graph.node import Node

__all__ = ["GrainTables", "decode_entries", "encode_entries"]

_SWAP: Final = sys.byteorder == "big"
_ONE_READ: Final = 4 << 20
"""Bulk reading takes tables that follow each other in the file in one request, of at most so many bytes."""
_ONE_WRITE: Final = 1 << 20
_LOOK_AHEAD: Final = 4096


def decode_entries(data: bytes | bytearray | memoryview, width: int) -> array[int]:
    """Little-endian numbers of ``width`` (4 or 8) bytes; what is left over at the end is ignored."""
    entries: array[int] = array("I" if width == 4 else "Q")
    entries.frombytes(memoryview(data)[: len(data) // width * width])
    if _SWAP:
        entries.byteswap()
    return entries


def encode_entries(entries: array[int]) -> bytes:
    """The inverse of :func:`decode_entries`."""
    if _SWAP:
        entries = entries[:]
        entries.byteswap()
    return entries.tobytes()


class GrainTables:
    """The tables of one extent.

    Guarded by the lock of the node that owns it. Clean tables beyond ``capacity`` are dropped; when too many are
    changed, ``relieve`` is called, which writes them back in safe order.

    :param directory: one entry for each table: the sector where it lies, 0 for none
    :param per_table: entries of a table
    :param width: bytes of an entry
    :param capacity: how many tables may be kept
    :param zero_grains: 1 in the directory stands for a table of zero grains, which is nowhere in the file
    :ivar copies: directories of the same tables, the one that readers use first
    :ivar directory_hosts: where the copies lie in the file, bytes
    :ivar dirty: indexes of changed tables
    :ivar added: indexes of tables that no directory on disk names yet
    """

    def __init__(self, file: Node, directory: array[int], directory_host: int, per_table: int, width: int,
                 capacity: int, relieve: Callable[[], None], *, zero_grains: bool = False) -> None:  # fmt: skip
        self.file = file
        self.copies = [directory]
        self.directory_hosts = [directory_host]
        self.per_table = per_table
        self.width = width
        self.table_size = per_table * width
        self.capacity = max(capacity, 4)
        self.dirty: set[int] = set()
        self.added: set[int] = set()
        self.report: Callable[[str], None] | None = None
        self._relieve = relieve
        self._zeroes = array("I", [1]) * per_table if zero_grains else None
        self._cached: dict[int, array[int]] = {}

    # -- reading ----------------------------------------------------------------------------------

    def host(self, index: int, copy: int = 0) -> int:
        """Where table ``index`` lies in the file, bytes; 0 if it is not there.

        :raises Corrupt: that is no place for a table
        """
        sector = self.copies[copy][index]
        if sector == 1 and self._zeroes is not None:
            return 0
        host = sector * SECTOR
        if host and not SECTOR <= host <= self.file.size - self.table_size and index not in self.added:
            raise self._misplaced(index, host)
        return host

    def _misplaced(self, index: int, host: int) -> Corrupt:
        return Corrupt(f"entry {index} of the grain directory points to {host:#x}; a table does not fit there, the "
                       f"file ends at {self.file.size:#x}", where=self.file.filename,
                       hint='run "byre check"')  # fmt: skip

    def get(self, index: int) -> array[int] | None:
        """Table ``index``, from memory or the file; ``None`` if there is none. Only what has a host may be changed."""
        table = self._cached.get(index)
        if table is None:
            host = self.host(index)
            if not host:
                return self._zeroes if self.copies[0][index] else None
            self._make_room()
            if self.report is not None:
                self.report("l2_load")
            data = bytearray(self.table_size)
            self.file.read_into(host, memoryview(data))
            table = self._cached[index] = decode_entries(data, self.width)
        return table

    def bulk(self, first: int, last: int) -> Iterator[tuple[int, bytes | bytearray | memoryview | None]]:
        """(how many tables, their bytes as on disk or ``None`` for missing ones) for tables ``first`` to ``last``.

        Read past the cache, so that a walk over the whole disk leaves it as it is.
        """
        index = first
        most = max(_ONE_READ // self.table_size, 1)
        while index < last:
            cached = self._cached.get(index)
            host = self.host(index) if cached is None else -1
            count = 1
            if cached is not None:
                yield 1, encode_entries(cached)
            elif not host:
                zeroes = encode_entries(self._zeroes) if self._zeroes and self.copies[0][index] else None
                count = 1 if zeroes else self._missing_run(index, last)
                yield count, zeroes
            else:
                while (count < most and index + count < last and index + count not in self._cached
                       and self.host(index + count) == host + count * self.table_size):  # fmt: skip
                    count += 1
                data = bytearray(count * self.table_size)
                self.file.read_into(host, memoryview(data))
                yield count, data
            index += count

    def _missing_run(self, index: int, last: int) -> int:
        """How many tables from ``index``, which is not there, are not there; it may be more than that."""
        raw = self.copies[0][index : min(last, index + _LOOK_AHEAD)].tobytes()
        return max((len(raw) - len(raw.lstrip(b"\0"))) // self.copies[0].itemsize, 1)

    def _make_room(self) -> None:
        if len(self._cached) < self.capacity:
            return
        if len(self.dirty) > self.capacity // 2:
            self._relieve()
        # An eighth at a time, the oldest first: looking for them costs as much as reading many.
        surplus = max(self.capacity // 8, 1)
        for index in [index for index in self._cached if index not in self.dirty][:surplus]:
            del self._cached[index]

    # -- changing ---------------------------------------------------------------------------------

    def missing(self, index: int) -> list[int]:
        """The copies in which table ``index`` is not there."""
        return [copy for copy in range(len(self.copies)) if not self.host(index, copy)]

    def add(self, index: int, hosts: Mapping[int, int]) -> array[int]:
        """Table ``index`` with a place in the file for each copy that had none; says what its absence said."""
        before = self.get(index)
        self._make_room()
        table = self._cached[index] = before[:] if before is not None else array("I", bytes(self.table_size))
        for copy, host in hosts.items():
            self.copies[copy][index] = host // SECTOR
        self.added.add(index)
        self.dirty.add(index)
        return table

    def changed(self, index: int, table: array[int]) -> None:
        """``table``, which :meth:`get` gave for ``index``, has other entries now."""
        self._cached[index] = table
        self.dirty.add(index)

    def write_back(self) -> None:
        """Changed tables, then, behind a flush, the directory entries of new ones."""
        if not self.dirty:
            return
        if self.report is not None:
            self.report("l2_update")
        for copy in range(len(self.copies)):
            self._write_tables(copy)
        if self.added:
            self.file.flush()
            for copy in range(len(self.copies)):
                self._write_directory(copy)
            self.added.clear()
        self.dirty.clear()

    def _write_tables(self, copy: int) -> None:
        """Tables that follow each other in the file are written together."""
        run: list[memoryview] = []
        start = end = -1
        for index in sorted(self.dirty):
            host = self.host(index, copy)
            if run and (host != end or end - start >= _ONE_WRITE):
                self.file.writev_from(start, run)
                run = []
            if not run:
                start = host
            run.append(memoryview(encode_entries(self._cached[index])))
            end = host + self.table_size
        if run:
            self.file.writev_from(start, run)

    def _write_directory(self, copy: int) -> None:
        width, directory, host = self.width, self.copies[copy], self.directory_hosts[copy]
        pages = {index * width // PAGE for index in self.added}
        for start, end in page_runs(pages, len(directory) * width):
            self.file.write_from(host + start, memoryview(encode_entries(directory[start // width : end // width])))
