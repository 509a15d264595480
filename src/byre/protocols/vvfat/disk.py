"""The disk: tables made when it is opened, files read when they are asked for."""

from __future__ import annotations

import os
import threading
from bisect import bisect_right
from time import perf_counter_ns

from ...errors import ReadOnly, from_oserror
from ...graph.node import Node, Stats
from ...io.buffers import zero_fill
from ...io.extent import DATA, ZERO, Extent
from ...typing import TYPE_CHECKING, Final
from ...units import SECTOR
from . import geometry
from .tree import directory_bytes

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from .geometry import Shape
    from .tree import Entry

__all__ = ["VvfatNode"]

_FILES_KEPT: Final = 32
_END: Final = {12: 0xFFF, 16: 0xFFFF, 32: 0x0FFFFFFF}


class VvfatNode(Node):
    """Guarded by ``_lock``: the files that are open.

    :param root: the folder; its entries are given their clusters
    """

    kind = "protocol"
    driver = "vvfat"

    def __init__(self, root: Entry, shape: Shape, label: str, *, name: str = "", filename: str = "") -> None:
        super().__init__(name=name, filename=filename, read_only=True)
        self.shape = shape
        self._lock = threading.Lock()
        self._open: dict[str, int] = {}
        self._parts: list[tuple[int, bytes | Entry, int]] = []
        self._build(root, label.ljust(11).encode())
        self._parts.sort(key=lambda part: part[0])
        self._starts = [start for start, _, _ in self._parts]

    @property
    def size(self) -> int:
        return self.shape.disk_size

    def allocated_size(self) -> int:
        return 0

    # -- building ---------------------------------------------------------------------------------

    def _put(self, sector: int, data: bytes) -> None:
        if data:
            self._parts.append((sector * SECTOR, data, len(data)))

    def _build(self, root: Entry, label: bytes) -> None:
        shape = self.shape
        runs = self._place(root)
        used = sum(count for _, count in runs)
        if shape.start:
            self._put(0, geometry.partition_table(shape))
        boot = geometry.boot_sector(shape, label, root.first)
        self._put(shape.start, boot)
        if shape.bits == 32:
            information = geometry.information_sector(shape, used)
            for at in (0, 6):
                self._put(shape.start + at + 1, information)
            self._put(shape.start + 6, boot)
        table = _encode_table(self._table(runs), shape.bits)
        for number in range(2):
            self._put(shape.start + shape.reserved + number * shape.fat_sectors, table)
        self._put_folders(root, label)

    def _place(self, root: Entry) -> list[tuple[int, int]]:
        """Give every entry its clusters, one behind the other; returns (first, count) of each run."""
        runs, following = [], 2
        for entry in root.walk():
            if entry is root and self.shape.root_entries:
                continue
            length = entry.bytes_of_folder(root=entry is root) if entry.is_folder else entry.size
            count = max(-(-length // self.shape.cluster_size), 1 if entry.is_folder else 0)
            if count:
                entry.first = following
                runs.append((following, count))
                if not entry.is_folder:
                    self._parts.append((self._cluster_at(following), entry, entry.size))
                following += count
        return runs

    def _cluster_at(self, cluster: int) -> int:
        return self.shape.data_at * SECTOR + (cluster - 2) * self.shape.cluster_size

    def _table(self, runs: list[tuple[int, int]]) -> NDArray[np.uint32]:
        import numpy as np

        used = sum(count for _, count in runs)
        # Each cluster is followed by the next one, apart from the last of a run.
        table = np.arange(1, used + 3, dtype=np.uint32)
        end = _END[self.shape.bits]
        table[0] = end & ~0xFF | (0xF0 if self.shape.floppy else 0xF8)
        table[1] = end
        for first, count in runs:
            table[first + count - 1] = end
        return table

    def _put_folders(self, root: Entry, label: bytes) -> None:
        todo: list[tuple[Entry, int]] = [(root, 0)]
        while todo:
            folder, above = todo.pop()
            data = directory_bytes(folder, above, label if folder is root else None)
            if folder.first:
                self._parts.append((self._cluster_at(folder.first), data, len(data)))
            else:
                self._put(self.shape.root_at, data)
            # The root is called 0 by what lies in it, wherever it is.
            own = 0 if folder is root else folder.first
            todo += [(child, own) for child in folder.children or () if child.is_folder]

    # -- requests ---------------------------------------------------------------------------------

    def read_into(self, offset: int, buffer: memoryview) -> None:
        started = perf_counter_ns()
        at, end = offset, offset + len(buffer)
        index = bisect_right(self._starts, at) - 1
        while at < end:
            start, what, length = self._parts[index] if 0 <= index < len(self._parts) else (0, b"", 0)
            if index < 0 or at >= start + length:
                index += 1
                stop = min(end, self._starts[index]) if index < len(self._parts) else end
                zero_fill(buffer[at - offset : stop - offset])
            else:
                stop = min(end, start + length)
                piece = buffer[at - offset : stop - offset]
                if isinstance(what, bytes):
                    piece[:] = what[at - start : stop - start]
                else:
                    self._read_file(what, at - start, piece)
            at = stop
        self.stats.done(Stats.READ, len(buffer), started)

    def _read_file(self, entry: Entry, offset: int, piece: memoryview) -> None:
        """What the file has there now; zeroes if it has become shorter."""
        try:
            with self._lock:
                descriptor = self._descriptor(entry.path)
                done = 0
                while done < len(piece):
                    count = os.preadv(descriptor, [piece[done:]], offset + done)
                    if not count:
                        break
                    done += count
        except OSError as error:
            raise from_oserror(error, f"cannot read {len(piece)} bytes at {offset:#x}", entry.path) from None
        zero_fill(piece[done:])

    def _descriptor(self, path: str) -> int:
        descriptor = self._open.pop(path, -1)
        if descriptor < 0:
            descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            if len(self._open) >= _FILES_KEPT:
                os.close(self._open.pop(next(iter(self._open))))
        self._open[path] = descriptor
        return descriptor

    def write_from(self, offset: int, buffer: memoryview, flags: int = 0) -> None:
        raise ReadOnly("a folder is shown read-only", where=self.filename)

    def write_zeroes(self, offset: int, length: int, flags: int = 0) -> None:
        raise ReadOnly("a folder is shown read-only", where=self.filename)

    def block_status(self, offset: int, length: int) -> Extent:
        end = offset + length
        index = bisect_right(self._starts, offset) - 1
        start, _, used = self._parts[index] if index >= 0 else (0, b"", 0)
        if offset < start + used:
            return Extent(offset, min(end, start + used) - offset, DATA, offset)
        following = self._starts[index + 1] if index + 1 < len(self._parts) else end
        return Extent(offset, min(end, following) - offset, ZERO, offset)

    def close(self) -> None:
        if not self.closed:
            with self._lock:
                for descriptor in self._open.values():
                    os.close(descriptor)
                self._open.clear()
        super().close()


def _encode_table(table: NDArray[np.uint32], bits: int) -> bytes:
    import numpy as np

    if bits == 32:
        return table.astype("<u4").tobytes()
    if bits == 16:
        return table.astype("<u2").tobytes()
    if len(table) % 2:
        table = np.append(table, np.uint32(0))
    pairs = table[0::2] | table[1::2] << np.uint32(12)
    return np.ascontiguousarray(pairs.astype("<u4")).view(np.uint8).reshape(-1, 4)[:, :3].tobytes()
