"""A cache of metadata tables; in which order they reach the disk is for the format that owns them.

A table is kept as an ``array("Q")`` in host byte order (scalar code indexes it, bulk code views it with
numpy) or, where entries are not 64 bits wide, as the bytes on disk. What changed is remembered by
pages of 4 KiB, and only those are written; entries never cross a 512-byte sector, so a torn write
leaves each entry old or new.

Where tables are large and the cache does not hold all of them, what is only looked at may be kept in parts
(``part_length``): a table is whole before it changes, and its parts are forgotten then.
"""

from __future__ import annotations

import sys
from array import array
from time import monotonic

from ..typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from ..graph.node import Node

__all__ = ["PAGE", "Table", "TableCache", "decode_words", "encode_words", "page_runs"]

PAGE: Final = 4096


def decode_words(data: bytes | bytearray | memoryview, order: str = "big") -> array[int]:
    """64-bit words in host order; ``order`` is that of ``data``, "big" or "little"."""
    words: array[int] = array("Q")
    words.frombytes(data)
    if order != sys.byteorder:
        words.byteswap()
    return words


def encode_words(words: array[int], order: str = "big") -> bytes:
    """The inverse of :func:`decode_words`."""
    if order != sys.byteorder:
        words = words[:]
        words.byteswap()
    return words.tobytes()


def page_runs(pages: Iterable[int], length: int) -> list[tuple[int, int]]:
    """(start, end) byte ranges of runs of neighbouring pages, cut at ``length``."""
    runs: list[tuple[int, int]] = []
    for page in sorted(pages):
        start, end = page * PAGE, min((page + 1) * PAGE, length)
        if runs and runs[-1][1] == start:
            runs[-1] = (runs[-1][0], end)
        else:
            runs.append((start, end))
    return runs


class Table:
    """One table in memory. Guarded by the lock of the node that owns the cache.

    :ivar host: where it lies in the file
    :ivar words: 64-bit entries in host byte order (``None`` for a table of bytes)
    :ivar data: bytes as on disk (``None`` for a table of words)
    :ivar order: of the words in the file
    :ivar dirty: changed pages
    """

    __slots__ = ("data", "dirty", "host", "order", "used", "words")

    def __init__(self, host: int, words: array[int] | None, data: bytearray | None, order: str = "big") -> None:
        self.host = host
        self.order = order
        self.words = words
        self.data = data
        self.dirty: set[int] = set()
        self.used = True

    def mark(self, first: int, last: int) -> None:
        """Byte positions ``first`` to ``last`` (inclusive) changed."""
        low, high = first // PAGE, last // PAGE
        if low == high:
            self.dirty.add(low)
        else:
            self.dirty.update(range(low, high + 1))

    def encoded(self, start: int, end: int) -> bytes | bytearray:
        """Bytes ``[start, end)`` as on disk."""
        if self.words is not None:
            return encode_words(self.words[start // 8 : end // 8], self.order)
        assert self.data is not None
        return self.data[start:end]


class TableCache:
    """Tables of one size in one file, by host offset.

    Guarded by the lock of the node that owns it. Clean tables are dropped beyond ``capacity``; when all are
    dirty, ``relieve`` is called, which must write them back in safe order.

    :param length: bytes of a table
    :param capacity: how many tables may be kept
    :param words: tables of 64-bit entries rather than bytes
    :param order: that of the entries in the file, "big" or "little"
    :ivar vet: called with the host offset of a table about to be written; raises if it must not be
    :ivar part_length: bytes of a part, a power of two; 0 to keep whole tables only
    :ivar parts: words of tables that are not here as a whole, by the offset of the part; they count as much as the
        tables they are of
    :ivar rounds: how often all that changed was written
    :ivar clean_interval: seconds after which a clean table that was not used is dropped; 0 for never
    :ivar report: told ``load_event`` and ``update_event`` before a table is read or written
    """

    load_event = update_event = ""

    def __init__(self, file: Node, length: int, capacity: int, words: bool, relieve: Callable[[], None],
                 order: str = "big") -> None:  # fmt: skip
        self.file = file
        self.order = order
        self.length = length
        self.capacity = max(capacity, 2)
        self.words = words
        self.tables: dict[int, Table] = {}
        self.dirty: dict[int, Table] = {}
        self.part_length = 0
        self.parts: dict[int, array[int]] = {}
        self.rounds = 0
        self._relieve = relieve
        self.vet: Callable[[int], None] | None = None
        self.clean_interval = 0
        self._cleaned = monotonic()
        self.report: Callable[[str], None] | None = None

    def get(self, host: int) -> Table:
        """The table at ``host``, from memory or the file."""
        table = self.tables.get(host)
        if table is None:
            self._make_room()
            self._forget_parts(host)
            if self.report is not None:
                self.report(self.load_event)
            data = bytearray(self.length)
            self.file.read_into(host, memoryview(data))
            if self.words:
                table = Table(host, decode_words(data, self.order), None, self.order)
            else:
                table = Table(host, None, data)
            self.tables[host] = table
        table.used = True
        return table

    def part(self, host: int, position: int) -> array[int]:
        """Words of the part that byte ``position`` of the table at ``host`` lies in; to look at, not to change."""
        at = host + position // self.part_length * self.part_length
        words = self.parts.get(at)
        if words is None:
            self._make_room()
            most = (self.capacity - len(self.tables)) * self.length // self.part_length
            if len(self.parts) >= most:
                # The oldest ones; looking for the least used would cost as much as reading it again.
                for old in list(self.parts)[: len(self.parts) - most + 1 + most // 8]:
                    del self.parts[old]
            if self.report is not None:
                self.report(self.load_event)
            data = bytearray(self.part_length)
            self.file.read_into(at, memoryview(data))
            words = self.parts[at] = decode_words(data, self.order)
        return words

    def use_parts(self, length: int) -> None:
        """Parts have ``length`` bytes from now on; 0 for none."""
        self.parts.clear()
        self.part_length = length if length < self.length else 0

    def _forget_parts(self, host: int) -> None:
        if self.parts:
            for at in range(host, host + self.length, self.part_length):
                self.parts.pop(at, None)

    def create(self, host: int, like: Table | None = None) -> Table:
        """A new table at ``host``, empty or a copy, wholly dirty; nothing is read."""
        self._make_room()
        self._forget_parts(host)
        if self.words:
            words = like.words[:] if like and like.words is not None else array("Q", bytes(self.length))
            table = Table(host, words, None, self.order)
        else:
            table = Table(
                host, None, bytearray(like.data) if like and like.data is not None else bytearray(self.length)
            )
        self.tables[host] = table
        self.mark(table, 0, self.length - 1)
        return table

    def mark(self, table: Table, first: int, last: int) -> None:
        """Bytes ``first`` to ``last`` (inclusive) of ``table`` changed."""
        table.mark(first, last)
        self.dirty[table.host] = table

    def forget(self, host: int) -> None:
        """The table at ``host`` exists no longer; its changes need not be written."""
        self.tables.pop(host, None)
        self.dirty.pop(host, None)
        self._forget_parts(host)

    def drop_all(self) -> None:
        """Forget everything; there must be no dirty table."""
        self.tables.clear()
        self.dirty.clear()
        self.parts.clear()

    def write_dirty(self) -> int:
        """Write the changed pages; the number of tables written."""
        count = len(self.dirty)
        self.rounds += 1
        for host in sorted(self.dirty):
            table = self.dirty[host]
            if self.vet is not None:
                self.vet(host)
            if self.report is not None:
                self.report(self.update_event)
            for start, end in page_runs(table.dirty, self.length):
                self.file.write_from(host + start, memoryview(table.encoded(start, end)))
            table.dirty.clear()
        self.dirty.clear()
        return count

    def copies(self) -> list[tuple[Table, int, int, bytes | bytearray]]:
        """(table, start, end, bytes) of all that changed, as it is now."""
        tables = [self.dirty[host] for host in sorted(self.dirty)]
        return [(table, start, end, table.encoded(start, end))
                for table in tables for start, end in page_runs(table.dirty, self.length)]  # fmt: skip

    def write_copies(self, copies: list[tuple[Table, int, int, bytes | bytearray]]) -> None:
        """Write what was copied; what has changed since stays to be written. There was no other round in between."""
        for table, start, end, data in copies:
            if self.dirty.get(table.host) is not table:
                continue  # it exists no longer
            if self.vet is not None:
                self.vet(table.host)
            self.file.write_from(table.host + start, memoryview(data))
            for at in range(start, end, PAGE):
                if table.encoded(at, min(at + PAGE, end)) == data[at - start : at - start + PAGE]:
                    table.dirty.discard(at // PAGE)
            if not table.dirty:
                del self.dirty[table.host]

    def clean(self) -> None:
        """If it is time: drop clean tables that were not used since the last time. No thread does that by itself."""
        now = monotonic()
        if not self.clean_interval or now - self._cleaned < self.clean_interval:
            return
        self._cleaned = now
        self.parts.clear()
        for host, table in list(self.tables.items()):
            if table.used:
                table.used = False
            elif not table.dirty:
                del self.tables[host]

    def _make_room(self) -> None:
        if self.clean_interval:
            self.clean()
        if len(self.tables) < self.capacity:
            if self.parts and len(self.parts) * self.part_length > (self.capacity - len(self.tables) - 1) * self.length:
                self.parts.clear()
            return
        if len(self.dirty) >= self.capacity - 1:
            self._relieve()
        # An eighth at a time, for looking through the tables costs as much as many reads.
        goal = self.capacity - 1 - self.capacity // 8
        # Second chance: a table used since the last round is passed over once.
        for host, table in list(self.tables.items()):
            if len(self.tables) <= goal:
                return
            if table.dirty:
                continue
            if table.used:
                table.used = False
                del self.tables[host]
                self.tables[host] = table
            else:
                del self.tables[host]
        for host, table in list(self.tables.items()):
            if len(self.tables) <= goal:
                return
            if not table.dirty:
                del self.tables[host]
