"""ExtentMap against a model that keeps one answer per byte."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from byre.io.extent import COMPRESSED, DATA, NO_HOST, UNALLOCATED, ZERO, Extent
from byre.io.extentmap import ExtentMap


class Cell(NamedTuple):
    """What one byte is; the host of a compressed one is its cluster's descriptor."""

    kind: int
    host: int
    source: int
    depth: int


def cells(table: ExtentMap) -> dict[int, Cell]:
    found = {}
    for row, depth in zip(table, table.depth.tolist(), strict=True):
        for at in range(row.length):
            host = row.host if row.kind == COMPRESSED or row.host < 0 else row.host + at
            found[row.offset + at] = Cell(row.kind, host, row.source, depth)
    return found


def without_gaps(table: ExtentMap) -> bool:
    ends = table.offset + table.length
    return bool((table.length > 0).all() and (table.offset[1:] == ends[:-1]).all())


@st.composite
def maps(draw: st.DrawFn, start: int = 100, length: int = 24) -> ExtentMap:
    """A map over ``[start, start + length)`` whose hosts often continue each other."""
    rows = []
    at, host = start, draw(st.integers(0, 50))
    while at < start + length:
        size = draw(st.integers(1, min(6, start + length - at)))
        kind = draw(st.sampled_from([DATA, DATA, ZERO, UNALLOCATED, COMPRESSED]))
        if draw(st.integers(0, 3)) == 0:
            host = draw(st.integers(0, 50))
        known = kind in (DATA, COMPRESSED) or (kind == ZERO and draw(st.booleans()))
        rows.append(Extent(at, size, kind, host if known else NO_HOST, draw(st.integers(0, 1))))
        at, host = at + size, host + size
    return ExtentMap.from_extents(rows, draw(st.integers(0, 2)))


RANGES = st.tuples(st.integers(90, 130), st.integers(0, 40))


@given(maps())
def test_coalescing_changes_no_byte_and_leaves_nothing_to_join(table: ExtentMap) -> None:
    before = cells(table)
    joined = table.coalesced()
    assert cells(joined) == before
    assert without_gaps(joined)
    for one, other in zip(list(joined), list(joined)[1:], strict=False):
        continues = other.host == (one.host + one.length if one.host >= 0 else NO_HOST)
        assert one.kind == COMPRESSED or one.kind != other.kind or one.source != other.source or not continues
    assert cells(table) == before  # and the original is as it was


@given(maps(), RANGES)
def test_clipping(table: ExtentMap, window: tuple[int, int]) -> None:
    offset, length = window
    before = cells(table)
    part = table.clip(offset, length)
    assert cells(part) == {at: cell for at, cell in before.items() if offset <= at < offset + length}
    assert without_gaps(part)
    assert cells(table) == before


@given(maps(), st.lists(st.integers(95, 130), unique=True))
def test_splitting(table: ExtentMap, points: list[int]) -> None:
    before = cells(table)
    part = table.split_at(np.array(sorted(points), np.int64))
    assert cells(part) == before
    starts = set(part.offset.tolist())
    assert {point for point in points if 100 <= point < table.end} <= starts
    assert cells(table) == before


@given(maps(), maps())
def test_overlaying(upper: ExtentMap, lower: ExtentMap) -> None:
    above, below = cells(upper), cells(lower)
    merged = upper.overlay(lower)
    assert cells(merged) == {at: below[at] if cell.kind == UNALLOCATED else cell for at, cell in above.items()}
    assert without_gaps(merged)
    assert (cells(upper), cells(lower)) == (above, below)


@given(maps(100, 10), maps(110, 5), maps(115, 9))
def test_concatenating(one: ExtentMap, two: ExtentMap, three: ExtentMap) -> None:
    assert cells(ExtentMap.concatenate([one, two, three])) == cells(one) | cells(two) | cells(three)


@given(maps())
def test_counting(table: ExtentMap) -> None:
    model = cells(table).values()
    assert table.bytes_of(DATA, COMPRESSED) == sum(cell.kind in (DATA, COMPRESSED) for cell in model)
    assert int(table.length[table.allocated()].sum()) == sum(cell.kind != UNALLOCATED for cell in model)
    assert int(table.length[table.reads_zero()].sum()) == sum(cell.kind in (ZERO, UNALLOCATED) for cell in model)
    assert int(table.length[table.data_rows()].sum()) == sum(cell.kind == DATA for cell in model)
    assert set(table.with_depth(7).depth.tolist()) == {7}


def test_empty_maps() -> None:
    empty = ExtentMap.from_extents([])
    assert len(empty) == 0
    assert empty.end == 0
    assert list(empty.coalesced()) == list(empty.clip(0, 10)) == list(ExtentMap.concatenate([])) == []
    assert len(ExtentMap.single(5, 0, DATA)) == 0
    assert list(ExtentMap.single(5, 3, ZERO)) == [Extent(5, 3, ZERO)]


def test_offsets_of_the_largest_disks() -> None:
    end = 2**63 - 512
    table = ExtentMap.from_extents([Extent(0, end - 512, UNALLOCATED), Extent(end - 512, 512, DATA, 2**55)])
    assert table.end == end
    assert list(table.clip(end - 256, 256)) == [Extent(end - 256, 256, DATA, 2**55 + 256)]
