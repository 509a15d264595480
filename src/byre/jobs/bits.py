"""Many bits in a bytearray, the lowest of each byte first: set, ask, join, in ranges."""

from __future__ import annotations

from typing import Final

__all__ = ["PAGE", "all_set", "any_set", "fill", "join", "pages_of"]

PAGE: Final = 4096
"""Bytes that are written to the file at once."""


def pages_of(first: int, last: int) -> range:
    """The pages of the file that bits ``[first, last)`` lie in."""
    return range(first // 8 // PAGE, (last - 1) // 8 // PAGE + 1)


def fill(bits: bytearray, first: int, last: int, value: bool) -> None:
    """Set or clear bits ``[first, last)``, the lowest of a byte first."""
    while first < last and first % 8:
        _put(bits, first, value)
        first += 1
    while first < last and last % 8:
        last -= 1
        _put(bits, last, value)
    if first < last:
        bits[first // 8 : last // 8] = (b"\xff" if value else b"\0") * (last // 8 - first // 8)


def _put(bits: bytearray, index: int, value: bool) -> None:
    if value:
        bits[index // 8] |= 1 << index % 8
    else:
        bits[index // 8] &= ~(1 << index % 8)


def any_set(bits: bytearray, first: int, last: int) -> bool:
    if first >= last:
        return False
    number = int.from_bytes(bits[first // 8 : (last - 1) // 8 + 1], "little") >> first % 8
    return bool(number & ((1 << last - first) - 1))


def all_set(bits: bytearray, first: int, last: int) -> bool:
    if first >= last:
        return True
    number = int.from_bytes(bits[first // 8 : (last - 1) // 8 + 1], "little") >> first % 8
    return number & (mask := (1 << last - first) - 1) == mask


def join(one: bytearray, other: bytearray) -> bytes:
    return (int.from_bytes(one, "little") | int.from_bytes(other, "little")).to_bytes(len(one), "little")
