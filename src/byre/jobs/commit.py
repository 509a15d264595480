"""commit: what an overlay (and the layers between) holds goes down into a backing file.

Decides here, window by window, what is copied and what becomes zeroes; the copying itself is in ``blockcopy``.
The base is the only file that an image names and byre writes to, and it is only while a job of this kind runs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import AccessDenied, ByreError, InvalidArgument, ReadOnly
from ..formats.abilities import Emptiable, KnowsParent
from ..graph import chain
from ..graph.live import Tolerated
from ..graph.relinking import backing_edges, writable
from ..image import Image
from ..io.extent import UNALLOCATED, ZERO
from . import blockcopy
from .blockcopy import BlockCopy, CopySettings, Segment, SourceDisk
from .holes import split_at_holes
from .job import Job
from .stride import Stride

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy as np
    from numpy.typing import NDArray

    from ..graph.graph import Graph
    from ..graph.node import Node
    from .job import Control
    from .journal import Journal

__all__ = ["CommitJob", "check_base", "commit_journal", "keep_known"]


class CommitJob(Job):
    """Copy what the layers of ``top`` above ``base`` hold into ``base``, which then reads as ``top`` does.

    A base that is shorter grows. The base is durable before anything of the overlay is given up, so that ``top``
    reads the same after a crash at any moment. Layers between the two read differently afterwards.

    :param top: open for writing with its chain; nobody else writes to it meanwhile
    :param base: a layer below it
    :param empty: afterwards the top layer holds nothing, if its format can do that. Only with the layer right below
        as the base: the ones between would show through
    :param journal: of :func:`commit_journal`; what it says is done is not copied again, and it is deleted in the end
    :raises ByreError: as :func:`check_base` says
    """

    kind = "commit"

    def __init__(self, top: Image, base: Node, *, empty: bool = True, speed: int = 0, measure: bool = False,
                 journal: Journal | None = None) -> None:  # fmt: skip
        super().__init__(speed=speed, measure=measure)
        self.journal = journal
        check_base(top, base)
        if empty and base is not chain.layers(top.node)[1]:
            raise InvalidArgument("an image can be emptied only into the layer right below it", where=top.filename)
        self.top = top
        self.base = base
        self.empty = empty
        self._was_read_only = base.read_only
        self._handle: Image | None = None
        self._tolerated: Tolerated | None = None

    def run(self, control: Control) -> None:
        target = self._open_base()
        keep_known(self.top.graph, self.top.node, self.base)
        if target.size < self.top.size:
            target.resize(self.top.size)
        control.total = self.top.size
        if control.measure:
            control.total = sum(segment.length for segment in self._plan() if segment.action == blockcopy.COPY)
        # Data stays data, as in the overlay: looking for zeroes in it would cost more than it saves.
        settings = CopySettings(sparse=0, unmap=True, whole_total=not control.measure)
        copy = BlockCopy(SourceDisk([self.top]), target, settings)
        if self.journal is None:
            copy.run(self._plan(), control)
        else:
            self._copy_with(self.journal, copy, target, control)
        target.flush()
        top = chain.skip_filters(self.top.node)
        if self.empty and isinstance(top, Emptiable):
            top.make_empty()
            self.top.flush()

    def _copy_with(self, journal: Journal, copy: BlockCopy, target: Image, control: Control) -> None:
        """Copy what the journal does not say is done."""
        if not control.measure:
            control.count(sum(length for _, length in journal.done()), 0)
        with journal.kept(target.flush):
            for start, length in journal.left():
                copy.on_stored = lambda end, start=start: journal.finished(start, end - start)
                copy.run(self._plan(start, length), control, start=start, end=start + length)
                journal.finished(start, length)

    def commit(self) -> None:
        if self.journal is not None:
            self.journal.remove()

    def _open_base(self) -> Image:
        """The base as a writable image.

        :raises ByreError: the file cannot be opened for writing
        """
        self._tolerated = Tolerated(self.top.graph, backing_edges(self.top.node, self.base))
        handle = self._handle = Image(self.base, self.top.graph, name="the commit job")
        try:
            handle.reopen(read_only=False)
        except ByreError as error:
            error.message = f"cannot open the backing file for writing: {error.message}"
            raise
        return handle

    def clean(self) -> None:
        handle = self._handle
        if handle is None:
            return
        try:
            if self._was_read_only and not handle.read_only:
                handle.reopen(read_only=True)
        finally:
            handle.close()
            if self._tolerated is not None:
                self._tolerated.release()

    def _plan(self, start: int = 0, size: int = -1) -> Iterator[Segment]:
        """What the layers above the base hold; what they do not is in the base already."""
        top = self.top.node
        stride = Stride([top])
        for offset, length in stride.windows(start, self.top.size if size < 0 else start + size):
            starts, stops, actions = _window(top, self.base, offset, length)
            stride.saw(len(starts))
            yield from map(Segment, starts.tolist(), (stops - starts).tolist(), actions.tolist())


def commit_journal(path: str, top: Image, base: Node, *, resume: bool) -> Journal:
    """The journal of a commit of ``top`` into ``base``; see :meth:`.journal.Journal.begin`."""
    from .live_commit import live_commit_journal

    return live_commit_journal(path, top.node, base, resume=resume)


def _window(top: Node, base: Node, offset: int, length: int) -> tuple[NDArray[np.int64], NDArray[np.int64],
                                                                       NDArray[np.uint8]]:  # fmt: skip
    """(starts, ends, actions) of what to do in a window, neighbours of a kind joined."""
    import numpy as np

    found, in_hole = split_at_holes(top, chain.allocated_above(top, base, offset, length))
    held = found.kind != UNALLOCATED
    actions = np.where((found.kind == ZERO) | in_hole, blockcopy.ZERO, blockcopy.COPY).astype(np.uint8)[held]
    starts, stops = found.offset[held], (found.offset + found.length)[held]
    if len(starts) < 2:
        return starts, stops, actions
    apart = (starts[1:] != stops[:-1]) | (actions[1:] != actions[:-1])
    first = np.append(True, apart)
    return starts[first], stops[np.append(apart, True)], actions[first]


def keep_known(graph: Graph, top: Node, base: Node) -> None:
    """``base``, open for writing, is going to be changed; the layer above it may notice such things, but not this one.

    Nobody writes to that layer meanwhile.
    """
    above = next((layer for layer in chain.layers(top) if _below(layer) is base), None)
    if isinstance(above, KnowsParent):
        with writable(graph, above):
            above.accept_changes_below()


def _below(layer: Node) -> Node | None:
    edge = layer.children.get("backing")
    return chain.skip_filters(edge.node) if edge is not None else None


def check_base(top: Image, base: Node) -> None:
    """:raises InvalidArgument: ``base`` is not below ``top``
    :raises ReadOnly: ``top`` is open read-only
    :raises AccessDenied: the format of the base is a guess: it is read as that, but not written
    """
    if top.read_only:
        raise ReadOnly("cannot commit an image that is open read-only", where=top.filename)
    layers = chain.layers(top.node)
    if base not in layers[1:]:
        raise InvalidArgument("the base is not below the image", where=base.filename)
    above = layers[layers.index(base) - 1]
    recorded: str = getattr(above, "backing_format", "")
    named: str = getattr(above, "backing_name", "")
    recordable: bool = getattr(above, "records_backing_format", True)
    if named and not recorded and recordable and not hasattr(above, "backing_override"):
        raise AccessDenied("the format of this backing file is not recorded, so it is not written to",
                           where=base.filename, hint="record it: rebase -u -b FILENAME -F FORMAT")  # fmt: skip
