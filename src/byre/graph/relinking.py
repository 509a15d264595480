"""Shorter chains: an overlay skips layers, in the graph and in its header; and headers that name another file.

The header is durable before the graph changes (until then both ways read the same), so that a crash at any moment
leaves an overlay that reads as it did.
"""

from __future__ import annotations

import os
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

from ..catalog import driver
from ..errors import ByreError, InvalidArgument, NotSupported
from . import blockers, chain
from .live import Rewiring, check_unfrozen, lead_backing, quiesce, settled
from .opening import has_protocol
from .reopening import set_read_only

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from ..formats.abilities import BackingChangeable
    from .child import Child
    from .graph import Graph
    from .node import Node

__all__ = ["NewHeader", "Relinked", "backing_edges", "backing_name", "change_backing_file", "check_header",
           "cut_short", "drop_intermediate", "dropped", "flush_ahead", "overlays_of",
           "shortened", "writable"]  # fmt: skip


class NewHeader(NamedTuple):
    """What an overlay's header is to name: a file and its driver, both "" for none."""

    name: str
    format: str


def backing_name(overlay: Node, base: Node | None) -> NewHeader:
    """How ``overlay`` names ``base`` as its backing file: by path, without a folder if both lie in the same one."""
    if base is None:
        return NewHeader("", "")
    base = chain.skip_filters(base)
    name = base.filename
    if has_protocol(name) or os.path.isabs(name):
        return NewHeader(name, base.driver)
    if not has_protocol(overlay.filename) and os.path.dirname(name) == os.path.dirname(overlay.filename):
        return NewHeader(os.path.basename(name), base.driver)
    return NewHeader(os.path.abspath(name), base.driver)


def check_header(overlay: Node, header: NewHeader) -> BackingChangeable:
    """The node whose header can be made to say that.

    :raises NotSupported: it cannot
    :raises NoSpace: the name is too long
    """
    # Not isinstance with the protocol class: formats lie above this level.
    if not hasattr(overlay, "change_backing") or not hasattr(overlay, "check_backing"):
        raise NotSupported(f"driver {overlay.driver!r} cannot change its backing file", where=overlay.filename)
    changeable: BackingChangeable = overlay
    if not overlay.read_only:  # else it is made writable first, and then asked again
        changeable.check_backing(*header)
    return changeable


@contextmanager
def writable(graph: Graph, node: Node) -> Iterator[None]:
    """``node`` is writable in the body, although it may be used read-only; requests are held back by the caller.

    :raises Busy: it cannot be, for now
    """
    if not node.read_only:
        yield
        return
    set_read_only(graph, node, False)
    try:
        yield
    finally:
        set_read_only(graph, node, True)


def change_backing_file(graph: Graph, node: Node, name: str, format: str = "") -> None:
    """Write another backing file name into the header of ``node``; the open graph stays as it is.

    :param format: left out, that of the backing file in the graph
    :raises Busy: the operation is blocked
    :raises InvalidArgument: there is no such format
    """
    if format:
        driver(format)
    node = chain.skip_filters(node)
    with settled(graph, [node]):
        edge = node.children.get("backing")
        if name and not format:
            if edge is None:
                raise InvalidArgument("a backing file is given without its format", where=node.filename)
            format = chain.skip_filters(edge.node).driver
        blockers.check(graph, node, "change")
        _write_header(graph, node, NewHeader(name, format if name else ""))


def _write_header(graph: Graph, node: Node, header: NewHeader) -> None:
    with writable(graph, node):
        check_header(node, header).change_backing(*header)


def overlays_of(node: Node) -> list[Node]:
    """The layers whose backing file ``node`` is, filters between skipped."""
    found: list[Node] = []
    todo = [node]
    while todo:
        for edge in todo.pop().parents:
            if edge.parent is None:
                continue
            if edge.role == "backing":
                found.append(edge.parent)
            elif edge.parent.kind == "filter" and edge.name == "file":
                todo.append(edge.parent)
    return found


class Relinked:
    """Overlays that stand on another layer, in the graph and in their headers, until :meth:`finish` or :meth:`undo`.

    They read the same either way. The layers they stood on stay open until then. The caller holds back the users.

    :raises ByreError: nothing has changed
    """

    def __init__(self, graph: Graph, overlays: Sequence[Node], below: Node | None, backing_file: str | None) -> None:
        self._graph = graph
        headers = {overlay: _header_for(overlay, below, backing_file) for overlay in overlays}
        self._old_headers = {overlay: _recorded(overlay) for overlay in overlays}
        self._before = {overlay: _backing(overlay) for overlay in overlays}
        self._lead(headers, dict.fromkeys(overlays, below))

    def _lead(self, headers: dict[Node, NewHeader], targets: dict[Node, Node | None]) -> None:
        graph = self._graph
        with quiesce(graph, targets), _headers(graph, headers), Rewiring(graph) as change:
            for overlay, below in targets.items():
                lead_backing(change, graph, overlay, below)

    def finish(self) -> None:
        """It stays so: what nobody uses any more is closed."""
        for node in dict.fromkeys(self._before.values()):
            if node is not None and not node.closed:
                self._graph.release(node)

    def undo(self) -> None:
        """:raises ByreError: it stays so after all"""
        self._lead(self._old_headers, self._before)


def _header_for(overlay: Node, below: Node | None, backing_file: str | None) -> NewHeader:
    """:raises ByreError: the overlay cannot be led to ``below``"""
    header = backing_name(overlay, below)
    if backing_file is not None:
        header = NewHeader(backing_file, header.format if backing_file else "")
    check_header(overlay, header)
    if "backing" in overlay.children:
        check_unfrozen(overlay.children["backing"])
    return header


def _recorded(overlay: Node) -> NewHeader:
    return NewHeader(getattr(overlay, "backing_name", ""), getattr(overlay, "backing_format", ""))


def _backing(overlay: Node) -> Node | None:
    return overlay.children["backing"].node if "backing" in overlay.children else None


def drop_intermediate(graph: Graph, top: Node, base: Node, *, backing_file: str | None = None) -> None:
    """Every overlay of ``top`` has ``base`` as its backing file from now on, in its header too; what lies between
    is closed where nobody else uses it.

    ``base`` reads as ``top`` does.

    :param backing_file: as the headers are to have it; derived if left out
    :raises InvalidArgument: ``base`` is not below ``top``, or ``top`` has no overlay
    :raises ByreError: nothing has changed
    """
    dropped(graph, top, base, backing_file=backing_file).finish()


def dropped(graph: Graph, top: Node, base: Node, *, backing_file: str | None = None) -> Relinked:
    """As :func:`drop_intermediate`, for those who may have to undo it."""
    top, base = chain.skip_filters(top), chain.skip_filters(base)
    flush_ahead(overlays_of(top))
    with settled(graph, [top, base]):
        below = _reached(top, base)
        overlays = overlays_of(top)
        if not overlays:
            raise InvalidArgument(f"node {top.name!r} is not the backing file of another", where=top.filename)
        return Relinked(graph, overlays, below, backing_file)


def cut_short(graph: Graph, overlay: Node, base: Node | None, *, backing_file: str | None = None) -> None:
    """``overlay`` alone skips what lies between it and ``base`` (everything below without one).

    It reads the same either way. What lies between is closed where nobody else uses it.

    :param backing_file: as its header is to have it; derived if left out
    :raises ByreError: nothing has changed
    """
    shortened(graph, overlay, base, backing_file=backing_file).finish()


def shortened(graph: Graph, overlay: Node, base: Node | None, *, backing_file: str | None = None) -> Relinked:
    """As :func:`cut_short`, for those who may have to undo it."""
    overlay = chain.skip_filters(overlay)
    flush_ahead([overlay])
    with settled(graph, [overlay]):
        below = None if base is None else _reached(overlay, chain.skip_filters(base))
        return Relinked(graph, [overlay], below, backing_file)


def _reached(top: Node, base: Node) -> Node:
    """``base``, a layer below ``top``, with the filters that belong to it.

    :raises InvalidArgument: it is not below
    """
    layers = chain.layers(top)
    if base not in layers[1:]:
        raise InvalidArgument(f"node {base.name!r} is not below {top.name!r}", where=base.filename)
    return layers[layers.index(base) - 1].children["backing"].node


@contextmanager
def _headers(graph: Graph, wanted: dict[Node, NewHeader]) -> Iterator[None]:
    """The headers say so; if the body fails, they say again what they said."""
    done: list[tuple[Node, NewHeader]] = []
    try:
        for node, header in wanted.items():
            old = _recorded(node)
            _write_header(graph, node, header)
            done.append((node, old))
        yield
    except BaseException:
        for node, old in reversed(done):
            try:
                _write_header(graph, node, old)
            except ByreError as error:
                graph.warnings.append(f"cannot undo the change of a backing file name: {error}")
        raise


def flush_ahead(nodes: Iterable[Node]) -> None:
    """Before requests are held back for a change that ends with a flush: then that one is short.

    Nobody is held back yet, so that others may close a node meanwhile.
    """
    for node in nodes:
        if not node.read_only and not node.closed:
            try:
                node.flush()
            except ByreError:
                if not node.closed:
                    raise


def backing_edges(top: Node, base: Node | None) -> list[Child]:
    """The backing edges from ``top`` down to ``base`` (or to the end), through which its content is reached."""
    edges: list[Child] = []
    for layer in chain.layers(top):
        if layer is base:
            break
        if "backing" in layer.children:
            edges.append(layer.children["backing"])
    return edges
