"""Bitmaps: granularity, merging, states, successors, many threads."""

from __future__ import annotations

import random
import threading

import pytest

from byre.bitmaps.bitmap import Bitmap
from byre.errors import Busy, ByreError, InvalidArgument, NotSupported

MIB = 1 << 20


def dirty(bitmap: Bitmap) -> list[tuple[int, int]]:
    rows: list[tuple[int, int]] = []
    for starts, lengths in bitmap.runs():
        for start, length in zip(starts.tolist(), lengths.tolist(), strict=True):
            if rows and sum(rows[-1]) == start:
                rows[-1] = (rows[-1][0], rows[-1][1] + length)
            else:
                rows.append((start, length))
    return rows


@pytest.mark.parametrize("granularity", [0, 1, 256, 511, 1000, 3 << 20, 1 << 32])
def test_granularities_that_are_refused(granularity: int) -> None:
    with pytest.raises(InvalidArgument, match="power of 2"):
        Bitmap(MIB, granularity)


def test_marks_cover_what_was_written_and_no_bit_more() -> None:
    bitmap = Bitmap(10 * MIB, 65536)
    bitmap.mark(65535, 2)
    bitmap.mark(5 * MIB, 1)
    bitmap.mark(10 * MIB - 1, 100)
    bitmap.mark(11 * MIB, 100)
    assert dirty(bitmap) == [(0, 131072), (5 * MIB, 65536), (10 * MIB - 65536, 65536)]
    assert bitmap.get(65536)
    assert not bitmap.get(131072)
    assert not bitmap.get(10 * MIB)
    assert bitmap.any(0, 1)
    assert not bitmap.any(131072, 5 * MIB - 131072)


def test_the_last_bit_counts_for_what_the_disk_has_of_it() -> None:
    bitmap = Bitmap(3 * MIB + 512, MIB)
    assert bitmap.length == 4
    bitmap.mark(0, 3 * MIB + 512)
    assert bitmap.dirty_bytes == 3 * MIB + 512
    assert dirty(bitmap) == [(0, 3 * MIB + 512)]
    # The end of the disk ends the last part as well.
    bitmap.clear(2 * MIB, MIB + 512)
    assert dirty(bitmap) == [(0, 2 * MIB)]


def test_clearing_leaves_parts_that_are_not_wholly_inside() -> None:
    bitmap = Bitmap(MIB, 4096)
    bitmap.set(0, MIB)
    bitmap.clear(1, 8192)
    assert dirty(bitmap) == [(0, 4096), (8192, MIB - 8192)]


def test_taking_gives_the_dirty_ranges_and_clears_them() -> None:
    bitmap = Bitmap(MIB, 4096)
    bitmap.set(4096, 8192)
    bitmap.set(40960, 1)
    assert bitmap.take(0, MIB // 2) == [(4096, 8192), (40960, 4096)]
    assert bitmap.dirty_bytes == 0
    assert bitmap.take(0, MIB) == []


def test_looking_for_the_next() -> None:
    bitmap = Bitmap(MIB, 4096)
    bitmap.set(8192, 12288)
    assert bitmap.next_dirty(0) == (8192, 12288)
    assert bitmap.next_dirty(10000) == (10000, 10480)
    assert bitmap.next_dirty(0, most=5000) == (8192, 5000)
    assert bitmap.next_dirty(20480) is None
    assert bitmap.next_dirty(0, 8192) is None
    assert bitmap.next_clean(8192) == 20480
    assert bitmap.next_clean(8192, 20000) is None
    assert bitmap.next_clean(100) == 100


@pytest.mark.parametrize("seed", range(8))
def test_merging_any_granularity_into_any_other(seed: int) -> None:
    chooser = random.Random(seed)
    size = chooser.choice([MIB, 64 * MIB, 300 * MIB + 512, 5 << 30])
    one = Bitmap(size, 1 << chooser.randrange(9, 26))
    two = Bitmap(size, 1 << chooser.randrange(9, 26))
    for bitmap in (one, two):
        for _ in range(chooser.randrange(40)):
            bitmap.set(chooser.randrange(size), chooser.choice([1, 4096, MIB, size // 3]))
    wanted = Bitmap(size, one.granularity)
    for source in (one, two):
        for start, length in dirty(source):
            wanted.set(start, length)
    one.merge(two)
    assert dirty(one) == dirty(wanted)
    assert one.dirty_bits == wanted.dirty_bits


def test_merging_is_refused_where_it_makes_no_sense() -> None:
    with pytest.raises(InvalidArgument, match="different sizes"):
        Bitmap(MIB).merge(Bitmap(2 * MIB))
    broken = Bitmap(MIB, name="b")
    broken.inconsistent = True
    with pytest.raises(NotSupported, match="inconsistent"):
        Bitmap(MIB).merge(broken)
    with pytest.raises(NotSupported, match="inconsistent"):
        broken.merge(Bitmap(MIB))
    same = Bitmap(MIB)
    same.set(0, 1)
    same.merge(same)
    assert same.dirty_bits == 1


def test_a_disabled_bitmap_marks_nothing() -> None:
    bitmap = Bitmap(MIB, enabled=False)
    bitmap.mark(0, MIB)
    assert bitmap.dirty_bits == 0
    bitmap.enable()
    bitmap.mark(0, 1)
    bitmap.disable()
    bitmap.mark(MIB // 2, 1)
    assert dirty(bitmap) == [(0, 65536)]


@pytest.mark.parametrize("give_up", [True, False])
def test_a_successor_collects_what_is_written_meanwhile(give_up: bool) -> None:
    bitmap = Bitmap(MIB, 4096, "b")
    bitmap.mark(0, 4096)
    bitmap.freeze()
    assert bitmap.busy
    assert bitmap.enabled
    bitmap.mark(8192, 4096)
    assert dirty(bitmap) == [(0, 4096)]
    for action in (bitmap.freeze, bitmap.occupy, bitmap.check):
        with pytest.raises(Busy):
            action()
    (bitmap.reclaim if give_up else bitmap.abdicate)()
    assert dirty(bitmap) == ([(0, 4096), (8192, 4096)] if give_up else [(8192, 4096)])
    assert not bitmap.busy
    with pytest.raises(InvalidArgument, match="no successor"):
        bitmap.reclaim()


def test_resizing_with_a_successor() -> None:
    bitmap = Bitmap(MIB, 4096)
    bitmap.mark(0, MIB)
    bitmap.freeze()
    bitmap.resize(2 * MIB)
    bitmap.mark(2 * MIB - 1, 1)
    bitmap.reclaim()
    assert dirty(bitmap) == [(0, MIB), (2 * MIB - 4096, 4096)]
    bitmap.resize(MIB // 2)
    assert dirty(bitmap) == [(0, MIB // 2)]
    bitmap.resize(MIB)
    assert dirty(bitmap) == [(0, MIB // 2)]


def test_only_one_job_has_it() -> None:
    bitmap = Bitmap(MIB, name="b")
    bitmap.occupy()
    with pytest.raises(Busy):
        bitmap.occupy()
    bitmap.vacate()
    bitmap.check()


def test_a_copy_on_disk_is_told_before_each_change_but_not_of_marks() -> None:
    bitmap = Bitmap(MIB)
    told: list[Bitmap] = []
    bitmap.unsync = told.append
    bitmap.mark(0, 1)
    assert not told
    for number, change in enumerate((bitmap.clear_all, bitmap.disable, bitmap.enable, lambda: bitmap.set(0, 1)), 1):
        change()
        assert len(told) == number

    def refuse(_bitmap: Bitmap) -> None:
        raise ByreError("no")

    bitmap.unsync = refuse
    with pytest.raises(ByreError, match="no"):
        bitmap.clear_all()
    assert bitmap.dirty_bits == 1


def test_marks_of_many_threads_are_all_there() -> None:
    bitmap = Bitmap(1 << 30, 4096)
    everything = threading.Barrier(4)

    def work(number: int) -> None:
        everything.wait()
        for index in range(number, 20000, 4):
            bitmap.mark(index * 8192, 1)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert bitmap.dirty_bits == 20000
