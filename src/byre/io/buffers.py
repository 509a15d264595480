"""Buffers: aligned memory, runs of zeroes made and found.

What every layer needs to know about plain bytes; knows no node. ``is_zero`` is a memory comparison
without numpy, so that start-up stays cheap; ``zero_runs`` uses numpy and lets other threads run.
"""

from __future__ import annotations

from ..typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["address_of", "aligned_buffer", "is_zero", "zero_fill", "zero_runs", "zero_view"]

_ZERO_SIZE: Final = 1 << 20
_ZEROES: Final = memoryview(bytes(_ZERO_SIZE))
# "Does this begin with ...?" compares memory with any buffer, without a copy; memoryview's own == goes by element.
_COMPARE_SIZE: Final = 1 << 16
_COMPARE: Final = bytes(_COMPARE_SIZE)
_FEW_GROUPS: Final = 32


def aligned_buffer(size: int, alignment: int = 4096) -> memoryview:
    """Zeroed, writable memory of ``size`` bytes whose address is a multiple of ``alignment`` (a power of two)."""
    import mmap

    if size <= 0:
        return memoryview(bytearray(0))
    if alignment <= mmap.PAGESIZE:
        return memoryview(mmap.mmap(-1, size))[:size]
    view = memoryview(mmap.mmap(-1, size + alignment))
    skip = -address_of(view) % alignment
    return view[skip : skip + size]


def address_of(buffer: memoryview | bytes | bytearray) -> int:
    """Where the buffer's first byte lies in memory; 0 for an empty buffer."""
    import ctypes

    if len(buffer) == 0:
        return 0
    if isinstance(buffer, bytes) or (isinstance(buffer, memoryview) and buffer.readonly):
        return _address_of_readonly(buffer)
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer))


def _address_of_readonly(buffer: memoryview | bytes) -> int:
    # ctypes refuses read-only memory; numpy does not, and direct writes are never on the start-up path.
    import numpy

    return int(numpy.frombuffer(buffer, numpy.uint8).ctypes.data)


def zero_view(length: int) -> memoryview:
    """``length`` read-only zero bytes; shared up to 1 MiB, allocated beyond."""
    return _ZEROES[:length] if length <= _ZERO_SIZE else memoryview(bytes(length))


def zero_fill(buffer: memoryview) -> None:
    """Set all of ``buffer`` to zero."""
    length = len(buffer)
    if length <= _ZERO_SIZE:
        buffer[:] = _ZEROES[:length]
        return
    for start in range(0, length, _ZERO_SIZE):
        part = buffer[start : start + _ZERO_SIZE]
        part[:] = _ZEROES[: len(part)]


def is_zero(buffer: memoryview | bytes | bytearray) -> bool:
    """Whether every byte is zero; an empty buffer is."""
    length = len(buffer)
    if length == 0:
        return True
    if buffer[0] or buffer[-1] or buffer[length >> 1]:
        return False
    if length <= _COMPARE_SIZE:
        return _COMPARE.startswith(buffer)
    view = memoryview(buffer)
    return all(_COMPARE.startswith(view[start : start + _COMPARE_SIZE]) for start in range(0, length, _COMPARE_SIZE))


def zero_runs(buffer: memoryview | bytes | bytearray, granularity: int) -> list[tuple[int, int, bool]]:
    """``(start, length, is_zero)`` runs that cover ``buffer``, neighbours different.

    A granule (``granularity`` bytes from the buffer's start; a multiple of 8; the last may be shorter) is
    zero if all its bytes are.
    """
    import numpy as np

    length = len(buffer)
    if length == 0:
        return []
    count = length // granularity
    view = memoryview(buffer)
    if count > 1:
        words = np.frombuffer(view[: count * granularity], np.uint64).reshape(count, granularity // 8)
        zero = _zero_granules(words, view, granularity)
    else:
        zero = np.array([is_zero(view[:granularity])] if count else [], np.bool_)
    if length % granularity:
        zero = np.append(zero, is_zero(view[count * granularity :]))
    cuts = np.flatnonzero(zero[1:] != zero[:-1]) + 1
    starts = [0, *(cuts * granularity).tolist()]
    kind = bool(zero[0])
    runs = []
    for index, start in enumerate(starts):
        stop = starts[index + 1] if index + 1 < len(starts) else length
        runs.append((start, stop - start, kind))
        kind = not kind
    return runs


def _zero_granules(words: NDArray[np.uint64], view: memoryview, granularity: int) -> NDArray[np.bool_]:
    """One bool per row of ``words``; dense data costs one word per granule."""
    import numpy as np

    zero: NDArray[np.bool_] = words[:, 0] == 0
    if not zero.any():
        return zero
    zero &= words[:, -1] == 0
    zero &= words[:, words.shape[1] >> 1] == 0
    candidates = np.flatnonzero(zero)
    if len(candidates) == 0:
        return zero
    cuts = np.flatnonzero(np.diff(candidates) > 1) + 1
    if len(cuts) >= _FEW_GROUPS:
        zero[candidates] = np.bitwise_or.reduce(words[candidates], axis=1) == 0
        return zero
    # A long run of candidates is mostly a hole: one comparison settles it. Otherwise look at each granule.
    for group in np.split(candidates, cuts):
        first, last = int(group[0]), int(group[-1]) + 1
        if not is_zero(view[first * granularity : last * granularity]):
            zero[first:last] = np.bitwise_or.reduce(words[first:last], axis=1) == 0
    return zero
