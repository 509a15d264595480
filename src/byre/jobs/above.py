"""What stream and commit of layers share: the walk over what lies above a base, range by range; changing one's mind."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from ..errors import ByreError
from ..graph import chain
from ..io.extent import UNALLOCATED, ZERO
from .stride import Stride

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ..graph.graph import Graph
    from ..graph.node import Node
    from ..graph.relinking import Relinked
    from ..image import Image
    from ..io.extentmap import ExtentMap
    from .job import Control

__all__ = ["ranges_above", "take_back"]

_ZERO_STEP: Final = 1 << 30


def ranges_above(handle: Image, base: Node | None, control: Control, *, chunk: int, least: int,
                 top_too: bool) -> Iterator[tuple[int, int]]:  # fmt: skip
    """``(offset, length)`` of what the layers of ``handle`` above ``base`` hold (all of them without one), ascending.

    Data is cut at multiples of ``chunk``, zeroes at multiples of 1 GiB. What is passed over counts as done. The
    graph is looked at a window at a time, each as it is then.

    :param least: where the speed is low, data is cut at multiples of less than ``chunk``, but not less than this
    :param top_too: with what the top layer holds; otherwise only what it shows of those below it, and of the zeroes
        that a layer shows behind its end only those that hide something of the base
    """
    size = handle.size
    stride = Stride([handle.node])
    shown = size if top_too else base.size if base is not None else 0
    ends = [max(layer.size, shown) for layer in chain.layers(handle.node)]
    position = 0
    for offset, length in stride.windows(0, size):
        found = _window(handle, base, offset, length)
        stride.saw(len(found))
        due = found.kind != UNALLOCATED
        if not top_too:
            due &= found.depth > 0
        rows = found.take(due.nonzero()[0])
        for extent, depth in zip(rows, rows.depth.tolist(), strict=True):
            stop = min(extent.end, ends[depth])
            if extent.offset >= stop:
                continue
            if extent.offset > position:
                control.count(extent.offset - position, 0)
            position = stop
            if extent.kind == ZERO:
                yield from chain.windows(extent.offset, position, _ZERO_STEP)
            else:
                yield from _pieces(extent.offset, position, control, chunk, least)
    control.count(size - position, 0)


def _pieces(offset: int, end: int, control: Control, chunk: int, least: int) -> Iterator[tuple[int, int]]:
    """What the speed was at one piece, it need not be at the next."""
    while offset < end:
        size = control.at_once(chunk, least)
        size = min(size - offset % size, end - offset)
        yield offset, size
        offset += size


def _window(handle: Image, base: Node | None, offset: int, length: int) -> ExtentMap:
    return handle.within(lambda: chain.extents(handle.node, offset, length, base=base))


def take_back(relinked: Relinked | None, graph: Graph) -> None:
    """The chain is as it was, if that can be. If not, it reads the same all the same."""
    if relinked is None:
        return
    try:
        relinked.undo()
    except ByreError as error:
        graph.warnings.append(f"a chain stays short although the job failed: {error}")
        relinked.finish()
