"""Zero detection and aligned memory."""

from __future__ import annotations

import random

import pytest

from byre.io.buffers import address_of, aligned_buffer, is_zero, zero_fill, zero_runs, zero_view


@pytest.mark.parametrize("length", [0, 1, 7, 4096, 65535, 65536, 65537, (1 << 20) + 3])
def test_is_zero_sees_every_byte(length: int) -> None:
    buffer = bytearray(length)
    assert is_zero(buffer)
    assert is_zero(bytes(buffer))
    assert is_zero(memoryview(buffer))
    for position in {0, 1, length // 3, length // 2, length - 2, length - 1} & set(range(length)):
        buffer[position] = 1
        assert not is_zero(memoryview(buffer))
        buffer[position] = 0


def test_zero_memory() -> None:
    for length in (0, 5, 1 << 20, (2 << 20) + 1):
        view = zero_view(length)
        assert len(view) == length
        assert view.readonly
        buffer = bytearray(b"\xaa" * length)
        zero_fill(memoryview(buffer))
        assert is_zero(buffer)
        assert is_zero(view)


@pytest.mark.parametrize("alignment", [1, 512, 4096, 65536])
def test_aligned_memory(alignment: int) -> None:
    for size in (1, 511, 4096, 1 << 20):
        buffer = aligned_buffer(size, alignment)
        assert len(buffer) == size
        assert is_zero(buffer)
        assert address_of(buffer) % alignment == 0
        buffer[:] = b"\xaa" * size
    assert len(aligned_buffer(0, alignment)) == 0


def test_addresses() -> None:
    buffer = bytearray(100)
    assert address_of(memoryview(buffer)[10:]) == address_of(buffer) + 10
    text = b"some bytes"
    assert address_of(memoryview(text)[3:]) == address_of(text) + 3
    assert address_of(b"") == 0


@pytest.mark.parametrize("granularity", [8, 512, 4096, 65536])
def test_zero_runs_agree_with_granule_by_granule(granularity: int) -> None:
    source = random.Random(granularity)
    for length in (0, 1, granularity - 1, granularity, granularity + 1, 20 * granularity, 33 * granularity + 5):
        for density in (0.0, 0.1, 0.5, 0.9, 1.0):
            buffer = bytearray(length)
            for start in range(0, length, granularity):
                if source.random() < density:
                    buffer[min(length - 1, start + source.randrange(granularity))] = 1
            expected: list[tuple[int, int, bool]] = []
            for start in range(0, length, granularity):
                part = buffer[start : start + granularity]
                zero = not any(part)
                if expected and expected[-1][2] == zero:
                    before = expected.pop()
                    expected.append((before[0], before[1] + len(part), zero))
                else:
                    expected.append((start, len(part), zero))
            assert zero_runs(memoryview(buffer), granularity) == expected
