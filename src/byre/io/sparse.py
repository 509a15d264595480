"""Sparse copies: which parts of a buffer are worth writing, and which are zeroes.

The rules are those of ``qemu-img convert -S``, so that a copy has the same holes. Knows no node.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["data_runs"]


def data_runs(
    buffer: memoryview, offset: int, sparse: int, unit: int = 1, alignment: int = 1
) -> list[tuple[int, int, bool]]:
    """``(start, length, is_data)`` runs that cover ``buffer``, which holds the disk from ``offset``.

    Zero runs at the buffer's ends count at any length, inner ones from ``sparse`` bytes on. Looked at in blocks
    of ``sparse`` rounded down to a power of two, aligned on the disk, so that a write begins and ends on such
    a boundary. Data grows to multiples of ``unit``, the target's unit of allocation.

    :param sparse: bytes, a multiple of 512; 0 takes everything for data
    :param alignment: what the target's requests must be aligned to, bytes, a power of two: the least size of a block
    """
    length = len(buffer)
    if not sparse:
        return [(0, length, True)]
    block = max(1 << (sparse.bit_length() - 1), alignment)
    head = min(-offset % block, length)
    zero = _zero_blocks(buffer, head, block)
    if not zero.any():
        return [(0, length, True)]
    if zero.all():
        return [(0, length, False)]
    return _join_runs(_edges(length, head, block), zero, sparse, offset, unit)


def _zero_blocks(buffer: memoryview, head: int, block: int) -> NDArray[np.bool_]:
    """Whether each block is all zeroes; a first one of ``head`` bytes and the last may be partial."""
    import numpy as np

    count = (len(buffer) - head) // block
    tail = head + count * block
    middle = _zero_rows(np.frombuffer(buffer[head:tail], np.uint64).reshape(count, block // 8))
    if not head and tail == len(buffer):
        return middle
    first = [not np.frombuffer(buffer[:head], np.uint8).any()] if head else []
    last = [not np.frombuffer(buffer[tail:], np.uint8).any()] if tail < len(buffer) else []
    return np.concatenate((np.array(first, np.bool_), middle, np.array(last, np.bool_)))


def _zero_rows(words: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Whether each row is all zeroes. Most rows of real data are settled by their first word."""
    import numpy as np

    zero: NDArray[np.bool_] = words[:, 0] == 0
    candidates = np.flatnonzero(zero)
    if len(candidates) * 4 < len(zero):
        if len(candidates):
            zero[candidates] = np.bitwise_or.reduce(words[candidates], axis=1) == 0
        return zero
    return np.asarray(np.bitwise_or.reduce(words, axis=1) == 0)


def _edges(length: int, head: int, block: int) -> NDArray[np.int64]:
    """Where the blocks begin, and the end of the last."""
    import numpy as np

    inner = np.arange(head, length, block, dtype=np.int64)
    return np.concatenate(([0], inner, [length]) if head else (inner, [length]))


def _join_runs(edges: NDArray[np.int64], zero: NDArray[np.bool_], sparse: int, offset: int,
               unit: int) -> list[tuple[int, int, bool]]:  # fmt: skip
    """Runs of like blocks; short inner zero runs become data, data grows to ``unit``."""
    import numpy as np

    cuts = np.flatnonzero(zero[1:] != zero[:-1]) + 1
    starts = edges[np.concatenate(([0], cuts))]
    stops = np.append(starts[1:], edges[-1])
    first_zero = bool(zero[0])
    data_start, data_stop = (starts[1::2], stops[1::2]) if first_zero else (starts[::2], stops[::2])
    length = int(edges[-1])
    if unit > 1:
        data_start = np.maximum((data_start + offset) // unit * unit - offset, 0)
        data_stop = np.minimum(-(-(data_stop + offset) // unit) * unit - offset, length)
    least = min(sparse, length) if unit == 1 else 1
    apart = data_start[1:] - data_stop[:-1] >= least
    data_start = data_start[np.concatenate(([True], apart))]
    data_stop = data_stop[np.concatenate((apart, [True]))]
    runs: list[tuple[int, int, bool]] = []
    position = 0
    for start, stop in zip(data_start.tolist(), data_stop.tolist(), strict=True):
        if start > position:
            runs.append((position, start - position, False))
        runs.append((start, stop - start, True))
        position = stop
    if position < length:
        runs.append((position, length - position, False))
    return runs
