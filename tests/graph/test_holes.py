"""Rows cut at the holes of the file below."""

from __future__ import annotations

import numpy as np

from byre.graph.holes import Holes
from byre.graph.node import Node
from byre.io.extent import DATA, ZERO, Extent
from byre.io.extentmap import ExtentMap


class Sparse(Node):
    """100 bytes: data at 0 and 50, holes at 20 and 80."""

    looked = 0

    @property
    def size(self) -> int:
        return 100

    def extents(self, offset: int, length: int) -> ExtentMap:
        self.looked += 1
        assert (offset, length) == (0, 100)
        return ExtentMap.from_extents(
            [Extent(0, 20, DATA, 0), Extent(20, 30, ZERO, 20), Extent(50, 30, DATA, 50), Extent(80, 20, ZERO, 80)]
        )


def split(rows: list[Extent], chosen: list[bool]) -> list[tuple[int, int, int, bool]]:
    file = Sparse()
    found, holes = Holes(file).split(ExtentMap.from_extents(rows), np.array(chosen))
    assert file.looked == any(chosen)
    return list(zip(found.offset.tolist(), found.length.tolist(), found.host.tolist(), holes.tolist(), strict=True))


def test_rows_are_cut_wherever_a_hole_begins_or_ends() -> None:
    assert split([Extent(1000, 90, DATA, 5)], [True]) == [
        (1000, 15, 5, False),
        (1015, 30, 20, True),
        (1045, 30, 50, False),
        (1075, 15, 80, True),
    ]


def test_behind_the_end_there_is_a_hole() -> None:
    assert split([Extent(0, 50, DATA, 70)], [True]) == [(0, 10, 70, False), (10, 20, 80, True), (30, 20, 100, True)]


def test_other_rows_stay_and_hosts_need_no_order() -> None:
    rows = [Extent(0, 10, DATA, 60), Extent(10, 10, ZERO, 25), Extent(20, 10, DATA, 15), Extent(30, 5, DATA, -1)]
    assert split(rows, [True, False, True, False]) == [
        (0, 10, 60, False),
        (10, 10, 25, False),
        (20, 5, 15, False),
        (25, 5, 20, True),
        (30, 5, -1, False),
    ]


def test_nothing_is_looked_up_when_nothing_was_chosen() -> None:
    assert split([Extent(0, 10, DATA, 60)], [False]) == [(0, 10, 60, False)]
