"""CRC-32C (Castagnoli), as VHDX headers, tables and log entries carry it.

Structures of VHDX are a few fields and then zeroes, so trailing zeroes are not walked but skipped by arithmetic: a
CRC is a polynomial remainder, and appending zero bytes multiplies it by a power of x. What is long and full of
data is cut into rows that numpy takes one column at a time; their remainders are joined by the same arithmetic.
"""

from __future__ import annotations

from ...typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["crc32c"]

_POLYNOMIAL: Final = 0x82F63B78
"""The generator, lowest power in the highest bit, without its leading term."""

_BULK: Final = 16384
"""From this many bytes on, loading numpy pays."""


def _byte_table() -> tuple[int, ...]:
    table = []
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ (_POLYNOMIAL if value & 1 else 0)
        table.append(value)
    return tuple(table)


_TABLE: Final = _byte_table()


def crc32c(data: bytes | bytearray | memoryview) -> int:
    """The CRC-32C of ``data``: initial value and final exclusive-or are all ones."""
    body = bytes(data).rstrip(b"\0")
    remainder = 0xFFFFFFFF
    if len(body) >= _BULK:
        cut = len(body) - len(body) % 4096
        remainder = _bulk(body[:cut], remainder)
        body_rest = body[cut:]
    else:
        body_rest = body
    table = _TABLE
    for byte in body_rest:
        remainder = table[(remainder ^ byte) & 0xFF] ^ remainder >> 8
    return _append_zeroes(remainder, len(data) - len(body)) ^ 0xFFFFFFFF


def _multiply(a: int, b: int) -> int:
    """The product of two remainders."""
    product = 0
    while a:
        if a & 0x80000000:
            product ^= b
        a = a << 1 & 0xFFFFFFFF
        b = b >> 1 ^ (_POLYNOMIAL if b & 1 else 0)
    return product


def _power(count: int) -> int:
    """The remainder of x to the power of 8 * ``count``: what ``count`` zero bytes multiply a remainder by."""
    result, base = 0x80000000, 0x00800000  # 1, and x^8
    while count:
        if count & 1:
            result = _multiply(result, base)
        base = _multiply(base, base)
        count >>= 1
    return result


def _append_zeroes(remainder: int, count: int) -> int:
    return _multiply(remainder, _power(count)) if count else remainder


def _bulk(data: bytes, remainder: int) -> int:
    """As the loop above, for a multiple of 4096 bytes: rows of 256 bytes side by side, then joined two by two."""
    import numpy as np

    table = np.array(_TABLE, np.uint32)
    columns = np.ascontiguousarray(np.frombuffer(data, np.uint8).reshape(-1, 256).T)
    rows = np.zeros(columns.shape[1], np.uint32)
    rows[0] = remainder
    for column in columns:
        rows = table[(rows ^ column) & 0xFF] ^ rows >> 8
    width = 256
    # An odd row at the front stands for what comes before it: nothing, with remainder 0.
    while len(rows) > 1:
        if len(rows) % 2:
            rows = np.concatenate((np.zeros(1, np.uint32), rows))
        rows = _shift(rows[0::2], width) ^ rows[1::2]
        width *= 2
    return int(rows[0])


def _shift(rows: NDArray[np.uint32], count: int) -> NDArray[np.uint32]:
    """Each remainder with ``count`` zero bytes appended."""
    import numpy as np

    factor = _power(count)
    result = np.zeros_like(rows)
    for bit in range(32):
        product = np.uint32(_multiply(1 << bit, factor))
        result ^= np.where(rows >> np.uint32(bit) & np.uint32(1) != 0, product, np.uint32(0))
    return result
