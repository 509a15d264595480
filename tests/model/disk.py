"""A disk as it should behave: bytes, a kind per cluster, layers. Short enough to be seen to be right."""

from __future__ import annotations

UNALLOCATED, DATA, ZERO, COMPRESSED = "unallocated", "data", "zero", "compressed"


class ModelDisk:
    """One layer; a cluster that is not allocated here is read from ``backing``.

    :param zeroes: the format has zero clusters (otherwise zeroes are written as data)
    """

    def __init__(self, size: int, cluster: int, backing: ModelDisk | None = None, *, zeroes: bool = True) -> None:
        self.size = size
        self.cluster = cluster
        self.backing = backing
        self.zeroes = zeroes
        self.data = bytearray(size)
        self.kinds = [UNALLOCATED] * -(-size // cluster)

    # -- reading ----------------------------------------------------------------------------------

    def read(self, offset: int, length: int) -> bytes:
        """``length`` bytes; zeroes past the end."""
        result = bytearray()
        while len(result) < length:
            at = offset + len(result)
            step = min(length - len(result), self.cluster - at % self.cluster)
            result += self._read_in_cluster(at, step)
        return bytes(result)

    def _read_in_cluster(self, at: int, length: int) -> bytes:
        inside = max(0, min(length, self.size - at))
        if not inside:
            return bytes(length)
        if self.kinds[at // self.cluster] != UNALLOCATED:
            found = bytes(self.data[at : at + inside])
        elif self.backing is not None:
            found = self.backing.read(at, inside)
        else:
            found = bytes(inside)
        return found + bytes(length - inside)

    def all(self) -> bytes:
        return self.read(0, self.size)

    # -- changing ---------------------------------------------------------------------------------

    def _clusters(self, offset: int, length: int) -> range:
        return range(offset // self.cluster, -(-(offset + length) // self.cluster))

    def _fill(self, index: int, kind: str) -> None:
        """The cluster gets ``kind`` and holds what it reads as now."""
        start = index * self.cluster
        end = min(start + self.cluster, self.size)
        self.data[start:end] = self.read(start, end - start)
        self.kinds[index] = kind

    def write(self, offset: int, data: bytes) -> None:
        for index in self._clusters(offset, len(data)):
            self._fill(index, DATA)
        self.data[offset : offset + len(data)] = data

    def write_compressed(self, offset: int, data: bytes, smaller: bool) -> None:
        """A whole cluster; ``smaller``: compression helped, otherwise it is stored as data."""
        self.write(offset, data)
        self.kinds[offset // self.cluster] = COMPRESSED if smaller else DATA

    def write_zeroes(self, offset: int, length: int) -> None:
        """Whole clusters, or clusters whose rest reads as zeroes, become ZERO or stay what they were."""
        for index in self._clusters(offset, length):
            start = max(index * self.cluster, offset)
            end = min((index + 1) * self.cluster, offset + length, self.size)
            whole = end - start == min(self.cluster, self.size - index * self.cluster)
            self._fill(index, ZERO if whole and self.zeroes else DATA)
            self.data[start:end] = bytes(end - start)

    def discard(self, offset: int, length: int) -> None:
        """Whole clusters no longer hold anything and read as zeroes; without zero clusters, nothing happens where
        the backing file would show through."""
        if not self.zeroes and self.backing is not None:
            return
        for index in self._clusters(offset, length):
            start, end = index * self.cluster, min((index + 1) * self.cluster, self.size)
            if start < offset or end > offset + length:
                continue
            held = self.kinds[index] != UNALLOCATED
            if self.zeroes and (held or self.backing is not None):
                self.kinds[index] = ZERO
            else:
                self.kinds[index] = UNALLOCATED
            self.data[start:end] = bytes(end - start)

    def resize(self, size: int) -> None:
        """New space reads as zeroes, also where the backing file has something there."""
        old = self.size
        if size < old:
            self.kinds = self.kinds[: -(-size // self.cluster)]
            self.data = self.data[:size]
            self.size = size
            return
        hidden = self.backing is not None and self.backing.size > old
        self.data += bytes(size - old)
        self.kinds += [UNALLOCATED] * (-(-size // self.cluster) - len(self.kinds))
        self.size = size
        if hidden:
            self.write_zeroes(old, min(size, self.backing.size) - old)  # type: ignore[union-attr]
