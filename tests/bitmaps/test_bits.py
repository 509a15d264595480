"""Bits against a plain list of them, step by step."""

from __future__ import annotations

import random

import pytest

from byre.bitmaps.bits import PAGE_BITS, Bits

LENGTHS = (1, 7, 100, PAGE_BITS - 1, PAGE_BITS, PAGE_BITS + 1, 2 * PAGE_BITS, 150_000)


class Model:
    def __init__(self, length: int) -> None:
        self.bits = bytearray(length)

    def fill(self, first: int, end: int, value: int) -> None:
        end = min(end, len(self.bits))
        self.bits[first:end] = bytes([value]) * max(0, end - first)

    def next(self, bit: int, end: int, wanted: bool) -> int:
        found = self.bits.find(wanted, bit, end)
        return end if found < 0 else found

    def packed(self) -> bytes:
        return sum(1 << index for index, bit in enumerate(self.bits) if bit).to_bytes(-(-len(self.bits) // 8), "little")


def one_step(chooser: random.Random, bits: Bits, model: Model) -> None:
    length = len(model.bits)
    first = chooser.randrange(length)
    end = chooser.choice(
        [first + 1, first + chooser.randrange(1, 80), chooser.randrange(first, length) + 1, length + 9]
    )
    match chooser.randrange(7):
        case 0 | 1:
            before = sum(model.bits)
            model.fill(first, end, 1)
            assert bits.set(first, end) == (sum(model.bits) != before)
        case 2:
            before = sum(model.bits)
            model.fill(first, end, 0)
            assert bits.clear(first, end) == (sum(model.bits) != before)
        case 3:
            bits.set(0, length)
            model.fill(0, length, 1)
        case 4:
            size = chooser.choice([1, length, max(1, length // 2), length + 1, length + 70_000, PAGE_BITS])
            bits.resize(size)
            model.bits = bytearray(model.bits[:size].ljust(size, b"\0"))
        case 5:
            data = bytes(chooser.choice([0, 255, chooser.randrange(256)]) for _ in range(chooser.randrange(1, 300)))
            at = first // 8
            bits.join(at, data)
            for index in range(len(data) * 8):
                if data[index // 8] >> index % 8 & 1 and at * 8 + index < length:
                    model.bits[at * 8 + index] = 1
        case 6 if chooser.random() < 0.3:
            bits.clear_all()
            model.fill(0, length, 0)


def look(chooser: random.Random, bits: Bits, model: Model) -> None:
    length = len(model.bits)
    assert bits.length == length
    assert bits.count == sum(model.bits)
    first = chooser.randrange(length)
    assert bits.get(first) == bool(model.bits[first])
    for wanted in (True, False):
        assert bits.next(first, length, wanted) == model.next(first, length, wanted)
    found = bytearray(length)
    at = first
    while at < length:
        starts, ends, at = bits.runs(at, length, 3)
        for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
            found[start:end] = b"\1" * (end - start)
    assert found[first:] == model.bits[first:]


@pytest.mark.parametrize("seed", range(12))
def test_any_sequence_of_changes(seed: int) -> None:
    chooser = random.Random(seed)
    length = chooser.choice(LENGTHS)
    bits, model = Bits(length), Model(length)
    for _ in range(25):
        one_step(chooser, bits, model)
        look(chooser, bits, model)
    if len(model.bits) < 200_000:
        assert bits.dump(0, -(-len(model.bits) // 8)) == model.packed()


def test_a_disk_that_is_all_dirty_or_all_clean_takes_no_memory() -> None:
    bits = Bits(1 << 30)
    bits.set(0, 1 << 30)
    assert bits.count == 1 << 30
    assert not bits._pages
    bits.clear(5, 1 << 30)
    assert len(bits._pages) == 1
    bits.clear(0, 5)
    assert bits.next(0, 1 << 30) == 1 << 30


def test_bytes_are_in_the_order_of_the_specification() -> None:
    bits = Bits(20)
    bits.set(0, 1)
    bits.set(9, 11)
    assert bits.dump(0, 4) == bytes([0b1, 0b110, 0, 0])
    bits.join(2, b"\xff\xff")
    assert bits.dump(0, 4) == bytes([0b1, 0b110, 0xF, 0])


def test_a_copy_is_its_own() -> None:
    bits = Bits(PAGE_BITS * 2)
    bits.set(3, PAGE_BITS + 7)
    other = bits.copy()
    other.clear_all()
    assert bits.count == PAGE_BITS + 4
    assert other.count == 0
