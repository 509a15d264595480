"""rebase: give an overlay another backing file (or none) without changing what it reads as.

What is unallocated in the overlay and differs between the old and the new backing file is copied into the overlay
first; then the name in its header changes. Decides here, window by window, what must be compared at all; reading,
comparing and writing run on the threads of the copy engine (``blockcopy``). The header is the format's business
(:class:`byre.formats.abilities.BackingChangeable`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

from ..catalog import driver
from ..errors import ByreError, InvalidArgument, NotSupported
from ..formats.abilities import BackingChangeable, HasCompression
from ..graph import chain
from ..graph.layers import identity
from ..image import Image
from ..io.buffers import zero_fill
from ..io.extent import UNALLOCATED
from ..units import align_up
from .blockcopy import COPY, BlockCopy, CopySettings, Segment, SourceDisk
from .holes import split_at_holes
from .job import Job
from .stride import Stride

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy as np
    from numpy.typing import NDArray

    from ..graph.node import Node
    from .job import Control
    from .journal import Journal

__all__ = ["NewBacking", "RebaseJob", "check_rebase", "rebase_journal"]

_NOWHERE: Final = -1
_JOURNAL_PART: Final = 1 << 20
_JOURNAL_STEP: Final = 256 << 20


class NewBacking(NamedTuple):
    """What the overlay is to name.

    :ivar name: as it will stand in the image; "" for no backing file
    :ivar format: its driver; "" only without a name
    """

    name: str = ""
    format: str = ""


class RebaseJob(Job):
    """Change the backing file of ``overlay``.

    Only clusters of the overlay that would otherwise read differently are written: from the old chain, as zero
    clusters where that reads as zeroes. At the end the copied clusters are durable before the header names the new
    file, and the header is before the job succeeds; after a crash at any moment the overlay reads as before.

    Nobody else writes to the overlay meanwhile.

    :param overlay: open for writing, with its old chain unless ``unsafe``
    :param backing: the new name
    :param below: an image with the content of the new backing file; ``None`` for none. Not closed here
    :param unsafe: only the name changes: the new file reads as the old one did
    :param compress: what is copied is written compressed where whole clusters are unallocated
    :param journal: of :func:`rebase_journal`; what it says is done is not compared again, and it is deleted in the end
    :param keep_data: zeroes that the old backing file holds are written as data, as ``qemu-img`` does; otherwise, and
        behind its end, they become zero clusters
    :raises ByreError: as :func:`check_rebase` says, before anything was written
    """

    kind = "rebase"

    def __init__(self, overlay: Image, backing: NewBacking, below: Image | None = None, *, unsafe: bool = False,
                 compress: bool = False, keep_data: bool = False, speed: int = 0, measure: bool = False,
                 journal: Journal | None = None) -> None:  # fmt: skip
        super().__init__(speed=speed, measure=measure)
        self.journal = journal
        self.overlay = overlay
        self.backing = backing
        self.unsafe = unsafe
        self.compress = compress
        self.keep_data = keep_data
        self.node = chain.skip_filters(overlay.node)
        self._changeable = check_rebase(overlay, backing, compress=compress)
        if not unsafe:
            if bool(backing.name) != (below is not None):
                raise InvalidArgument("a safe rebase needs the new backing file open", where=backing.name)
            if below is not None:
                if below.graph is not overlay.graph:
                    raise InvalidArgument("the new backing file is open in another graph", where=below.filename)
                _check_ring(self.node, below.node)
        self._below = below
        edge = self.node.children.get("backing")
        self._old = None if unsafe or edge is None else Image(edge.node, overlay.graph, name="rebase")

    def run(self, control: Control) -> None:
        if not self.unsafe:
            self._copy(control)
        # First the clusters, then the tables that map them, durable; only then may the old chain be let go.
        self.overlay.flush()
        self._changeable.change_backing(*self.backing)

    def _copy(self, control: Control) -> None:
        size = self.overlay.size
        old, new = _Below(self._old, size), _Below(self._below, size)
        unit = getattr(self.node, "zero_unit", 1)
        cluster = max(getattr(self.node, "cluster_size", 1), unit)
        passes = [_Pass(cluster, True, cluster), _Pass(unit, False, cluster)] if self.compress else [_Pass(unit)]
        if unit == cluster:
            del passes[1:]  # no cluster is allocated in part
        control.total = size * len(passes)
        # A format that only leaves out what reads as zeroes now, over no backing file, would show the new one there.
        zeroes_from = 0 if getattr(self.node, "has_zero_clusters", False) else size
        if self.keep_data and self._old is not None:
            zeroes_from = max(zeroes_from, min(self._old.size, size))
        copies = []
        for one in passes:
            settings = CopySettings(sparse=one.unit, compress=one.whole, in_order=True)
            copies.append(_Differences(old, new, self.overlay, settings, one, zeroes_from))
        if self.journal is None:
            for copy in copies:
                copy.run(self._plan(copy.part, 0, size), control)
            return
        control.count(len(copies) * sum(length for _, length in self.journal.done()), 0)
        with self.journal.kept(self.overlay.flush):
            for start, length in self.journal.left():
                for at, step in chain.windows(start, start + length, _JOURNAL_STEP):
                    self._copy_part(self.journal, copies, at, step, control)

    def _copy_part(self, journal: Journal, copies: list[_Differences], start: int, length: int,
                   control: Control) -> None:  # fmt: skip
        copies[-1].on_stored = lambda end: journal.finished(start, end - start)
        for copy in copies:
            copy.run(self._plan(copy.part, start, start + length), control, start=start, end=start + length)
        journal.finished(start, length)

    def _plan(self, one: _Pass, start: int, end: int) -> Iterator[Segment]:
        return _plan(self.node, self._old, self._below, one, start, end)

    def commit(self) -> None:
        """The open overlay goes on with the new chain as well."""
        if self.journal is not None:
            self.journal.remove()
        node, graph = self.node, self.overlay.graph
        edge = node.children.get("backing")
        if self.unsafe:
            return
        self.overlay.pause()
        try:
            if edge is not None:
                graph.detach(edge)
            if self._below is not None:
                graph.attach(node, "backing", self._below.node, "backing")
        finally:
            self.overlay.resume()

    def clean(self) -> None:
        if self._old is not None:
            self._old.close()


def rebase_journal(path: str, overlay: Image, below: Image | None, *, resume: bool) -> Journal:
    """The journal of a rebase of ``overlay`` onto ``below``; see :meth:`.journal.Journal.begin`.

    Nobody writes to the overlay between two runs. If the old or the new backing file has changed, nothing is done.
    """
    from .journal import Journal, identity

    edge = chain.skip_filters(overlay.node).children.get("backing")
    # Once the header names the new backing file, that is the old one; it is no other job for that.
    old = {"changed": identity(edge.node) if edge is not None else None}
    new = identity(below.node) if below is not None else None
    about = {"job": "rebase", "image": identity(overlay.node, changing=True)[:1], "old": old, "new": new}
    part = max(_JOURNAL_PART, getattr(chain.skip_filters(overlay.node), "cluster_size", 1))
    return Journal.begin(path, about, overlay.size, part, resume=resume)


def check_rebase(overlay: Image, backing: NewBacking, *, compress: bool = False) -> BackingChangeable:
    """Everything that can be refused before a byte is written; the node whose header will change.

    :raises NotSupported: the format records no backing file that could be changed, or cannot compress
    :raises InvalidArgument: a name without a format, or the reverse; no such format
    :raises NoSpace: the name is too long
    """
    node = chain.skip_filters(overlay.node)
    if compress and not isinstance(node, HasCompression):
        raise NotSupported("compression is not supported for this file format", where=overlay.filename)
    if compress and (getattr(node, "encrypted", False) or getattr(node, "data_file", None) is not None):
        raise NotSupported("an image that is encrypted or has an external data file cannot hold compressed clusters",
                           where=overlay.filename)  # fmt: skip
    shown = backing.name
    try:
        if not isinstance(node, BackingChangeable):
            raise NotSupported(f"driver {node.driver!r} cannot do that")
        if backing.name and not backing.format:
            raise InvalidArgument("backing format must be specified", hint="use -F")
        if backing.format:
            driver(backing.format)
        node.check_backing(backing.name, backing.format)
    except ByreError as error:
        error.message = f"could not change the backing file to '{shown}': {error.message}"
        error.where = overlay.filename
        raise
    return node


# -- who is who -----------------------------------------------------------------------------------


def _content(node: Node) -> object:
    """Equal for layers that hold the same: one node, or one file opened twice in the same plain way."""
    file = identity(node)
    if file is None or set(node.options) - {"driver", "node-name"}:
        return node
    return file, node.driver


def _check_ring(overlay: Node, below: Node) -> None:
    """:raises InvalidArgument: the overlay would become its own backing file"""
    mine = identity(overlay)
    for layer in chain.layers(below):
        if layer is overlay or (mine is not None and identity(layer) == mine):
            raise InvalidArgument("the new backing file is, or has below it, the image itself", where=below.filename)


# -- what must be looked at -----------------------------------------------------------------------


class _Pass(NamedTuple):
    """One walk over the overlay.

    :ivar unit: what is compared and written, bytes
    :ivar whole: only clusters of which nothing is allocated, as compressed ones must be
    :ivar cluster: with ``whole`` false: only clusters of which a part is allocated; 0 for all
    """

    unit: int
    whole: bool = False
    cluster: int = 0


def _plan(overlay: Node, old: Image | None, new: Image | None, one: _Pass, start: int, end: int) -> Iterator[Segment]:
    """Ranges of whole units in ``[start, end)`` that are unallocated in the overlay and may differ between ``old`` and
    ``new``."""
    stride = Stride([overlay, *(image.node for image in (old, new) if image is not None)])
    layers = chain.layers(overlay)
    below = layers[1] if len(layers) > 1 else None
    numbers: dict[object, int] = {}
    for offset, length in stride.windows(start, end):
        own = chain.extents(overlay, offset, length, base=below)
        empty = own.kind == UNALLOCATED
        rows = len(own)
        starts, stops = own.offset[empty], (own.offset + own.length)[empty]
        if len(starts):
            points, differ = _differing(old, new, offset, length, numbers)
            rows += len(points)
            starts, stops = _both(starts, stops, points[:-1][differ], points[1:][differ])
            starts, stops = _widened(starts, stops, one.unit, end)
            if one.cluster:
                edges = own.offset[~empty], (own.offset + own.length)[~empty]
                starts, stops = _by_cluster(starts, stops, *_widened(*edges, one.cluster, end), one, offset, length)
        stride.saw(rows)
        for first, stop in zip(starts.tolist(), stops.tolist(), strict=True):
            yield Segment(first, stop - first, COPY)


def _differing(old: Image | None, new: Image | None, offset: int, length: int,
               numbers: dict[object, int]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:  # fmt: skip
    """(edges of rows that cover the window, per row: whether old and new may differ there, by metadata alone)."""
    import numpy as np

    one, two = _holders(old, offset, length, numbers), _holders(new, offset, length, numbers)
    starts = np.union1d(one[0], two[0])
    first, second = (holder[np.searchsorted(begin, starts, "right") - 1] for begin, holder in (one, two))
    return np.append(starts, offset + length), first != second


def _holders(image: Image | None, offset: int, length: int,
             numbers: dict[object, int]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:  # fmt: skip
    """(row starts, who holds the bytes: a number for each layer, the same one for all that reads as zeroes)."""
    import numpy as np

    if image is None:
        return np.array([offset], np.int64), np.array([_NOWHERE], np.int64)
    found, in_hole = split_at_holes(image.node, chain.extents(image.node, offset, length))
    layers = [numbers.setdefault(_content(layer), len(numbers)) for layer in chain.layers(image.node)]
    holder = np.array(layers, np.int64)[found.depth]
    return found.offset, np.where(found.reads_zero() | in_hole, _NOWHERE, holder)


def _both(starts: NDArray[np.int64], stops: NDArray[np.int64], other_starts: NDArray[np.int64],
          other_stops: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:  # fmt: skip
    """What lies in both lists of ranges, each ascending and without overlaps."""
    import numpy as np

    points = np.unique(np.concatenate((starts, stops, other_starts, other_stops)))
    inside = _inside(points, starts, stops) & _inside(points, other_starts, other_stops)
    return points[:-1][inside[:-1]], points[1:][inside[:-1]]


def _inside(points: NDArray[np.int64], starts: NDArray[np.int64], stops: NDArray[np.int64]) -> NDArray[np.bool_]:
    import numpy as np

    return np.searchsorted(starts, points, "right") > np.searchsorted(stops, points, "right")


def _widened(starts: NDArray[np.int64], stops: NDArray[np.int64], unit: int,
             end: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:  # fmt: skip
    """The ranges widened to whole units within the disk, those that touch joined."""
    import numpy as np

    starts = starts // unit * unit
    stops = np.minimum(-(-stops // unit) * unit, end)
    apart = np.append(True, starts[1:] > stops[:-1])[: len(starts)]
    return starts[apart], stops[np.append(apart[1:], True)[: len(stops)]]


def _by_cluster(starts: NDArray[np.int64], stops: NDArray[np.int64], used_starts: NDArray[np.int64],
                used_stops: NDArray[np.int64], one: _Pass, offset: int,
                length: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:  # fmt: skip
    """The ranges outside (``whole``) or inside the clusters of which something is allocated."""
    import numpy as np

    if one.whole:
        used_starts, used_stops = (np.concatenate(((offset,), used_stops)),
                                   np.concatenate((used_starts, (offset + length,))))  # fmt: skip
        some = used_starts < used_stops
        used_starts, used_stops = used_starts[some], used_stops[some]
    return _both(starts, stops, used_starts, used_stops)


# -- reading and comparing ------------------------------------------------------------------------


class _Below(SourceDisk):
    """A backing file as the overlay sees it: zeroes behind its end, and everywhere if there is none."""

    def __init__(self, image: Image | None, size: int) -> None:
        super().__init__([] if image is None else [image], size=size)
        self.image = image

    def read_into(self, offset: int, buffer: memoryview) -> None:
        inside = 0 if self.image is None else max(0, min(len(buffer), self.image.size - offset))
        if inside:
            assert self.image is not None
            self.image.read_into(offset, buffer[:inside])
        if inside < len(buffer):
            zero_fill(buffer[inside:])


class _Differences(BlockCopy):
    """Copies the units of ``source`` that differ from ``other``.

    :param part: which of them; its unit is a power of two
    :param zeroes_from: offset from which on units of zeroes are zeroed, not written
    """

    def __init__(self, source: _Below, other: _Below, target: Image, settings: CopySettings, part: _Pass,
                 zeroes_from: int) -> None:  # fmt: skip
        super().__init__(source, target, settings)
        self.part = part
        self._other = other
        self._compared = part.unit
        self._zeroes_from = zeroes_from

    def runs(self, offset: int, view: memoryview, length: int) -> list[tuple[int, int, bool]]:
        view = view[:length]
        if self._other.image is None:
            return [run for run in self._kinds(view) if run[2]]
        buffer = self._buffers.take()
        try:
            other = buffer[:length]
            try:
                self._other.read_into(offset, other)
            except ByreError as error:
                error.message = f"error while reading the new backing file at byte {offset}: {error.message}"
                raise
            differs = _unequal_units(view, other, self._compared)
        finally:
            self._buffers.give_back(buffer)
        found: list[tuple[int, int, bool]] = []
        for start, stop in _runs_of(differs, self._compared, length):
            # The unit in which the zeroes may begin is data still.
            plain = min(max(align_up(self._zeroes_from, self._compared) - offset, start), stop)
            if start < plain:
                found.append((start, plain - start, True))
            found += [(plain + at, size, is_data) for at, size, is_data in self._kinds(view[plain:stop])]
        return found

    def _kinds(self, view: memoryview) -> list[tuple[int, int, bool]]:
        from ..io.buffers import zero_runs

        return [(start, size, not zero) for start, size, zero in zero_runs(view, self._compared)]


def _unequal_units(one: memoryview, two: memoryview, unit: int) -> NDArray[np.bool_]:
    """Per unit, the last of which may be shorter, whether the buffers differ."""
    import numpy as np

    count = len(one) // unit
    whole = count * unit
    first, second = (np.frombuffer(view[:whole], np.uint64) for view in (one, two))
    differs: NDArray[np.bool_] = (first != second).reshape(count, unit // 8).any(axis=1)
    if whole < len(one):
        first_rest, second_rest = (np.frombuffer(view[whole:], np.uint8) for view in (one, two))
        differs = np.append(differs, not np.array_equal(first_rest, second_rest))
    return differs


def _runs_of(flags: NDArray[np.bool_], unit: int, end: int) -> Iterator[tuple[int, int]]:
    """(start, stop) in bytes of runs of set flags."""
    import numpy as np

    edges = np.flatnonzero(np.diff(np.concatenate(([False], flags, [False])).astype(np.int8)))
    for first, last in edges.reshape(-1, 2).tolist():
        yield first * unit, min(last * unit, end)
