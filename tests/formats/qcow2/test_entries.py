"""L1, L2 and refcount entries: the scalar rules, and the bulk functions held equal to them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from byre.errors import Corrupt
from byre.formats.qcow2 import entries, entries_bulk
from byre.io.extent import COMPRESSED, DATA, NO_HOST, UNALLOCATED, ZERO

CLUSTER_BITS = st.integers(9, 21)


# -- scalar ---------------------------------------------------------------------------------------


def test_kinds_of_standard_entries() -> None:
    assert entries.classify(0, 16) == (UNALLOCATED, NO_HOST)
    assert entries.classify(entries.COPIED | 0x50000, 16) == (DATA, 0x50000)
    assert entries.classify(0x50000, 16) == (DATA, 0x50000)
    assert entries.classify(entries.ZERO, 16) == (ZERO, NO_HOST)
    assert entries.classify(entries.COPIED | 0x50000 | entries.ZERO, 16) == (ZERO, 0x50000)
    assert entries.classify(entries.COMPRESSED | 0x1234, 16) == (COMPRESSED, 0x1234)


def test_offset_zero_is_a_host_only_in_a_data_file() -> None:
    assert entries.classify(entries.COPIED, 16) == (UNALLOCATED, NO_HOST)
    assert entries.classify(entries.COPIED, 16, data_file=True) == (DATA, 0)
    assert entries.classify(entries.COPIED | 1, 16, data_file=True) == (ZERO, 0)
    assert entries.classify(1, 16, data_file=True) == (ZERO, NO_HOST)


def test_entries_against_the_specification_are_corrupt() -> None:
    with pytest.raises(Corrupt, match="zero bit"):
        entries.classify(1, 16, version=2)
    with pytest.raises(Corrupt, match="aligned"):
        entries.classify(0x50200, 16)
    with pytest.raises(Corrupt, match="aligned"):
        entries.l2_table_offset(0x50200, 16)
    with pytest.raises(Corrupt, match="compressed"):
        entries.classify(entries.COMPRESSED | 0x50200, 16, data_file=True)


def test_subclusters() -> None:
    bitmap = entries.alloc_bits(2, 5) | entries.zero_bits(5, 6)
    kinds = [entries.classify_subcluster(entries.COPIED | 0x50000, bitmap, i, 16) for i in range(32)]
    assert kinds[1] == (UNALLOCATED, NO_HOST)
    assert kinds[2] == (DATA, 0x50000 + 2 * 2048)
    assert kinds[5] == (ZERO, 0x50000 + 5 * 2048)
    assert entries.classify_subcluster(0, entries.ALL_ZERO, 3, 16) == (ZERO, NO_HOST)
    with pytest.raises(Corrupt, match="both"):
        entries.classify_subcluster(0x50000, 1 << 3 | 1 << 35, 0, 16)
    with pytest.raises(Corrupt, match="no host"):
        entries.classify_subcluster(0, 1, 0, 16)


@given(st.integers(0, (1 << 64) - 1), st.integers(0, 31))
def test_subcluster_run_is_the_longest_alike(bitmap: int, index: int) -> None:
    def state(i: int) -> tuple[int, int]:
        return bitmap >> i & 1, bitmap >> (i + 32) & 1

    expected = next((i for i in range(index, 32) if state(i) != state(index)), 32) - index
    assert entries.subcluster_run(bitmap, index) == expected


@given(CLUSTER_BITS, st.data())
def test_compressed_descriptor_round_trip(cluster_bits: int, data: st.DataObject) -> None:
    limit = min(1 << (62 - (cluster_bits - 8)), 1 << 56)
    length = data.draw(st.integers(1, 1 << cluster_bits))
    host = data.draw(st.integers(0, limit - length))
    if not entries.compressed_fits(host, length, cluster_bits):
        assert (host + length - 1) // 512 - host // 512 >= 1 << (cluster_bits - 8)
        return
    entry = entries.compressed_entry(host, length, cluster_bits)
    assert entry & entries.COMPRESSED
    assert not entry & entries.COPIED
    found, bound = entries.compressed_host(entry, cluster_bits)
    assert found == host
    assert length <= bound < length + 512
    assert (found + bound) % 512 == 0


def test_compressed_entry_refuses_what_it_cannot_describe() -> None:
    with pytest.raises(ValueError, match="no compressed entry"):
        entries.compressed_entry(1 << 50, 100, 21)


# -- bulk -----------------------------------------------------------------------------------------


def one_by_one(table: list[int], guest: int, bits: int, bitmaps: list[int] | None, data_file: bool,
               version: int) -> list[tuple[int, int, int]]:  # fmt: skip
    """Runs by the scalar functions, coalesced one unit at a time."""
    rows: list[tuple[int, int, int]] = []
    for i, entry in enumerate(table):
        if bitmaps is None or entry & entries.COMPRESSED:
            units = [(1 << bits, *entries.classify(entry, bits, version, data_file=data_file))]
        else:
            units = [(1 << bits - 5, *entries.classify_subcluster(entry, bitmaps[i], s, bits, data_file=data_file))
                     for s in range(32)]  # fmt: skip
        for length, kind, host in units:
            if rows and kind == rows[-1][1] != COMPRESSED:
                before = rows[-1]
                if host == (NO_HOST if before[2] == NO_HOST else before[2] + before[0]):
                    rows[-1] = (before[0] + length, kind, before[2])
                    continue
            rows.append((length, kind, host))
    return rows


def in_bulk(table: list[int], guest: int, bits: int, bitmaps: list[int] | None, data_file: bool,
            version: int) -> list[tuple[int, int, int]]:  # fmt: skip
    second = None if bitmaps is None else np.array(bitmaps, np.uint64)
    columns = entries_bulk.classify(np.array(table, np.uint64), guest, bits, version, bitmaps=second,
                                    data_file=data_file)  # fmt: skip
    return [(int(a), int(b), int(c)) for a, b, c in zip(*columns, strict=True)]


@st.composite
def tables(draw: st.DrawFn) -> tuple[list[int], int, int, list[int] | None, bool, int]:
    extended = draw(st.booleans())
    bits = draw(st.integers(14 if extended else 9, 21))
    count = draw(st.integers(1, 40))
    data_file = draw(st.booleans())
    guest = draw(st.integers(0, 100)) << bits
    version = 3 if extended or data_file else draw(st.sampled_from((2, 3)))
    wild = draw(st.integers(0, 9)) == 0
    table, bitmaps = [], []
    host = draw(st.integers(1, 1 << 20)) << bits
    for i in range(count):
        kind = draw(st.sampled_from("duuzZcjdddd"))
        host += 1 << bits
        if kind == "j":
            host += draw(st.integers(1, 9)) << bits
        here = guest + (i << bits) if data_file else host
        if wild and draw(st.integers(0, 20)) == 0:
            here += 512
        entry = entries.COPIED | here
        if kind == "u":
            entry = 0
        elif kind in "zZ" and version == 3 and not extended:
            entry = 1 if kind == "z" else entry | 1
        elif kind == "c" and not data_file:
            entry = entries.COMPRESSED | draw(st.integers(0, (1 << 62) - 1))
        table.append(entry)
        word = draw(st.sampled_from((entries.ALL_ALLOCATED, entries.ALL_ZERO, 0, -1, -2)))
        if word < 0:
            word = draw(st.integers(0, (1 << 64) - 1))
            if not wild:
                word &= ~(word >> 32 & entries.ALL_ALLOCATED)
        if not entry & (entries.OFFSET_MASK | entries.COPIED) and not wild:
            word &= entries.ALL_ZERO
        bitmaps.append(word)
    return table, guest, bits, bitmaps if extended else None, data_file, version


@settings(max_examples=200, deadline=None)
@given(tables())
def test_bulk_equals_scalar(case: tuple[list[int], int, int, list[int] | None, bool, int]) -> None:
    try:
        expected = one_by_one(*case)
    except Corrupt:
        with pytest.raises(Corrupt):
            in_bulk(*case)
        return
    try:
        found = in_bulk(*case)
    except Corrupt as error:
        # Only the bulk form knows the guest offset.
        if not (case[4] and "its own offset" in str(error)):
            raise
        return
    assert found == expected


def test_bulk_of_a_full_table_is_one_run() -> None:
    table = (np.arange(8192, dtype=np.uint64) + np.uint64(7)) << np.uint64(16) | np.uint64(entries.COPIED)
    length, kind, host = entries_bulk.classify(table, 0, 16)
    assert (length.tolist(), kind.tolist(), host.tolist()) == ([8192 << 16], [DATA], [7 << 16])


def test_bulk_names_the_bad_entry() -> None:
    with pytest.raises(Corrupt, match=r"guest offset 0x30000 points"):
        entries_bulk.classify(np.array([0, 0x10000, 0x10200, 0], np.uint64), 0x10000, 16)
    with pytest.raises(Corrupt, match=r"its own offset"):
        entries_bulk.classify(np.array([entries.COPIED | 0x10000], np.uint64), 0, 16, data_file=True)


def test_bulk_coalesces_compressed_when_asked() -> None:
    table = np.array([entries.COMPRESSED | i * 700 for i in range(5)] + [0], np.uint64)
    length, kind, host = entries_bulk.classify(table, 0, 16)
    assert (kind.tolist(), host.tolist()) == ([COMPRESSED] * 5 + [UNALLOCATED], [0, 700, 1400, 2100, 2800, NO_HOST])
    length, kind, _ = entries_bulk.classify(table, 0, 16, coalesce_compressed=True)
    assert (length.tolist(), kind.tolist()) == ([5 << 16, 1 << 16], [COMPRESSED, UNALLOCATED])


# -- reference counts -----------------------------------------------------------------------------


@pytest.mark.parametrize("order", range(7))
def test_refcounts_scalar_and_bulk_agree(order: int) -> None:
    import random

    generator = random.Random(order)
    block = bytearray(512)
    count = 512 * 8 >> order
    values = [generator.getrandbits(1 << order) for _ in range(count)]
    for index in generator.sample(range(count), count):
        entries.set_refcount(block, index, order, values[index])
    assert [entries.get_refcount(block, i, order) for i in range(count)] == values
    array = entries_bulk.unpack_refcounts(block, order)
    assert array.tolist() == values
    assert entries_bulk.pack_refcounts(array, order) == block
    assert entries_bulk.pack_refcounts(array.astype(np.uint64), order) == block


def test_refcounts_lie_on_disk_as_specified() -> None:
    block = bytearray(8)
    entries.set_refcount(block, 0, 0, 1)
    assert block[0] == 1
    entries.set_refcount(block, 3, 1, 2)
    assert block[0] == 0b10000001
    entries.set_refcount(block, 1, 4, 0x0102)
    assert block[2:4] == b"\x01\x02"


@pytest.mark.parametrize("order", range(7))
def test_refcount_overflow_is_refused(order: int) -> None:
    with pytest.raises(OverflowError):
        entries.set_refcount(bytearray(8), 0, order, 1 << (1 << order))
    if order < 6:
        with pytest.raises(OverflowError):
            entries_bulk.pack_refcounts(np.array([1 << (1 << order)] * 8, np.uint64), order)
