"""A set of cluster numbers for checks: bits in chunks, so that memory follows what is used, not how long a file is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from ..errors import ImageError

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["ClusterSet"]

_CHUNK_BITS: Final = 20
_MAX_CHUNKS: Final = 1024


class ClusterSet:
    """Cluster numbers seen so far. Takes 128 KiB for each million neighbours of which one is used, 128 MiB at most.

    :ivar count: how many
    :ivar highest: the highest of them, -1 if there is none
    """

    def __init__(self) -> None:
        self._chunks: dict[int, NDArray[np.uint8]] = {}
        self.count = 0
        self.highest = -1

    def add(self, clusters: NDArray[np.int64]) -> NDArray[np.int64]:
        """Add them; those that were there already, or come more than once (as often as they do).

        :raises ImageError: they are scattered over more of the file than fits into memory
        """
        if not len(clusters):
            return clusters
        found = np.sort(clusters)
        again = np.append(False, found[1:] == found[:-1])
        repeats = [found[again]]
        found = found[~again]
        self.highest = max(self.highest, int(found[-1]))
        chunk_of = found >> _CHUNK_BITS
        starts = np.flatnonzero(np.append(True, chunk_of[1:] != chunk_of[:-1]))
        for start, end in zip(starts.tolist(), [*starts[1:].tolist(), len(found)], strict=True):
            repeats.append(self._add_chunk(int(chunk_of[start]), found[start:end]))
        result = np.concatenate(repeats)
        self.count += len(clusters) - len(result)
        return result

    def _add_chunk(self, number: int, clusters: NDArray[np.int64]) -> NDArray[np.int64]:
        chunk = self._chunks.get(number)
        if chunk is None:
            if len(self._chunks) == _MAX_CHUNKS:
                raise ImageError(f"what is in use is scattered over more than {_MAX_CHUNKS} million clusters")
            chunk = self._chunks[number] = np.zeros(1 << (_CHUNK_BITS - 3), np.uint8)
        within = clusters & ((1 << _CHUNK_BITS) - 1)
        # Only the bytes touched are unpacked.
        low, high = int(within[0]) >> 3, (int(within[-1]) >> 3) + 1
        bits = np.unpackbits(chunk[low:high], bitorder="little")
        position = within - 8 * low
        before = bits[position].astype(np.bool_)
        bits[position] = 1
        chunk[low:high] = np.packbits(bits, bitorder="little")
        present: NDArray[np.int64] = clusters[before]
        return present
