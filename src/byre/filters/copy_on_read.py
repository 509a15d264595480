"""Copy-on-read: what is read from a layer below is kept in the active layer, so that it is fetched once.

Driver ``copy-on-read``. Zeroes are kept as zero clusters where the format has them. With ``bottom`` (the name of a
layer's node), only what the layers below the active one down to that one hold is copied; without it, everything that
is read, so that in the end the image stands alone. The copying is :mod:`byre.graph.populate`'s, safe against writers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from ..errors import InvalidArgument, NotFound
from ..graph import chain
from ..graph.node import PERM_WRITE_UNCHANGED
from ..io.extent import UNALLOCATED
from ..options import Option, OptionSet
from .base import CompressionFilter, open_filtered

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from ..graph.child import Child
    from ..graph.graph import Graph
    from ..graph.live import Frozen
    from ..graph.node import Node
    from ..graph.opening import OpenFlags, OpenRequest
    from ..options import OptionValues

__all__ = ["CopyOnReadNode", "cover"]

OPTIONS: Final = OptionSet(Option("bottom", "str", "node name of the lowest layer that is copied from"))
CHILDREN: Final = ("file",)


def open_node(request: OpenRequest) -> CopyOnReadNode:
    _check_writable(request.flags.read_only)
    below = request.open_child("file", flags=request.flags._replace(detect_zeroes="off"))
    bottom = request.options.text("bottom") or ""
    node = CopyOnReadNode(bottom=bottom, name=request.name, graph=request.opener.graph)
    open_filtered(request, node, "file", below)
    node.runtime = request.options
    return node


def cover(graph: Graph, below: Node, *, bottom: str = "", name: str = "") -> CopyOnReadNode:
    """A new copy-on-read node over ``below``, which nobody uses yet.

    :raises InvalidArgument: ``below`` is read-only
    """
    _check_writable(below.read_only)
    node = CopyOnReadNode(bottom=bottom, name=name, graph=graph)
    node.limits, node.filename = below.limits, below.filename
    graph.add(node)
    try:
        graph.attach(node, "file", below, "filtered")
        node.chain_opened()
    except BaseException:
        graph.release(node)
        raise
    return node


def _check_writable(read_only: bool) -> None:
    if read_only:
        raise InvalidArgument("Can't use copy-on-read on read-only device", hint="open it for writing")


class CopyOnReadNode(CompressionFilter):
    """Copies what is read into the layer below it. Guarded by: nothing; it has no state that requests change.

    :ivar bottom: node name of the lowest layer that is copied from; "" for all, and for zeroes that no layer holds
    """

    driver = "copy-on-read"

    def __init__(self, *, bottom: str = "", name: str = "", graph: Graph | None = None) -> None:
        super().__init__(name=name, read_only=False)
        self.bottom = bottom
        self.runtime: OptionValues | None = None
        self._graph = graph
        self._frozen: Frozen | None = None

    def read_into(self, offset: int, buffer: memoryview) -> None:
        start, end = offset, offset + len(buffer)
        for first, last in self._missing(offset, min(end, self.size)):
            if start < first:
                self.below.read_into(start, buffer[start - offset : first - offset])
            base = self._base() if self.bottom else None
            self.below.populate(first, last - first, base=base, everything=not self.bottom)
            self.below.read_into(first, buffer[first - offset : last - offset])
            start = last
        if start < end:
            self.below.read_into(start, buffer[start - offset :])

    def readv_into(self, offset: int, buffers: Sequence[memoryview]) -> None:
        for buffer in buffers:
            self.read_into(offset, buffer)
            offset += len(buffer)

    def _missing(self, offset: int, end: int) -> Iterator[tuple[int, int]]:
        """The ranges that the active layer does not hold; found one by one."""
        while offset < end:
            extent = self.below.block_status(offset, end - offset)
            if extent.kind == UNALLOCATED:
                yield extent.offset, extent.end
            offset = extent.end

    def _layers(self) -> list[Node]:
        """The layers that are copied from, and the active one.

        :raises NotFound: the chain has no layer ``bottom``
        """
        layers = chain.layers(self.below)
        for index, layer in enumerate(layers):
            if layer.name == self.bottom:
                return layers[: index + 1]
        raise NotFound(f"Bottom node '{self.bottom}' not found in the chain of layers", where=self.filename)

    def _base(self) -> Node | None:
        """The layer under ``bottom``, from which on nothing is copied."""
        edge = self._layers()[-1].children.get("backing")
        return edge.node if edge is not None else None

    def chain_opened(self) -> None:
        """Look for ``bottom`` now rather than at the first read; the layers down to it stay where they are."""
        if self.bottom and self._frozen is None and self._graph is not None:
            from ..graph.live import Frozen

            edges = [layer.children["backing"] for layer in self._layers()[:-1]]
            self._frozen = Frozen(self._graph, edges, f"copy-on-read node {self.name!r} copies from there")

    def close(self) -> None:
        if self._frozen is not None:
            self._frozen.release()
        super().close()

    def child_permissions(self, child: Child, used: int, shared: int) -> tuple[int, int]:
        return used | PERM_WRITE_UNCHANGED, shared

    def reopen_prepare(self, flags: OpenFlags, options: OptionValues) -> object:
        _check_writable(flags.read_only)
        return flags
