"""mirror: a second disk becomes and stays the same as one in use, until it takes its place or is let go.

Copies first, then follows what is written (READY), until it is told to complete (the users of the source use the target
from then on) or is softly cancelled (the target is a copy of that moment). A filter on top of the source marks what is
written in a dirty bitmap; sweep after sweep copies what is marked. A mark is cleared before its range is read, and
ranges being copied are kept apart, so that no write is lost.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Final, NamedTuple

from ..bitmaps.bitmap import Bitmap
from ..errors import ByreError, InvalidArgument, NotFound
from ..filters.mirror_top import MirrorTopNode
from ..graph import chain
from ..graph.blockers import Blocking
from ..graph.live import Rewiring, insert_filter, quiesce, remove_filter, replace_node, settled
from ..image import Image
from ..io.extent import UNALLOCATED
from ..units import KIB, MIB
from .blockcopy import CHUNK, CopySettings
from .holes import split_at_holes
from .job import Control, Job
from .livecopy import LiveCopy, Policies, check_free, close, sweep
from .pace import Pace
from .stride import Stride

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ..graph.child import Child
    from ..graph.node import Node
    from .job import Progress
    from .journal import Journal

__all__ = ["COPY_MODES", "SYNC_MODES", "MirrorJob", "MirrorOptions", "MirrorStatus", "default_granularity",
           "mirror_journal"]  # fmt: skip

SYNC_MODES: Final = ("full", "top", "none")
COPY_MODES: Final = ("background", "write-blocking")
LEAST_GRANULARITY: Final = 512
MOST_GRANULARITY: Final = 64 * MIB
DEFAULT_BUFFER: Final = 16 * MIB
_THREADS: Final = 4
_SHORT: Final = 0.1
"""Seconds that users of the source may be held back for the rest, at the end."""
_POLL: Final = 0.05
_RETRY: Final = 0.2
_LAST_SWEEPS: Final = 8


class MirrorOptions(NamedTuple):
    """How to mirror; names and defaults are those of ``blockdev-mirror``.

    :ivar sync: "full": the whole disk; "top": what its top layer holds, into a target over the same backing file;
        "none": only what is written from now on
    :ivar copy_mode: "background", or "write-blocking": writes go to both disks before they return
    :ivar granularity: bytes of the dirty bitmap for each bit; 0 for the target's cluster size, 4 to 64 KiB
    :ivar buffer_size: bytes in flight at most; 0 for 16 MiB
    :ivar unmap: zeroes may be given back in the target
    :ivar target_is_zero: the caller says that the target reads as zeroes
    :ivar replaces: name of the node that the target takes the place of; "" for the source
    """

    sync: str = "full"
    copy_mode: str = "background"
    granularity: int = 0
    buffer_size: int = 0
    unmap: bool = True
    target_is_zero: bool = False
    replaces: str = ""

    def check(self) -> None:
        """:raises InvalidArgument: a value that is none"""
        if self.sync not in SYNC_MODES:
            raise InvalidArgument(f"sync mode {self.sync!r} not supported: expected one of {', '.join(SYNC_MODES)}")
        if self.copy_mode not in COPY_MODES:
            raise InvalidArgument(f"unknown copy mode {self.copy_mode!r}: expected one of {', '.join(COPY_MODES)}")
        size = self.granularity
        if size and (not LEAST_GRANULARITY <= size <= MOST_GRANULARITY or size & (size - 1)):
            raise InvalidArgument(f"granularity is {size} bytes; it must be a power of 2, at least {LEAST_GRANULARITY} "
                                  f"and at most {MOST_GRANULARITY}")  # fmt: skip
        if self.buffer_size < 0:
            raise InvalidArgument(f"buffer size is {self.buffer_size}: expected bytes, or 0 for a default")


class MirrorStatus(NamedTuple):
    """How a mirror gets on.

    :ivar dirty: bytes that still have to be copied, or are being copied
    :ivar rate_in: bytes per second that become dirty
    :ivar rate_out: bytes per second that are copied while there is something to copy, pauses left out
    :ivar actively_synced: both disks are the same, and writes go to both
    """

    dirty: int
    rate_in: float
    rate_out: float
    copy_mode: str
    actively_synced: bool

    @property
    def converging(self) -> bool:
        """Copying is ahead of writing, or there is nothing to copy."""
        return not self.dirty or self.rate_out > self.rate_in


class MirrorJob(Job):
    """Make ``target`` the same as ``source`` and keep it so. What is written from construction on is seen.

    A job that is not started must be cancelled, so that it lets go of the disks.

    :param source: its node is mirrored, whoever writes to it
    :param target: of the same size, in the same graph, writable; nobody else uses it
    :param filter_name: node name of the filter on top of the source; "" to have one generated
    :param journal: of :func:`mirror_journal`; what it says is done is not copied again, and it is deleted in the end
    :param on_source_error: as ``on_target_error`` one of "report", "ignore", "stop", "enospc", "auto"
    :raises InvalidArgument: an option that is none, sizes that differ, or source and target are one
    :raises Busy: another job works on one of them
    """

    kind = "mirror"

    def __init__(self, source: Image, target: Image, options: MirrorOptions | None = None, *, id: str = "",
                 on_source_error: str = "report", on_target_error: str = "report", filter_name: str = "",
                 speed: int = 0, auto_finalize: bool = True, auto_dismiss: bool = True,
                 journal: Journal | None = None) -> None:  # fmt: skip
        super().__init__(id=id, speed=speed, auto_finalize=auto_finalize, auto_dismiss=auto_dismiss)
        self.journal = journal
        self.options = options or MirrorOptions()
        self.options.check()
        if target.graph is not source.graph:
            raise InvalidArgument("source and target must be opened in the same graph", where=target.filename)
        with settled(source.graph, [source, target]) as (node, target_node):
            if chain.skip_filters(target_node) is chain.skip_filters(node):
                raise InvalidArgument("cannot mirror an image into itself", where=target.filename)
            self._check_sizes(source, target)
            base = None
            if self.options.sync == "top":
                base = next(iter(chain.layers(node)[1:]), None)
            self._set_up(source, target_node, Policies(on_source_error, on_target_error), filter_name)
            self._begin(base, leave=None)

    @staticmethod
    def _check_sizes(source: Image, target: Image) -> None:
        if source.size != target.size:
            raise InvalidArgument(
                f"source and target image have different sizes: {source.size} and {target.size} bytes",
                where=target.filename,
            )

    # -- beginning and end ------------------------------------------------------------------------

    def _set_up(self, source: Image, target: Node, policies: Policies, filter_name: str) -> None:
        policies.check()
        self._graph = source.graph
        self._source_node = source.node
        self._target_node = target
        self._policies = policies
        self._filter_name = filter_name
        self._replaced = self._find_replaced()
        self._held: list[Image] = []
        self._moved: list[Child] = []
        self._read: Image | None = None
        self._write: Image | None = None
        self._blocking: Blocking | None = None
        self._top = MirrorTopNode(Bitmap(source.size, default_granularity(target, self.options)), alone=True)
        self._top.witness = self.journal
        self._pace = Pace(self._top.dirty, self.control)
        self._primed = False

    def _find_replaced(self) -> Node | None:
        """The node given by ``replaces``; ``None`` for the source."""
        if not self.options.replaces:
            return None
        try:
            node = self._graph.find(self.options.replaces)
        except NotFound:
            raise NotFound(f"node name {self.options.replaces!r} not found") from None
        if node is self._source_node:
            return None
        if not self._graph.reaches(node, self._source_node):
            raise InvalidArgument(f"node {node.name!r} cannot be replaced: the source is not below it",
                                  where=node.filename)  # fmt: skip
        if node.size != self._source_node.size:
            raise InvalidArgument(f"cannot replace node {node.name!r} with an image of a different size",
                                  where=node.filename)  # fmt: skip
        return node

    def _begin(self, base: Node | None, leave: Node | None) -> None:
        """From now on writes are seen; the caller holds back the users of both.

        :param base: what only it and the layers below hold is not copied at first
        :param leave: what only it and the layers below hold need never be copied
        """
        graph, source, target = self._graph, self._source_node, self._target_node
        occupied = check_free(graph, source, target, self.kind)
        self._base = base
        try:
            self._read = Image(source, graph, name=f"the {self.kind} job")
            self._open_target()
            self._top.name = self._filter_name
            graph.add(self._top)
            insert_filter(graph, self._top, source, stay=[self._read])
            if self.options.copy_mode == "write-blocking":
                self._write_both()
            reason = f"block device is in use by block job: {self.kind}"
            self._blocking = Blocking(graph, [self._top, *occupied], reason)
            chunk = _chunk(self.options.buffer_size or DEFAULT_BUFFER, self._top.dirty.granularity)
            settings = CopySettings(sparse=0, unmap=self.options.unmap, whole_total=False, chunk=chunk)
            self._copy = LiveCopy(self._read, self._writer, settings, base=leave)
        except BaseException:
            self.clean()
            raise

    def _open_target(self) -> None:
        self._write = Image(self._target_node, self._graph, read_only=False, name=f"the {self.kind} job")

    def _write_both(self) -> None:
        self._graph.attach(self._top, "target", self._target_node, "data")
        self._top.blocking = True

    def clean(self) -> None:
        """Let go of everything, after success or failure."""
        if self.journal is not None:
            self.journal.stop()
        self._let_users_go()
        if self._blocking is not None:
            self._blocking.release()
        top, graph = self._top, self._graph
        if "file" in top.children:
            with quiesce(graph, [top]):
                if top.parents:
                    remove_filter(graph, top)
                else:
                    graph.release(top)
        elif graph.nodes.get(top.name) is top:
            graph.release(top)
        self._close()

    def _close(self) -> None:
        for image in (self._write, self._read):
            if image is not None:
                close(image)

    # -- copying ----------------------------------------------------------------------------------

    def run(self, control: Control) -> None:
        self._copy.look_for_holes()
        if self.options.sync != "none":
            self._mark_initial(control)
        if self.journal is not None:
            self.journal.start(self._flush_both, self._copy.request)
        self._primed = True
        self._account()
        self._pace.start()
        with self._copy.behind:
            self._converge(control)
        control.ready()
        while not control.completing:
            whole = self._sweep(control)
            if not control.completing:
                control.wait(_POLL if whole else _RETRY)
        # The users of the source are held back at the end, and nothing is tried twice then: little shall be left.
        self._converge(control, _LAST_SWEEPS)

    def _flush_both(self) -> None:
        # What was copied while it was not durable in the source could be lost there, and be in the target all the same.
        assert self._read is not None
        self._read.node.flush()
        self._writer.node.flush()

    def _converge(self, control: Control, most: int = sys.maxsize) -> None:
        """Until the two are the same, or the rest can be copied in a moment; the target is durable then.

        :param most: sweeps without a failure after which it is good enough
        """
        while True:
            whole = self._sweep(control)
            most -= whole
            if whole and (not most or self._top.dirty.dirty_bytes <= self._pace.rates()[1] * _SHORT):
                try:
                    self._writer.flush()
                    return
                except ByreError as error:
                    control.on_error(error, self._policies.target, source=False)
                    whole = False
                    most += 1
            if not whole:
                control.wait(_RETRY, completing=True)

    @property
    def _writer(self) -> Image:
        assert self._write is not None
        return self._write

    def _mark_initial(self, control: Control) -> None:
        """Everything is dirty but what is known to be the same already."""
        walks = [(self._copy.source, self._base)]
        if self._base is None and self.options.sync == "full" and not self.options.target_is_zero:
            walks.append((self._copy.target, None))
        stride = Stride([image.node for image, _ in walks])
        dirty = self._top.dirty if self.journal is None else Bitmap(self._top.dirty.size, self._top.dirty.granularity)
        for offset, length in stride.windows(0, dirty.size):
            if control.attention:
                control.checkpoint()
            with self._copy.request():
                rows = sum(_mark_held(dirty, image.node, base, offset, length) for image, base in walks)
            stride.saw(rows)
        if self.journal is not None:
            self._mark_left(self.journal, dirty)

    def _mark_left(self, journal: Journal, initial: Bitmap) -> None:
        """Mark what is dirty in ``initial`` and not done. Nothing is cleared: what is written meanwhile stays so."""
        for offset, length in journal.done():
            initial.clear(offset, length)
        for offsets, lengths in initial.runs():
            for offset, length in zip(offsets.tolist(), lengths.tolist(), strict=True):
                self._top.dirty.set(offset, length)

    def _sweep(self, control: Control) -> bool:
        """Copy what is dirty now; whether all went well."""
        whole = True
        if self._top.dirty.dirty_bits:
            self._pace.begin_sweep()
            whole = sweep(self._due(), self._copy_dirty, control, self._policies, chunk=self._copy.chunk)
        self._pace.end_sweep()
        self._account()
        return whole

    def _account(self) -> None:
        self.control.total = self.control.done + self._pace.left

    def _due(self) -> Iterator[tuple[int, int]]:
        """What is dirty, in ascending pieces that end where chunks end."""
        position, most, least = 0, self._copy.chunk, self._top.dirty.granularity
        while True:
            chunk = self.control.at_once(most, least)
            found = self._top.dirty.next_dirty(position, None, chunk)
            if found is None:
                return
            offset, length = found
            length = min(length, chunk - offset % chunk)
            yield offset, length
            position = offset + length

    def _copy_dirty(self, offset: int, length: int) -> tuple[int, int]:
        """Copy what is still dirty of a range; (bytes done, bytes written)."""
        top, moved, due, copied = self._top, 0, 0, False
        with self._copy.request():
            entry = top.ranges.enter(offset, offset + length, True)
            spoiled = self.journal.begin_copy(offset, length) if self.journal is not None else []
            try:
                # Cleared before it is read: what is written from here on is copied again.
                taken = top.dirty.take(offset, length)
                due = sum(size for _, size in taken)
                self._pace.begin(due)
                for start, size in taken:
                    moved += self._copy.copy(start, size)
                    if self.journal is not None:
                        self.journal.finished(start, size, spoiled)
                copied = True
            except BaseException:
                top.dirty.set(offset, length)
                raise
            finally:
                if self.journal is not None:
                    self.journal.end_copy(spoiled)
                top.ranges.leave(entry)
                self._pace.end(due, copied=copied)
        return due, moved

    # -- completing -------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Hold the users of the source back, copy the rest, and have the target take its place if so asked."""
        assert self._read is not None
        running = (self._read, self._writer)
        with quiesce(self._graph, [self._top, self._target_node], running=running), self._copy.ungated():
            while self._top.dirty.dirty_bits:
                sweep(self._due(), self._copy_dirty, Control(), Policies(), chunk=self._copy.chunk)
            self._account()
            self._writer.node.flush()
            users = [image for image in self._graph.images
                     if image not in running and self._graph.reaches(image.node, self._top)]  # fmt: skip
            if not self.soft_cancelled:
                self._pivot()
            for image in users:
                image.pause()
                self._held.append(image)

    def _pivot(self) -> None:
        if self._blocking is not None:
            self._blocking.release()
        old = self._replaced or self._top
        before = list(old.parents)
        replace_node(self._graph, old, self._target_node)
        self._moved = [edge for edge in before if edge.node is self._target_node]

    def commit(self) -> None:
        self._let_users_go()
        if self.journal is not None:
            self.journal.remove()

    def abort(self) -> None:
        if self._moved:
            with quiesce(self._graph, [self._target_node], running=[self._writer]), Rewiring(self._graph) as change:
                for edge in self._moved:
                    change.move(edge, self._replaced or self._top)
            self._moved.clear()
        self._let_users_go()

    def _let_users_go(self) -> None:
        for image in self._held:
            image.resume()
        self._held.clear()

    # -- verbs ------------------------------------------------------------------------------------

    def change(self, copy_mode: str) -> None:
        """Go from background to write-blocking mode.

        :raises InvalidArgument: the other way is not possible
        """
        with self._lock:
            self._check("change")
        if copy_mode not in COPY_MODES:
            raise InvalidArgument(f"unknown copy mode {copy_mode!r}: expected one of {', '.join(COPY_MODES)}")
        with quiesce(self._graph, [self._top]):
            if self._top.blocking and copy_mode == "background":
                raise InvalidArgument("the copy mode cannot go back to background")
            if not self._top.blocking and copy_mode == "write-blocking":
                self._write_both()

    def status(self) -> MirrorStatus:
        """Figures of this moment."""
        dirty, blocking = self._pace.left, self._top.blocking
        mode = COPY_MODES[int(blocking)]
        return MirrorStatus(dirty, *self._pace.rates(), mode, self._primed and blocking and not dirty)

    def progress(self) -> Progress:
        self._account()
        return super().progress()


def mirror_journal(path: str, source: Image, target: Image, options: MirrorOptions, *, resume: bool,
                   vouched: bool = False) -> Journal:  # fmt: skip
    """The journal of a mirror; see :meth:`.journal.Journal.begin`.

    :param vouched: since the job died, nobody has written to the source: what was written until then is accounted for
    """
    from .journal import Journal, identity

    about = {"job": "mirror", "sync": options.sync, "source": identity(source.node),
             "target": identity(target.node, changing=True)[:1]}  # fmt: skip
    unit = default_granularity(target.node, options)
    return Journal.begin(path, about, source.size, unit, resume=resume, vouched=vouched)


def default_granularity(target: Node, options: MirrorOptions) -> int:
    """What a bit of the dirty bitmap stands for, bytes."""
    cluster = getattr(chain.skip_filters(target), "cluster_size", 64 * KIB)
    return options.granularity or max(4 * KIB, min(64 * KIB, cluster))


def _chunk(buffer_size: int, granularity: int) -> int:
    """What a thread copies at once: a power of two, so that all threads together keep to ``buffer_size``."""
    share = max(buffer_size // _THREADS, 1)
    return max(min(1 << (share.bit_length() - 1), CHUNK), granularity)


def _mark_held(dirty: Bitmap, top: Node, base: Node | None, offset: int, length: int) -> int:
    """Mark what the layers above ``base`` hold (without one: what does not read as zeroes); rows looked at."""
    import numpy as np

    found, in_hole = split_at_holes(top, chain.extents(top, offset, length, base=base))
    held = found.kind != UNALLOCATED if base is not None else ~(found.reads_zero() | in_hole)
    starts, stops = found.offset[held], (found.offset + found.length)[held]
    apart = np.append(True, starts[1:] != stops[:-1])[: len(starts)]
    last = np.append(apart[1:], True)[: len(starts)]
    for start, stop in zip(starts[apart].tolist(), stops[last].tolist(), strict=True):
        dirty.set(start, stop - start)
    return len(found)
