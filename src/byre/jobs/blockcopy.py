"""The copy engine: segments of a source disk are read, looked through for zeroes and written to a target.

One engine serves ``convert`` and every job that moves data. What is copied, zeroed or left alone is decided by
the caller, who yields :class:`Segment`; threads are those of ``io/workers.py``. Reading, zero detection and
compression run side by side outside the interpreter lock; writing keeps the order of the disk unless told not to.
Memory is a few reused buffers, whatever the size of the disk.
"""

from __future__ import annotations

import threading
from collections import deque
from typing import TYPE_CHECKING, Final, NamedTuple

from ..errors import ByreError, NotSupported
from ..io import workers
from ..io.buffers import aligned_buffer, zero_fill
from ..io.sparse import data_runs
from ..units import KIB, MIB, SECTOR, align_up
from .behind import WriteBehind
from .offload import Offload

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from ..graph.node import Node
    from ..image import Image
    from .job import Control

__all__ = ["COPY", "ZERO", "BlockCopy", "CopySettings", "Fetched", "Segment", "SourceDisk", "fitted"]

COPY: Final = 0
ZERO: Final = 1

CHUNK: Final = 2 * MIB
"""Data per task: a buffer being read and one being written stay in the processor's cache."""

_COMPRESS_CHUNK: Final = MIB
_LEAST: Final = 64 * KIB
_TASK_SEGMENTS: Final = 256
_ZERO_STEP: Final = 1 << 30


_REMOTE_THREADS: Final = 6


class Segment(NamedTuple):
    """``length`` bytes of the disk from ``offset`` to be copied (COPY) or to read as zeroes afterwards (ZERO)."""

    offset: int
    length: int
    action: int


class CopySettings(NamedTuple):
    """How to copy.

    :ivar sparse: zeroes at least this long inside data are not written as data, bytes, a multiple of 512; 0 writes
        everything
    :ivar zero_init: the target reads as zeroes wherever nothing was written
    :ivar compress: write compressed clusters; segments are aligned to the target's clusters
    :ivar level: how hard to compress; 0 for the format's default
    :ivar in_order: write in ascending order
    :ivar threads: 0 for a default that suits the machine
    :ivar offload: let the system copy from file to file where it can
    :ivar salvage: called with a sentence for each sector that cannot be read and becomes zeroes
    :ivar whole_total: progress counts the disk, holes included, not only what is copied
    :ivar unmap: the space of what is zeroed may be given back, also where ``sparse`` is 0
    :ivar chunk: data per task at most, bytes, a power of two; 0 for a default. Compression keeps to its own
    """

    sparse: int = 4096
    zero_init: bool = False
    compress: bool = False
    level: int = 0
    in_order: bool = True
    threads: int = 0
    offload: bool = False
    salvage: Callable[[str], None] | None = None
    whole_total: bool = True
    unmap: bool = False
    chunk: int = 0


def fitted(settings: CopySettings, target: Node) -> CopySettings:
    """``settings`` as ``target`` needs them: some disks take nothing but compressed clusters, each once, in order.

    A plain disk elsewhere has no layout that the order of the writes would decide, and every one of them is waited for.
    """
    if getattr(target, "needs_compressed_writes", False):
        return settings._replace(compress=True, in_order=True)
    below = target
    while below.driver == "raw":
        below = below.children["file"].node
    if below.remote:
        return settings._replace(in_order=False, threads=settings.threads or _REMOTE_THREADS)
    return settings


class SourceDisk:
    """Images one behind the other as one read-only disk; each is padded with zeroes to a whole sector.

    :param skip: the disk begins this many bytes into the first image
    :param size: and is this long
    :ivar size: bytes
    :ivar starts: where each image begins
    """

    def __init__(self, images: Sequence[Image], *, skip: int = 0, size: int | None = None) -> None:
        self.images = tuple(images)
        self.starts: list[int] = []
        end = 0
        for image in images:
            self.starts.append(end - skip)
            end += align_up(image.size, SECTOR)
        self._stops = [*self.starts[1:], end - skip]
        self.size = end - skip if size is None else size

    def parts(self, offset: int, length: int) -> Iterator[tuple[int, int, int]]:
        """``(image index, offset in that image, length)`` that make up the range."""
        for index, (start, stop) in enumerate(zip(self.starts, self._stops, strict=True)):
            first, last = max(offset, start), min(offset + length, stop)
            if first < last:
                yield index, first - start, last - first

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill ``buffer`` from ``offset``."""
        if len(self.images) == 1:
            start = offset - self.starts[0]
            if start + len(buffer) <= self.images[0].size:
                self.images[0].read_into(start, buffer)
                return
        position = 0
        for index, start, length in self.parts(offset, len(buffer)):
            image = self.images[index]
            inside = max(0, min(length, image.size - start))
            if inside:
                image.read_into(start, buffer[position : position + inside])
            if inside < length:
                zero_fill(buffer[position + inside : position + length])
            position += length


class _Task(NamedTuple):
    """Segments handled together. ``counted`` is what progress advances by."""

    segments: list[Segment]
    data: int
    counted: int


class _Write(NamedTuple):
    """One step of delivering a task: bytes, compressed clusters, or (neither) zeroes."""

    offset: int
    length: int
    data: memoryview | None = None
    payloads: list[bytes] | None = None


class Fetched(NamedTuple):
    """What :meth:`BlockCopy.fetch` read; the writes refer to the buffer."""

    buffer: memoryview | None
    writes: list[_Write]


class _Buffers:
    """Reused buffers, last used first. Guarded by its own lock, a leaf."""

    def __init__(self, size: int) -> None:
        self._lock = threading.Lock()
        self._free: deque[memoryview] = deque()
        self._size = size

    def take(self) -> memoryview:
        with self._lock:
            if self._free:
                return self._free.pop()
        return aligned_buffer(self._size)

    def give_back(self, buffer: memoryview) -> None:
        with self._lock:
            self._free.append(buffer)


class BlockCopy:
    """Copies segments from ``source`` to the same offsets of ``target``.

    The target is long enough. Nothing is flushed; closing the target does that.

    :ivar on_stored: where segments are copied in order, told up to which offset they are in the target
    """

    def __init__(self, source: SourceDisk, target: Image, settings: CopySettings) -> None:
        self.source = source
        self.target = target
        self.settings = settings = fitted(settings, target.node)
        self._offload = Offload(source, target) if settings.offload else None
        node = target.node
        self._cluster = getattr(node, "cluster_size", 0)
        # A partly zero cluster is allocated as a whole anyway: writing all of it at once saves filling it up.
        self._unit = getattr(node, "zero_unit", 1) if _is_power_of_two(settings.sparse) else 1
        self._alignment = node.limits.request_alignment
        self._chunk = max(_COMPRESS_CHUNK, self._cluster) if settings.compress else settings.chunk or CHUNK
        # Pieces of odd sparse sizes are cut where the peer cuts them, for the rules look at the ends of pieces.
        self._exact = not _is_power_of_two(settings.sparse) or settings.sparse > CHUNK
        # Where the speed is low, pieces are shorter, but zeroes are found all the same.
        self._least = self._chunk if self._exact else min(self._chunk, max(_LEAST, self._cluster, settings.sparse))
        self._buffers = _Buffers(self._chunk)
        #: Entered while much is copied; by :meth:`run` itself.
        self.behind = WriteBehind(node)
        self.on_stored: Callable[[int], None] | None = None
        if settings.compress:
            from ..formats.abilities import HasCompression

            if not isinstance(node, HasCompression):
                raise NotSupported("compression is not supported for this file format", where=target.filename)
            if settings.level and hasattr(node, "compression_level"):
                node.compression_level = settings.level
            self._compress = node.compress

    # -- in pieces --------------------------------------------------------------------------------

    @property
    def chunk(self) -> int:
        """Bytes of data that :meth:`fetch` takes at once, at most."""
        return self._chunk

    def fetch(self, segments: list[Segment]) -> Fetched:
        """Read (and compress) what :meth:`store` writes: for jobs that choose the moment of each. Thread-safe.

        :param segments: with no more data than ``chunk``
        :raises ByreError: reading failed; the message says where
        """
        work = self._compress_task if self.settings.compress else self._plain_task
        task = _Task(segments, sum(segment.length for segment in segments if segment.action == COPY), 0)
        return Fetched(*work(task))

    def store(self, fetched: Fetched) -> int:
        """Write what was fetched; bytes written.

        :raises ByreError: writing failed; the message says where
        """
        try:
            return self._write(fetched.writes)
        finally:
            if fetched.buffer is not None:
                self._buffers.give_back(fetched.buffer)

    # -- tasks ------------------------------------------------------------------------------------

    def run(self, segments: Iterable[Segment], control: Control, *, start: int = 0, end: int = -1) -> None:
        """Copy all ``segments``, which ascend.

        :param start: with ``end`` the part of the disk that they are of; the whole disk if left out
        :raises ByreError: reading or writing failed; the message says where
        :raises Cancelled: the control was cancelled
        """
        settings = self.settings

        def deliver(task: _Task, result: tuple[memoryview | None, list[_Write]]) -> None:
            buffer, writes = result
            moved = self._write(writes)
            if buffer is not None:
                self._buffers.give_back(buffer)
            if self.on_stored is not None and task.segments:
                self.on_stored(task.segments[-1].offset + task.segments[-1].length)
            control.count(task.counted, moved)

        work = self._compress_task if settings.compress else self._plain_task
        threads = settings.threads or workers.default_threads()
        with self.behind:
            workers.run(
                self._tasks(segments, start, self.source.size if end < 0 else end, control), work, deliver,
                threads=threads, in_order=settings.in_order, gate=control,
            )  # fmt: skip

    def _tasks(self, segments: Iterable[Segment], reached: int, end: int, control: Control) -> Iterator[_Task]:
        """Segments cut to buffer size, small ones gathered; where somebody watches, to no more than a percent."""
        batch: list[Segment] = []
        data = 0
        counted = 0
        whole = self.settings.whole_total
        for piece in self._pieces(segments, control):
            size = piece.length if piece.action == COPY else 0
            most = min(self._chunk, control.total // 100) if control.measure else control.at_once(self._chunk)
            if batch and (data + size > most or len(batch) >= _TASK_SEGMENTS):
                yield _Task(batch, data, counted)
                batch, data, counted = [], 0, 0
            batch.append(piece)
            data += size
            counted += piece.offset + piece.length - reached if whole else size
            reached = piece.offset + piece.length
        rest = end - reached if whole else 0
        if batch or rest:
            yield _Task(batch, data, counted + rest)

    def _pieces(self, segments: Iterable[Segment], control: Control) -> Iterator[Segment]:
        for offset, length, action in segments:
            end = offset + length
            while offset < end:
                step = control.at_once(self._chunk, self._least) if action == COPY else _ZERO_STEP
                # Cut at multiples of the step, so that clusters stay whole.
                size = min(step if self._exact else step - offset % step, end - offset)
                yield Segment(offset, size, action)
                offset += size

    # -- working ----------------------------------------------------------------------------------

    def _plain_task(self, task: _Task) -> tuple[memoryview | None, list[_Write]]:
        writes: list[_Write] = []
        if not task.data:
            return None, [_Write(offset, length) for offset, length, _ in task.segments]
        buffer = self._buffers.take()
        position = 0
        for segment in task.segments:
            offset, length, action = segment
            if action == ZERO:
                writes.append(_Write(offset, length))
                continue
            if self._offload is not None and self._offload.copy(offset, length):
                writes.append(_Write(offset, length, buffer[:0]))
                continue
            view = buffer[position : position + length]
            position += length
            self._read(offset, view)
            for start, size, is_data in self.runs(offset, view, length):
                writes.append(_Write(offset + start, size, view[start : start + size] if is_data else None))
        return buffer, writes

    def _compress_task(self, task: _Task) -> tuple[memoryview | None, list[_Write]]:
        writes: list[_Write] = []
        if not task.data:
            return None, [_Write(offset, length) for offset, length, _ in task.segments]
        buffer = self._buffers.take()
        position = 0
        for offset, length, action in task.segments:
            if action == ZERO:
                writes.append(_Write(offset, length))
                continue
            padded = align_up(length, self._cluster)
            view = buffer[position : position + padded]
            position += padded
            self._read(offset, view[:length])
            if padded > length:
                zero_fill(view[length:])
            self._compress_clusters(offset, length, view, writes)
        return buffer, writes

    def _compress_clusters(self, offset: int, length: int, view: memoryview, writes: list[_Write]) -> None:
        cluster = self._cluster
        for start, size, is_data in self.runs(offset, view, length):
            if not is_data:
                writes.append(_Write(offset + start, min(size, length - start)))
                continue
            for at in range(start, start + size, cluster):
                self._compress_one(offset + at, view[at : at + cluster], min(cluster, length - at), writes)

    def _compress_one(self, offset: int, view: memoryview, length: int, writes: list[_Write]) -> None:
        payload = self._compress(view)
        last = writes[-1] if writes else None
        if payload is None:
            writes.append(_Write(offset, length, view[:length]))
        elif last is not None and last.payloads is not None and last.offset + last.length == offset:
            last.payloads.append(payload)
            writes[-1] = last._replace(length=last.length + length)
        else:
            writes.append(_Write(offset, length, None, [payload]))

    def runs(self, offset: int, view: memoryview, length: int) -> list[tuple[int, int, bool]]:
        """What becomes of ``length`` bytes of the disk from ``offset``, which were read into ``view`` (padded with
        zeroes to whole clusters for compression): ``(start, length, is_data)`` of ranges to write or to zero.

        A job that does not write everything it reads leaves ranges out; for compression they are whole clusters.
        """
        settings = self.settings
        if not settings.compress:
            return data_runs(view, offset, settings.sparse, self._unit, self._alignment)
        return data_runs(view, offset, self._cluster) if settings.sparse else [(0, len(view), True)]

    def _read(self, offset: int, view: memoryview) -> None:
        try:
            self.source.read_into(offset, view)
        except ByreError as error:
            if self.settings.salvage is None:
                raise _at(error, "reading", offset) from error
            self._salvage(offset, view, error)

    def _salvage(self, offset: int, view: memoryview, error: ByreError) -> None:
        """Read what can be read; halves, down to the sector that fails."""
        assert self.settings.salvage is not None
        todo = [(0, len(view), error)]
        while todo:
            start, length, why = todo.pop()
            if length <= SECTOR:
                self.settings.salvage(f"error while reading offset {offset + start}: {why}")
                zero_fill(view[start : start + length])
                continue
            half = align_up(length // 2, SECTOR)
            for first, size in ((start + half, length - half), (start, half)):
                try:
                    self.source.read_into(offset + first, view[first : first + size])
                except ByreError as failed:
                    todo.append((first, size, failed))

    # -- writing ----------------------------------------------------------------------------------

    def _write(self, writes: list[_Write]) -> int:
        """Deliver; bytes written."""
        target = self.target
        zero_init = self.settings.zero_init
        unmap = self.settings.unmap or self.settings.sparse > 0
        moved = 0
        offset = 0
        try:
            for offset, length, data, payloads in writes:
                if data is not None:
                    if len(data):
                        target.write(offset, data)
                    moved += length
                elif payloads is not None:
                    target.write_compressed_clusters(offset, payloads)
                    moved += length
                elif not zero_init:
                    target.write_zeroes(offset, length, unmap=unmap)
        except ByreError as error:
            raise _at(error, "writing", offset) from error
        self.behind.wrote(moved)
        return moved


def _at(error: ByreError, verb: str, offset: int) -> ByreError:
    """``error`` with the guest offset in its message."""
    error.message = f"error while {verb} at byte {offset}: {error.message}"
    return error


def _is_power_of_two(value: int) -> bool:
    return value & (value - 1) == 0
