"""The block table of a VHDX file in memory: pieces of it, and which 4 KiB pages of them changed.

A table can be large (512 MiB for 64 TiB in blocks of 1 MiB), so that no more than ``_CACHE_BYTES`` of it are kept.
Entries are 64 bits, little-endian on disk, in host byte order here. Knows no states; that is :mod:`.mapping`.
"""

from __future__ import annotations

import sys
from array import array

from ...typing import TYPE_CHECKING, Final
from .log import PAGE

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    from numpy.typing import NDArray

    from ...graph.node import Node

__all__ = ["BlockTable"]

_PIECE_BITS: Final = 13
_PIECE: Final = 1 << _PIECE_BITS
"""Entries of a piece: 64 KiB."""
_CACHE_BYTES: Final = 32 << 20
_BIG_ENDIAN: Final = sys.byteorder == "big"


def _swapped(words: array[int]) -> array[int]:
    if _BIG_ENDIAN:
        words.byteswap()
    return words


class BlockTable:
    """Guarded by the node's lock.

    :param file: where it is read from
    :param offset: of the table in the file, bytes
    :param count: entries that count
    :param relieve: writes the changed pages back, for there is no room for more
    """

    def __init__(self, file: Node, offset: int, count: int, relieve: Callable[[], None]) -> None:
        self.file = file
        self.offset = offset
        self.count = count
        self._relieve = relieve
        self._pieces: dict[int, array[int]] = {}
        self._capacity = max(_CACHE_BYTES // (8 * _PIECE), 2)
        #: Changed pages, by their number in the table.
        self.dirty: set[int] = set()

    def __getitem__(self, index: int) -> int:
        return self._piece(index >> _PIECE_BITS)[index & (_PIECE - 1)]

    def __setitem__(self, index: int, entry: int) -> None:
        self._piece(index >> _PIECE_BITS)[index & (_PIECE - 1)] = entry
        self.dirty.add(index * 8 // PAGE)

    def _piece(self, number: int) -> array[int]:
        piece = self._pieces.get(number)
        if piece is None:
            self._make_room()
            piece = self._pieces[number] = self._read(number << _PIECE_BITS, _PIECE)
        return piece

    def _read(self, first: int, count: int) -> array[int]:
        """Entries from ``first``; those behind the end of the table are 0."""
        inside = max(min(count, self.count - first), 0)
        data = bytearray(8 * count)
        self.file.read_into(self.offset + 8 * first, memoryview(data)[: 8 * inside])
        words: array[int] = array("Q")
        words.frombytes(data)
        return _swapped(words)

    def _make_room(self) -> None:
        if len(self._pieces) < self._capacity:
            return
        changed = {page * PAGE // 8 >> _PIECE_BITS for page in self.dirty}
        if len(changed) >= self._capacity - 1:
            self._relieve()
            changed = {page * PAGE // 8 >> _PIECE_BITS for page in self.dirty}
        for number in [number for number in self._pieces if number not in changed][: self._capacity // 8 + 1]:
            del self._pieces[number]

    def page(self, number: int) -> bytes:
        """A page as it is to be on disk."""
        first = number * PAGE // 8
        at = first & (_PIECE - 1)
        return _swapped(self._piece(first >> _PIECE_BITS)[at : at + PAGE // 8]).tobytes()

    def bulk(self, first: int, count: int) -> NDArray[np.uint64]:
        """Entries from ``first``; pieces that are not in memory are read past the cache."""
        import numpy as np

        parts: list[NDArray[np.uint64]] = []
        end = first + count
        while first < end:
            number, at = first >> _PIECE_BITS, first & (_PIECE - 1)
            piece = self._pieces.get(number)
            if piece is not None:
                taken = piece[at : at + end - first]
            else:
                stop = number + 1
                while stop << _PIECE_BITS < end and stop - number < 16 and stop not in self._pieces:
                    stop += 1
                taken = self._read(first, min(end, stop << _PIECE_BITS) - first)
            parts.append(np.frombuffer(taken, np.uint64))
            first += len(taken)
        return np.concatenate(parts) if len(parts) > 1 else parts[0] if parts else np.empty(0, np.uint64)
