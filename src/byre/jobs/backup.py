"""backup: a copy of a disk as it was when the job was made, while the disk goes on being written to.

From construction on a copy-before-write filter on top of the source keeps what writes replace; the job copies the
rest. With a bitmap only what is dirty in it is copied, usually into an overlay of the backup before; the bitmap is
cleared only when the target is durable, and is as if nothing had happened after a failure. What lies where is kept by
:mod:`byre.filters.point_in_time`.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Final, NamedTuple

from ..errors import ByreError, InvalidArgument
from ..filters.copy_before_write import ON_ERROR, CopyBeforeWriteNode, cluster_for, find_bitmap
from ..graph import chain
from ..graph.blockers import Blocking
from ..graph.live import Tolerated, insert_filter, quiesce, remove_filter, settled
from ..graph.relinking import backing_edges
from ..image import Image
from ..io.extent import UNALLOCATED
from ..units import MIB, align_down
from .blockcopy import CopySettings
from .holes import split_at_holes
from .job import Job
from .livecopy import LiveCopy, Policies, RangeFailed, check_free, close, sweep
from .stride import Stride

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy as np
    from numpy.typing import NDArray

    from ..bitmaps.bitmap import Bitmap
    from ..filters.point_in_time import PointInTime
    from ..graph.node import Node
    from .job import Control, Progress
    from .journal import Journal

    Ranges = tuple[NDArray[np.int64], NDArray[np.int64]]

__all__ = ["BITMAP_MODES", "SYNC_MODES", "BackupJob", "BackupOptions", "backup_journal"]

SYNC_MODES: Final = ("full", "top", "none", "incremental", "bitmap")
BITMAP_MODES: Final = ("on-success", "never", "always")
CHUNK: Final = MIB
"""Copied at once: a writer to a range that is being copied waits for so much."""
MOST_WORKERS: Final = 64
_RETRY: Final = 0.2


class BackupOptions(NamedTuple):
    """What to back up and how; names and defaults are those of ``blockdev-backup``.

    :ivar sync: "full": the whole disk; "top": what its top layer holds; "incremental" or "bitmap": what is dirty in
        ``bitmap``; "none": only what writes replace, until the job is cancelled
    :ivar bitmap: name of a dirty bitmap of the source
    :ivar bitmap_mode: when the bitmap is cleared of what was copied: "on-success" (implied by "incremental"), "never",
        or "always": also of what a failed job did copy
    :ivar compress: write compressed clusters
    :ivar discard_source: give up in the source what has been copied; for sources that are temporary
    :ivar max_workers: threads that copy; 0 for a default
    :ivar max_chunk: bytes copied at once, at most; 0 for a default
    :ivar min_cluster_size: bytes copied at once, at least; a power of two
    :ivar on_cbw_error: what suffers if the old content cannot be copied: "break-guest-write" or "break-snapshot"
    :ivar cbw_timeout: seconds that copying may hold back a write, 0 for no limit
    """

    sync: str = "full"
    bitmap: str = ""
    bitmap_mode: str = ""
    compress: bool = False
    discard_source: bool = False
    max_workers: int = 0
    max_chunk: int = 0
    min_cluster_size: int = 0
    on_cbw_error: str = "break-guest-write"
    cbw_timeout: float = 0

    def checked(self) -> BackupOptions:
        """With the bitmap mode that is implied.

        :raises InvalidArgument: values that are none, or that do not go together
        """
        for name, value, allowed in (
            ("sync mode", self.sync, SYNC_MODES),
            ("bitmap mode", self.bitmap_mode, ("", *BITMAP_MODES)),
            ("on-cbw-error", self.on_cbw_error, ON_ERROR),
        ):
            if value not in allowed:
                raise InvalidArgument(f"unknown {name} {value!r}: expected one of {', '.join(filter(None, allowed))}")
        if not 0 <= self.max_workers <= MOST_WORKERS:
            raise InvalidArgument(f"max-workers is {self.max_workers}: expected 1 to {MOST_WORKERS}, or 0")
        if self.max_chunk < 0 or self.cbw_timeout < 0:
            raise InvalidArgument("max-chunk and cbw-timeout must not be negative")
        if not self.bitmap:
            return self._without_bitmap()
        mode = self.bitmap_mode
        if self.sync == "none":
            raise InvalidArgument("sync mode 'none' does not go with a bitmap")
        if self.sync == "incremental":
            if mode not in ("", "on-success"):
                raise InvalidArgument("bitmap mode must be 'on-success' with sync mode 'incremental'")
            mode = "on-success"
        if not mode:
            raise InvalidArgument("a bitmap mode must be given along with a bitmap")
        if mode == "never" and self.sync != "bitmap":
            raise InvalidArgument(f"bitmap mode 'never' has no effect together with sync mode {self.sync!r}")
        return self._replace(bitmap_mode=mode)

    def _without_bitmap(self) -> BackupOptions:
        if self.sync in ("incremental", "bitmap"):
            raise InvalidArgument(f"sync mode {self.sync!r} needs a bitmap")
        if self.bitmap_mode:
            raise InvalidArgument("a bitmap mode is given without a bitmap")
        return self


class BackupJob(Job):
    """Copy ``source`` as it is now, at construction, to ``target``.

    A job that is not started must be cancelled, so that it lets go of the disks. Several jobs made within one
    :func:`byre.graph.live.quiesce` copy several disks as of one moment.

    :param source: its node is copied, whoever writes to it
    :param target: of the same size, in the same graph, writable; nobody else uses it
    :param filter_name: node name of the filter on top of the source; "" to have one generated
    :param journal: of :func:`backup_journal`; what it says is done is not copied again, and it is deleted in the end
    :param on_source_error: as ``on_target_error`` one of "report", "ignore", "stop", "enospc", "auto"; concerns what
        the job copies, not what writes to the source have to wait for
    :raises InvalidArgument: options that are none, sizes that differ, or source and target are one
    :raises NotFound: there is no such bitmap
    :raises Busy: another job works on one of them
    """

    kind = "backup"

    def __init__(self, source: Image, target: Image, options: BackupOptions | None = None, *, id: str = "",
                 on_source_error: str = "report", on_target_error: str = "report", filter_name: str = "",
                 speed: int = 0, auto_finalize: bool = True, auto_dismiss: bool = True,
                 journal: Journal | None = None) -> None:  # fmt: skip
        super().__init__(id=id, speed=speed, auto_finalize=auto_finalize, auto_dismiss=auto_dismiss)
        self.journal = journal
        self.options = (options or BackupOptions()).checked()
        self._policies = Policies(on_source_error, on_target_error)
        self._policies.check()
        if target.graph is not source.graph:
            raise InvalidArgument("source and target must be opened in the same graph", where=target.filename)
        self._graph = source.graph
        with settled(self._graph, [source, target]) as (node, target_node), ExitStack() as undo:
            self._check_disks(node, target_node)
            self._bitmap = find_bitmap(node, self.options.bitmap) if self.options.bitmap else None
            self._set_up(node, target_node, filter_name, undo)
            self._undo = undo.pop_all()

    def _check_disks(self, source: Node, target: Node) -> None:
        if chain.skip_filters(target) is chain.skip_filters(source):
            raise InvalidArgument("source and target cannot be the same", where=target.filename)
        if source.size != target.size:
            raise InvalidArgument(
                f"source and target image have different sizes: {source.size} and {target.size} bytes",
                where=target.filename,
            )
        self._cluster = cluster_for(target, self.options.min_cluster_size)
        if self.options.max_chunk and self.options.max_chunk < self._cluster:
            raise InvalidArgument(f"max-chunk is {self.options.max_chunk} bytes, less than the {self._cluster} bytes "
                                  "that are copied at least")  # fmt: skip

    # -- beginning and end ------------------------------------------------------------------------

    def _set_up(self, source: Node, target: Node, filter_name: str, undo: ExitStack) -> None:
        """Keep what is there now from being lost; ``undo`` lets go of everything, last thing first.

        The caller holds back the users of both.
        """
        graph = self._graph
        occupied = check_free(graph, source, target, self.kind)
        reader = Image(source, graph, read_only=not self.options.discard_source, name="the backup job")
        undo.callback(close, reader)
        # A target over the disk itself is a use of its backing file that writes to the disk must not break.
        edges = backing_edges(target, source) if source in chain.layers(target) else []
        undo.callback(Tolerated(graph, edges).release)
        writer = Image(target, graph, read_only=False, name="the backup job")
        undo.callback(close, writer)
        self._reader, self._writer = reader, writer
        self._copy = LiveCopy(reader, writer, self._settings())
        self._filter = CopyBeforeWriteNode(
            name=filter_name, on_error=self.options.on_cbw_error, timeout=self.options.cbw_timeout
        )
        self._filter.copier = self._copy_for_writer
        self._filter.alone = not self.options.discard_source
        self._filter.filename = source.filename
        graph.add(self._filter)
        undo.callback(self._remove_filter)
        graph.attach(self._filter, "target", target, "data")
        insert_filter(graph, self._filter, source, stay=[reader])
        self._take_bitmap(undo)
        self._filter.begin(self._cluster, self._bitmap if self.options.sync in ("incremental", "bitmap") else None)
        if self.journal is not None:
            # Before the first write: what is done must not be copied again, it may have been overwritten since.
            self._instant.skip(self.journal.done())
            self._filter.on_kept = self._make_durable
        blocking = Blocking(graph, [self._filter, *occupied], "block device is in use by block job: backup")
        undo.callback(blocking.release)

    def _settings(self) -> CopySettings:
        chunk = align_down(self.options.max_chunk or CHUNK, self._cluster) or self._cluster
        return CopySettings(sparse=0, unmap=True, whole_total=False, compress=self.options.compress, chunk=chunk)

    def _take_bitmap(self, undo: ExitStack) -> None:
        """What is written from now on is kept apart from what this job copies."""
        bitmap = self._bitmap
        if bitmap is None:
            return
        if self.options.bitmap_mode == "never":
            bitmap.occupy()
            undo.callback(bitmap.vacate)
        else:
            bitmap.freeze()
            undo.callback(self._return_bitmap, bitmap)

    @staticmethod
    def _return_bitmap(bitmap: Bitmap) -> None:
        """Unless the job dealt with it: what was dirty still is."""
        if bitmap.frozen:
            bitmap.reclaim()

    def _remove_filter(self) -> None:
        node, graph = self._filter, self._graph
        if "file" in node.children:
            remove_filter(graph, node)
        else:
            graph.release(node)

    def clean(self) -> None:
        if self.journal is not None:
            self.journal.stop()
        self._undo.close()

    def commit(self) -> None:
        if self._bitmap is not None and self.options.bitmap_mode != "never":
            self._bitmap.abdicate()
        if self.journal is not None:
            self.journal.remove()

    def abort(self) -> None:
        bitmap = self._bitmap
        if bitmap is None or self.options.bitmap_mode != "always" or not bitmap.frozen:
            return
        with quiesce(self._graph, [self._filter], running=[self._writer]):
            try:
                self._writer.node.flush()
            except ByreError:
                return  # nothing is known to be there: all of it stays dirty
            bitmap.abdicate()
            bitmap.set_from(self._instant.todo)

    # -- copying ----------------------------------------------------------------------------------

    @property
    def _instant(self) -> PointInTime:
        return self._filter.state

    def run(self, control: Control) -> None:
        if self.journal is not None:
            self.journal.start(self._flush_target, self._copy.request)
        self._copy.look_for_holes()
        self._account()
        if self.options.sync == "none":
            while True:
                control.wait(1.0)
                self._instant.check()
        if self.options.sync in ("full", "top"):
            self._skip(control)
            self._account()
        with self._copy.behind:
            self._copy_all(control)

    def _copy_all(self, control: Control) -> None:
        """Until all is copied, and durable."""
        while True:
            whole = self._sweep(control)
            self._instant.wait_settled()
            if self._instant.left:
                if not whole:
                    control.wait(_RETRY)
                continue
            try:
                self._writer.flush()
                return
            except ByreError as error:
                control.on_error(error, self._policies.target, source=False)
                control.wait(_RETRY)

    def _sweep(self, control: Control) -> bool:
        return sweep(
            self._due(), self._copy_range, control, self._policies, chunk=self._copy.chunk,
            threads=self.options.max_workers,
        )  # fmt: skip

    def _due(self) -> Iterator[tuple[int, int]]:
        position = 0
        while True:
            self._instant.check()
            chunk = self.control.at_once(self._copy.chunk, self._cluster)
            found = self._instant.todo.next_dirty(position, None, chunk)
            if found is None:
                return
            offset, length = found
            length = min(length, chunk - offset % chunk)
            yield offset, length
            position = offset + length

    def _copy_range(self, offset: int, length: int) -> tuple[int, int]:
        """Copy what still has to be copied of a range; (bytes done, bytes written)."""
        done = moved = 0
        end = offset + length
        while True:
            with self._copy.request():
                claim = self._instant.claim(offset, end, self._copy.chunk)
                if claim is None:
                    return done, moved
                moved += self._copy_claim(claim)
            done += claim[1]

    def _copy_claim(self, claim: tuple[int, int]) -> int:
        copied = False
        try:
            moved = self._copy.copy(*claim)
            copied = True
            if self.journal is not None:
                self.journal.finished(*claim)
        finally:
            self._instant.settle(claim, copied=copied)
        if self.options.discard_source:
            try:
                self._reader.node.discard(*claim)
            except ByreError:
                pass  # it was a wish
        return moved

    def _copy_for_writer(self, offset: int, length: int) -> None:
        """What a write to the source waits for. Its own request holds the gates."""
        try:
            self._copy.copy(offset, length)
        except RangeFailed as failure:
            raise failure.error from failure
        if self.journal is not None:
            self.journal.finished(offset, length)

    def _make_durable(self, offset: int, length: int) -> None:
        """Once the writer goes on, the target alone has what was there, and the journal alone says so."""
        assert self.journal is not None
        self.journal.ensure(offset, length, self._flush_target)

    def _flush_target(self) -> None:
        # Past the gate: a writer that waits for this holds up those who change the graph, and those hold the gate. The
        # graph stays as it is all the same: the writer is within a request to a disk above, the journal within its own.
        self._writer.node.flush()

    # -- what needs no copying --------------------------------------------------------------------

    def _skip(self, control: Control) -> None:
        """Leave out what the target shows anyway: zeroes in both, or what the layers below the top one hold."""
        source, target = self._reader.node, self._writer.node
        layers = chain.layers(source)
        base = layers[1] if self.options.sync == "top" and len(layers) > 1 else None
        stride = Stride([source] if base is not None else [source, target])
        for offset, length in stride.windows(0, self._instant.size):
            if control.attention:
                control.checkpoint()
            with self._copy.request():
                starts, stops = _blank(source, base, offset, length)
                rows = len(starts)
                if base is None:
                    other = _blank(target, None, offset, length)
                    rows += len(other[0])
                    starts, stops = _common(starts, stops, *other)
            stride.saw(rows)
            same = list(zip(starts.tolist(), (stops - starts).tolist(), strict=True))
            if self.journal is not None:
                for start, size in same:
                    self.journal.finished(start, size)
            self._instant.skip(same)

    # -- figures ----------------------------------------------------------------------------------

    def _account(self) -> None:
        self.control.total = self.control.done + self._instant.left

    def progress(self) -> Progress:
        self._account()
        return super().progress()


def backup_journal(path: str, source: Image, target: Image, options: BackupOptions, *, resume: bool,
                   vouched: bool = False) -> Journal:  # fmt: skip
    """The journal of a backup; see :meth:`.journal.Journal.begin`.

    :param vouched: since the job died, nobody has written to the source: it still holds what was not copied
    """
    from .journal import Journal, identity

    about = {"job": "backup", "sync": options.sync, "bitmap": options.bitmap, "source": identity(source.node),
             "target": identity(target.node, changing=True)[:1]}  # fmt: skip
    unit = cluster_for(target.node, options.min_cluster_size)
    return Journal.begin(path, about, source.size, unit, resume=resume, vouched=vouched)


def _blank(top: Node, base: Node | None, offset: int, length: int) -> Ranges:
    """(starts, ends) of what no layer above ``base`` holds; without one, of what is known to read as zeroes."""
    import numpy as np

    found, in_hole = split_at_holes(top, chain.extents(top, offset, length, base=base))
    blank = found.kind == UNALLOCATED if base is not None else found.reads_zero() | in_hole
    starts, stops = found.offset[blank], (found.offset + found.length)[blank]
    apart = np.append(True, starts[1:] != stops[:-1])[: len(starts)]
    return starts[apart], stops[np.append(apart[1:], True)[: len(stops)]]


def _common(starts: NDArray[np.int64], stops: NDArray[np.int64], other_starts: NDArray[np.int64],
            other_stops: NDArray[np.int64]) -> Ranges:  # fmt: skip
    """What lies in both lists of ranges, each ascending and without overlaps."""
    import numpy as np

    points = np.unique(np.concatenate((starts, stops, other_starts, other_stops)))
    inside = np.searchsorted(starts, points, "right") > np.searchsorted(stops, points, "right")
    inside &= np.searchsorted(other_starts, points, "right") > np.searchsorted(other_stops, points, "right")
    return points[:-1][inside[:-1]], points[1:][inside[:-1]]
