"""The cache of metadata tables: what is kept, what is dropped, what is written and in which order."""

from __future__ import annotations

import itertools
import struct
from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

from byre.io.tables import PAGE, TableCache, decode_words, encode_words, page_runs
from byre.protocols.memory import MemoryNode

LENGTH = 4 * PAGE


class Disk(MemoryNode):
    """Memory that remembers reads, writes and flushes."""

    def __init__(self, data: bytes = b"") -> None:
        super().__init__(data, 64 * LENGTH)
        self.log: list[tuple[str, int, int]] = []

    def read_into(self, offset: int, buffer: memoryview) -> None:
        self.log.append(("read", offset, len(buffer)))
        super().read_into(offset, buffer)

    def write_from(self, offset: int, buffer: memoryview, flags: int = 0) -> None:
        self.log.append(("write", offset, len(buffer)))
        super().write_from(offset, buffer, flags)

    def flush(self) -> None:
        self.log.append(("flush", 0, 0))


def never() -> None:
    raise AssertionError("relieved without need")


def cache_of(disk: Disk, capacity: int = 4, *, words: bool = True) -> TableCache:
    cache = TableCache(disk, LENGTH, capacity, words, never)
    cache._relieve = cache.write_dirty  # type: ignore[assignment]
    return cache


@given(st.lists(st.integers(0, 2**64 - 1), max_size=40))
def test_words_are_big_endian_on_disk(values: list[int]) -> None:
    data = struct.pack(f">{len(values)}Q", *values)
    words = decode_words(data)
    assert words.tolist() == values
    assert encode_words(words) == data
    assert words.tolist() == values  # not swapped in place


@given(st.sets(st.integers(0, 7)), st.integers(1, 8 * PAGE))
def test_runs_of_pages(pages: set[int], length: int) -> None:
    pages = {page for page in pages if page * PAGE < length}
    runs = page_runs(pages, length)
    covered = {at for start, end in runs for at in range(start, end)} if length < 3 * PAGE else None
    if covered is not None:
        assert covered == {at for page in pages for at in range(page * PAGE, min((page + 1) * PAGE, length))}
    assert all(one[1] < other[0] for one, other in itertools.pairwise(runs))


def test_only_changed_pages_are_written() -> None:
    disk = Disk()
    cache = cache_of(disk)
    table = cache.get(LENGTH)
    assert table.words is not None
    table.words[0] = 1
    cache.mark(table, 0, 7)
    table.words[PAGE // 8 * 3] = 2
    cache.mark(table, PAGE * 3, PAGE * 3 + 7)
    assert cache.write_dirty() == 1
    assert disk.log == [("read", LENGTH, LENGTH), ("write", LENGTH, PAGE), ("write", LENGTH + 3 * PAGE, PAGE)]
    assert cache.write_dirty() == 0
    data = disk.to_bytes()[LENGTH : 2 * LENGTH]
    assert data[:8] == b"\0\0\0\0\0\0\0\1"
    assert data[3 * PAGE : 3 * PAGE + 8] == b"\0\0\0\0\0\0\0\2"


def test_a_change_across_pages_is_written_in_one_piece() -> None:
    disk = Disk()
    cache = cache_of(disk)
    cache.mark(cache.get(0), PAGE - 8, 2 * PAGE + 7)
    disk.log.clear()
    cache.write_dirty()
    assert disk.log == [("write", 0, 3 * PAGE)]


def test_a_table_is_read_once_while_it_is_kept() -> None:
    disk = Disk()
    cache = cache_of(disk)
    assert cache.get(0) is cache.get(0)
    assert len(disk.log) == 1


@pytest.mark.parametrize("words", [True, False])
def test_a_new_table_is_wholly_dirty_and_not_read(words: bool) -> None:
    disk = Disk(b"\xff" * 4 * LENGTH)
    cache = cache_of(disk, words=words)
    cache.create(LENGTH)
    copy = cache.create(2 * LENGTH, cache.get(0))
    if copy.words is not None:
        copy.words[1] = 0
    else:
        assert copy.data is not None
        copy.data[8:16] = bytes(8)
    assert cache.write_dirty() == 2
    content = disk.to_bytes()
    assert content[LENGTH : 2 * LENGTH] == bytes(LENGTH)
    assert content[2 * LENGTH : 3 * LENGTH] == b"\xff" * 8 + bytes(8) + b"\xff" * (LENGTH - 16)
    assert content[:LENGTH] == b"\xff" * LENGTH  # a copy shares nothing
    assert [entry for entry in disk.log if entry[0] == "read"] == [("read", 0, LENGTH)]


def test_clean_tables_make_room_and_recent_ones_stay() -> None:
    disk = Disk()
    cache = cache_of(disk, 4)
    for index in range(4):
        cache.get(index * LENGTH).used = False
    cache.get(0)  # used again
    cache.get(4 * LENGTH)
    assert 0 in cache.tables
    assert len(cache.tables) <= 4
    for index in range(60):
        cache.get(index * LENGTH)
        assert len(cache.tables) <= 4


def test_dirty_tables_are_never_lost() -> None:
    disk = Disk()
    cache = cache_of(disk, 4)
    for index in range(40):
        table = cache.get(index * LENGTH)
        assert table.words is not None
        table.words[5] = index + 1
        cache.mark(table, 40, 47)
        assert len(cache.tables) <= 5
    cache.write_dirty()
    content = disk.to_bytes()
    assert [content[index * LENGTH + 47] for index in range(40)] == list(range(1, 41))


def test_a_forgotten_table_is_not_written() -> None:
    disk = Disk()
    cache = cache_of(disk)
    cache.create(LENGTH)
    cache.forget(LENGTH)
    assert cache.write_dirty() == 0
    assert disk.log == []
    cache.get(0)
    cache.drop_all()
    assert not cache.tables


def test_a_failed_write_leaves_the_table_dirty() -> None:
    class Failing(Disk):
        broken = True

        def write_from(self, offset: int, buffer: memoryview, flags: int = 0) -> None:
            if self.broken:
                raise OSError("broken")
            super().write_from(offset, buffer, flags)

    disk = Failing()
    cache = cache_of(disk)
    cache.create(0)
    with pytest.raises(OSError):
        cache.write_dirty()
    disk.broken = False
    assert cache.write_dirty() == 1
    assert disk.log == [("write", 0, LENGTH)]


def test_words_survive_any_page_size() -> None:
    assert decode_words(b"") == array("Q")
