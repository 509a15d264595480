"""convert: one or more images become a new one, or fill an existing one.

Decides, window by window, what is copied, what is zeroed and what is left to the target's backing file; the
copying itself is in ``blockcopy``. Also makes the target, and removes it again if the conversion fails.
"""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING, Final, NamedTuple

from ..errors import Busy, ByreError, InvalidArgument, NotSupported
from ..formats.abilities import HasBitmaps
from ..graph import chain
from ..graph.opening import has_protocol, resolve_backing
from ..io.extent import COMPRESSED, DATA, UNALLOCATED
from ..io.extent import ZERO as KIND_ZERO
from ..units import SECTOR, align_up
from .blockcopy import COPY, ZERO, BlockCopy, CopySettings, Segment, SourceDisk, fitted
from .holes import split_at_holes
from .job import Job
from .stride import Stride

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from ..formats.abilities import BitmapStore
    from ..graph.node import Node
    from ..image import Image
    from .job import Control

    Salvage = Callable[[str], None] | None

__all__ = [
    "ConvertJob",
    "Layout",
    "MadeFiles",
    "check_bitmap_target",
    "check_bitmaps",
    "check_not_source",
    "copy_bitmaps",
    "plan",
]

_SKIP: Final = 2


class Layout(NamedTuple):
    """How the target relates to the source.

    :ivar over_backing: the target has a backing file with the content of the source's: only what the top layer
        of the source holds is copied
    :ivar backing_size: length of the target's backing file, if the target is new; -1 if unknown
    :ivar keep_zeroes: zeroes are copied as data, so that the target is fully allocated
    :ivar cluster: compressed clusters of this size are written; 0 for plain data
    """

    over_backing: bool = False
    backing_size: int = -1
    keep_zeroes: bool = False
    cluster: int = 0


class ConvertJob(Job):
    """Copy ``sources``, one behind the other, to ``target``.

    :param target_is_new: it was just created, so that it may be known to read as zeroes
    :param target_is_zero: the caller says that it reads as zeroes
    :param over_backing: see :class:`Layout`
    :raises InvalidArgument: the target is too small
    """

    kind = "convert"

    def __init__(self, sources: Sequence[Image], target: Image, settings: CopySettings, *, target_is_new: bool = False,
                 target_is_zero: bool = False, over_backing: bool = False, speed: int = 0,
                 measure: bool = False) -> None:  # fmt: skip
        super().__init__(speed=speed, measure=measure)
        self.disk = SourceDisk(sources)
        if target.size < self.disk.size:
            raise InvalidArgument(f"output file is smaller than input file: {target.size} bytes, needed are "
                                  f"{self.disk.size}", where=target.filename)  # fmt: skip
        zero_init = target_is_zero
        if target_is_new and settings.sparse and not over_backing:
            zero_init = zero_init or target.node.has_zero_init
        backing_size = -1
        if over_backing and target_is_new:
            below = chain.layers(target.node)[1:2]
            backing_size = below[0].size if below else -1
        settings = fitted(settings, target.node)
        self.settings = settings._replace(zero_init=zero_init, whole_total=not measure)
        self.layout = Layout(over_backing, backing_size, not settings.sparse,
                             getattr(target.node, "cluster_size", 0) if settings.compress else 0)  # fmt: skip
        self.target = target

    def run(self, control: Control) -> None:
        control.total = self.disk.size
        if control.measure:
            told = _tell_nobody if self.settings.salvage else None
            control.total = sum(segment.length for segment in self._plan(told) if segment.action == COPY)
        BlockCopy(self.disk, self.target, self.settings).run(self._plan(self.settings.salvage), control)

    def _plan(self, salvage: Salvage) -> Iterator[Segment]:
        for segment in plan(self.disk, self.layout, salvage=salvage):
            if segment.action == COPY or not self.settings.zero_init:
                yield segment


# -- what to do with each range -------------------------------------------------------------------


def _tell_nobody(_message: str) -> None:
    """What the planning before the copy finds, the copy will say."""


def plan(disk: SourceDisk, layout: Layout, *, salvage: Salvage = None) -> Iterator[Segment]:
    """The ranges of ``disk`` to copy or zero, ascending, neighbours joined; what needs nothing is left out.

    :param salvage: called with a sentence for each place where an image cannot tell what it holds, which is taken for
        data; without it, that is an error
    """
    stride = Stride(image.node for image in disk.images)
    pending: Segment | None = None
    for offset, length in stride.windows(0, disk.size):
        for segment in _window(disk, layout, offset, length, salvage, stride):
            if pending is None:
                pending = segment
            elif pending.action == segment.action and pending.offset + pending.length == segment.offset:
                pending = pending._replace(length=pending.length + segment.length)
            else:
                yield pending
                pending = segment
    if pending is not None:
        yield pending


def _window(
    disk: SourceDisk, layout: Layout, offset: int, length: int, salvage: Salvage, stride: Stride
) -> Iterator[Segment]:
    import numpy as np

    columns = [_part(disk, layout, *part, salvage) for part in disk.parts(offset, length)]
    starts = np.concatenate([start for start, _ in columns])
    actions = np.concatenate([action for _, action in columns])
    stride.saw(len(starts))
    end = offset + length
    if layout.over_backing and layout.backing_size >= 0:
        starts, actions = _cut(starts, actions, layout.backing_size, end)
        actions[(actions == ZERO) & (starts >= layout.backing_size)] = _SKIP
    if layout.keep_zeroes:
        actions[actions == ZERO] = COPY
    starts, actions = _joined(starts, actions)
    if layout.cluster:
        starts, actions = _whole_clusters(starts, actions, end, layout.cluster, disk.size)
    stops = np.append(starts[1:], end)
    wanted = actions != _SKIP
    return map(Segment, starts[wanted].tolist(), (stops - starts)[wanted].tolist(), actions[wanted].tolist())


def _part(disk: SourceDisk, layout: Layout, index: int, offset: int, length: int,
          salvage: Salvage) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:  # fmt: skip
    """(offsets on the disk, actions) of rows that cover a range of one image; the sector padding joins the last."""
    import numpy as np

    image = disk.images[index]
    inside = max(0, min(length, image.size - offset))
    rows = _rows(image, layout, offset, inside, None if salvage is None else _Salvaged(salvage, disk.starts[index]))
    starts, actions = rows if len(rows[0]) else (np.array([offset], np.int64), np.array([COPY], np.uint8))
    return starts + disk.starts[index], actions


class _Salvaged(NamedTuple):
    """:ivar tell: takes a sentence; :ivar base: where the image lies on the disk, bytes"""

    tell: Callable[[str], None]
    base: int


def _rows(
    image: Image, layout: Layout, offset: int, length: int, salvaged: _Salvaged | None
) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
    """(offsets in the image, actions); in a range that the image cannot tell about, by halves down to one sector."""
    import numpy as np

    try:
        if layout.over_backing:
            return _top_layer(image.node, offset, length)
        found, in_hole = split_at_holes(image.node, image.extents(offset, length))
        return found.offset, np.where(found.reads_zero() | in_hole, ZERO, COPY).astype(np.uint8)
    except ByreError as error:
        if salvaged is None:
            raise
        if length <= SECTOR:
            salvaged.tell(f"error while reading block status at offset {salvaged.base + offset}: {error}")
            return np.array([offset], np.int64), np.array([COPY], np.uint8)
    half = align_up(length // 2, SECTOR)
    first = _rows(image, layout, offset, half, salvaged)
    second = _rows(image, layout, offset + half, length - half, salvaged)
    return np.concatenate([first[0], second[0]]), np.concatenate([first[1], second[1]])


def _top_layer(top: Node, offset: int, length: int) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
    """Rows of the top layer alone: what it does not hold is left to the backing file, if that is long enough."""
    import numpy as np

    layers = chain.layers(top)
    below = layers[1] if len(layers) > 1 else None
    found, in_hole = split_at_holes(top, chain.extents(top, offset, length, base=below))
    table = np.full(4, COPY, np.uint8)
    table[[DATA, KIND_ZERO, UNALLOCATED, COMPRESSED]] = (COPY, ZERO, _SKIP if below else ZERO, COPY)
    starts, actions = found.offset, np.where(in_hole, np.uint8(ZERO), table[found.kind])
    if below is not None:
        starts, actions = _cut(starts, actions, below.size, offset + length)
        actions[(actions == _SKIP) & (starts >= below.size)] = ZERO
    return starts, actions


def _cut(starts: NDArray[np.int64], actions: NDArray[np.uint8], at: int,
         end: int) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:  # fmt: skip
    """The rows with a border at ``at``, if that lies inside one."""
    import numpy as np

    if not starts[0] < at < end:
        return starts, actions
    index = int(np.searchsorted(starts, at, "left"))
    if index < len(starts) and starts[index] == at:
        return starts, actions
    return np.insert(starts, index, at), np.insert(actions, index, actions[index - 1])


def _joined(starts: NDArray[np.int64], actions: NDArray[np.uint8]) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
    import numpy as np

    keep = np.concatenate(([True], actions[1:] != actions[:-1]))
    return starts[keep], actions[keep]


def _whole_clusters(starts: NDArray[np.int64], actions: NDArray[np.uint8], end: int, cluster: int,
                    disk_size: int) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:  # fmt: skip
    """Compressed clusters are written whole: one that is partly data is copied as a whole."""
    import numpy as np

    stops = np.append(starts[1:], end)
    quiet = actions != COPY
    first = -(-starts[quiet] // cluster) * cluster
    last = np.where(stops[quiet] >= disk_size, stops[quiet], stops[quiet] // cluster * cluster)
    kept = first < last
    first, last, kind = first[kept], last[kept], actions[quiet][kept]
    points = np.concatenate((starts[:1], first, last))
    labels = np.concatenate((np.array([COPY], np.uint8), kind, np.full(len(last), COPY, np.uint8)))
    # Where one quiet range ends and the next begins, or the window begins, the later entry counts.
    order = np.lexsort((labels != COPY, points))
    points, labels = points[order], labels[order]
    final = np.append(points[1:] != points[:-1], True) & (points < end)
    return _joined(points[final], labels[final])


# -- the target -----------------------------------------------------------------------------------


def check_not_source(sources: Iterable[Image], target: str) -> None:
    """:raises Busy: ``target`` is a file that a source consists of"""
    if has_protocol(target) and not target.startswith("file:"):
        return
    try:
        found = os.stat(target.removeprefix("file:"))
    except OSError:
        return
    is_device = stat.S_ISBLK(found.st_mode)
    identity = ("device", found.st_rdev) if is_device else (found.st_dev, found.st_ino)
    for image in sources:
        for node in list(image.graph.nodes.values()):
            if getattr(node, "identity", None) == identity:
                raise Busy("the output file is a file of the input image", where=target)


class MadeFiles:
    """The files that a creation makes: those which were not there before.

    :param beside: names of files that are made beside ``target``
    :ivar begun: the creation itself succeeded, so that what was there before is gone
    """

    def __init__(self, target: str, options: Mapping[str, object], beside: Sequence[str] = ()) -> None:
        data_file = options.get("data_file")
        named = (*beside, data_file) if isinstance(data_file, str) and data_file else beside
        names = [target, *(resolve_backing(target, name) for name in dict.fromkeys(named))]
        paths = [name.removeprefix("file:") for name in names]
        self._new = [path for path in paths if not has_protocol(path) and not os.path.lexists(path)]
        self._old = [path for path in paths if path not in self._new]
        self.begun = False

    def remove(self, error: BaseException) -> str:
        """Remove them; a sentence about what is left, "" if nothing is.

        :param error: what ended it. A creation that was refused tidies up itself; one that was interrupted may not
        """
        left = self._old if self.begun or not isinstance(error, ByreError) else []
        for path in self._new:
            try:
                if os.path.isfile(path):
                    os.unlink(path)
            except OSError:
                left = [*left, path]
        return f"{' and '.join(left)} {'were' if len(left) > 1 else 'was'} left behind incomplete" if left else ""


# -- bitmaps --------------------------------------------------------------------------------------


def check_bitmaps(source: Image, *, skip_broken: bool = False) -> None:
    """:raises NotSupported: the source has no persistent bitmaps, or one that cannot be copied"""
    for name, _, inconsistent in _store_of(source, "Source lacks bitmap support").entries():
        if inconsistent and not skip_broken:
            raise NotSupported(f"Cannot copy inconsistent bitmap '{name}'",
                               hint="try --skip-broken-bitmaps, or delete it with bitmap --remove")  # fmt: skip


def check_bitmap_target(target: Image) -> None:
    """:raises NotSupported: it cannot keep bitmaps"""
    _store_of(target, f"Format driver '{target.format}' does not support bitmaps")


def copy_bitmaps(source: Image, target: Image, warn: Callable[[str], None]) -> None:
    """Copy the persistent bitmaps of ``source``, with their granularity and whether they are enabled.

    :param warn: told of those that are left out because they are inconsistent
    """
    into = _store_of(target, "")
    for bitmap in _store_of(source, "").all():
        if not bitmap.persistent:
            continue
        if bitmap.inconsistent:
            warn(f"Skipping inconsistent bitmap '{bitmap.name}'")
            continue
        try:
            made = into.add(bitmap.name, bitmap.granularity, enabled=bitmap.enabled)
        except ByreError as error:
            error.message = f"Failed to create bitmap {bitmap.name}: {error.message}"
            raise
        try:
            made.merge(bitmap)
        except ByreError as error:
            into.remove(bitmap.name)
            error.message = f"Failed to populate bitmap {bitmap.name}: {error.message}"
            raise


def _store_of(image: Image, refusal: str) -> BitmapStore:
    node = image.node
    store = node.bitmap_store() if isinstance(node, HasBitmaps) else None
    if store is None or not store.can_persist:
        raise NotSupported(refusal)
    return store
