"""Which zeroes inside data become holes."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from byre.io.sparse import data_runs

SECTOR = 512


def reference_runs(sectors: list[bool], first: int, least: int) -> list[tuple[int, int, bool]]:
    """(start, count, is_data) in sectors, by the rules in words: blocks of ``least`` rounded down to a power of two,
    aligned on the disk, are data if any sector is; zero runs between data count from ``least`` sectors on."""
    block = 1 << (least.bit_length() - 1)
    flags: list[bool] = []
    position = 0
    while position < len(sectors):
        stop = min(position + block - (first + position) % block, len(sectors))
        flags += [any(sectors[position:stop])] * (stop - position)
        position = stop
    runs: list[tuple[int, int, bool]] = []
    for index, flag in enumerate(flags):
        if runs and runs[-1][2] == flag:
            runs[-1] = (runs[-1][0], runs[-1][1] + 1, flag)
        else:
            runs.append((index, 1, flag))
    merged: list[tuple[int, int, bool]] = []
    for number, (start, count, flag) in enumerate(runs):
        inner = 0 < number < len(runs) - 1
        flag = flag or (inner and count < least)
        if merged and merged[-1][2] == flag:
            merged[-1] = (merged[-1][0], merged[-1][1] + count, flag)
        else:
            merged.append((start, count, flag))
    return merged


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.booleans(), min_size=1, max_size=80),
    st.integers(0, 40),
    st.sampled_from([1, 2, 3, 4, 8, 12, 16, 24]),
)
def test_data_runs_follow_the_rules(sectors: list[bool], first: int, least: int) -> None:
    buffer = b"".join(b"\0" * 511 + bytes([flag]) for flag in sectors)
    found = data_runs(memoryview(bytearray(buffer)), first * SECTOR, least * SECTOR)
    expected = [(start * SECTOR, count * SECTOR, flag) for start, count, flag in reference_runs(sectors, first, least)]
    assert found == expected


@settings(max_examples=100, deadline=None)
@given(st.lists(st.booleans(), min_size=1, max_size=64), st.integers(0, 16), st.sampled_from([1024, 4096, 16384]))
def test_data_grows_to_whole_units(sectors: list[bool], first: int, unit: int) -> None:
    buffer = b"".join(bytes([flag]) * SECTOR for flag in sectors)
    offset = first * SECTOR
    covered = 0
    for start, length, is_data in data_runs(memoryview(bytearray(buffer)), offset, SECTOR, unit):
        assert start == covered
        covered += length
        assert is_data or not any(buffer[start : start + length])
        if start:
            assert (offset + start) % unit == 0
    assert covered == len(buffer)


def test_no_sparse_means_all_data() -> None:
    assert data_runs(memoryview(bytearray(4096)), 0, 0) == [(0, 4096, True)]
