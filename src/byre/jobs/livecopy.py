"""Copying between disks in use: one range at a time, as it is at this moment, for jobs that know which ranges are due.

What a range is (data, zeroes, nothing above a base) is asked when it is copied, not before. A request holds the gates
of both Images from its first lock to its last byte, so that a change of the graph never waits for one that waits for
the change. The copying is that of :mod:`.blockcopy`, on its threads.
"""

from __future__ import annotations

import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final, NamedTuple, cast

from ..errors import ByreError
from ..formats.abilities import HasHoles
from ..graph import blockers, chain
from ..io import workers
from ..io.extent import DATA, MAY_UNMAP, UNALLOCATED, ZERO
from ..units import align_down, align_up
from . import blockcopy
from .blockcopy import BlockCopy, CopySettings, Segment, SourceDisk
from .errors_policy import IGNORE, check_policy, decide

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from ..graph.graph import Graph
    from ..graph.node import Node
    from ..image import Image
    from .behind import WriteBehind
    from .job import Control

__all__ = ["LiveCopy", "Policies", "RangeFailed", "check_free", "close", "sweep"]

_NOTHING: Final = 2
_TASK_RANGES: Final = 64


class Policies(NamedTuple):
    """What to do about errors, by the names of :mod:`.errors_policy`."""

    source: str = "report"
    target: str = "report"

    def check(self) -> None:
        """:raises InvalidArgument: an unknown policy"""
        check_policy(self.source)
        check_policy(self.target)

    def of(self, failure: RangeFailed) -> str:
        return self.source if failure.source else self.target


class RangeFailed(Exception):
    """A range could not be copied.

    :ivar source: reading failed, else writing
    """

    def __init__(self, error: ByreError, *, source: bool) -> None:
        super().__init__(str(error))
        self.error = error
        self.source = source


class LiveCopy:
    """Copies ranges of ``source`` to the same offsets of ``target``, as they are now. Thread-safe.

    :param source: the job's own handle, as is ``target``: their gates are held while a range is copied
    :param base: what no layer above it holds is left alone; ``None``: that is zeroes
    :param settings: ``compress`` needs ranges of whole clusters of the target
    """

    def __init__(self, source: Image, target: Image, settings: CopySettings, *, base: Node | None = None) -> None:
        self.source = source
        self.target = target
        self.base = base
        self._engine = BlockCopy(_Source(source), cast("Image", _Target(target)), settings)
        self._unit = getattr(target.node, "cluster_size", 0) if settings.compress else 0
        self._sparse: list[Node] = []
        self._gated = True

    @property
    def behind(self) -> WriteBehind:
        """To be entered while much is copied."""
        return self._engine.behind

    @property
    def chunk(self) -> int:
        """The longest range to ask for, bytes."""
        return self._engine.chunk

    def look_for_holes(self) -> None:
        """From now on what a format calls data is looked at again where the file below may have holes. Takes time."""
        with self.request():
            self._sparse = [
                layer for layer in chain.layers(self.source.node) if isinstance(layer, HasHoles) and layer.has_holes()
            ]

    @contextmanager
    def ungated(self) -> Iterator[None]:
        """Requests in the body pass the gates, for the caller holds the graph lock: whoever holds the gates may wait
        for that lock."""
        self._gated = False
        try:
            yield
        finally:
            self._gated = True

    @contextmanager
    def request(self) -> Iterator[None]:
        """A request of several steps, of which changes of the graph see the whole or nothing."""
        if not self._gated:
            yield
            return
        self.source._enter()
        try:
            self.target._enter()
            try:
                yield
            finally:
                self.target._leave()
        finally:
            self.source._leave()

    def copy(self, offset: int, length: int) -> int:
        """Copy a range, within :meth:`request`; bytes written as data.

        :raises RangeFailed: reading or writing failed; part of it may be there
        """
        try:
            fetched = self._engine.fetch(self._plan(offset, length))
        except ByreError as error:
            raise RangeFailed(error, source=True) from error
        try:
            return self._engine.store(fetched)
        except ByreError as error:
            raise RangeFailed(error, source=False) from error

    def _plan(self, offset: int, length: int) -> list[Segment]:
        """What to do with each part of the range."""
        segments: list[Segment] = []
        end = offset + length
        layers = chain.layers(self.source.node)
        while offset < end:
            action, size = self._action(layers, offset, end - offset)
            last = segments[-1] if segments else None
            if last is not None and last.action == action:
                segments[-1] = last._replace(length=last.length + size)
            else:
                segments.append(Segment(offset, size, action))
            offset += size
        if self._unit:
            segments = _whole_clusters(segments, self._unit, end)
        return [segment for segment in segments if segment.action != _NOTHING]

    def _action(self, layers: list[Node], offset: int, length: int) -> tuple[int, int]:
        """(COPY, ZERO or nothing; bytes for which it holds)."""
        for layer in layers:
            if layer is self.base:
                return _NOTHING, length
            if offset >= layer.size:
                return blockcopy.ZERO, length
            extent = layer.block_status(offset, min(length, layer.size - offset))
            length = extent.length
            if extent.kind == UNALLOCATED:
                continue
            if extent.kind == DATA and layer in self._sparse and extent.host >= 0:
                file = layer.sources[extent.source].node  # type: ignore[attr-defined]
                extent = file.block_status(extent.host, length)
                length = extent.length
            return (blockcopy.ZERO if extent.kind == ZERO else blockcopy.COPY), length
        return blockcopy.ZERO, length


def _whole_clusters(segments: list[Segment], unit: int, end: int) -> list[Segment]:
    """Clusters that are partly to be copied are copied whole."""
    result: list[Segment] = []
    position = segments[0].offset if segments else 0
    for offset, length, action in segments:
        stop = offset + length
        if action == blockcopy.COPY:
            start, stop = align_down(offset, unit), min(align_up(stop, unit), end)
        else:
            start, stop = align_up(offset, unit), stop if stop == end else align_down(stop, unit)
        start = max(start, position)
        if start >= stop:
            continue
        if result and result[-1].action == action and position == start:
            result[-1] = result[-1]._replace(length=stop - result[-1].offset)
        else:
            result.append(Segment(start, stop - start, action))
        position = stop
    return result


class _Source(SourceDisk):
    """The node of an Image whose gate is held."""

    def __init__(self, image: Image) -> None:
        super().__init__([image])

    def read_into(self, offset: int, buffer: memoryview) -> None:
        self.images[0].node.read_into(offset, buffer)


class _Target:
    """The node of an Image whose gate is held, as the copy engine writes to it."""

    def __init__(self, image: Image) -> None:
        self._image = image

    @property
    def node(self) -> Node:
        return self._image.node

    @property
    def filename(self) -> str:
        return self._image.filename

    def write(self, offset: int, data: memoryview) -> None:
        self.node.write_from(offset, data)

    def write_zeroes(self, offset: int, length: int, *, unmap: bool = False) -> None:
        self.node.write_zeroes(offset, length, MAY_UNMAP if unmap else 0)

    def write_compressed_clusters(self, offset: int, payloads: list[bytes]) -> None:
        self.node.write_compressed_clusters(offset, payloads)  # type: ignore[attr-defined]


def check_free(graph: Graph, source: Node, target: Node, kind: str) -> list[Node]:
    """The nodes that a job of ``kind`` must have for itself: both, and what lies below their filters.

    :raises Busy: another job works on one of them
    """
    nodes = {source: "source", chain.skip_filters(source): "source",
             target: "target", chain.skip_filters(target): "target"}  # fmt: skip
    for node, role in nodes.items():
        blockers.check(graph, node, f"{kind}-{role}")
    return list(nodes)


def close(image: Image) -> None:
    """Close a job's own handle. What it wrote is durable, or given up: a failure now is worth a warning only."""
    try:
        image.close()
    except ByreError as error:
        image.graph.warnings.append(f"closing after a job: {error}")


# -- sweeping over ranges -------------------------------------------------------------------------


def sweep(ranges: Iterable[tuple[int, int]], work: Callable[[int, int], tuple[int, int]], control: Control,
          policies: Policies, *, chunk: int, threads: int = 0) -> bool:  # fmt: skip
    """``work(offset, length)`` each of ``ranges``, several at once, in any order; then see to what failed.

    ``work`` leaves what failed for another sweep, and returns (bytes done, bytes moved). The job pauses between two
    requests, with nothing in flight.

    :param chunk: short ranges are gathered up to this many bytes for a thread, up to less where the speed is low
    :param threads: 0 for a default that suits the machine
    :returns: nothing failed
    :raises ByreError: the error that the policy says to report
    """
    return _Sweep(work, control, policies).run(ranges, chunk, threads)


class _Sweep:
    """One sweep. Guarded by ``_lock``: ``_failed``, ``_whole``."""

    def __init__(self, work: Callable[[int, int], tuple[int, int]], control: Control, policies: Policies) -> None:
        self._work = work
        self._control = control
        self._policies = policies
        self._lock = threading.Lock()
        self._failed: RangeFailed | None = None
        self._whole = True

    def run(self, ranges: Iterable[tuple[int, int]], chunk: int, threads: int) -> bool:
        workers.run(
            self._tasks(ranges, chunk), self._do, self._count, threads=threads, in_order=False, gate=self._control
        )
        if self._failed is not None:
            self._control.on_error(self._failed.error, self._policies.of(self._failed), source=self._failed.source)
        return self._whole

    def _tasks(self, ranges: Iterable[tuple[int, int]], chunk: int) -> Iterator[list[tuple[int, int]]]:
        task: list[tuple[int, int]] = []
        data = 0
        for one in ranges:
            if task and (data + one[1] > self._control.at_once(chunk) or len(task) >= _TASK_RANGES):
                yield task
                task, data = [], 0
                if self._failed is not None:
                    return
            task.append(one)
            data += one[1]
        if task and self._failed is None:
            yield task

    def _do(self, task: list[tuple[int, int]]) -> tuple[int, int]:
        done = moved = 0
        for offset, length in task:
            if self._failed is not None:
                break
            try:
                did, wrote = self._work(offset, length)
            except RangeFailed as failure:
                self._note(failure)
            else:
                done += did
                moved += wrote
        return done, moved

    def _note(self, failure: RangeFailed) -> None:
        policy = self._policies.of(failure)
        ignored = decide(failure.error, policy) == IGNORE
        with self._lock:
            self._whole = False
            if not ignored and self._failed is None:
                self._failed = failure
        if ignored:
            self._control.on_error(failure.error, policy, source=failure.source)

    def _count(self, _task: list[tuple[int, int]], result: tuple[int, int]) -> None:
        self._control.count(*result)
